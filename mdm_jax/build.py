"""From a configuration to what it describes: the only factory."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import pathlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from mdm_jax import (
  draw,
  hugging_face,
  inputs,
  mixed_batch,
  optim,
  sharding,
)
from mdm_jax import step as steps
from mdm_jax.diffusion.pyramid import batch_fractions, level_batch_sizes
from mdm_jax.diffusion.schedule import Schedule, make_schedule, vdm_weights
from mdm_jax.guard import Guard
from mdm_jax.models.conditioning import (
  LabelEncoder,
  LearnedTextEncoder,
  PrecomputedTextEncoder,
  TextSpec,
)
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.packing import TPU_LANES
from mdm_jax.models.t5 import T5Encoder, T5Spec, hugging_face_name
from mdm_jax.models.unet import LevelSpec

TRAINED_ENCODERS = ('learned', 'label')


def load_config(values: Mapping[str, Any]) -> ConfigDict:
  """The configuration that was written as JSON, where tuples are lists."""

  def restore(value):
    if isinstance(value, Mapping):
      return ConfigDict(
        {key: restore(child) for key, child in value.items()}
      ).lock()
    if isinstance(value, list):
      children = [restore(child) for child in value]
      is_sections = any(isinstance(child, ConfigDict) for child in children)
      return children if is_sections else tuple(children)
    return value

  return restore(values)


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
  """Puts the key that an error is about before its message."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{key}: {error}') from error


def batch_sizes(stage: ConfigDict) -> tuple[int, ...]:
  """How many examples of its batch each level sees, coarse to fine.

  Raises:
    ValueError: `mixed_ratio` does not divide the batch into whole examples.
  """
  return level_batch_sizes(stage.batch_size, batch_fractions(stage.mixed_ratio))


def level_spec(level: ConfigDict) -> LevelSpec:
  """A level's architecture, without its resolution.

  Raises:
    ValueError: widths, lengths or numbers that do not fit together.
  """
  fields = dict(level)
  fields.pop('resolution')
  if not fields['lanes']:
    fields['lanes'] = TPU_LANES if jax.default_backend() == 'tpu' else 1
  return LevelSpec(**fields)


def resolutions(config: ConfigDict, stage: ConfigDict) -> tuple[int, ...]:
  """The stage's resolutions in pixels, coarse to fine."""
  levels = config.model.levels[: stage.num_levels]
  return tuple(level.resolution for level in levels)


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
      make_levels(config, stage), TextSpec(**config.model.text), dtype
    ),
    text_encoder=make_text_encoder(config),
    resolutions=resolutions(config, stage),
    frozen_text=config.text.encoder not in TRAINED_ENCODERS,
  )


def make_levels(config: ConfigDict, stage: ConfigDict) -> tuple[LevelSpec, ...]:
  """The stage's levels, coarse to fine."""
  return tuple(map(level_spec, config.model.levels[: stage.num_levels]))


def make_text_encoder(config: ConfigDict) -> nn.Module:
  """From tokens, or features computed before, to text features.

  Raises:
    ValueError, FileNotFoundError: no T5 in `text.path`, or one that the
      tokenizer is not for; widths that heads do not divide.
  """
  text, dtype = config.text, jnp.dtype(config.dtype)
  num_pieces = inputs.make_tokenizer(config).vocab_size
  if text.encoder == 'label':
    return LabelEncoder(num_pieces, text.width, dtype)
  if text.encoder == 'learned':
    _check_heads('text', text)
    return LearnedTextEncoder(
      num_pieces, text.width, text.num_layers, text.num_heads, dtype
    )
  with naming(f'text.path={text.path!r}'):
    spec = T5Spec.from_hugging_face(hugging_face.read_config(text.path))
    if num_pieces > spec.vocab_size:
      raise ValueError(
        f'the tokenizer has {num_pieces} pieces, this encoder knows '
        f'{spec.vocab_size}: leave text.tokenizer empty for its own.'
      )
  if text.encoder == 'precomputed':
    return PrecomputedTextEncoder(spec.width, dtype)
  return T5Encoder(spec, dtype)


def reading_prompts(config: ConfigDict) -> ConfigDict:
  """The config with which the same network draws what anybody asks for.

  Features are precomputed for the captions of a data set alone; others need
  the encoder itself.
  """
  config = config.copy_and_resolve_references()
  if config.text.encoder == 'precomputed':
    config.text.encoder = 't5'
  return config


def _frozen_shapes(config: ConfigDict) -> dict:
  return jax.eval_shape(
    make_text_encoder(reading_prompts(config)).init,
    jax.random.key(0),
    jnp.ones((1, config.text.max_length), jnp.int32),
  )['params']


def text_fingerprint(config: ConfigDict) -> dict[str, Any]:
  """What decides on the text features of a caption, by name."""
  with naming(f'text.path={config.text.path!r}'):
    names = map(
      hugging_face_name, traverse_util.flatten_dict(_frozen_shapes(config))
    )
    encoder = hugging_face.fingerprint(
      hugging_face.open_tensors(config.text.path), names
    )
  return {
    'encoder': encoder,
    'tokenizer': inputs.make_tokenizer(config).fingerprint(),
    'max_length': config.text.max_length,
  }


def frozen_shapes(config: ConfigDict, mesh: Mesh) -> dict:
  """What `load_frozen` returns, as sharded `jax.ShapeDtypeStruct`s."""
  if config.text.encoder != 't5':
    return {}
  shapes = {'text_encoder': _frozen_shapes(config)}
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(config.dtype), sharding=place
    ),
    shapes,
    sharding.tree_shardings(shapes, mesh, config.sharding_rules),
  )


