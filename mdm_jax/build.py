"""From a configuration to what it describes: the only factory."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from mdm_jax import hugging_face, optim, sharding
from mdm_jax.data import pipeline, shapes, sources
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.diffusion import samplers
from mdm_jax.diffusion.pyramid import batch_fractions, level_batch_sizes
from mdm_jax.diffusion.schedule import Schedule, make_schedule, vdm_weights
from mdm_jax.draw import SamplerSpec
from mdm_jax.eval.prompt_accuracy import Vocabulary
from mdm_jax.models.conditioning import LearnedTextEncoder, TextSpec
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.t5 import T5Encoder, T5Spec, hugging_face_name
from mdm_jax.models.unet import LevelSpec
from mdm_jax.step import Objective

DATA_SETS = ('shapes', 'captioned_images')
TEXT_ENCODERS = ('learned', 't5')


def check(config: ConfigDict, mesh: Mesh) -> None:
  """Raises whatever is wrong with a configuration, before anything compiles.

  Raises:
    ValueError, FileNotFoundError: one line that names the key and the remedy.
  """
  if not config.stages or not config.model.levels:
    raise ValueError('The config needs at least one stage and one level.')
  _check_resolutions(config)
  if config.text.encoder not in TEXT_ENCODERS:
    raise ValueError(
        f'text.encoder={config.text.encoder!r}: use one of {TEXT_ENCODERS}.')
  if config.text.encoder == 't5' and not config.text.path:
    raise ValueError(
        'text.path is empty: name the directory of a T5 encoder, downloaded '
        'from google/flan-t5-xl for example, --config.text.path=DIR.')
  make_tokenizer(config)
  _check_sampler(config)
  for key in ('log_every', 'sample_every', 'checkpoint_every'):
    if config[key] < 1:
      raise ValueError(f'{key}={config[key]}: give a number of steps.')
  if not 0 <= config.text.caption_dropout <= 1:
    raise ValueError(
        f'text.caption_dropout={config.text.caption_dropout}: give a share, '
        '0 to 1.')
  least = max(config.eval.num_prompts, config.eval.batch_size)
  if config.data.name == 'shapes' and config.data.size < least:
    raise ValueError(
        f'data.size={config.data.size}: the evaluation draws {least} of them; '
        'use more, or lower eval.num_prompts.')
  names = [stage.name for stage in config.stages]
  if len(set(names)) < len(names):
    raise ValueError(f'stages have names {names}: they must differ.')
  shards = sharding.batch_shards(mesh)
  for key, size in [
      ('eval.batch_size', config.eval.batch_size),
      *((f'stages[{i}].batch_size', stage.batch_size)
        for i, stage in enumerate(config.stages))]:
    if size < 1 or size % shards:
      raise ValueError(
          f'{key}={size} is not divided by the {shards} devices that the mesh '
          f'spreads a batch over: use a multiple of {shards}.')
  for i, stage in enumerate(config.stages):
    _check_stage(config, i, stage)
    make_model(config, stage)
    make_objective(config, stage)
    make_optimizer(config, stage)


def _check_sampler(config: ConfigDict) -> None:
  sampler = config.sampler
  samplers.threshold_x0(jnp.zeros((1, 1, 1, 3)), sampler.threshold)
  samplers.time_steps(sampler.num_steps, config.diffusion.num_steps)
  if sampler.name not in ('ddim', 'ddpm'):
    raise ValueError(f'sampler.name={sampler.name!r}: use ddim or ddpm.')
  if not 0 <= sampler.eta <= 1:
    raise ValueError(f'sampler.eta={sampler.eta}: must be in 0..1.')


def load_config(values: Mapping[str, Any]) -> ConfigDict:
  """The configuration that was written as JSON, where tuples are lists."""
  def restore(value):
    if isinstance(value, Mapping):
      return ConfigDict({
          key: restore(child) for key, child in value.items()}).lock()
    if isinstance(value, list):
      children = [restore(child) for child in value]
      is_sections = any(isinstance(child, ConfigDict) for child in children)
      return children if is_sections else tuple(children)
    return value
  return restore(values)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
  """Puts the key that an error is about before its message."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{key}: {error}') from error


