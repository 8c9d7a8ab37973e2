"""Decides which steps are skipped: NaN, Inf and spikes of the loss."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Diverged(RuntimeError):
  """Too many consecutive steps were skipped."""


@dataclasses.dataclass(frozen=True)
class SkipRule:
  """Decides that a step with NaN, Inf or a spike is skipped.

  A skipped step leaves parameters, EMAs and optimizer as they were. A spike is
  a loss or a gradient norm above `spike_factor` times its running mean.

  Attributes:
    spike_factor: factor above which a value is a spike; 0 accepts every finite
      step.
    window: number of steps in the running mean. No step counts as a spike
      before so many have been accepted.
    max_skipped: number of consecutive skipped steps that ends the run.

  Raises:
    ValueError: a value is out of range.
  """

  spike_factor: float
  window: int
  max_skipped: int

  def __post_init__(self):
    """Checks the ranges."""
    if self.spike_factor and not self.spike_factor > 1:
      raise ValueError(
        f'spike_factor={self.spike_factor}: give more than 1, or 0 to accept '
        'spikes.'
      )
    for name in ('window', 'max_skipped'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name}={getattr(self, name)}: give a number of steps.'
        )


class SkipState(NamedTuple):
  """Running means and counts; a skipped step changes only the counts.

  Attributes:
    mean: float32 [2], running means of the loss and of the gradient norm.
    accepted: int32 scalar, number of steps that were not skipped.
    skipped: int32 scalar, number of skipped steps.
    in_a_row: int32 scalar, number of steps skipped since the last accepted one.
  """

  mean: jax.Array
  accepted: jax.Array
  skipped: jax.Array
  in_a_row: jax.Array


def new_state() -> SkipState:
  """The state before the first step."""
  return SkipState(jnp.zeros(2), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def judge(
  rule: SkipRule, state: SkipState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, SkipState]:
  """Decides whether a step is accepted.

  Args:
    rule: the rule.
    state: state before the step.
    loss: float32 scalar.
    grad_norm: float32 scalar, global norm of the gradients before clipping.

  Returns:
    A bool scalar, whether the step is accepted, and the state after it.
  """
  values = jnp.stack([loss, grad_norm])
  good = jnp.isfinite(values).all()
  if rule.spike_factor:
    is_spike = (values > rule.spike_factor * state.mean).any()
    good &= ~(is_spike & (state.accepted >= rule.window))
  # A plain mean for the first `window` steps, then an exponential one.
  weight = 1 / jnp.minimum(state.accepted + 1, rule.window)
  mean = state.mean + weight * (values - state.mean)
  return good, SkipState(
    mean=jnp.where(good, mean, state.mean),
    accepted=state.accepted + good,
    skipped=state.skipped + ~good,
    in_a_row=jnp.where(good, 0, state.in_a_row + 1),
  )
