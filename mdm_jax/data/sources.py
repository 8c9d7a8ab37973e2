"""Captioned images on disk, as random access records."""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

from mdm_jax.data.transforms import BadRecord


def _builder(path: str):
  if not (pathlib.Path(path) / 'dataset_info.json').is_file():
    raise FileNotFoundError(
        f'There is no prepared data set in {path}: make one with python -m '
        f"mdm_jax.tools.prepare_data --input='…/*.tar' --output={path}"
    )
  # Slow to import, so only programs that read such a data set pay for it.
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(path)


def available_splits(path: str) -> tuple[str, ...]:
  """Returns the names of a prepared data set's splits, such as `train`.

  Raises:
    FileNotFoundError: if there is no data set in `path`.
  """
  return tuple(_builder(path).info.splits)


@dataclasses.dataclass(frozen=True)
class PreparedSource:
  """One split of a data set that prepare_data wrote; opened when first read.

  Attributes:
    path: the data set's directory.
    split: its split.
  """

  path: str
  split: str

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds

    return _builder(self.path).as_data_source(
        self.split, decoders={'image': tfds.decode.SkipDecoding()}
    )

  def fingerprint(self) -> str:
    """Changes with the files' names and sizes."""
    files = _builder(self.path).info.splits[self.split].filepaths
    listing = '\n'.join(f'{file.name} {file.stat().length}' for file in files)
    return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()

  def __reduce__(self):
    """Worker processes open the files for themselves."""
    return PreparedSource, (self.path, self.split)

  def __len__(self) -> int:
    """The number of records."""
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the record's `image` file, `caption`, `key` and `size`.

    Raises:
      BadRecord: if the record's checksum does not match.
    """
    try:
      record = self._records[index]
    except RuntimeError as error:
      raise BadRecord(
          f'{self.path}[{self.split}][{index}]', 'damaged record', str(error)
      ) from error
    return {
        'image': record['image'],
        'caption': record['caption'].decode(),
        'key': record['key'].decode(),
        'size': int(min(record['width'], record['height'])),
    }


def open_source(path: str, split: str) -> PreparedSource:
  """Opens a split of a data set that prepare_data wrote.

  Raises:
    FileNotFoundError: if there is no data set in `path`, or a file of the
      split is missing.
    ValueError: if the data set has no such split.
  """
  splits = _builder(path).info.splits
  if split not in splits:
    raise ValueError(
        f'{path} has no split {split!r}, only: {", ".join(splits)}.'
    )
  for file in splits[split].filepaths:
    if not file.is_file():
      raise FileNotFoundError(f'{file} is missing: prepare {path} again.')
  return PreparedSource(path, split)
