"""Where a run is followed: TensorBoard, Weights & Biases.

`clu.metric_writers` and TensorBoard's own writer import TensorFlow where it is
installed, so event files are written here, with TensorBoard's messages.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
import io
import json
import os
import struct
import tempfile
import time
from typing import Any, Protocol

from absl import logging
from etils import epath, epy
import jax
import numpy as np

from mdm_jax.report import grid
from mdm_jax.runtime import files
from mdm_jax.runtime.appending import AppendedObjects

with epy.lazy_imports():  # Slow, which no --help should pay.
  from tensorboard.compat.proto import (
    event_pb2,
    summary_pb2,
    tensor_pb2,
    tensor_shape_pb2,
    types_pb2,
  )
  from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
  import wandb

# Seconds to type the key of one's account, where a terminal asks for it.
_LOGIN = 60


class Tracker(Protocol):
  """A program in which the metrics of a run are looked at.

  `MetricWriter` calls all methods in a thread of the tracker's own: they may be
  slow, and may raise an OSError, after which the next call tries again.

  Attributes:
    title: name in log lines.
    upload: uploads what the methods have left in memory, see
      `background.BackgroundWriter`; None if they leave nothing there.
  """

  title: str
  upload: Callable[[], None] | None

  def scalars(
    self, stage: str, step: int, now: float, values: Mapping[str, float]
  ) -> None:
    """Writes numbers of a step of a stage, by names as 'train/loss'.

    Args:
      stage: name of the stage.
      step: number of steps taken in the stage.
      now: seconds since 1970.
      values: the numbers, which may be NaN or infinite.
    """

  def image(
    self, stage: str, step: int, now: float, name: str, image: np.ndarray
  ) -> None:
    """Writes an image, uint8 `[H, W, 3]`, or frames `[T, H, W, 3]`."""

  def finish(self) -> None:
    """Ends the session. Nothing is written after it."""


class TensorBoard:
  """Event files, `<directory>/<stage>/events.out.tfevents.*`.

  Each stage is a run of TensorBoard, so that the same metric of all stages is
  in one chart although each stage counts its steps from 0.
  """

  title = 'TensorBoard'

  def __init__(self, directory: epath.PathLike, config: Mapping[str, Any]):
    """Nothing is written before the first number or image.

    Args:
      directory: where TensorBoard looks for it, on a disk or in a bucket.
      config: of the run, as JSON; shown as a text of the directory itself.
    """
    self._directory, self._config = epath.Path(directory), config
    self._files: dict[str, _EventFile | _EventObjects] = {}
    self._has_text = False
    self._open, self.upload = _EventFile, None
    if not files.is_local(directory):
      self._open, self.upload = _EventObjects, self._upload

  def scalars(
    self, stage: str, step: int, now: float, values: Mapping[str, float]
  ) -> None:
    """See `Tracker`."""
    self._write(
      stage,
      step,
      now,
      *(
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in values.items()
      ),
    )

  def image(
    self, stage: str, step: int, now: float, name: str, image: np.ndarray
  ) -> None:
    """See `Tracker`."""
    *_, height, width, _ = image.shape
    value = summary_pb2.Summary.Image(
      height=height,
      width=width,
      colorspace=3,
      encoded_image_string=grid.encode_png(image),
    )
    self._write(
      stage, step, now, summary_pb2.Summary.Value(tag=name, image=value)
    )

  def finish(self) -> None:
    """See `Tracker`."""
    for file in self._files.values():
      file.close()

  def _write(self, stage: str, step: int, now: float, *values) -> None:
    if not self._has_text:
      self._append('', event_pb2.Event(wall_time=now, summary=self._text()))
      self._has_text = True
    self._append(
      stage,
      event_pb2.Event(
        wall_time=now, step=step, summary=summary_pb2.Summary(value=values)
      ),
    )

  def _text(self):
    """The config, which Markdown shows as it is by the four spaces."""
    lines = json.dumps(self._config, indent=2).split('\n')
    text = '\n'.join(f'    {line}' for line in lines)
    metadata = summary_pb2.SummaryMetadata(
      plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name='text'),
      data_class=summary_pb2.DATA_CLASS_TENSOR,
    )
    tensor = tensor_pb2.TensorProto(
      dtype=types_pb2.DT_STRING,
      tensor_shape=tensor_shape_pb2.TensorShapeProto(
        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]
      ),
      string_val=[text.encode()],
    )
    value = summary_pb2.Summary.Value(
      tag='config', metadata=metadata, tensor=tensor
    )
    return summary_pb2.Summary(value=[value])

  def _append(self, stage: str, event) -> None:
    if stage not in self._files:
      name = f'events.out.tfevents.{time.time():.0f}.{os.getpid()}'
      self._files[stage] = self._open(self._directory / stage / name)
    self._files[stage].append(event)

  def _upload(self) -> None:
    for file in self._files.values():
      file.upload()


class _EventFile:
  """An event file on a disk."""

  def __init__(self, path: epath.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(path, 'ab', buffering=0)

  def append(self, event) -> None:
    if not self._file.seek(0, os.SEEK_END):  # Also after a disk that was full.
      _append_record(self._file, _version())
    _append_record(self._file, _record(event))

  def close(self) -> None:
    self._file.close()


class _EventObjects:
  """Event files in a bucket, which TensorBoard reads as one."""

  def __init__(self, path: epath.Path):
    self._objects = AppendedObjects(path, header=_version())

  def append(self, event) -> None:
    self._objects.append(_record(event))

  def upload(self) -> None:
    self._objects.flush()

  def close(self) -> None:
    """Nothing: `upload` is called after it."""


def _version() -> bytes:
  """The record with which each event file begins."""
  return _record(
    event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2')
  )


def _record(event) -> bytes:
  """A record of TensorFlow's format."""
  crc, record = pywrap_tensorflow.masked_crc32c, event.SerializeToString()
  length = struct.pack('<Q', len(record))
  return b''.join(
    (
      length,
      struct.pack('<I', crc(length)),
      record,
      struct.pack('<I', crc(record)),
    )
  )


