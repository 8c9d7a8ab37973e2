"""What a run tells its reader: metrics, progress lines and tables.

`clu.metric_writers` imports TensorFlow, so TensorBoard events are written with
tensorboardX.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import logging as python_logging
import math
import pathlib
import sys
import time
from typing import Any

from absl import logging
from etils import epy
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import background

with epy.lazy_imports():  # 0.3 s and 0.4 s, which no --help should pay.
  from clu import parameter_overview
  import tensorboardX

# Peak bfloat16 FLOP/s of one chip without sparsity, by how `device_kind`
# begins; the first match counts. https://cloud.google.com/tpu/docs/v4 (v5e,
# v5p, v6e) and the data sheets of NVIDIA, whose figures with sparsity are
# twice these.
_PEAK_FLOPS = (
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5', 459e12),
  ('TPU v6', 918e12),
  ('NVIDIA A100', 312e12),
  ('NVIDIA H100 PCIe', 756e12),
  ('NVIDIA H100', 989e12),
  ('NVIDIA H200', 989e12),
  ('NVIDIA L40S', 362e12),
  ('NVIDIA L4', 121e12),
)

# Seconds for what is being written, before the process leaves.
_PATIENCE = 1.0


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and to TensorBoard events.

  Every line of `metrics.jsonl` is an object with 'time' (seconds since 1970),
  'stage', 'step' and the values. Nothing is ever removed: a run that resumes
  from step s writes the lines after s again, with a later 'time'. Of two lines
  of the same stage and step the last one counts.

  A disk or a TensorBoard that is slow or broken costs lines and pictures, not
  time, see `background`.

  Only process 0 writes; on the others every method does nothing.
  """

  def __init__(self, workdir: str | pathlib.Path):
    """Appends to `metrics.jsonl` and `tensorboard/` in a local directory."""
    self._lines = None
    if jax.process_index() == 0:
      workdir = pathlib.Path(workdir)
      self._lines = background.Lines(workdir / 'metrics.jsonl')
      self._skipped = background.Lines(workdir / 'skipped.jsonl')
      self._pictures = background.Background('pictures')
      self._tensorboard = background.Background('TensorBoard')
      self._directory, self._events = workdir / 'tensorboard', None
      self._parts = (
        self._lines,
        self._skipped,
        self._pictures,
        self._tensorboard,
      )

  def scalars(
    self, step: int, values: Mapping[str, float], *, stage: str
  ) -> None:
    """Writes numbers; in TensorBoard they are named `<stage>/<name>`.

    Args:
      step: of the stage.
      values: anything `float` takes; an array on a device is waited for. What
        is not finite becomes a string, 'nan' or 'inf', as JSON has no word
        for it.
      stage: name of the stage.
    """
    if not self._lines:
      return
    now = time.time()
    values = {name: float(value) for name, value in values.items()}
    self._lines.append(
      {'time': round(now, 3), 'stage': stage, 'step': int(step)}
      | {
        name: value if math.isfinite(value) else str(value)
        for name, value in values.items()
      }
    )
    summary = tensorboardX.summary.Summary(
      value=[
        tensorboardX.summary.Summary.Value(
          tag=f'{stage}/{name}', simple_value=value
        )
        for name, value in values.items()
      ]
    )
    self._tensorboard.submit(self._write_event, summary, step, now)

  def skipped(self, line: Mapping[str, Any]) -> None:
    """Writes a line of `skipped.jsonl`, about a step that was left out."""
    if self._lines:
      self._skipped.append(line)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a picture to TensorBoard: uint8 `[H, W, 3]`."""
    now = time.time()
    if self._lines:
      self._tensorboard.submit(
        lambda: self._write_event(
          tensorboardX.summary.image(name, image, dataformats='HWC'), step, now
        )
      )

  def submit(self, save: Callable[..., None], *args: Any) -> None:
    """Has `save(*args)`, which writes a picture, called in the background."""
    if self._lines:
      self._pictures.submit(save, *args)

  def flush(self) -> None:
    """Waits a moment until all is written."""
    if self._lines:
      background.settle(self._parts, _PATIENCE)

  def close(self) -> None:
    """Waits some seconds for all that is left."""
    if self._lines:
      for part in self._parts:
        part.close()

  def _write_event(self, summary, step: int, now: float) -> None:
    if self._events is None:
      self._directory.mkdir(parents=True, exist_ok=True)
      # The usual SummaryWriter has a thread of its own, which a full disk ends
      # without a word, and after which nothing ends.
      self._events = tensorboardX.event_file_writer.EventsWriter(
        str(self._directory / 'events')
      )
    self._events.write_event(
      tensorboardX.event_file_writer.event_pb2.Event(
        summary=summary, step=step, wall_time=now
      )
    )
    self._events.flush()


class Progress:
  """One line of progress a report, and the rates it shows.

  Make one when the step is compiled: time counts from then on.
  """

  def __init__(
    self, stage: str, *, first_step: int, last_step: int, batch_size: int
  ):
    """Starts the clock.

    Args:
      stage: how a line begins, such as "stage 1/2 '32'".
      first_step: steps taken already.
      last_step: steps at the end of the stage.
      batch_size: images a step over all devices.
    """
    self._stage = stage
    self._last_step = last_step
    self._batch_size = batch_size
    self._start_step = self._step = first_step
    self._start_time = self._time = time.monotonic()
    self._paused = 0.0

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Keeps what happens inside (saving, sampling) out of the rates."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._paused += time.monotonic() - begin

  def report(
    self,
    step: int,
    *,
    loss: float,
    levels: Mapping[str, float],
    grad_norm: float,
    learning_rate: float,
  ) -> dict[str, float]:
    """Logs a line about the steps since the last report.

    Args:
      step: steps taken so far, at least one more than at the last report.
      loss: the weighted sum.
      levels: each level's loss by the level's name, coarse to fine.
      grad_norm: before clipping.
      learning_rate: of the last step.

    Returns:
      'images_per_second' and 'seconds_per_step' without what was paused, and
      'eta_seconds' until the end of the stage, at the pace so far with pauses.
    """
    now = time.monotonic()
    seconds = (now - self._time - self._paused) / (step - self._step)
    pace = (now - self._start_time) / (step - self._start_step)
    self._step, self._time, self._paused = step, now, 0.0
    rates = {
      'images_per_second': self._batch_size / seconds,
      'seconds_per_step': seconds,
      'eta_seconds': pace * (self._last_step - step),
    }
    each = ', '.join(f'{name}: {value:.4f}' for name, value in levels.items())
    logging.info(
      '%s  step %d/%d (%d %%)  %.1f images/s  eta %s  loss %.4f%s  grad %.2f'
      '  lr %.1e',
      self._stage,
      step,
      self._last_step,
      100 * step // self._last_step,
      rates['images_per_second'],
      duration(rates['eta_seconds']),
      loss,
      f' ({each})' if len(levels) > 1 else '',
      grad_norm,
      learning_rate,
    )
    return rates


def duration(seconds: float) -> str:
  """Seconds in two units at most: 9s, 4m12s, 1h05m, 2d03h."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days}d{hours:02}h'
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


