"""Writes prepared records as a data set of TFDS, in ArrayRecord files.

Records come in parts, each a file of records with a file of their images'
hashes beside it. Small parts are joined.
"""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import os
from typing import Any

from array_record.python import array_record_module
from etils import epath
import numpy as np

from mdm_jax.runtime import buckets, files
from mdm_jax.tools.worker_pool import run_all

SPLITS = ('train', 'validation')
# Records of whole parts are joined into files of up to this many records.
_RECORDS_PER_SHARD = 10_000
_DIGEST = np.dtype('V16')  # hash of an image file

# A split, a file of records, and bool [records]: which records to use.
Part = tuple[str, epath.Path, np.ndarray]


def digest(image: bytes) -> bytes:
  """The hash of an image file."""
  return hashlib.blake2b(image, digest_size=_DIGEST.itemsize).digest()


def digests_file(records: epath.Path) -> epath.Path:
  """Where the hashes of the images of a file of records are."""
  return records.with_suffix('.digests')


def deduplicate(parts: Sequence[Part]) -> tuple[list[Part], int]:
  """Keeps the first record of each image; also returns how many it dropped."""
  digests = np.concatenate(
    [
      np.frombuffer(digests_file(file).read_bytes(), _DIGEST)
      for _, file, _ in parts
    ]
  )
  first = np.zeros(len(digests), bool)
  first[np.unique(digests, return_index=True)[1]] = True
  ends = np.cumsum([len(keep) for _, _, keep in parts])
  unique = [
    (split, file, keep)
    for (split, file, _), keep in zip(parts, np.split(first, ends[:-1]))
  ]
  return unique, int((~first).sum())


def write_splits(
  directory: epath.Path,
  parts: Sequence[Part],
  name: str,
  num_workers: int,
) -> tuple[dict[str, int], Any]:
  """Writes the splits.

  Args:
    directory: of the data set.
    parts: of the data set; if none is for training, all are used for it.
    name: of the data set.
    num_workers: worker processes.

  Returns:
    Split -> number of records; and TFDS's description of the data set, whose
      `write_to_directory` completes it.
  """
  import tensorflow_datasets as tfds

  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=name,
      version=tfds.core.Version('1.0.0'),
      data_dir=str(directory),
      module_name='',
    ),
    description='Images with captions.',
    features=make_features(),
  )
  info.set_file_format('array_record')
  splits, counts = [], {}
  for split, shards in _shards(parts).items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=directory,
      dataset_name=name,
      split=split,
      filetype_suffix='array_record',
    )
    targets = list(map(epath.Path, template.sharded_filepaths(len(shards))))
    run_all(
      _assemble, list(zip(targets, shards)), num_workers, f' {split} file'
    )
    lengths = [sum(int(keep.sum()) for _, keep in shard) for shard in shards]
    counts[split] = sum(lengths)
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        filename_template=template,
        num_bytes=sum(files.require_file(file)[0] for file in targets),
      )
    )
  info.set_splits(tfds.core.SplitDict(splits))
  return counts, info


def _shards(
  parts: Sequence[Part],
) -> dict[str, list[list[tuple[epath.Path, np.ndarray]]]]:
  """Groups the parts of each split into the files of the data set."""
  parts = [part for part in parts if part[2].any()]
  has_train = any(split == 'train' for split, _, _ in parts)
  shards, sizes = collections.defaultdict(list), collections.Counter()
  for split, file, keep in parts:
    split = split if has_train else 'train'
    size = int(keep.sum())
    if not sizes[split] or sizes[split] + size > _RECORDS_PER_SHARD:
      shards[split].append([])
      sizes[split] = 0
    shards[split][-1].append((file, keep))
    sizes[split] += size
  return {split: shards[split] for split in SPLITS if split in shards}


def _assemble(
  job: tuple[epath.Path, Sequence[tuple[epath.Path, np.ndarray]]],
) -> None:
  """Writes one file of the data set from its parts."""
  target, parts = job
  if target.exists():
    return  # Written before the run was interrupted.
  if len(parts) == 1 and parts[0][1].all():
    if files.is_local(target):
      parts[0][0].rename(target)
    else:  # The bucket copies it itself.
      source = os.fspath(parts[0][0])
      buckets.file_system(source).mv(source, os.fspath(target))
    return
  with open_writer(target) as writer:
    for file, keep in parts:
      with files.local_copy(file) as local:
        reader = array_record_module.ArrayRecordReader(str(local))
        for index in np.flatnonzero(keep):
          writer.write(reader.read([int(index)])[0])
        reader.close()


def make_features():
  """The features of a record, in TFDS."""
  import tensorflow_datasets as tfds

  return tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(),
      'caption': tfds.features.Text(),
      'key': tfds.features.Text(),
      'width': tfds.features.Scalar(np.int64),
      'height': tfds.features.Scalar(np.int64),
    }
  )


@contextlib.contextmanager
def open_writer(path: epath.Path) -> Iterator[Any]:
  """Writes an ArrayRecord file, which appears when it is complete."""
  with files.replacing(path) as temporary:
    # Groups of one record, for random access.
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), 'group_size:1'
    )
    try:
      yield writer
    finally:
      writer.close()
