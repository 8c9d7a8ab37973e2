import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import mixed_batch
from mdm_jax.diffusion import loss, process
from mdm_jax.diffusion import pyramid as pyramids
from mdm_jax.diffusion.schedule import make_schedule
from mdm_jax.diffusion.weights import vdm_weights

SCHEDULE = make_schedule('deepfloyd', (4, 8), 1.0)
T = np.array([0, 300, 700, 999])


def _half(x_t, t):
  """A network whose output depends on the image and on the time."""
  return tuple(
    0.5 * x * (1 + t[: len(x), None, None, None] / 1000) for x in x_t
  )


def _batch(fractions=(1, 1)):
  rng = np.random.default_rng(2)
  images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
  pyramid = pyramids.make_pyramid(images, [(4, 4, 3), (8, 8, 3)], fractions)
  eps = tuple(rng.normal(size=x.shape).astype(np.float32) for x in pyramid)
  return pyramid, eps


def _brute_force(pyramid, eps, weights, fractions):
  """The eps loss of `_half` for a v network, one example at a time."""
  total = np.zeros(4)
  for level, (images, noise) in enumerate(zip(pyramid, eps, strict=True)):
    for example in range(len(images)):
      t = T[example]
      gamma = float(SCHEDULE.gammas[level, t + 1])
      signal, sigma = np.sqrt(gamma), np.sqrt(1 - gamma)
      x_t = signal * np.array(images[example], float)
      x_t += sigma * noise[example]
      predicted = signal * 0.5 * x_t * (1 + t / 1000) + sigma * x_t
      error = np.mean((predicted - noise[example]) ** 2)
      total[example] += weights[level] * error / fractions[level]
  return total


@pytest.mark.parametrize('fractions', [(1, 1), (1, 0.5)])
def test_levels_are_weighted_and_divided_by_their_fraction(fractions):
  pyramid, eps = _batch(fractions)
  losses, aux = loss.multi_resolution_loss(
    _half, SCHEDULE, pyramid, T, eps, weights=(1, 4)
  )
  expected = _brute_force(pyramid, eps, (1, 4), fractions)
  assert losses.shape == (4,) and losses.dtype == jnp.float32
  np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(
    aux['level_losses'] @ np.array([1, 4]), expected.mean(), rtol=2e-5
  )


def test_a_pattern_that_repeats():
  pyramid, eps = _batch((1, 0.5))

  def losses(x0, t, eps, repeats):
    def denoise(x_t, t):
      times = (mixed_batch.take(t, len(x), repeats) for x in x_t)
      return tuple(
        x * time[:, None, None, None] / 1000
        for x, time in zip(x_t, times, strict=True)
      )

    return loss.multi_resolution_loss(
      denoise, SCHEDULE, x0, t, eps, weights=(1, 4), repeats=repeats
    )

  def twice(tree):
    return jax.tree.map(lambda x: np.concatenate([x, x]), tree)

  once, once_levels = losses(pyramid, T, eps, 1)
  found, levels = losses(twice(pyramid), twice(T), twice(eps), 2)
  np.testing.assert_allclose(found, twice(once), rtol=1e-6)
  np.testing.assert_allclose(
    levels['level_losses'], once_levels['level_losses'], rtol=1e-6
  )


def test_time_weights_are_read_at_the_next_step():
  pyramid, eps = _batch()
  table = vdm_weights(SCHEDULE.gammas[0])
  plain, _ = loss.multi_resolution_loss(
    _half, SCHEDULE, pyramid, T, eps, weights=(1, 1)
  )
  weighted, _ = loss.multi_resolution_loss(
    _half, SCHEDULE, pyramid, T, eps, weights=(1, 1), time_weights=table
  )
  np.testing.assert_allclose(
    weighted, plain * table[[1, 301, 701, 1000]], rtol=1e-6
  )


@pytest.mark.parametrize('space', ['v', 'eps', 'x0', 'velocity'])
def test_spaces_weigh_the_error_of_x0_by_functions_of_the_snr(space):
  rng = np.random.default_rng(3)
  x0, eps, prediction = rng.normal(size=(3, 3, 4, 4, 3)).astype(np.float32)
  gamma = np.array([0.1, 0.5, 0.9], np.float32)[:, None, None, None]
  at = process.Coefficients(np.sqrt(gamma), np.sqrt(1 - gamma))
  x_t = process.add_noise(x0, eps, at)
  got = loss.level_loss(
    prediction, x_t, x0, eps, at, parameterization='x0', loss_space=space
  )
  snr = (gamma / (1 - gamma)).ravel()
  weight = {
    'v': snr + 1,
    'eps': snr,
    'x0': 1,
    'velocity': (1 + np.sqrt(snr)) ** 2,
  }[space]
  expected = weight * np.mean((prediction - x0) ** 2, (1, 2, 3))
  np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize('parameterization', ['v', 'eps', 'x0', 'velocity'])