def _check_resolutions(config: ConfigDict) -> None:
  levels = config.model.levels
  for i, level in enumerate(levels):
    with _naming(f'model.levels[{i}]'):
      spec = _level_spec(level)
    if not i and spec.channels[-1] % spec.num_heads:
      raise ValueError(
          f'model.levels[0].num_heads={spec.num_heads} does not divide the '
          f'{spec.channels[-1]} channels of its middle.')
    if level.temporal_dim != levels[0].temporal_dim:
      raise ValueError(
          f'model.levels[{i}].temporal_dim={level.temporal_dim}: it must be '
          f'that of level 0, {levels[0].temporal_dim}.')
    bottom, odd = divmod(level.resolution, spec.downsampling)
    if odd:
      raise ValueError(
          f'model.levels[{i}].resolution={level.resolution} cannot be halved '
          f'{len(spec.channels) - 1} times over patches of {spec.patch_size} '
          f'px: use a multiple of {spec.downsampling}, or fewer channels.')
    if i:
      inner = levels[i - 1].resolution // levels[i - 1].patch_size
      if bottom != inner:
        raise ValueError(
            f'model.levels[{i}].resolution={level.resolution} over '
            f'{len(spec.channels)} channels and patches of {spec.patch_size} '
            f'px meets {bottom} px, but level {i - 1} has {inner}: change '
            'either.')


def _check_stage(config: ConfigDict, i: int, stage: ConfigDict) -> None:
  if not 1 <= stage.num_levels <= len(config.model.levels):
    raise ValueError(
        f'stages[{i}].num_levels={stage.num_levels}: model.levels has '
        f'{len(config.model.levels)}.')
  if i and stage.num_levels < config.stages[i - 1].num_levels:
    raise ValueError(
        f'stages[{i}].num_levels={stage.num_levels} is fewer than the stage '
        'before has: stages only grow.')
  for key in ('loss_weights', 'mixed_ratio'):
    if len(stage[key]) != stage.num_levels:
      raise ValueError(
          f'stages[{i}].{key}={tuple(stage[key])}: give one number for each '
          f'of its {stage.num_levels} levels, coarse to fine.')
  if stage.steps < 1:
    raise ValueError(f'stages[{i}].steps={stage.steps}: must be 1 or more.')
  with _naming(f'stages[{i}].mixed_ratio'):
    level_batch_sizes(stage.batch_size, batch_fractions(stage.mixed_ratio))


def _level_spec(level: ConfigDict) -> LevelSpec:
  fields = dict(level)
  fields.pop('resolution')
  return LevelSpec(**fields)


def resolutions(config: ConfigDict, stage: ConfigDict) -> tuple[int, ...]:
  """The stage's resolutions in pixels, coarse to fine."""
  levels = config.model.levels[:stage.num_levels]
  return tuple(level.resolution for level in levels)


def make_tokenizer(config: ConfigDict) -> Tokenizer:
  """The captions' tokenizer: T5's own, where T5 is the encoder."""
  own = CAPTIONS_MODEL if config.text.encoder == 'learned' else os.path.join(
      config.text.path, 'spiece.model')
  return Tokenizer(config.text.tokenizer or own, config.text.max_length)


def make_model(config: ConfigDict, stage: ConfigDict) -> Matryoshka:
  """The stage's network and text encoder.

  Raises:
    ValueError, FileNotFoundError: an unknown dtype, or what
      `make_text_encoder` raises.
  """
  _check_heads('model.text', config.model.text)
  if config.dtype not in ('float32', 'bfloat16'):
    raise ValueError(f'dtype={config.dtype!r}: use float32 or bfloat16.')
  dtype = jnp.dtype(config.dtype)
  return Matryoshka(
      unet=NestedUNet(
          make_levels(config, stage), TextSpec(**config.model.text), dtype),
      text_encoder=make_text_encoder(config),
      resolutions=resolutions(config, stage),
      frozen_text=config.text.encoder != 'learned')


def make_levels(config: ConfigDict,
                stage: ConfigDict) -> tuple[LevelSpec, ...]:
  """The stage's levels, coarse to fine."""
  return tuple(map(_level_spec, config.model.levels[:stage.num_levels]))


def make_text_encoder(config: ConfigDict) -> nn.Module:
  """From tokens to text features.

  Raises:
    ValueError, FileNotFoundError: no T5 in `text.path`, or one that the
      tokenizer is not for; widths that heads do not divide.
  """
  text, dtype = config.text, jnp.dtype(config.dtype)
  num_pieces = make_tokenizer(config).vocab_size
  if text.encoder == 'learned':
    _check_heads('text', text)
    return LearnedTextEncoder(
        num_pieces, text.width, text.num_layers, text.num_heads, dtype)
  with _naming(f'text.path={text.path!r}'):
    spec = T5Spec.from_hugging_face(hugging_face.read_config(text.path))
    if num_pieces > spec.vocab_size:
      raise ValueError(
          f'the tokenizer has {num_pieces} pieces, this encoder knows '
          f'{spec.vocab_size}: leave text.tokenizer empty for its own.')
  return T5Encoder(spec, dtype)


