"""Captioned images read in place, from tars on a disk or in a bucket.

An index holds the position of every record's image and caption. It is a
directory with `index.json` (the tars, their sizes, and in a bucket the number
that changes with their content) and one memory-mapped table for each split, of
21 bytes per record.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import shlex
from typing import Any

from etils import epath
import numpy as np
import tqdm

from mdm_jax.data import tar_members, tars
from mdm_jax.data.images import BadRecord, DataError
from mdm_jax.runtime import files, remote_reads

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
_INDEX = 'index.json'
_PARTS = 'image', 'caption'
_COMMAND = 'python -m mdm_jax.tools.index_tars'
# Tars in a bucket that are indexed at the same time.
_AT_ONCE = 16
# Bytes between an image and its caption that are read with them, not to need
# another request.
_GAP = 2**16


def write_index(
  paths: Sequence[str], output: str, validation_fraction: float
) -> dict[str, int]:
  """Indexes tars. On a disk, only the headers of their members are read.

  Those in a bucket are read as a whole: to wait for an answer for each header
  would take longer.

  Args:
    paths: uncompressed tars.
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
    Unavailable: a bucket does not answer.
  """
  target, is_local = epath.Path(output), files.is_local(output)
  # In a bucket the index is there once all of it is, its last file.
  if files.is_there(target if is_local else target / _INDEX):
    raise ValueError(
      f'--output={output} exists: remove it or choose another directory.'
    )
  parts = {'train': [], 'validation': []}
  used, rejects = [], []
  for tar, tables, bad in tqdm.tqdm(
    _read_tars(paths, validation_fraction),
    total=len(paths),
    unit=' tar',
    smoothing=0,
    disable=all(map(files.is_local, paths)),  # These take seconds.
  ):
    rejects += bad
    if any(map(len, tables.values())):
      for split, table in tables.items():
        table['tar'] = len(used)
        parts[split].append(table)
      used.append(tar)
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
  partial = target
  if is_local:
    partial = target.with_name(f'{target.name}.incomplete')
  for split, table in tables.items():
    with (
      files.replacing(partial / f'{split}.npy') as temporary,
      temporary.open('wb') as file,
    ):
      np.save(file, table)
  files.write_text(
    partial / 'rejects.jsonl',
    ''.join(
      json.dumps({'key': bad.key, 'reason': bad.reason, 'detail': bad.detail})
      + '\n'
      for bad in rejects
    ),
  )
  files.write_text(
    partial / _INDEX,
    json.dumps({'tars': used, 'splits': counts, 'rejected': rejected}),
  )
  if is_local:
    partial.rename(target)
  return counts


def _read_tars(
  paths: Sequence[str], validation_fraction: float
) -> Iterator[tuple[list[Any], dict[str, np.ndarray], list[BadRecord]]]:
  """Yields of each tar: it as in `index.json`, tables by split, its rejects."""

  def read(path):
    size, version = files.require_file(path)
    # Copies on a disk have other times.
    tar = (
      [os.path.abspath(path), size]
      if files.is_local(path)
      else [path, size, version]
    )
    rows, rejects = {'train': [], 'validation': []}, []
    for key, row in _rows(path, rejects):
      rows[tars.split_of(key, validation_fraction)].append(row)
    tables = {split: np.array(found, _ROW) for split, found in rows.items()}
    return tar, tables, rejects

  if all(map(files.is_local, paths)):
    yield from map(read, paths)
    return
  pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
  try:
    yield from pool.map(read, paths)
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _rows(
  path: str, rejects: list[BadRecord]
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields the key and the row of every record with an image and a caption.

  The number of the tar in the row is still 0.
  """
  try:
    for key, image, caption, suffix in tars.find_records(path, rejects):
      yield (
        key,
        (
          0,
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


def _read_file(path: str) -> bytes:
  """The bytes of `index.json`.

  Raises:
    FileNotFoundError: there is no index.
    ValueError: it cannot be read.
    OSError: the bucket does not answer.
  """
  try:
    return files.read_bytes(epath.Path(path) / _INDEX)
  except files.UnreadableFile as error:
    if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
      raise FileNotFoundError(
        f"There is no index in {path}: make one with {_COMMAND} --input='…/"
        f"*.tar' --output={shlex.quote(path)}"
      ) from None
    raise


def _parse(path: str, data: bytes) -> dict[str, Any]:
  """The content of `index.json`. Raises ValueError if it is damaged."""
  try:
    index = json.loads(data)
    index['tars'] = [
      (os.fspath(tar), int(size), *map(int, version))
      for tar, size, *version in index['tars']
    ]
    dict(index['splits'])
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'{epath.Path(path) / _INDEX} is damaged: remove {path} and index the '
      'tars again.'
    ) from error
  return index


# A training run asks a dozen times, and there may be thousands of tars.
@functools.lru_cache(maxsize=8)
def _parse_and_check(path: str, data: bytes) -> dict[str, Any]:
  """The content of `index.json`, see `read_index`."""
  index = _parse(path, data)
  in_buckets = functools.cache(files.list_bucket)
  for tar, size, *version in index['tars']:
    if files.is_local(tar):
      found = (os.path.getsize(tar),) if os.path.exists(tar) else None
    else:
      found = in_buckets(os.path.dirname(tar)).get(tar)
    if found is None:
      raise FileNotFoundError(
        f'{tar}, which {path} lists, is missing: restore it, or index the '
        'other tars again.'
      )
    if found[0] != size:
      raise ValueError(
        f'{tar} has {found[0]} bytes, {size} when {path} was made: index the '
        'tars again.'
      )
    if found[1:] != tuple(version):
      raise ValueError(
        f'{tar} has been replaced since {path} was made: index the tars again.'
      )
  return index


def read_index(path: str) -> dict[str, Any]:
  """Reads `index.json` and checks the tars that it lists, once in a process.

  Raises:
    FileNotFoundError: there is no index, or a tar is missing.
    ValueError: a tar has changed, or `index.json` is damaged.
  """
  return _parse_and_check(path, _read_file(path))


@dataclasses.dataclass(frozen=True)
class TarSource:
  """One split of an index, as random access records.

  Attributes:
    path: directory of the index.
    split: a split of the index.
    table: local copy of its table, which worker processes share; '' if there is
      none yet.
  """

  path: str
  split: str
  table: str = ''

  @functools.cached_property
  def _table_file(self) -> str:
    if self.table:
      return self.table
    file = epath.Path(self.path) / f'{self.split}.npy'
    return os.fspath(remote_reads.kept_copy(file))

  @functools.cached_property
  def _table(self) -> np.ndarray:
    return np.load(self._table_file, 'r')

  @functools.cached_property
  def _tars(self) -> list[str]:
    index = _parse(self.path, _read_file(self.path))
    return [tar for tar, *_ in index['tars']]

  def is_whole(self, length: int) -> bool:
    """Whether the table is one, and has `length` rows.

    Raises:
      OSError: it cannot be copied from a bucket.
    """
    files.require_file(self._table_file)
    try:
      return (
        len(self._table) == length and self._table.dtype.names == _ROW.names
      )
    except (ValueError, EOFError, OSError, TypeError):
      return False

  def __reduce__(self):
    """Pickles the arguments, so that each worker process opens the files."""
    return TarSource, (self.path, self.split, self._table_file)

  def fingerprint(self) -> str:
    """Changes with the tars and their order."""
    index = files.read_bytes(epath.Path(self.path) / _INDEX)
    return hashlib.blake2b(index, digest_size=8).hexdigest()

  def __len__(self) -> int:
    """The number of records."""
    return len(self._table)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record's `image` (a file as bytes), `key`, `caption` and `captions`.

    `caption` is the first of the captions.

    Raises:
      BadRecord: the tar cannot be read, or the caption is unusable.
    """
    return self.request(index)()

  def key(self, index: int) -> str:
    """The key of a record, for which nothing is read.

    Raises:
      BadRecord: there is no such tar.
    """
    path, spans, _ = self._place(index)
    return _key(path, spans)

  def caption(self, index: int) -> str:
    """The first caption of a record, without its image.

    Raises:
      BadRecord, DataError: as `__getitem__`.
    """
    path, spans, is_json = self._place(index)
    key = _key(path, spans)
    data = _wait(remote_reads.request(path, *spans[1]), key)
    return tars.read_captions(data, 'json' if is_json else 'txt', key)[0]

  def _place(self, index: int) -> tuple[str, list[tuple[int, int]], bool]:
    """The tar, where image and caption start and end, whether that is JSON.

    Raises:
      BadRecord: there is no such tar.
    """
    row = self._table[index]
    number = int(row['tar'])
    if number >= len(self._tars):
      raise BadRecord(f'{self.path}@{index}', 'damaged index')
    starts = [int(row[f'{part}_block']) * _BLOCK for part in _PARTS]
    sizes = [int(row[f'{part}_size']) for part in _PARTS]
    spans = [(start, start + size) for start, size in zip(starts, sizes)]
    return self._tars[number], spans, bool(row['is_json'])

  def request(self, index: int) -> Callable[[], dict[str, Any]]:
    """Begins to read a record, if it is in a bucket.

    Returns:
      A function that waits for the record, and raises as `__getitem__`.
    """
    try:
      path, spans, is_json = self._place(index)
    except BadRecord as bad:
      return functools.partial(_refuse, bad)
    read = _request(path, spans)
    return functools.partial(_record, read, is_json, _key(path, spans))


def _key(path: str, spans: Sequence[tuple[int, int]]) -> str:
  return f'{tars.stem(path)}@{spans[0][0]}'


def _refuse(bad: BadRecord) -> dict[str, Any]:
  raise bad


def _record(
  read: Callable[[], list[bytes]], is_json: bool, key: str
) -> dict[str, Any]:
  image, caption = _wait(read, key)
  captions = tars.read_captions(caption, 'json' if is_json else 'txt', key)
  return {
    'image': image,
    'caption': captions[0],
    'captions': captions,
    'key': key,
  }


def _wait(read: Callable[[], Any], key: str) -> Any:
  """What a function reads.

  Raises:
    BadRecord: the tar cannot be read.
    DataError: the bucket does not answer.
  """
  try:
    return read()
  except OSError as error:
    raise BadRecord(key, 'unreadable tar', str(error)) from error
  # An outage would make thousands of them bad.
  except remote_reads.Unavailable as error:
    raise DataError(f'{error}.') from error


def _request(
  path: str, spans: Sequence[tuple[int, int]]
) -> Callable[[], list[bytes]]:
  """Begins to read parts of a file, together if they are near."""
  first, last = min(spans)[0], max(end for _, end in spans)
  if last - first - sum(end - start for start, end in spans) <= _GAP:
    wait = remote_reads.request(path, first, last)

    def split() -> list[bytes]:
      data = wait()
      return [data[start - first : end - first] for start, end in spans]

    return split
  waits = [remote_reads.request(path, *span) for span in spans]
  return lambda: [wait() for wait in waits]


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
