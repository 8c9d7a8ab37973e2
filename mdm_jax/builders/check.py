"""Checks a configuration before anything is compiled."""

from collections.abc import Sequence

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders import ranges
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.check_levels import (
  check_cascade,
  check_clip_times,
  check_codes,
  check_stages,
)
from mdm_jax.builders.config import AUTOENCODER, TRAINED_ENCODERS
from mdm_jax.builders.data import (
  DRAWN,
  current_name,
  held_out_name,
  loss_names,
)
from mdm_jax.builders.model import level_names, trained_levels
from mdm_jax.builders.prompts import can_score_prompts, is_moving
from mdm_jax.builders.text import make_tokenizer, text_fingerprint
from mdm_jax.data import precomputed, tfds_source
from mdm_jax.diffusion.schedule import make_gammas
from mdm_jax.eval import prompt_accuracy
from mdm_jax.steps import autoencoder

# Share of the signal in the variance at the last noising step, at most. Of any
# number of steps, 'cosine' has .0067.
_MOST_SIGNAL = 0.02


def check(
  config: ConfigDict, mesh: Mesh, training: bool = True, begun: bool = False
) -> Sequence[BaseStage]:
  """Checks a whole configuration against the devices that it will run on.

  Args:
    config: configuration of the run.
    mesh: the devices.
    training: whether the stages are to be trained on these devices.
    begun: whether a run continues, in which what its version accepted may stay.

  Returns:
    The stages of the run.

  Raises:
    FileNotFoundError: a file that the configuration names is missing.
    ValueError: a value is wrong. The message names the key and the remedy.
  """
  ranges.check(config)
  _check_text(config, training)
  _check_objective(config)
  _check_level_times(config)
  check_cascade(config)
  check_codes(config)
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
  if training:  # Whatever an earlier version has trained can be sampled.
    _check_loss(config)
    check_clip_times(config)
    if not begun:
      _check_noise(config)
      _check_unused(config)
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


def metric_names(
  config: ConfigDict, stage: ConfigDict | None = None
) -> tuple[list[str], list[str]]:
  """The held-out losses and the scores that a stage is measured by.

  Args:
    config: of the run.
    stage: section of the stage; None for the last one.
  """
  stage, scores = stage or config.stages[-1], []
  if stage.kind == AUTOENCODER:
    return [held_out_name(config, name) for name in autoencoder.MEASURED], []
  losses = loss_names(config, level_names(config, stage))
  if can_score_prompts(config):
    names = prompt_accuracy.NAMES
    if is_moving(config, stage):
      names += prompt_accuracy.MOTION_ATTRIBUTES
    scores = [f'accuracy_{name}' for name in names]
  return list(losses), scores


def _check_text(config: ConfigDict, training: bool) -> None:
  text = config.text
  needs_t5 = text.encoder not in TRAINED_ENCODERS
  if needs_t5 and not (text.path and epath.Path(text.path).is_dir()):
    wrong = f'={text.path!r} is no directory' if text.path else ' is empty'
    raise ValueError(
      f'text.path{wrong}: name the directory of a T5 encoder, downloaded '
      'from google/flan-t5-xl for example, --config.text.path=DIR; '
      'sample, evaluate and demo take --text_path=DIR.'
    )
  if text.encoder == 'learned' and text.width % 2:
    raise ValueError(f'text.width={text.width}: give an even number.')
  make_tokenizer(config)
  if text.encoder == 'precomputed':
    data = config.data
    sets = [('name', data.name, data.path)]
    # That a path is missing is named with the image set.
    if training and (data.image_path or data.image_set in DRAWN):
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
  bounded = _has_bounded_weights(diffusion)
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


def _has_bounded_weights(diffusion: ConfigDict) -> bool:
  """Whether no time counts without limit, in whatever space the loss is."""
  return diffusion.time_weights in ('min_snr', 'sigmoid') or (
    diffusion.time_weights == 'p2' and diffusion.p2[0] >= 1
  )


def _check_loss(config: ConfigDict) -> None:
  """Checks that the loss does not divide by a signal that is nearly 0."""
  diffusion = config.diffusion
  predicted, space = diffusion.parameterization, diffusion.loss_space
  if predicted == 'eps' != space and not _has_bounded_weights(diffusion):
    raise ValueError(
      f"diffusion.loss_space={space!r} with parameterization='eps': the loss "
      'divides by the signal, which is nearly 0 at the last noising step; give '
      "loss_space='eps', parameterization='v', or time_weights='min_snr'."
    )


def _check_noise(config: ConfigDict) -> None:
  """Checks that training sees the noise alone with which sampling begins."""
  schedule, steps = config.diffusion.schedule, config.diffusion.num_steps
  left = make_gammas(schedule, steps)[-1]
  if left > _MOST_SIGNAL:
    raise ValueError(
      f'diffusion.num_steps={steps} with schedule={schedule!r}: at the last '
      f'noising step {left:.0%} of the variance is signal, but sampling begins '
      "with noise alone; give more, such as 1000, or schedule='deepfloyd'."
    )


def _check_unused(config: ConfigDict) -> None:
  """Refuses keys that would do nothing."""
  levels = config.model.levels
  for i, level in enumerate(levels):
    if level.frames == 1 and any(level.frame_attention):
      raise ValueError(
        f'model.levels[{i}].frame_attention={tuple(level.frame_attention)} '
        'with frames=1: images have no frames to attend to; give ().'
      )
    kind = level.frame_attention_kind
    if kind != 'divided' and not any(level.frame_attention):
      raise ValueError(
        f'model.levels[{i}].frame_attention_kind={kind!r} with frame_attention='
        f'{tuple(level.frame_attention)}: no layer has it; '
        "give 'divided'."
      )
  for i, stage in enumerate(config.stages):
    for key, unused in (('frame_shift_power', 0.0), ('max_frames', 0)):
      if stage[key] and all(level.frames == 1 for level in levels):
        raise ValueError(
          f'stages[{i}].{key}={stage[key]}: no level has clips; give {unused}.'
        )
  resolution = config.autoencoder.resolution
  if resolution and all(stage.kind != AUTOENCODER for stage in config.stages):
    raise ValueError(
      f'autoencoder.resolution={resolution}: no stage trains it; give 0, or '
      f"stages[0].kind='{AUTOENCODER}'."
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
