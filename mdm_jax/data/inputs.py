"""Finds out what the inputs of prepare_data are, and divides them into parts.

An input is a folder, or a glob of files, of one of these forms: tars, images
with captions in files or in a table, Parquet files.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import os
import re
from typing import NamedTuple

from etils import epath

from mdm_jax.data import folders, parquet, tables, tars
from mdm_jax.data.images import BadRecord
from mdm_jax.data.tar_members import readable
from mdm_jax.runtime import buckets

_ENTRIES = 500  # images of a folder that are read as one part
_TAR = re.compile(r'(?is)(.*)\.(tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz)')
# What img2dataset writes beside a tar or a folder.
_STATISTICS = re.compile(r'\d+_stats\.json')
# Names of splits as in `datasets`, for folders and files.
_SPLITS = {
  'train': ('train', 'training'),
  'validation': ('validation', 'valid', 'val', 'dev'),
  'test': ('test', 'testing', 'eval', 'evaluation'),
}


@dataclasses.dataclass(frozen=True)
class TarPart:
  """A tar.

  Attributes:
    path: local or in a bucket, compressed or not.
    split: of its records; None if it is not known.
  """

  path: str
  split: str | None = None

  def identity(self) -> str:
    """Tells from other parts."""
    return self.path

  def read(
    self, rejects: list[BadRecord]
  ) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yields records, see `tars.read_records`."""
    yield from tars.read_records(self.path, rejects)


# Each has `identity()`, `read(rejects)` and `split`.
Part = TarPart | folders.FolderPart | parquet.ParquetPart
# What they are, in the plural and as the unit of a progress bar.
NOUNS = {
  TarPart: ('tars', ' tar'),
  folders.FolderPart: ('folders', ' image folder part'),
  parquet.ParquetPart: ('Parquet files', ' Parquet file'),
}


class _Files(NamedTuple):
  """Names by what the files are."""

  tars: list[str]
  parquet: list[str]
  tables: list[str]
  images: list[str]
  others: list[str]


def find(inputs: Sequence[str], caption_column: str = '') -> list[Part]:
  """The parts of inputs, in the order of the inputs and of their names.

  Args:
    inputs: folders, or globs of folders and files, on a disk or in buckets.
    caption_column: of tables, see `tables.caption_column`.

  Raises:
    ValueError: an input does not exist, is nothing that can be read, or may be
      meant in several ways; or the records of two would have the same keys.
  """
  parts, prefixes = [], []
  for given in inputs:
    found = list(_find(given, caption_column))
    parts += found
    # A folder has several parts.
    prefixes += {(_prefix(part), part.path): None for part in found}
  _check_columns(parts, caption_column)
  tars.require_distinct(prefixes)
  return parts


def read(
  part: Part, rejects: list[BadRecord]
) -> Iterator[tuple[str, bytes, list[str]]]:
  """Yields the key, the image file and the captions of a part's records.

  Args:
    part: of `find`.
    rejects: unusable records are appended to it.
  """
  if part.split == 'test':
    rejects.append(BadRecord(readable(part.path), 'file of the test split'))
  else:
    yield from part.read(rejects)


def count(parts: Sequence[Part]) -> dict[str, int]:
  """'tars' -> number of tars, and so on for all kinds that there are."""
  return {
    noun: len({part.path for part in parts if type(part) is kind})
    for kind, (noun, _) in NOUNS.items()
    if any(type(part) is kind for part in parts)
  }


def unit(parts: Sequence[Part]) -> str:
  """What a part is, for a progress bar."""
  units = {NOUNS[type(part)][1] for part in parts}
  return units.pop() if len(units) == 1 else ' input'


def counted(count: int, noun: str) -> str:
  """'2 tars', '1 tar'."""
  return f'{count} {noun if count != 1 else noun.removesuffix("s")}'


def _find(given: str, caption_column: str) -> Iterator[Part]:
  """Yields the parts of an input."""
  # A folder may have a name that looks like a glob.
  paths = [given] if folders.is_folder(given) else tars.match(given)
  others = []
  for path in paths:
    if folders.is_folder(path):
      yield from _find_in_folder(path, caption_column)
    else:
      others.append(path)
  if others:
    yield from _find_files(given, others, caption_column)


