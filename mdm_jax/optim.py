"""AdamW with warm-up and clipping, and the average of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(peak: float, *, warmup_steps: int, decay: str,
                           num_steps: int) -> optax.Schedule:
  """Linear warm-up from 0, then constant, or cosine to 0 at `num_steps`.

  Raises:
    ValueError: an unknown decay.
  """
  warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
  match decay:
    case 'constant':
      rest = optax.constant_schedule(peak)
    case 'cosine':
      rest = optax.cosine_decay_schedule(
          peak, max(num_steps - warmup_steps, 1))
    case _:
      raise ValueError(
          f'Unknown learning rate decay {decay!r}: use constant or cosine.')
  # Shifted by one: the first update is not wasted on a rate of 0.
  return optax.join_schedules(
      [lambda step: warmup(step + 1), rest], [warmup_steps])


def make_optimizer(learning_rate: optax.Schedule, *, b1: float, b2: float,
                   epsilon: float, weight_decay: float,
                   clip_norm: float) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter, 2019) after clipping by the global norm."""
  return optax.chain(
      optax.clip_by_global_norm(clip_norm),
      optax.adamw(learning_rate, b1=b1, b2=b2, eps=epsilon,
                  weight_decay=weight_decay))


def update_average(ema: Any, params: Any, step: jax.Array,
                   decay: float) -> Any:
  """One step of the exponential moving average.

  Early on the decay is (1 + step) / (10 + step), so that the average forgets
  the initialisation within a short run.
  """
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), ema, params)
