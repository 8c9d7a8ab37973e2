"""The training step: the same on any mesh, traced once, and it learns."""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import (
  make_objective,
  make_optimizer,
  make_stage,
)
from mdm_jax.builders.text import empty_text, make_tokenizer
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.optim import post_hoc_ema
from mdm_jax.optim.skip_step import SkipRule
from mdm_jax.runtime import sharding
from mdm_jax.steps.evaluate import make_band_step
from mdm_jax.steps.objective import batch_losses, sample_noise
from mdm_jax.steps.state import TrainState
from mdm_jax.steps.train import make_train_step, new_state
from tests import meshes

BATCH = 32
FLOW = {
  'schedule': 'linear',
  'parameterization': 'velocity',
  'loss_space': 'velocity',
  'normalize_time_weights': True,
  'time_density': 'logit_normal',
  'stratified_times': True,
  'level_times': 'independent',
}
COARSE_FIRST = FLOW | {
  'parameterization': 'x0',
  'noise_floor': 0.05,
  'time_density': 'uniform',
  'level_times': 'coarse_first',
  'level_offset': 2.0,
}
CAPTIONS = ('a red ring', 'a small blue star', 'two green circles', 'a cross')
# Number of devices along data, fsdp and spatial.
MESHES = {
  'one': (1, 1, 1),
  'data': (8, 1, 1),
  'fsdp': (1, 8, 1),
  'all': (2, 2, 2),
  'spatial': (1, 1, 8),
  'four': (2, 2, 1),
}
GUARDED = ('one', 'data', 'fsdp')


def mesh_of(name):
  return meshes.make_mesh(*MESHES[name])


class Training(NamedTuple):
  """A step on a mesh, jitted as the training loop does it."""

  model: Matryoshka
  new_state: Callable  # parameters -> a state in its shards
  # (state, batch, caption dropout, factor of the loss); donates the state
  run: Callable
  compiled: Callable  # () -> the compiled step
  traces: list  # one entry for each time that the step was traced
  shardings: TrainState


@pytest.fixture(scope='module')
def training(make_config, batch):
  """(name of a mesh, microbatches, kind of level 0) -> Training.

  The batch is mixed: level 1 sees half of it.
  """

  @functools.cache
  def make(mesh_name, accumulate, kind):
    config = make_config(kind)
    stage = config.stages[1]
    stage.mixed_ratio = (1.0, 1.0)
    stage.learning_rate = 1e-2
    mesh = mesh_of(mesh_name)
    model, objective = make_model(config, stage), make_objective(config, stage)
    optimizer, _ = make_optimizer(config, stage)
    traces = []

    # Arguments of the step, so that one compilation serves all values.
    def train_step(state, batch, caption_dropout, factor):
      traces.append(None)
      weights = tuple(factor * weight for weight in objective.weights)
      return make_train_step(
        model,
        dataclasses.replace(objective, weights=weights),
        optimizer,
        skip_rule=SkipRule(spike_factor=10.0, window=3, max_skipped=9),
        ema_decay=0.99,
        caption_dropout=caption_dropout,
        empty_text=empty_text(config),
        seed=3,
        accumulate=accumulate,
        mesh=mesh,
      )(state, batch, {})

    def make_state(params):
      return new_state(params, optimizer, (0.05, 0.25))

    shardings = sharding.tree_shardings(
      jax.eval_shape(make_state, model.shapes(config.text.max_length)),
      mesh,
      config.sharding_rules,
    )
    init = jax.jit(make_state, out_shardings=shardings)
    replicated = sharding.replicated(mesh)
    jitted = jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(
        shardings,
        {
          name: sharding.batch_sharding(mesh, value.ndim)
          for name, value in batch.items()
        },
        replicated,
        replicated,
      ),
      out_shardings=(shardings, replicated),
    )

    @functools.cache
    def compiled():
      state = jax.eval_shape(make_state, model.shapes(config.text.max_length))
      return jitted.lower(
        state, sharding.shard_batch(batch, mesh), 0.5, 1.0
      ).compile()

    return Training(
      model,
      lambda params: init(sharding.place(params, shardings.params)),
      lambda state, batch, dropout=0.5, factor=1.0: compiled()(
        state, sharding.shard_batch(batch, mesh), dropout, factor
      ),
      compiled,
      traces,
      shardings,
    )

  return lambda mesh_name, accumulate=1, kind='unet': make(
    mesh_name, accumulate, kind
  )


