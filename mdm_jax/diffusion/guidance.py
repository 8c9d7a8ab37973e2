"""Classifier-free guidance, and guidance by a worse model (autoguidance)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.diffusion.process import DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid


def guided_denoise_fn(
  denoise_fn: Callable[[Pyramid, jax.Array, Any], Pyramid],
  cond: Any,
  uncond: Any,
  w: float | jax.Array,
  rescale: float = 0.0,
  interval: tuple[float, float] | None = None,
) -> DenoiseFn:
  """Applies classifier-free guidance with weight `w` at every level.

  The prediction is `uncond + w (cond - uncond)`. This is eq. 6 of Ho &
  Salimans, arXiv 2207.12598, whose weight is w - 1. Both predictions come from
  one forward pass over a batch of 2B. The two rows of an example are
  neighbours in that batch, so that both stay on the example's device.

  Args:
    denoise_fn: maps (x_t pyramid, t [B], conditioning) to predictions.
    cond: conditioning, a pytree of arrays [B, ...].
    uncond: the conditioning of an empty prompt, of the shapes of `cond`.
    w: guidance weight. The Python number 1 costs one plain forward pass of B,
      and `uncond` is not read; a traced scalar always costs 2B.
    rescale: 0 to 1. Moves the standard deviation of the guided output towards
      that of the conditional output, for each example and level (Lin et al.,
      arXiv 2305.08891, eqs. 15 and 16); 0 leaves it as it is.
    interval: the first and the last noising step to guide at; t is one less.
      Others cost one plain forward pass of B (Kynkäänniemi et al., arXiv
      2404.07724). With an interval, all examples must have the same t. None
      guides at every step.

  Returns:
    A function (x_t pyramid, t [B]) -> predictions.
  """

  def plain(x_t, t):
    return denoise_fn(x_t, t, cond)

  def join(first, second):
    pairs = jnp.stack([first, second], axis=1)
    return pairs.reshape(-1, *first.shape[1:])

  def split(both):
    pairs = both.reshape(-1, 2, *both.shape[1:])
    return pairs[:, 0], pairs[:, 1]

  if is_none(w):
    return plain
  both_conds = jax.tree.map(join, uncond, cond)

  def pairs(x_t, t):
    both = denoise_fn(jax.tree.map(join, x_t, x_t), join(t, t), both_conds)
    return map(split, both)

  return _guided(plain, pairs, w, rescale, interval)


def autoguided_denoise_fn(
  denoise_fn: DenoiseFn,
  guide_fn: DenoiseFn,
  w: float | jax.Array,
  rescale: float = 0.0,
  interval: tuple[float, float] | None = None,
) -> DenoiseFn:
  """Applies autoguidance: guides away from the output of a worse network.

  The prediction is `guide + w (output - guide)` (Karras et al., arXiv
  2406.02507, eq. 4). The guide is a smaller network, or one trained for fewer
  steps, with the same conditioning.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to predictions.
    guide_fn: maps (x_t pyramid, t [B]) to the worse network's predictions.
    w: guidance weight. The Python number 1 never runs the guide.
    rescale: as in `guided_denoise_fn`.
    interval: as in `guided_denoise_fn`.

  Returns:
    A function (x_t pyramid, t [B]) -> predictions.
  """
  if is_none(w):
    return denoise_fn

  def pairs(x_t, t):
    return zip(guide_fn(x_t, t), denoise_fn(x_t, t), strict=True)

  return _guided(denoise_fn, pairs, w, rescale, interval)


def is_none(w: float | jax.Array) -> bool:
  """Whether a weight is known to be 1, with which there is no guidance."""
  return isinstance(w, int | float) and w == 1


def is_within(
  t: np.ndarray | jax.Array, interval: tuple[float, float]
) -> np.ndarray | jax.Array:
  """Whether guidance with an interval of noising steps guides.

  Args:
    t: the times that the network is given, each one less than its noising step.
    interval: the first and the last noising step.
  """
  return (interval[0] <= t + 1) & (t + 1 <= interval[1])


def _guided(
  plain: DenoiseFn,
  pairs: Callable[[Pyramid, jax.Array], Iterable[tuple[jax.Array, jax.Array]]],
  w: float | jax.Array,
  rescale: float,
  interval: tuple[float, float] | None,
) -> DenoiseFn:
  """Guides within the interval, and returns `plain` predictions outside of it.

  Args:
    plain: the predictions without guidance.
    pairs: for each level, the prediction to lead away from (unconditional, or
      the guide's) and the prediction to lead towards.
    w: guidance weight.
    rescale: as in `guided_denoise_fn`.
    interval: as in `guided_denoise_fn`.
  """

  def combine(away, towards):
    output = away + w * (towards - away)
    if not rescale:
      return output
    axes = tuple(range(1, output.ndim))
    own, std = (x.std(axes, keepdims=True) for x in (towards, output))
    # A constant output has no contrast, and stays as it is.
    ratio = jnp.where(std == 0, 1, own / std)
    return output * (1 + rescale * (ratio - 1))

  def guided(x_t, t):
    return tuple(combine(*pair) for pair in pairs(x_t, t))

  if interval is None:
    return guided

  def guided_within(x_t, t):
    first = t.ravel()[0]  # Of the coarsest level, if each has its own.
    return jax.lax.cond(is_within(first, interval), guided, plain, x_t, t)

  return guided_within
