"""Converts captioned images of any form to a data set of ArrayRecords.

The inputs are divided into parts. Each part becomes a file of records and a
report; a part with a report is finished, also for the next run of the command.
When all parts are finished, they become the data set.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import io
import json
import re
from typing import Any

from absl import logging
from etils import epath
import numpy as np
from PIL import Image

from mdm_jax.data import captions, folders, inputs, tars
from mdm_jax.data.images import MAX_PIXELS, BadRecord, load_image
from mdm_jax.runtime import files, value_types
from mdm_jax.tools import tfds_writer
from mdm_jax.tools.worker_pool import run_all

_JPEG_QUALITY = 95
_MAX_JPEG_SIDE = 65_500  # pixels
_REJECTS = 'rejects.jsonl'
_LAST = 'dataset_info.json'  # TFDS's description of the data set


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
    caption_column: of tables, see `tables.caption_column`.
  """

  name: str = 'captioned_images'
  validation_fraction: float = 0.01
  max_caption_length: int = 512
  min_side: int = 1
  max_aspect: float = 0.0
  deduplicate: bool = False
  reduce_to: int = 0
  max_pixels: int = MAX_PIXELS
  caption_column: str = ''

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
  given: str | Sequence[str],
  output: str,
  options: Options = Options(),
  num_workers: int = 1,
  part: str = '0/1',
) -> dict[str, Any] | None:
  """Writes the data set.

  Args:
    given: inputs, see `inputs.find`.
    output: directory to write the data set to.
    options: which records are used, and how they are stored.
    num_workers: worker processes.
    part: 'k/n' reads every nth tar from the kth on this machine. Unless n is
      1, the data set is not completed.

  Returns:
    The contents of `summary.json`; None if the data set is not completed.

  Raises:
    ValueError: an input is none, there is no usable record, an option is
      invalid, `output` exists, or an unfinished run had other options.
    OSError: a file cannot be written. The same call continues later.
  """
  options.check()
  index, count = value_types.parse_part(part)
  target = epath.Path(output)
  partial = target.with_name(target.name + folders.UNFINISHED)
  # A bucket cannot rename a directory: there, the data set is written where it
  # belongs, and this file last.
  if files.is_there(target) and (
    files.is_local(target)
    or files.is_there(target / _LAST)
    or not files.is_there(partial)
  ):
    raise ValueError(
      f'--output={output} exists: remove it or choose another directory.'
    )
  parts = inputs.find(
    [given] if isinstance(given, str) else given, options.caption_column
  )
  files.require_same_settings(
    partial / 'options.json',
    {
      'input': [part.identity() for part in parts],
      **dataclasses.asdict(options),
    },
    {'tars': 'input'},
  )
  reports = [partial / f'{i:06d}.json' for i in range(len(parts))]
  own = list(zip(parts, reports))[index::count]
  finished = _read_all(_is_finished, [report for _, report in own])
  run_all(
    functools.partial(_convert, options),
    [job for job, is_finished in zip(own, finished) if not is_finished],
    num_workers,
    inputs.unit(parts),
  )
  if count > 1:
    return None
  return _finish(
    target, partial, inputs.count(parts), reports, options, num_workers
  )


def _finish(
  target: epath.Path,
  partial: epath.Path,
  counts: dict[str, int],
  reports: Sequence[epath.Path],
  options: Options,
  num_workers: int,
) -> dict[str, Any]:
  """Makes the data set from the records of all parts, and removes those.

  Args:
    target: directory of the data set.
    partial: directory of the parts.
    counts: of the inputs, see `inputs.count`.
    reports: of all parts.
    options: which records are used, and how they are stored.
    num_workers: worker processes.

  Returns:
    The contents of `summary.json`.

  Raises:
    ValueError: there is no usable record.
  """
  is_local = files.is_local(target)
  directory = partial / 'set' if is_local else target
  if is_local:
    directory.mkdir(exist_ok=True)
  parts, rejected = _read_reports(reports, directory / _REJECTS)
  if not parts:
    first = (directory / _REJECTS).read_text().partition('\n')[0]
    partial.rmtree()
    if not is_local:
      directory.rmtree()
    raise ValueError(_nothing_usable(counts, rejected, first))
  if options.deduplicate:
    parts, duplicates = tfds_writer.deduplicate(parts)
    if duplicates:
      rejected['image used before'] = duplicates
  records, info = tfds_writer.write_splits(
    directory, parts, options.name, num_workers
  )
  summary = {
    **counts,
    'records': records,
    'rejected': dict(rejected),
  }
  files.write_text(directory / 'summary.json', json.dumps(summary, indent=2))
  info.write_to_directory(directory)
  if is_local:
    directory.rename(target)
  partial.rmtree()
  return summary


def _records(report: epath.Path, split: str) -> epath.Path:
  return report.with_name(f'{report.stem}-{split}.array_record')


def _convert(options: Options, job: tuple[inputs.Part, epath.Path]) -> None:
  """Writes the records of one part, and then a report that marks it finished.

  Args:
    options: which records are used, and how they are stored.
    job: the part, and the file of the report.
  """
  part, report = job
  features = tfds_writer.make_features()
  rejects, digests = [], {split: [] for split in tfds_writer.SPLITS}
  with contextlib.ExitStack() as stack:
    writers = {
      split: stack.enter_context(
        tfds_writer.open_writer(_records(report, split))
      )
      for split in tfds_writer.SPLITS
    }
    for key, image, texts in inputs.read(part, rejects):
      try:
        record = _serialize(features, key, image, texts, options)
      except BadRecord as bad:
        rejects.append(bad)
        continue
      split = part.split or tars.split_of(key, options.validation_fraction)
      writers[split].write(record)
      digests[split].append(tfds_writer.digest(image))
  for split in tfds_writer.SPLITS:
    file = tfds_writer.digests_file(_records(report, split))
    with files.replacing(file) as temporary:
      temporary.write_bytes(b''.join(digests[split]))
  files.write_text(
    report,
    json.dumps(
      {
        'counts': {split: len(digests[split]) for split in tfds_writer.SPLITS},
        'rejects': [[bad.key, bad.reason, bad.detail] for bad in rejects],
      }
    ),
  )


def _nothing_usable(
  counts: dict[str, int], rejected: dict[str, int], first: str
) -> str:
  remedy = (
    ' An image and its caption need the same name up to the last dot.'
    if 'tars' in counts
    else ''
  )
  return (
    f'There is no usable record: {dict(rejected)}, such as {first}.{remedy}'
  )


def _read_reports(
  reports: Sequence[epath.Path], rejects: epath.Path
) -> tuple[list[tfds_writer.Part], collections.Counter]:
  """Reads the reports of all parts and writes the list of rejected records.

  Args:
    reports: of all parts.
    rejects: JSON lines file to write.

  Returns:
    The parts of the data set, and the number of rejected records by reason.
  """
  parts, rejected = [], collections.Counter()
  with files.replacing(rejects) as temporary, temporary.open('w') as lines:
    for report, found in zip(reports, _read_all(files.read_json, reports)):
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


def _read_all(
  read: Callable[[epath.Path], Any], paths: Sequence[epath.Path]
) -> list[Any]:
  """`read(path)` of each, of many at a time: a bucket answers slowly."""
  with futures.ThreadPoolExecutor(32) as pool:
    return list(pool.map(read, paths))


def _is_finished(report: epath.Path) -> bool:
  """Whether a part has its report; one that cannot be read is made anew."""
  try:
    files.read_json(report, _is_report)
  except files.UnreadableFile as error:
    if report.exists():
      logging.warning('%s: its part is read again.', error)
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
