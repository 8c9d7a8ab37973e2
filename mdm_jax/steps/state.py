"""The training state, from which a resumed run is bit-exact."""

from typing import Any, NamedTuple

import jax

Params = Any


class TrainState(NamedTuple):
  """Training state of one stage. Checkpoints have the fields' names.

  Attributes:
    step: int32 scalar, number of steps taken, including skipped ones. It
      determines the order of the data and all randomness.
    params: trained parameters, nested dicts of float32 arrays.
    ema: exponential moving average (EMA) of `params`.
    opt_state: state of the optimizer.
    guard: state of the rule for skipped steps, a `skip_step.SkipState`.
    lags: post-hoc EMAs minus `params`, by their sigma_rel as text; see
      `post_hoc_ema`.
  """

  step: jax.Array
  params: Params
  ema: Params
  opt_state: Any
  guard: Any
  lags: dict[str, Params]


# Fields that were added to the state. A checkpoint of an earlier version that
# lacks one goes on with zeros, as at step 0: the running means of the skip rule
# and the post-hoc EMAs begin where it was saved.
ADDED_FIELDS = ('guard', 'lags')
