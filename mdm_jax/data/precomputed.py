"""Text features that tools.precompute_text has stored beside the images.

`<data set>/text/` holds `info.json` (see `TextInfo`), `empty.npy` (features of
the empty caption) and the files `<split>-<shard>-of-<shards>.<suffix>`. Record
i of a split belongs to image i. It holds a hash of the caption (8 bytes), the
caption's number of tokens before truncation, and the features [n, width]
without padding.

Beside a prepared data set they are ArrayRecord files. Beside the index of tars,
they are files of which a part can be requested from a bucket: where each record
starts and where the last one ends (uint64 [n + 1]), and the records, each with
its CRC-32 (uint32).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import os
import struct
from typing import Any
import zlib

from etils import epath
import ml_dtypes
import numpy as np

from mdm_jax.data.images import BadRecord, DataError, ExcludedRecord
from mdm_jax.data.text import Tokenizer
from mdm_jax.runtime import files, remote_reads

DTYPES = {
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
# Suffixes of the files beside a prepared data set, and beside an index of tars.
ARRAY_RECORD, RANGES = 'array_record', 'features'
_OFFSET, _CRC = np.dtype('<u8'), np.dtype('<u4')
# Bytes of a record: 10^5 tokens would have less.
_LARGEST = 2**32
_HEADER = struct.Struct('<8sI')
_COMMAND = 'python -m mdm_jax.tools.precompute_text'


@dataclasses.dataclass(frozen=True)
class TextInfo:
  """The contents of `info.json`.

  Attributes:
    made_with: fingerprint of encoder, tokenizer and token length. A run can
      only use features whose fingerprint equals that of its config.
    dtype: of the stored features, one of `DTYPES`.
    width: D, the width of the features.
    shard_size: captions per file.
    splits: split -> number of captions.
    suffix: of the files, 'array_record' or 'features'.
  """

  made_with: Mapping[str, Any]
  dtype: str
  width: int
  shard_size: int
  splits: Mapping[str, int]
  suffix: str = ARRAY_RECORD

  def files(self, split: str) -> list[str]:
    """The names of a split's files, in order."""
    count = -(-self.splits[split] // self.shard_size)
    return [
      f'{split}-{i:05d}-of-{count:05d}.{self.suffix}' for i in range(count)
    ]


def text_directory(data_path: str) -> epath.Path:
  """The directory of a prepared data set's text features."""
  return epath.Path(data_path) / 'text'


def read_info(data_path: str) -> TextInfo:
  """Reads `info.json` and checks that every file exists.

  Raises:
    FileNotFoundError: there are no features, or files are missing.
    ValueError: `info.json` is something else.
  """
  directory = text_directory(data_path)
  path = directory / 'info.json'
  if not path.exists():
    raise FileNotFoundError(
      f'There are no text features in {directory}: make them with '
      f'{_COMMAND}, or encode captions during training with text.encoder=t5.'
    )
  try:
    info = TextInfo(**json.loads(path.read_bytes()))
    is_right = (
      isinstance(info.made_with, dict)
      and info.dtype in DTYPES
      and info.suffix in (ARRAY_RECORD, RANGES)
      and min(info.width, info.shard_size, *info.splits.values()) > 0
    )
  except (ValueError, TypeError, AttributeError):
    is_right = False
  if not is_right:
    raise ValueError(
      f'{path} is damaged: remove {directory} and run {_COMMAND} again.'
    )
  # In a bucket, one list is faster than a question for each.
  there = {file.name for file in directory.iterdir()}
  missing = [
    name
    for split in info.splits
    for name in info.files(split)
    if name not in there
  ]
  if missing or 'empty.npy' not in there:
    raise FileNotFoundError(
      f'{directory} lacks {len(missing)} of its files, such as '
      f'{(missing or ["empty.npy"])[0]}: run {_COMMAND} again, which makes '
      'the missing files.'
    )
  return info


def require_same(
  data_path: str, info: TextInfo, made_with: Mapping[str, Any]
) -> None:
  """Checks that features were made with the given text encoder.

  Args:
    data_path: directory of the data set.
    info: of the features in it.
    made_with: the fingerprint that the features should have.

  Raises:
    ValueError: the features have another fingerprint.
  """
  different = [
    f'{name} {info.made_with.get(name)} instead of {value}'
    for name, value in made_with.items()
    if info.made_with.get(name) != value
  ]
  if different:
    raise ValueError(
      f'{text_directory(data_path)} was made with another text encoder: '
      + ', '.join(different)
      + f'. Remove it and run {_COMMAND}, or set text.path, text.max_length '
      'and text.tokenizer_rules to the values it was made with.'
    )


def require_count(
  data_path: str, info: TextInfo, split: str, count: int
) -> None:
  """Checks that there are features of each record of a split.

  Args:
    data_path: directory of the data set.
    info: of the features in it.
    split: of the data set.
    count: its number of records.

  Raises:
    ValueError: there are features of another number of captions.
  """
  found = info.splits.get(split, 0)
  if found != count:
    raise ValueError(
      f'{text_directory(data_path)} has features of {found} captions of the '
      f'split {split!r}, and the data set has {count} records: remove it and '
      f'run {_COMMAND} again.'
    )


def read_empty(data_path: str) -> np.ndarray:
  """The features of the empty caption, float32 [n, D].

  Raises:
    ValueError: the file is something else.
  """
  path = text_directory(data_path) / 'empty.npy'
  try:
    features = np.load(io.BytesIO(files.read_bytes(path)))
  except (ValueError, EOFError):
    features = np.zeros(0)
  if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
    raise ValueError(
      f'{path} is damaged: remove it and run {_COMMAND}, which makes it again.'
    )
  return features


def pad(features: np.ndarray, length: int) -> np.ndarray:
  """Pads features with zeros: [n, D] -> [length, D]."""
  return np.pad(features, ((0, length - len(features)), (0, 0)))


def pack(caption: str, num_tokens: int, features: np.ndarray) -> bytes:
  """Serializes one record.

  Args:
    caption: the caption that was encoded.
    num_tokens: its number of tokens before truncation.
    features: [n, D], in one of `DTYPES`.
  """
  return _HEADER.pack(_digest(caption), num_tokens) + features.tobytes()


def _digest(caption: str) -> bytes:
  return hashlib.blake2b(caption.encode(), digest_size=8).digest()


def write_ranges(path: epath.Path, records: Sequence[bytes]) -> None:
  """Writes a file of which a record can be requested."""
  start = _OFFSET.itemsize * (len(records) + 1)
  sizes = [len(record) + _CRC.itemsize for record in records]
  with files.replacing(path) as temporary, temporary.open('wb') as file:
    file.write(np.cumsum([start, *sizes]).astype(_OFFSET).tobytes())
    for record in records:
      file.write(record)
      file.write(zlib.crc32(record).to_bytes(_CRC.itemsize, 'little'))


@dataclasses.dataclass(frozen=True)
class _RangeFiles:
  """The records of a split in files of `write_ranges`."""

  directory: epath.Path
  info: TextInfo
  split: str

  @functools.cached_property
  def _paths(self) -> list[str]:
    names = self.info.files(self.split)
    return [os.fspath(self.directory / name) for name in names]

  @functools.cached_property
  def _offsets(self) -> list[np.ndarray]:
    """Of each file, where its records start and where the last one ends."""
    size, total = self.info.shard_size, self.info.splits[self.split]
    waits = []
    for shard, path in enumerate(self._paths):
      count = min(size, total - shard * size)
      end = _OFFSET.itemsize * (count + 1)
      waits.append((path, end, remote_reads.request(path, 0, end)))
    found = []
    for path, start, wait in waits:
      try:
        offsets = np.frombuffer(wait(), _OFFSET)
      except remote_reads.Unavailable as error:
        raise DataError(f'{error}.') from error
      except OSError as error:
        raise DataError(f'{path} cannot be read: {error}.') from error
      if offsets[0] != start or (np.diff(offsets) > _LARGEST).any():
        raise DataError(
          f'{path} is damaged: remove it and run {_COMMAND} again.'
        )
      found.append(offsets)
    return found

  def request(self, index: int) -> Callable[[], bytes]:
    """Begins to read a record; returns a function that waits for it."""
    shard, row = divmod(index, self.info.shard_size)
    start, end = map(int, self._offsets[shard][row : row + 2])
    return functools.partial(
      _checked, remote_reads.request(self._paths[shard], start, end)
    )


def _checked(wait: Callable[[], bytes]) -> bytes:
  data = wait()
  record, crc = data[: -_CRC.itemsize], data[-_CRC.itemsize :]
  if zlib.crc32(record) != int.from_bytes(crc, 'little'):
    raise ValueError('wrong checksum')
  return record


@dataclasses.dataclass(frozen=True)
class PrecomputedText:
  """A source whose records have the features of their caption as 'text'.

  Attributes:
    source: of images and captions.
    data_path: directory of the data set.
    split: of the data set.
    info: of the features.
    tokenizer: that the features were made with; 'text' [L, D] is padded to its
      `max_length`.
    leave_out: whether a caption that is too long for it excludes its record;
      otherwise it is truncated.
  """

  source: Any
  data_path: str
  split: str
  info: TextInfo
  tokenizer: Tokenizer
  leave_out: bool

  @functools.cached_property
  def _features(self):
    directory = text_directory(self.data_path)
    if self.info.suffix == RANGES:
      return _RangeFiles(directory, self.info, self.split)
    import grain  # Slow to import.

    return grain.sources.ArrayRecordDataSource(
      [str(directory / name) for name in self.info.files(self.split)]
    )

  def fingerprint(self) -> str:
    """The fingerprint of the wrapped source.

    Features need none: each record is checked against its caption.
    """
    return self.source.fingerprint()

  def __reduce__(self):
    """Pickles the arguments, so that each worker process opens the files."""
    return type(self), tuple(
      getattr(self, field.name) for field in dataclasses.fields(self)
    )

  def __len__(self) -> int:
    """The number of records."""
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record of the wrapped source, with 'text' [L, D] added.

    Raises:
      BadRecord: the record or its features are damaged or those of another
        caption.
      ExcludedRecord: the caption is too long (with `leave_out`).
      DataError: a bucket does not answer, or files of features are damaged.
    """
    return self.request(index)()

  def request(self, index: int) -> Callable[[], dict[str, Any]]:
    """Begins to read a record and its features, if they are in a bucket.

    Returns:
      A function that waits for the record, and raises as `__getitem__`.
    """
    if hasattr(self.source, 'request'):
      read = self.source.request(index)
    else:
      read = functools.partial(self.source.__getitem__, index)
    stored = self._features
    if hasattr(stored, 'request'):
      read_text = stored.request(index)
    else:
      read_text = functools.partial(stored.__getitem__, index)
    return functools.partial(self._join, read, read_text)

  def _join(
    self, read: Callable[[], dict[str, Any]], read_text: Callable[[], bytes]
  ) -> dict[str, Any]:
    record = read()
    key = record['key']
    try:
      data = read_text()
      digest, num_tokens = _HEADER.unpack_from(data)
      features = np.frombuffer(
        data, DTYPES[self.info.dtype], offset=_HEADER.size
      ).reshape(-1, self.info.width)
    except remote_reads.Unavailable as error:
      raise DataError(f'{error}.') from error
    except (
      RuntimeError,
      IndexError,
      struct.error,
      ValueError,
      remote_reads.Missing,
    ) as error:
      raise BadRecord(key, 'damaged text features', str(error)) from error
    if digest != _digest(record['caption']):
      raise BadRecord(
        key,
        'text features of another caption',
        f'remove {text_directory(self.data_path)} and run {_COMMAND}',
      )
    if self.leave_out and (
      excess := self.tokenizer.excess(record['caption'], num_tokens)
    ):
      raise ExcludedRecord(key, 'caption too long', excess)
    max_length = self.tokenizer.max_length
    # float32 is exact, and NumPy cannot test all of `DTYPES`.
    if (
      len(features) > max_length
      or not np.isfinite(features.astype(np.float32)).all()
    ):
      raise BadRecord(
        key,
        'damaged text features',
        f'{len(features)} tokens, or numbers that are not finite',
      )
    return record | {'text': pad(features, max_length)}
