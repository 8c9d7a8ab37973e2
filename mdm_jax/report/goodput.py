"""Goodput: how a run spends its time, in `goodput.jsonl`."""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import math
import time
from typing import Any

from etils import epath
import jax

from mdm_jax.report.background import LineFile
from mdm_jax.runtime import files

_FILE = 'goodput.jsonl'
_LOST = 'lost'
_SECONDS = 2.0  # least time between two lines that are not forced
# Buckets of work that is repeated if a run is killed between two checkpoints.
_REPEATED = ('data', 'step')
_LONGEST = 1e12  # seconds in a bucket; more would not add up to a number
_PATIENCE = 0.5  # seconds for a line to reach the file before it is read


class Goodput:
  """Counts every second of a run in one bucket, such as 'step' or 'data'.

  A line of `goodput.jsonl` has 'time' (seconds since 1970), 'session' (the time
  at which this process started), the 'stage' and 'step' that were reached, and
  'seconds' by bucket since the line before. A killed process loses only the
  time after its last line, or after the last upload. The buckets of a session
  add up to its wall-clock time, since every moment is in exactly one bucket.

  Only process 0 writes.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    began: float | None = None,
    listener: Callable[[str], None] = lambda bucket: None,
  ):
    """Starts with the bucket 'start_up'.

    Args:
      workdir: working directory of the run.
      began: `time.monotonic()` at the start of the session; None for now.
      listener: called with the new bucket at each change.
    """
    self._lines = None
    if jax.process_index() == 0:
      self._lines = LineFile(epath.Path(workdir) / _FILE)
    self._listener = listener
    listener('start_up')
    now = time.monotonic()
    self._since = self._written = now if began is None else began
    self._session = round(time.time() - (now - self._since), 3)
    self._bucket, self._seconds = 'start_up', Counter()
    self._stage, self._step = '', 0

  def switch(self, bucket: str) -> None:
    """Switches to a bucket, which counts the time from now on."""
    now = time.monotonic()
    self._seconds[self._bucket] += now - self._since
    self._since, self._bucket = now, bucket
    self._listener(bucket)

  @contextlib.contextmanager
  def time(self, bucket: str) -> Iterator[None]:
    """Counts the time of a `with` block in a bucket, then switches back."""
    outer = self._bucket
    self.switch(bucket)
    try:
      yield
    finally:
      self.switch(outer)

  def count_as(self, bucket: str) -> None:
    """Counts the time since the last change in another bucket instead."""
    self._bucket = bucket

  def write(self, stage: str, step: int, force: bool = False) -> None:
    """Writes a line, if it is due or forced.

    Force a line at each checkpoint, from which a later session may continue:
    the lines after it count as lost time then.

    Args:
      stage: name of the stage.
      step: number of steps taken in the stage.
      force: writes even if the last line is recent.
    """
    self._stage, self._step = stage, step
    if force or time.monotonic() - self._written > _SECONDS:
      self._write()

  def close(self) -> None:
    """Writes the time since the last line, and closes the file."""
    self.flush()
    if self._lines:
      self._lines.close()

  def flush(self) -> None:
    """Writes the time since the last line, and waits until it is written."""
    self._write()
    if self._lines:
      self._lines.settle(_PATIENCE)

  def _write(self) -> None:
    now = time.monotonic()
    self._seconds[self._bucket] += now - self._since
    self._since = self._written = now
    seconds, self._seconds = self._seconds, Counter()
    if self._lines:
      self._lines.append(
        {
          'time': round(time.time(), 3),
          'session': self._session,
          'stage': self._stage,
          'step': self._step,
          'seconds': {name: round(value, 4) for name, value in seconds.items()},
        }
      )


def totals(workdir: epath.PathLike) -> tuple[int, dict[str, float]]:
  """Adds up the time of all sessions of a working directory.

  Returns:
    The number of sessions, and seconds by bucket, most first. The bucket 'lost'
    holds the time of data and steps that a later session repeated.
  """
  lines = files.read_json_lines(epath.Path(workdir) / _FILE, _is_line)
  begun = {}
  for line in lines:
    begun.setdefault((line['session'], line['stage']), line['step'])
  # The first step at which any later session was in the stage.
  repeated_from, least = {}, {}
  for session, stage in sorted(begun, reverse=True):
    repeated_from[session, stage] = least.get(stage, math.inf)
    least[stage] = min(repeated_from[session, stage], begun[session, stage])
  seconds = Counter()
  for line in lines:
    repeated = line['step'] > repeated_from[line['session'], line['stage']]
    for name, value in line['seconds'].items():
      lost = repeated and name in _REPEATED
      seconds[_LOST if lost else name] += value
  return len({session for session, _ in begun}), dict(seconds.most_common())


def _is_line(line: Any) -> bool:
  """Whether it is a line as `Goodput` writes it."""
  return (
    isinstance(line, dict)
    and files.is_number(line.get('session'))
    and isinstance(line.get('stage'), str)
    and files.is_count(line.get('step'))
    and isinstance(line.get('seconds'), dict)
    and all(
      name.isidentifier() and files.is_number(value) and 0 <= value < _LONGEST
      for name, value in line['seconds'].items()
    )
  )
