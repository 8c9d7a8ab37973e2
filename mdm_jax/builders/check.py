"""Checks a configuration before anything is compiled."""

from collections.abc import Sequence
import dataclasses
import math

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders import ranges
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import AUTOENCODER, TRAINED_ENCODERS, naming
from mdm_jax.builders.data import (
  DRAWN,
  current_name,
  held_out_name,
  loss_names,
)
from mdm_jax.builders.model import (
  frames,
  image_channels,
  is_of_codes,
  level_names,
  level_spec,
  make_autoencoder,
  trained_levels,
)
from mdm_jax.builders.prompts import can_score_prompts, is_moving
from mdm_jax.builders.stage import batch_sizes, make_stages
from mdm_jax.builders.text import make_tokenizer, text_fingerprint
from mdm_jax.data import precomputed, tfds_source
from mdm_jax.eval import prompt_accuracy
from mdm_jax.models.shared_layers import shared_layers
from mdm_jax.runtime import sharding
from mdm_jax.steps import autoencoder


def check(
  config: ConfigDict, mesh: Mesh, training: bool = True
) -> Sequence[BaseStage]:
  """Checks a whole configuration against the devices that it will run on.

  Args:
    config: configuration of the run.
    mesh: the devices.
    training: whether the stages are to be trained on these devices.

  Returns:
    The stages of the run.

  Raises:
    FileNotFoundError: a file that the configuration names is missing.
    ValueError: a value is wrong. The message names the key and the remedy.
  """
  ranges.check(config)
  _check_text(config)
  _check_objective(config)
  _check_level_times(config)
  _check_cascade(config)
  _check_codes(config)
  _check_sampler(config)
  _check_averages(config)
  _check_evaluation(config)
  least = max(config.eval.num_prompts, config.eval.batch_size)
  if config.data.name in DRAWN and config.data.size < least:
    raise ValueError(
      f'data.size={config.data.size}: the evaluation needs {least} scenes. '
      'Increase it, or lower eval.num_prompts and eval.batch_size.'
    )
  stages = check_stages(config, mesh, training)
  _check_image_set(config, stages)
  return stages


def _check_image_set(config: ConfigDict, stages: Sequence[BaseStage]) -> None:
  data = config.data
  if not data.image_set:
    return
  named = f'data.image_set={data.image_set!r}'
  if all(level.frames == 1 for level in config.model.levels):
    raise ValueError(f'{named}: no level has clips. Set data.name to the set.')
  # The finest level of some examples has one frame.
  if not any(
    len(stage.model.image_shapes[level]) == 3
    for stage in stages
    for level in mixed_batch.finest_levels(stage.batch_sizes)
  ):
    raise ValueError(
      f'{named}: no stage is trained on images. Give one max_frames=1, or a '
      'mixed_ratio above 0 for a level of one frame.'
    )
  if data.image_set not in DRAWN and not data.image_path:
    raise ValueError(
      f'{named}: name its directory, --config.data.image_path=DIR.'
    )


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


def metric_names(config: ConfigDict) -> tuple[list[str], list[str]]:
  """The held-out losses and the scores that the last stage is measured by."""
  last, scores = config.stages[-1], []
  if last.kind == AUTOENCODER:
    return [held_out_name(config, name) for name in autoencoder.MEASURED], []
  losses = loss_names(config, level_names(config, last))
  if can_score_prompts(config):
    names = prompt_accuracy.NAMES
    if is_moving(config):
      names += prompt_accuracy.MOTION_ATTRIBUTES
    scores = [f'accuracy_{name}' for name in names]
  return list(losses), scores


def _check_text(config: ConfigDict) -> None:
  text = config.text
  needs_t5 = text.encoder not in TRAINED_ENCODERS
  if needs_t5 and not (text.path and epath.Path(text.path).is_dir()):
    wrong = f'={text.path!r} is no directory' if text.path else ' is empty'
    raise ValueError(
      f'text.path{wrong}: name the directory of a T5 encoder, downloaded '
      'from google/flan-t5-xl for example, --config.text.path=DIR.'
    )
  if text.encoder == 'learned' and text.width % 2:
    raise ValueError(f'text.width={text.width}: give an even number.')
  make_tokenizer(config)
  if text.encoder == 'precomputed':
    data = config.data
    sets = [('name', data.name, data.path)]
    # That a path is missing is named with the image set.
    if data.image_path or data.image_set in DRAWN:
      sets.append(('image_set', data.image_set, data.image_path))
    for key, name, path in sets:
      _check_precomputed(config, f'data.{key}={name!r}', name, path)


