"""Reads parts of files in buckets: ranges ahead of their use, and streams.

An outage of a bucket is no property of the data in it: a range is waited for,
for minutes, and an error of a stream is never taken for the end of the file.
"""

import asyncio
import atexit
from collections.abc import Callable, Iterator
import contextlib
import fcntl
import functools
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any, BinaryIO

from absl import logging
from etils import epath

from mdm_jax.runtime import buckets, ending, files

# Seconds without a success, after which a range is given up, and between two
# attempts. An attempt is several of the client's, which takes minutes by
# itself. The watchdog of a training step has 900 seconds.
_PATIENCE, _PAUSE = 600.0, 5.0
_LOG_EVERY = 60.0  # seconds
# Bytes that a stream reads at once. Each read waits for an answer first.
BLOCK = 2**24


class Missing(OSError):
  """There is no such part: the file is gone, or shorter."""


class Unavailable(RuntimeError):
  """A bucket does not answer, or refuses; what is in it may be good.

  It is no OSError, which decoders raise if what they decode is damaged.
  """


@contextlib.contextmanager
def raising_unavailable(path: epath.PathLike) -> Iterator[None]:
  """Turns what a bucket raises into `Unavailable`, or FileNotFoundError."""
  try:
    with buckets.naming_errors():
      yield
  except ValueError as error:
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
      raise cause from None
    if not isinstance(cause, buckets.errors()):
      raise
    raise _unavailable(path, str(error)) from error


def _unavailable(path: epath.PathLike, reason: str) -> Unavailable:
  return Unavailable(f'{path} cannot be read ({reason.rstrip(".")})')


def request(path: str, start: int, end: int) -> Callable[[], bytes]:
  """Begins to read a part of a file, if it is in a bucket.

  Args:
    path: of the file; a local one is read when it is waited for.
    start, end: bytes; `end` is the first that is not read.

  Returns:
    A function that waits for the bytes, which there are `end - start` of.
      Raises:
        Missing: the file is gone or ends before `end`.
        OSError: a local file cannot be read.
        Unavailable: the bucket refuses, or has not answered for 10 minutes.
          Before that, what fails is repeated.
  """
  if start == end:
    return bytes
  if files.is_local(path):
    return functools.partial(_read_local, path, start, end)
  system = buckets.file_system(path)
  # An event loop in a thread of fsspec's own, one for the process.
  future = asyncio.run_coroutine_threadsafe(
    _read(system, path, start, end), system.loop
  )

  def wait() -> bytes:
    try:
      return future.result()
    finally:
      future.cancel()  # If the wait is interrupted.

  return wait


def _read_local(path: str, start: int, end: int) -> bytes:
  with open(path, 'rb') as file:
    file.seek(start)
    data = file.read(end - start)
  if len(data) != end - start:
    raise Missing(f'the file ends before byte {end}')
  return data


async def _read(system: Any, path: str, start: int, end: int) -> bytes:
  deadline = time.monotonic() + _PATIENCE
  inside = system._strip_protocol(path)
  while True:
    try:
      with buckets.naming_errors():
        data = await system._cat_file(inside, start=start, end=end)
      if len(data) == end - start:
        return data
      reason = f'{len(data)} bytes came instead of {end - start}.'
    except ValueError as error:
      reason, cause = str(error), error.__cause__
      if isinstance(cause, FileNotFoundError):
        raise Missing('there is no such object') from error
      if isinstance(cause, PermissionError):
        raise _unavailable(path, reason) from error
    if await _ends_before(system, inside, end):
      raise Missing(f'the file ends before byte {end}')
    if time.monotonic() > deadline:
      raise _unavailable(path, f'for {_PATIENCE / 60:.0f} minutes: {reason}')
    logging.log_every_n_seconds(
      logging.WARNING,
      '%s cannot be read (%s): trying again, for %.0f minutes at most.',
      _LOG_EVERY,
      path,
      reason.rstrip('.'),
      _PATIENCE / 60,
    )
    await asyncio.sleep(_PAUSE)


async def _ends_before(system: Any, path: str, end: int) -> bool:
  """Whether a file is known to be shorter; False during an outage."""
  try:
    with buckets.naming_errors():
      return (await system._info(path))['size'] < end
  except ValueError:
    return False


@contextlib.contextmanager
def open_stream(path: epath.PathLike, block: int = BLOCK) -> Iterator[BinaryIO]:
  """Opens a file, local or in a bucket, that is read from start to end.

  Args:
    path: of the file.
    block: bytes that are read at once from a bucket.

  Raises:
    OSError: there is no such file, or a local one cannot be read.
    Unavailable: one in a bucket cannot be read, now or later.
  """
  if files.is_local(path):
    with epath.Path(path).open('rb') as file:
      yield file
    return
  with raising_unavailable(path):
    file = buckets.file_system(path).open(
      os.fspath(path), 'rb', block_size=block, cache_type='readahead'
    )
  with file:
    yield _Stream(path, file)


class _Stream:
  """A file in a bucket that raises `Unavailable`."""

  def __init__(self, path: epath.PathLike, file: BinaryIO):
    self._path, self._file = path, file

  def read(self, size: int = -1) -> bytes:
    with raising_unavailable(self._path):
      return self._file.read(size)

  def __getattr__(self, name: str) -> Any:  # `seek` and `tell`, for instance.
    return getattr(self._file, name)


# Names of temporary directories, and of the file in each that is locked.
_PREFIX, _LOCK = 'mdm_jax_copies_', '.in_use'
_COPIES: dict[tuple[str, int], epath.Path] = {}


def kept_copy(path: epath.PathLike) -> epath.Path:
  """A local file with the content of a file, until this process ends.

  A file in a bucket is copied once, and again if it has been replaced since.

  Raises:
    UnreadableFile: there is none.
    OSError: the bucket does not answer, or refuses.
  """
  path = epath.Path(path)
  if files.is_local(path):
    return path
  key = os.fspath(path), files.require_file(path)[1]
  if key not in _COPIES:
    copy = epath.Path(temporary_directory()) / path.name
    with files.naming_errors(path):
      buckets.file_system(path).get_file(os.fspath(path), os.fspath(copy))
    _COPIES[key] = copy
  return _COPIES[key]


def temporary_directory() -> str:
  """A new directory that is removed when this process ends.

  If it is killed, the next process of this machine that needs one removes it.
  """
  place = pathlib.Path(tempfile.gettempdir())
  for left in place.glob(f'{_PREFIX}*/{_LOCK}'):
    with contextlib.suppress(OSError), left.open('rb') as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Its owner is gone.
      shutil.rmtree(left.parent, ignore_errors=True)
  # Nobody finds it under its last name before it is locked.
  made = pathlib.Path(tempfile.mkdtemp(prefix=f'.{_PREFIX}'))
  lock = (made / _LOCK).open('wb')  # Open until this process ends.
  fcntl.flock(lock, fcntl.LOCK_EX)
  directory = made.rename(place / made.name.removeprefix('.'))

  def remove():
    # What cannot be removed must not keep other calls from the end.
    shutil.rmtree(directory, ignore_errors=True)
    lock.close()

  # Commands end without the interpreter's clean-up; other programs with it.
  ending.at_the_end(remove)
  atexit.register(remove)
  return os.fspath(directory)
