"""Appends to files in buckets, whose objects can only be written as a whole.

What a session appends to `metrics.jsonl` is in objects beside it, such as
`metrics-000003-5f3a9c.jsonl`. Their numbers give the order, also between
sessions, whatever the clocks say; `files.read_json_lines` reads all of them as
one file.
"""

import collections
import dataclasses
import errno
import os

from etils import epath

from mdm_jax.runtime import buckets, files

# Bytes after which a new object begins: writing one again stays cheap.
_FULL = 2**20
# Bytes that wait for a bucket that fails; then no more are taken.
_MOST = 2**28


@dataclasses.dataclass
class _Object:
  data: bytearray
  path: str | None = None
  uploaded: int = 0  # Bytes.


class AppendedObjects:
  """What one session appends to a file in a bucket. Not safe for threads.

  `append` keeps it in memory, `flush` uploads it. If that fails, the next
  `flush` tries again.
  """

  def __init__(self, path: epath.PathLike, header: bytes = b''):
    """Nothing is written before the first `flush`.

    Args:
      path: of the file as which the objects are read.
      header: what each object begins with.
    """
    self._path, self._header = epath.Path(path), header
    self._objects: collections.deque[_Object] = collections.deque()

  def append(self, data: bytes) -> None:
    """Appends bytes, all of which are in the same object.

    Raises:
      OSError: too many bytes wait already.
    """
    if sum(len(each.data) for each in self._objects) > _MOST:
      raise OSError(
        errno.ENOBUFS, f'{_MOST >> 20} MiB wait for the bucket already'
      )
    if not self._objects or len(self._objects[-1].data) >= _FULL:
      self._objects.append(_Object(bytearray(self._header)))
    self._objects[-1].data += data

  def flush(self) -> None:
    """Uploads what is new.

    Raises:
      OSError: that failed. An error of another kind comes from s3:// and az://,
        see `buckets.errors`.
    """
    while self._objects:
      first = self._objects[0]
      if first.uploaded < len(first.data):
        first.path = first.path or os.fspath(files.new_part(self._path))
        buckets.file_system(first.path).pipe_file(first.path, bytes(first.data))
        first.uploaded = len(first.data)
      if len(self._objects) == 1:
        break
      self._objects.popleft()