def _prefix(part: Part) -> str:
  if isinstance(part, TarPart):
    return tars.stem(part.path)
  if isinstance(part, parquet.ParquetPart):
    return part.prefix
  return folders.key_prefix(part.path)


def _check_columns(parts: Sequence[Part], caption_column: str) -> None:
  """Raises ValueError if there is no such column, as far as is soon known."""
  files = [part for part in parts if isinstance(part, parquet.ParquetPart)]
  if files:
    files[0].check()
  if caption_column and parts and not any(map(_has_columns, parts)):
    raise ValueError(
      f'--caption_column={caption_column}: there are no columns here, but a '
      'caption beside each image.'
    )


def _has_columns(part: Part) -> bool:
  if isinstance(part, folders.FolderPart):
    # Captions of a table are known already.
    return any(
      isinstance(entry, folders.Entry) and not entry.caption_file
      for entry in part.entries
    )
  return isinstance(part, parquet.ParquetPart)


def _classify(names: Sequence[str]) -> _Files:
  """Sorts names by what the files are."""
  files = _Files([], [], [], [], [])
  # img2dataset writes 00000.parquet, without images, beside 00000.tar or the
  # folder 00000.
  beside = {found[1] for found in map(_TAR.fullmatch, names) if found}
  beside |= {os.path.dirname(name) for name in names}
  for name in names:
    base, (stem, suffix) = os.path.basename(name), os.path.splitext(name)
    if _TAR.fullmatch(name):
      files.tars.append(name)
    elif suffix.lower() == '.parquet':
      if stem not in beside:
        files.parquet.append(name)
    elif base in tables.NAMES:
      files.tables.append(name)
    elif folders.is_image(name):
      files.images.append(name)
    elif not _STATISTICS.fullmatch(base):
      files.others.append(name)
  return files


def _walk(folder: str) -> list[str]:
  """The files of a folder, see `folders.walk`, without img2dataset's own."""
  return [
    name
    for name in folders.walk(folder)
    if not _STATISTICS.fullmatch(os.path.basename(name))
  ]


def _find_files(
  given: str, paths: Sequence[str], caption_column: str
) -> Iterator[Part]:
  """Yields the parts of files that the user has named."""
  files = _classify(paths)
  if files.images:
    folder = os.path.dirname(files.images[0]) or '.'
    raise ValueError(
      f'--input={given} matches {_list(files)}: name the folder instead, '
      f'--input={folder}.'
    )
  parquet_files, by_folder = {*files.parquet}, collections.defaultdict(list)
  # Whatever else the user has named is meant to be a tar.
  tar_files = {*files.tars, *files.others}
  for path in paths:
    if path in parquet_files:
      prefix = readable(epath.Path(path).stem)
      yield parquet.ParquetPart(path, prefix, caption_column)
    elif path.endswith(tables.SUFFIXES):
      folder, name = os.path.split(path)
      by_folder[folder or '.'].append(name)
    elif path in tar_files:
      yield TarPart(path)
  for folder, names in by_folder.items():
    yield from _find_images(folder, names, caption_column)


def _find_in_folder(folder: str, caption_column: str) -> Iterator[Part]:
  """Yields the parts of a folder."""
  try:
    if not buckets.scheme(folder):
      os.scandir(folder).close()
  except OSError as error:
    raise ValueError(
      f'--input={folder} cannot be read: {error.strerror}.'
    ) from None
  names = _walk(folder)
  files = _classify(names)
  forms = [bool(x) for x in (files.tars, files.parquet, files.images)]
  if sum(forms) > 1:
    shown = files._replace(others=[])
    raise ValueError(
      f'--input={folder} holds {_list(shown)}: choose by a glob in quotes, '
      f"such as --input='{folder}/*.tar', or name a subfolder."
    )
  if not any(forms):
    raise ValueError(
      f'--input={folder} holds {_list(files)}: give a folder with images and '
      'their captions, with tars, or with Parquet files.'
    )
  if files.images:
    _require_one_table(folder, files.tables)
    yield from _find_images(folder, files.tables, caption_column, names)
    return
  found = files.tars or files.parquet
  for name, split in zip(found, _splits(found, are_shards=True)):
    path = os.path.join(folder, name)
    if files.tars:
      yield TarPart(path, split)
    else:
      prefix = f'{folders.key_prefix(folder)}/{os.path.splitext(name)[0]}'
      yield parquet.ParquetPart(path, readable(prefix), caption_column, split)