def _check_precomputed(
  config: ConfigDict, named: str, name: str, path: str
) -> None:
  if name not in ('captioned_images', 'tars'):
    raise ValueError(
      f"text.encoder='precomputed' with {named}: only a prepared data set and "
      'an index of tars can have text features beside them.'
    )
  if name != 'tars':
    tfds_source.require_local(path)
  precomputed.require_same(
    path, precomputed.read_info(path), text_fingerprint(config)
  )


def _check_objective(config: ConfigDict) -> None:
  diffusion = config.diffusion
  if (
    diffusion.time_density == 'logit_normal' and diffusion.logit_normal[1] <= 0
  ):
    raise ValueError(
      f'diffusion.logit_normal={diffusion.logit_normal}: give a mean and a '
      'standard deviation above 0.'
    )
  predicted = diffusion.parameterization
  divides = predicted == 'x0' != diffusion.loss_space
  bounded = diffusion.time_weights in ('min_snr', 'sigmoid') or (
    diffusion.time_weights == 'p2' and diffusion.p2[0] >= 1
  )
  if diffusion.noise_floor and not (divides and not bounded):
    raise ValueError(
      f'diffusion.noise_floor={diffusion.noise_floor}: it is for '
      "parameterization='x0' with another loss_space and without the bounded "
      'time_weights, where the loss divides by the noise; give 0.0.'
    )
  if diffusion.schedule != 'linear':
    return
  if predicted not in ('velocity', 'x0'):
    raise ValueError(
      f"diffusion.parameterization={predicted!r} with schedule='linear': use "
      'velocity or x0. v is that of the other schedules, and from eps no image '
      'follows where the linear path begins, in pure noise.'
    )
  if diffusion.loss_space == 'v':
    raise ValueError(
      "diffusion.loss_space='v' with schedule='linear': use velocity, eps or "
      'x0; v is that of the other schedules.'
    )
  if divides and not bounded and not diffusion.noise_floor:
    raise ValueError(
      "diffusion.parameterization='x0' with schedule='linear' and "
      f'loss_space={diffusion.loss_space!r}: the loss divides by the noise, '
      'which is 0 at t = 0; give diffusion.noise_floor, such as 0.05, '
      "loss_space='x0', or time_weights='min_snr'."
    )


def _check_codes(config: ConfigDict) -> None:
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


def _check_cascade(config: ConfigDict) -> None:
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


def _check_level_times(config: ConfigDict) -> None:
  diffusion, offset = config.diffusion, config.sampler.level_offset
  if not config.stages:
    return  # `check_stages` names that.
  levels = max(len(trained_levels(config, x)) for x in config.stages)
  if diffusion.level_times != 'shared' and levels < 2:
    raise ValueError(
      f'diffusion.level_times={diffusion.level_times!r} with a single level: '
      "use 'shared'."
    )
  if diffusion.level_times == 'coarse_first' and not diffusion.level_offset:
    raise ValueError(
      "diffusion.level_times='coarse_first' with level_offset=0.0: give the "
      'nats of logSNR between levels, such as diffusion.level_offset=2.0.'
    )
  if diffusion.level_offset and diffusion.level_times != 'coarse_first':
    raise ValueError(
      f'diffusion.level_offset={diffusion.level_offset} with level_times='
      f"{diffusion.level_times!r}: give 0.0, or level_times='coarse_first'."
    )
  if offset and diffusion.level_times != 'independent':
    raise ValueError(
      f'sampler.level_offset={offset} with diffusion.level_times='
      f'{diffusion.level_times!r}: give 0.0; only networks that were trained '
      'with independent times can be sampled with an offset.'
    )


def _check_sampler(config: ConfigDict) -> None:
  sampler, total = config.sampler, config.diffusion.num_steps
  if sampler.num_steps > total:
    raise ValueError(
      f'sampler.num_steps={sampler.num_steps}: give an integer from 1 to '
      f'{total:,}, diffusion.num_steps.'
    )
  low, high = sampler.guidance_interval
  if not low < high:
    raise ValueError(
      f'sampler.guidance_interval={sampler.guidance_interval}: give two '
      'rising shares, from 0 to 1.'
    )


def _check_averages(config: ConfigDict) -> None:
  """Checks the post-hoc EMAs to track."""
  widths = config.averages.widths
  if len(set(widths)) < len(widths):
    raise ValueError(f'averages.widths={widths}: they must differ.')


def _check_evaluation(config: ConfigDict) -> None:
  settings = config.eval
  metric = settings.best_metric
  if not metric or not config.stages:
    return
  losses, scores = metric_names(config)
  if current_name(config, metric) not in losses + scores:
    raise ValueError(
      f'eval.best_metric={metric!r}: use one of {losses + scores}.'
    )
  if not settings.every and (metric in scores or not settings.loss_every):
    raise ValueError(
      f'eval.best_metric={metric!r} with eval.every=0: give the steps between '
      'two evaluations.'
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
