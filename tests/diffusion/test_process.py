import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.diffusion import process

SPACES = ('v', 'eps', 'x0', 'velocity')


def vp(gamma):
  """Signal and noise of a variance-preserving path, [B, 1, 1, 1]."""
  gamma = np.asarray(gamma, np.float32)
  if gamma.ndim:
    gamma = gamma[:, None, None, None]
  return process.Coefficients(np.sqrt(gamma), np.sqrt(1 - gamma))


@pytest.fixture(scope='module')
def example():
  rng = np.random.default_rng(1)
  x0, eps = rng.normal(size=(2, 3, 4, 4, 3)).astype(np.float32)
  return x0, eps, vp([0.02, 0.5, 0.97])


def test_noise_is_added_in_variance_shares(example):
  x0, eps, at = example
  x_t = process.add_noise(x0, eps, at)
  expected = [
    np.sqrt(share) * image + np.sqrt(1 - share) * noise
    for share, image, noise in zip((0.02, 0.5, 0.97), x0, eps, strict=True)
  ]
  np.testing.assert_allclose(x_t, expected, atol=1e-6)


@pytest.mark.parametrize('space', SPACES)
def test_a_perfect_prediction_gives_back_everything(example, space):
  x0, eps, at = example
  x_t = process.add_noise(x0, eps, at)
  prediction = process.target(x0, eps, at, space)
  v = at.signal * eps - at.noise * x0
  for convert, expected in (
    (process.predict_v, v),
    (process.predict_eps, eps),
    (process.predict_x0, x0),
    (process.predict_velocity, eps - x0),
  ):
    np.testing.assert_allclose(
      convert(prediction, x_t, at, space), expected, atol=3e-5
    )


@pytest.mark.parametrize('space', ['eps', 'x0', 'velocity'])
def test_conversions_on_the_linear_path_in_float64(space):
  """Solved for x0 and eps by 2 x 2 systems, one pixel at a time."""
  rng = np.random.default_rng(2)
  x_t, prediction = rng.normal(size=(2, 5))
  t = np.array([0.0005, 0.2, 0.5, 0.9, 0.9995])
  rows = {'eps': (0, 1), 'x0': (1, 0), 'velocity': (-1, 1)}
  expected = np.array(
    [
      np.linalg.solve([[1 - time, time], rows[space]], [x, output])
      for time, x, output in zip(t, x_t, prediction, strict=True)
    ]
  ).T
  at = process.Coefficients(1 - t, t)
  with jax.enable_x64(True):
    found = [
      convert(prediction, x_t, at, space)
      for convert in (
        process.predict_x0,
        process.predict_eps,
        process.predict_velocity,
      )
    ]
  np.testing.assert_allclose(
    found, [*expected, expected[1] - expected[0]], rtol=1e-9
  )


def test_the_velocity_is_the_slope_of_the_linear_path(example):
  x0, eps, _ = example
  at, later = (process.Coefficients(1 - t, t) for t in (0.5, 0.75))
  slope = process.add_noise(x0, eps, later) - process.add_noise(x0, eps, at)
  np.testing.assert_allclose(
    process.target(x0, eps, at, 'velocity'), slope / 0.25, atol=1e-5
  )


def test_eps_from_v_does_not_cancel_in_almost_pure_noise(example):
  x0, eps, _ = example
  at = vp(2.4e-9)
  x_t = process.add_noise(x0, eps, at)
  v = process.target(x0, eps, at, 'v')
  np.testing.assert_allclose(
    process.predict_eps(v, x_t, at, 'v'), eps, rtol=1e-6, atol=1e-7
  )


@pytest.mark.parametrize(
  'function',
  [
    process.target,
    process.predict_v,
    process.predict_eps,
    process.predict_x0,
    process.predict_velocity,
  ],
)
def test_an_unknown_parameterization_is_named(example, function):
  with pytest.raises(ValueError, match="'score'"):
    function(*example, 'score')


def test_levels_get_independent_standard_noise():
  shape = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
  noise = np.array(process.sample_noise(jax.random.key(0), (shape, shape)))
  flat = noise.reshape(2, -1)
  assert noise.dtype == np.float32
  np.testing.assert_allclose(flat.mean(1), 0, atol=0.02)
  np.testing.assert_allclose(np.cov(flat), np.eye(2), atol=0.02)
