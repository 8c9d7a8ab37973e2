"""From a configuration to what a network reads: images, text, prompts."""

from collections.abc import Sequence
import os
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from mdm_jax import mixed_batch
from mdm_jax.data import (
  pipeline,
  precomputed,
  shapes,
  sources,
  tar_index,
  tfds_source,
)
from mdm_jax.data.labels import LabelledSource, Labels, read_names
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.eval.prompt_accuracy import Vocabulary

_DATA_SETS = ('shapes', 'captioned_images', 'tars', 'tfds:NAME')
_TFDS = 'tfds:'


def make_tokenizer(config: ConfigDict) -> Tokenizer | Labels:
  """The captions' tokenizer: T5's own, where T5 is the encoder."""
  if config.text.encoder == 'label':
    path = config.text.class_names
    return Labels(config.text.num_classes, read_names(path) if path else ())
  own = (
    CAPTIONS_MODEL
    if config.text.encoder == 'learned'
    else os.path.join(config.text.path, 'spiece.model')
  )
  return Tokenizer(config.text.tokenizer or own, config.text.max_length)


def empty_text(config: ConfigDict) -> np.ndarray:
  """The empty caption as the text encoder reads it, [L] or [L, D]."""
  if config.text.encoder == 'precomputed':
    return precomputed.pad(
      precomputed.read_empty(config.data.path), config.text.max_length
    )
  return make_tokenizer(config).encode('')


def make_source(
  config: ConfigDict, split: str, resolution: int
) -> pipeline.Source:
  """A split of the data set.

  Args:
    config: of the run.
    split: 'train' or 'validation'; shapes also have 'held_out'.
    resolution: drawn images have it; files keep their own.

  Raises:
    ValueError, FileNotFoundError: no such data set, split or feature, or
      another number of classes.
  """
  data, text = config.data, config.text
  source = _make_records(config, split, resolution)
  if text.encoder == 'label':
    num_classes = getattr(source, 'num_classes', 0)
    if not num_classes:
      raise ValueError(
        f"text.encoder='label' with data.name={data.name!r}: it has no "
        'labels, use shapes or tfds:NAME.'
      )
    if num_classes != text.num_classes:
      raise ValueError(
        f'text.num_classes={text.num_classes}, but {data.name} has '
        f'{num_classes} classes: set --config.text.num_classes='
        f'{num_classes}.'
      )
    return LabelledSource(source, make_tokenizer(config))
  if text.encoder == 'precomputed':
    return precomputed.PrecomputedText(
      source,
      data.path,
      split,
      precomputed.read_info(data.path),
      text.max_length,
      _leave_out(config),
    )
  return source


def _make_records(config: ConfigDict, split: str, resolution: int):
  data = config.data
  if data.name == 'shapes':
    return shapes.ShapesSource(config.seed, split, data.size, resolution)
  if data.name.startswith(_TFDS):
    is_label = config.text.encoder == 'label'
    text = {'label': data.label} if is_label else {'caption': data.caption}
    return tfds_source.open_by_name(
      data.name.removeprefix(_TFDS),
      data.path,
      data[f'{split}_split'],
      tfds_source.Features(data.image, **text),
    )
  if data.name not in _DATA_SETS:
    raise ValueError(f'data.name={data.name!r}: use one of {_DATA_SETS}.')
  if not data.path:
    raise ValueError(
      'data.path is empty: name the directory that prepare_data or '
      'index_tars wrote, --config.data.path=DIR.'
    )
  open_source = (tar_index if data.name == 'tars' else sources).open_source
  return open_source(data.path, split)


def _leave_out(config: ConfigDict) -> bool:
  return config.text.long_captions == 'leave_out'


def held_out_split(config: ConfigDict) -> str:
  """The split to validate on; 'train' where a data set has no other."""
  if config.data.name == 'shapes':
    return 'held_out'
  if config.data.name.startswith(_TFDS):
    return 'validation' if config.data.validation_split else 'train'
  kind = tar_index if config.data.name == 'tars' else sources
  splits = kind.available_splits(config.data.path)
  return 'validation' if 'validation' in splits else 'train'


