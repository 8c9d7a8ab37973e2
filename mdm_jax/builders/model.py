"""Builds the network of a stage."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders.config import AUTOENCODER, TRAINED_ENCODERS, naming
from mdm_jax.builders.text import check_heads, make_text_encoder
from mdm_jax.models import target
from mdm_jax.models.autoencoder import Autoencoder, AutoencoderSpec
from mdm_jax.models.conditioning import TextSpec
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.packing import TPU_LANES
from mdm_jax.models.unet import LevelSpec

_AMPERE = 8.0  # compute capability of the first GPUs with flash kernels


def make_model(config: ConfigDict, stage: ConfigDict) -> Matryoshka:
  """The network and text encoder of a stage.

  Raises:
    FileNotFoundError: see `make_text_encoder`.
    ValueError: a number of heads that does not divide the width, or an error of
      `make_text_encoder`.
  """
  check_heads('model.text', config.model.text)
  dtype = jnp.dtype(config.dtype)
  return Matryoshka(
    unet=NestedUNet(
      make_levels(config, stage), TextSpec(**config.model.text), dtype
    ),
    text_encoder=make_text_encoder(config),
    resolutions=image_resolutions(config, stage),
    frozen_text=config.text.encoder not in TRAINED_ENCODERS,
    to_longest=config.text.padding == 'longest',
    coarse_resolution=coarse_resolution(config, stage),
    autoencoder=make_autoencoder(config) if has_codes(config, stage) else None,
  )


def make_autoencoder(config: ConfigDict) -> Autoencoder:
  """The autoencoder of a run of latent diffusion.

  Raises:
    ValueError: its settings do not fit together.
  """
  with naming('autoencoder'):
    spec = AutoencoderSpec(**config.autoencoder)
  return Autoencoder(spec, jnp.dtype(config.dtype))


def make_levels(config: ConfigDict, stage: ConfigDict) -> tuple[LevelSpec, ...]:
  """Architectures of the levels of a stage, coarse to fine."""
  flash = _has_flash_attention(config)
  is_given = coarse_resolution(config, stage) is not None
  return tuple(
    dataclasses.replace(
      level_spec(level),
      flash=flash,
      frames=count,
      # Images have no frames to attend to.
      frame_attention=tuple(level.frame_attention) if count > 1 else (),
      given_coarse=is_given,
      image_channels=image_channels(config, level),
    )
    for level, count in zip(
      trained_levels(config, stage), frames(config, stage), strict=True
    )
  )


def _has_flash_attention(config: ConfigDict) -> bool:
  """Whether attention may use cuDNN's flash kernels.

  They need an NVIDIA GPU from Ampere on, and take no divided images.
  """
  if config.mesh.spatial != 1 or target.platform() != 'gpu':
    return False
  if jax.default_backend() != 'gpu':  # Planned for one that is not here.
    return True
  return 'cuda' in jax.extend.backend.get_backend().platform_version and all(
    float(device.compute_capability) >= _AMPERE for device in jax.devices()
  )


def level_spec(level: ConfigDict) -> LevelSpec:
  """Architecture of a level, without its resolution.

  Raises:
    ValueError: channels, layers or heads do not fit together.
  """
  fields = dict(level)
  for name in ('resolution', 'downsample'):  # What it denoises.
    fields.pop(name)
  if not fields['lanes']:
    packs = fields['kind'] == 'unet' and target.platform() == 'tpu'
    fields['lanes'] = TPU_LANES if packs else 1
  return LevelSpec(**fields)


def level_names(config: ConfigDict, stage: ConfigDict) -> tuple[str, ...]:
  """Names of the levels of a stage, see `mixed_batch.level_name`.

  That of a level of codes has 'latent_' before it.
  """
  return tuple(
    (mixed_batch.LATENT if is_of_codes(level) else '')
    + mixed_batch.level_name(mixed_batch.example_shape(level.resolution, count))
    for level, count in zip(
      trained_levels(config, stage), frames(config, stage), strict=True
    )
  )


def frames(config: ConfigDict, stage: ConfigDict) -> tuple[int, ...]:
  """Frames of the levels of a stage, coarse to fine."""
  most = stage.max_frames
  levels = trained_levels(config, stage)
  return tuple(min(x.frames, most or x.frames) for x in levels)


def resolutions(config: ConfigDict, stage: ConfigDict) -> tuple[int, ...]:
  """Sides of what the levels of a stage denoise, coarse to fine."""
  return tuple(x.resolution for x in trained_levels(config, stage))


def image_resolutions(config: ConfigDict, stage: ConfigDict) -> tuple[int, ...]:
  """Resolutions of the images of a stage in pixels, coarse to fine."""
  levels = trained_levels(config, stage)
  return tuple(image_resolution(config, level) for level in levels)


def image_resolution(config: ConfigDict, level: ConfigDict) -> int:
  """Resolution of the images of a level, or of those of its codes."""
  if is_of_codes(level):
    return config.autoencoder.resolution
  return level.resolution


def is_of_codes(level: ConfigDict) -> bool:
  """Whether a level denoises codes of the autoencoder instead of images."""
  return level.downsample == 'encoder'


def image_channels(config: ConfigDict, level: ConfigDict) -> int:
  """Channels of what a level denoises."""
  return config.autoencoder.latent_channels if is_of_codes(level) else 3


def has_codes(config: ConfigDict, stage: ConfigDict) -> bool:
  """Whether a level of a stage denoises codes."""
  return any(map(is_of_codes, trained_levels(config, stage)))


def finest_resolution(config: ConfigDict) -> int:
  """Pixels a side of the images of the last stage's finest level."""
  last = config.stages[-1]
  if last.kind == AUTOENCODER:
    return config.autoencoder.resolution
  return image_resolutions(config, last)[-1]


def trained_levels(
  config: ConfigDict, stage: ConfigDict
) -> Sequence[ConfigDict]:
  """The levels of a stage, coarse to fine; in a cascade its finest alone."""
  first = stage.num_levels - 1 if config.model.cascade else 0
  return config.model.levels[first : stage.num_levels]


def coarse_resolution(config: ConfigDict, stage: ConfigDict) -> int | None:
  """Of the images that a level of a cascade is given; None if it is not."""
  if not config.model.cascade or stage.num_levels == 1:
    return None
  return config.model.levels[stage.num_levels - 2].resolution


def require_stage(config: ConfigDict, index: int) -> None:
  """Raises ValueError, which names --stage, if a config has no such stage."""
  last = len(config.stages) - 1
  if not 0 <= index <= last:
    raise ValueError(f'--stage={index}: the config has stages 0 to {last}.')


def keep_stage(config: ConfigDict, index: int) -> None:
  """Leaves a stage in a config, as the last, with the earlier ones it needs.

  The batches of those are made as large as its own: they do not matter.

  Args:
    config: of a run, which is changed.
    index: of the stage.
  """
  own = config.stages[index]
  needed = 0
  if config.model.cascade:
    needed = index
  elif has_codes(config, own):
    needed = min(index, 1)  # The first one trains the autoencoder.
  earlier = config.stages[:needed]
  for each in earlier:
    each.update(batch_size=own.batch_size, accumulate=own.accumulate)
  config.stages = [*earlier, own]
