"""What a loss depends on beside its own example: the whole batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import make_objective, make_optimizer
from mdm_jax.models.conditioning import PrecomputedTextEncoder
from mdm_jax.optim.skip_step import SkipRule
from mdm_jax.runtime import sharding
from mdm_jax.steps.evaluate import make_band_step
from mdm_jax.steps.objective import (
  batch_losses,
  losses_by_noise,
  sample_noise,
  with_whole,
)
from mdm_jax.steps.train import make_train_step, new_state

BATCH = 16
WIDTH = 12
LONGEST = 9  # tokens of the first text alone
LENGTHS = [LONGEST, *(2 + i % 5 for i in range(BATCH - 1))]


@pytest.fixture(scope='module')
def config(make_config):
  """Text as in the released models, and weights over the times."""
  config = make_config()
  config.text.padding = 'longest'
  config.model.text.masked_attention = False
  config.diffusion.update(time_weights='vdm', normalize_time_weights=True)
  return config


@pytest.fixture(scope='module')
def model(config):
  # Without parameters of its own that depend on the length of the arrays.
  return dataclasses.replace(
    make_model(config, config.stages[0]),
    text_encoder=PrecomputedTextEncoder(WIDTH, jnp.float32),
    frozen_text=True,
  )


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  mask = np.arange(24) < np.array(LENGTHS)[:, None]
  return {
    'image': rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
    'text': 3
    * rng.standard_normal((*mask.shape, WIDTH), np.float32)
    * mask[..., None],
    'scale': np.full(BATCH, 8, np.float32),
    **{name: np.zeros(BATCH, bool) for name in ('bad', 'stop', 'save')},
  }


@pytest.fixture(scope='module')
def params(model, random_params):
  return random_params(model, 24)


@pytest.fixture(scope='module')
def trained(config, params):
  """(model, batch, mesh, microbatches) -> metrics of a step, and its params."""

  def train(model, batch, sizes=(1, 1, 1), accumulate=1):
    stage = config.stages[0]
    optimizer, _ = make_optimizer(config, stage)
    mesh = sharding.make_mesh(
      dict(zip(sharding.AXES, sizes)), jax.devices()[: math.prod(sizes)]
    )
    step = make_train_step(
      model,
      make_objective(config, stage),
      optimizer,
      skip_rule=SkipRule(spike_factor=0, window=3, max_skipped=9),
      ema_decay=0.99,
      caption_dropout=0.0,
      empty_text=batch['text'][1],
      seed=0,
      accumulate=accumulate,
    )
    state = jax.eval_shape(lambda: new_state(params, optimizer))
    state = jax.jit(
      lambda: new_state(params, optimizer),
      out_shardings=sharding.tree_shardings(state, mesh, config.sharding_rules),
    )()
    state, metrics = jax.jit(step)(state, sharding.shard_batch(batch, mesh), {})
    return float(metrics['loss']), float(metrics['grad_norm'])

  return train


def test_the_longest_text_is_that_of_the_whole_batch(trained, model, batch):
  """One of 16 holds it: of four devices in each of four microbatches."""
  expected = trained(model, batch)
  np.testing.assert_allclose(
    trained(model, batch, (2, 2, 1), 4), expected, rtol=1e-5
  )


def test_losses_are_those_of_arrays_of_the_longest_text(
  config, model, batch, params
):
  objective = make_objective(config, config.stages[0])
  bare = batch | {'text': batch['text'][:, :LONGEST]}
  plain = dataclasses.replace(model, to_longest=False)

  def loss(model, batch):
    step = jax.jit(make_band_step(model, objective, seed=0, num_bands=1))
    sums, counts, _ = step(params, batch, 0)
    return float(sums[0, 0] / counts[0, 0])

  expected = loss(plain, bare)
  np.testing.assert_allclose(loss(model, batch), expected, rtol=1e-6)
  assert abs(loss(plain, batch) - expected) > 1e-4


def test_weights_are_divided_by_their_sum_over_the_batch(
  config, model, batch, params
):
  """As in the release's trainer: sum(losses * weights) / sum(weights)."""
  objective = make_objective(config, config.stages[0])
  t, eps = sample_noise(objective, model.level_shapes, batch, jax.random.key(0))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def mean_loss(is_weighted, is_normalized):
    changed = dataclasses.replace(
      objective,
      time_weights=objective.time_weights if is_weighted else None,
      normalize_weights=is_normalized,
    )
    return batch_losses(model, changed, params, batch, t, eps)[0]

  losses, weights = mean_loss(False, True), objective.time_weights[t + 1]
  assert weights.max() > 5 * weights.min() > 0
  np.testing.assert_allclose(
    mean_loss(True, True).mean(), (losses * weights).sum() / weights.sum(), 1e-5
  )
  np.testing.assert_allclose(
    mean_loss(True, False).mean(), (losses * weights).mean(), 1e-5
  )


def test_bands_of_levels_with_times_of_their_own(config):
  """The finer level sees the first of every two examples."""
  objective = make_objective(config, config.stages[1])
  t = np.array([[0, 999], [260, 5], [999, 260], [251, 7]])
  losses = np.array([1.0, 2, 4, 8]), np.array([16.0, 32])
  sums, counts = losses_by_noise(objective, losses, t, 4)
  np.testing.assert_array_equal(sums, [[1, 10, 0, 4], [0, 32, 0, 16]])
  np.testing.assert_array_equal(counts, [[1, 2, 0, 1], [0, 1, 0, 1]])


def test_level_weights_are_divided_by_their_mean(config, model, batch):
  changed = config.copy_and_resolve_references()
  changed.diffusion.time_weights = 'min_snr'
  objective = make_objective(changed, changed.stages[1])
  t = np.arange(0, 960, 60)
  whole = with_whole(model, objective, batch, t)
  table = objective.time_weights.astype(np.float64)
  np.testing.assert_allclose(
    whole['mean_weight'], np.full(BATCH, table[:, t + 1].mean()), rtol=1e-6
  )
