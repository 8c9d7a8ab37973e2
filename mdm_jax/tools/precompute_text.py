"""Encodes the captions of a data set, for text.encoder=precomputed.

  python -m mdm_jax.tools.precompute_text --config=configs/cc12m_64.py \\
      --config.data.path=DIR --config.text.path=T5

The features are written to DIR/text. If the command is killed, the same
command makes the missing files. Several machines divide the work by
--part=0/4, --part=1/4, … DIR is a prepared data set, or with
--config.data.name=tars an index of tars. It may be in a bucket: the files of a
prepared data set are then copied to the local disk one after another.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import time
from typing import Any

from absl import flags, logging
from etils import epath
import numpy as np

from mdm_jax.builders import recipes
from mdm_jax.data import precomputed
from mdm_jax.data.images import BadRecord
from mdm_jax.runtime import (
  buckets,
  command,
  directory_lock,
  files,
  flag_types,
  remote_reads,
  value_types,
)

# Captions per file. At most this many are lost if the program is killed.
SHARD_SIZE = 4096
# The length of a batch is that of its longest caption, rounded up to a
# multiple of this many tokens. The encoder is compiled once per length.
_LENGTH_STEP = 32
# Captions that are read at the same time, perhaps from a bucket.
_THREADS = 32


def main(_: list[str]) -> None:
  """Runs `precompute` with the values of the flags."""
  # Slow to import, and not needed for --help.
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  try:
    values = flags.FLAGS
    with directory_lock.holding_part(
      precomputed.text_directory(values.config.data.path),
      *value_types.parse_part(values.part),
    ):
      precompute(values.config, values.batch_size, values.storage, values.part)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


def precompute(
  config, batch_size: int, storage: str = 'bfloat16', part: str = '0/1'
) -> None:
  """Writes the features of every split.

  Args:
    config: `data.path` is the data set, `text` describes encoder and tokens,
      `dtype` is that of the encoder's computations.
    batch_size: captions that are encoded at once, over all devices.
    storage: dtype of the stored features, one of `precomputed.DTYPES`.
    part: 'k/n' makes every nth file from the kth on this machine.

  Raises:
    FileNotFoundError: there is no data set or no text encoder.
    ValueError: the encoder is trained with the network, the directory has
      features of another encoder, or features overflow `storage`.
  """
  import jax

  from mdm_jax.builders.config import reading_prompts
  from mdm_jax.builders.text import (
    empty_text,
    make_text_encoder,
    make_tokenizer,
    text_fingerprint,
  )
  from mdm_jax.runtime import sharding

  index, count = value_types.parse_part(part)
  if config.text.encoder in ('learned', 'label'):
    raise ValueError(
      f'text.encoder={config.text.encoder!r} is trained with the network, so '
      "its features cannot be precomputed: give a config with 't5' or "
      "'precomputed'."
    )
  config = reading_prompts(config)
  config.mesh.update(data=-1, fsdp=1, spatial=1)
  mesh = sharding.make_mesh(config.mesh, devices=jax.local_devices())
  batch_size = sharding.round_up(batch_size, mesh)
  tokenizer = make_tokenizer(config, of_captions=True)
  encoder = make_text_encoder(config)

  ##### Which files are missing.
  path = config.data.path
  directory = precomputed.text_directory(path)
  value_types.check_outputs(directory)
  data = _Data(path, config.data.name == 'tars')
  info = precomputed.TextInfo(
    made_with=text_fingerprint(config),
    dtype=storage,
    width=encoder.width,
    shard_size=SHARD_SIZE,
    splits=data.sizes,
    suffix=data.suffix,
  )
  _write_info(path, info)
  names = [
    (split, k, name)
    for split in data.sizes
    for k, name in enumerate(info.files(split))
  ]
  there = {file.name for file in directory.iterdir()}
  missing = [
    (directory / name, split, _rows(k, info.splits[split]))
    for split, k, name in names[index::count]
    if name not in there
  ]
  logging.info(
    '%s: %d of %d files to make.', directory, len(missing), len(names)
  )

  ##### Encode.
  encode = _make_encode(config, encoder, mesh, storage)
  if index == 0:
    _write_empty(directory, empty_text(config), encode, batch_size)
  _write_shards(
    missing,
    data,
    lambda captions: encode_captions(captions, tokenizer, encode, batch_size),
  )


class _Data:
  """The captions of a prepared data set or of tars, on a disk or in a bucket.

  Attributes:
    sizes: split -> number of records.
    suffix: of the files of features.
  """

  def __init__(self, path: str, is_tars: bool = False):
    """Opens the data set.

    Args:
      path: directory of the data set, or of an index of tars.
      is_tars: whether it is an index of tars.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it cannot be read.
    """
    from mdm_jax.data import sources, tar_index

    self._path = self._local = path
    self._open, self.suffix = sources.open_source, precomputed.ARRAY_RECORD
    if is_tars:
      self.suffix = precomputed.RANGES
      self._open = tar_index.open_source
      self.sizes = tar_index.read_index(path)['splits']
      return
    if not files.is_local(path):
      self._local = remote_reads.temporary_directory()
      # The descriptions, which are small.
      for file in files.list_bucket(path):
        if file.endswith('.json'):
          self._copy(os.path.basename(file))
      if not os.path.exists(f'{self._local}/dataset_info.json'):
        raise FileNotFoundError(f'There is no prepared data set in {path}.')
    self.sizes = sources.split_sizes(self._local)

  @contextlib.contextmanager
  def reading(self, split: str, rows: range) -> Iterator[tuple[Any, int]]:
    """Yields a source that has some rows of a split, and the first it has."""
    from mdm_jax.data import sources

    if self._local == self._path:
      yield self._open(self._path, split), 0
      return
    part = f'{split}[{rows.start}:{rows.stop}]'
    needed = sources.file_names(self._local, part)
    # The next rows may be of the same file.
    there = {file.name for file in pathlib.Path(self._local).iterdir()}
    for name in there - {*needed}:
      if not name.endswith('.json'):
        os.remove(f'{self._local}/{name}')
    for name in needed:
      if name not in there:
        self._copy(name)
    yield sources.open_source(self._local, part), rows.start

  def _copy(self, name: str) -> None:
    path = f'{self._path.rstrip("/")}/{name}'
    with files.naming_errors(path):
      buckets.file_system(path).get_file(path, f'{self._local}/{name}')


def _rows(shard: int, count: int) -> range:
  """The captions of a shard, of the `count` captions of a split."""
  return range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, count))


def _make_encode(config, encoder, mesh, storage: str) -> Callable:
  """Returns a function int32 [B, l] -> features [B, l, D] in `storage`."""
  import jax
  import jax.numpy as jnp

  from mdm_jax.builders.text import load_frozen
  from mdm_jax.runtime import sharding

  params = load_frozen(config, mesh)

  @jax.jit
  def encode_step(params, tokens):
    text, _ = encoder.apply({'params': params['text_encoder']}, tokens)
    return text.astype(jnp.dtype(storage))

  def encode(tokens):
    tokens = sharding.shard_batch({'tokens': tokens}, mesh)['tokens']
    return encode_step(params, tokens)

  return encode


def _write_shards(
  shards: Sequence[tuple[epath.Path, str, range]],
  data: '_Data',
  make_records: Callable[[list[str]], list[bytes]],
) -> None:
  """Writes files of features and logs the progress.

  Args:
    shards: the file, the split of its captions, and their indices.
    data: that the captions are of.
    make_records: maps captions to serialized records.
  """
  begin, done, num_bytes = time.monotonic(), 0, 0
  total = sum(len(indices) for _, _, indices in shards)
  for file, split, indices in shards:
    with data.reading(split, indices) as (source, first):
      captions = _captions(
        source, range(indices.start - first, indices.stop - first)
      )
    records = make_records(captions)
    _write_records(file, records)
    done += len(records)
    num_bytes += sum(map(len, records))
    rate = done / (time.monotonic() - begin)
    logging.info(
      '%s: %d of %d captions, %.0f captions/s, %.0f bytes a caption, %.0f s '
      'left',
      file.name,
      done,
      total,
      rate,
      num_bytes / done,
      (total - done) / rate,
    )


def encode_captions(
  captions: Sequence[str],
  tokenizer,
  encode: Callable,
  batch_size: int,
) -> list[bytes]:
  """Encodes captions, in batches of similar length.

  Args:
    captions: n captions.
    tokenizer: `data.text.Tokenizer`.
    encode: int32 [batch_size, l] -> features [batch_size, l, D], for any l.
    batch_size: captions that are encoded at once.

  Returns:
    n serialized records, see `precomputed.pack`.

  Raises:
    ValueError: features are not finite.
  """
  tokens = np.stack(list(map(tokenizer.encode, captions)))
  lengths = np.array(list(map(_length, tokens)))
  order = np.argsort(lengths, kind='stable')
  # Dispatch all batches before waiting for the first: no device is idle.
  encoded = []
  for start in range(0, len(order), batch_size):
    rows = order[start : start + batch_size]
    length = min(
      math.ceil(lengths[rows].max() / _LENGTH_STEP) * _LENGTH_STEP,
      tokens.shape[1],
    )
    batch = np.zeros((batch_size, length), np.int32)
    batch[: len(rows)] = tokens[rows, :length]
    encoded.append((rows, encode(batch)))
  records = [b''] * len(captions)
  for rows, features in encoded:
    for row, value in zip(rows, np.asarray(features)):
      value = value[: lengths[row]]
      if not np.isfinite(value.astype(np.float32)).all():
        raise ValueError(
          f'The features of {captions[row]!r} exceed {value.dtype}: use '
          '--storage=bfloat16.'
        )
      records[row] = precomputed.pack(
        captions[row], tokenizer.count(captions[row]), value
      )
  return records


def _write_info(path: str, info: precomputed.TextInfo) -> None:
  file = precomputed.text_directory(path) / 'info.json'
  if not file.exists():
    written = dataclasses.asdict(info)
    if info.suffix == precomputed.ARRAY_RECORD:
      del written['suffix']  # Older versions do not know it.
    # The machines that share the work all write it.
    files.write_json(file, written, shared=True)
    return
  try:
    found = precomputed.TextInfo(**files.read_json(file))
  except (files.UnreadableFile, TypeError) as error:
    raise ValueError(f'{file} is damaged ({error}): remove it.') from None
  precomputed.require_same(path, found, info.made_with)
  if found != info:
    raise ValueError(
      f'{file.parent} has {found.dtype} features of {dict(found.splits)}, '
      f'asked for are {info.dtype} of {dict(info.splits)}: remove it, or '
      'ask for the same.'
    )


def _write_empty(
  directory: epath.Path,
  tokens: np.ndarray,
  encode: Callable,
  batch_size: int,
) -> None:
  features = np.asarray(encode(np.tile(tokens, (batch_size, 1))))[0]
  file = directory / 'empty.npy'
  with files.replacing(file) as temporary, temporary.open('wb') as output:
    np.save(output, features[: _length(tokens)].astype(np.float32))


def _length(tokens: np.ndarray) -> int:
  """Positions up to the last token; a literal `<pad>` may come before it."""
  return max(np.flatnonzero(tokens), default=-1) + 1


def _captions(source, indices: range) -> list[str]:
  import grain

  # Those of tars are found without the images.
  read = getattr(source, 'caption', lambda index: source[index]['caption'])

  def caption(index: int) -> str:
    try:
      return read(index)
    # Training replaces such a record, whatever its features are.
    except BadRecord as error:
      logging.warning('Encoded as an empty caption: %s', error)
      return ''

  return list(
    grain.MapDataset.range(indices.start, indices.stop)
    .map(caption)
    .to_iter_dataset(grain.ReadOptions(num_threads=_THREADS))
  )


def _write_records(file: epath.Path, records: Sequence[bytes]) -> None:
  if file.name.endswith(precomputed.RANGES):
    precomputed.write_ranges(file, records)
    return
  from array_record.python import array_record_module

  with files.replacing(file) as temporary:
    # Features hardly compress, and are read one record at a time.
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), 'group_size:1,uncompressed'
    )
    for record in records:
      writer.write(record)
    writer.close()


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  recipes.define('Config of the runs that will read the features.')
  flag_types.integer(
    'batch_size', 256, 1, 10**6, 'Captions that are encoded at once.'
  )
  flag_types.define(
    'storage',
    'bfloat16',
    value_types.Choice(tuple(sorted(precomputed.DTYPES))),
    'Data type of the stored features.',
  )
  flag_types.define(
    'part',
    '0/1',
    value_types.PART,
    'k/n: this is machine k, from 0, of n machines that share the work.',
  )
  command.run(main, recipes.parse_flags)
