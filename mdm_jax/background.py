"""What may be slow, or fail, without holding up or ending what it is about."""

from collections.abc import Callable, Iterable, Mapping
import json
import pathlib
import queue
import threading
import time
from typing import Any

from absl import logging

# What may wait to be done; more is dropped.
_CAPACITY = 10_000
# What has not ended then will not.
_CLOSING = 10.0


class Background:
  """Calls functions one after another in a thread of its own.

  A call that fails by an `OSError` is lost, as is one that comes while too
  many wait. That is logged, once for failures in a row.
  """

  def __init__(self, what: str):
    """Starts the thread.

    Args:
      what: is written, for messages.
    """
    self._what = what
    self._queue = queue.Queue(_CAPACITY)
    self._lost, self._failing = 0, False
    self._thread = threading.Thread(target=self._work, daemon=True, name=what)
    self._thread.start()

  def submit(self, function: Callable[..., None], *args: Any) -> None:
    """Has `function(*args)` called soon."""
    if not self._thread.is_alive():
      self._lose('the thread that writes it has ended')
      return
    try:
      self._queue.put_nowait((function, args))
    except queue.Full:
      self._lose('it does not keep up')

  def settle(self, seconds: float) -> bool:
    """Waits so long at most; whether all has been done."""
    with self._queue.all_tasks_done:
      return self._queue.all_tasks_done.wait_for(
        lambda: not self._queue.unfinished_tasks, seconds
      )

  def close(self) -> None:
    """Waits some seconds for what is left, and says what was lost."""
    if self._thread.is_alive() and self.settle(_CLOSING):
      self._queue.put(None)
      self._thread.join()
    self._lost += self._queue.unfinished_tasks
    if self._lost:
      logging.warning('%s: %d writes were lost.', self._what, self._lost)

  def _work(self) -> None:
    while (task := self._queue.get()) is not None:
      function, args = task
      try:
        function(*args)
      except OSError as error:
        self._lose(error)
      else:
        self._failing = False
      finally:
        self._queue.task_done()
    self._queue.task_done()

  def _lose(self, reason: Any) -> None:
    self._lost += 1
    if not self._failing:
      logging.error(
        '%s cannot be written: %s. Training goes on without.',
        self._what,
        reason,
      )
    self._failing = True


def settle(parts: Iterable['Background | Lines'], seconds: float) -> None:
  """Waits so long at most for all of them together."""
  end = time.monotonic() + seconds
  for part in parts:
    part.settle(max(0.0, end - time.monotonic()))


class Lines:
  """A file of JSON objects, one a line, which grows in the background.

  A line that is written is with the operating system: killing the process
  does not lose it. One that could not be written whole is followed by a line
  of its own.
  """

  def __init__(self, path: pathlib.Path):
    """Nothing is created before the first line."""
    self._path = path
    self._background = Background(str(path))

  def append(self, line: Mapping[str, Any]) -> None:
    """Has a line written soon."""
    self._background.submit(self._write, json.dumps(line))

  def settle(self, seconds: float) -> bool:
    """Waits so long at most; whether all lines have been written."""
    return self._background.settle(seconds)

  def close(self) -> None:
    """Waits some seconds for what is left."""
    self._background.close()

  def _write(self, line: str) -> None:
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open('a+b') as file:
      # A process that was killed, or a full disk, may have torn the last one.
      if file.tell() and (file.seek(-1, 2), file.read())[1] != b'\n':
        line = '\n' + line
      file.write(f'{line}\n'.encode())
