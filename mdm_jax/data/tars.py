"""Captioned images or videos in tars of img2dataset, video2dataset, webdataset.

A record is an image (.jpg, .jpeg, .png or .webp), or a video, and a caption
(.txt, or the 'caption' of a .json) with the same name. Its key is
`<tar>/<name>`. If a name has several parts, such as `name.input.jpg` and
`name.output.txt`, the key has the first. Tars are streamed, and nothing is
extracted to disk.
"""

import collections
from collections.abc import Collection, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import math
import os
import re
from typing import Any

from etils import epath

from mdm_jax.data import captions, tar_members
from mdm_jax.data.images import BadRecord, is_system_file
from mdm_jax.data.tar_members import DamagedTar, Member
from mdm_jax.runtime import buckets

IMAGE_SUFFIXES = ('jpg', 'jpeg', 'png', 'webp')
VIDEO_SUFFIXES = ('mp4', 'webm', 'mov', 'mkv', 'avi', 'gif', 'webp')
CAPTION_SUFFIXES = ('txt', 'json')
MAX_FILE, MAX_CAPTION = 256 * 2**20, 2**20  # bytes
# Reasons of a tar that could not be read to its end.
_DAMAGED, _UNREADABLE = 'damaged tar', 'unreadable tar'
UNREAD = (_DAMAGED, _UNREADABLE)
_MAX_MEMBERS = 2_000_000
_MAX_NAMES = 2**28  # letters of all names
# Bytes of all files that wait for the other file of their record.
_MAX_PENDING = 2**30


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a record has beside its caption.

  Attributes:
    noun: what it is called.
    suffixes: of its file.
  """

  noun: str
  suffixes: tuple[str, ...]


IMAGE, VIDEO = Kind('image', IMAGE_SUFFIXES), Kind('video', VIDEO_SUFFIXES)

# Suffix -> contents of a record's file, or where it is; None for a file that
# was rejected.
Files = dict[str, Any]


def find(patterns: Sequence[str]) -> list[str]:
  """The tars that match globs, local or in buckets that fsspec can read.

  Raises:
    ValueError: a glob cannot be read or matches nothing or a folder, or two
      tars have the same name, so that their records would have the same keys.
  """
  paths = [path for pattern in patterns for path in match(pattern)]
  for path in paths:
    if buckets.scheme(path) is None and epath.Path(path).is_dir():
      raise ValueError(f"--input={path} is a folder: give '{path}/*.tar'.")
  require_distinct((stem(path), path) for path in paths)
  return paths


def match(pattern: str) -> list[str]:
  """The paths that match a glob, local or in a bucket.

  Raises:
    ValueError: the glob cannot be read or matches nothing.
  """
  # The glob starts at the last directory before any wildcard.
  parts = pattern.split('/')
  wild = next(
    (i for i, part in enumerate(parts[:-1]) if re.search(r'[*?[]', part)),
    len(parts) - 1,
  )
  directory = '/'.join(parts[:wild]) or ('/' if wild else '.')
  try:
    found = sorted(
      map(os.fspath, epath.Path(directory).glob('/'.join(parts[wild:])))
    )
  # An ImportError of fsspec says which package the bucket needs.
  except (OSError, ImportError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise ValueError(f'--input={pattern} cannot be read: {reason}.') from error
  if not found:
    if buckets.scheme(pattern) in buckets.SCHEMES:
      try:
        buckets.find(directory)
      except ValueError as error:
        raise ValueError(f'--input={pattern}: {error}') from None
    is_glob = re.search(r'[*?[]', pattern)
    problem = 'matches no file' if is_glob else 'does not exist'
    raise ValueError(f'--input={pattern} {problem}.')
  return found


def require_distinct(prefixes: Iterable[tuple[str, str]]) -> None:
  """Raises ValueError if records of two paths would have the same keys.

  Args:
    prefixes: what the keys of a path's records begin with, and the path.
  """
  by_prefix = {}
  for prefix, path in prefixes:
    if by_prefix.get(prefix) == path:
      raise ValueError(f'{path} is given twice.')
    if prefix in by_prefix:
      raise ValueError(
        f'{by_prefix[prefix]} and {path} would give their records the same '
        'keys: rename one.'
      )
    by_prefix[prefix] = path


def split_of(key: str, validation_fraction: float) -> str:
  """Assigns a record to 'train' or 'validation' by a hash of its key alone."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  is_validation = int.from_bytes(digest) < validation_fraction * 2**64
  return 'validation' if is_validation else 'train'


def stem(path: epath.PathLike) -> str:
  """What the keys of a tar's records begin with: its name without .tar."""
  return tar_members.readable(epath.Path(path).stem)


