"""Captioned images read in place, from tars on a local disk.

An index holds the position of every record's image and caption. It is a
directory with `index.json` (the tars and their sizes) and one memory-mapped
table for each split, of 21 bytes per record.
"""

import collections
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shlex
from typing import Any

import numpy as np

from mdm_jax.data import tar_members, tars
from mdm_jax.data.images import BadRecord

# Bytes. Members of a tar begin at multiples of a block.
_BLOCK = 512
_ROW = np.dtype(
  [
    ('tar', '<u4'),
    ('image_block', '<u4'),
    ('image_size', '<u4'),
    ('caption_block', '<u4'),
    ('caption_size', '<u4'),
    ('is_json', '?'),
  ]
)
_COMMAND = 'python -m mdm_jax.tools.index_tars'


def write_index(
  paths: Sequence[str], output: str, validation_fraction: float
) -> dict[str, int]:
  """Indexes tars. Only the headers of their members are read.

  Args:
    paths: uncompressed tars on a local disk.
    output: the directory to write the index to.
    validation_fraction: share of the validation split, see `tars.split_of`.

  Returns:
    The number of records of each split.

  Records that cannot be used are listed in `rejects.jsonl`, and counted in
  `index.json`.

  Raises:
    ValueError: `output` exists, a tar is compressed, or there is no record for
      training.
    OSError: the index cannot be written.
  """
  target = pathlib.Path(output)
  if target.exists():
    raise ValueError(
      f'--output={output} exists: remove it or choose another directory.'
    )
  parts = {'train': [], 'validation': []}
  used, rejects = [], []
  for path in paths:
    if not os.path.exists(path):
      raise ValueError(
        f'{path} is not on a local disk: copy it, or use prepare_data.'
      )
    rows = {split: [] for split in parts}
    for key, row in _rows(path, len(used), rejects):
      rows[tars.split_of(key, validation_fraction)].append(row)
    if any(rows.values()):
      used.append(path)
      for split in parts:
        parts[split].append(np.array(rows[split], _ROW))
  rejected = dict(collections.Counter(bad.reason for bad in rejects))
  if not sum(map(len, parts['train'])):
    raise ValueError(
      f'The tars hold no record for training: {rejected}'
      + (f', such as {rejects[0]}' if rejects else '')
      + '. An image and its caption need the same name up to the last dot.'
    )
  tables = {split: np.concatenate(part) for split, part in parts.items()}
  tables = {split: table for split, table in tables.items() if len(table)}
  counts = {split: len(table) for split, table in tables.items()}
  partial = target.with_name(f'{target.name}.incomplete')
  partial.mkdir(parents=True, exist_ok=True)
  for split, table in tables.items():
    np.save(partial / f'{split}.npy', table)
  (partial / 'index.json').write_text(
    json.dumps(
      {
        'tars': [
          [os.path.abspath(path), os.path.getsize(path)] for path in used
        ],
        'splits': counts,
        'rejected': rejected,
      }
    )
  )
  with (partial / 'rejects.jsonl').open('w') as lines:
    for bad in rejects:
      reject = {'key': bad.key, 'reason': bad.reason, 'detail': bad.detail}
      lines.write(json.dumps(reject) + '\n')
  partial.rename(target)
  return counts


def _rows(path: str, number: int, rejects: list[BadRecord] | None = None):
  """Yields the key and the row of every record with an image and a caption."""
  rejects = [] if rejects is None else rejects
  try:
    for key, image, caption, suffix in tars.find_records(path, rejects):
      yield (
        key,
        (
          number,
          image.offset // _BLOCK,
          image.size,
          caption.offset // _BLOCK,
          caption.size,
          suffix == 'json',
        ),
      )
  except tar_members.CompressedTar as error:
    raise ValueError(
      f'{path} cannot be indexed: {error}, so it cannot be read in place; '
      'prepare_data takes it.'
    ) from error


