"""Captioned images in tars, as img2dataset and webdataset write them.

A record is an image (.jpg, .jpeg, .png or .webp) and a caption (.txt, or the
'caption' of a .json) with the same name. Its key is `<tar>/<name>`. Tars are
streamed, and nothing is extracted to disk.
"""

import collections
from collections.abc import Iterator, Sequence
import hashlib
import json
import os
import re
import tarfile
import zlib

from etils import epath

from mdm_jax.data.transforms import BadRecord

IMAGE_SUFFIXES = ('jpg', 'jpeg', 'png', 'webp')
CAPTION_SUFFIXES = ('txt', 'json')
# Errors that damaged tars raise, compressed or not.
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error)
_MAX_IMAGE, _MAX_CAPTION = 256 * 2**20, 2**20  # bytes
_MAX_MEMBERS = 2_000_000
# Bytes of all files that wait for the other file of their record.
_MAX_PENDING = 2**30

# Suffix -> contents of a record's files; None for a file that was rejected.
Files = dict[str, bytes | None]


def find(patterns: Sequence[str]) -> list[str]:
  """The tars that match globs, local or in buckets that fsspec can read.

  Raises:
    ValueError: a glob cannot be read or matches nothing, or two tars have the
      same name, so that their records would have the same keys.
  """
  paths = []
  for pattern in patterns:
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
      raise ValueError(f'--input={pattern} cannot be read: {error}.') from error
    if not found:
      raise ValueError(f'--input={pattern} matches no file.')
    paths += found
  by_stem = collections.defaultdict(list)
  for path in paths:
    by_stem[epath.Path(path).stem].append(path)
  for same in by_stem.values():
    if len(same) > 1:
      raise ValueError(
        f'{same[0]} and {same[1]} would give their records the same keys: '
        'rename one.'
      )
  return paths


def split_of(key: str, validation_fraction: float) -> str:
  """Assigns a record to 'train' or 'validation' by a hash of its key alone."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  is_validation = int.from_bytes(digest) < validation_fraction * 2**64
  return 'validation' if is_validation else 'train'


def read_records(
  path: epath.PathLike, rejects: list[BadRecord]
) -> Iterator[tuple[str, bytes, str]]:
  """Yields the key, the image file and the caption of a tar's records.

  Args:
    path: of a tar, local or in a bucket, compressed or not.
    rejects: unusable records are appended to it.
  """
  for key, files in _groups(path, rejects):
    try:
      image, caption = split_files(files, key)
      yield key, image, caption
    except BadRecord as bad:
      rejects.append(bad)


def split_files(files: Files, key: str) -> tuple[bytes, str]:
  """Returns the image file, and the caption with collapsed white space.

  Raises:
    BadRecord: the image or the caption is missing, or the caption is empty or
      unreadable.
  """
  image = next((files[s] for s in IMAGE_SUFFIXES if s in files), None)
  if image is None:
    raise BadRecord(key, 'caption without image')
  suffix = next((s for s in CAPTION_SUFFIXES if s in files), None)
  if suffix is None:
    raise BadRecord(key, 'image without caption')
  return image, _parse_caption(files[suffix], suffix, key)


def _parse_caption(data: bytes, suffix: str, key: str) -> str:
  try:
    text = data.decode()
    caption = text if suffix == 'txt' else json.loads(text)['caption']
  # A hostile JSON file may be nested too deeply.
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise BadRecord(
      key, 'unreadable caption', f'{type(error).__name__}: {error}'
    ) from error
  caption = ' '.join(str(caption or '').split())
  if not caption:
    raise BadRecord(key, 'empty caption')
  return caption


def member_parts(member: tarfile.TarInfo) -> tuple[str, str] | None:
  """The name and lower-case suffix of an image or caption, None for others."""
  name, _, suffix = member.name.removeprefix('./').rpartition('.')
  suffix = suffix.lower()
  if member.isfile() and suffix in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
    return name, suffix
  return None


def _groups(
  path: epath.PathLike, rejects: list[BadRecord]
) -> Iterator[tuple[str, Files]]:
  """Yields the key and the files of each record.

  A record whose files are neighbours in the tar is yielded once it is
  complete, others at the end.
  """
  stem = epath.Path(path).stem
  pending: dict[str, Files] = {}
  seen, num_pending, last = set(), 0, None

  def take(name):
    nonlocal num_pending
    files = pending.pop(name)
    num_pending -= sum(len(data or b'') for data in files.values())
    # None is a file that has been rejected, and its record with it.
    if None not in files.values():
      yield f'{stem}/{name}', files

  for name, suffix, data in _members(path, rejects):
    if (
      name != last
      and last in pending
      and (
        {*IMAGE_SUFFIXES} & {*pending[last]}
        and {*CAPTION_SUFFIXES} & {*pending[last]}
      )
    ):
      yield from take(last)
    last = name
    if (name, suffix) in seen:
      rejects.append(BadRecord(f'{stem}/{name}', 'name used twice', suffix))
      continue
    if name in seen and name not in pending:
      continue  # A second caption of a record that was yielded.
    seen |= {name, (name, suffix)}
    pending.setdefault(name, {})[suffix] = data
    num_pending += len(data or b'')
    while num_pending > _MAX_PENDING:
      first = next(iter(pending))
      for key, _ in take(first):
        rejects.append(BadRecord(key, 'parts too far apart'))
  for name in list(pending):
    yield from take(name)


def _members(
  path: epath.PathLike, rejects: list[BadRecord]
) -> Iterator[tuple[str, str, bytes | None]]:
  """Yields name, suffix and contents; the contents of rejects are None."""
  stem, key, opened = epath.Path(path).stem, None, False
  try:
    with (
      epath.Path(path).open('rb') as file,
      tarfile.open(fileobj=file, mode='r|*') as tar,
    ):
      opened = True
      for count, member in enumerate(tar):
        # Otherwise tarfile keeps every header in memory.
        tar.members = []
        if count >= _MAX_MEMBERS:
          raise tarfile.TarError(f'more than {_MAX_MEMBERS} members')
        parts = member_parts(member)
        if parts is None:
          continue
        name, suffix = parts
        key = f'{stem}/{name}'
        limit = _MAX_IMAGE if suffix in IMAGE_SUFFIXES else _MAX_CAPTION
        if member.size > limit:
          rejects.append(
            BadRecord(key, 'file too large', f'{suffix} of {member.size} bytes')
          )
          yield name, suffix, None
          continue
        data = tar.extractfile(member).read()
        key = None
        yield name, suffix, data
  except DAMAGED as error:
    if key is not None:
      rejects.append(BadRecord(key, 'damaged tar member', str(error)))
      yield name, suffix, None
    # The members before the damage are still good.
    reason = 'damaged tar' if opened else 'unreadable tar'
    rejects.append(BadRecord(str(path), reason, str(error)))