def make_dataset(
  config: ConfigDict,
  split: str,
  resolutions: Sequence[int],
  batch_sizes: Sequence[int],
  *,
  process_index: int,
  process_count: int,
  start_batch: int = 0,
  num_batches: int | None = None,
):
  """This process's part of a split's batches; see `pipeline.make_dataset`.

  An image has the resolution of the finest level that sees it, which decides
  on its name, see `mixed_batch`.

  Args:
    config: of the run.
    split: as for `make_source`.
    resolutions: in pixels, coarse to fine.
    batch_sizes: coarse to fine, how many examples each level sees; the first
      is the batch's.
    process_index: this process.
    process_count: of so many.
    start_batch: the first batch.
    num_batches: how many; None for no end.
  """
  data, training = config.data, split == 'train' and num_batches is None
  finest = make_source(config, split, resolutions[-1])
  tokenizer = make_tokenizer(config)

  def row(level):
    source = finest
    if data.name == 'shapes':  # Drawn at the resolution.
      source = make_source(config, split, resolutions[level])
    return source, Transform(
      tokenizer,
      resolutions[level],
      flip=data.flip and training,
      random_crop=data.random_crop and training,
      leave_out=_leave_out(config),
      image_name=mixed_batch.image_names(resolutions)[level],
    )

  (source, transform), *further_rows = map(
    row, mixed_batch.finest_levels(batch_sizes)
  )
  return pipeline.make_dataset(
    source,
    transform=transform,
    further_rows=further_rows,
    batch_size=batch_sizes[0],
    seed=config.seed,
    shuffle=training,
    start_batch=start_batch,
    num_batches=num_batches,
    process_index=process_index,
    process_count=process_count,
    num_workers=data.num_workers if training else 0,
    num_threads=data.num_threads,
    prefetch=data.prefetch,
  )


def data_fingerprint(config: ConfigDict) -> dict[str, str]:
  """What decides on the order and the pixels, and is not in the config."""
  found = {
    'tokenizer': make_tokenizer(config).fingerprint(),
    **pipeline.package_versions(),
  }
  if config.data.name != 'shapes':
    source = make_source(config, 'train', 0)
    found |= {'records': str(len(source)), 'files': source.fingerprint()}
  return found


def batch_keys(
  config: ConfigDict, resolution: int, batch_size: int, batch: int
) -> list[str]:
  """The keys of a global training batch's records."""
  return pipeline.batch_keys(
    make_source(config, 'train', resolution),
    batch,
    batch_size=batch_size,
    seed=config.seed,
    shuffle=True,
  )


class Prompts(NamedTuple):
  """What to draw.

  Attributes:
    captions: N of them.
    text: the same as the text encoder reads it, [N, L] or [N, L, D].
    statements: what each states; None if pictures can not be marked.
  """

  captions: list[str]
  text: np.ndarray
  statements: list[dict] | None


def encode_prompts(config: ConfigDict, captions: list[str]) -> np.ndarray:
  """Any captions as the text encoder reads them, [N, L].

  Those that are too long are cut, with a warning.

  Raises:
    ValueError: for a class that does not exist.
  """
  tokenizer = make_tokenizer(config)
  if config.text.encoder != 'label':
    cut = [
      caption
      for caption in captions
      if tokenizer.count(caption) > config.text.max_length
    ]
    if cut:
      logging.warning(
        'Only the first %d tokens are read of %d of the %d prompts, such as '
        '"%.60s".',
        config.text.max_length - 1,
        len(cut),
        len(captions),
        cut[0],
      )
  return np.stack(list(map(tokenizer.encode, captions)))


def make_prompts(
  config: ConfigDict, count: int, rows: Sequence[int] | None = None
) -> Prompts:
  """Captions of the data set to draw.

  Shapes' come from the held-out split, as many as asked for; of captioned
  images the held-out split's first captions, each once. Classes are as many
  as asked for, from the first to the last.

  Args:
    config: of the run.
    count: of the prompts.
    rows: those of them that are wanted, where a data set may have too few:
      then its captions are repeated. None for all that there are.
  """
  if config.text.encoder == 'label':
    labels = make_tokenizer(config)
    drawn = [
      i * labels.num_classes // count
      for i in (range(count) if rows is None else rows)
    ]
    return Prompts(
      [labels.name(label) for label in drawn],
      encode_prompts(config, map(str, drawn)),
      None,
    )
  split = held_out_split(config)
  if config.data.name == 'shapes':
    source = make_source(config, split, config.model.levels[-1].resolution)
    scenes = [
      source.scene(i % len(source))
      for i in (range(count) if rows is None else rows)
    ]
    captions = [scene[1] for scene in scenes]
    return Prompts(
      captions, encode_prompts(config, captions), [scene[2] for scene in scenes]
    )
  source = make_source(config, split, 0)
  if rows is None:
    rows = range(min(count, len(source)))
  records = [source[i % len(source)] for i in rows]
  captions = [record['caption'] for record in records]
  if config.text.encoder == 'precomputed':
    return Prompts(
      captions, np.stack([record['text'] for record in records]), None
    )
  return Prompts(captions, encode_prompts(config, captions), None)


def states_what_is_seen(config: ConfigDict) -> bool:
  """Whether pictures can be marked by what their prompts state."""
  return config.data.name == 'shapes' and config.text.encoder != 'label'


def make_vocabulary() -> Vocabulary:
  """What the words of shapes' captions look like."""
  return Vocabulary(
    colors=shapes.COLORS,
    backgrounds=shapes.BACKGROUNDS,
    silhouettes=shapes.silhouettes(),
    patterns=shapes.pattern_tiles(),
    period=shapes.PERIOD,
    sizes={name: float(np.mean(radii)) for name, radii in shapes.SIZES.items()},
  )