def read_records(
  path: epath.PathLike, rejects: list[BadRecord], kind: Kind = IMAGE
) -> Iterator[tuple[str, bytes, list[str]]]:
  """Yields the key, the image file and the captions of a tar's records.

  Args:
    path: of a tar, local or in a bucket, compressed or not.
    rejects: unusable records are appended to it.
    kind: VIDEO yields videos instead of images.
  """
  members = _files(path, rejects, in_place=False, kind=kind)
  for key, files in _group(stem(path), members, rejects, _MAX_PENDING, kind):
    try:
      image, caption, suffix = choose(files, key, kind)
      yield key, image, read_captions(caption, suffix, key)
    except BadRecord as bad:
      rejects.append(bad)


def find_records(
  path: epath.PathLike, rejects: list[BadRecord]
) -> Iterator[tuple[str, Member, Member, str]]:
  """Finds records in place; the captions are not read.

  Args:
    path: of an uncompressed tar.
    rejects: unusable records are appended to it.

  Yields:
    The key, where the image file and the caption's file are, and the suffix of
    the latter.
  """
  members = _files(path, rejects, in_place=True)
  for key, files in _group(stem(path), members, rejects, math.inf):
    try:
      yield key, *choose(files, key)
    except BadRecord as bad:
      rejects.append(bad)


def choose(files: Files, key: str, kind: Kind = IMAGE) -> tuple[Any, Any, str]:
  """Returns image file, caption file, and the suffix of the latter.

  Raises:
    BadRecord: the image or the caption is missing.
  """
  image = next((files[s] for s in kind.suffixes if s in files), None)
  if image is None:
    raise BadRecord(key, f'caption without {kind.noun}')
  suffix = next((s for s in CAPTION_SUFFIXES if s in files), None)
  if suffix is None:
    raise BadRecord(key, f'{kind.noun} without caption')
  return image, files[suffix], suffix


def read_captions(data: bytes, suffix: str, key: str) -> list[str]:
  """The captions of a .txt, which holds one, or of a .json.

  Raises:
    BadRecord: as `captions.read`.
  """
  read = captions.read_json if suffix == 'json' else captions.read
  return read(data, key)


def _is_complete(suffixes: Collection[str], kind: Kind) -> bool:
  return bool({*kind.suffixes} & {*suffixes}) and bool(
    {*CAPTION_SUFFIXES} & {*suffixes}
  )


def _webdataset_key(name: str) -> str | None:
  """The key that webdataset gives to a file, if its parts look like that.

  webdataset separates key and parts at the first dot of the base name, as in
  `key.input.jpg`. In other tars a dot is part of the name, as in `1.5 m.jpg`.
  """
  directory, slash, base = name.rpartition('/')
  key, _, parts = base.partition('.')
  if key and (not parts or re.fullmatch(r'[A-Za-z_]+(\.[A-Za-z_]+)*', parts)):
    return directory + slash + key
  return None


class _Groups:
  """Collects the files of records."""

  def __init__(
    self, tar: str, rejects: list[BadRecord], max_pending: float, kind: Kind
  ):
    self._tar, self._rejects, self._kind = tar, rejects, kind
    self._max_pending = max_pending
    # Name -> files, and their bytes.
    self._pending: dict[str, Files] = {}
    self._sizes = collections.Counter()
    self._num_pending = 0
    self._seen = set()
    # The last names in the tar with the same webdataset key.
    self._neighbours: list[str] = []
    # False once a record has equal names with a dot in them.
    self._may_join = True

  def add(
    self, name: str, suffix: str, size: int, content: Any
  ) -> Iterator[tuple[str, Files]]:
    """Adds a file; yields the record that was complete before it, if any."""
    if self._neighbours and name != self._neighbours[-1]:
      last = self._neighbours[-1]
      if _is_complete(self._pending.get(last, ()), self._kind):
        yield from self._take([last])
      if _webdataset_key(name) != _webdataset_key(last):
        yield from self._take(self._joined(self._neighbours))
        self._neighbours = []
    if name not in self._neighbours[-1:]:
      self._neighbours.append(name)
    if (name, suffix) in self._seen:
      self._reject(name, 'name used twice', suffix)
      return
    if name in self._seen and name not in self._pending:
      # A second caption of a record that was yielded is no loss.
      if suffix in self._kind.suffixes:
        self._reject(name, 'name used twice', suffix)
      return
    self._seen |= {name, (name, suffix)}
    self._pending.setdefault(name, {})[suffix] = content
    self._sizes[name] += size
    self._num_pending += size
    while self._num_pending > self._max_pending:
      first = next(iter(self._pending))
      for _ in self._take([first]):
        self._reject(first, 'parts too far apart')

  def finish(self) -> Iterator[tuple[str, Files]]:
    """Yields what is left, also records without image or caption."""
    by_key = collections.defaultdict(list)
    for name in self._pending:
      by_key[_webdataset_key(name)].append(name)
    joined = {
      name: names
      for names in map(self._joined, by_key.values())
      for name in names
    }
    for name in list(self._pending):
      if name in self._pending:
        yield from self._take(joined.get(name, [name]))

  def _reject(self, name: str, reason: str, detail: str = '') -> None:
    self._rejects.append(BadRecord(f'{self._tar}/{name}', reason, detail))

  def _joined(self, names: Sequence[str]) -> list[str]:
    """The names that are one record by webdataset's rule, or none."""
    names = [name for name in names if name in self._pending]
    suffixes = [suffix for name in names for suffix in self._pending[name]]
    key = _webdataset_key(names[0]) if names else None
    is_record = (
      self._may_join
      and len(names) > 1
      and key is not None
      and (key in self._pending or key not in self._seen)
      and not any(
        _is_complete(self._pending[name], self._kind) for name in names
      )
      and _is_complete(suffixes, self._kind)
      and len(suffixes) == len({*suffixes})
      and len({*suffixes} & {*self._kind.suffixes}) == 1
    )
    return names if is_record else []

  def _take(self, names: Sequence[str]) -> Iterator[tuple[str, Files]]:
    """Yields the files of names that are one record."""
    if not names:
      return
    files = {}
    for name in names:
      files |= self._pending.pop(name)
      self._num_pending -= self._sizes.pop(name)
    name = names[0] if len(names) == 1 else _webdataset_key(names[0])
    self._seen.add(name)
    if len(names) == 1 and '.' in name.rpartition('/')[2]:
      is_complete = _is_complete(files, self._kind)
      self._may_join = self._may_join and not is_complete
    # None is a file that has been rejected, and its record with it.
    if None not in files.values():
      yield f'{self._tar}/{name}', files


