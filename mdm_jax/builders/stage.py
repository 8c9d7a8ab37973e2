"""`Stage`: model, objective, optimizer and sampler of a stage, built once."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from mdm_jax import mixed_batch
from mdm_jax.builders import data
from mdm_jax.builders.autoencoder_stage import AutoencoderStage
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import AUTOENCODER, naming
from mdm_jax.builders.model import (
  coarse_resolution,
  frames,
  level_names,
  make_autoencoder,
  make_model,
  resolutions,
)
from mdm_jax.builders.text import empty_text
from mdm_jax.diffusion.augmentation import Augmentation
from mdm_jax.diffusion.loss import TimeDensity
from mdm_jax.diffusion.schedule import Schedule, make_schedule, offset_levels
from mdm_jax.diffusion.weights import level_weights, vdm_weights
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.optim import optimizer
from mdm_jax.optim.skip_step import SkipRule
from mdm_jax.steps.evaluate import make_band_step
from mdm_jax.steps.objective import Objective
from mdm_jax.steps.sample import SampleFn, make_sample_fn
from mdm_jax.steps.sampler import Sampler, SamplerSpec
from mdm_jax.steps.state import Params
from mdm_jax.steps.train import make_train_step


@dataclasses.dataclass(frozen=True)
class Stage(BaseStage):
  """A stage that trains the network of diffusion.

  Attributes:
    model: network and text encoder.
    objective: what is minimised.
  """

  model: Matryoshka
  objective: Objective

  @property
  def is_generative(self) -> bool:
    """Whether it makes images of prompts."""
    return True

  @property
  def frame_spacing(self) -> int:
    """Of clips in files, the finest level has every nth frame.

    A level that is coarser in time than one of a later stage sees, from its own
    stage on, frames as far apart as it will inside of that one.
    """
    levels = self.config.model.levels
    return levels[-1].frames // levels[self.settings.num_levels - 1].frames

  @functools.cached_property
  def coarser(self) -> 'Stage | None':
    """In a cascade, the stage whose samples this one is given."""
    if self.model.coarse_resolution is None:
      return None
    return make_stage(self.config, self.index - 1)

  @property
  def sampled_resolutions(self) -> tuple[int, ...]:
    """Resolutions in pixels of what it samples, coarse to fine.

    In a cascade they include those of the coarser models.
    """
    before = self.coarser.sampled_resolutions if self.coarser else ()
    return before + self.resolutions

  @property
  def level_names(self) -> tuple[str, ...]:
    """Names of the levels, coarse to fine, see `mixed_batch.level_name`."""
    return level_names(self.config, self.settings)

  @property
  def measured(self) -> tuple[str, ...]:
    """Names of what `make_validation_step` measures."""
    return tuple(data.loss_names(self.config, self.level_names))

  @property
  def loss_settings(self) -> dict[str, Any]:
    """What it measures depends on, beside weights and data. JSON."""
    floor = self.objective.noise_floor
    # Recorded only where it is set, so that earlier losses can be compared.
    floors = {'noise_floor': floor} if floor else {}
    return {'loss_space': self.objective.loss_space} | floors

  def param_shapes(self) -> Params:
    """Shapes and dtypes of the trained parameters."""
    return self.model.shapes(self.config.text.max_length)

  def earlier_params(self, params_of: Callable[[BaseStage], Params]) -> Params:
    """The parameters of earlier stages that the model needs beside its own.

    Args:
      params_of: the parameters of a stage, or their shapes.

    Returns:
      {'coarser': ...} for a level of a cascade: those of the stage before, in
      which those of still coarser levels are nested. {'autoencoder': ...} where
      a level denoises its codes. {} for all others.
    """
    if self.coarser:
      before = self.coarser
      return {'coarser': params_of(before) | before.earlier_params(params_of)}
    if self.model.autoencoder:
      return params_of(make_stage(self.config, 0))
    return {}

  def init(self) -> Params:
    """Fresh float32 parameters on the host."""
    return self.model.init(self.seed, self.config.text.max_length)

  def make_train_step(self, empty_text: np.ndarray, mesh: Mesh) -> Callable:
    """The training step, see `steps.train.make_train_step`.

    Args:
      empty_text: the empty caption as the text encoder reads it.
      mesh: the devices.
    """
    return make_train_step(
      self.model,
      self.objective,
      self.optimizer,
      skip_rule=self.skip_rule,
      ema_decay=self.config.optimizer.ema_decay,
      caption_dropout=self.config.text.caption_dropout,
      empty_text=empty_text,
      seed=self.seed,
      accumulate=self.settings.accumulate,
      mesh=mesh,
    )

  def make_validation_step(self, seed: int) -> Callable:
    """The losses of the levels, see `make_band_step`."""
    return make_band_step(self.model, self.objective, seed, 1)

  def parts_of_loss(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The losses of the levels, by their names."""
    return dict(zip(self.level_names, map(float, means['level_losses'])))

  def training_metrics(
    self, means: Mapping[str, np.ndarray]
  ) -> dict[str, dict[str, float]]:
    """Losses of the levels, also by band of noise that has any examples."""
    sums, counts = means['noise_sums'], means['noise_counts']
    width = 100 // sums.shape[1]
    return {
      'train': {
        f'loss_{name}': value
        for name, value in self.parts_of_loss(means).items()
      },
      'train_noise': {
        f'loss_{name}_noise_{width * band}_{width * (band + 1)}': sums[i, band]
        / counts[i, band]
        for i, name in enumerate(self.level_names)
        for band in range(sums.shape[1])
        if counts[i, band] > 0
      },
    }

  def make_sampler(
    self, mesh: Mesh, guide: Matryoshka | None = None, **changes: Any
  ) -> Sampler:
    """The sampler of the config with the stage's network.

    Args:
      mesh: the devices.
      guide: the network of a guide, see `Sampler`.
      **changes: fields of `SamplerSpec` that are not as in the config.

    Raises:
      ValueError: the levels cannot have so few frames.
    """
    spec = SamplerSpec(**{**self.config.sampler, **changes})
    schedule, model = self.objective.schedule, self.model
    if spec.level_offset:
      schedule = offset_levels(schedule, spec.level_offset)
    if 0 < spec.frames < model.unet.levels[-1].frames:
      model = model.with_frames(spec.frames)
      guide = guide and guide.with_frames(spec.frames)
    return Sampler(
      model,
      schedule,
      spec,
      mesh,
      self.objective.parameterization,
      guide,
      self.coarser and self.coarser.make_sampler(mesh, **changes),
      self.objective.augmentation,
    )

  def make_sample_fn(
    self, mesh: Mesh, params: Params, **changes: Any
  ) -> SampleFn:
    """Jits the sampler for batches of `eval.batch_size`.

    Args:
      mesh: the devices.
      params: parameters whose shardings it is compiled for.
      **changes: as for `make_sampler`.
    """
    return make_sample_fn(
      self.make_sampler(mesh, **changes),
      empty_text(self.config),
      self.config.eval.batch_size,
      jax.tree.map(lambda x: x.sharding, params),
    )

  def forward_flops(self, frozen: Params, text: jax.Array) -> float | None:
    """See `BaseStage.forward_flops`."""
    # Shapes: an earlier stage may not have been trained yet.
    earlier = self.earlier_params(lambda each: each.param_shapes())
    params = self.param_shapes() | earlier | frozen
    sizes = self.batch_sizes
    images = tuple(
      jax.ShapeDtypeStruct((size, *shape), jnp.float32)
      for size, shape in zip(sizes, self.model.image_shapes)
    )
    texts = jax.ShapeDtypeStruct((sizes[0], *text.shape[1:]), text.dtype)
    t = jax.ShapeDtypeStruct(sizes[:1], jnp.float32)

    def forward(params, texts, images, t):
      x_t = self.model.to_codes(params, images)
      cond = self.model.encode(params, texts)
      cond = cond._replace(**self.model.placeholder_coarse(sizes[0]))
      repeats = mixed_batch.num_repeats(sizes)
      return self.model.denoise(params, x_t, t, cond, repeats)

    lowered = jax.jit(forward).lower(params, texts, images, t)
    return (lowered.cost_analysis() or {}).get('flops')


