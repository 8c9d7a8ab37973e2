"""Averages are weighted sums; any width is made of two that were tracked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import averages

TRACKED = (0.05, 0.1)
STEPS = 320


def shares(width: float, count: int) -> np.ndarray:
  """Of each update in an average, by the integral of its profile [count]."""
  power = averages.exponent(width) + 1
  return np.diff((np.arange(count + 1) / count) ** power)


@functools.cache
def history() -> np.ndarray:
  """Parameters after every update, [STEPS, 6]: around one, wandering."""
  rng = np.random.default_rng(0)
  return np.float32(1 + 0.02 * rng.standard_normal((STEPS, 6)).cumsum(0))


@functools.cache
def tracked() -> dict[str, np.ndarray]:
  """Each average after every update, [STEPS, 6]."""

  def step(state, x):
    old, lags = state
    count, new = x
    lags = averages.update_lags(lags, old, new, count)
    return (new, lags), averages.from_lags(lags, new)

  start = jnp.full(6, 100.0)
  return jax.lax.scan(
    step,
    (start, averages.new_lags(start, TRACKED)),
    (jnp.arange(1, STEPS + 1), history()),
  )[1]


@pytest.mark.parametrize(
  'gamma, width',
  [
    # Karras et al., section 3.1.
    (6.94, 0.10),
    (16.97, 0.05),
    (0.0001, averages.MAX_WIDTH),
  ],
)
def test_exponent(gamma, width):
  found = averages.exponent(width * (1 - 1e-6))
  assert found == pytest.approx(gamma, abs=0.005)
  assert ((found + 1) / ((found + 2) ** 2 * (found + 3))) ** 0.5 == (
    pytest.approx(width, rel=1e-5)
  )


@pytest.mark.parametrize('width', [0.0, -0.1, 0.2887])
def test_width_out_of_range(width):
  with pytest.raises(ValueError, match=f'width {width}: it must be more than'):
    averages.exponent(width)


@pytest.mark.parametrize('width', TRACKED)
def test_tracked_equals_brute_force(width):
  for count in (1, 2, 3, 40, STEPS):
    weights = shares(width, count)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(
      tracked()[str(width)][count - 1],
      weights @ np.float64(history()[:count]),
      rtol=0,
      atol=1e-6,
    )


def test_width_is_the_spread_of_the_shares():
  weights, times = shares(0.1, 5000), (np.arange(5000) + 0.5) / 5000
  mean = weights @ times
  assert (weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(0.1, rel=1e-3)


def rebuild(width, count, number):
  """From `number` snapshots -> coefficients, shares, the average itself."""
  counts = [STEPS * i // number for i in range(1, number + 1)] * 2
  widths = np.repeat(TRACKED, number)
  found = averages.coefficients(widths, counts, width, count)
  weights = sum(
    c * np.pad(shares(w, t), (0, STEPS - t))
    for c, w, t in zip(found, widths, counts)
  )
  average = sum(
    c * np.float64(tracked()[str(w)][t - 1])
    for c, w, t in zip(found, widths, counts)
  )
  return found, weights, average


@pytest.mark.parametrize('width', TRACKED)
def test_a_tracked_width_is_its_own_snapshot(width):
  found, _, average = rebuild(width, STEPS, 8)
  expected = np.zeros(16)
  expected[7 if width == 0.05 else 15] = 1
  np.testing.assert_allclose(found, expected, atol=1e-12)
  np.testing.assert_allclose(
    average, shares(width, STEPS) @ np.float64(history()), atol=1e-6
  )


@pytest.mark.parametrize('count', [STEPS, STEPS * 7 // 8])
@pytest.mark.parametrize('width', [0.03, 0.07, 0.15, 0.25])
def test_reconstruction_is_the_sum_that_it_says(width, count):
  found, weights, average = rebuild(width, count, 16)
  assert found.sum() == pytest.approx(1)
  assert abs(found).sum() < 10
  np.testing.assert_allclose(
    average, weights @ np.float64(history()), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize(
  'width, far',
  [
    (0.07, (4e-2, 1.5e-2, 4e-3)),
    (0.08, (3e-2, 1.2e-2, 4e-3)),
    (0.12, (5e-2, 1.5e-2, 4e-3)),
    (0.15, (0.12, 4e-2, 1e-2)),
    (0.2, (0.3, 0.1, 3e-2)),
  ],
)
def test_more_snapshots_come_closer(width, far):
  expected = shares(width, STEPS)
  for number, most in zip((4, 8, 16), far):
    _, weights, _ = rebuild(width, STEPS, number)
    distance = np.linalg.norm(weights - expected) / np.linalg.norm(expected)
    assert distance < most


@pytest.mark.parametrize('width', [0.06, 0.08, 0.12, 0.15])
def test_close_snapshots_equal_brute_force(width):
  for count in (STEPS, 200):
    found, _, average = rebuild(width, count, 160)
    assert abs(found).sum() < 2
    np.testing.assert_allclose(
      average,
      shares(width, count) @ np.float64(history()[:count]),
      rtol=0,
      atol=1e-6,
    )


def test_a_million_updates_in_float32():
  """Each of them moves an average by less than its last digit."""
  rng = np.random.default_rng(0)
  history = 1 + np.float32(1e-5) * rng.standard_normal(
    (10**6, 2), np.float32
  ).cumsum(0)

  def step(state, x):
    count, new = x
    return (new, averages.update_lags(state[1], state[0], new, count)), None

  start = jnp.ones(2)
  (last, lags), _ = jax.lax.scan(
    step,
    (start, averages.new_lags(start, (0.1, 0.2))),
    (jnp.arange(1, 10**6 + 1), history),
  )
  for width, average in averages.from_lags(lags, last).items():
    expected = shares(float(width), 10**6) @ np.float64(history)
    assert abs(expected - last).max() > 5e-4
    np.testing.assert_allclose(average, expected, rtol=0, atol=1e-6)