def read_index(path: str) -> dict[str, Any]:
  """Reads `index.json` and checks the tars that it lists.

  Raises:
    FileNotFoundError: there is no index, or a tar is missing.
    ValueError: the size of a tar has changed, or `index.json` is damaged.
  """
  file = pathlib.Path(path) / 'index.json'
  if not file.exists():
    raise FileNotFoundError(
      f"There is no index in {path}: make one with {_COMMAND} --input='…/"
      f"*.tar' --output={shlex.quote(path)}"
    )
  try:
    index = json.loads(file.read_bytes())
    listed = [(os.fspath(tar), int(size)) for tar, size in index['tars']]
    dict(index['splits'])
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'{file} is damaged: remove {path} and index the tars again.'
    ) from error
  for tar, size in listed:
    if not os.path.exists(tar):
      raise FileNotFoundError(
        f'{tar}, which {path} lists, is missing: restore it, or index the '
        'other tars again.'
      )
    if (found := os.path.getsize(tar)) != size:
      raise ValueError(
        f'{tar} has {found} bytes, {size} when {path} was made: index the '
        'tars again.'
      )
  return index


@dataclasses.dataclass(frozen=True)
class TarSource:
  """One split of an index, as random access records.

  Attributes:
    path: directory of the index.
    split: a split of the index.
  """

  path: str
  split: str

  @functools.cached_property
  def _table(self) -> np.ndarray:
    return np.load(pathlib.Path(self.path) / f'{self.split}.npy', 'r')

  @functools.cached_property
  def _tars(self) -> list[str]:
    return [tar for tar, _ in read_index(self.path)['tars']]

  def is_whole(self, length: int) -> bool:
    """Whether the table is one, and has `length` rows."""
    try:
      return (
        len(self._table) == length and self._table.dtype.names == _ROW.names
      )
    except (ValueError, EOFError, OSError, TypeError):
      return False

  def __reduce__(self):
    """Pickles the arguments, so that each worker process opens the files."""
    return TarSource, (self.path, self.split)

  def fingerprint(self) -> str:
    """Changes with the tars and their order."""
    index = pathlib.Path(self.path) / 'index.json'
    return hashlib.blake2b(index.read_bytes(), digest_size=8).hexdigest()

  def __len__(self) -> int:
    """The number of records."""
    return len(self._table)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record's `image` (a file as bytes), `key`, `caption` and `captions`.

    `caption` is the first of the captions.

    Raises:
      BadRecord: the tar cannot be read, or the caption is unusable.
    """
    row = self._table[index]
    if row['tar'] >= len(self._tars):
      raise BadRecord(f'{self.path}@{index}', 'damaged index')
    path = self._tars[row['tar']]
    start = int(row['image_block']) * _BLOCK
    key = f'{tars.stem(path)}@{start}'
    try:
      with open(path, 'rb') as file:
        image = _read(file, start, int(row['image_size']))
        caption = _read(
          file, int(row['caption_block']) * _BLOCK, int(row['caption_size'])
        )
    except OSError as error:
      raise BadRecord(key, 'unreadable tar', str(error)) from error
    captions = tars.read_captions(
      caption, 'json' if row['is_json'] else 'txt', key
    )
    return {
      'image': image,
      'caption': captions[0],
      'captions': captions,
      'key': key,
    }


def _read(file, start: int, size: int) -> bytes:
  file.seek(start)
  data = file.read(size)
  if len(data) != size:
    raise OSError(f'the file ends before byte {start + size}')
  return data


def available_splits(path: str) -> tuple[str, ...]:
  """Returns the names of an index's splits.

  Raises:
    FileNotFoundError, ValueError: as `read_index`.
  """
  return tuple(read_index(path)['splits'])


def open_source(path: str, split: str) -> TarSource:
  """Opens a split of an index.

  Raises:
    FileNotFoundError: as `read_index`.
    ValueError: as `read_index`, or the index has no such split.
  """
  splits = read_index(path)['splits']
  if split not in splits:
    raise ValueError(
      f'{path} has no split {split!r}, only: {", ".join(splits)}.'
    )
  source = TarSource(path, split)
  if not source.is_whole(splits[split]):
    raise ValueError(
      f'{split}.npy in {path} is damaged: remove {path} and index the tars '
      'again.'
    )
  return source
