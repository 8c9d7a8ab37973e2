"""Writes metrics and images of a run to files, and hands them to trackers."""

from collections.abc import Callable, Mapping, Sequence
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from mdm_jax.report import background
from mdm_jax.report.trackers import Tracker
from mdm_jax.runtime import files

# Seconds to wait for pending writes before the process exits.
_PATIENCE = 1.0


class MetricWriter:
  """Writes metrics to `metrics.jsonl`, and hands them to trackers.

  Every line of `metrics.jsonl` is an object with 'time' (seconds since 1970),
  'stage', 'step' and the values. Lines are only ever appended: a run that
  resumes from step s writes the lines after s again, with a later 'time'. If
  two lines have the same stage and step, the last one counts.

  In a bucket the lines are in objects beside these names, see
  `background.LineFile`. Files are written in the background, and each tracker
  has a thread of its own: a slow or failing disk or tracker drops lines and
  images, and never blocks training.

  Only process 0 writes; on the others every method does nothing.
  """

  def __init__(self, workdir: epath.PathLike, trackers: Sequence[Tracker] = ()):
    """Appends to `metrics.jsonl` and `skipped.jsonl`.

    Args:
      workdir: working directory of the run.
      trackers: receive the same numbers, and images.
    """
    self._lines = None
    if jax.process_index() == 0:
      workdir = epath.Path(workdir)
      self._lines = background.LineFile(workdir / 'metrics.jsonl')
      self._skipped = background.LineFile(workdir / 'skipped.jsonl')
      self._images = background.BackgroundWriter('images')
      self._trackers = [
        (tracker, background.BackgroundWriter(tracker.title, tracker.upload))
        for tracker in trackers
      ]
      self._parts = (
        self._lines,
        self._skipped,
        self._images,
        *(thread for _, thread in self._trackers),
      )

  def scalars(
    self,
    step: int,
    groups: Mapping[str, Mapping[str, float]],
    *,
    stage: str,
  ) -> None:
    """Writes numbers.

    Args:
      step: number of steps taken in the stage.
      groups: numbers by group and name, which is unique among all groups, and
        not 'time', 'stage' or 'step'. In `metrics.jsonl` they are called
        `<name>`, in trackers `<group>/<name>`.
        They are integers or anything that `float` accepts; waits for arrays on
        devices. NaN and Inf are written as strings, since JSON has no numbers
        for them.
      stage: name of the stage.
    """
    if not self._lines:
      return
    now, step = time.time(), int(step)
    named = {
      (group, name): value if isinstance(value, int) else float(value)
      for group, values in groups.items()
      for name, value in values.items()
    }
    self._lines.append(
      {'time': round(now, 3), 'stage': stage, 'step': step}
      | {name: files.json_number(x) for (_, name), x in named.items()}
    )
    tags = {'/'.join(path): value for path, value in named.items()}
    for tracker, thread in self._trackers:
      thread.submit(tracker.scalars, stage, step, now, tags)

  def skipped(self, line: Mapping[str, Any]) -> None:
    """Writes a line about a skipped step to `skipped.jsonl`."""
    if self._lines:
      self._skipped.append(line)

  def image(
    self, step: int, name: str, image: np.ndarray, *, stage: str
  ) -> None:
    """Hands an image, uint8 `[H, W, 3]` or `[T, H, W, 3]`, to the trackers."""
    if self._lines:
      for tracker, thread in self._trackers:
        thread.submit(tracker.image, stage, int(step), time.time(), name, image)

  def submit(self, save: Callable[..., None], *args: Any) -> None:
    """Calls `save(*args)`, which writes an image file, in the background."""
    if self._lines:
      self._images.submit(save, *args)

  def flush(self) -> None:
    """Waits at most a second for pending writes."""
    if self._lines:
      background.settle(self._parts, _PATIENCE)

  def close(self) -> None:
    """Waits some seconds for pending writes, then closes files and trackers."""
    if self._lines:
      for tracker, thread in self._trackers:
        thread.submit(tracker.finish)
      background.close(self._parts)