def make_stage(config: ConfigDict, index: int) -> BaseStage:
  """Describes a stage of a run.

  Raises:
    ValueError, FileNotFoundError: values that do not fit together, or files of
      the text encoder that cannot be used.
  """
  settings = config.stages[index]
  update, learning_rate = make_optimizer(config, settings)
  common = {
    'config': config,
    'index': index,
    'optimizer': update,
    'learning_rate': learning_rate,
    'skip_rule': make_skip_rule(config),
    'batch_sizes': batch_sizes(settings),
  }
  if settings.kind == AUTOENCODER:
    return AutoencoderStage(model=make_autoencoder(config), **common)
  return Stage(
    model=make_model(config, settings),
    objective=make_objective(config, settings),
    **common,
  )


def make_stages(config: ConfigDict) -> Sequence[BaseStage]:
  """Describes all stages of a run, see `make_stage`."""
  return [make_stage(config, index) for index in range(len(config.stages))]


def batch_sizes(stage: ConfigDict) -> tuple[int, ...]:
  """How many examples of its batch each level sees, coarse to fine.

  Raises:
    ValueError: `mixed_ratio` does not divide the batch into whole examples.
  """
  return mixed_batch.level_batch_sizes(
    stage.batch_size, mixed_batch.batch_fractions(stage.mixed_ratio)
  )


