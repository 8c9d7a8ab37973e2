"""Checks the levels and the stages of a configuration."""

from collections.abc import Sequence
import dataclasses
import math

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import AUTOENCODER, naming
from mdm_jax.builders.model import (
  frames,
  image_channels,
  is_of_codes,
  level_spec,
  make_autoencoder,
  trained_levels,
)
from mdm_jax.builders.stage import batch_sizes, make_stages
from mdm_jax.models.shared_layers import shared_layers
from mdm_jax.runtime import sharding


def check_stages(
  config: ConfigDict, mesh: Mesh, training: bool = True
) -> Sequence[BaseStage]:
  """Checks the levels, stages and batch sizes of a configuration.

  Args:
    config, mesh, training: as for `check`.

  Returns:
    The stages of the run.

  Raises:
    ValueError: a value is wrong. The message names the key and the remedy.
  """
  if not config.stages or not config.model.levels:
    raise ValueError('The config needs at least one stage and one level.')
  count = len(config.stages)
  if config.seed > 2**32 // count - 1:  # The largest of `Stage.seed`.
    raise ValueError(
      f'seed={config.seed} with {count} stages: give an integer from 0 to '
      f'{2**32 // count - 1:,}.'
    )
  _check_resolutions(config)
  names = [stage.name for stage in config.stages]
  if len(set(names)) < len(names):
    raise ValueError(f'stages have names {names}: they must differ.')
  sharding.check_images_stay_in_processes(mesh)
  heights = [level.resolution for level in config.model.levels]
  if any(stage.kind == AUTOENCODER for stage in config.stages):
    heights.append(config.autoencoder.resolution)
  if any(height % mesh.shape['spatial'] for height in heights):
    raise ValueError(
      f'mesh.spatial={mesh.shape["spatial"]} does not divide the height of '
      f'the levels, {heights} px: use a divisor of {math.gcd(*heights)}.'
    )
  counts = {n for stage in config.stages for n in frames(config, stage)} - {1}
  if any(count % mesh.shape['spatial'] for count in counts):
    raise ValueError(
      f'mesh.spatial={mesh.shape["spatial"]} does not divide the frames of the '
      f'levels, {sorted(counts)}: use a divisor of {math.gcd(*counts)}.'
    )
  shards = sharding.batch_shards(mesh)
  sizes = {'eval.batch_size': config.eval.batch_size}
  if training:
    for i, stage in enumerate(config.stages):
      sizes[f'stages[{i}].batch_size'] = stage.batch_size
  for key, size in sizes.items():
    if size % shards:
      raise ValueError(
        f'{key}={size} is not divisible by {shards}, the number of devices '
        'that the mesh spreads a batch over: use a multiple.'
      )
  for i, stage in enumerate(config.stages):
    _check_stage(config, i, stage, shards if training else 1)
  return make_stages(config)


def check_codes(config: ConfigDict) -> None:
  """Checks the level of codes. Raises ValueError."""
  levels, autoencoder = config.model.levels, config.autoencoder
  for i, level in enumerate(levels):
    if not is_of_codes(level):
      continue
    named = f"model.levels[{i}].downsample='encoder'"
    if i:
      raise ValueError(
        f"{named}: only level 0, the coarsest, can have it; use 'average'."
      )
    if not config.stages or config.stages[0].kind != AUTOENCODER:
      raise ValueError(
        f"{named}: no stage trains the encoder; give stages[0].kind='"
        f"{AUTOENCODER}'."
      )
    if config.model.cascade:
      raise ValueError(
        f"{named} with model.cascade=True: use one of them, 'average' or False."
      )
    _check_autoencoder(config, 0, config.stages[0])
    side, *_ = make_autoencoder(config).spec.code_shape
    if level.resolution != side or level.frames > 1:
      raise ValueError(
        f'{named} with resolution={level.resolution} and frames='
        f'{level.frames}: codes of images of {autoencoder.resolution} px are '
        f'{side} x {side}; give resolution={side} and frames=1.'
      )
    if len(levels) > 1 and levels[1].resolution % autoencoder.resolution:
      raise ValueError(
        f'model.levels[1].resolution={levels[1].resolution}: give a multiple '
        f'of autoencoder.resolution={autoencoder.resolution}, whose codes '
        'level 0 denoises.'
      )


