"""Text encoders that are trained with the network."""

import jax.numpy as jnp
import numpy as np

from mdm_jax.models.conditioning import LabelEncoder


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
