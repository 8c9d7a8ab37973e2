"""Metrics of a stage on held-out data, while it trains and at its end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders import data
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import sampler_settings
from mdm_jax.builders.model import finest_resolution
from mdm_jax.builders.prompts import (
  can_score_prompts,
  chance_accuracy,
  is_moving,
  make_prompts,
  make_vocabulary,
)
from mdm_jax.checkpoint.saved_steps import CheckpointError
from mdm_jax.eval import estimate, motion, prompt_accuracy
from mdm_jax.eval.estimate import Estimate
from mdm_jax.inference.weights import restore_weights
from mdm_jax.report import evaluations
from mdm_jax.runtime import files, sharding
from mdm_jax.steps.sample import SampleFn
from mdm_jax.steps.state import Params

# Prompts in the sample grids of training.
GRID_PROMPTS = 16
LOSS_SEED = 1
# As `files.json_number` writes them.
_NOT_FINITE = ('nan', 'inf', '-inf')


def validate_last(
  stage: BaseStage, workdir: str, mesh: Mesh, frozen: Params
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
  earlier = find_earlier(stage, workdir)
  logging.info(
    '%s',
    evaluations.Evaluation(
      values,
      settings(stage) | {'step': stage.num_steps},
      chance(stage),
      tuple(each for each in earlier if each.step != stage.num_steps),
    ),
  )
  return values


def find_earlier(
  last: BaseStage, workdir: epath.PathLike
) -> tuple[evaluations.Earlier, ...]:
  """The evaluations of a run, newest first; `last` is its last stage."""
  return evaluations.find_earlier(
    _metrics_path(last, workdir).parent,
    settings(last),
    functools.partial(data.current_name, last.config),
  )


def settings(stage: BaseStage) -> dict[str, Any]:
  """What the metrics of `make_validation` depend on beside the weights. JSON.

  The keys are those of the settings of `mdm_jax.evaluate`.
  """
  config = stage.config
  found = {'stage': stage.name, 'weights': 'EMA', 'loss': loss_settings(stage)}
  if _is_scored(stage):
    found |= sample_settings(stage, config.eval.num_prompts, GRID_PROMPTS)
  return found


def chance(stage: BaseStage) -> dict[str, float]:
  """What a model scores that ignores its prompts; {} if nothing is scored."""
  if not _is_scored(stage):
    return {}
  config = stage.config
  moving = is_moving(config, stage.settings)
  at_random = chance_accuracy(config.data.name, moving)
  return {f'accuracy_{name}': value for name, value in at_random.items()}


def _is_scored(stage: BaseStage) -> bool:
  """Whether its samples are scored by the attributes of their prompts."""
  return stage.is_generative and can_score_prompts(stage.config)


def with_chance(
  stage: BaseStage, values: Mapping[str, float]
) -> dict[str, float]:
  """Metrics, and 'chance_<attribute>' of each accuracy among them."""
  at_random = {
    name.replace('accuracy', 'chance', 1): value
    for name, value in chance(stage).items()
    if name in values
  }
  return {**values, **at_random}


def loss_settings(stage: BaseStage) -> dict[str, Any]:
  """What the losses of a stage depend on beside the weights. JSON."""
  config = stage.config
  return {
    'split': data.held_out_split(config),
    'batches': config.eval.loss_batches,
    'batch_size': stage.batch_size,
    'seed': LOSS_SEED,
    **_order(config),
    **stage.loss_settings,
  }


def _order(config: ConfigDict) -> dict[str, str]:
  """Of the records that are measured, see `builders.data.measured_index`."""
  return {} if config.data.name in data.DRAWN else {'order': 'shuffled'}


def sample_settings(stage: BaseStage, count: int, seed: int) -> dict[str, Any]:
  """What so many samples of a stage depend on beside the weights. JSON."""
  return {
    'num_samples': count,
    'seed': seed,
    'prompts': data.held_out_split(stage.config),
    **_order(stage.config),
    'sampler': sampler_settings(stage.config),
  }


def read_metrics(
  stage: BaseStage, workdir: epath.PathLike
) -> dict[str, float] | None:
  """What `validate_last` has written of a run; None if it has not.

  Raises:
    UnreadableFile: what is there are no metrics of the stage.
  """
  path = _metrics_path(stage, workdir)
  if not path.exists():
    return None
  return _current_names(
    stage, files.read_json(path, lambda values: _are_metrics(stage, values))
  )


def write_metrics(
  stage: BaseStage, workdir: str, values: Mapping[str, float]
) -> None:
  """Writes what `validate_last` reads back. All processes call it."""
  path = _metrics_path(stage, workdir)
  if jax.process_index() == 0:
    if path.is_dir():
      files.set_aside(path)
    files.write_json(
      path, {name: files.json_number(x) for name, x in values.items()}
    )


def _metrics_path(stage: BaseStage, workdir: epath.PathLike) -> epath.Path:
  return epath.Path(workdir) / 'eval' / f'{stage.num_steps}.json'


def _are_metrics(stage: BaseStage, values: Any) -> bool:
  """Whether these are a stage's metrics; a broken model's loss may be NaN."""
  return (
    isinstance(values, dict)
    and all(
      name.isidentifier() and (isinstance(value, float) or value in _NOT_FINITE)
      for name, value in values.items()
    )
    and _current_names(stage, values).keys() >= {*stage.measured}
  )


def _current_names(
  stage: BaseStage, values: Mapping[str, float]
) -> dict[str, float]:
  """Metrics by the names that they have now, see `data.current_name`."""
  return {
    data.current_name(stage.config, name): float(value)
    for name, value in values.items()
  }


def validate(
  stage: BaseStage, mesh: Mesh, params: Params
) -> dict[str, Estimate]:
  """Metrics of some parameters, see `make_validation`."""
  sample_fn = stage.make_sample_fn(mesh, params)
  return make_validation(stage, mesh, sample_fn)(params)


def make_validation(
  stage: BaseStage, mesh: Mesh, sample_fn: SampleFn
) -> Callable[..., dict[str, Estimate]]:
  """Held-out loss of each level and, for shapes, prompt accuracy.

  Of an autoencoder it is the PSNR of held-out images.

  Args:
    stage: of the run.
    mesh: the devices.
    sample_fn: of the stage.

  Returns:
    (params, prompts=True) -> what the stage's `measured` names; for samples of
    shapes, if `prompts`, also `accuracies`. It takes all parameters that the
    model needs, on the mesh; it compiles once, and reads the same data each
    time.
  """
  config = stage.config
  warn_if_not_held_out(stage)
  num_records = count_held_out(stage)
  loss_step = jax.jit(
    stage.make_validation_step(LOSS_SEED),
    out_shardings=sharding.replicated(mesh),
  )

  def validation(params, prompts=True):
    losses = mean_losses(
      over_held_out(stage, mesh, params, loss_step), num_records
    )
    values = dict(zip(stage.measured, losses))
    if not prompts or not _is_scored(stage):
      return values
    asked = make_prompts(config, config.eval.num_prompts)
    logging.info('Sampling %d held-out prompts.', len(asked.captions))
    # Other noise than that of the grids.
    seeds = range(GRID_PROMPTS, GRID_PROMPTS + len(asked.captions))
    images = sample_fn(params, asked.text, seeds)
    vocabulary = make_vocabulary()
    marks = [
      motion.score(sample, stated, vocabulary)
      for sample, stated in zip(images[-1], asked.statements, strict=True)
    ]
    return values | accuracies(marks, asked.statements)

  return validation


def accuracies(
  marks: Sequence[dict], statements: Sequence[dict]
) -> dict[str, Estimate]:
  """Prompt accuracy of all prompts, and by their number of objects.

  Args:
    marks: `motion.score` of each image or clip.
    statements: what the prompt of each image states.

  Returns:
    Such as 'accuracy_color', 'accuracy_color_1_object' and
    'accuracy_color_2_objects', from 0 to 1.
  """
  found = prompt_accuracy.mean_marks(marks)
  found |= prompt_accuracy.by_number_of_objects(marks, statements)
  return {f'accuracy_{name}': value for name, value in found.items()}


def mean_losses(sums: Iterable[Any], num_records: int) -> list[Estimate]:
  """Each mean, from all that `make_validation_step` returns.

  Args:
    sums: of each batch.
    num_records: of the split. With fewer than rows there are rows of one
      record, and no standard errors.
  """
  totals, counts, squares = np.sum(list(sums), axis=0, dtype=np.float64).sum(-1)
  found = map(estimate.from_sums, totals, squares, counts)
  return [
    each if each.count <= num_records else Estimate(each, num_records)
    for each in found
  ]


def count_held_out(stage: BaseStage, split: str | None = None) -> int:
  """The number of records of a split, by default of the held-out one."""
  config = stage.config
  split = split or data.held_out_split(config)
  return len(data.make_source(config, split, finest_resolution(config)))


def warn_if_not_held_out(stage: BaseStage) -> None:
  """Logs that a data set has no validation split."""
  if data.held_out_split(stage.config) == 'train':
    logging.warning(
      'The data set has no validation split: the evaluation measures '
      'train_split_loss, of training images, instead of held_out_loss.'
    )


def over_held_out(
  stage: BaseStage,
  mesh: Mesh,
  params: Params,
  step: Callable[..., Any],
  split: str | None = None,
) -> Iterable[Any]:
  """`step(params, batch, i)` of each held-out batch, as host arrays.

  Args:
    stage: of the run.
    mesh: the devices.
    params: all parameters that the model needs, on the mesh.
    step: what `make_validation_step` returns, compiled.
    split: another one, of which the first batches are read.
  """
  batches = stage.make_dataset(
    split or data.held_out_split(stage.config),
    num_batches=stage.config.eval.loss_batches,
  )
  for i, batch in enumerate(batches):
    # One at a time: with many in flight, collectives on a CPU have deadlocked.
    yield jax.device_get(step(params, sharding.shard_batch(batch, mesh), i))