def test_a_perfect_network_has_no_loss(parameterization):
  pyramid, eps = _batch()
  t = np.full(4, 400)

  def perfect(x_t, t):
    coefficients = loss.training_coefficients(SCHEDULE, x_t, t)
    return tuple(
      process.target(x0, noise, at, parameterization)
      for x0, noise, at in zip(pyramid, eps, coefficients, strict=True)
    )

  losses, _ = loss.multi_resolution_loss(
    perfect,
    SCHEDULE,
    pyramid,
    t,
    eps,
    weights=(1, 1),
    parameterization=parameterization,
    loss_space='v',
  )
  np.testing.assert_allclose(losses, 0, atol=1e-10)


def test_a_bfloat16_prediction_is_measured_in_float32():
  pyramid, eps = _batch()

  def zeros(x_t, t):
    return tuple(jnp.zeros_like(x, jnp.bfloat16) for x in x_t)

  losses, _ = loss.multi_resolution_loss(
    zeros, SCHEDULE, pyramid, T, eps, weights=(0, 1), loss_space='v'
  )
  gamma = SCHEDULE.gammas[1, T + 1][:, None, None, None]
  v = np.sqrt(gamma) * eps[1] - np.sqrt(1 - gamma) * pyramid[1]
  np.testing.assert_allclose(losses, np.mean(v**2, (1, 2, 3)), rtol=1e-5)


def test_an_unknown_space_is_named():
  pyramid, eps = _batch()
  with pytest.raises(ValueError, match="'score'"):
    loss.multi_resolution_loss(
      _half, SCHEDULE, pyramid, T, eps, weights=(1, 1), loss_space='score'
    )


def test_time_indices_are_uniform():
  t = np.array(loss.sample_time(jax.random.key(4), 50_000, 10))
  counts = np.bincount(t, minlength=10)
  assert len(counts) == 10
  np.testing.assert_allclose(counts / 50_000, 0.1, atol=0.006)


def test_the_default_times_are_those_of_randint():
  key = jax.random.key(7)
  np.testing.assert_array_equal(
    loss.sample_time(key, 64, 1000), jax.random.randint(key, (64,), 0, 1000)
  )


