"""Saves beside the checkpoints: snapshots of post-hoc EMAs, and the best."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.builders.config import stage_directory
from mdm_jax.builders.stage import make_stage
from mdm_jax.checkpoint import restore, saved_steps
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.inference import weights
from mdm_jax.optim import post_hoc_ema, skip_step
from mdm_jax.runtime import sharding
from mdm_jax.steps.state import TrainState
from mdm_jax.training.hooks import Hook
from mdm_jax.training.stage_checkpoints import StageCheckpoints

STEPS, SKIPPED = 12, (4, 5)


@pytest.fixture(scope='module')
def config(make_config):
  config = make_config()
  config.stages[0].steps = STEPS
  config.averages.update(widths=(0.05, 0.1), snapshot_every=2)
  config.eval.update(every=1, best_metric='accuracy_shape')
  return config.lock()


@functools.cache
def history() -> list[TrainState]:
  """States after each step; two steps were skipped."""
  rng = np.random.default_rng(0)
  params = {'down_0': {'kernel': jnp.ones((4, 8))}, 'bias': jnp.zeros(3)}
  lags, count, states = post_hoc_ema.new_lags(params, (0.05, 0.1)), 0, []
  for step in range(1, STEPS + 1):
    if step not in SKIPPED:
      count += 1
      new = jax.tree.map(
        lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), params
      )
      lags = post_hoc_ema.update_lags(lags, params, new, jnp.int32(count))
      params = new
    states.append(
      TrainState(
        jnp.int32(step),
        params,
        params,
        (),
        skip_step.new_state()._replace(accepted=jnp.int32(count)),
        lags,
      )
    )
  return states


def flat(tree) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def brute_force(sigma_rel: float) -> np.ndarray:
  """The EMA of the parameters after each accepted step, in float64."""
  made = np.float64(
    [
      flat(state.params)
      for state in history()
      if int(state.step) not in SKIPPED
    ]
  )
  power = post_hoc_ema.exponent(sigma_rel) + 1
  return np.diff((np.arange(len(made) + 1) / len(made)) ** power) @ made


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  """A working directory with snapshots every two steps, of two sessions."""
  workdir = tmp_path_factory.mktemp('run')
  for first, last in ((1, 9), (5, STEPS)):
    with StageCheckpoints(make_stage(config, 0), workdir) as saved:
      hook = Hook(
        saved.save_snapshot, config.averages.snapshot_every, at_end=True
      )
      for state in history()[first - 1 : last]:
        step = int(state.step)
        if hook.is_due(step, last=step == STEPS):
          hook.call(step, state)
  return workdir


def test_snapshots_do_not_count_as_checkpoints(config, workdir):
  directory = stage_directory(workdir, config, 0, 'averages')
  assert saved_steps.good_steps(directory) == [2, 4, 6, 8, 10, 12]
  assert [
    restore.read_extra(directory, step)['updates']
    for step in (2, 4, 6, 8, 10, 12)
  ] == [2, 3, 4, 6, 8, 10]
  assert saved_steps.latest_step(stage_directory(workdir, config, 0)) is None
  with pytest.raises(FileNotFoundError, match='no checkpoints yet: train long'):
    weights.restore_weights(config, workdir)


@pytest.mark.parametrize(
  'sigma_rel, far', [(0.05, 1e-6), (0.1, 1e-6), (0.08, 5e-4), (0.07, 5e-4)]
)
def test_any_sigma_rel_is_restored(config, workdir, sigma_rel, far):
  restored = weights.restore_weights(config, workdir, sigma_rel=sigma_rel)
  found = restored.params
  assert restored.index == 0
  assert found['bias'].dtype == np.float32
  np.testing.assert_allclose(
    flat(found), brute_force(sigma_rel), rtol=0, atol=far
  )
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': 4, 'spatial': 1}, jax.devices()[:4]
  )
  placed = weights.restore_weights(
    config, workdir, mesh, sigma_rel=sigma_rel
  ).params
  assert 'fsdp' in placed['down_0']['kernel'].sharding.spec
  np.testing.assert_array_equal(flat(placed), flat(found))


def test_a_damaged_snapshot_is_skipped(config, workdir, tmp_path, caplog):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  directory = stage_directory(copy, config, 0, 'averages')
  for path in (directory / '8' / 'state' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[:-1])
  found = weights.restore_weights(config, copy, sigma_rel=0.1).params
  np.testing.assert_allclose(flat(found), brute_force(0.1), rtol=0, atol=1e-6)
  assert '8 is damaged: state/d/' in caplog.text


def test_missing_weights_are_named(config, workdir):
  with pytest.raises(FileNotFoundError, match='no best yet: set eval.every'):
    weights.restore_weights(config, workdir, best=True)
  with pytest.raises(FileNotFoundError, match='no averages yet: set averages'):
    weights.restore_weights(config, workdir / 'other', sigma_rel=0.1)
  with pytest.raises(ValueError, match='sigma_rel=0.3: it must be more than 0'):
    weights.restore_weights(config, workdir, sigma_rel=0.3)
  with pytest.raises(ValueError, match='sigma_rel and best exclude each othe'):
    weights.restore_weights(config, workdir, sigma_rel=0.1, best=True)


def best_steps(config, workdir, metric, values):
  """Runs one session, {step: value} -> the best step after each of them."""
  directory = stage_directory(workdir, config, 0, 'best')
  config = config.copy_and_resolve_references()
  config.eval.best_metric = metric
  best = []
  with StageCheckpoints(make_stage(config, 0), workdir) as saved:
    for step, value in values.items():
      ema = {'bias': jnp.full(3, float(step))}
      saved.save_if_best(step, ema, {metric: value, 'other': 1.0})
      saved.wait()
      best.append(saved_steps.latest_step(directory))
  assert len(saved_steps.good_steps(directory)) == (best[-1] is not None)
  return best


def test_the_best_stays_until_there_is_a_better_one(config, tmp_path):
  nan = float('nan')
  assert best_steps(
    config,
    tmp_path,
    'accuracy_shape',
    {1: nan, 2: 0.5, 3: 0.4, 4: nan, 5: 0.5, 6: 0.6, 7: 0.1},
  ) == [None, 2, 2, 2, 2, 6, 6]
  # A run that was killed continues from step 4, on other devices.
  assert best_steps(
    config, tmp_path, 'accuracy_shape', {5: 0.62, 6: 0.6, 7: 0.1, 8: 0.61}
  ) == [6, 6, 6, 8]
  params = weights.restore_weights(config, tmp_path, best=True).params
  assert params['bias'].tolist() == [8.0] * 3
  # Lower losses are better.
  assert best_steps(
    config, tmp_path, 'held_out_loss_8', {9: 0.5, 10: 0.6, 11: 0.4}
  ) == [9, 9, 11]
  with StageCheckpoints(make_stage(config, 0), tmp_path) as saved:
    saved.save_if_best(12, {}, {'held_out_loss_8': 0.1})  # No such metric.


@pytest.mark.parametrize(
  'extra',
  [
    {},
    {'metric': 'accuracy_shape'},
    {'metric': ['accuracy_shape'], 'value': 0.9},
    {'metric': 'accuracy_shape', 'value': '0.9'},
    {'metric': 'accuracy_shape', 'value': float('nan')},
    {'metric': 'accuracy_shape', 'value': None},
  ],
)
def test_a_best_without_its_metric_is_replaced(config, tmp_path, extra):
  directory = stage_directory(tmp_path, config, 0, 'best')
  with Checkpoints(directory, save_interval=1, max_to_keep=1) as opened:
    opened.save(1, {'ema': {'bias': jnp.ones(3)}}, extra)
  assert best_steps(config, tmp_path, 'accuracy_shape', {2: 0.2, 3: 0.1}) == [
    2,
    2,
  ]


@pytest.mark.parametrize(
  'extra',
  [
    {},
    {'updates': 12},
    {'updates': '12', 'widths': ['0.1']},
    {'updates': 12, 'widths': '0.1'},
    {'updates': 12, 'widths': [0.1]},
    {'updates': -1, 'widths': ['0.1']},
  ],
)
def test_what_is_no_snapshot_is_left_out(
  config, workdir, tmp_path, caplog, extra
):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  directory = stage_directory(copy, config, 0, 'averages')
  with Checkpoints(directory, save_interval=1, max_to_keep=None) as opened:
    opened.save(13, {'0.1': {'bias': jnp.ones(3)}}, extra)
  found = weights.restore_weights(config, copy, sigma_rel=0.1).params
  np.testing.assert_allclose(flat(found), brute_force(0.1), rtol=0, atol=1e-6)
  assert '13 is no snapshot' in caplog.text
