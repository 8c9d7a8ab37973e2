"""Tells steps that would harm the parameters: NaN, Inf and spikes."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Diverged(RuntimeError):
  """Training goes nowhere: too many steps in a row were left out."""


@dataclasses.dataclass(frozen=True)
class Guard:
  """Which steps are left out.

  A spike is a loss or a gradient norm above `spike_factor` times its running
  mean.

  Attributes:
    spike_factor: 0 lets all that is finite pass.
    window: the mean is over about so many good steps; before there have been
      so many, nothing is a spike.
    max_skipped: so many steps in a row that were left out end the run.

  Raises:
    ValueError: one of them is out of range.
  """

  spike_factor: float
  window: int
  max_skipped: int

  def __post_init__(self):
    """Checks the ranges."""
    if self.spike_factor and not self.spike_factor > 1:
      raise ValueError(
        f'spike_factor={self.spike_factor}: more than 1, or 0 for none.'
      )
    for name in ('window', 'max_skipped'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name}={getattr(self, name)}: give a number of steps.'
        )


class GuardState(NamedTuple):
  """What a guard remembers; steps that were left out only count.

  Attributes:
    mean: float32 [2], running means of the loss and of the gradient norm.
    accepted: int32 scalar, steps that are in them.
    skipped: int32 scalar, steps that were left out.
    in_a_row: int32 scalar, those of them since the last good step.
  """

  mean: jax.Array
  accepted: jax.Array
  skipped: jax.Array
  in_a_row: jax.Array


def new_state() -> GuardState:
  """The state before the first step."""
  return GuardState(jnp.zeros(2), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def judge(
  guard: Guard, state: GuardState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, GuardState]:
  """Whether a step is good (a bool scalar), and the state after it."""
  values = jnp.stack([loss, grad_norm])
  good = jnp.isfinite(values).all()
  if guard.spike_factor:
    is_spike = (values > guard.spike_factor * state.mean).any()
    good &= ~(is_spike & (state.accepted >= guard.window))
  # The plain mean at first, later an exponential one.
  weight = 1 / jnp.minimum(state.accepted + 1, guard.window)
  mean = state.mean + weight * (values - state.mean)
  return good, GuardState(
    mean=jnp.where(good, mean, state.mean),
    accepted=state.accepted + good,
    skipped=state.skipped + ~good,
    in_a_row=jnp.where(good, 0, state.in_a_row + 1),
  )
