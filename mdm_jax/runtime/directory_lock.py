"""One writer for a directory: a lock that no crash leaves behind.

The kernel holds it for the process, as a POSIX lock on a file of the directory,
and drops it when the process ends in any way. Children do not inherit it. On
NFS it holds for all machines. In a bucket it is an object, which its holder
writes again as a sign of life, see `_BucketLock`. Who only reads needs no lock.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import random
import re
import socket
import threading
import time
from typing import Any
import uuid

from absl import logging
from etils import epath

from mdm_jax.runtime import buckets, ending, files

NAME = '.lock'
# Seconds between two signs of life of a holder, which touches the file.
_BEAT = 20.0
# Seconds without one, after which a holder on another machine counts as dead:
# an NFS server may keep the lock of a machine that has vanished, a bucket does.
_SILENCE = 150.0
_POLL = 1.0  # seconds between two attempts meanwhile
_RELEASE = 2.0  # seconds for a bucket to remove the lock
# What differs if an object is written again, in Google's, S3 and Azure's.
_VERSION = 'generation', 'etag', 'ETag', 'LastModified'
_HELD = (errno.EACCES, errno.EAGAIN)


class NotWritable(ValueError):
  """The directory cannot be written to."""


class InUse(NotWritable):
  """Another process writes to the directory."""


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
    with _BucketLock(epath.Path(directory) / name, shared).held():
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
      if holder.get('machine') in (None, _machine()) or (
        seen and seen != found
      ):
        raise InUse(_message(path, holder)) from error
      if not seen:
        logging.warning(
          '%s Waiting up to %g s for a sign of life of that machine.',
          _message(path, holder),
          _SILENCE,
        )
      elif time.monotonic() - since > _SILENCE:
        logging.warning('There was none: taking the directory over.')
        path.unlink(missing_ok=True)
        seen = None
        continue
      seen = found
      time.sleep(_POLL)
      continue
    # The last holder may have removed the file in between.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file), os.stat(path)):
        _write(file, shared)
        return file
    os.close(file)


def _write(file: int, shared: bool) -> None:
  """Says who holds the lock, or nothing if others may hold it too."""
  text = json.dumps(_this_process())
  with contextlib.suppress(OSError):  # The disk is full.
    os.ftruncate(file, 0)
    if not shared:
      os.pwrite(file, text.encode() + b'\n', 0)


def _this_process() -> dict[str, Any]:
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    'machine': _machine(),
  }


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


def _message(path: epath.PathLike, holder: dict) -> str:
  return (
    f'{_what(path)} is in use: {_who(holder)} writes to it. Wait until that '
    'has ended, or write to another place.'
  )


def _what(path: epath.PathLike) -> epath.Path:
  """What a lock of this path is of."""
  path = epath.Path(path)
  return path.parent / path.name.removeprefix('.').rpartition(NAME)[0]


def _who(holder: dict) -> str:
  if not holder:
    return 'another process'
  return 'process {pid} on {host}, since {since},'.format_map(
    {'pid': '?', 'host': '?', 'since': '?'} | holder
  )


def _machine() -> str:
  """Tells running machines apart; containers of one machine are the same."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return socket.gethostname()


def _beat(file: int, ended: threading.Event) -> None:
  while not ended.wait(_BEAT):
    with contextlib.suppress(OSError):
      os.utime(file)


