"""Opens a training run for inference, the same way for every command.

`open_run` reads the configuration, makes a mesh of the available devices, and
checks that both fit; `Session.restore` then loads the weights.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders import ranges
from mdm_jax.builders.check import check
from mdm_jax.builders.check_levels import parts_of_batches
from mdm_jax.builders.config import (
  AUTOENCODER,
  differences,
  load_config,
  naming,
  read_config,
  reading_prompts,
)
from mdm_jax.builders.stage import Stage, make_stage
from mdm_jax.builders.text import load_frozen, make_tokenizer, text_fingerprint
from mdm_jax.inference.weights import (
  SavedWeights,
  Weights,
  restore_earlier,
  restore_weights,
)
from mdm_jax.runtime import cpu, sharding
from mdm_jax.runtime.environment import log_start
from mdm_jax.steps.state import Params


@dataclasses.dataclass(frozen=True)
class Model:
  """A stage of a run, with weights.

  Attributes:
    workdir: of the run.
    stage: the one asked for, or the last one that has the requested weights.
    weights: EMA weights of the trained parameters.
    params: all parameters that the model needs, on the mesh.
    mesh: the devices.
  """

  workdir: str
  stage: Stage
  weights: Weights
  params: Params
  mesh: Mesh

  @property
  def description(self) -> dict[str, str | int | None]:
    """Identifies the weights: stage, step, EMA, hash of the files. JSON."""
    return {
      'stage': self.stage.name,
      'step': self.weights.step,
      'weights': self.weights.ema,
      'fingerprint': self.weights.fingerprint,
    }

  @property
  def is_finished_stage(self) -> bool:
    """Whether training of the stage has ended, as far as these weights tell."""
    # The best EMA may be of an earlier step.
    return self.weights.best or self.weights.step >= self.stage.num_steps

  @property
  def is_finished(self) -> bool:
    """Whether training has ended, as far as these weights tell."""
    return self.stage.is_last and self.is_finished_stage

  def changed(
    self, sampler: Mapping[str, Any], evaluation: Mapping[str, Any]
  ) -> 'Model':
    """The same weights with other options, see `open_run`.

    Raises:
      ValueError: an option is wrong.
    """
    config = self.stage.config.copy_and_resolve_references()
    _change(config, sampler=sampler, eval=evaluation)
    config.eval.batch_size = sharding.round_up(
      config.eval.batch_size, self.mesh
    )
    check(config, self.mesh, training=False)
    return dataclasses.replace(
      self, stage=dataclasses.replace(self.stage, config=config)
    )


@dataclasses.dataclass(frozen=True)
class Session:
  """A run's configuration and a mesh; `restore` loads the weights.

  Attributes:
    workdir: of the run.
    config: of the run, with the options of `open_run`.
    mesh: the devices.
    stage, sigma_rel, best: which weights to restore, see `restore_weights`.
    moved: where files are now, by section and key of the config, also those of
      a guide.
  """

  workdir: str
  config: ConfigDict
  mesh: Mesh
  stage: str | None = None
  sigma_rel: float | None = None
  best: bool = False
  moved: Mapping[str, Mapping[str, str | None]] = dataclasses.field(
    default_factory=dict
  )

  def of(self, saved: SavedWeights) -> 'Session':
    """The same session, for other weights of the run."""
    return dataclasses.replace(
      self, stage=saved.stage, sigma_rel=saved.sigma_rel, best=saved.best
    )

  def restore(self) -> Model:
    """Loads the weights and the frozen parameters.

    Raises:
      FileNotFoundError, ValueError: see `restore_weights` and `load_frozen`.
    """
    stage, weights = self._restore_weights()
    log_start(
      weights=f'{self.workdir}: {stage.title}, step {weights.step} of '
      f'{stage.num_steps}, {weights.ema}'
    )
    model = self._load_frozen(stage, weights)
    # An earlier stage that was asked for is not taken for want of a later one.
    if not (model.is_finished or self.stage and model.is_finished_stage):
      logging.warning(
        'The run is not finished: this is %s at step %d of %d.',
        stage.title,
        weights.step,
        stage.num_steps,
      )
    return model

  def restore_guide(self, model: Model, workdir: str) -> Model:
    """Restores a guide, a worse model, for autoguidance (2406.02507).

    Args:
      model: the model to be guided.
      workdir: working directory of the guide's own run.

    Raises:
      FileNotFoundError: nothing has been saved there yet.
      ValueError: its resolutions, noise schedule or tokenizer are not those of
        `model`.
    """
    if model.stage.model.coarse_resolution:
      raise ValueError(
        f'guide={workdir}: a cascade cannot have a guide; leave it out.'
      )
    config = _read(workdir, any_prompt=True)
    _change(config, **self.moved)
    config.mesh.update(self.config.mesh)
    guide = Session(workdir, config, self.mesh)
    stage, weights = guide._restore_weights()
    if stage.model.coarse_resolution:
      raise ValueError(f'{workdir} cannot be the guide: it is a cascade.')
    if found := differences(_compared(model.stage), _compared(stage)):
      raise ValueError(
        f'{workdir} cannot be the guide: ' + '; '.join(found) + '.'
      )
    # What both need is in memory once.
    shared = {}
    if _have_one_encoder(self.config, config):
      shared = {'text_encoder': model.params['text_encoder']}
    guided_by = guide._load_frozen(stage, weights, shared)
    own, other = (
      jax.tree.leaves(each.params.get(AUTOENCODER, {}))
      for each in (model, guided_by)
    )
    if not all(map(np.array_equal, own, other)):
      raise ValueError(
        f'{workdir} cannot be the guide: its codes are of another autoencoder.'
      )
    if own:
      guided_by.params[AUTOENCODER] = model.params[AUTOENCODER]
    return guided_by

  def _restore_weights(self) -> tuple[Stage, Weights]:
    weights = restore_weights(
      self.config,
      self.workdir,
      self.mesh,
      stage=self.stage,
      sigma_rel=self.sigma_rel,
      best=self.best,
    )
    require_generative(self.config, self.workdir, weights)
    return make_stage(self.config, weights.index), weights

  def _load_frozen(
    self, stage: Stage, weights: Weights, frozen: Params | None = None
  ) -> Model:
    params = (
      weights.params
      | (frozen or load_frozen(self.config, self.mesh))
      | restore_earlier(stage, self.workdir, self.mesh)
    )
    return Model(self.workdir, stage, weights, params, self.mesh)


def open_run(
  workdir: str,
  *,
  any_prompt: bool = False,
  sampler: Mapping[str, Any] | None = None,
  evaluation: Mapping[str, Any] | None = None,
  text_path: str | None = None,
  tokenizer: str | None = None,
  data_path: str | None = None,
  spatial: int = 1,
  stage: str | None = None,
  sigma_rel: float | None = None,
  best: bool = False,
) -> Session:
  """Opens a run on the available devices.

  Call it before JAX is used, as it sets the number of CPU devices. The training
  mesh is ignored: images are spread over all devices, and `eval.batch_size` is
  rounded up to a multiple of them.

  Args:
    workdir: of the run.
    any_prompt: whether prompts are arbitrary texts: a run on precomputed
      features then loads the T5.
    sampler: keys of `config.sampler` to change; None leaves a value as it is.
    evaluation: keys of `config.eval` to change; None leaves a value as it is.
    text_path, tokenizer, data_path: where the T5, the tokenizer and the data
      set are, if they have moved since training.
    spatial: devices that share the rows of each image.
    stage, sigma_rel, best: which weights to restore, see `restore_weights`.

  Raises:
    FileNotFoundError, ValueError: the run's config is missing or wrong, here or
      with these options; one line that names the remedy.
  """
  with naming(f'spatial={spatial!r}'):
    spatial = ranges.KEYS['mesh.spatial'].check(spatial)
  if sigma_rel is not None:
    with naming(f'sigma_rel={sigma_rel!r}'):
      sigma_rel = ranges.SIGMA_REL.check(sigma_rel)
  config = _read(workdir, any_prompt)
  moved = {
    'text': {'path': text_path, 'tokenizer': tokenizer},
    'data': {'path': data_path},
  }
  _change(config, sampler=sampler, eval=evaluation, **moved)
  config.mesh.update(data=-1, fsdp=1, spatial=spatial)
  cpu.use_cores(parts_of_batches(config))
  mesh = sharding.make_mesh(config.mesh)
  config.eval.batch_size = sharding.round_up(config.eval.batch_size, mesh)
  check(config, mesh, training=False)
  return Session(workdir, config, mesh, stage, sigma_rel, best, moved)


def read_weights(workdir: str) -> tuple[ConfigDict, Weights]:
  """The config and the newest EMA weights in host memory, to export them.

  They include those of earlier stages that the model needs.
  """
  config = _read(workdir)
  weights = restore_weights(config, workdir)
  require_generative(config, workdir, weights)
  earlier = restore_earlier(make_stage(config, weights.index), workdir)
  return config, weights._replace(params=weights.params | earlier)


def require_generative(
  config: ConfigDict, workdir: str, weights: Weights
) -> None:
  """Raises ValueError if the weights are of an autoencoder."""
  stage = config.stages[weights.index]
  if stage.kind != AUTOENCODER:
    return
  others = [each.name for each in config.stages if each.kind != AUTOENCODER]
  remedy = (
    f'train {" or ".join(map(repr, others))}, or give it as the stage'
    if others
    else 'train a run that has stages of diffusion too'
  )
  raise ValueError(
    f'{workdir}: stage {stage.name!r} is an autoencoder, which makes no images '
    f'of prompts: {remedy}.'
  )


def _change(config: ConfigDict, **sections: Mapping[str, Any] | None) -> None:
  """Changes keys of sections; None leaves a value as it is.

  Raises:
    ValueError: a value is wrong.
  """
  for section, changes in sections.items():
    for key, value in (changes or {}).items():
      if value is not None:
        with naming(f'{section}.{key}={value!r}'):
          config[section][key] = ranges.KEYS[f'{section}.{key}'].check(value)


def _read(workdir: str, any_prompt: bool = False) -> ConfigDict:
  config = load_config(read_config(workdir))
  with naming(f'{workdir}/config.json'):
    ranges.check(config)
  return reading_prompts(config) if any_prompt else config


def _have_one_encoder(*configs: ConfigDict) -> bool:
  """Whether the frozen parameters of two runs are the same T5, in one dtype."""
  if any(config.text.encoder != 't5' for config in configs):
    return False
  own, other = (
    (config.dtype, text_fingerprint(config)['encoder']) for config in configs
  )
  return own == other


def _compared(stage: Stage) -> dict[str, Any]:
  """What a model and its guide must have in common."""
  config = stage.config
  return {
    'resolutions': stage.resolutions,
    'levels': stage.model.level_shapes,
    'diffusion': {
      # The others matter to the loss alone.
      key: config.diffusion[key]
      for key in (
        'schedule',
        'num_steps',
        'reference_resolution',
        'parameterization',
        'level_times',
        'level_offset',
      )
    },
    'shift_power': stage.settings.shift_power,
    'frame_shift_power': stage.settings.frame_shift_power,
    'tokenizer': make_tokenizer(config).fingerprint(),
    'text.max_length': config.text.max_length,
  }