def setup_logging() -> None:
  """Logs this package's progress, and of its libraries only the warnings.

  Orbax alone logs some forty lines a save, and a hundred tracebacks of one that
  fails: it raises that too, and whoever handles it logs a line.
  """
  package = str(pathlib.Path(__file__).parent)

  def is_ours_or_a_warning(record: python_logging.LogRecord) -> bool:
    return (
      record.levelno >= python_logging.WARNING
      and not record.exc_info
      or record.pathname.startswith(package)
    )

  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(is_ours_or_a_warning)

  # When a save fails, TensorStore reports each write that ends after Orbax has
  # given up, a thousand tracebacks from its own threads.
  report = sys.unraisablehook

  def report_others(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = report_others


def peak_flops(device: jax.Device) -> float | None:
  """The FLOP/s that model FLOPs utilisation (MFU) is a fraction of.

  Returns:
    For a TPU or GPU the vendor's bfloat16 peak of one chip, None if it is not
    in the table. For a CPU, whose vendor states none, what
    `measure_matmul_flops` reaches (0.3 s), shared by the CPU's devices: MFU is
    then a fraction of the best matrix product.
  """
  if device.platform == 'cpu':
    return measure_matmul_flops(device) / jax.local_device_count()
  for kind, flops in _PEAK_FLOPS:
    if device.device_kind.startswith(kind):
      return flops
  return None


def measure_matmul_flops(
  device: jax.Device, size: int = 1024, seconds: float = 0.2
) -> float:
  """Best FLOP/s of a float32 product of `[size, size]` matrices, timed."""
  x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
  matmul = jax.jit(jnp.matmul)
  matmul(x, x).block_until_ready()
  best, end = math.inf, time.monotonic() + seconds
  while time.monotonic() < end:
    begin = time.monotonic()
    matmul(x, x).block_until_ready()
    best = min(best, time.monotonic() - begin)
  return 2 * size**3 / best


def flops_per_step(
  compiled: jax.stages.Compiled, rounds: int = 1
) -> float | None:
  """XLA's count of one call's FLOPs on one device, None if it has none.

  A program partitioned over n devices does n times as many.

  Args:
    compiled: the program.
    rounds: of the loop that nearly all of it is; XLA counts one of them.
  """
  cost = compiled.cost_analysis()
  if isinstance(cost, list):  # One a program before JAX 0.5.
    cost = cost[0] if cost else None
  flops = (cost or {}).get('flops', 0.0)
  return flops * rounds if flops > 0 else None


def log_parameter_overview(params: Mapping[str, Any]) -> None:
  """Logs the number of parameters of each block.

  Args:
    params: nested dicts of arrays or `jax.ShapeDtypeStruct`; what lies deeper
      than two levels is summed up.
  """

  @dataclasses.dataclass
  class Row:
    name: str
    parameters: int

  rows = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path[:2], simple=True, separator='/')
    row = rows.setdefault(name, Row(name, 0))
    row.parameters += math.prod(leaf.shape)
  total = sum(row.parameters for row in rows.values())
  logging.info(
    '%s parameters\n%s',
    f'{total:,}',
    parameter_overview.make_table(list(rows.values())),
  )


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
  """An aligned plain-text table.

  Args:
    rows: cells; None shows as '-', a float in four significant digits.
    headers: one a column. A column of numbers is aligned to the right.

  Returns:
    Lines without a trailing newline.
  """

  def cell(value: Any) -> str:
    if value is None:
      return '-'
    if isinstance(value, float):
      return f'{value:.4g}'
    return f'{value:,}' if isinstance(value, int) else str(value)

  lines = [list(headers), *([cell(value) for value in row] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines.insert(1, ['-' * width for width in widths])
  is_text = [
    any(isinstance(value, str) for value in column) for column in zip(*rows)
  ] or [True] * len(widths)
  return '\n'.join(
    '  '.join(
      text.ljust(width) if left else text.rjust(width)
      for text, width, left in zip(line, widths, is_text)
    ).rstrip()
    for line in lines
  )
