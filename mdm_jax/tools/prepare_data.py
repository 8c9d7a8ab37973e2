"""Captioned images in tars (img2dataset, webdataset) -> an ArrayRecord set.

  python -m mdm_jax.tools.prepare_data --input='…/*.tar' --output=DIR

Images are kept as they are, after a check that they decode, unless
--reduce_to makes large ones smaller. What cannot be used is left out, counted
by reason in DIR/summary.json and listed in DIR/rejects.jsonl; it never stops
the run. Killed and started again, it goes on with the tars that are not done.
Several machines that see one file system share the work by --part=0/4,
--part=1/4, …; the command without --part then finishes. DIR appears when
everything is written, for `mdm_jax.data.sources` and for TFDS.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
from typing import Any

from absl import app, flags
from array_record.python import array_record_module
import numpy as np
from PIL import Image
import tqdm

from mdm_jax.data import tars
from mdm_jax.data.transforms import BadRecord, load_image

SPLITS = ('train', 'validation')
# Whole tars share a file up to this many records.
_RECORDS_PER_SHARD = 10_000
_JPEG_QUALITY = 95
_DIGEST = np.dtype('V16')


@dataclasses.dataclass(frozen=True)
class Options:
  """What is kept, and how.

  Attributes:
    name: of the data set, for TFDS.
    validation_fraction: of the records, chosen by a hash of the key, go to a
      validation split. A set without training records has no such split.
    max_caption_length: in characters; longer captions are left out.
    min_side: pixels that the shorter side must have.
    max_aspect: of the longer to the shorter side; 0 is any.
    deduplicate: an image file is used once, whatever its caption.
    reduce_to: pixels of the shorter side that larger images are reduced to,
      as JPEG; 0 keeps every file as it is.
  """

  name: str = 'captioned_images'
  validation_fraction: float = 0.01
  max_caption_length: int = 512
  min_side: int = 1
  max_aspect: float = 0.0
  deduplicate: bool = False
  reduce_to: int = 0

  def check(self) -> None:
    """Raises ValueError for what cannot be."""
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(
        f'--validation_fraction={self.validation_fraction} is not in [0, 1).'
      )
    if self.max_aspect and self.max_aspect < 1:
      raise ValueError(
        f'--max_aspect={self.max_aspect}: the longer side over the shorter '
        'is 1 or more; 0 keeps any.'
      )
    if not re.fullmatch(r'[a-z][a-z0-9_]*', self.name):
      raise ValueError(
        f'--name={self.name}: use lower-case letters, digits and _.'
      )


def make_record(
  key: str, image: bytes, caption: str, options: Options
) -> dict[str, Any]:
  """What is stored of a captioned image.

  Raises:
    BadRecord: it cannot be used, or is not wanted.
  """
  if len(caption) > options.max_caption_length:
    raise BadRecord(key, 'caption too long', f'{len(caption)} characters')
  pixels, (width, height) = load_image(image, options.reduce_to or 1, key)
  side = min(width, height)
  if side < options.min_side:
    raise BadRecord(key, 'image too small', f'{width} x {height}')
  if options.max_aspect and max(width, height) > options.max_aspect * side:
    raise BadRecord(key, 'image too elongated', f'{width} x {height}')
  if 0 < options.reduce_to < side:
    scale = options.reduce_to / side
    buffer = io.BytesIO()
    pixels.resize(
      (round(width * scale), round(height * scale)),
      Image.Resampling.LANCZOS,
      reducing_gap=2.0,
    ).save(buffer, 'JPEG', quality=_JPEG_QUALITY)
    image = buffer.getvalue()
  # The size is that before any reduction: the scale that training is told.
  return {
    'image': image,
    'caption': caption,
    'key': key,
    'width': width,
    'height': height,
  }


def prepare(
  patterns: str | Sequence[str],
  output: str,
  options: Options = Options(),
  num_workers: int = 1,
  part: str = '0/1',
) -> dict[str, Any] | None:
  """Writes the data set.

  Args:
    patterns: globs of tars, local or in buckets that fsspec knows.
    output: the directory to make.
    options: what is kept.
    num_workers: processes.
    part: 'k/n': this machine reads every nth tar, from the kth.

  Returns:
    The summary; None for a part, which finishes nothing.

  Raises:
    ValueError: no tar, no usable record, `output` exists, or what is there was
      begun with other options.
    OSError: nothing more can be written. What is done is kept.
  """
  options.check()
  index, count = _parse_part(part)
  paths = tars.find([patterns] if isinstance(patterns, str) else patterns)
  target = pathlib.Path(output)
  if target.exists():
    raise ValueError(
      f'--output={output} exists: remove it or choose another directory.'
    )
  partial = target.with_name(f'{target.name}.incomplete')
  _begin(partial, paths, options)
  reports = [partial / f'{i:06d}.json' for i in range(len(paths))]
  _run_all(
    functools.partial(_convert, options),
    [
      (path, report)
      for path, report in list(zip(paths, reports))[index::count]
      if not report.exists()
    ],
    num_workers,
    'tar',
  )
  if count > 1:
    return None
  summary = _finish(partial / 'set', reports, options, num_workers)
  (partial / 'set').rename(target)
  shutil.rmtree(partial)
  return summary


def _parse_part(part: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d+)/(\d+)', part)
  index, count = map(int, match.groups()) if match else (0, 0)
  if index >= count:
    raise ValueError(f'--part={part}: give k/n with k in 0..n-1.')
  return index, count


def _begin(
  partial: pathlib.Path, paths: Sequence[str], options: Options
) -> None:
  partial.mkdir(parents=True, exist_ok=True)
  begun = partial / 'options.json'
  settings = {'tars': paths, **dataclasses.asdict(options)}
  if begun.exists():
    found = json.loads(begun.read_text())
    different = [key for key in settings if found.get(key) != settings[key]]
    if different:
      raise ValueError(
        f'{partial} was begun with other {", ".join(different)}: remove it, '
        'or give the same again.'
      )
  _write_file(begun, json.dumps(settings))


def _run_all(
  function: Callable, jobs: Sequence[Any], num_workers: int, unit: str
) -> None:
  """Calls the function on every job, in processes if there are several."""
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(
      tqdm.tqdm(total=len(jobs), unit=unit, smoothing=0, disable=not jobs)
    )
    if min(num_workers, len(jobs)) < 2:
      for job in jobs:
        function(job)
        bar.update()
      return
    pool = stack.enter_context(
      concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context('spawn')
      )
    )
    # After an error nothing new is begun.
    stack.callback(pool.shutdown, cancel_futures=True)
    for future in concurrent.futures.as_completed(
      [pool.submit(function, job) for job in jobs]
    ):
      future.result()
      bar.update()


def _records(report: pathlib.Path, split: str) -> pathlib.Path:
  return report.with_name(f'{report.stem}-{split}.array_record')


def _digests(report: pathlib.Path, split: str) -> pathlib.Path:
  return report.with_name(f'{report.stem}-{split}.digests')


def _convert(options: Options, job: tuple[str, pathlib.Path]) -> None:
  """Writes one tar's records, and then the report that it is done."""
  path, report = job
  features = _features()
  rejects, digests = [], {split: [] for split in SPLITS}
  with contextlib.ExitStack() as stack:
    writers = {
      split: stack.enter_context(_writer(_records(report, split)))
      for split in SPLITS
    }
    for key, image, caption in tars.read_records(path, rejects):
      try:
        record = make_record(key, image, caption, options)
      except BadRecord as bad:
        rejects.append(bad)
        continue
      split = tars.split_of(key, options.validation_fraction)
      writers[split].write(
        features.serialize_example(features.encode_example(record))
      )
      digests[split].append(
        hashlib.blake2b(image, digest_size=_DIGEST.itemsize).digest()
      )
  for split in SPLITS:
    _digests(report, split).write_bytes(b''.join(digests[split]))
  _write_file(
    report,
    json.dumps(
      {
        'counts': {split: len(digests[split]) for split in SPLITS},
        'rejects': [[bad.key, bad.reason, bad.detail] for bad in rejects],
      }
    ),
  )