def make_objective(config: ConfigDict, stage: ConfigDict) -> Objective:
  """What a stage minimises."""
  diffusion = config.diffusion
  schedule = _make_noise_schedule(config, stage)
  return Objective(
    schedule=schedule,
    parameterization=diffusion.parameterization,
    loss_space=diffusion.loss_space,
    weights=tuple(stage.loss_weights),
    fractions=mixed_batch.batch_fractions(stage.mixed_ratio),
    time_weights=_make_time_weights(config, schedule),
    normalize_weights=diffusion.normalize_time_weights,
    density=TimeDensity(
      diffusion.time_density,
      diffusion.logit_normal,
      diffusion.stratified_times,
    ),
    independent_times=diffusion.level_times == 'independent',
    noise_floor=diffusion.noise_floor,
    augmentation=_make_augmentation(config, stage),
  )


def _make_augmentation(
  config: ConfigDict, stage: ConfigDict
) -> Augmentation | None:
  """Noise of the images that a level of a cascade is given."""
  coarse = coarse_resolution(config, stage)
  if coarse is None:
    return None
  schedule = make_schedule(
    config.diffusion.schedule,
    [coarse],
    stage.shift_power,
    config.diffusion.num_steps,
    reference_resolution=_reference_resolution(config),
  )
  return Augmentation(schedule, config.diffusion.augmentation)


def make_optimizer(
  config: ConfigDict, stage: ConfigDict
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The stage's optimizer, and its learning rate at each step.

  Raises:
    ValueError: an unknown optimizer or decay.
  """
  options = dict(config.optimizer)
  options.pop('ema_decay')
  learning_rate = optimizer.learning_rate_schedule(
    stage.learning_rate,
    warmup_steps=stage.warmup_steps,
    decay=options.pop('decay'),
    num_steps=stage.steps,
  )
  return optimizer.make_optimizer(learning_rate, **options), learning_rate


def make_skip_rule(config: ConfigDict) -> SkipRule:
  """Which steps are skipped.

  Raises:
    ValueError: a value is out of range.
  """
  with naming('guard'):
    return SkipRule(**config.guard)


def _make_noise_schedule(config: ConfigDict, stage: ConfigDict) -> Schedule:
  """The stage's noise schedule, a row for each level."""
  return make_schedule(
    config.diffusion.schedule,
    resolutions(config, stage),
    stage.shift_power,
    config.diffusion.num_steps,
    config.diffusion.level_offset,
    _reference_resolution(config),
    frames(config, stage),
    stage.frame_shift_power,
  )


def _reference_resolution(config: ConfigDict) -> int:
  """Side in pixels of images whose schedule is not shifted.

  By default those of the coarsest level, also for later models of a cascade.
  """
  diffusion = config.diffusion
  return diffusion.reference_resolution or config.model.levels[0].resolution


def _make_time_weights(
  config: ConfigDict, schedule: Schedule
) -> np.ndarray | None:
  """Weights of the noising steps in the loss; None for equal weights.

  Raises:
    ValueError: a weight is beyond what float32 holds.
  """
  diffusion = config.diffusion
  match diffusion.time_weights:
    case 'none':
      return None
    case 'vdm':
      return vdm_weights(schedule.gammas[0])
  weights = level_weights(
    diffusion.time_weights,
    schedule,
    diffusion.loss_space,
    min_snr_gamma=diffusion.min_snr_gamma,
    sigmoid_bias=diffusion.sigmoid_bias,
    p2=diffusion.p2,
  )
  if not (np.isfinite(weights).all() and weights.any()):
    raise ValueError(
      f'diffusion.time_weights={diffusion.time_weights!r}: its weights are 0 '
      'or infinite in float32; give other parameters, such as p2=(1.0, 1.0), '
      'or fewer diffusion.num_steps.'
    )
  return weights
