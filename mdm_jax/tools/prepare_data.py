"""Converts captioned images in tars (img2dataset, webdataset) to ArrayRecords.

  python -m mdm_jax.tools.prepare_data --input='…/*.tar' --output=DIR

Every image is decoded as a check, and stored unchanged unless --reduce_to
makes it smaller. Unusable records are skipped, listed in DIR/rejects.jsonl and
counted by reason in DIR/summary.json; they never stop the run. If the command
is killed, the same command continues with the tars that are not finished.
Several machines with a shared file system divide the work by --part=0/4,
--part=1/4, …; afterwards the command without --part completes the data set.
DIR appears when everything is written, and can be read by
`mdm_jax.data.sources` and by TFDS.
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

from absl import flags, logging
from array_record.python import array_record_module
import numpy as np
from PIL import Image
import tqdm

from mdm_jax import child_process
from mdm_jax.data import captions, tars
from mdm_jax.data.images import MAX_PIXELS, BadRecord, load_image
from mdm_jax.runtime import (
  command,
  directory_lock,
  files,
  flag_types,
  value_types,
)

SPLITS = ('train', 'validation')
# Records of whole tars are joined into files of up to this many records.
_RECORDS_PER_SHARD = 10_000
_JPEG_QUALITY = 95
_MAX_JPEG_SIDE = 65_500  # pixels
# Seconds from SIGTERM to the end of a worker: time enough for this process, if
# it gets the same signal, to end as it should, and for an executor that ends
# its workers so.
_PATIENCE = 5.0
_DIGEST = np.dtype('V16')  # hash of an image file

# A split, a file of records, and bool [records]: which records to use.
Part = tuple[str, pathlib.Path, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
  """Which records are used, and how they are stored.

  Attributes:
    name: name of the data set in TFDS.
    validation_fraction: fraction of the records for the validation split,
      chosen by a hash of the key. If no record is left for training, all
      records are in the training split.
    max_caption_length: in characters; records with longer captions are
      skipped.
    min_side: smallest length of the shorter side in pixels.
    max_aspect: largest ratio of the longer to the shorter side; 0: any.
    deduplicate: whether each image file is used only once, even if its
      captions differ.
    reduce_to: length in pixels of the shorter side that larger images are
      reduced to, as JPEG; 0 stores every file unchanged.
    max_pixels: of an image, see `images.load_image`.
  """

  name: str = 'captioned_images'
  validation_fraction: float = 0.01
  max_caption_length: int = 512
  min_side: int = 1
  max_aspect: float = 0.0
  deduplicate: bool = False
  reduce_to: int = 0
  max_pixels: int = MAX_PIXELS

  def check(self) -> None:
    """Raises ValueError for an invalid option."""
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(
        f'--validation_fraction={self.validation_fraction} is not in [0, 1).'
      )
    if self.max_aspect and self.max_aspect < 1:
      raise ValueError(
        f'--max_aspect={self.max_aspect}: the longer side over the shorter '
        'side is 1 or more; 0 allows any.'
      )
    if not re.fullmatch(r'[a-z][a-z0-9_]*', self.name):
      raise ValueError(
        f'--name={self.name}: use lower-case letters, digits and _.'
      )


def make_record(
  key: str, image: bytes, texts: Sequence[str], options: Options
) -> dict[str, Any]:
  """Checks a captioned image and makes the record that is stored.

  Args:
    key: of the record.
    image: an image file.
    texts: captions of the image, see `captions.read`; those that are too long
      are left out.
    options: which records are used, and how they are stored.

  Returns:
    `image` (an image file), `caption` (see `captions.join`), `key`, and
    `width` and `height` in pixels before any reduction.

  Raises:
    BadRecord: the image cannot be decoded, or the options exclude the record.
  """
  fitting = [x for x in texts if len(x) <= options.max_caption_length]
  if not fitting:
    shortest = min(map(len, texts))
    raise BadRecord(key, 'caption too long', f'{shortest} characters')
  pixels, (width, height) = load_image(
    image, options.reduce_to or 1, key, options.max_pixels
  )
  side = min(width, height)
  if side < options.min_side:
    raise BadRecord(key, 'image too small', f'{width} x {height}')
  if options.max_aspect and max(width, height) > options.max_aspect * side:
    raise BadRecord(key, 'image too elongated', f'{width} x {height}')
  if 0 < options.reduce_to < side:
    scale = options.reduce_to / side
    size = round(width * scale), round(height * scale)
    if max(size) <= _MAX_JPEG_SIDE:
      buffer = io.BytesIO()
      pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0).save(
        buffer, 'JPEG', quality=_JPEG_QUALITY
      )
      image = buffer.getvalue()
  # The original size, which the network is conditioned on.
  return {
    'image': image,
    'caption': captions.join(fitting),
    'key': key,
    'width': width,
    'height': height,
  }


def _serialize(
  features, key: str, image: bytes, texts: Sequence[str], options: Options
) -> bytes:
  """Makes the bytes of a record, see `make_record`.

  Raises:
    BadRecord: the record cannot be made, for whatever reason.
  """
  try:
    record = make_record(key, image, texts, options)
    return features.serialize_example(features.encode_example(record))
  except BadRecord:
    raise
  # Whatever an image or a library has in store, it costs one record of
  # millions. Nothing here writes to the disk.
  except Exception as error:
    lines = f'{type(error).__name__}: {error}'.split('\n')
    raise BadRecord(key, 'record cannot be made', lines[0]) from error


def prepare(
  patterns: str | Sequence[str],
  output: str,
  options: Options = Options(),
  num_workers: int = 1,
  part: str = '0/1',
) -> dict[str, Any] | None:
  """Writes the data set.

  Args:
    patterns: globs of tars, local or in buckets that fsspec can read.
    output: directory to write the data set to.
    options: which records are used, and how they are stored.
    num_workers: worker processes.
    part: 'k/n' reads every nth tar from the kth on this machine. Unless n is
      1, the data set is not completed.

  Returns:
    The contents of `summary.json`; None if the data set is not completed.

  Raises:
    ValueError: there is no tar or no usable record, an option is invalid,
      `output` exists, or an unfinished run had other options.
    OSError: a file cannot be written. The same call continues later.
  """
  options.check()
  index, count = value_types.parse_part(part)
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
      if not _is_finished(report)
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


def _begin(
  partial: pathlib.Path, paths: Sequence[str], options: Options
) -> None:
  partial.mkdir(parents=True, exist_ok=True)
  begun = partial / 'options.json'
  settings = {'tars': paths, **dataclasses.asdict(options)}
  if begun.exists():
    try:
      found = files.read_json(begun)
    except files.UnreadableFile as error:
      raise ValueError(f'{error}: remove {partial}.') from None
    # Options may have been added since.
    different = [key for key in found if found[key] != settings.get(key)]
    if different:
      raise ValueError(
        f'{partial} was begun with other {", ".join(different)}: remove it, '
        'or give the same values again.'
      )
  files.write_text(begun, json.dumps(settings))


def _run_all(
  function: Callable, jobs: Sequence[Any], num_workers: int, unit: str
) -> None:
  """Calls a function for every job, in worker processes if there are several.

  Args:
    function: called with one job.
    jobs: the arguments.
    num_workers: worker processes; with one, this process calls the function.
    unit: what a job is, for the progress bar.
  """
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
        num_workers,
        multiprocessing.get_context('spawn'),
        child_process.begin,
        (_PATIENCE,),
      )
    )
    # After an error no further job is started.
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
  """Writes the records of one tar, and then a report that marks it finished.

  Args:
    options: which records are used, and how they are stored.
    job: the tar, and the file of the report.
  """
  path, report = job
  features = _features()
  rejects, digests = [], {split: [] for split in SPLITS}
  with contextlib.ExitStack() as stack:
    writers = {
      split: stack.enter_context(_writer(_records(report, split)))
      for split in SPLITS
    }
    for key, image, texts in tars.read_records(path, rejects):
      try:
        record = _serialize(features, key, image, texts, options)
      except BadRecord as bad:
        rejects.append(bad)
        continue
      split = tars.split_of(key, options.validation_fraction)
      writers[split].write(record)
      digests[split].append(
        hashlib.blake2b(image, digest_size=_DIGEST.itemsize).digest()
      )
  for split in SPLITS:
    _digests(report, split).write_bytes(b''.join(digests[split]))
  files.write_text(
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
  """Makes the data set from the records of all tars.

  Args:
    directory: to write the data set to.
    reports: of all tars.
    options: which records are used, and how they are stored.
    num_workers: worker processes.

  Returns:
    The contents of `summary.json`.

  Raises:
    ValueError: there is no usable record.
  """
  directory.mkdir(exist_ok=True)
  parts, rejected = _read_reports(reports, directory / 'rejects.jsonl')
  if not parts:
    first = (directory / 'rejects.jsonl').read_text().partition('\n')[0]
    shutil.rmtree(directory.parent)
    raise ValueError(
      f'There is no usable record: {dict(rejected)}, such as {first}. An image '
      'and its caption need the same name up to the last dot.'
    )
  if options.deduplicate:
    parts, duplicates = _deduplicate(parts)
    if duplicates:
      rejected['image used before'] = duplicates
  summary = {
    'tars': len(reports),
    'records': _write_splits(directory, parts, options, num_workers),
    'rejected': dict(rejected),
  }
  files.write_text(directory / 'summary.json', json.dumps(summary, indent=2))
  return summary


def _read_reports(
  reports: Sequence[pathlib.Path], rejects: pathlib.Path
) -> tuple[list[Part], collections.Counter]:
  """Reads the reports of all tars and writes the list of rejected records.

  Args:
    reports: of all tars.
    rejects: JSON lines file to write.

  Returns:
    The parts of the data set, and the number of rejected records by reason.
  """
  parts, rejected = [], collections.Counter()
  with rejects.open('w') as lines:
    for report in reports:
      found = files.read_json(report)
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
  return parts, rejected


def _is_finished(report: pathlib.Path) -> bool:
  """Whether a tar has its report; one that cannot be read is made anew."""
  try:
    files.read_json(report, _is_report)
  except files.UnreadableFile as error:
    if report.exists():
      logging.warning('%s: the tar is read again.', error)
    if report.is_dir():
      files.set_aside(report)
    return False
  return True


def _is_report(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and isinstance(value.get('counts'), dict)
    and all(map(files.is_count, value['counts'].values()))
    and isinstance(value.get('rejects'), list)
    and all(
      isinstance(reject, list) and [*map(type, reject)] == [str, str, str]
      for reject in value['rejects']
    )
  )


def _deduplicate(parts: Sequence[Part]) -> tuple[list[Part], int]:
  """Keeps the first record of each image; also returns how many it dropped."""
  digests = np.concatenate(
    [np.fromfile(file.with_suffix('.digests'), _DIGEST) for _, file, _ in parts]
  )
  first = np.zeros(len(digests), bool)
  first[np.unique(digests, return_index=True)[1]] = True
  ends = np.cumsum([len(keep) for _, _, keep in parts])
  unique = [
    (split, file, keep)
    for (split, file, _), keep in zip(parts, np.split(first, ends[:-1]))
  ]
  return unique, int((~first).sum())


def _write_splits(
  directory: pathlib.Path,
  parts: Sequence[Part],
  options: Options,
  num_workers: int,
) -> dict[str, int]:
  """Writes the splits and TFDS's description of the data set.

  Returns:
    Split -> number of records.
  """
  import tensorflow_datasets as tfds

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
    targets = list(map(pathlib.Path, template.sharded_filepaths(len(shards))))
    _run_all(
      _assemble, list(zip(targets, shards)), num_workers, f'{split} file'
    )
    lengths = [sum(int(keep.sum()) for _, keep in shard) for shard in shards]
    counts[split] = sum(lengths)
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        filename_template=template,
        num_bytes=sum(file.stat().st_size for file in targets),
      )
    )
  info.set_splits(tfds.core.SplitDict(splits))
  info.write_to_directory(directory)
  return counts


def _shards(
  parts: Sequence[Part],
) -> dict[str, list[list[tuple[pathlib.Path, np.ndarray]]]]:
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
  job: tuple[pathlib.Path, Sequence[tuple[pathlib.Path, np.ndarray]]],
) -> None:
  """Writes one file of the data set from its parts."""
  target, parts = job
  if target.exists():
    return  # Written before the run was interrupted.
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


def main(_) -> None:
  """Runs `prepare` with the values of the flags and prints the summary."""
  values = flags.FLAGS
  options = Options(
    **{
      field.name: values[field.name].value
      for field in dataclasses.fields(Options)
    }
  )
  try:
    with directory_lock.holding_part(
      values.output, *value_types.parse_part(values.part)
    ):
      summary = prepare(
        values.input, values.output, options, values.num_workers, values.part
      )
  except ValueError as error:
    sys.exit(f'error: {error}')
  except (OSError, RuntimeError) as error:
    sys.exit(
      f'error: {error}. Finished tars are kept: run the same command '
      'again to continue.'
    )
  if summary is None:
    print(
      'This part is finished. When all parts are, run the command without '
      '--part.'
    )
    return
  print(f'{summary["tars"]} tars -> {values.output}')
  for split, count in summary['records'].items():
    print(f'  {split}: {count}')
  for reason, count in summary['rejected'].items():
    print(f'  skipped, {reason}: {count}')


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flag_types.define_repeated(
    'input',
    None,
    value_types.Path('glob', schemes=('*',)),
    'Glob of tars; may be repeated.',
    required=True,
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('directory', output=True),
    'Directory to write the data set to.',
    required=True,
  )
  flag_types.define(
    'name',
    Options.name,
    value_types.Text(
      'lower-case letters, digits and _', r'[a-z][a-z0-9_]*', 100
    ),
    'Name of the data set in TFDS.',
  )
  flag_types.define(
    'validation_fraction',
    Options.validation_fraction,
    value_types.Number(float, 0, 1, below=True),
    'Fraction of the records for the validation split.',
  )
  flag_types.integer(
    'max_caption_length',
    Options.max_caption_length,
    1,
    10**9,
    'Skip records with longer captions, in characters.',
  )
  flag_types.integer(
    'min_side',
    Options.min_side,
    1,
    10**6,
    'Skip images whose shorter side has fewer pixels.',
  )
  flag_types.define(
    'max_aspect',
    Options.max_aspect,
    value_types.Number(float, 1, 10**6, also=(0,)),
    'Skip images with a larger ratio of longer to shorter side; 0: skip none.',
  )
  flags.DEFINE_boolean(
    'deduplicate', Options.deduplicate, 'Use each image file only once.'
  )
  flag_types.integer(
    'reduce_to',
    Options.reduce_to,
    0,
    10**6,
    'Reduce larger images to this shorter side in pixels, to save disk space; '
    '0: store all images unchanged.',
  )
  flag_types.integer(
    'max_pixels',
    Options.max_pixels,
    1,
    2**32,
    'Skip images of more pixels, counted as by data.max_pixels of a config.',
  )
  flag_types.integer(
    'num_workers', os.cpu_count() or 1, 1, 1000, 'Number of worker processes.'
  )
  flag_types.define(
    'part',
    '0/1',
    value_types.PART,
    'k/n: this is machine k, from 0, of n machines that share the work.',
  )
  command.run(main)
