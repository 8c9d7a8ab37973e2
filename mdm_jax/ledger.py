"""Where the time of a run went: `goodput.jsonl`."""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import json
import pathlib
import time

import jax

from mdm_jax.background import Lines

_FILE = 'goodput.jsonl'
_LOST = 'lost'
# Between two lines that are not forced.
_SECONDS = 2.0
# What is done again when a run is killed between two checkpoints.
_REPEATED = ('data', 'step')
# Seconds for a line to reach the file, before it is read.
_PATIENCE = 0.5


class Ledger:
  """Puts every second of a run into one bucket.

  A line of `goodput.jsonl` has 'time' (seconds since 1970), 'session' (when
  this process began), the 'stage' and 'step' that were reached, and 'seconds',
  what went into each bucket since the line before. It is with the operating
  system once it is written: a killed process loses what came after. The
  buckets of a session add up to its wall clock, as each moment is in one.

  Only process 0 writes.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    began: float | None = None,
    listener: Callable[[str], None] = lambda bucket: None,
  ):
    """The time goes to 'start_up'.

    Args:
      workdir: of the run.
      began: `time.monotonic()` when the session began; None for now.
      listener: called with the bucket, each time that one is begun.
    """
    self._lines = None
    if jax.process_index() == 0:
      self._lines = Lines(pathlib.Path(workdir) / _FILE)
    self._listener = listener
    listener('start_up')
    now = time.monotonic()
    self._since = self._written = now if began is None else began
    self._session = round(time.time() - (now - self._since), 3)
    self._bucket, self._seconds = 'start_up', Counter()
    self._stage, self._step = '', 0

  def switch(self, bucket: str) -> None:
    """Puts the time from now on into a bucket."""
    now = time.monotonic()
    self._seconds[self._bucket] += now - self._since
    self._since, self._bucket = now, bucket
    self._listener(bucket)

  @contextlib.contextmanager
  def time(self, bucket: str) -> Iterator[None]:
    """Puts the time inside into a bucket, and then goes on as before."""
    outer = self._bucket
    self.switch(bucket)
    try:
      yield
    finally:
      self.switch(outer)

  def count_as(self, bucket: str) -> None:
    """Puts the time since the last change into another bucket after all."""
    self._bucket = bucket

  def write(self, stage: str, step: int, force: bool = False) -> None:
    """Writes a line, if it is due or forced.

    Force it wherever a later run may continue, or it cannot be known which of
    the time was lost.

    Args:
      stage: name of the stage.
      step: steps taken of it.
      force: whatever the time since the last line.
    """
    self._stage, self._step = stage, step
    if force or time.monotonic() - self._written > _SECONDS:
      self._write()

  def close(self) -> None:
    """Writes what is not yet written."""
    self.flush()
    if self._lines:
      self._lines.close()

  def flush(self) -> None:
    """Writes what is not yet written, and waits for it some seconds."""
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


def totals(workdir: str | pathlib.Path) -> tuple[int, dict[str, float]]:
  """How many sessions a working directory has seen, and their seconds.

  Data and steps that a later session has done again are in 'lost'.
  """
  lines, path = [], pathlib.Path(workdir) / _FILE
  for line in path.read_text().splitlines() if path.is_file() else ():
    with contextlib.suppress(json.JSONDecodeError):  # Torn by a lost machine.
      lines.append(json.loads(line))
  begun = {}
  for line in lines:
    begun.setdefault((line['session'], line['stage']), line['step'])
  seconds = Counter()
  for line in lines:
    repeated = any(
      session > line['session']
      and stage == line['stage']
      and step < line['step']
      for (session, stage), step in begun.items()
    )
    for name, value in line['seconds'].items():
      lost = repeated and name in _REPEATED
      seconds[_LOST if lost else name] += value
  return len({session for session, _ in begun}), dict(seconds.most_common())
