"""Metrics of a stage on held-out data, while it trains and at its end."""

from collections.abc import Callable, Iterable, Mapping
import pathlib
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from mdm_jax.builders.data import held_out_split
from mdm_jax.builders.prompts import (
  can_score_prompts,
  make_prompts,
  make_vocabulary,
)
from mdm_jax.builders.stage import Stage
from mdm_jax.checkpoint.saved_steps import CheckpointError
from mdm_jax.eval import prompt_accuracy
from mdm_jax.inference.weights import restore_weights
from mdm_jax.report import console
from mdm_jax.runtime import files, sharding
from mdm_jax.steps.evaluate import make_eval_step
from mdm_jax.steps.sample import SampleFn
from mdm_jax.steps.state import Params

# Prompts in the sample grids of training.
GRID_PROMPTS = 16
LOSS_SEED = 1


def validate_last(
  stage: Stage, workdir: str, mesh: Mesh, frozen: Params
) -> dict[str, float]:
  """Metrics of a run's last stage at its end, see `make_validation`.

  Logs a table and writes `eval/<step>.json`, which is read back if it exists.

  Args:
    stage: the last one of the run.
    workdir: of the run.
    mesh: the devices.
    frozen: parameters that the model needs beside the trained ones.
  """
  values = None
  try:
    values = read_metrics(stage, workdir)
  except files.UnreadableFile as error:
    logging.warning('%s: it is made anew.', error)
  if values is None:
    weights = restore_weights(stage.config, workdir, mesh)
    if weights.index != stage.index:
      raise CheckpointError(
        f'{stage.directory(workdir)} has no checkpoint: restore one from a '
        'backup, or remove the directory to train the stage again.'
      )
    values = validate(stage, mesh, weights.params | frozen)
    write_metrics(stage, workdir, values)
  logging.info(
    'Held-out metrics:\n%s',
    console.table(
      [[name.replace('_', ' '), value] for name, value in values.items()],
      ['metric', 'value'],
    ),
  )
  return values


def read_metrics(
  stage: Stage, workdir: str | pathlib.Path
) -> dict[str, float] | None:
  """What `validate_last` has written of a run; None if it has not.

  Raises:
    UnreadableFile: what is there are no metrics of the stage.
  """
  path = _metrics_path(stage, workdir)
  if not path.exists():
    return None
  return files.read_json(path, lambda values: _are_metrics(stage, values))


def write_metrics(
  stage: Stage, workdir: str, values: Mapping[str, float]
) -> None:
  """Writes what `validate_last` reads back. All processes call it."""
  path = _metrics_path(stage, workdir)
  if jax.process_index() == 0:
    if path.is_dir():
      files.set_aside(path)
    files.write_json(path, values)


def _metrics_path(stage: Stage, workdir: str) -> pathlib.Path:
  return pathlib.Path(workdir) / 'eval' / f'{stage.num_steps}.json'


def _are_metrics(stage: Stage, values: Any) -> bool:
  """Whether these are a stage's metrics; a broken model's loss may be NaN."""
  losses = {f'held_out_loss_{size}' for size in stage.resolutions}
  return (
    isinstance(values, dict)
    and losses <= values.keys()
    and all(
      name.isidentifier() and isinstance(value, float)
      for name, value in values.items()
    )
  )


def validate(stage: Stage, mesh: Mesh, params: Params) -> dict[str, float]:
  """Metrics of some parameters, see `make_validation`."""
  sample_fn = stage.make_sample_fn(mesh, params)
  return make_validation(stage, mesh, sample_fn)(params)


def make_validation(
  stage: Stage, mesh: Mesh, sample_fn: SampleFn
) -> Callable[[Params], dict[str, float]]:
  """Held-out loss of each level and, for shapes, prompt accuracy.

  Args:
    stage: of the run.
    mesh: the devices.
    sample_fn: of the stage.

  Returns:
    params -> 'held_out_loss_<resolution>' of each level; for shapes also
    'accuracy_<attribute>', from 0 to 1, see `prompt_accuracy`. It takes all
    parameters that the model needs, on the mesh; it compiles once, and reads
    the same data each time.
  """
  config = stage.config
  warn_if_not_held_out(stage)
  eval_step = jax.jit(make_eval_step(stage.model, stage.objective, LOSS_SEED))

  def validation(params):
    losses = list(over_held_out(stage, mesh, params, eval_step))
    values = {
      f'held_out_loss_{resolution}': float(loss)
      for resolution, loss in zip(stage.resolutions, np.mean(losses, 0))
    }
    if not can_score_prompts(config):
      return values
    prompts = make_prompts(config, config.eval.num_prompts)
    logging.info('Sampling %d held-out prompts.', len(prompts.captions))
    # Other noise than that of the grids.
    seeds = range(GRID_PROMPTS, GRID_PROMPTS + len(prompts.captions))
    images = sample_fn(params, prompts.text, seeds)
    accuracy = prompt_accuracy.accuracy(
      images[-1], prompts.statements, make_vocabulary()
    )
    return values | {
      f'accuracy_{name}': value for name, value in accuracy.items()
    }

  return validation


def warn_if_not_held_out(stage: Stage) -> None:
  """Logs that a data set has no validation split."""
  if held_out_split(stage.config) == 'train':
    logging.warning(
      'The data set has no validation split: held-out losses are of training '
      'images.'
    )


def over_held_out(
  stage: Stage, mesh: Mesh, params: Params, step: Callable[..., Any]
) -> Iterable[Any]:
  """`step(params, batch, i)` of each held-out batch, as host arrays."""
  batches = stage.make_dataset(
    held_out_split(stage.config), num_batches=stage.config.eval.loss_batches
  )
  for i, batch in enumerate(batches):
    # One at a time: with many in flight, collectives on a CPU have deadlocked.
    yield jax.device_get(step(params, sharding.shard_batch(batch, mesh), i))