def _shares(t, num_bins=20):
  return np.bincount(np.ravel(t) * num_bins // 1000, minlength=num_bins)


@pytest.mark.parametrize('stratified', [False, True])
@pytest.mark.parametrize('mean, std', [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_times(mean, std, stratified):
  """The shares of 20 bins, by the normal distribution of the logit."""
  density = loss.TimeDensity('logit_normal', (mean, std), stratified)
  t = np.asarray(loss.sample_time(jax.random.key(1), 40_000, 1000, density))
  assert t.dtype == np.int32 and t.min() >= 0 and t.max() <= 999
  edges = np.arange(1, 20) / 20
  below = [
    0.5 * (1 + math.erf((math.log(x / (1 - x)) - mean) / std / 2**0.5))
    for x in edges
  ]
  expected = np.diff([0, *below, 1])
  np.testing.assert_allclose(
    _shares(t) / 40_000, expected, atol=5e-5 if stratified else 0.008
  )


def test_stratified_times_are_one_of_each_part_in_random_order():
  density = loss.TimeDensity(stratified=True)
  batches = [
    np.asarray(loss.sample_time(jax.random.key(seed), 50, 1000, density))
    for seed in range(40)
  ]
  for t in batches:
    np.testing.assert_array_equal(np.sort(t) // 20, np.arange(50))
  assert len({tuple(t // 20) for t in batches}) == 40
  assert len({int(t.min()) for t in batches}) > 10
  # Each example's time is uniform: half of them are in the upper half.
  first = np.array([t[:25] for t in batches])
  assert 0.45 < np.mean(first >= 500) < 0.55


@pytest.mark.parametrize('stratified', [False, True])
def test_independent_times_of_the_levels(stratified):
  density = loss.TimeDensity(stratified=stratified)
  t = np.asarray(loss.sample_time(jax.random.key(2), 4000, 1000, density, 3))
  assert t.shape == (4000, 3)
  assert np.abs(np.corrcoef(t.T) - np.eye(3)).max() < 0.06
  for column in t.T:
    np.testing.assert_allclose(
      _shares(column) / 4000, 0.05, atol=5e-4 if stratified else 0.015
    )


def test_an_unknown_density_is_named():
  with pytest.raises(ValueError, match="'cauchy'"):
    loss.sample_time(jax.random.key(0), 2, 10, loss.TimeDensity('cauchy'))


def test_each_level_at_a_time_of_its_own():
  """In a mixed batch, one example at a time; weights of each level."""
  fractions, table = (1, 0.5), np.random.default_rng(5).uniform(size=(2, 1001))
  pyramid, eps = _batch(fractions)
  t = np.array([[0, 900], [300, 10], [700, 350], [999, 5]])

  def network(x_t, t):
    return tuple(
      0.5
      * x
      * (1 + mixed_batch.times(t, level, len(x), 1)[:, None, None, None] / 1000)
      for level, x in enumerate(x_t)
    )

  found, _ = loss.multi_resolution_loss(
    network,
    SCHEDULE,
    pyramid,
    t,
    eps,
    weights=(1, 4),
    time_weights=table.astype(np.float32),
  )
  expected = np.zeros(4)
  for level, (images, noise) in enumerate(zip(pyramid, eps, strict=True)):
    for i, (image, its_noise) in enumerate(zip(images, noise, strict=True)):
      time = t[i, level]
      gamma = float(SCHEDULE.gammas[level, time + 1])
      signal, sigma = np.sqrt(gamma), np.sqrt(1 - gamma)
      x_t = signal * np.array(image, float) + sigma * its_noise
      predicted = signal * 0.5 * x_t * (1 + time / 1000) + sigma * x_t
      error = np.mean((predicted - its_noise) ** 2)
      weight = table[level, time + 1] * (1, 4)[level] / fractions[level]
      expected[i] += weight * error
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
  # Equal times are those that the levels share.
  same = np.repeat(t[:, :1], 2, axis=1)
  for given in (table, table[0]):
    weighed = [
      loss.multi_resolution_loss(
        network,
        SCHEDULE,
        pyramid,
        times,
        eps,
        weights=(1, 4),
        time_weights=given.astype(np.float32),
      )[0]
      for times in (t[:, 0], same)
    ]
    np.testing.assert_allclose(weighed[0], weighed[1], rtol=1e-6)


@pytest.mark.parametrize('space', ['eps', 'x0', 'velocity'])
def test_the_linear_path_is_the_other_one_rescaled(space):
  """The same errors of the same images, whose x_t is divided by its norm."""
  rng = np.random.default_rng(6)
  x0, eps, v = rng.normal(size=(3, 3, 32, 32, 3)).astype(np.float32)
  t = np.array([0.2, 0.5, 0.8])[:, None, None, None]
  norm = np.sqrt((1 - t) ** 2 + t**2)
  flow = process.Coefficients(np.float32(1 - t), np.float32(t))
  rotation = process.Coefficients(
    np.float32((1 - t) / norm), np.float32(t / norm)
  )
  x_t = process.add_noise(x0, eps, rotation)
  velocity = process.predict_velocity(v, x_t, rotation, 'v')
  expected, found = (
    loss.level_loss(
      prediction,
      process.add_noise(x0, eps, at),
      x0,
      eps,
      at,
      parameterization=parameterization,
      loss_space=space,
    )
    for prediction, at, parameterization in (
      (v, rotation, 'v'),
      (velocity, flow, 'velocity'),
    )
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('space', ['eps', 'velocity'])
def test_the_noise_floor_limits_the_error_of_x0(space):
  """With x0 prediction and a velocity loss, as the code of JiT has it."""
  rng = np.random.default_rng(8)
  x0, eps, prediction = rng.normal(size=(3, 3, 4, 4, 3))
  t = np.array([0.0005, 0.04, 0.3])[:, None, None, None]
  x_t = (1 - t) * x0 + t * eps
  slopes = [(x_t - image) / np.maximum(t, 0.05) for image in (prediction, x0)]
  error = slopes[0] - slopes[1]
  if space == 'eps':
    error *= 1 - t
  at = process.Coefficients(np.float32(1 - t), np.float32(t))
  found = loss.level_loss(
    *map(np.float32, (prediction, x_t, x0, eps)),
    at,
    parameterization='x0',
    loss_space=space,
    noise_floor=0.05,
  )
  np.testing.assert_allclose(
    found, np.mean(error**2, axis=(1, 2, 3)), rtol=1e-3
  )