@pytest.fixture(scope='module')
def batch(make_config):
  """Plain images of random colours; level 1 does not see every other one."""
  rng = np.random.default_rng(0)
  colors = rng.integers(0, 256, (BATCH, 1, 1, 3), np.uint8)
  encode = make_tokenizer(make_config()).encode

  def plain(colors, side):
    return np.broadcast_to(colors, (len(colors), side, side, 3)).copy()

  return {
    'image': plain(colors[::2], 16),
    'image_8': plain(colors[1::2], 8),
    'text': np.stack([encode(CAPTIONS[i % 4]) for i in range(BATCH)]),
    'scale': np.linspace(6, 20, BATCH, dtype=np.float32),
    'bad': np.zeros(BATCH, bool),
    'stop': np.zeros(BATCH, bool),
    'save': np.zeros(BATCH, bool),
  }


@pytest.fixture(scope='module')
def metrics(training, batch, random_params):
  """Runs five steps -> their metrics, with the first and last parameters."""

  @functools.cache
  def run(*given):
    made = training(*given)
    state, values = made.new_state(random_params(made.model, 8)), []
    for _ in range(5):
      before = jax.device_get(state.params)
      state, metrics = made.run(state, batch)
      values.append(jax.device_get(metrics))
    return values, before, jax.device_get(state.params)

  return run


@pytest.fixture(scope='module')
def losses(metrics):
  """Five steps -> [5, 1 + levels], the loss and the loss of each level."""
  return lambda *given: np.array(
    [[each['loss'], *each['level_losses']] for each in metrics(*given)[0]]
  )


@pytest.mark.parametrize(
  'mesh_name, accumulate, kind',
  [
    ('data', 1, 'unet'),
    ('fsdp', 1, 'unet'),
    ('all', 1, 'unet'),
    ('spatial', 1, 'unet'),
    ('data', 2, 'unet'),
    ('all', 4, 'unet'),
    ('all', 1, 'transformer'),
  ],
)
def test_equals_one_device_and_the_whole_batch(
  losses, metrics, mesh_name, accumulate, kind
):
  expected = losses('one', 1, kind)
  assert np.ptp(expected[:, 0]) > 1e-2
  given = (mesh_name, accumulate, kind)
  np.testing.assert_allclose(losses(*given), expected, rtol=1e-5)
  # What is logged beside the losses.
  for each, other in zip(metrics(*given)[0], metrics('one', 1, kind)[0]):
    for name in ('grad_norm', 'update_norm', 'param_norm'):
      np.testing.assert_allclose(each[name], other[name], rtol=1e-4)
    for name in ('noise_sums', 'noise_counts'):  # Means over microbatches.
      np.testing.assert_allclose(
        accumulate * each[name], other[name], rtol=1e-4, atol=1e-5
      )


@pytest.fixture(scope='module')
def weighted_losses(make_config, batch, random_params):
  """(name of a mesh, objective) -> losses [B] of a batch, with each weighting.

  All weights go through one program.
  """

  def run(mesh_name, diffusion):
    config = make_config()
    config.stages[1].mixed_ratio = (1.0, 1.0)
    config.diffusion.update(diffusion)
    model = make_model(config, config.stages[1])
    mesh = mesh_of(mesh_name)

    @jax.jit
    def measure(params, batch, time_weights):
      objective = dataclasses.replace(
        make_objective(config, config.stages[1]), time_weights=time_weights
      )
      t, eps = sample_noise(
        objective, model.level_shapes, batch, jax.random.key(0)
      )
      return batch_losses(model, objective, params, batch, t, eps)[0]

    params = random_params(model, 8)
    placed = (
      sharding.place(
        params, sharding.tree_shardings(params, mesh, config.sharding_rules)
      ),
      sharding.shard_batch(batch, mesh),
    )
    found = []
    for name in ('min_snr', 'sigmoid', 'p2'):
      config.diffusion.time_weights = name
      table = make_objective(config, config.stages[1]).time_weights
      found.append(np.asarray(measure(*placed, table)))
    assert measure._cache_size() == 1
    return found

  return run


@pytest.mark.parametrize('diffusion', [FLOW, COARSE_FIRST])
def test_objectives_equal_one_device(weighted_losses, diffusion):
  expected = weighted_losses('one', diffusion)
  assert all(np.isfinite(each).all() and np.ptp(each) > 0 for each in expected)
  for found, other in zip(weighted_losses('all', diffusion), expected):
    np.testing.assert_allclose(found, other, rtol=1e-5)


