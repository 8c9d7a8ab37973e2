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
  pyramid = pyramids.make_pyramid(images, (4, 8), fractions)
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
