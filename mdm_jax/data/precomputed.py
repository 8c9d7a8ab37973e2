"""Text features that tools.precompute_text has stored beside the images.

`<data set>/text/` holds `info.json` (see `TextInfo`), `empty.npy` (features of
the empty caption) and the ArrayRecord files
`<split>-<shard>-of-<shards>.array_record`. Record i of a split belongs to
image i. It holds a hash of the caption (8 bytes), the caption's number of
tokens before truncation, and the features [n, width] without padding.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import struct
from typing import Any

from etils import epath
import ml_dtypes
import numpy as np

from mdm_jax.data import tfds_source
from mdm_jax.data.images import BadRecord
from mdm_jax.data.text import Tokenizer

DTYPES = {
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
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
  """

  made_with: Mapping[str, Any]
  dtype: str
  width: int
  shard_size: int
  splits: Mapping[str, int]

  def files(self, split: str) -> list[str]:
    """The names of a split's files, in order."""
    count = -(-self.splits[split] // self.shard_size)
    return [
      f'{split}-{i:05d}-of-{count:05d}.array_record' for i in range(count)
    ]


def text_directory(data_path: str) -> epath.Path:
  """The directory of a prepared data set's text features."""
  return epath.Path(data_path) / 'text'


def read_info(data_path: str) -> TextInfo:
  """Reads `info.json` and checks that every file exists.

  Raises:
    FileNotFoundError: there are no features, or files are missing.
    ValueError: `info.json` is something else, or the data set is in a bucket.
  """
  tfds_source.require_local(data_path)
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
      and min(info.width, info.shard_size, *info.splits.values()) > 0
    )
  except (ValueError, TypeError, AttributeError):
    is_right = False
  if not is_right:
    raise ValueError(
      f'{path} is damaged: remove {directory} and run {_COMMAND} again.'
    )
  missing = [
    name
    for split in info.splits
    for name in info.files(split)
    if not (directory / name).exists()
  ]
  if missing or not (directory / 'empty.npy').exists():
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


def read_empty(data_path: str) -> np.ndarray:
  """The features of the empty caption, float32 [n, D].

  Raises:
    ValueError: the file is something else.
  """
  path = text_directory(data_path) / 'empty.npy'
  try:
    features = np.load(path)
  except (ValueError, EOFError, OSError):
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
    leave_out: whether a caption that is too long for it is a bad record;
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
    import grain  # Slow to import.

    directory = text_directory(self.data_path)
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
        caption, or the caption is too long.
    """
    record = self.source[index]
    key = record['key']
    stored = self._features
    try:
      data = stored[index]
      digest, num_tokens = _HEADER.unpack_from(data)
      features = np.frombuffer(
        data, DTYPES[self.info.dtype], offset=_HEADER.size
      ).reshape(-1, self.info.width)
    # A wrong checksum, a missing record, a short one, no whole rows.
    except (RuntimeError, IndexError, struct.error, ValueError) as error:
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
      raise BadRecord(key, 'caption too long', excess)
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
