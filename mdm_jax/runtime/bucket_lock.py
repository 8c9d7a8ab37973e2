"""A lock in a bucket, where only the objects can tell who holds it."""

from collections.abc import Iterator
import contextlib
import glob
import json
import os
import random
import re
import threading
import time
from typing import Any
import uuid

from absl import logging
from etils import epath

from mdm_jax.runtime import buckets, ending, lock_holder

_RELEASE = 2.0  # seconds for a bucket to remove the lock
# What differs if an object is written again, in Google's, S3 and Azure's.
_VERSION = 'generation', 'etag', 'ETag', 'LastModified'


class BucketLock:
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
    """The lock with the name of a path, which is not held yet."""
    self._path, self._shared = path, shared
    self._bucket = buckets.file_system(path)
    self._name = ''
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._info = lock_holder.this_process() | {
      'token': uuid.uuid4().hex,
      'beats': 0,
      'replaces': [],
    }

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Holds the lock, see `directory_lock.holding`."""
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
        if holder is None or lock_holder.has_ended(holder):
          ended.append(name)
          continue
        waiting, now = bool(seen), time.monotonic()
        first, since = seen.setdefault(name, (version, now))
        if first != version or lock_holder.is_of_this_machine(holder):
          raise lock_holder.InUse(lock_holder.message(self._path, holder))
        if not waiting:
          logging.warning(
            '%s Waiting up to %g s for a sign of life of that machine.',
            lock_holder.message(self._path, holder),
            lock_holder.SILENCE,
          )
        if now - since > lock_holder.SILENCE:
          ended.append(name)
      if len(ended) == len(others) and self._create(ended):
        if seen:
          logging.warning('There was none: taking the directory over.')
        return
      time.sleep(lock_holder.POLL * random.uniform(0.5, 1))

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
    while not self._ended.wait(lock_holder.BEAT):
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
        lock_holder.what(self._path),
        lock_holder.who(by),
        lock_holder.SILENCE,
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
      raise lock_holder.NotWritable(
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
