"""Captioned images in tars, as img2dataset and webdataset write them.

A record is an image (.jpg, .jpeg, .png or .webp) and its caption (.txt, or
the 'caption' of a .json) under one name. Its key is `<tar>/<name>`. Tars are
read as a stream, front to back; nothing is ever extracted to disk.
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
# What a damaged tar, compressed or not, raises.
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error)
_MAX_IMAGE, _MAX_CAPTION = 256 * 2**20, 2**20  # bytes
_MAX_MEMBERS = 2_000_000
# Bytes of files that wait for the rest of their record.
_MAX_PENDING = 2**30

Files = dict[str, bytes | None]


def find(patterns: Sequence[str]) -> list[str]:
  """The tars that match globs, local or in buckets that fsspec knows.

  Raises:
    ValueError: none does, or two would give their records the same keys.
  """
  paths = []
  for pattern in patterns:
    # Globs are of a directory: of the last part without a wildcard.
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
    # ImportError: fsspec says what to install for a bucket.
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
  """The split of a record, by a hash of its key alone."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  is_validation = int.from_bytes(digest) < validation_fraction * 2**64
  return 'validation' if is_validation else 'train'


def read_records(
  path: epath.PathLike, rejects: list[BadRecord]
) -> Iterator[tuple[str, bytes, str]]:
  """Yields the key, the image file and the caption of a tar's records.

  Args:
    path: local, or in a bucket; compressed or not.
    rejects: what cannot be used is added to it.
  """
  for key, files in _groups(path, rejects):
    try:
      image, caption = split_files(files, key)
      yield key, image, caption
    except BadRecord as bad:
      rejects.append(bad)


def split_files(files: Files, key: str) -> tuple[bytes, str]:
  """Returns the image file and the caption, its white space collapsed.

  Raises:
    BadRecord: one of them is not there, or the caption is no text.
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
  """The name and the lower-case suffix of a file that may be of a record."""
  name, _, suffix = member.name.removeprefix('./').rpartition('.')
  suffix = suffix.lower()
  if member.isfile() and suffix in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
    return name, suffix
  return None


def _groups(
  path: epath.PathLike, rejects: list[BadRecord]
) -> Iterator[tuple[str, Files]]:
  """Yields the files of each name; neighbours as soon as they are complete."""
  stem = epath.Path(path).stem
  pending: dict[str, Files] = {}
  seen, num_pending, last = set(), 0, None

  def take(name):
    nonlocal num_pending
    files = pending.pop(name)
    num_pending -= sum(len(data or b'') for data in files.values())
    # What is None has been rejected already.
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
      continue  # Has gone out: this is its other caption.
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
  """Yields name, suffix and contents; None for what is rejected."""
  stem, key, opened = epath.Path(path).stem, None, False
  try:
    with (
      epath.Path(path).open('rb') as file,
      tarfile.open(fileobj=file, mode='r|*') as tar,
    ):
      opened = True
      for count, member in enumerate(tar):
        # A stream's members are remembered otherwise.
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
