"""Embeds a prepared data set's captions once, for text.encoder=precomputed.

  python -m mdm_jax.tools.precompute_text --config=configs/cc12m_64.py \
      --config.data.path=DIR --config.text.path=T5

The features go to DIR/text. Started again, it makes what is missing. Several
machines share the work by --part=0/4, --part=1/4, …
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import math
import pathlib
import re
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags
import numpy as np

from mdm_jax.data import precomputed

# Captions a file: what is lost at most if the program is killed.
SHARD_SIZE = 4096
# A batch is as long as its longest caption, rounded up to a multiple of this
# many tokens: each length is compiled once.
_LENGTH_STEP = 32


def main(argv: list[str]) -> None:
  """Flags to one call."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  from mdm_jax import metrics  # Slow to import, and not needed for --help.

  metrics.setup_logging()
  try:
    values = flags.FLAGS
    precompute(values.config, values.batch_size, values.storage, values.part)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')


def precompute(
  config, batch_size: int, storage: str = 'bfloat16', part: str = '0/1'
) -> None:
  """Writes the features of every split.

  Args:
    config: whose `data.path` is the data set, and whose `text` section says
      how captions are read; `dtype` is what the encoder computes in.
    batch_size: captions encoded at once, over all devices.
    storage: dtype of the stored features.
    part: 'k/n': this machine makes every nth file, from the kth.

  Raises:
    ValueError, FileNotFoundError: no data set or no encoder; features in its
      place that were made with another encoder; features that overflow.
  """
  import jax
  import jax.numpy as jnp

  from mdm_jax import build, inputs, sharding
  from mdm_jax.data import sources

  index, count = _parse_part(part)
  if config.text.encoder in ('learned', 'label'):
    raise ValueError(
      f'text.encoder={config.text.encoder!r} is trained with the network: '
      'nothing can be computed before. Give a config with '
      "'t5' or 'precomputed'."
    )
  config = build.reading_prompts(config)
  config.mesh.update(data=-1, fsdp=1, spatial=1)
  mesh = sharding.make_mesh(config.mesh, devices=jax.local_devices())
  batch_size = math.ceil(batch_size / mesh.size) * mesh.size
  tokenizer = inputs.make_tokenizer(config)
  encoder = build.make_text_encoder(config)

  ##### What goes where.
  path = config.data.path
  splits = sources.available_splits(path)
  by_split = {split: sources.open_source(path, split) for split in splits}
  info = precomputed.TextInfo(
    made_with=build.text_fingerprint(config),
    dtype=storage,
    width=encoder.width,
    shard_size=SHARD_SIZE,
    splits={split: len(source) for split, source in by_split.items()},
  )
  directory = precomputed.text_directory(path)
  _write_info(path, info)
  files = [
    (split, k, name)
    for split in splits
    for k, name in enumerate(info.files(split))
  ]
  mine = [
    (split, k, directory / name)
    for split, k, name in files[index::count]
    if not (directory / name).exists()
  ]
  logging.info('%s: %d of %d files to make.', directory, len(mine), len(files))

  ##### How.
  params = build.load_frozen(config, mesh)

  @jax.jit
  def encode_step(params, tokens):
    text, _ = encoder.apply({'params': params['text_encoder']}, tokens)
    return text.astype(jnp.dtype(storage))

  def encode(tokens):
    tokens = sharding.shard_batch({'tokens': tokens}, mesh)['tokens']
    return encode_step(params, tokens)

  if index == 0:
    _write_empty(directory / 'empty.npy', tokenizer, encode, batch_size)
  begin, done, num_bytes = time.monotonic(), 0, 0
  total = sum(
    min(SHARD_SIZE, info.splits[split] - k * SHARD_SIZE) for split, k, _ in mine
  )
  for split, k, file in mine:
    source = by_split[split]
    captions = _captions(
      source, range(k * SHARD_SIZE, min((k + 1) * SHARD_SIZE, len(source)))
    )
    records = encode_captions(captions, tokenizer, encode, batch_size)
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
  """The records of some captions; those of about one length share a batch.

  Args:
    captions: n of them.
    tokenizer: `data.text.Tokenizer`.
    encode: int32 [batch_size, l] -> features [batch_size, l, D], for any l.
    batch_size: captions encoded at once.

  Raises:
    ValueError: features are not finite.
  """
  tokens = np.stack(list(map(tokenizer.encode, captions)))
  lengths = (tokens != 0).sum(axis=1)
  order = np.argsort(lengths, kind='stable')
  # All are started before the first is waited for: no device is ever idle.
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


def _parse_part(part: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d+)/(\d+)', part)
  index, count = map(int, match.groups()) if match else (0, 0)
  if index >= count:
    raise ValueError(f'--part={part}: give k/n with k in 0..n-1.')
  return index, count


def _write_info(path: str, info: precomputed.TextInfo) -> None:
  file = precomputed.text_directory(path) / 'info.json'
  if not file.exists():
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name('info.json.tmp')
    temporary.write_text(json.dumps(dataclasses.asdict(info), indent=2) + '\n')
    temporary.replace(file)
    return
  found = precomputed.TextInfo(**json.loads(file.read_text()))
  precomputed.require_same(path, found, info.made_with)
  if found != info:
    raise ValueError(
      f'{file.parent} has {found.dtype} features of {dict(found.splits)}, '
      f'asked for are {info.dtype} of {dict(info.splits)}: remove it, or '
      'ask for the same.'
    )


def _write_empty(
  file: pathlib.Path, tokenizer, encode: Callable, batch_size: int
) -> None:
  tokens = tokenizer.encode('')
  features = np.asarray(encode(np.tile(tokens, (batch_size, 1))))[0]
  temporary = file.with_name('empty.tmp.npy')
  np.save(temporary, features[: (tokens != 0).sum()].astype(np.float32))
  temporary.replace(file)


def _captions(source, indices: range) -> list[str]:
  import grain

  return list(
    grain.MapDataset.range(indices.start, indices.stop)
    .map(lambda i: source[i]['caption'])
    .to_iter_dataset(grain.ReadOptions())
  )


def _write_records(file: pathlib.Path, records: Sequence[bytes]) -> None:
  from array_record.python import array_record_module

  temporary = file.with_name(f'{file.name}.tmp')
  # Numbers do not compress, and single ones are to be read.
  writer = array_record_module.ArrayRecordWriter(
    str(temporary), 'group_size:1,uncompressed'
  )
  for record in records:
    writer.write(record)
  writer.close()
  temporary.replace(file)


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  config_flags.DEFINE_config_file(
    'config', None, 'Of the runs that are to read the features.'
  )
  flags.DEFINE_integer(
    'batch_size', 256, 'Captions encoded at once.', lower_bound=1
  )
  flags.DEFINE_enum(
    'storage', 'bfloat16', sorted(precomputed.DTYPES), 'Of the stored features.'
  )
  flags.DEFINE_string('part', '0/1', 'This machine of how many.')
  flags.mark_flag_as_required('config')
  app.run(main)
