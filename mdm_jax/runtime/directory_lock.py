"""One writer for a directory: a lock that no crash leaves behind.

The kernel holds it for the process, as a POSIX lock on a file of the directory,
and drops it when the process ends in any way. Children do not inherit it. On
NFS it holds for all machines. In a bucket it is an object, which its holder
writes again as a sign of life, see `BucketLock`. Who only reads needs no lock.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import threading
import time

from absl import logging
from etils import epath

from mdm_jax.runtime import files, lock_holder
from mdm_jax.runtime.bucket_lock import BucketLock
from mdm_jax.runtime.lock_holder import NAME, InUse, NotWritable

_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def holding(
  directory: str | os.PathLike, name: str = NAME, *, shared: bool = False
) -> Iterator[None]:
  """Holds the lock of a directory, which is created if it does not exist.

  At the end the file is removed, and so is a created directory that is empty.
  Where locks are not supported, it warns and does nothing.

  Args:
    directory: to write to.
    name: of the file in it; other files are other locks.
    shared: others may share the lock, but not hold it alone.

  Raises:
    InUse: another process has it. The message names the process.
    NotWritable: the directory cannot be created or written to.
  """
  if not files.is_local(directory):
    with BucketLock(epath.Path(directory) / name, shared).held():
      yield
    return
  path = pathlib.Path(directory, name)
  created = [each for each in path.parents if not each.exists()]
  try:
    file = _acquire(path, shared)
  except InUse:
    raise
  except OSError as error:
    raise NotWritable(
      f'{path.parent} cannot be written to: {error.strerror}.'
    ) from error
  ended = threading.Event()
  if file is not None:
    threading.Thread(target=_beat, args=(file, ended), daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    if file is not None:
      with contextlib.suppress(OSError):
        # Fails while others share it: they hold the lock of this very file.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        for each in created:  # Those to which nothing was written.
          each.rmdir()
      os.close(file)


@contextlib.contextmanager
def holding_part(
  path: str | os.PathLike, index: int, count: int
) -> Iterator[None]:
  """Holds the lock of one of several parts of the work, see `holding_file`.

  Args:
    path: what all parts write to, at the same time.
    index: of the part, from 0.
    count: of parts. A single part excludes those of any other count.
  """
  directory, name = _beside(path)
  with contextlib.ExitStack() as stack:
    if count > 1:
      stack.enter_context(holding(directory, f'{name}-{index}-of-{count}'))
    stack.enter_context(holding(directory, name, shared=count > 1))
    yield


def holding_file(
  path: str | os.PathLike,
) -> contextlib.AbstractContextManager[None]:
  """Holds the lock of a file that is written, or of a directory that appears.

  Args:
    path: of the file; the lock is a file beside it, which is removed again.
  """
  return holding(*_beside(path))


def _beside(path: str | os.PathLike) -> tuple[epath.PathLike, str]:
  """The directory and the name of the lock of a path."""
  if not files.is_local(path):
    path = epath.Path(path)
    # Nothing is beside a bucket.
    parent = path.parent if path.parent.name else path
    return parent, f'.{path.name}{NAME}'
  path = pathlib.Path(path)
  if path.is_dir():  # It has other names, such as '.' or that of a link.
    path = path.resolve()
  return path.parent, f'.{path.name}{NAME}'


def _acquire(path: pathlib.Path, shared: bool) -> int | None:
  """Opens and locks the file; returns None where locks are not supported.

  Raises:
    InUse: another process has it.
    OSError: the file cannot be opened.
  """
  seen, since = None, time.monotonic()
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.lockf(
        file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
      )
    except OSError as error:
      if error.errno not in _HELD:
        os.close(file)
        logging.warning(
          '%s cannot be locked (%s): start one writer only.',
          path,
          error.strerror,
        )
        return None
      holder, found = _holder(path, file), os.fstat(file)
      os.close(file)
      found = found.st_ino, found.st_mtime_ns
      if holder.get('machine') in (None, lock_holder.machine()) or (
        seen and seen != found
      ):
        raise InUse(lock_holder.message(path, holder)) from error
      if not seen:
        logging.warning(
          '%s Waiting up to %g s for a sign of life of that machine.',
          lock_holder.message(path, holder),
          lock_holder.SILENCE,
        )
      elif time.monotonic() - since > lock_holder.SILENCE:
        logging.warning('There was none: taking the directory over.')
        path.unlink(missing_ok=True)
        seen = None
        continue
      seen = found
      time.sleep(lock_holder.POLL)
      continue
    # The last holder may have removed the file in between.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file), os.stat(path)):
        _write(file, shared)
        return file
    os.close(file)


def _write(file: int, shared: bool) -> None:
  """Says who holds the lock, or nothing if others may hold it too."""
  text = json.dumps(lock_holder.this_process())
  with contextlib.suppress(OSError):  # The disk is full.
    os.ftruncate(file, 0)
    if not shared:
      os.pwrite(file, text.encode() + b'\n', 0)


def _holder(path: pathlib.Path, file: int) -> dict:
  """What the holder has written, of several that share the lock any one.

  Nothing if a full disk has made that impossible.
  """
  with contextlib.suppress(OSError, ValueError):
    text = os.pread(file, 4096, 0)
    for part in path.parent.glob(f'{path.name}-*') if not text else ():
      text = part.read_bytes() if _is_held(part) else text
    found = json.loads(text)
    if isinstance(found, dict):
      return found
  return {}


def _is_held(path: pathlib.Path) -> bool:
  with path.open('r+') as file:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      return True
  return False


def _beat(file: int, ended: threading.Event) -> None:
  while not ended.wait(lock_holder.BEAT):
    with contextlib.suppress(OSError):
      os.utime(file)
