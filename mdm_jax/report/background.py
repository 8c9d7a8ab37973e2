"""Background file writer: a slow or failing disk drops lines, never blocks."""

from collections.abc import Callable, Iterable, Mapping
import json
import pathlib
import queue
import threading
import time
from typing import Any

from absl import logging

_CAPACITY = 10_000  # pending calls; further ones are dropped
_CLOSING = 10.0  # seconds that `close` waits for pending calls


class BackgroundWriter:
  """Calls functions that write files, one after another, in its own thread.

  A call that raises an `OSError`, or that comes while too many are pending, is
  dropped. Consecutive failures are logged once.
  """

  def __init__(self, what: str):
    """Starts the thread.

    Args:
      what: name of the output in log lines.
    """
    self._what = what
    self._queue = queue.Queue(_CAPACITY)
    self._lost, self._failing = 0, False
    self._thread = threading.Thread(target=self._work, daemon=True, name=what)
    self._thread.start()

  def submit(self, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(*args)` in the background, in order of submission."""
    if not self._thread.is_alive():
      self._lose('the thread that writes it has died')
      return
    try:
      self._queue.put_nowait((function, args))
    except queue.Full:
      self._lose('too many writes are pending')

  def settle(self, seconds: float) -> bool:
    """Waits for pending calls, up to a time limit; returns whether all ran."""
    with self._queue.all_tasks_done:
      return self._queue.all_tasks_done.wait_for(
        lambda: not self._queue.unfinished_tasks, seconds
      )

  def close(self, seconds: float | None = None) -> None:
    """Waits some seconds for pending calls, and logs how many were dropped."""
    seconds = _CLOSING if seconds is None else seconds
    if self._thread.is_alive() and self.settle(seconds):
      self._queue.put(None)
      self._thread.join()
    self._lost += self._queue.unfinished_tasks
    if self._lost:
      logging.warning('%s: %d writes were dropped.', self._what, self._lost)

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
        '%s cannot be written: %s. Training goes on without it.',
        self._what,
        reason,
      )
    self._failing = True


def settle(
  parts: Iterable['BackgroundWriter | LineFile'], seconds: float
) -> None:
  """Waits for the pending writes of all parts, up to a time limit."""
  end = time.monotonic() + seconds
  for part in parts:
    part.settle(max(0.0, end - time.monotonic()))


def close(parts: Iterable['BackgroundWriter | LineFile']) -> None:
  """Closes all parts, and waits no longer for all than for one."""
  end = time.monotonic() + _CLOSING
  for part in parts:
    part.close(max(0.0, end - time.monotonic()))


class LineFile:
  """A file of JSON objects, one on each line, written in the background.

  A written line has been passed to the operating system: killing the process
  does not lose it. If a line was cut off, the next one starts on a new line.
  """

  def __init__(self, path: pathlib.Path):
    """Starts the thread; the first line creates the file and its directory."""
    self._path = path
    self._background = BackgroundWriter(str(path))

  def append(self, line: Mapping[str, Any]) -> None:
    """Writes an object of JSON's types as a line, in the background."""
    self._background.submit(self._write, json.dumps(line))

  def settle(self, seconds: float) -> bool:
    """Waits for pending lines, up to a time limit; returns whether all ran."""
    return self._background.settle(seconds)

  def close(self, seconds: float | None = None) -> None:
    """Waits some seconds for pending lines."""
    self._background.close(seconds)

  def _write(self, line: str) -> None:
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open('a+b') as file:
      # A killed process or a full disk may have cut off the last line.
      if file.tell() and (file.seek(-1, 2), file.read())[1] != b'\n':
        line = '\n' + line
      file.write(f'{line}\n'.encode())
