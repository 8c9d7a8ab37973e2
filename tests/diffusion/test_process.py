import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.diffusion import process

SPACES = ('v', 'eps', 'x0')


@pytest.fixture(scope='module')
def example():
  rng = np.random.default_rng(1)
  x0, eps = rng.normal(size=(2, 3, 4, 4, 3)).astype(np.float32)
  gamma = np.array([0.02, 0.5, 0.97], np.float32)[:, None, None, None]
  return x0, eps, gamma


def test_noise_is_added_in_variance_shares(example):
  x0, eps, gamma = example
  x_t = process.add_noise(x0, eps, gamma)
  expected = [
    np.sqrt(share) * image + np.sqrt(1 - share) * noise
    for share, image, noise in zip((0.02, 0.5, 0.97), x0, eps, strict=True)
  ]
  np.testing.assert_allclose(x_t, expected, atol=1e-6)


@pytest.mark.parametrize('space', SPACES)
def test_a_perfect_prediction_gives_back_everything(example, space):
  x0, eps, gamma = example
  x_t = process.add_noise(x0, eps, gamma)
  prediction = process.target(x0, eps, gamma, space)
  v = np.sqrt(gamma) * eps - np.sqrt(1 - gamma) * x0
  for convert, expected in (
    (process.predict_v, v),
    (process.predict_eps, eps),
    (process.predict_x0, x0),
  ):
    np.testing.assert_allclose(
      convert(prediction, x_t, gamma, space), expected, atol=2e-5
    )


def test_eps_from_v_does_not_cancel_in_almost_pure_noise(example):
  x0, eps, _ = example
  gamma = jnp.float32(2.4e-9)
  x_t = process.add_noise(x0, eps, gamma)
  v = process.target(x0, eps, gamma, 'v')
  np.testing.assert_allclose(
    process.predict_eps(v, x_t, gamma, 'v'), eps, rtol=1e-6, atol=1e-7
  )


@pytest.mark.parametrize(
  'function',
  [process.target, process.predict_v, process.predict_eps, process.predict_x0],
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
