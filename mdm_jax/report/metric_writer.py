"""Writes metrics and images of a run to files and TensorBoard.

`clu.metric_writers` imports TensorFlow, so TensorBoard events are written with
tensorboardX.
"""

from collections.abc import Callable, Mapping
import math
import pathlib
import time
from typing import Any

from etils import epy
import jax
import numpy as np

from mdm_jax.report import background

with epy.lazy_imports():  # 0.4 s, which no --help should pay.
  import tensorboardX

# Seconds to wait for pending writes before the process exits.
_PATIENCE = 1.0


class MetricWriter:
  """Writes metrics to `metrics.jsonl` and to TensorBoard events.

  Every line of `metrics.jsonl` is an object with 'time' (seconds since 1970),
  'stage', 'step' and the values. Lines are only ever appended: a run that
  resumes from step s writes the lines after s again, with a later 'time'. If
  two lines have the same stage and step, the last one counts.

  Files are written in the background: a slow or failing disk drops lines and
  images, and never blocks training.

  Only process 0 writes; on the others every method does nothing.
  """

  def __init__(self, workdir: str | pathlib.Path):
    """Appends to `metrics.jsonl`, `skipped.jsonl` and `tensorboard/`.

    Args:
      workdir: working directory of the run, local.
    """
    self._lines = None
    if jax.process_index() == 0:
      workdir = pathlib.Path(workdir)
      self._lines = background.LineFile(workdir / 'metrics.jsonl')
      self._skipped = background.LineFile(workdir / 'skipped.jsonl')
      self._images = background.BackgroundWriter('images')
      self._tensorboard = background.BackgroundWriter('TensorBoard')
      self._directory, self._events = workdir / 'tensorboard', None
      self._parts = (
        self._lines,
        self._skipped,
        self._images,
        self._tensorboard,
      )

  def scalars(
    self, step: int, values: Mapping[str, float], *, stage: str
  ) -> None:
    """Writes numbers; in TensorBoard they are named `<stage>/<name>`.

    Args:
      step: number of steps taken in the stage.
      values: anything that `float` accepts; waits for arrays on devices. NaN
        and Inf are written as strings, since JSON has no numbers for them.
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
    """Writes a line about a skipped step to `skipped.jsonl`."""
    if self._lines:
      self._skipped.append(line)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes an image, uint8 `[H, W, 3]`, to TensorBoard."""
    now = time.time()
    if self._lines:
      self._tensorboard.submit(
        lambda: self._write_event(
          tensorboardX.summary.image(name, image, dataformats='HWC'), step, now
        )
      )

  def submit(self, save: Callable[..., None], *args: Any) -> None:
    """Calls `save(*args)`, which writes an image file, in the background."""
    if self._lines:
      self._images.submit(save, *args)

  def flush(self) -> None:
    """Waits at most a second for pending writes."""
    if self._lines:
      background.settle(self._parts, _PATIENCE)

  def close(self) -> None:
    """Waits some seconds for pending writes, then closes the files."""
    if self._lines:
      background.close(self._parts)

  def _write_event(self, summary, step: int, now: float) -> None:
    if self._events is None:
      self._directory.mkdir(parents=True, exist_ok=True)
      # Not a SummaryWriter: a full disk would silently end its own thread, and
      # its close() would never return.
      self._events = tensorboardX.event_file_writer.EventsWriter(
        str(self._directory / 'events')
      )
    self._events.write_event(
      tensorboardX.event_file_writer.event_pb2.Event(
        summary=summary, step=step, wall_time=now
      )
    )
    self._events.flush()
