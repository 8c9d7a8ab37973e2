"""Captioned images in tars (img2dataset, webdataset) -> an ArrayRecord set.

  python -m mdm_jax.tools.prepare_data --input='…/*.tar' --output=DIR

A record is an image (.jpg, .jpeg, .png or .webp) and its caption (.txt, or
the 'caption' of a .json) under one name. Images are kept as they are, after a
check that they decode. What cannot be used is left out, counted by reason and
listed in DIR/summary.json; it never stops the run. DIR appears when all is
done, and can be read by `mdm_jax.data.sources` and by TFDS.
"""

import collections
from collections.abc import Iterator
import glob
import hashlib
import json
import pathlib
import shutil
import sys
import tarfile
from typing import Any
import zlib

from absl import app, flags
import numpy as np

from mdm_jax.data.transforms import BadRecord, load_image

_IMAGE_SUFFIXES = ('jpg', 'jpeg', 'png', 'webp')
_CAPTION_SUFFIXES = ('txt', 'json')
# What a damaged tar, compressed or not, raises.
_DAMAGED_TAR = (tarfile.TarError, OSError, EOFError, zlib.error)
_RECORDS_PER_SHARD = 10_000
# The metadata is rewritten with every write, which takes milliseconds.
_RECORDS_PER_WRITE = 64


class PrepareError(ValueError):
  """The arguments or the inputs leave nothing to do."""


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> bytes:
  try:
    return tar.extractfile(member).read()
  except _DAMAGED_TAR as error:
    raise BadRecord(key, 'damaged tar member', str(error)) from error


def _caption(files: dict[str, bytes], key: str, max_length: int) -> str:
  try:
    if 'txt' in files:
      caption = files['txt'].decode()
    else:
      caption = str(json.loads(files['json'])['caption'] or '')
  except (ValueError, KeyError, TypeError) as error:
    raise BadRecord(
        key, 'unreadable caption', f'{type(error).__name__}: {error}'
    ) from error
  caption = ' '.join(caption.split())
  if not caption:
    raise BadRecord(key, 'empty caption')
  if len(caption) > max_length:
    raise BadRecord(key, 'caption too long', f'{len(caption)} characters')
  return caption


def _record(
    tar: tarfile.TarFile,
    members: dict[str, tarfile.TarInfo],
    key: str,
    max_caption_length: int,
) -> dict[str, Any]:
  """Reads and checks the members of one record; BadRecord says what fails."""
  images = [s for s in _IMAGE_SUFFIXES if s in members]
  captions = [s for s in _CAPTION_SUFFIXES if s in members]
  if not images:
    raise BadRecord(key, 'caption without image')
  if not captions:
    raise BadRecord(key, 'image without caption')
  files = {s: _read(tar, members[s], key) for s in captions}
  caption = _caption(files, key, max_caption_length)
  image = _read(tar, members[images[0]], key)
  _, (width, height) = load_image(image, shorter_side=1, key=key)
  return {
      'image': image,
      'caption': caption,
      'key': key,
      'width': width,
      'height': height,
  }


def read_tar(
    path: str, max_caption_length: int, rejects: list[BadRecord]
) -> Iterator[dict[str, Any]]:
  """Yields the good records of a tar and adds the others to `rejects`.

  A record is named after the tar and the member: `00000/000000007`.
  """
  groups = collections.defaultdict(dict)
  try:
    with tarfile.open(path) as tar:
      try:
        for member in tar:
          name, _, suffix = member.name.removeprefix('./').rpartition('.')
          if member.isfile() and suffix.lower() in (
              _IMAGE_SUFFIXES + _CAPTION_SUFFIXES
          ):
            groups[name][suffix.lower()] = member
      except _DAMAGED_TAR as error:
        # The members before the damage are still good.
        rejects.append(BadRecord(path, 'damaged tar', str(error)))
      for name, members in groups.items():
        key = f'{pathlib.Path(path).stem}/{name}'
        try:
          yield _record(tar, members, key, max_caption_length)
        except BadRecord as bad:
          rejects.append(bad)
  except _DAMAGED_TAR as error:
    rejects.append(BadRecord(path, 'unreadable tar', str(error)))


