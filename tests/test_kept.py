"""What is kept beside the checkpoints: snapshots of averages, and the best."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import averages, build, checkpoint, guard, sharding, trained
from mdm_jax.kept import Kept
from mdm_jax.state import TrainState

STEPS, LEFT_OUT = 12, (4, 5)


@pytest.fixture(scope='module')
def config(make_config):
  config = make_config()
  config.stages[0].steps = STEPS
  config.averages.update(widths=(0.05, 0.1), snapshot_every=2)
  config.eval.update(every=1, best_metric='accuracy_shape')
  return config.lock()


@functools.cache
def history() -> list[TrainState]:
  """States of which two steps were left out."""
  rng = np.random.default_rng(0)
  params = {'down_0': {'kernel': jnp.ones((4, 8))}, 'bias': jnp.zeros(3)}
  lags, count, states = averages.new_lags(params, (0.05, 0.1)), 0, []
  for step in range(1, STEPS + 1):
    if step not in LEFT_OUT:
      count += 1
      new = jax.tree.map(
        lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), params
      )
      lags = averages.update_lags(lags, params, new, jnp.int32(count))
      params = new
    states.append(
      TrainState(
        jnp.int32(step),
        params,
        params,
        (),
        guard.new_state()._replace(accepted=jnp.int32(count)),
        lags,
      )
    )
  return states


def flat(tree) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def brute_force(width: float) -> np.ndarray:
  """Over the parameters after each step that was made, in float64."""
  made = np.float64(
    [
      flat(state.params)
      for state in history()
      if int(state.step) not in LEFT_OUT
    ]
  )
  power = averages.exponent(width) + 1
  return np.diff((np.arange(len(made) + 1) / len(made)) ** power) @ made


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  """Snapshots every two steps, of two runs that overlap."""
  workdir = tmp_path_factory.mktemp('run')
  for first, last in ((1, 9), (5, STEPS)):
    with Kept(config, workdir, 0) as kept:
      for state in history()[first - 1 : last]:
        kept.snapshot(int(state.step), state)
  return workdir


def test_snapshots_do_not_count_as_checkpoints(config, workdir):
  directory = build.stage_directory(workdir, config, 0, 'averages')
  assert checkpoint.good_steps(directory) == [2, 4, 6, 8, 10, 12]
  assert [
    checkpoint.read_extra(directory, step)['updates']
    for step in (2, 4, 6, 8, 10, 12)
  ] == [2, 3, 4, 6, 8, 10]
  assert (
    checkpoint.latest_step(build.stage_directory(workdir, config, 0)) is None
  )
  with pytest.raises(FileNotFoundError, match='no checkpoints yet: train long'):
    trained.restore_average(config, workdir)


@pytest.mark.parametrize(
  'width, far', [(0.05, 1e-6), (0.1, 1e-6), (0.08, 5e-4), (0.07, 5e-4)]
)
def test_any_width_is_restored(config, workdir, width, far):
  index, _, found = trained.restore_average(config, workdir, width=width)
  assert index == 0
  assert found['bias'].dtype == np.float32
  np.testing.assert_allclose(flat(found), brute_force(width), rtol=0, atol=far)
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': 4, 'spatial': 1}, jax.devices()[:4]
  )
  *_, placed = trained.restore_average(config, workdir, mesh, width=width)
  assert 'fsdp' in placed['down_0']['kernel'].sharding.spec
  np.testing.assert_array_equal(flat(placed), flat(found))


def test_a_damaged_snapshot_is_done_without(config, workdir, tmp_path, caplog):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  directory = build.stage_directory(copy, config, 0, 'averages')
  for path in (directory / '8' / 'state' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[:-1])
  *_, found = trained.restore_average(config, copy, width=0.1)
  np.testing.assert_allclose(flat(found), brute_force(0.1), rtol=0, atol=1e-6)
  assert '8 is damaged: state/d/' in caplog.text


def test_what_cannot_be_restored(config, workdir):
  with pytest.raises(FileNotFoundError, match='no best yet: set eval.every'):
    trained.restore_average(config, workdir, best=True)
  with pytest.raises(FileNotFoundError, match='no averages yet: set averages'):
    trained.restore_average(config, workdir / 'other', width=0.1)
  with pytest.raises(ValueError, match='of width 0.3: it must be more than 0'):
    trained.restore_average(config, workdir, width=0.3)
  with pytest.raises(ValueError, match='ask for one of a width, or for the be'):
    trained.restore_average(config, workdir, width=0.1, best=True)


def offer(config, workdir, metric, values):
  """One run, {step: value} -> the step that is the best after each offer."""
  directory = build.stage_directory(workdir, config, 0, 'best')
  config = config.copy_and_resolve_references()
  config.eval.best_metric = metric
  best = []
  with Kept(config, workdir, 0) as kept:
    for step, value in values.items():
      ema = {'bias': jnp.full(3, float(step))}
      kept.offer(step, ema, {metric: value, 'other': 1.0})
      kept.wait()
      best.append(checkpoint.latest_step(directory))
  assert len(checkpoint.good_steps(directory)) == (best[-1] is not None)
  return best


def test_the_best_stays_until_there_is_a_better_one(config, tmp_path):
  nan = float('nan')
  assert offer(
    config,
    tmp_path,
    'accuracy_shape',
    {1: nan, 2: 0.5, 3: 0.4, 4: nan, 5: 0.5, 6: 0.6, 7: 0.1},
  ) == [None, 2, 2, 2, 2, 6, 6]
  # A run that was killed continues from step 4, on other devices.
  assert offer(
    config, tmp_path, 'accuracy_shape', {5: 0.62, 6: 0.6, 7: 0.1, 8: 0.61}
  ) == [6, 6, 6, 8]
  *_, params = trained.restore_average(config, tmp_path, best=True)
  assert params['bias'].tolist() == [8.0] * 3
  # Losses are the better the lower.
  assert offer(
    config, tmp_path, 'held_out_loss_8', {9: 0.5, 10: 0.6, 11: 0.4}
  ) == [9, 9, 11]
  with Kept(config, tmp_path, 0) as kept:
    kept.offer(12, {}, {'held_out_loss_8': 0.1})  # No such metric.
