"""Position features and norms against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.models import layers, packing, target


def test_position_features_are_waves_over_rows_and_columns():
  features = np.asarray(layers.position_features((4, 8), waves=3))
  assert features.shape == (4, 8, 12)
  row, column = np.pi * 2.5 / 4, np.pi * 6.5 / 8
  angles = [row, 2 * row, 3 * row, column, 2 * column, 3 * column]
  np.testing.assert_allclose(
    features[2, 6], [*np.sin(angles), *np.cos(angles)], atol=1e-5
  )
  # No two pixels look alike.
  assert len(np.unique(features.reshape(32, -1).round(4), axis=0)) == 32


def test_fold_puts_each_patch_into_one_place():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  folded = np.asarray(packing.fold(x, (2, 2)))
  assert folded.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
  np.testing.assert_array_equal(packing.unfold(folded, (2, 2)), x)


# Means over standard deviations, and the largest error of values of about 1.
@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize(
  'mean, tolerance', [(0, 1.5e-6), (4, 2e-6), (16, 5e-6)]
)
def test_norms_keep_their_digits(mean, tolerance, platform):
  rng = np.random.default_rng(0)
  x = (mean + rng.standard_normal((2, 128, 128, 16))).astype(np.float32)
  with target.planning(platform):
    out = np.asarray(jax.jit(lambda x: _norm(x))(x))
  groups = x.astype(np.float64).reshape(2, 128 * 128, 4, 4)
  groups -= groups.mean(axis=(1, 3), keepdims=True)
  groups /= np.sqrt(np.square(groups).mean(axis=(1, 3), keepdims=True) + 1e-5)
  np.testing.assert_allclose(out, groups.reshape(x.shape), 0, tolerance)


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize(
  'channels, patch', [((8,), (1, 1)), ((12, 20), (1, 1)), ((12, 20), (2, 2))]
)
def test_gradients_of_norms(platform, channels, patch):
  """Also of several inputs, whose channels share groups, and packed ones."""
  rng = np.random.default_rng(0)
  total = sum(channels)

  def normal(*shape, mean=0.0):
    return (mean + rng.standard_normal(shape)).astype(np.float32)

  inputs = [normal(3, 6, 4, x, mean=2.0) for x in channels]
  params = {'scale': normal(total, mean=1.0), 'bias': normal(total)}
  weights = normal(3, 6, 4, total)

  def plain(inputs, params):
    x = jnp.concatenate(inputs, axis=-1)
    groups = x.reshape(3, 24, 4, -1)
    groups -= groups.mean(axis=(1, 3), keepdims=True)
    groups /= jnp.sqrt((groups**2).mean(axis=(1, 3), keepdims=True) + 1e-5)
    return groups.reshape(x.shape) * params['scale'] + params['bias']

  def ours(inputs, params):
    found = layers.GroupNorm(4, jnp.float32).apply(
      {'params': params},
      *(packing.Features(packing.fold(x, patch), patch) for x in inputs),
    )
    return jnp.concatenate([x.as_patch((1, 1)).x for x in found], axis=-1)

  with target.planning(platform):
    out, pull = jax.vjp(ours, inputs, params)
    found = pull(weights)
  expected, pull = jax.vjp(plain, inputs, params)
  np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
  for each, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(pull(weights)), strict=True
  ):
    np.testing.assert_allclose(each, other, rtol=1e-5, atol=2e-5)


def _norm(x):
  """A norm of four groups; its scale is 1 and its bias 0."""
  features = packing.Features(x, (1, 1))
  norm = layers.GroupNorm(4, jnp.float32)
  params = norm.init(jax.random.key(0), features)
  return norm.apply(params, features)[0].x


def test_norms_of_a_gpu_are_reductions():
  """Small products of groups and channels would be kernels of their own."""
  x = jnp.zeros((2, 6, 4, 8), jnp.bfloat16)

  def primitives(platform):
    with target.planning(platform):
      jaxpr = jax.make_jaxpr(lambda x: _norm(x))(x)
    return str(jaxpr)

  assert 'dot_general' in primitives('tpu')
  assert 'dot_general' not in primitives('gpu')
