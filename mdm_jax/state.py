"""What training changes, and what a bit-exact resume needs of it."""

from typing import Any, NamedTuple

import jax

Params = Any


class TrainState(NamedTuple):
  """One stage's training.

  Attributes:
    step: int32 scalar, steps so far, with those that were left out; data and
      randomness follow from it.
    params: nested dicts of float32 arrays.
    ema: exponential moving average of `params`.
    opt_state: the optimizer's.
    guard: `guard.GuardState`, over the steps so far.
    lags: how far further averages are from `params`, see `averages`.
  """

  step: jax.Array
  params: Params
  ema: Params
  opt_state: Any
  guard: Any
  lags: dict[str, Params]