class _BucketLock:
  """A lock in a bucket: an object of each holder, written again every 20 s.

  A holder that is alone has the object `.lock-000003`. A name can be created
  only once, so of two that wait for the end of a holder one gets the next.
  Others have `.lock-shared-5f3a9c01`. After it has created its object, each
  looks for others once more: of two that begin at the same time at least one
  sees the other.

  A process of this machine that has ended holds nothing, nor does one whose
  object has not changed for 150 s. If that one lives nevertheless, it ends as
  soon as it finds out that it has been replaced.
  """

  def __init__(self, path: epath.Path, shared: bool):
    self._path, self._shared = path, shared
    self._bucket = buckets.file_system(path)
    self._name = ''
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._info = _this_process() | {
      'namespace': _namespace(),
      'started': _started(os.getpid()),
      'token': uuid.uuid4().hex,
      'beats': 0,
      'replaces': [],
    }

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Holds the lock, see `holding`."""
    # Whoever continues on another machine need not wait for silence.
    ending.at_the_end(self._release)
    try:
      with self._naming_errors():
        self._acquire()
      threading.Thread(target=self._beat, daemon=True).start()
      yield
    finally:
      ending.not_at_the_end(self._release)
      # A bucket that does not answer holds up nothing.
      thread = threading.Thread(target=self._release, daemon=True)
      thread.start()
      thread.join(_RELEASE)

  def _acquire(self) -> None:
    """Creates the object of this holder.

    Raises:
      InUse: another process has the lock.
      Exception: one of `buckets.errors`.
    """
    seen: dict[str, tuple] = {}  # Versions, and since when they are the same.
    while True:
      others, ended = self._others(), []
      for name, version in others.items():
        holder = self._read(name)
        if holder is None or _has_ended(holder):
          ended.append(name)
          continue
        waiting, now = bool(seen), time.monotonic()
        first, since = seen.setdefault(name, (version, now))
        if first != version or _is_of_this_machine(holder):
          raise InUse(_message(self._path, holder))
        if not waiting:
          logging.warning(
            '%s Waiting up to %g s for a sign of life of that machine.',
            _message(self._path, holder),
            _SILENCE,
          )
        if now - since > _SILENCE:
          ended.append(name)
      if len(ended) == len(others) and self._create(ended):
        if seen:
          logging.warning('There was none: taking the directory over.')
        return
      time.sleep(_POLL * random.uniform(0.5, 1))

  def _create(self, ended: list[str]) -> bool:
    """Creates the object; returns whether no other was created meanwhile."""
    numbers = [int(name[-6:]) for name in ended if not _is_shared(name)]
    end = f'{1 + max(numbers, default=-1):06d}'
    if self._shared:
      end = f'shared-{self._info["token"][:8]}'
    self._name = f'{self._path.name}-{end}'
    self._info['replaces'] = ended
    with contextlib.suppress(FileExistsError):
      self._write(mode='create')
    # Perhaps it exists because a first attempt of this process was not
    # answered, and some services of S3's protocol replace what exists.
    if not self._is_own():
      self._name = ''
      return False
    if self._others().keys() - {*ended}:
      self._remove(self._name)
      self._name = ''
      return False
    for name in ended:
      self._remove(name)
    return True

  def _beat(self) -> None:
    while not self._ended.wait(_BEAT):
      try:
        with self._lock:
          if self._ended.is_set():
            return
          by = self._replaced_by()
          if by is None:
            self._info['beats'] += 1
            self._write()
            continue
      except buckets.errors():
        continue  # The bucket fails for a while.
      logging.error(
        '%s has been taken over: %s writes to it, as this process gave no sign '
        'of life for %g s. It ends now, and writes nothing more.',
        _what(self._path),
        _who(by),
        _SILENCE,
      )
      ending.leave(1)

  def _replaced_by(self) -> dict[str, Any] | None:
    """Who has taken over; None if this process holds the lock."""
    for name in self._others():
      holder = self._read(name) or {}
      if self._name in holder.get('replaces', ()):
        return holder
    # Whoever has taken over may have ended, and another may have begun.
    return None if self._is_own() else self._read(self._name) or {}

  def _is_own(self) -> bool:
    """Whether the object of the name is that of this holder."""
    found = self._read(self._name) or {}
    return found.get('token') == self._info['token']

  def _release(self) -> None:
    if os.getpid() != self._info['pid']:
      return  # A child.
    self._ended.set()
    with self._lock, contextlib.suppress(*buckets.errors()):
      if self._name and self._is_own():
        self._remove(self._name)

  @contextlib.contextmanager
  def _naming_errors(self) -> Iterator[None]:
    try:
      yield
    except buckets.errors() as error:
      reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
      raise NotWritable(
        f'{self._path.parent} cannot be written to: {reason}.'
      ) from error

  def _others(self) -> dict[str, tuple]:
    """Versions by name of the objects beside which there may be no other."""
    pattern = glob.escape(os.fspath(self._path)) + '-*'
    found = {}
    for path, info in self._bucket.glob(pattern, detail=True).items():
      name = path.rpartition('/')[2]
      if not re.fullmatch(
        rf'{re.escape(self._path.name)}-(\d{{6}}|shared-[0-9a-f]{{8}})', name
      ):
        continue
      if name != self._name and not (self._shared and _is_shared(name)):
        found[name] = tuple(str(info.get(key)) for key in _VERSION)
    return found

  def _read(self, name: str) -> dict[str, Any] | None:
    """What a holder has written; None if there is no object any more."""
    try:
      data = self._bucket.cat_file(os.fspath(self._path.parent / name))
    except FileNotFoundError:
      return None
    with contextlib.suppress(ValueError):
      found = json.loads(data)
      if isinstance(found, dict):
        return found
    return {}

  def _write(self, mode: str = 'overwrite') -> None:
    self._bucket.pipe_file(
      os.fspath(self._path.parent / self._name),
      json.dumps(self._info).encode(),
      mode=mode,
    )

  def _remove(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._bucket.rm_file(os.fspath(self._path.parent / name))


def _is_shared(name: str) -> bool:
  return '-shared-' in name


def _is_of_this_machine(holder: dict[str, Any]) -> bool:
  """Whether this process would see that of the holder."""
  return holder.get('machine') == _machine() and (
    holder.get('namespace') == _namespace() is not None
  )


def _has_ended(holder: dict[str, Any]) -> bool:
  """Whether the holder was a process of this machine that has ended."""
  return _is_of_this_machine(holder) and holder.get('started') != _started(
    holder.get('pid')
  )


def _namespace() -> str | None:
  """Which processes have the same numbers; None if that is not known."""
  try:
    return os.readlink('/proc/self/ns/pid')
  except OSError:
    return None


def _started(pid: Any) -> str | None:
  """When a process started; None if there is none, or it has ended."""
  try:
    text = pathlib.Path('/proc', str(int(pid)), 'stat').read_text()
  except (OSError, ValueError, TypeError):
    return None
  # After the name, in which there may be anything: the state first.
  fields = text.rpartition(')')[2].split()
  return None if fields[0] in 'ZX' else fields[19]
