"""From a configuration to what a network reads: images, text, prompts."""

import os
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from mdm_jax.data import pipeline, precomputed, shapes, sources
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.eval.prompt_accuracy import Vocabulary

_DATA_SETS = ('shapes', 'captioned_images')


def make_tokenizer(config: ConfigDict) -> Tokenizer:
  """The captions' tokenizer: T5's own, where T5 is the encoder."""
  own = CAPTIONS_MODEL if config.text.encoder == 'learned' else os.path.join(
      config.text.path, 'spiece.model')
  return Tokenizer(config.text.tokenizer or own, config.text.max_length)


def empty_text(config: ConfigDict) -> np.ndarray:
  """The empty caption as the text encoder reads it, [L] or [L, D]."""
  if config.text.encoder == 'precomputed':
    return precomputed.pad(
        precomputed.read_empty(config.data.path), config.text.max_length)
  return make_tokenizer(config).encode('')


def make_source(config: ConfigDict, split: str,
                resolution: int) -> pipeline.Source:
  """A split of the data set.

  Args:
    config: of the run.
    split: 'train' or 'validation'; shapes also have 'held_out'.
    resolution: drawn images have it; files keep their own.

  Raises:
    ValueError, FileNotFoundError: no such data set or split.
  """
  data, text = config.data, config.text
  if data.name == 'shapes':
    return shapes.ShapesSource(config.seed, split, data.size, resolution)
  if data.name not in _DATA_SETS:
    raise ValueError(f'data.name={data.name!r}: use one of {_DATA_SETS}.')
  if not data.path:
    raise ValueError(
        'data.path is empty: name the directory that prepare_data wrote, '
        '--config.data.path=DIR.')
  source = sources.open_source(data.path, split)
  if text.encoder != 'precomputed':
    return source
  return precomputed.PrecomputedText(
      source, data.path, split, precomputed.read_info(data.path),
      text.max_length, _leave_out(config))


def _leave_out(config: ConfigDict) -> bool:
  return config.text.long_captions == 'leave_out'


def held_out_split(config: ConfigDict) -> str:
  """The split to validate on; 'train' where a data set has no other."""
  if config.data.name == 'shapes':
    return 'held_out'
  splits = sources.available_splits(config.data.path)
  return 'validation' if 'validation' in splits else 'train'


def make_dataset(config: ConfigDict, split: str, resolution: int,
                 batch_size: int, *, process_index: int, process_count: int,
                 start_batch: int = 0, num_batches: int | None = None):
  """This process's part of a split's batches; see `pipeline.make_dataset`."""
  data, training = config.data, split == 'train' and num_batches is None
  return pipeline.make_dataset(
      make_source(config, split, resolution),
      transform=Transform(make_tokenizer(config), resolution,
                          flip=data.flip and training,
                          leave_out=_leave_out(config)),
      batch_size=batch_size, seed=config.seed, shuffle=training,
      start_batch=start_batch, num_batches=num_batches,
      process_index=process_index, process_count=process_count,
      num_workers=data.num_workers if training else 0,
      num_threads=data.num_threads, prefetch=data.prefetch)


def batch_keys(config: ConfigDict, resolution: int, batch_size: int,
               batch: int) -> list[str]:
  """The keys of a global training batch's records."""
  return pipeline.batch_keys(
      make_source(config, 'train', resolution), batch, batch_size=batch_size,
      seed=config.seed, shuffle=True)


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
  """Any captions as the text encoder reads them, [N, L]."""
  return np.stack(list(map(make_tokenizer(config).encode, captions)))


def make_prompts(config: ConfigDict, count: int) -> Prompts:
  """Captions of the data set to draw.

  Shapes' come from the held-out split, as many as asked for; of captioned
  images the held-out split's first captions, each once.
  """
  split = held_out_split(config)
  if config.data.name == 'shapes':
    source = make_source(config, split, config.model.levels[-1].resolution)
    scenes = [source.scene(i) for i in range(count)]
    captions = [scene[1] for scene in scenes]
    return Prompts(captions, encode_prompts(config, captions),
                   [scene[2] for scene in scenes])
  source = make_source(config, split, 0)
  records = [source[i] for i in range(min(count, len(source)))]
  captions = [record['caption'] for record in records]
  if config.text.encoder == 'precomputed':
    return Prompts(
        captions, np.stack([record['text'] for record in records]), None)
  return Prompts(captions, encode_prompts(config, captions), None)


def make_vocabulary() -> Vocabulary:
  """What the words of shapes' captions look like."""
  return Vocabulary(
      colors=shapes.COLORS, backgrounds=shapes.BACKGROUNDS,
      silhouettes=shapes.silhouettes(), patterns=shapes.pattern_tiles(),
      period=shapes.PERIOD,
      sizes={name: float(np.mean(radii))
             for name, radii in shapes.SIZES.items()})
