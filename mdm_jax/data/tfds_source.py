"""Data sets that TensorFlow Datasets has written as ArrayRecords.

They are read without TensorFlow: TFDS's own NumPy code parses the records, and
images stay encoded.
"""

import dataclasses
import functools
import hashlib
import operator
from typing import Any

from google.protobuf import json_format
import numpy as np

from mdm_jax.data import captions, tar_members
from mdm_jax.data.images import BadRecord
from mdm_jax.runtime import files

_INTEGER = int, np.integer


@dataclasses.dataclass(frozen=True)
class Features:
  """Names of the features of a TFDS record; None for one that is not read.

  The name of a feature inside dicts, or sequences of dicts, is a path such as
  'captions/text'.
  """

  image: str = 'image'
  caption: str | None = None  # a text, or a sequence of them
  label: str | None = None  # a ClassLabel
  key: str | None = None  # a text
  # Size of the original image in pixels, if the stored image is reduced.
  width: str | None = None
  height: str | None = None
  # Whether the caption may be several, by `captions.join`.
  several_captions: bool = False

  def used(self) -> dict[str, str]:
    """The features that are read: 'image', 'caption', … -> its name."""
    return {
      kind: name
      for kind, name in dataclasses.asdict(self).items()
      if isinstance(name, str)
    }


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """One split of a TFDS data set of ArrayRecords; opened at the first read.

  Attributes:
    path: directory of the data set, with `dataset_info.json`.
    split: a split, or a slice in TFDS's notation, such as 'train[1%:]'.
    name: of the data set, used in keys and messages.
    features: names of the features to read.
  """

  path: str
  split: str
  name: str
  features: Features

  @functools.cached_property
  def _builder(self):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(self.path)

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds

    return self._builder.as_data_source(
      self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )

  @functools.cached_property
  def _leaves(self) -> dict[str, tuple[tuple[str, ...], Any]]:
    """'image', 'caption', … -> the path of keys to a feature, and it."""
    leaves = leaf_features(self._builder.info.features)
    return {kind: leaves[name] for kind, name in self.features.used().items()}

  @functools.cached_property
  def _parse(self):
    import tensorflow_datasets as tfds

    # Only the needed features: others may be slow, or need TensorFlow.
    every = self._builder.info.features
    some = tfds.features.FeaturesDict(
      {keys[0]: every[keys[0]] for keys, _ in self._leaves.values()}
    )
    decoders = tfds.decode.SkipDecoding()
    for name in reversed(self._leaves['image'][0]):
      decoders = {name: decoders}
    return functools.partial(some.deserialize_example_np, decoders=decoders)

  @functools.cached_property
  def num_classes(self) -> int:
    """The number of classes of the label; 0 if no label is read."""
    return self._leaves['label'][1].num_classes if self.features.label else 0

  def fingerprint(self) -> str:
    """A hash of the names and sizes of the files."""
    paths = self._builder.info.splits[self.split].filepaths
    listing = '\n'.join(
      f'{path.name} {files.require_file(path)[0]}' for path in paths
    )
    return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()

  def __reduce__(self):
    """Pickles the arguments, so that each worker process opens the files."""
    return type(self), (self.path, self.split, self.name, self.features)

  def __len__(self) -> int:
    """The number of records."""
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads a record.

    Returns:
      `image` (an image file as bytes) and `key`, and those of the following
      that `features` names: `label` (int); `captions` (list) and `caption`
      (the first of them); `size` (shorter side of the original image in
      pixels).

    Raises:
      BadRecord: if the checksum of the record does not match, its contents are
        not those features, or the record has no caption or label.
    """
    key = f'{self.name}[{self.split}][{index}]'
    records, parse, leaves = self._records, self._parse, self._leaves
    try:
      record = parse(records[index])
      parts = {
        kind: functools.reduce(operator.getitem, keys, record)
        for kind, (keys, _) in leaves.items()
      }
    # Parsers raise errors of any type for bytes that are something else.
    except Exception as error:
      detail = f'{type(error).__name__}: {error}'.split('\n')[0]
      raise BadRecord(key, 'damaged record', detail) from error
    return self._check(parts, key)

  def _check(self, parts: dict[str, Any], key: str) -> dict[str, Any]:
    """The record of features that may have any type."""
    if not isinstance(parts['image'], bytes):
      raise BadRecord(key, 'damaged record', 'its image is not a file')
    if 'key' in parts:
      if not isinstance(parts['key'], bytes) or not parts['key']:
        raise BadRecord(key, 'damaged record', 'its key is not a text')
      key = tar_members.readable(parts['key'])
    parts['key'] = key
    if 'caption' in parts:
      texts = parts['caption']
      if self.features.several_captions:
        texts = captions.split(texts)
      parts['captions'] = captions.read(texts, key)
      parts['caption'] = parts['captions'][0]
    if 'width' in parts:
      size = parts.pop('width'), parts.pop('height')
      if not all(isinstance(side, _INTEGER) and side > 0 for side in size):
        raise BadRecord(key, 'damaged record', 'its size is not a number')
      parts['size'] = int(min(size))
    if 'label' in parts:
      label = parts['label']
      # TFDS writes -1 where a test set keeps its labels secret.
      if not isinstance(label, _INTEGER) or not 0 <= label < self.num_classes:
        raise BadRecord(key, 'no label')
    return parts


def leaf_features(feature) -> dict[str, tuple[tuple[str, ...], Any]]:
  """Flattens dicts of features, and sequences of dicts.

  Returns:
    Name, such as 'captions/text' -> the path of keys to the feature, and the
    feature. A single key may contain a slash, as COCO's 'image/filename'.
  """
  import tensorflow_datasets as tfds

  def walk(feature, keys):
    is_sequence = isinstance(feature, tfds.features.Sequence)
    inner = feature.feature if is_sequence else feature
    if not isinstance(inner, tfds.features.FeaturesDict):
      yield keys, feature
      return
    for key, child in inner.items():
      for path, leaf in walk(child, (*keys, key)):
        yield path, tfds.features.Sequence(leaf) if is_sequence else leaf

  return {'/'.join(keys): (keys, leaf) for keys, leaf in walk(feature, ())}


def _is_text(feature) -> bool:
  is_text = np.dtype(feature.np_dtype) == np.dtype(object)
  return is_text and len(feature.shape) < 2


def _is_number(feature) -> bool:
  return np.issubdtype(feature.np_dtype, np.integer) and not feature.shape


def open_builder(
  builder, split: str, name: str, features: Features
) -> TfdsSource:
  """Opens a split of a data set.

  Args:
    builder: TFDS builder of the data set.
    split: a split, or a slice of one: 'train[1%:]'.
    name: of the data set, used in keys and messages.
    features: names of the features to read.

  Raises:
    FileNotFoundError: if a file of the data set is missing.
    ValueError: as `open_by_name`.
  """
  import tensorflow_datasets as tfds

  info = builder.info
  if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
    raise ValueError(
      f'{builder.data_dir} is in {info.file_format.value} format, which '
      'cannot be read at random: build it in another data_dir with tfds '
      f'build {name} --file_format=array_record --data_dir=DIR'
    )
  try:
    files = info.splits[split].filepaths
  except ValueError as error:
    raise ValueError(
      f'{name} has no split {split!r}, only: {", ".join(info.splits)}.'
    ) from error
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(f'{file} is missing: prepare {name} again.')
  leaves = leaf_features(info.features)
  for kind, wanted in features.used().items():
    is_kind = {
      'image': lambda feature: isinstance(feature, tfds.features.Image),
      'label': lambda feature: isinstance(feature, tfds.features.ClassLabel),
      'width': _is_number,
      'height': _is_number,
    }.get(kind, _is_text)
    if wanted not in leaves or not is_kind(leaves[wanted][1]):
      there = ', '.join(
        f'{path} ({type(feature).__name__})'
        for path, (_, feature) in sorted(leaves.items())
      )
      raise ValueError(
        f'data.{kind}={wanted!r}: {name} has no such {kind}, only: {there}.'
      )
  return TfdsSource(str(builder.data_dir), split, name, features)


def require_local(path: str) -> None:
  """Raises ValueError for a path in a bucket: ArrayRecords need a disk."""
  if not files.is_local(path):
    raise ValueError(
      f'data.path={path!r}: ArrayRecord files cannot be read in a bucket. '
      'Mount it with gcsfuse, as launch/ does, and give the path on this '
      "machine; or give tars, which are read where they are: data.name='tars'."
    )


def open_by_name(
  name: str, data_dir: str, split: str, features: Features
) -> TfdsSource:
  """Opens a split of a data set that TFDS has built.

  Args:
    name: in TFDS's notation: 'coco_captions', 'name/config:1.0.0'.
    data_dir: TFDS's data_dir; empty for its default.
    split: a split, or a slice of one: 'train[1%:]'.
    features: names of the features to read.

  Raises:
    FileNotFoundError: if there is no such data set, or one of its files is
      missing.
    ValueError: if it is in a bucket or not in ArrayRecord format, or has no
      such split or feature.
  """
  require_local(data_dir)
  import tensorflow_datasets as tfds

  try:
    # From the files: many data sets' own TFDS code needs TensorFlow.
    builder = tfds.core.read_only_builder.builder_from_files(
      name, data_dir=data_dir or None
    )
  except (ValueError, json_format.ParseError) as error:
    where = f' --data_dir={data_dir}' if data_dir else ''
    raise FileNotFoundError(
      f'TFDS has no data set {name!r} in {data_dir or "its data_dir"}: give '
      f'NAME/CONFIG if it has several configs, or run tfds build '
      f'{name} --file_format=array_record{where}'
    ) from error
  return open_builder(builder, split, name, features)
