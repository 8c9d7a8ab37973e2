"""Tracked EMAs are weighted sums; two of them give any other sigma_rel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.optim import post_hoc_ema

TRACKED = (0.05, 0.1)
STEPS = 320


def profile(sigma_rel: float, count: int) -> np.ndarray:
  """Weight of each update in an EMA, from its profile's integral [count]."""
  power = post_hoc_ema.exponent(sigma_rel) + 1
  return np.diff((np.arange(count + 1) / count) ** power)


@functools.cache
def history() -> np.ndarray:
  """Parameters after every update, random walks around one [STEPS, 6]."""
  rng = np.random.default_rng(0)
  return np.float32(1 + 0.02 * rng.standard_normal((STEPS, 6)).cumsum(0))


@functools.cache
def tracked() -> dict[str, np.ndarray]:
  """Each EMA after every update, [STEPS, 6], by sigma_rel as text."""

  def step(state, x):
    old, lags = state
    count, new = x
    lags = post_hoc_ema.update_lags(lags, old, new, count)
    return (new, lags), post_hoc_ema.from_lags(lags, new)

  start = jnp.full(6, 100.0)
  return jax.lax.scan(
    step,
    (start, post_hoc_ema.new_lags(start, TRACKED)),
    (jnp.arange(1, STEPS + 1), history()),
  )[1]


@pytest.mark.parametrize(
  'gamma, sigma_rel',
  [
    # Karras et al., section 3.1.
    (6.94, 0.10),
    (16.97, 0.05),
    (0.0001, post_hoc_ema.MAX_SIGMA_REL),
  ],
)
def test_exponent(gamma, sigma_rel):
  found = post_hoc_ema.exponent(sigma_rel * (1 - 1e-6))
  assert found == pytest.approx(gamma, abs=0.005)
  assert ((found + 1) / ((found + 2) ** 2 * (found + 3))) ** 0.5 == (
    pytest.approx(sigma_rel, rel=1e-5)
  )


@pytest.mark.parametrize('sigma_rel', [0.0, -0.1, 0.2887])
def test_sigma_rel_out_of_range(sigma_rel):
  with pytest.raises(
    ValueError, match=f'sigma_rel={sigma_rel}: it must be more'
  ):
    post_hoc_ema.exponent(sigma_rel)


@pytest.mark.parametrize('sigma_rel', TRACKED)
def test_tracked_equals_brute_force(sigma_rel):
  for count in (1, 2, 3, 40, STEPS):
    weights = profile(sigma_rel, count)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(
      tracked()[str(sigma_rel)][count - 1],
      weights @ np.float64(history()[:count]),
      rtol=0,
      atol=1e-6,
    )


def test_sigma_rel_is_the_spread_of_the_profile():
  weights, times = profile(0.1, 5000), (np.arange(5000) + 0.5) / 5000
  mean = weights @ times
  assert (weights @ (times - mean) ** 2) ** 0.5 == pytest.approx(0.1, rel=1e-3)


def rebuild(sigma_rel, count, number):
  """Reconstructs an EMA from `number` snapshots of each tracked EMA.

  Returns:
    The coefficients, the weight of each update, and the EMA.
  """
  counts = [STEPS * i // number for i in range(1, number + 1)] * 2
  sigma_rels = np.repeat(TRACKED, number)
  found = post_hoc_ema.coefficients(sigma_rels, counts, sigma_rel, count)
  weights = sum(
    c * np.pad(profile(w, t), (0, STEPS - t))
    for c, w, t in zip(found, sigma_rels, counts)
  )
  ema = sum(
    c * np.float64(tracked()[str(w)][t - 1])
    for c, w, t in zip(found, sigma_rels, counts)
  )
  return found, weights, ema


@pytest.mark.parametrize('sigma_rel', TRACKED)
def test_a_tracked_sigma_rel_is_its_own_snapshot(sigma_rel):
  found, _, ema = rebuild(sigma_rel, STEPS, 8)
  expected = np.zeros(16)
  expected[7 if sigma_rel == 0.05 else 15] = 1
  np.testing.assert_allclose(found, expected, atol=1e-12)
  np.testing.assert_allclose(
    ema, profile(sigma_rel, STEPS) @ np.float64(history()), atol=1e-6
  )


@pytest.mark.parametrize('count', [STEPS, STEPS * 7 // 8])
@pytest.mark.parametrize('sigma_rel', [0.03, 0.07, 0.15, 0.25])
def test_reconstruction_equals_its_weighted_sum(sigma_rel, count):
  found, weights, ema = rebuild(sigma_rel, count, 16)
  assert found.sum() == pytest.approx(1)
  assert abs(found).sum() < 10
  np.testing.assert_allclose(
    ema, weights @ np.float64(history()), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize(
  'sigma_rel, far',
  [
    (0.07, (4e-2, 1.5e-2, 4e-3)),
    (0.08, (3e-2, 1.2e-2, 4e-3)),
    (0.12, (5e-2, 1.5e-2, 4e-3)),
    (0.15, (0.12, 4e-2, 1e-2)),
    (0.2, (0.3, 0.1, 3e-2)),
  ],
)
def test_more_snapshots_come_closer(sigma_rel, far):
  expected = profile(sigma_rel, STEPS)
  for number, most in zip((4, 8, 16), far):
    _, weights, _ = rebuild(sigma_rel, STEPS, number)
    distance = np.linalg.norm(weights - expected) / np.linalg.norm(expected)
    assert distance < most


@pytest.mark.parametrize('sigma_rel', [0.06, 0.08, 0.12, 0.15])
def test_close_snapshots_equal_brute_force(sigma_rel):
  for count in (STEPS, 200):
    found, _, ema = rebuild(sigma_rel, count, 160)
    assert abs(found).sum() < 2
    np.testing.assert_allclose(
      ema,
      profile(sigma_rel, count) @ np.float64(history()[:count]),
      rtol=0,
      atol=1e-6,
    )


def test_a_million_updates_in_float32():
  """Each update changes an EMA by less than float32's last digit."""
  rng = np.random.default_rng(0)
  history = 1 + np.float32(1e-5) * rng.standard_normal(
    (10**6, 2), np.float32
  ).cumsum(0)

  def step(state, x):
    count, new = x
    return (new, post_hoc_ema.update_lags(state[1], state[0], new, count)), None

  start = jnp.ones(2)
  (last, lags), _ = jax.lax.scan(
    step,
    (start, post_hoc_ema.new_lags(start, (0.1, 0.2))),
    (jnp.arange(1, 10**6 + 1), history),
  )
  for sigma_rel, ema in post_hoc_ema.from_lags(lags, last).items():
    expected = profile(float(sigma_rel), 10**6) @ np.float64(history)
    assert abs(expected - last).max() > 5e-4
    np.testing.assert_allclose(ema, expected, rtol=0, atol=1e-6)