def test_norms_and_losses_by_noise(metrics):
  def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

  values, before, after = metrics('one')
  last = values[-1]
  change = jax.tree.map(np.subtract, after, before)
  np.testing.assert_allclose(last['update_norm'], norm(change), rtol=1e-4)
  np.testing.assert_allclose(last['param_norm'], norm(after), rtol=1e-5)
  assert 0.01 < last['update_norm'] < 0.1 * last['param_norm']
  sums, counts = last['noise_sums'], last['noise_counts']
  assert sums.shape == counts.shape == (2, 4)
  assert counts.sum(1).tolist() == [BATCH, BATCH / 2]
  np.testing.assert_allclose(
    sums.sum(1) / counts.sum(1), last['level_losses'], rtol=1e-5
  )


@pytest.fixture(scope='module')
def half_way(training, batch, random_params, tmp_path_factory):
  """Checkpoints and state after 5 steps on 'fsdp', and 20 further losses."""
  made = training('fsdp')
  state = made.new_state(random_params(made.model, 8))
  for _ in range(5):
    state, _ = made.run(state, batch)
  checkpoints = Checkpoints(
    tmp_path_factory.mktemp('half_way'), save_interval=1, max_to_keep=1
  )
  checkpoints.save(5, state, {})
  checkpoints.wait()
  saved, losses = jax.device_get(state), []
  for _ in range(20):
    state, metrics = made.run(state, batch)
    losses.append(metrics['loss'])
  yield checkpoints, saved, losses
  checkpoints.close()


@pytest.mark.parametrize('mesh_name', ['four', 'one'])
def test_goes_on_on_fewer_devices(training, batch, half_way, mesh_name):
  checkpoints, saved, expected = half_way
  made = training(mesh_name)
  state, _ = checkpoints.restore(
    jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      saved,
      made.shardings,
    )
  )
  for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(saved)):
    assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
  losses = []
  for _ in range(20):
    state, metrics = made.run(state, batch)
    losses.append(metrics['loss'])
  assert np.ptp(expected) > 1e-2
  np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_one_stop_request_reaches_all(training, batch, random_params):
  made = training('data')
  state = made.new_state(random_params(made.model, 8))
  for requested in (False, True):
    stop = batch['stop'].copy()
    stop[11] = requested
    state, metrics = made.run(state, batch | {'stop': stop})
    assert metrics['stop'].sharding.is_fully_replicated
    assert bool(metrics['stop']) == requested


def test_fsdp_divides_the_state(training):
  shardings = training('fsdp').shardings
  params, ema, opt_state, lags = (
    sum('fsdp' in leaf.spec for leaf in jax.tree.leaves(tree))
    for tree in (
      shardings.params,
      shardings.ema,
      shardings.opt_state,
      shardings.lags,
    )
  )
  assert params > 20
  assert (ema, opt_state, lags) == (params, 2 * params, 2 * params)


def test_loss_is_the_sum_over_levels(losses):
  values = losses('one')
  np.testing.assert_allclose(values[:, 0], values[:, 1:].sum(1), rtol=1e-5)


@pytest.mark.parametrize('mesh_name', GUARDED)
def test_traced_once(training, losses, mesh_name):
  losses(mesh_name)
  assert len(training(mesh_name).traces) == 1


@pytest.fixture(scope='module')
def poisoned(training, batch, random_params):
  """Ten steps, three of them bad -> [10] of (loss, changes, skip state)."""

  @functools.cache
  def run(mesh_name):
    made = training(mesh_name)
    state, seen = made.new_state(random_params(made.model, 8)), []
    for step in range(10):
      before = jax.device_get(state)
      scale = batch['scale'].copy()
      if step == 3:
        scale[5] = np.nan
      factor = {5: np.inf, 7: 1000.0}.get(step, 1.0)
      state, metrics = made.run(state, batch | {'scale': scale}, factor=factor)
      after = jax.device_get(state)
      learned = {
        name: not all(
          map(
            np.array_equal,
            *map(
              jax.tree.leaves, (getattr(before, name), getattr(after, name))
            ),
          )
        )
        for name in ('params', 'ema', 'opt_state')
      }
      assert int(after.step) == step + 1
      assert (metrics['update_norm'] == 0) == (step in (3, 5, 7))
      assert int(metrics['skipped']) == int(after.guard.skipped)
      assert int(metrics['skipped_in_a_row']) == int(after.guard.in_a_row)
      seen.append((float(metrics['loss']), learned, after.guard))
    return seen

  return run


