"""Weights of the noising steps: the papers' formulas, and their limits."""

import jax
import numpy as np
import pytest

from mdm_jax.diffusion import loss
from mdm_jax.diffusion.schedule import make_gammas, make_schedule
from mdm_jax.diffusion.weights import level_weights, vdm_weights

PARAMETERS = {'min_snr_gamma': 5.0, 'sigmoid_bias': -1.5, 'p2': (0.7, 1.3)}
SCHEDULES = {
  name: make_schedule(name, (8, 16), 2.0, 200)
  for name in ('deepfloyd', 'ddpm', 'cosine', 'linear')
}


@pytest.mark.parametrize('name', ('deepfloyd', 'ddpm', 'cosine'))
def test_vdm_weights_equal_the_released(golden, name):
  weights = vdm_weights(make_gammas(name))
  expected = golden('schedules')[f'{name}_vdm_loss_weights']
  np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


def _papers(name, space, gammas):
  """One entry at a time, each as its paper has it for that prediction."""
  table = []
  for k in range(1, len(gammas)):
    snr = float(gammas[k]) / (1 - float(gammas[k]))
    v, velocity = 1 + snr, (1 + snr**0.5) ** 2
    if name == 'min_snr':
      clipped = min(snr, 5.0)
      table.append(
        {
          'x0': clipped,
          'eps': clipped / snr,
          'v': clipped / v,
          'velocity': clipped / velocity,
        }[space]
      )
    elif name == 'p2':
      simple = 1 / (1.3 + snr) ** 0.7
      table.append(
        {
          'eps': simple,
          'x0': simple * snr,
          'v': simple * snr / v,
          'velocity': simple * snr / velocity,
        }[space]
      )
    else:
      earlier, later = (float(g) for g in gammas[max(k - 1, 1) : max(k, 2) + 1])
      change = earlier / (1 - earlier) * (1 - later) / later - 1
      # SiD2 writes it for x0: exp(b) sigmoid(logSNR - b).
      x0 = change * np.exp(-1.5) / (1 + np.exp(-1.5) / snr)
      table.append(
        {
          'x0': x0,
          'eps': x0 / snr,
          'v': x0 / v,
          'velocity': x0 / velocity,
        }[space]
      )
  return [table[0], *table]


@pytest.mark.parametrize('space', ('eps', 'x0', 'v', 'velocity'))
@pytest.mark.parametrize('name', ('min_snr', 'sigmoid', 'p2'))
@pytest.mark.parametrize('schedule', SCHEDULES.values(), ids=SCHEDULES)
def test_weights_equal_the_papers(schedule, name, space):
  found = level_weights(name, schedule, space, **PARAMETERS)
  assert found.shape == (2, 201) and found.dtype == np.float32
  for row, gammas in zip(found, schedule.gammas, strict=True):
    expected = _papers(name, space, gammas)
    # The rows are rounded to float32, and with them the changes of the first.
    rtol = 1e-6 if schedule.is_linear or name != 'sigmoid' else 0.05
    np.testing.assert_allclose(row, expected, rtol=rtol)


@pytest.mark.parametrize('schedule', SCHEDULES.values(), ids=SCHEDULES)
def test_limits_are_the_other_weights(schedule):
  def weights(name, **changes):
    return level_weights(name, schedule, 'eps', **PARAMETERS | changes)

  np.testing.assert_allclose(
    weights('min_snr', min_snr_gamma=np.inf), 1, rtol=1e-6
  )
  np.testing.assert_allclose(weights('p2', p2=(0.0, 1.0)), 1, rtol=1e-6)
  np.testing.assert_allclose(
    weights('sigmoid', sigmoid_bias=np.inf),
    [vdm_weights(schedule.gammas[0])] * 2,
    rtol=1e-6,
  )


def test_unknown_weights_are_named():
  with pytest.raises(ValueError, match="'max_snr'"):
    level_weights('max_snr', SCHEDULES['ddpm'], 'eps', **PARAMETERS)


@pytest.mark.parametrize('name', ('min_snr', 'sigmoid', 'p2'))
@pytest.mark.parametrize('path', ('deepfloyd', 'linear'))
def test_the_loss_is_the_same_in_every_space(path, name):
  """Of a network that predicts x0, whose error is 0.1 of the image."""
  schedule = SCHEDULES[path]
  rng = np.random.default_rng(4)
  pyramid, eps = (
    tuple(
      rng.normal(size=(4, side, side, 3)).astype(np.float32) for side in (8, 16)
    )
    for _ in range(2)
  )
  t = np.array([60, 100, 150, 190])

  def measure(space):
    return loss.multi_resolution_loss(
      lambda x_t, t: tuple(0.9 * x0 for x0 in pyramid),
      schedule,
      pyramid,
      t,
      eps,
      parameterization='x0',
      loss_space=space,
      weights=(1, 2),
      time_weights=level_weights(name, schedule, space, **PARAMETERS),
    )[0]

  expected = sum(
    factor
    * level_weights(name, schedule, 'x0', **PARAMETERS)[level, t + 1]
    * np.mean((0.1 * pyramid[level]) ** 2, (1, 2, 3))
    for level, factor in enumerate((1, 2))
  )
  spaces = ('x0', 'eps', 'velocity', *(['v'] if path != 'linear' else []))
  for space in spaces:
    np.testing.assert_allclose(measure(space), expected, rtol=1e-4)


def test_weights_at_times_of_each_level():
  table = np.arange(22.0).reshape(2, 11)
  shared, own = np.array([0, 9, 3]), np.array([[0, 1], [9, 3], [3, 3]])
  for weights, t, expected in (
    (table[0], shared, [1, 10, 4]),
    (table, shared, [[1, 12], [10, 21], [4, 15]]),
    (table[0], own, [[1, 2], [10, 4], [4, 4]]),
    (table, own, [[1, 13], [10, 15], [4, 15]]),
  ):
    found = jax.jit(loss.weights_at)(weights, t)
    np.testing.assert_array_equal(found, expected)