def check_cascade(config: ConfigDict) -> None:
  """Checks a cascade. Raises ValueError."""
  if not config.model.cascade:
    return
  levels = config.model.levels
  if any(stage.kind == AUTOENCODER for stage in config.stages):
    raise ValueError(
      f'stages[0].kind={AUTOENCODER!r} with model.cascade=True: use one of '
      'them.'
    )
  for i, (coarse, fine) in enumerate(zip(levels, levels[1:]), 1):
    if fine.resolution % coarse.resolution:
      raise ValueError(
        f'model.levels[{i}].resolution={fine.resolution} with '
        f'model.cascade=True: give a multiple of the {coarse.resolution} px of '
        f'level {i - 1}.'
      )
  if any(level.frames > 1 for level in levels):
    raise ValueError(
      'model.cascade=True with levels of several frames: cascades are of '
      'images; give False.'
    )
  for i, level in enumerate(levels):
    if level.share != 'none':
      raise ValueError(
        f'model.levels[{i}].share={level.share!r} with model.cascade=True: '
        "the levels are models of their own; use 'none'."
      )
  used, known = config.sampler.augmentation, config.diffusion.augmentation
  if used > known:
    raise ValueError(
      f'sampler.augmentation={used}: give at most the {known} of '
      'diffusion.augmentation, the strongest noise of training.'
    )


def _check_resolutions(config: ConfigDict) -> None:
  levels, coarser = config.model.levels, None
  for i, level in enumerate(levels):
    if i and level.kind == 'transformer':
      raise ValueError(
        f"model.levels[{i}].kind='transformer': only the innermost level, "
        "level 0, can be one; use 'unet'."
      )
    with naming(f'model.levels[{i}]'):
      spec = level_spec(level)
    is_nested = i and not config.model.cascade
    if not is_nested and spec.channels[-1] % spec.num_heads:
      raise ValueError(
        f'model.levels[{i}].num_heads={spec.num_heads} does not divide the '
        f'{spec.channels[-1]} channels of its middle blocks.'
      )
    if level.temporal_dim != levels[0].temporal_dim:
      raise ValueError(
        f'model.levels[{i}].temporal_dim={level.temporal_dim}: all levels '
        f'must have the same, and level 0 has {levels[0].temporal_dim}.'
      )
    bottom, odd = divmod(level.resolution, spec.downsampling)
    if odd:
      raise ValueError(
        f'model.levels[{i}].resolution={level.resolution} cannot be divided '
        f'into patches of {spec.patch_size} px and halved '
        f'{len(spec.channels) - 1} times: use a multiple of '
        f'{spec.downsampling}, or fewer entries in channels.'
      )
    if is_nested:
      _check_sizes(levels, i)
      inner = levels[i - 1].resolution // levels[i - 1].patch_size
      if bottom != inner:
        raise ValueError(
          f'model.levels[{i}].resolution={level.resolution} with patches of '
          f'{spec.patch_size} px, halved {len(spec.channels) - 1} times, gives '
          f'{bottom} px, but level {i - 1} works at {inner}: change either.'
        )
    channels = image_channels(config, level)
    spec = dataclasses.replace(spec, image_channels=channels)
    with naming(f'model.levels[{i}]'):
      shared_layers(spec, coarser)
    coarser = spec


def _check_sizes(levels: Sequence[ConfigDict], i: int) -> None:
  """Checks the size of a level of a nest. Raises ValueError."""
  coarse, fine = levels[i - 1], levels[i]
  if is_of_codes(coarse):  # `check_codes` compares the images.
    return
  if fine.resolution % coarse.resolution:
    raise ValueError(
      f'model.levels[{i}].resolution={fine.resolution}: give a multiple of the '
      f'{coarse.resolution} px of level {i - 1}, whose images are its averages.'
    )
  if (fine.resolution, fine.frames) == (coarse.resolution, coarse.frames):
    raise ValueError(
      f'model.levels[{i}] has the resolution and frames of level {i - 1}: give '
      'it more of either.'
    )


def _check_stage(
  config: ConfigDict, i: int, stage: ConfigDict, shards: int
) -> None:
  if stage.kind == AUTOENCODER:
    _check_autoencoder(config, i, stage)
  else:
    _check_levels_of_stage(config, i, stage)
  repeats = _num_repeats(i, stage)
  period = stage.batch_size // stage.accumulate // repeats
  if repeats % shards:
    parts = f' / {stage.accumulate}' if stage.accumulate > 1 else ''
    raise ValueError(
      f'stages[{i}].batch_size={stage.batch_size}{parts} does not give each '
      f'of the {shards} devices that the mesh spreads a batch over whole '
      f'patterns of mixed_ratio={tuple(stage.mixed_ratio)}, {period} '
      'examples each: use a multiple of '
      f'{period * shards * stage.accumulate}.'
    )