def _finish(
  directory: pathlib.Path,
  reports: Sequence[pathlib.Path],
  options: Options,
  num_workers: int,
) -> dict[str, Any]:
  """Makes the data set of the parts, and returns the summary."""
  import tensorflow_datasets as tfds

  directory.mkdir(exist_ok=True)
  rejected = collections.Counter()
  parts = []  # (file, which of its records to keep)
  with (directory / 'rejects.jsonl').open('w') as lines:
    for report in reports:
      found = json.loads(report.read_text())
      parts += [
        (split, _records(report, split), np.ones(count, bool))
        for split, count in found['counts'].items()
        if count
      ]
      for key, reason, detail in found['rejects']:
        rejected[reason] += 1
        lines.write(
          json.dumps({'key': key, 'reason': reason, 'detail': detail}) + '\n'
        )
  if not parts:
    shutil.rmtree(directory.parent)
    raise ValueError(f'There is no usable record: {dict(rejected)}.')
  if options.deduplicate:
    digests = np.concatenate(
      [
        np.fromfile(file.with_suffix('.digests'), _DIGEST)
        for _, file, _ in parts
      ]
    )
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    ends = np.cumsum([len(keep) for _, _, keep in parts])
    parts = [
      (split, file, keep)
      for (split, file, _), keep in zip(parts, np.split(first, ends[:-1]))
    ]
    if duplicates := int((~first).sum()):
      rejected['image used before'] = duplicates

  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=options.name,
      version=tfds.core.Version('1.0.0'),
      data_dir=str(directory),
      module_name='',
    ),
    description='Images with captions.',
    features=_features(),
  )
  info.set_file_format('array_record')
  splits, counts = [], {}
  for split, shards in _shards(parts).items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=directory,
      dataset_name=options.name,
      split=split,
      filetype_suffix='array_record',
    )
    files = list(map(pathlib.Path, template.sharded_filepaths(len(shards))))
    _run_all(_assemble, list(zip(files, shards)), num_workers, f'{split} file')
    lengths = [sum(int(keep.sum()) for _, keep in shard) for shard in shards]
    counts[split] = sum(lengths)
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        filename_template=template,
        num_bytes=sum(file.stat().st_size for file in files),
      )
    )
  info.set_splits(tfds.core.SplitDict(splits))
  info.write_to_directory(directory)
  summary = {
    'tars': len(reports),
    'records': counts,
    'rejected': dict(rejected),
  }
  _write_file(directory / 'summary.json', json.dumps(summary, indent=2))
  return summary


