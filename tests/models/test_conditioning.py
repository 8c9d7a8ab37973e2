"""Text encoders that are trained with the network, and the text's length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.models.conditioning import (
  Cond,
  LabelEncoder,
  TextSpec,
  num_positions,
  token_mask,
)
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.unet import LevelSpec


def test_label_encoder_looks_up_a_vector():
  table = np.arange(20, dtype=np.float32).reshape(5, 4) + 1
  tokens = jnp.array([[4], [1], [0]])
  text, mask = LabelEncoder(5, 4, jnp.bfloat16).apply(
    {'params': {'embedding': {'embedding': table}}}, tokens
  )
  assert text.dtype == jnp.bfloat16
  np.testing.assert_array_equal(mask, [[True], [True], [False]])
  np.testing.assert_array_equal(
    text.astype(np.float32)[:, 0], [table[4], table[1], np.zeros(4)]
  )


def test_positions_reach_to_the_last_token():
  tokens = jnp.array([[3, 1, 0, 0], [3, 0, 1, 0], [0, 0, 0, 0], [5, 6, 7, 1]])
  assert num_positions(tokens).tolist() == [2, 3, 0, 4]
  features = tokens[..., None] * jnp.array([0.0, -1.0])
  assert num_positions(features).tolist() == [2, 3, 0, 4]
  assert token_mask(features).tolist() == token_mask(tokens).tolist()
  assert num_positions(tokens).dtype == jnp.int32


def random_network(spec):
  """Jitted (text, mask, length=None) -> output [2, 8, 8, 3]."""
  level = LevelSpec(
    channels=(8,),
    num_blocks=(0,),
    attention_layers=(0,),  # There is always one in the middle.
    temporal_dim=16,
    scale_condition=8,
    num_groups=4,
    num_heads=2,
  )
  unet, rng = NestedUNet((level,), spec), np.random.default_rng(0)
  x_t = (rng.standard_normal((2, 8, 8, 3), np.float32),)
  t = np.array([10, 500])
  cond = Cond(jnp.zeros((2, 3, 12)), jnp.ones((2, 3), bool))
  shapes = jax.eval_shape(unet.init, jax.random.key(0), x_t, t, cond)
  params = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes['params']
  )

  @jax.jit
  def apply(text, mask, length=None):
    cond = Cond(text, mask, length=length)
    return unet.apply({'params': params}, x_t, t, cond)[0]

  return apply


@pytest.mark.parametrize(
  'num_layers, masked', [(0, False), (1, False), (1, True)]
)
def test_an_array_may_be_longer_than_the_text(num_layers, masked):
  """Nine positions of an array of 32 are a text of nine positions."""
  apply = random_network(TextSpec(16, num_layers, 2, masked))
  rng = np.random.default_rng(2)
  mask = np.arange(9) < np.array([[9], [4]])  # The second one is padded to 9.
  bare = rng.standard_normal((2, 9, 12), np.float32) * mask[..., None]
  long, long_mask = np.zeros((2, 32, 12), np.float32), np.zeros((2, 32), bool)
  long[:, :9], long_mask[:, :9] = bare, mask
  expected = apply(bare, mask)
  padded = apply(long, long_mask, np.array([9, 9]))
  np.testing.assert_allclose(padded, expected, rtol=0, atol=1e-5)
  # Padding is part of an unmasked text, so its length matters.
  shorter = apply(long, long_mask, np.array([9, 4]))
  whole = apply(long, long_mask)
  for other, changed in (shorter, [1]), (whole, [0, 1]):
    error = np.abs(other - expected).max((1, 2, 3))
    if masked:
      assert error.max() < 1e-5
    else:
      assert (np.flatnonzero(error > 1e-3) == changed).all()
  if not masked:  # Alone, the second text has 4 positions.
    alone = apply(bare[:, :4], mask[:, :4])
    np.testing.assert_allclose(shorter[1], alone[1], rtol=0, atol=1e-5)
