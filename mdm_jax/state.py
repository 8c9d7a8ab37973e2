"""What training changes, and what a bit-exact resume needs of it."""

from typing import Any, NamedTuple

import jax

Params = Any


class TrainState(NamedTuple):
  """One stage's training.

  Attributes:
    step: int32 scalar, updates made so far; randomness is folded from it.
    params: nested dicts of float32 arrays.
    ema: exponential moving average of `params`.
    opt_state: the optimizer's.
  """
  step: jax.Array
  params: Params
  ema: Params
  opt_state: Any