def _check_autoencoder(config: ConfigDict, i: int, stage: ConfigDict) -> None:
  named = f"stages[{i}].kind='{AUTOENCODER}'"
  if i:
    raise ValueError(
      f'{named}: only the first stage, stages[0], can be one; use '
      "kind='diffusion'."
    )
  if not config.autoencoder.resolution:
    raise ValueError(
      f'{named} with autoencoder.resolution=0: give the pixels a side of its '
      'images, such as autoencoder.resolution=64.'
    )
  for key, only in (
    ('num_levels', 0),
    ('loss_weights', ()),
    ('mixed_ratio', (1.0,)),
    ('max_frames', 0),
  ):
    if stage[key] != only:
      raise ValueError(
        f'stages[{i}].{key}={stage[key]} with kind={AUTOENCODER!r}: that is of '
        f'stages of diffusion; leave it at {only}.'
      )


def _check_levels_of_stage(
  config: ConfigDict, i: int, stage: ConfigDict
) -> None:
  if not 1 <= stage.num_levels <= len(config.model.levels):
    raise ValueError(
      f'stages[{i}].num_levels={stage.num_levels}: give 1 to '
      f'{len(config.model.levels)}, the number of model.levels.'
    )
  if config.model.cascade and stage.num_levels != i + 1:
    raise ValueError(
      f'stages[{i}].num_levels={stage.num_levels} with model.cascade=True: '
      f'each stage trains the next level, which samples need; give {i + 1}.'
    )
  if i and stage.num_levels < config.stages[i - 1].num_levels:
    raise ValueError(
      f'stages[{i}].num_levels={stage.num_levels} is less than that of the '
      'stage before: stages can only add levels.'
    )
  _check_frames(config, i, stage)
  count = len(trained_levels(config, stage))
  for key in ('loss_weights', 'mixed_ratio'):
    if len(stage[key]) != count:
      raise ValueError(
        f'stages[{i}].{key}={tuple(stage[key])}: give one number for each '
        f'of its {count} levels, coarse to fine.'
      )
  if not any(stage.loss_weights):
    raise ValueError(
      f'stages[{i}].loss_weights={stage.loss_weights}: give one above 0.'
    )


def _check_frames(config: ConfigDict, i: int, stage: ConfigDict) -> None:
  counts = frames(config, stage)
  for level, (coarse, fine) in enumerate(zip(counts, counts[1:]), 1):
    if fine % coarse:
      most = f' with stages[{i}].max_frames={stage.max_frames}'
      raise ValueError(
        f'model.levels[{level}].frames={fine}{most if stage.max_frames else ""}'
        f': give a multiple of the {coarse} of level {level - 1}.'
      )
  if i and any(
    new < old for new, old in zip(counts, frames(config, config.stages[i - 1]))
  ):
    raise ValueError(
      f'stages[{i}].max_frames={stage.max_frames} gives its levels fewer '
      'frames than the stage before: stages can only add frames.'
    )


def check_clip_times(config: ConfigDict) -> None:
  """Checks that each level sees the same times of a clip in all stages.

  Raises:
    ValueError: `max_frames` changes how many frames of a level stand for one of
      a coarser level.
  """
  for i, stage in enumerate(config.stages):
    if stage.kind == AUTOENCODER or stage.max_frames == 1:
      continue
    *coarser, finest = trained_levels(config, stage)
    *counts, most = frames(config, stage)
    for level, count in zip(coarser, counts):
      if level.frames > 1 and count * finest.frames != most * level.frames:
        raise ValueError(
          f'stages[{i}].max_frames={stage.max_frames}: its levels have '
          f'{level.frames} and {finest.frames} frames, and would have {count} '
          f'and {most}, other times of the clip; give 1 or 0.'
        )


def _num_repeats(i: int, stage: ConfigDict) -> int:
  """Number of patterns of a mixed batch in each of its microbatches."""
  with naming(f'stages[{i}].mixed_ratio'):
    repeats = mixed_batch.num_repeats(batch_sizes(stage))
  if repeats % stage.accumulate:
    raise ValueError(
      f'stages[{i}].accumulate={stage.accumulate} does not divide the '
      f'{repeats} patterns of mixed_ratio in its batch: use a divisor of '
      f'{repeats}.'
    )
  return repeats // stage.accumulate


def parts_of_batches(config: ConfigDict) -> list[int]:
  """For each batch of the run, the number of parts that it divides into.

  The parts are equal, and hold whole patterns of a mixed batch. Each microbatch
  counts as a batch.

  Raises:
    ValueError: `mixed_ratio` does not divide a stage's batch, or `accumulate`
      does not divide the patterns of its batch.
  """
  return [
    config.eval.batch_size,
    *(_num_repeats(i, stage) for i, stage in enumerate(config.stages)),
  ]