def _group(
  tar: str,
  members: Iterable[tuple[str, str, int, Any]],
  rejects: list[BadRecord],
  max_pending: float,
  kind: Kind = IMAGE,
) -> Iterator[tuple[str, Files]]:
  """Yields the key and the files of each record.

  A record whose files are neighbours in the tar is yielded once it is
  complete, others at the end.
  """
  groups = _Groups(tar, rejects, max_pending, kind)
  for member in members:
    yield from groups.add(*member)
  yield from groups.finish()


def _parts(name: str, kind: Kind) -> tuple[str, str] | None:
  """The name and lower-case suffix of an image or caption, None for others."""
  # Records may be called `...and more.jpg`, or lie in a hidden directory.
  if is_system_file(name, prefix='._'):
    return None
  name, _, suffix = name.removeprefix('./').rpartition('.')
  suffix = suffix.lower()
  if suffix in kind.suffixes + CAPTION_SUFFIXES:
    return name, suffix
  return None


def _files(
  path: epath.PathLike,
  rejects: list[BadRecord],
  in_place: bool,
  kind: Kind = IMAGE,
) -> Iterator[tuple[str, str, int, Any]]:
  """Yields name, suffix, size and contents of images and captions.

  The contents are the member if `in_place`, otherwise bytes; those of rejects
  are None.
  """
  tar_key, key = stem(path), None
  opened, count, num_letters = False, 0, 0
  try:
    with tar_members.open_tar(path, in_place) as tar:
      for member in tar:
        opened = True
        count += 1
        num_letters += len(member.name)
        if count > _MAX_MEMBERS or num_letters > _MAX_NAMES:
          raise DamagedTar(
            f'more than {_MAX_MEMBERS} members, or {_MAX_NAMES} letters in '
            'their names'
          )
        parts = _parts(member.name, kind)
        if parts is None or member.kind == 'directory':
          continue
        name, suffix = parts
        key = f'{tar_key}/{name}'
        if bad := _unusable(member, suffix, key):
          rejects.append(bad)
          yield name, suffix, 0, None
        elif in_place:
          tar.skip(member.size)
          yield name, suffix, member.size, member
        else:
          yield name, suffix, member.size, tar.read(member.size)
        key = None
  except (DamagedTar, OSError) as error:
    if key is not None:
      rejects.append(BadRecord(key, 'damaged tar member', str(error)))
      yield name, suffix, 0, None
    # The members before the damage are still good.
    reason = _DAMAGED if opened else _UNREADABLE
    rejects.append(
      BadRecord(tar_members.readable(str(path)), reason, str(error))
    )


def _unusable(member: Member, suffix: str, key: str) -> BadRecord | None:
  if member.kind:
    return BadRecord(key, 'not a plain file', f'{suffix}: {member.kind}')
  limit = MAX_CAPTION if suffix in CAPTION_SUFFIXES else MAX_FILE
  if member.size > limit:
    return BadRecord(key, 'file too large', f'{suffix} of {member.size} bytes')
  return None
