"""The exponential moving average (EMA) of parameters."""

from typing import Any

import jax
import jax.numpy as jnp


def update(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """One step of the exponential moving average.

  Early in training the decay is (1 + step) / (10 + step), so that the EMA
  forgets the initialisation even in a short run.

  Args:
    ema: the EMA so far, a tree of float32 arrays.
    params: parameters after this step, of the same structure.
    step: int32 scalar, number of steps before this one.
    decay: decay rate late in training, below 1.
  """
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), ema, params)
