"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mdm_jax.diffusion.process import DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid


def guided_denoise_fn(
  denoise_fn: Callable[[Pyramid, jax.Array, Any], Pyramid],
  cond: Any,
  uncond: Any,
  w: float | jax.Array,
) -> DenoiseFn:
  """Guides the network's output by `w` at every level.

  `uncond + w (cond - uncond)`, which is eq. 6 of the paper with its weight
  being w - 1. Both come from one forward on a batch of 2B, the unconditional
  half first.

  Args:
    denoise_fn: maps (x_t pyramid, t [B], conditioning) to predictions.
    cond: conditioning, a pytree of arrays [B, ...].
    uncond: what stands for no conditioning, shaped like `cond`.
    w: guidance weight. The Python number 1 makes it one plain forward of B,
      and `uncond` is not read; a traced scalar always costs 2B.

  Returns:
    A function (x_t pyramid, t [B]) -> predictions.
  """
  if isinstance(w, int | float) and w == 1:
    return lambda x_t, t: denoise_fn(x_t, t, cond)

  def guided(x_t, t):
    def stack(first, second):
      return jnp.concatenate([first, second])

    both = denoise_fn(
      jax.tree.map(stack, x_t, x_t),
      stack(t, t),
      jax.tree.map(stack, uncond, cond),
    )
    halves = [jnp.split(prediction, 2) for prediction in both]
    return tuple(without + w * (given - without) for without, given in halves)

  return guided