@pytest.mark.parametrize('mesh_name', GUARDED)
def test_bad_steps_change_nothing(poisoned, mesh_name):
  seen = poisoned(mesh_name)
  for step, (loss, learned, guard) in enumerate(seen):
    bad = step in (3, 5, 7)
    assert set(learned.values()) == {not bad}, step
    assert int(guard.in_a_row) == bad
    assert np.isfinite(loss) == (step not in (3, 5))
  assert int(seen[-1][2].skipped) == 3
  assert int(seen[-1][2].accepted) == 7
  good = [loss for step, (loss, *_) in enumerate(seen) if step not in (3, 5, 7)]
  assert seen[7][0] > 100 * max(good)
  expected = [loss for loss, *_ in poisoned('one')]
  np.testing.assert_allclose([loss for loss, *_ in seen], expected, rtol=1e-5)
  np.testing.assert_allclose(
    seen[-1][2].mean, poisoned('one')[-1][2].mean, rtol=1e-5
  )


@pytest.mark.parametrize('mesh_name', ['one', 'fsdp'])
def test_post_hoc_emas_average_the_accepted_steps(
  training, batch, random_params, mesh_name
):
  made = training(mesh_name)
  state, history = made.new_state(random_params(made.model, 8)), []
  for step in range(9):
    before = jax.device_get(state.lags)
    good = step not in (0, 4)
    state, _ = made.run(state, batch, factor=1.0 if good else np.inf)
    if good:
      history.append(jax.device_get(state.params))
    else:
      jax.tree.map(
        np.testing.assert_array_equal, before, jax.device_get(state.lags)
      )
  found = post_hoc_ema.from_lags(state.lags, state.params)
  assert [*found] == ['0.05', '0.25']
  for sigma_rel, ema in found.items():
    power = post_hoc_ema.exponent(float(sigma_rel)) + 1
    weights = np.diff((np.arange(8) / 7) ** power)

    def brute_force(*leaves, weights=weights):
      return np.tensordot(weights, np.float64(leaves), 1)

    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
      jax.device_get(ema),
      jax.tree.map(brute_force, *history),
    )
  lag = max(abs(leaf).max() for leaf in jax.tree.leaves(state.lags['0.25']))
  assert lag > 1e-2


