"""Position features and attention against plain NumPy."""

import numpy as np

from mdm_jax.models import layers, packing


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


def test_attention_equals_numpy():
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, 2, 5, 8), np.float32)
  mask = np.array([[True] * 5, [True, True, False, False, True]])
  out = np.asarray(layers.attend(q, k, v, 2, mask))
  for b in range(2):
    for head in (slice(0, 4), slice(4, 8)):
      logits = q[b, :, head] @ k[b, :, head].T / 2
      weights = np.where(mask[b], np.exp(logits), 0)
      weights /= weights.sum(1, keepdims=True)
      np.testing.assert_allclose(
        out[b, :, head], weights @ v[b, :, head], atol=1e-5
      )