def split_of(key: str, validation_fraction: float) -> str:
  """Returns the split of a record, by a hash of its key alone."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  is_validation = int.from_bytes(digest) < validation_fraction * 2**64
  return 'validation' if is_validation else 'train'


def _writer(directory: pathlib.Path):
  import tensorflow_datasets as tfds

  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name='captioned_images',
          version=tfds.core.Version('1.0.0'),
          data_dir=str(directory),
          module_name='',
      ),
      description='Images with captions.',
      features=tfds.features.FeaturesDict({
          'image': tfds.features.Image(),
          'caption': tfds.features.Text(),
          'key': tfds.features.Text(),
          'width': tfds.features.Scalar(np.int64),
          'height': tfds.features.Scalar(np.int64),
      }),
  )
  # This writes ArrayRecords of one record a group, so that reading a record
  # at random decompresses nothing else.
  return tfds.core.SequentialWriter(
      info, max_examples_per_shard=_RECORDS_PER_SHARD,
      file_format='array_record',
  )


def _write(writer, split: str, records: list[dict[str, Any]]) -> None:
  writer.initialize_splits([split], fail_if_exists=False)
  writer.add_examples({split: records})


def prepare(
    pattern: str,
    output: str,
    validation_fraction: float = 0.01,
    max_caption_length: int = 512,
) -> dict[str, Any]:
  """Writes the data set and returns the summary.

  Args:
    pattern: a glob of tars.
    output: the directory to make.
    validation_fraction: of the records, chosen by key, go to a validation
      split. The first record always trains, and a small set may end up
      without a validation split.
    max_caption_length: in characters; longer captions are left out.

  Raises:
    PrepareError: no tar, no usable record, or `output` exists.
  """
  paths = sorted(glob.glob(pattern))
  if not paths:
    raise PrepareError(f'--input={pattern} matches no file.')
  target = pathlib.Path(output)
  if target.exists():
    raise PrepareError(
        f'--output={output} exists: remove it or choose another directory.'
    )
  if not 0 <= validation_fraction < 1:
    raise PrepareError(
        f'--validation_fraction={validation_fraction} is not in [0, 1).'
    )
  partial = target.with_name(f'{target.name}.incomplete')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)

  rejects = []
  counts = collections.Counter()
  pending = collections.defaultdict(list)
  writer = _writer(partial)
  for path in paths:
    for record in read_tar(path, max_caption_length, rejects):
      split = split_of(record['key'], validation_fraction)
      if not counts:
        split = 'train'
      counts[split] += 1
      pending[split].append(record)
      if len(pending[split]) == _RECORDS_PER_WRITE:
        _write(writer, split, pending.pop(split))
  for split, records in pending.items():
    _write(writer, split, records)

  summary = {
      'tars': len(paths),
      'records': dict(counts),
      'rejected': dict(collections.Counter(bad.reason for bad in rejects)),
      'rejects': [
          {'key': bad.key, 'reason': bad.reason, 'detail': bad.detail}
          for bad in rejects
      ],
  }
  if not counts:
    shutil.rmtree(partial)
    raise PrepareError(
        f'--input={pattern} has no usable record: {summary["rejected"]}.'
    )
  writer.close_all()
  (partial / 'summary.json').write_text(json.dumps(summary, indent=2))
  partial.rename(target)
  return summary


def _print_summary(summary: dict[str, Any], output: str) -> None:
  print(f'{summary["tars"]} tars -> {output}')
  for split, count in summary['records'].items():
    print(f'  {split}: {count}')
  for reason, count in summary['rejected'].items():
    example = next(r for r in summary['rejects'] if r['reason'] == reason)
    print(f'  left out, {reason}: {count}, such as {example["key"]}')


def main(_) -> None:
  """Runs `prepare` on the flags and prints the summary."""
  values = flags.FLAGS
  try:
    summary = prepare(
        values.input,
        values.output,
        validation_fraction=values.validation_fraction,
        max_caption_length=values.max_caption_length,
    )
  except PrepareError as error:
    sys.exit(f'prepare_data: {error}')
  _print_summary(summary, values.output)


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flags.DEFINE_string('input', None, 'A glob of tars.', required=True)
  flags.DEFINE_string('output', None, 'The directory to make.', required=True)
  flags.DEFINE_float(
      'validation_fraction', 0.01, 'Of the records, held out of training.'
  )
  flags.DEFINE_integer('max_caption_length', 512, 'In characters.')
  app.run(main)
