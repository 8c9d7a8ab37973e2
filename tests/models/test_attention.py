"""Attention against plain NumPy, and when it runs in flash kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.models import attention


def test_attention_equals_numpy():
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, 2, 5, 8), np.float32)
  mask = np.array([[True] * 5, [True, True, False, False, True]])
  out = np.asarray(attention.attend(q, k, v, 2, mask))
  for b in range(2):
    for head in (slice(0, 4), slice(4, 8)):
      logits = q[b, :, head] @ k[b, :, head].T / 2
      weights = np.where(mask[b], np.exp(logits), 0)
      weights /= weights.sum(1, keepdims=True)
      np.testing.assert_allclose(
        out[b, :, head], weights @ v[b, :, head], atol=1e-5
      )


@pytest.mark.parametrize(
  'dtype, num_heads, length, flash, chosen',
  [
    (jnp.bfloat16, 2, 6, True, True),
    (jnp.bfloat16, 2, 6, False, False),
    (jnp.float32, 2, 6, True, False),
    (jnp.bfloat16, 4, 6, True, False),  # Heads of 4 channels.
    (jnp.bfloat16, 2, 5, True, False),
  ],
)
def test_flash_attention_where_the_kernels_can(
  monkeypatch, dtype, num_heads, length, flash, chosen
):
  given = {}
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda q, k, v, **options: given.update(options) or q,
  )
  x = jnp.zeros((3, length, 16), dtype)
  mask = np.arange(length) < np.array([[length], [2], [0]])
  attention.attend(x, x, x, num_heads, mask, flash)
  if chosen:
    assert given['implementation'] == 'cudnn'
    # Without any key there is no softmax: it attends to one of padding.
    assert given['key_value_seq_lengths'].tolist() == [6, 2, 1]
  else:
    assert given['mask'].shape == (3, 1, 1, length) and len(given) == 1


def test_rotation_makes_products_depend_on_distances_alone():
  angles = attention.rotary_angles((3, 5), 8, others=1)
  # From 2 radians a token to 1 radian over five.
  np.testing.assert_allclose(angles[6] - angles[0], [2, 0.2, 2, 0.2])
  q, k = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
  turned = [
    np.asarray(
      attention.rotate(np.broadcast_to(x, (1, 16, 1, 8)), angles)
    ).reshape(16, 8)
    for x in (q, k)
  ]
  products = turned[0] @ turned[1].T
  by_offset = {}
  for i in range(15):
    for j in range(15):
      offset = i // 5 - j // 5, i % 5 - j % 5
      by_offset.setdefault(offset, []).append(products[i, j])
  assert max(np.ptp(each) for each in by_offset.values()) < 1e-5
  values = np.sort([each[0] for each in by_offset.values()])
  assert len(values) == 45 and np.diff(values).min() > 1e-5
  # The last token is not turned, and neither is the middle of the image.
  np.testing.assert_array_equal(turned[0][15], q)
  np.testing.assert_array_equal(turned[0][7], q)