def load_frozen(config: ConfigDict, mesh: Mesh) -> dict:
  """Parameters that the model needs and training does not change.

  Returns:
    The T5 encoder's in `config.dtype`, sharded by the rules; {} if the text
    encoder is trained along or has done its work before.

  Raises:
    ValueError, FileNotFoundError: weights are missing, damaged or of another
      model.
  """
  shapes = frozen_shapes(config, mesh)
  if not shapes:
    return {}
  shapes = shapes['text_encoder']
  with naming(f'text.path={config.text.path!r}'):
    params = hugging_face.load(
      hugging_face.open_tensors(config.text.path),
      shapes,
      jax.tree.map(lambda x: x.sharding, shapes),
      hugging_face_name,
    )
  return {'text_encoder': params}


def _check_heads(name: str, section: ConfigDict) -> None:
  if section.width % section.num_heads:
    raise ValueError(
      f'{name}.num_heads={section.num_heads} does not divide '
      f'{name}.width={section.width}.'
    )


def make_noise_schedule(config: ConfigDict, stage: ConfigDict) -> Schedule:
  """The stage's noise schedule, a row for each level."""
  return make_schedule(
    config.diffusion.schedule,
    resolutions(config, stage),
    stage.shift_power,
    config.diffusion.num_steps,
  )


def make_objective(config: ConfigDict, stage: ConfigDict) -> steps.Objective:
  """What the stage minimises.

  Raises:
    ValueError: an unknown schedule, parameterization or loss space.
  """
  for key in ('parameterization', 'loss_space'):
    if config.diffusion[key] not in ('v', 'eps', 'x0'):
      raise ValueError(
        f'diffusion.{key}={config.diffusion[key]!r}: use v, eps or x0.'
      )
  if config.diffusion.time_weights not in ('none', 'vdm'):
    raise ValueError(
      f'diffusion.time_weights={config.diffusion.time_weights!r}: use none '
      'or vdm.'
    )
  schedule = make_noise_schedule(config, stage)
  weighted = config.diffusion.time_weights == 'vdm'
  return steps.Objective(
    schedule=schedule,
    parameterization=config.diffusion.parameterization,
    loss_space=config.diffusion.loss_space,
    weights=tuple(stage.loss_weights),
    fractions=batch_fractions(stage.mixed_ratio),
    time_weights=vdm_weights(schedule.gammas[0]) if weighted else None,
  )


def make_optimizer(
  config: ConfigDict,
  stage: ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The stage's optimizer and its learning rate at each step."""
  options = dict(config.optimizer)
  options.pop('ema_decay')
  learning_rate = optim.learning_rate_schedule(
    stage.learning_rate,
    warmup_steps=stage.warmup_steps,
    decay=options.pop('decay'),
    num_steps=stage.steps,
  )
  return optim.make_optimizer(learning_rate, **options), learning_rate


def make_train_step(
  config: ConfigDict, stage: ConfigDict, empty_text: np.ndarray, seed: int
) -> Callable:
  """The stage's training step, see `step.make_train_step`."""
  return steps.make_train_step(
    make_model(config, stage),
    make_objective(config, stage),
    make_optimizer(config, stage)[0],
    guard=make_guard(config),
    ema_decay=config.optimizer.ema_decay,
    caption_dropout=config.text.caption_dropout,
    empty_text=empty_text,
    seed=seed,
    accumulate=stage.accumulate,
  )


def make_painter(
  config: ConfigDict,
  stage: ConfigDict,
  mesh: Mesh,
  guide: Matryoshka | None = None,
) -> draw.Painter:
  """What draws with the stage's network, see `draw.Painter`."""
  return draw.Painter(
    make_model(config, stage),
    make_noise_schedule(config, stage),
    make_sampler(config),
    mesh,
    config.diffusion.parameterization,
    guide,
  )


def batch_shapes(
  config: ConfigDict, stage: ConfigDict, text: jax.ShapeDtypeStruct
) -> dict[str, Any]:
  """The stage's training batch of all processes together, as shapes.

  Args:
    config: of the run.
    stage: of the run.
    text: of the batch.
  """
  sizes, sides = batch_sizes(stage), resolutions(config, stage)
  shapes = {'text': text, 'scale': jax.ShapeDtypeStruct(sizes[:1], jnp.float32)}
  for name in ('bad', 'stop'):
    shapes[name] = jax.ShapeDtypeStruct(sizes[:1], bool)
  # Each example has one image, of the finest level that sees it.
  for name, side, seen, finer in zip(
    mixed_batch.image_names(sides), sides, sizes, (*sizes[1:], 0)
  ):
    if seen > finer:
      shapes[name] = jax.ShapeDtypeStruct(
        (seen - finer, side, side, 3), jnp.uint8
      )
  return shapes


def make_guard(config: ConfigDict) -> Guard:
  """Which steps are left out.

  Raises:
    ValueError: a value is out of range.
  """
  with naming('guard'):
    return Guard(**config.guard)


def make_sampler(config: ConfigDict) -> draw.SamplerSpec:
  """How pictures are drawn."""
  return draw.SamplerSpec(**config.sampler)


def stage_directory(
  workdir: str | pathlib.Path,
  config: ConfigDict,
  index: int,
  kind: str = 'checkpoints',
) -> pathlib.Path:
  """Where a stage's checkpoints are, or its 'averages' or 'best'."""
  name = f'{index}_{config.stages[index].name}'
  return pathlib.Path(workdir) / kind / name
