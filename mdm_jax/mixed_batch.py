"""Which examples of a mixed batch each level sees.

A pattern repeats along the batch: a level that sees n of the examples sees
the first n / repeats of every period. Devices that hold whole periods hold
their share of every level, so that no example moves between them, and what a
level sees does not depend on how many there are. A single period, repeats =
1, is the release's: the first n examples of the batch.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp


def num_repeats(sizes: Sequence[int]) -> int:
  """How often the shortest pattern repeats.

  Args:
    sizes: coarse to fine, how many examples each level sees; the first is the
      batch's.
  """
  return math.gcd(*sizes)


def finest_levels(sizes: Sequence[int]) -> tuple[int, ...]:
  """The finest level that sees each example of the shortest period.

  Args:
    sizes: as for `num_repeats`.
  """
  repeats = num_repeats(sizes)
  return tuple(
    sum(row < size // repeats for size in sizes) - 1
    for row in range(sizes[0] // repeats)
  )


def image_names(resolutions: Sequence[int]) -> tuple[str, ...]:
  """What a batch calls the images of the examples that end at each level.

  Args:
    resolutions: coarse to fine, in pixels.
  """
  return *(f'image_{pixels}' for pixels in resolutions[:-1]), 'image'


def take(tree: Any, count: int, repeats: int) -> Any:
  """The examples that a level sees, of arrays [B, ...] -> [count, ...]."""

  def take_leaf(x):
    if count == len(x):
      return x
    periods = x.reshape(repeats, -1, *x.shape[1:])
    return periods[:, : count // repeats].reshape(count, *x.shape[1:])

  return jax.tree.map(take_leaf, tree)


def split(tree: Any, parts: int, repeats: int) -> Any:
  """Deals whole periods out: arrays [n, ...] -> [parts, n / parts, ...].

  Part p has the periods p, p + parts, p + 2 * parts, ... Devices that hold
  `parts` periods each, or a multiple, hold their share of every part.

  Args:
    tree: of arrays that have as many rows in each period.
    parts: divides `repeats`.
    repeats: of the pattern.
  """

  def split_leaf(x):
    dealt = x.reshape(repeats // parts, parts, len(x) // repeats, *x.shape[1:])
    return dealt.swapaxes(0, 1).reshape(parts, len(x) // parts, *x.shape[1:])

  return jax.tree.map(split_leaf, tree)


def join(seen: jax.Array, rest: jax.Array, repeats: int) -> jax.Array:
  """Puts what a finer level sees before the rest of each period.

  Args:
    seen: [n, ...], as `take` gives it.
    rest: [m, ...], the other examples.
    repeats: of the pattern.

  Returns:
    [n + m, ...].
  """
  parts = [x.reshape(repeats, -1, *x.shape[1:]) for x in (seen, rest)]
  return jnp.concatenate(parts, axis=1).reshape(-1, *seen.shape[1:])


def pad(seen: jax.Array, count: int, repeats: int) -> jax.Array:
  """Zeros for the examples that are not seen: [n, ...] -> [count, ...]."""
  if count == len(seen):
    return seen
  rest = jnp.zeros((count - len(seen), *seen.shape[1:]), seen.dtype)
  return join(seen, rest, repeats)
