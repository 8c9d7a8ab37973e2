"""Which weights a run has, and which of them are restored."""

import shutil

import numpy as np
import pytest

from mdm_jax.builders.config import stage_directory
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.inference import weights
from mdm_jax.inference.weights import SavedWeights
from tests import toy


@pytest.fixture(scope='module')
def config(make_config):
  config = make_config()
  config.averages.widths = (0.05, 0.1)
  return config.lock()


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  """A run whose weights are their stage's index, or 9 for the best."""
  workdir = tmp_path_factory.mktemp('run')
  for index, step in enumerate((20, 5)):
    toy.save_run(workdir, config, index, step, {'x': np.float32([index])})
  for index, kind, state, extra in (
    (0, 'best', {'ema': {'x': np.float32([9])}}, {}),
    (
      1,
      'averages',
      {'0.05': {'x': np.float32([1])}, '0.1': {'x': np.float32([1])}},
      {'updates': 4, 'widths': ['0.05', '0.1']},
    ),
  ):
    directory = stage_directory(workdir, config, index, kind)
    with Checkpoints(directory, save_interval=1, max_to_keep=1) as saved:
      saved.save(4, state, extra, force=True)
  return workdir


def test_all_that_are_saved_are_listed_and_restored(config, workdir):
  found = weights.saved_weights(config, workdir)
  assert found == [
    SavedWeights('16', 5),
    SavedWeights('16', 4, sigma_rel=0.05),
    SavedWeights('16', 4, sigma_rel=0.1),
    SavedWeights('8', 20),
    SavedWeights('8', 4, best=True),
  ]
  restored = [
    weights.restore_weights(
      config, workdir, stage=one.stage, sigma_rel=one.sigma_rel, best=one.best
    )
    for one in found
  ]
  assert [(one.index, one.step, one.ema) for one in restored] == [
    (config.stages[1].name == one.stage, one.step, one.ema) for one in found
  ]
  assert [float(one.params['x'][0]) for one in restored] == [1, 1, 1, 0, 9]
  assert weights.restore_weights(config, workdir).index == 1


def test_a_stage_that_is_missing_is_named(config, workdir, tmp_path):
  with pytest.raises(ValueError, match="no stage '32': give one of '8', '16'."):
    weights.restore_weights(config, workdir, stage='32')
  with pytest.raises(FileNotFoundError, match="best of stage '16' yet: set ev"):
    weights.restore_weights(config, workdir, stage='16', best=True)
  assert weights.saved_weights(config, tmp_path) == []


def test_damaged_weights_are_not_listed(config, workdir, tmp_path, caplog):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  path = stage_directory(copy, config, 1) / '5'
  path.rename(path.with_name('5.corrupt'))
  assert weights.saved_weights(config, copy)[0].sigma_rel == 0.05
  assert 'none is good' in caplog.text
