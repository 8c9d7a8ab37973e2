"""Captioned images read in place, from tars on a local disk.

An index holds the position of every record's image and caption. It is a
directory with `index.json` (the tars and their sizes) and one memory-mapped
table for each split, of 19 bytes per record.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shlex
import tarfile
from typing import Any

from absl import logging
import numpy as np

from mdm_jax.data import tars
from mdm_jax.data.transforms import BadRecord

# Bytes. Members of a tar begin at multiples of a block.
_BLOCK = 512
_ROW = np.dtype(
  [
    ('tar', '<u4'),
    ('image_block', '<u4'),
    ('image_size', '<u4'),
    ('caption_block', '<u4'),
    ('caption_size', '<u2'),
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

  Raises:
    ValueError: `output` exists, a tar cannot be indexed, or there is no record
      for training.
  """
  target = pathlib.Path(output)
  if target.exists():
    raise ValueError(
      f'--output={output} exists: remove it or choose another directory.'
    )
  parts = {'train': [], 'validation': []}
  for number, path in enumerate(paths):
    rows = {split: [] for split in parts}
    for key, row in _rows(path, number):
      rows[tars.split_of(key, validation_fraction)].append(row)
    for split in parts:
      parts[split].append(np.array(rows[split], _ROW))
  tables = {split: np.concatenate(part) for split, part in parts.items()}
  tables = {split: table for split, table in tables.items() if len(table)}
  if 'train' not in tables:
    raise ValueError('The tars hold no record for training.')
  counts = {split: len(table) for split, table in tables.items()}
  partial = target.with_name(f'{target.name}.incomplete')
  partial.mkdir(parents=True, exist_ok=True)
  for split, table in tables.items():
    np.save(partial / f'{split}.npy', table)
  (partial / 'index.json').write_text(
    json.dumps(
      {
        'tars': [
          [os.path.abspath(path), os.path.getsize(path)] for path in paths
        ],
        'splits': counts,
      }
    )
  )
  partial.rename(target)
  return counts


def _rows(path: str, number: int):
  """Yields the key and the row of every record with an image and a caption."""
  groups: dict[str, dict[str, tarfile.TarInfo]] = {}
  stem = pathlib.Path(path).stem
  try:
    with tarfile.open(path, 'r:') as tar:
      for member in tar:
        if parts := tars.member_parts(member):
          name, suffix = parts
          if suffix in groups.setdefault(name, {}):
            logging.warning(
              '%s has two files for %s.%s: the first one is used.',
              path,
              name,
              suffix,
            )
          groups[name].setdefault(suffix, member)
  except tars.DAMAGED as error:
    raise ValueError(
      f'{path} cannot be indexed ({error}): only whole, uncompressed tars '
      'can be read in place; prepare_data takes others.'
    ) from error
  for name, members in groups.items():
    image, caption = (
      next((members[s] for s in suffixes if s in members), None)
      for suffixes in (tars.IMAGE_SUFFIXES, tars.CAPTION_SUFFIXES)
    )
    # The table has 2 bytes for the size of a caption.
    if image is None or caption is None or caption.size >= 2**16:
      logging.warning(
        'Skipped %s/%s: it has no image, no caption, or a caption of 64 KiB '
        'or more.',
        stem,
        name,
      )
      continue
    yield (
      f'{stem}/{name}',
      (
        number,
        image.offset_data // _BLOCK,
        image.size,
        caption.offset_data // _BLOCK,
        caption.size,
        caption.name.lower().endswith('.json'),
      ),
    )


def read_index(path: str) -> dict[str, Any]:
  """Reads `index.json` and checks the tars that it lists.

  Raises:
    FileNotFoundError: there is no index, or a tar is missing.
    ValueError: the size of a tar has changed.
  """
  file = pathlib.Path(path) / 'index.json'
  if not file.exists():
    raise FileNotFoundError(
      f"There is no index in {path}: make one with {_COMMAND} --input='…/"
      f"*.tar' --output={shlex.quote(path)}"
    )
  index = json.loads(file.read_text())
  for tar, size in index['tars']:
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
    """The record's `image` (an image file as bytes), `caption` and `key`.

    Raises:
      BadRecord: the tar cannot be read, or the caption is unusable.
    """
    row = self._table[index]
    path = self._tars[row['tar']]
    start = int(row['image_block']) * _BLOCK
    key = f'{pathlib.Path(path).stem}@{start}'
    try:
      with open(path, 'rb') as file:
        image = _read(file, start, int(row['image_size']))
        caption = _read(
          file, int(row['caption_block']) * _BLOCK, int(row['caption_size'])
        )
    except OSError as error:
      raise BadRecord(key, 'unreadable tar', str(error)) from error
    suffix = 'json' if row['is_json'] else 'txt'
    image, caption = tars.split_files({'jpg': image, suffix: caption}, key)
    return {'image': image, 'caption': caption, 'key': key}


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
  splits = available_splits(path)
  if split not in splits:
    raise ValueError(
      f'{path} has no split {split!r}, only: {", ".join(splits)}.'
    )
  return TarSource(path, split)