def test_state_is_donated(training, batch):
  made = training('one')
  state = made.new_state(made.model.init(0, 8))
  after, _ = made.run(state, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert int(after.step) == 1


def test_learns(training, batch):
  made = training('one')
  state = made.new_state(made.model.init(0, 8))
  state, before = made.run(state, batch)
  for _ in range(20):
    state, _ = made.run(state, batch)
  # The loss with the times and noise of the first step.
  first = jax.device_put(jnp.int32(0), state.step.sharding)
  _, after = made.run(state._replace(step=first), batch)
  assert after['loss'] < 0.7 * before['loss']


def test_dropped_captions_are_the_empty_caption(
  training, batch, random_params, make_config
):
  made = training('one')
  empty = make_tokenizer(make_config()).encode('')
  empty_batch = batch | {'text': np.broadcast_to(empty, batch['text'].shape)}

  def loss(batch, dropout):
    state = made.new_state(random_params(made.model, 8))
    return float(made.run(state, batch, dropout)[1]['loss'])

  dropped, kept = loss(batch, 1.0), loss(batch, 0.0)
  assert dropped == loss(empty_batch, 0.0)
  assert abs(dropped - kept) > 1e-4
  assert loss(batch, 0.5) not in (dropped, kept)


def test_mixed_batch(training, batch, random_params):
  """Level 1 does not see the images whose finest level is 8 px."""
  made = training('one')

  def level_losses(**changes):
    state = made.new_state(random_params(made.model, 8))
    return made.run(state, batch | changes)[1]['level_losses']

  expected = level_losses()
  changed = level_losses(image_8=255 - batch['image_8'])
  assert changed[1] == expected[1]
  assert abs(changed[0] - expected[0]) > 1e-3
  changed = level_losses(image=255 - batch['image'])
  assert (abs(changed - expected) > 1e-3).all()


def test_all_images_may_be_at_the_finest_resolution(
  training, batch, random_params, make_config
):
  """Each image keeps its text when 8 px images are between finer ones."""
  made = training('one')
  config = make_config()
  config.stages[1].mixed_ratio = (1.0, 1.0)
  step = jax.jit(
    make_band_step(made.model, make_objective(config, config.stages[1]), 0, 1)
  )
  params = random_params(made.model, 8)
  whole = batch | {
    'image': np.stack(
      [batch['image'], batch['image_8'].repeat(2, 1).repeat(2, 2)],
      axis=1,
    ).reshape(BATCH, 16, 16, 3)
  }
  del whole['image_8']
  np.testing.assert_allclose(
    step(params, whole, 0), step(params, batch, 0), rtol=1e-5
  )


def test_losses_by_bands_of_noise(training, batch, random_params, make_config):
  """The batch is mixed: the finer level sees half of the examples."""
  made = training('one')
  config = make_config()
  config.stages[1].update(mixed_ratio=(1.0, 1.0), loss_weights=(3.0, 0.5))
  objective = make_objective(config, config.stages[1])
  coarse = dataclasses.replace(objective, weights=(1.0, 0.0))

  @jax.jit
  def measure(params, batch):
    model = made.model
    t, eps = sample_noise(
      objective,
      model.level_shapes,
      batch,
      jax.random.fold_in(jax.random.key(0), 5),
    )
    return (
      make_band_step(model, objective, 0, 4)(params, batch, 5),
      batch_losses(model, objective, params, batch, t, eps)[1]['level_losses'],
      t,
      batch_losses(model, coarse, params, batch, t, eps)[0],
    )

  (sums, counts, squares), means, t, coarse_losses = measure(
    random_params(made.model, 8), batch
  )
  np.testing.assert_allclose(sums.sum(1) / counts.sum(1), means, rtol=1e-5)
  bands = np.asarray(t) // 250
  for seen, row in ((bands, counts[0]), (bands[::2], counts[1])):
    np.testing.assert_array_equal(row, np.bincount(seen, minlength=4))
  np.testing.assert_allclose(
    sums[0], np.bincount(bands, coarse_losses, 4), rtol=1e-5
  )
  np.testing.assert_allclose(
    squares[0], np.bincount(bands, coarse_losses**2, 4), rtol=1e-5
  )


@pytest.mark.parametrize('accumulate', [1, 2])
def test_no_example_of_a_mixed_batch_changes_its_device(training, accumulate):
  text = training('data', accumulate).compiled().as_text()
  collectives = set(
    re.findall(
      r'(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)'
      r'(?:-start)?\(',
      text,
    )
  )
  assert collectives == {'all-reduce'}


def test_spatial_divides_rows(training):
  """No device has whole features in convolutions, norms or attention."""
  one, eight = (training(name).compiled() for name in ('one', 'spatial'))
  # Features of either level, and the logits of the attention among pixels.
  whole = r' f32\[(?:32,8,8,\d+|16,16,16,\d+|32,2,64,64)\]'
  assert len(re.findall(whole, one.as_text())) > 100
  assert not re.findall(whole, eight.as_text())
  assert re.search(r' f32\[32,2,8,64\]', eight.as_text())
  flops, memory = (
    [measure(compiled) for compiled in (one, eight)]
    for measure in (
      lambda compiled: compiled.cost_analysis()['flops'],
      lambda compiled: compiled.memory_analysis().temp_size_in_bytes,
    )
  )
  assert flops[1] < flops[0] / 6
  assert memory[1] < memory[0] / 5


def test_kernels_larger_than_the_features(make_config, random_params):
  """A step on a mesh that divides both, against one device."""
  config = make_config()
  config.model.levels[0].update(
    channels=(16, 16), num_blocks=(0, 0), attention_layers=(0, 0)
  )
  config.stages[0].update(batch_size=8, learning_rate=1e-2)
  stage = make_stage(config, 0)
  (batch,) = stage.make_dataset('train', num_batches=1)
  flags = {name: np.zeros(8, bool) for name in ('stop', 'save')}
  params = random_params(stage.model, config.text.max_length)
  norms = []
  for name in ('one', 'all'):
    mesh = mesh_of(name)
    shapes = stage.state_shapes(mesh)
    state = jax.jit(
      stage.new_state, out_shardings=jax.tree.map(lambda x: x.sharding, shapes)
    )(params)
    placed = sharding.shard_batch(batch | flags, mesh)
    step = stage.make_train_step(empty_text(config), mesh)
    norm_of = jax.jit(lambda *given, step=step: step(*given)[1]['grad_norm'])
    norms.append(norm_of(state, placed, {}))
  np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
