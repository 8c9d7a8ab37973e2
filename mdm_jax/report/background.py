"""Background file writer: a slow or failing disk drops lines, never blocks."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
import math
import os
import queue
import threading
import time
from typing import Any

from absl import logging
from etils import epath

from mdm_jax.runtime import buckets, files
from mdm_jax.runtime.appending import AppendedObjects

_CAPACITY = 10_000  # pending calls; further ones are dropped
_CLOSING = 10.0  # seconds that `close` waits for pending calls
# Seconds between two uploads of what is appended to a file in a bucket: a
# process that is killed loses what came after the last one.
_UPLOAD_EVERY = 10.0


class BackgroundWriter:
  """Calls functions that write files, one after another, in its own thread.

  A call that raises an `OSError`, or that comes while too many are pending, is
  dropped. Consecutive failures are logged once.
  """

  def __init__(self, what: str, upload: Callable[[], None] | None = None):
    """Starts the thread.

    Args:
      what: name of the output in log lines.
      upload: uploads what the calls have written to memory. It is called every
        10 s, if there were any, and by `settle`; if it raises an `OSError`, it
        is called again later, and nothing is lost.
    """
    self._what, self._upload = what, upload
    self._queue = queue.Queue(_CAPACITY)
    self._lost, self._failing = 0, False
    self._upload_at, self._not_uploaded = math.inf, 0
    self._asked = 0  # uploads that are in the queue
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

  def upload_soon(self) -> None:
    """Uploads after the pending calls, if there is anything to upload to."""
    if self._upload and self._thread.is_alive():
      with contextlib.suppress(queue.Full):
        self._queue.put_nowait((self._upload, ()))
        self._asked += 1

  def settle(self, seconds: float) -> bool:
    """Waits for pending calls, up to a time limit; returns whether all ran."""
    self.upload_soon()
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
    pending = self._queue.unfinished_tasks - self._asked
    self._lost += pending + self._not_uploaded
    if self._lost:
      logging.warning('%s: %d writes were dropped.', self._what, self._lost)

  def _work(self) -> None:
    while True:
      now = time.monotonic()
      if now >= self._upload_at:
        self._call(self._upload)
        continue
      wait = self._upload_at - now
      try:
        task = self._queue.get(timeout=wait if wait < math.inf else None)
      except queue.Empty:
        continue
      try:
        if task is None:
          break
        function, args = task
        self._call(function, *args)
        self._asked -= function is self._upload
      finally:
        self._queue.task_done()

  def _call(self, function: Callable[..., None], *args: Any) -> None:
    is_upload = function is self._upload
    try:
      function(*args)
    except buckets.errors() as error:
      if not is_upload:
        self._lose(error)
        return
      self._upload_at = time.monotonic() + _UPLOAD_EVERY
      if not self._failing:
        logging.error(
          '%s cannot be uploaded now: %s. It is tried again.', self._what, error
        )
      self._failing = True
      return
    if is_upload:
      if self._failing:
        logging.info('%s is uploaded again.', self._what)
      self._upload_at, self._not_uploaded = math.inf, 0
    elif self._upload:
      due = time.monotonic() + _UPLOAD_EVERY
      self._upload_at = min(self._upload_at, due)
      self._not_uploaded += 1
      return
    self._failing = False

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
  _upload_soon(parts)
  for part in parts:
    part.settle(max(0.0, end - time.monotonic()))


def close(parts: Iterable['BackgroundWriter | LineFile']) -> None:
  """Closes all parts, and waits no longer for all than for one."""
  end = time.monotonic() + _CLOSING
  _upload_soon(parts)
  for part in parts:
    part.close(max(0.0, end - time.monotonic()))


def _upload_soon(parts: Iterable['BackgroundWriter | LineFile']) -> None:
  """Lets all parts upload at the same time."""
  for part in parts:
    part.upload_soon()


class LineFile:
  """A file of JSON objects, one on each line, written in the background.

  On a disk a written line has been passed to the operating system: killing the
  process does not lose it. If a line was cut off, the next one starts on a new
  line. In a bucket a line is uploaded within 10 s, see `runtime.appending`, and
  if that fails, with a later one; `files.read_json_lines` reads both.
  """

  def __init__(self, path: epath.PathLike):
    """Starts the thread; the first line creates the file and its directory."""
    self._path, self._end = epath.Path(path), None
    self._write, upload = self._append, None
    if not files.is_local(path):
      objects = AppendedObjects(path)
      self._write, upload = objects.append, objects.flush
    self._background = BackgroundWriter(os.fspath(path), upload)

  def append(self, line: Mapping[str, Any]) -> None:
    """Writes an object of JSON's types as a line, in the background."""
    self._background.submit(self._write, f'{json.dumps(line)}\n'.encode())

  def upload_soon(self) -> None:
    """Uploads the pending lines, if the file is in a bucket."""
    self._background.upload_soon()

  def settle(self, seconds: float) -> bool:
    """Waits for pending lines, up to a time limit; returns whether all ran."""
    return self._background.settle(seconds)

  def close(self, seconds: float | None = None) -> None:
    """Waits some seconds for pending lines."""
    self._background.close(seconds)

  def _append(self, line: bytes) -> None:
    self._end = self._end or _end(self._path)
    _append_on_disk(self._end, line)


def append_line(path: epath.PathLike, line: bytes) -> None:
  """Appends a line that ends in a newline to a file, on a disk or in a bucket.

  Raises:
    OSError: it cannot be written. An error of another kind comes from s3:// and
      az://, see `buckets.errors`.
  """
  if files.is_local(path):
    _append_on_disk(_end(path), line)
    return
  objects = AppendedObjects(path)
  objects.append(line)
  objects.flush()


def _end(path: epath.PathLike) -> epath.Path:
  """The last part of a file: the file, unless it is copied from a bucket."""
  return (files.parts(path) or [epath.Path(path)])[-1]


def _append_on_disk(path: epath.Path, line: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'a+b') as file:
    # A killed process or a full disk may have cut off the last line.
    if file.tell() and (file.seek(-1, 2), file.read())[1] != b'\n':
      line = b'\n' + line
    file.write(line)