def _require_one_table(folder: str, table_names: Sequence[str]) -> None:
  """Raises ValueError if a folder has two tables for its images."""
  by_folder = {}
  for name in table_names:
    other = by_folder.setdefault(os.path.dirname(name), name)
    if other != name:
      raise ValueError(
        f'--input={folder} has {other} and {name}: remove one, or name the one '
        'to use as the --input.'
      )


def _find_images(
  folder: str,
  table_names: Sequence[str],
  caption_column: str,
  names: Sequence[str] | None = None,
) -> Iterator[folders.FolderPart]:
  """Yields the parts of a folder of images, see `folders.find`."""
  if names is None:
    names = _walk(folder)
  entries = folders.find(folder, names, table_names, caption_column)
  rejects = [entry for entry in entries if isinstance(entry, BadRecord)]
  if len(rejects) == len(entries):
    counts = collections.Counter(bad.reason for bad in rejects)
    shown = ', '.join(f'{reason}: {n}' for reason, n in counts.items())
    detail = f' ({rejects[0].detail})' if rejects[0].detail else ''
    other = [name for name in names if name.endswith(tables.SUFFIXES)]
    remedy = (
      f'If {other[0]} is a table of captions, name it: '
      f'--input={os.path.join(folder, other[0])}.'
      if other and not table_names
      else 'A caption is a file beside its image, a.jpg and a.txt, or a row of '
      'metadata.csv or metadata.jsonl with the columns file_name and text.'
    )
    raise ValueError(
      f'--input={folder} holds no image with a caption ({shown}; the first is '
      f'{rejects[0].key}{detail}). {remedy}'
    )
  images = ['' if isinstance(x, BadRecord) else x.image for x in entries]
  by_split = collections.defaultdict(list)
  for entry, split in zip(entries, _splits(images, are_shards=False)):
    if split == 'test' and isinstance(entry, folders.Entry):
      entry, split = BadRecord(entry.key, 'image of the test split'), 'train'
    by_split[split].append(entry)
  for split, found in by_split.items():
    for start in range(0, len(found), _ENTRIES):
      part = tuple(found[start : start + _ENTRIES])
      yield folders.FolderPart(folder, part, split)


def _splits(names: Sequence[str], are_shards: bool) -> list[str | None]:
  """The split of each file: 'train', 'validation', 'test'; None if unknown.

  Names are known as those of splits if there are some for training and some
  for another purpose. What belongs to none is for training. Without a
  validation split, the test split is the validation split.

  Args:
    names: of files, relative to the folder.
    are_shards: whether not only folders have names of splits, but also files:
      `train-00000-of-00002.parquet`.
  """
  splits = [_split_of_name(name, are_shards) for name in names]
  found = {*splits}
  if 'train' not in found or not found & {'validation', 'test'}:
    return [None] * len(splits)
  test = 'test' if 'validation' in found else 'validation'
  return [{'test': test}.get(split, split or 'train') for split in splits]


def _split_of_name(name: str, is_shard: bool) -> str | None:
  *parts, base = name.split('/')
  if is_shard:  # `train.tar`, `train_00.tar`, `train-00000-of-00002.parquet`
    parts.append(re.split(r'[-_.]\d|\.', base)[0])
  for part in parts:
    for split, words in _SPLITS.items():
      if part.lower() in words:
        return split
  return None


def _list(files: _Files) -> str:
  """What there is, in words: '3 tars, 2 images'."""
  by_suffix = collections.Counter(
    os.path.splitext(name)[1].lower() or 'without a suffix'
    for name in files.others
  )
  counts = {
    'tars': len(files.tars),
    'Parquet files': len(files.parquet),
    'images': len(files.images),
    'caption tables': len(files.tables),
  }
  shown = [counted(count, noun) for noun, count in counts.items() if count]
  shown += [f'{count} {suffix}' for suffix, count in by_suffix.most_common(5)]
  return readable(', '.join(shown)) or 'no files'