def _append_record(file: io.RawIOBase, record: bytes) -> None:
  """Appends a record, or nothing if that fails."""
  end = file.seek(0, os.SEEK_END)
  try:
    if file.write(record) < len(record):
      raise OSError(f'{file.name}: the disk is full')
  except OSError:
    file.truncate(end)  # What follows could not be read.
    raise


class WeightsAndBiases:
  """A run of Weights & Biases, which later sessions continue.

  A metric is named `<stage>/train/loss`, and its chart counts the steps of its
  stage. WANDB_MODE, WANDB_PROJECT, WANDB_NAME and the other variables of W&B
  work as usual.
  """

  title = 'Weights & Biases'
  upload = None

  def __init__(
    self, workdir: epath.PathLike, config: Mapping[str, Any], run_id: str | None
  ):
    """Nothing is sent before the first number or image.

    Args:
      workdir: of the run; has the local files, in `wandb/`. Those of a run in a
        bucket are in a temporary directory, or in that of WANDB_DIR.
      config: of the run, as JSON.
      run_id: identifier of the run; None for a new one.
    """
    self._workdir, self._config, self._id = workdir, config, run_id
    self._stages = set()

  @functools.cached_property
  def _run(self):
    name, directory = os.path.abspath(self._workdir), os.fspath(self._workdir)
    if not files.is_local(self._workdir):
      name = os.fspath(self._workdir).rstrip('/')
      directory = os.environ.get('WANDB_DIR') or tempfile.mkdtemp(
        prefix='mdm_jax_wandb_'
      )
    run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', 'mdm_jax'),
      name=os.environ.get('WANDB_NAME', os.path.basename(name)),
      id=self._id,
      resume='allow',
      dir=directory,
      config=dict(self._config),
      allow_val_change=True,
      # The log is this program's, as are signals; it says where the run is.
      settings=wandb.Settings(console='off', silent=True),
    )
    if not run.offline:
      logging.info('Weights & Biases: %s', run.url)
    elif not files.is_local(self._workdir):
      logging.info('Weights & Biases, to be uploaded: %s', directory)
    return run

  def scalars(
    self, stage: str, step: int, now: float, values: Mapping[str, float]
  ) -> None:
    """See `Tracker`."""
    self._log(stage, step, values)

  def image(
    self, stage: str, step: int, now: float, name: str, image: np.ndarray
  ) -> None:
    """See `Tracker`."""
    image = grid.frame_at(image, 0.5)
    self._log(stage, step, {name: wandb.Image(image)})

  def finish(self) -> None:
    """See `Tracker`."""
    if '_run' in self.__dict__:
      with _as_os_error():
        self._run.finish()

  def _log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
    with _as_os_error():
      if stage not in self._stages:
        # Steps begin anew in each stage, and W&B's own may only rise.
        self._run.define_metric(f'{stage}/step', hidden=True)
        self._run.define_metric(f'{stage}/*', step_metric=f'{stage}/step')
        self._stages.add(stage)
      named = {f'{stage}/{name}': value for name, value in values.items()}
      self._run.log(named | {f'{stage}/step': step})


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  try:
    yield
  except wandb.Error as error:
    raise OSError(str(error)) from error


def check(names: Sequence[str]) -> None:
  """Checks that trackers can be used, before anything is compiled.

  Args:
    names: of trackers.

  Raises:
    ValueError: a package is not installed, or needs an account.
  """
  for name in names:  # Those of their packages.
    found = importlib.util.find_spec(name)
    # A directory of this name, such as W&B writes one, is no package.
    if found is None or found.origin is None:
      raise ValueError(
        f'trackers: {name!r} needs a package: pip install {name}.'
      )
  if 'wandb' in names and jax.process_index() == 0:
    _check_account()


def _check_account() -> None:
  try:
    mode = wandb.setup().settings.mode
  except ValueError as error:  # Of several lines, about a variable.
    raise ValueError(
      "trackers: 'wandb' has a wrong setting, perhaps a variable WANDB_…: "
      + ' '.join(str(error).split())
    ) from None
  if mode != 'online':
    return
  try:
    wandb.login(timeout=_LOGIN)
  except (wandb.errors.UsageError, TimeoutError):
    raise ValueError(
      "trackers: 'wandb' needs an account: run `wandb login`, or set "
      'WANDB_MODE=offline and upload later with `wandb sync`.'
    ) from None
  except wandb.Error as error:
    logging.warning('Weights & Biases cannot be reached now: %s', error)


def make_trackers(
  names: Sequence[str],
  workdir: epath.PathLike,
  config: Mapping[str, Any],
  run_id: str | None,
) -> list[Tracker]:
  """The trackers of these names, see `config.trackers`.

  Args:
    names: 'tensorboard', 'wandb'.
    workdir: working directory of the run.
    config: of the run, as JSON.
    run_id: identifier of the run.
  """
  board = epath.Path(workdir) / 'tensorboard'
  make = {
    'tensorboard': lambda: TensorBoard(board, config),
    'wandb': lambda: WeightsAndBiases(workdir, config, run_id),
  }
  return [make[name]() for name in dict.fromkeys(names)]
