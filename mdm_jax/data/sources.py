"""Data sets of captioned images that tools.prepare_data wrote."""

import os
import pathlib
import shlex

from mdm_jax.data import tfds_source


def _builder(path: str):
  tfds_source.require_local(path)
  if not (pathlib.Path(path) / 'dataset_info.json').is_file():
    here = shlex.quote(str(path))
    # The folder of images itself is the first thing that one tries.
    images, output = (here, 'DIR') if os.path.isdir(path) else ('IMAGES', here)
    raise FileNotFoundError(
      f'There is no prepared data set in {path}: make one with python -m '
      f'mdm_jax.tools.prepare_data --input={images} --output={output}'
    )
  # Slow to import, so it is imported only where such a data set is read.
  import tensorflow_datasets as tfds

  try:
    return tfds.builder_from_directory(path)
  # TFDS raises errors of many types for a description that is something else.
  except Exception as error:
    detail = f'{type(error).__name__}: {error}'.split('\n')[0]
    raise ValueError(
      f'dataset_info.json or features.json in {path} is damaged ({detail}): '
      'prepare the data set again.'
    ) from error


def available_splits(path: str) -> tuple[str, ...]:
  """Returns the names of a prepared data set's splits, such as `train`.

  Raises:
    FileNotFoundError: if there is no data set in `path`.
    ValueError: if its description is damaged, or it is in a bucket.
  """
  return tuple(_builder(path).info.splits)


def split_sizes(path: str) -> dict[str, int]:
  """Split -> number of records.

  Raises:
    FileNotFoundError, ValueError: as `available_splits`.
  """
  splits = _builder(path).info.splits
  return {name: split.num_examples for name, split in splits.items()}


def file_names(path: str, split: str) -> list[str]:
  """The names of the files of a split, or of a slice such as 'train[7:9]'.

  Raises:
    FileNotFoundError, ValueError: as `available_splits`.
  """
  return [file.name for file in _builder(path).info.splits[split].filepaths]


def open_source(path: str, split: str) -> tfds_source.TfdsSource:
  """Opens a split of a data set that tools.prepare_data wrote.

  Raises:
    FileNotFoundError: if there is no data set in `path`, or a file of the
      split is missing.
    ValueError: if the data set has no such split, its description is damaged,
      or it is in a bucket.
  """
  return tfds_source.open_builder(
    _builder(path),
    split,
    path,
    tfds_source.Features(
      caption='caption',
      key='key',
      width='width',
      height='height',
      several_captions=True,
    ),
  )