def _shards(
  parts: Sequence[tuple[str, pathlib.Path, np.ndarray]],
) -> dict[str, list[list[tuple[pathlib.Path, np.ndarray]]]]:
  """Which parts are to share a file, by split."""
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
  job: tuple[pathlib.Path, Sequence[tuple[pathlib.Path, np.ndarray]]],
) -> None:
  target, parts = job
  if target.exists():
    return  # Of a run that was killed since.
  if len(parts) == 1 and parts[0][1].all():
    parts[0][0].rename(target)
    return
  with _writer(target) as writer:
    for file, keep in parts:
      reader = array_record_module.ArrayRecordReader(str(file))
      for index in np.flatnonzero(keep):
        writer.write(reader.read([int(index)])[0])
      reader.close()


def _features():
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
def _writer(path: pathlib.Path) -> Iterator[Any]:
  """Of a file that is there when it is whole."""
  temporary = path.with_name(f'{path.name}.tmp')
  # Records that are groups of their own can be read at random.
  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
  try:
    yield writer
  finally:
    writer.close()
  temporary.replace(path)


def _write_file(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(text)
  temporary.replace(path)


def main(_) -> None:
  """Runs `prepare` on the flags and prints the summary."""
  values = flags.FLAGS
  options = Options(
    **{
      field.name: values[field.name].value
      for field in dataclasses.fields(Options)
    }
  )
  try:
    summary = prepare(
      values.input, values.output, options, values.num_workers, values.part
    )
  except ValueError as error:
    sys.exit(f'prepare_data: {error}')
  except (OSError, RuntimeError) as error:
    sys.exit(
      f'prepare_data: {error}. Finished tars are kept: the same command '
      'goes on.'
    )
  if summary is None:
    print('This part is done. After the last one, start it without --part.')
    return
  print(f'{summary["tars"]} tars -> {values.output}')
  for split, count in summary['records'].items():
    print(f'  {split}: {count}')
  for reason, count in summary['rejected'].items():
    print(f'  left out, {reason}: {count}')


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flags.DEFINE_multi_string(
    'input', None, 'A glob of tars; may be repeated.', required=True
  )
  flags.DEFINE_string('output', None, 'The directory to make.', required=True)
  flags.DEFINE_string('name', Options.name, "The data set's, for TFDS.")
  flags.DEFINE_float(
    'validation_fraction',
    Options.validation_fraction,
    'Of the records, held out of training.',
  )
  flags.DEFINE_integer(
    'max_caption_length', Options.max_caption_length, 'In characters.'
  )
  flags.DEFINE_integer(
    'min_side', Options.min_side, 'Pixels that the shorter side must have.'
  )
  flags.DEFINE_float(
    'max_aspect',
    Options.max_aspect,
    'Of the longer to the shorter side; 0 is any.',
  )
  flags.DEFINE_boolean(
    'deduplicate', Options.deduplicate, 'Use an image file once.'
  )
  flags.DEFINE_integer(
    'reduce_to',
    Options.reduce_to,
    'Pixels of the shorter side, to save disk; 0: as it is.',
  )
  flags.DEFINE_integer('num_workers', os.cpu_count() or 1, 'Processes.')
  flags.DEFINE_string('part', '0/1', 'This machine of how many.')
  app.run(main)
