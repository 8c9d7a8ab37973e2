"""The state that a stage starts from: restored, grown or fresh."""

import contextlib

from absl import logging
import jax

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import (
  AUTOENCODER,
  differences,
  stage_directory,
)
from mdm_jax.builders.data import DRAWN
from mdm_jax.checkpoint import restore, saved_steps
from mdm_jax.data.pipeline import DataError
from mdm_jax.report import console
from mdm_jax.runtime import sharding
from mdm_jax.steps.state import ADDED_FIELDS, Params, TrainState
from mdm_jax.training import grow
from mdm_jax.training.run import Run
from mdm_jax.training.stage_checkpoints import StageCheckpoints


def make_initial_state(
  run: Run,
  stage: BaseStage,
  saved: StageCheckpoints,
  shapes: TrainState,
  data: dict[str, str],
) -> TrainState:
  """The newest state of the stage, or the one that it begins with.

  Args:
    run: the training run.
    stage: the stage to train.
    saved: the checkpoints of the stage.
    shapes: shapes and shardings of the state, see `BaseStage.state_shapes`.
    data: fingerprint of the data set.

  Raises:
    CheckpointError: no checkpoint is good, or one does not fit.
    DataError: the data set is not that of the last checkpoint, of this stage or
      of the one before.
  """
  if saved.last_step:
    state, extra = saved.checkpoints.restore(shapes, added=ADDED_FIELDS)
    _check_data(stage, extra.get('data'), data)
    logging.info('%s: continuing from step %d.', stage.title, int(state.step))
    return state
  if stage.index:
    before = stage_directory(run.workdir, stage.config, stage.index - 1)
    with contextlib.suppress(FileNotFoundError):
      if old := restore.read_extra(before).get('data'):
        _check_data(stage, old, data)
  params = stage.init()
  if (trained := _trained_params(run, stage, saved)) is not None:
    params = grow.grow(params, trained)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  state = jax.jit(stage.new_state, out_shardings=shardings)(
    sharding.place(params, shardings.params)
  )
  logging.info(
    '%s: %s px, %d steps of %d images, %s parameters:\n%s',
    stage.title,
    '+'.join(map(str, stage.resolutions)),
    stage.num_steps,
    stage.batch_size,
    f'{console.num_parameters(shapes.params):,}',
    console.parameter_table(shapes.params),
  )
  return state


def _trained_params(
  run: Run, stage: BaseStage, saved: StageCheckpoints
) -> Params | None:
  """Parameters to grow from: imported ones, or the last stage's EMA."""
  if saved.checkpoints.latest_step() == 0:
    # Imported weights are a checkpoint of step 0 with nothing but an EMA.
    return restore.restore_item(stage.directory(run.workdir), 0, 'ema')
  before = stage.index - 1
  # Nothing grows from an autoencoder or from a level of a cascade.
  if (
    stage.index
    and stage.config.stages[before].kind != AUTOENCODER
    and not stage.config.model.cascade
  ):
    previous = stage_directory(run.workdir, stage.config, before)
    try:
      return restore.restore_item(previous, None, 'ema')
    except FileNotFoundError as error:
      raise saved_steps.CheckpointError(
        f'{previous} has no checkpoint, from which {stage.title} grows: '
        'restore it from a backup, or remove the directory to train it again.'
      ) from error
  return None


def _check_data(
  stage: BaseStage, old: dict[str, str] | None, new: dict[str, str]
) -> None:
  old, new = dict(old or {}), dict(new)
  data = stage.config.data
  if {data.name, data.image_set} <= {*DRAWN, ''}:
    # They are drawn without it, and installing Gradio for the demo replaces it.
    old.pop('Pillow', None)
    new.pop('Pillow', None)
  for name in ('text_encoder', 'drawing', 'image_drawing'):
    if name not in old:  # A checkpoint of an earlier version.
      new.pop(name, None)
  if changes := differences(old, new):
    message = (
      'The data are not those of the last checkpoint ('
      + '; '.join(changes)
      + ')'
    )
    if not stage.config.data.may_change:
      raise DataError(
        f'{message}: bring them back, or, if that is intended, set '
        '--config.data.may_change=True.'
      )
    logging.warning('%s, as data.may_change=True allows.', message)