def load_frozen(config: ConfigDict, mesh: Mesh) -> dict:
  """Parameters that the model needs and training does not change.

  Returns:
    The T5 encoder's in `config.dtype`, sharded by the rules; {} if the text
    encoder is trained along.

  Raises:
    ValueError, FileNotFoundError: weights are missing, damaged or of another
      model.
  """
  if config.text.encoder == 'learned':
    return {}
  shapes = jax.eval_shape(
      make_text_encoder(config).init, jax.random.key(0),
      jnp.ones((1, config.text.max_length), jnp.int32))['params']
  shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype)), shapes)
  shardings = sharding.tree_shardings(
      {'text_encoder': shapes}, mesh, config.sharding_rules)
  with _naming(f'text.path={config.text.path!r}'):
    params = hugging_face.load(
        hugging_face.open_tensors(config.text.path), shapes,
        shardings['text_encoder'], hugging_face_name)
  return {'text_encoder': params}


def _check_heads(name: str, section: ConfigDict) -> None:
  if section.width % section.num_heads:
    raise ValueError(
        f'{name}.num_heads={section.num_heads} does not divide '
        f'{name}.width={section.width}.')


def make_noise_schedule(config: ConfigDict, stage: ConfigDict) -> Schedule:
  """The stage's noise schedule, a row for each level."""
  return make_schedule(
      config.diffusion.schedule, resolutions(config, stage),
      stage.shift_power, config.diffusion.num_steps)


def make_objective(config: ConfigDict, stage: ConfigDict) -> Objective:
  """What the stage minimises.

  Raises:
    ValueError: an unknown schedule, parameterization or loss space.
  """
  for key in ('parameterization', 'loss_space'):
    if config.diffusion[key] not in ('v', 'eps', 'x0'):
      raise ValueError(
          f'diffusion.{key}={config.diffusion[key]!r}: use v, eps or x0.')
  if config.diffusion.time_weights not in ('none', 'vdm'):
    raise ValueError(
        f'diffusion.time_weights={config.diffusion.time_weights!r}: use none '
        'or vdm.')
  schedule = make_noise_schedule(config, stage)
  weighted = config.diffusion.time_weights == 'vdm'
  return Objective(
      schedule=schedule,
      parameterization=config.diffusion.parameterization,
      loss_space=config.diffusion.loss_space,
      weights=tuple(stage.loss_weights),
      fractions=batch_fractions(stage.mixed_ratio),
      time_weights=vdm_weights(schedule.gammas[0]) if weighted else None)


def make_optimizer(
    config: ConfigDict, stage: ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The stage's optimizer and its learning rate at each step."""
  options = dict(config.optimizer)
  options.pop('ema_decay')
  learning_rate = optim.learning_rate_schedule(
      stage.learning_rate, warmup_steps=stage.warmup_steps,
      decay=options.pop('decay'), num_steps=stage.steps)
  return optim.make_optimizer(learning_rate, **options), learning_rate


def make_sampler(config: ConfigDict) -> SamplerSpec:
  """How pictures are drawn."""
  return SamplerSpec(**config.sampler)


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
  data = config.data
  if data.name == 'shapes':
    return shapes.ShapesSource(config.seed, split, data.size, resolution)
  if data.name not in DATA_SETS:
    raise ValueError(f'data.name={data.name!r}: use one of {DATA_SETS}.')
  if not data.path:
    raise ValueError(
        'data.path is empty: name the directory that prepare_data wrote, '
        '--config.data.path=DIR.')
  return sources.open_source(data.path, split)


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
                          flip=data.flip and training),
      batch_size=batch_size, seed=config.seed, shuffle=training,
      start_batch=start_batch, num_batches=num_batches,
      process_index=process_index, process_count=process_count,
      num_workers=data.num_workers if training else 0,
      num_threads=data.num_threads, prefetch=data.prefetch)


def make_prompts(config: ConfigDict,
                 count: int) -> tuple[list[str], list[dict] | None]:
  """Captions to draw, and what each of them states if pictures can be marked.

  Shapes' come from the held-out split, as many as asked for; of captioned
  images the held-out split's first captions, each once.
  """
  split = held_out_split(config)
  if config.data.name == 'shapes':
    source = make_source(config, split, config.model.levels[-1].resolution)
    scenes = [source.scene(i) for i in range(count)]
    return [scene[1] for scene in scenes], [scene[2] for scene in scenes]
  source = make_source(config, split, 0)
  return [source[i]['caption'] for i in range(min(count, len(source)))], None


def make_vocabulary() -> Vocabulary:
  """What the words of shapes' captions look like."""
  return Vocabulary(
      colors=shapes.COLORS, backgrounds=shapes.BACKGROUNDS,
      silhouettes=shapes.silhouettes(), patterns=shapes.pattern_tiles(),
      period=shapes.PERIOD,
      sizes={name: float(np.mean(radii))
             for name, radii in shapes.SIZES.items()})


def stage_directory(workdir: str | pathlib.Path, config: ConfigDict,
                    index: int) -> pathlib.Path:
  """Where a stage's checkpoints are."""
  name = f'{index}_{config.stages[index].name}'
  return pathlib.Path(workdir) / 'checkpoints' / name
