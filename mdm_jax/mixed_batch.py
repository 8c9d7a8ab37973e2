"""Mixed batches: coarse levels see more examples than fine levels.

Every example has a finest level, and is seen by that level and by all coarser
ones. The pattern of finest levels repeats along the batch: a level that sees n
examples sees the first n / repeats of every period. A device that holds whole
periods holds its share of every level, so no example moves between devices,
and what a level sees does not depend on the number of devices. The released
MDM (arXiv 2310.15111) has a single period, repeats = 1: a level sees the first
n examples of the batch.
"""

from collections.abc import Sequence
from fractions import Fraction
import math
from typing import Any

import jax
import jax.numpy as jnp

# Before the name of a level of codes, and of the images decoded from them.
LATENT = 'latent_'


def batch_fractions(mixed_ratio: Sequence[float]) -> tuple[float, ...]:
  """The share of the batch that each level of a mixed batch sees.

  Args:
    mixed_ratio: the relative number of examples whose finest level is each
      level, coarse to fine. MDM's "2:1" (fine to coarse) is `(1, 2)` here.

  Returns:
    Coarse to fine, for example (1, 2/3) for (1, 2).

  Raises:
    ValueError: if a share is negative or the finest is not positive.
  """
  if min(mixed_ratio, default=-1) < 0 or mixed_ratio[-1] <= 0:
    raise ValueError(
      f'mixed_ratio {tuple(mixed_ratio)} must not be negative, and its last '
      'entry (the finest level) must be positive.'
    )
  return tuple(
    sum(mixed_ratio[level:]) / sum(mixed_ratio)
    for level in range(len(mixed_ratio))
  )


def level_batch_sizes(
  batch: int, fractions: Sequence[float]
) -> tuple[int, ...]:
  """How many of `batch` examples each level sees, coarse to fine.

  Raises:
    ValueError: if a fraction of the batch is not a whole number.
  """
  sizes = tuple(round(fraction * batch) for fraction in fractions)
  for size, fraction in zip(sizes, fractions, strict=True):
    if abs(size - fraction * batch) > 1e-6 * batch:
      raise ValueError(
        f'A level sees {fraction:.6g} of the batch, and {batch} examples do '
        'not divide that way: change the batch size or mixed_ratio.'
      )
  return sizes


def least_batch(mixed_ratio: Sequence[float]) -> int:
  """The least number of examples that divide by a ratio: one period.

  Args:
    mixed_ratio: as in `batch_fractions`; (0.3, 0.6) divides 3 examples.

  Raises:
    ValueError: see `batch_fractions`.
  """
  return math.lcm(
    *(
      # As exactly as `level_batch_sizes` checks it.
      Fraction(fraction).limit_denominator(10**6).denominator
      for fraction in batch_fractions(mixed_ratio)
    )
  )


def num_repeats(sizes: Sequence[int]) -> int:
  """The number of periods in a batch whose pattern is as short as possible.

  Args:
    sizes: how many examples each level sees, coarse to fine; the first is the
      batch size.
  """
  return math.gcd(*sizes)


def finest_levels(sizes: Sequence[int]) -> tuple[int, ...]:
  """The finest level of each example in one period of the shortest pattern.

  Args:
    sizes: as in `num_repeats`.
  """
  repeats = num_repeats(sizes)
  return tuple(
    sum(row < size // repeats for size in sizes) - 1
    for row in range(sizes[0] // repeats)
  )


def example_shape(resolution: int, frames: int = 1) -> tuple[int, ...]:
  """The shape of an image, [H, H, 3], or of a clip, [T, H, H, 3]."""
  image = resolution, resolution, 3
  return image if frames == 1 else (frames, *image)


def level_name(shape: Sequence[int]) -> str:
  """How a level is called: '64' for images, '16x64' for 16 frames.

  Args:
    shape: of an example, see `example_shape`.
  """
  return 'x'.join(map(str, shape[:-2]))


def image_level_names(shapes: Sequence[Sequence[int]]) -> tuple[str, ...]:
  """The names of the images of all levels, no two of which are the same.

  Images that were decoded from codes may be as large as those of the next finer
  level: their name is 'latent_64'.

  Args:
    shapes: of the levels, coarse to fine, see `example_shape`.
  """
  names = [*map(level_name, shapes)]
  if len(names) > 1 and names[0] == names[1]:
    names[0] = LATENT + names[0]
  return tuple(names)


def named_shape(name: str) -> tuple[int, ...] | None:
  """The shape of one of `image_level_names`; None for any other text."""
  numbers = name.removeprefix(LATENT).split('x')
  if len(numbers) > 2 or not all(map(str.isdecimal, numbers)):
    return None
  *frames, resolution = map(int, numbers)
  return example_shape(resolution, *frames)


def image_names(shapes: Sequence[Sequence[int]]) -> tuple[str, ...]:
  """The batch's keys for the images of examples with each finest level.

  Args:
    shapes: of an example at each level, coarse to fine.

  Returns:
    Coarse to fine, for example ('image_64', 'image') for 64 and 256 pixels.
  """
  names = image_level_names(shapes)
  return *(f'image_{name}' for name in names[:-1]), 'image'


def take(tree: Any, count: int, repeats: int) -> Any:
  """Selects the examples that a level sees.

  Args:
    tree: a pytree of arrays [B, ...].
    count: how many examples the level sees.
    repeats: periods in the batch.

  Returns:
    The pytree with arrays [count, ...].
  """

  def take_leaf(x):
    if count == len(x):
      return x
    periods = x.reshape(repeats, -1, *x.shape[1:])
    return periods[:, : count // repeats].reshape(count, *x.shape[1:])

  return jax.tree.map(take_leaf, tree)


def times(t: jax.Array, level: int, count: int, repeats: int) -> jax.Array:
  """The times of the examples that a level sees, [count].

  Args:
    t: [B], times that the levels share, or [B, levels].
    level: from 0, the coarsest.
    count: how many examples the level sees.
    repeats: periods in the batch.
  """
  return take(t if t.ndim == 1 else t[:, level], count, repeats)


def split(tree: Any, parts: int, repeats: int) -> Any:
  """Splits a batch into parts that consist of whole periods.

  Part p has the periods p, p + parts, p + 2 * parts, ... A device that holds
  `parts` periods, or a multiple of that, holds its share of every part.

  Args:
    tree: a pytree of arrays [n, ...] with the same number of rows in every
      period.
    parts: how many parts; must divide `repeats`.
    repeats: periods in the batch.

  Returns:
    The pytree with arrays [parts, n / parts, ...].
  """

  def split_leaf(x):
    dealt = x.reshape(repeats // parts, parts, len(x) // repeats, *x.shape[1:])
    return dealt.swapaxes(0, 1).reshape(parts, len(x) // parts, *x.shape[1:])

  return jax.tree.map(split_leaf, tree)


def join(seen: jax.Array, rest: jax.Array, repeats: int) -> jax.Array:
  """Undoes `take`: in each period, the seen examples come before the others.

  Args:
    seen: [n, ...], the examples that `take` selects.
    rest: [m, ...], the other examples.
    repeats: periods in the batch.

  Returns:
    [n + m, ...].
  """
  parts = [x.reshape(repeats, -1, *x.shape[1:]) for x in (seen, rest)]
  return jnp.concatenate(parts, axis=1).reshape(-1, *seen.shape[1:])


def pad(seen: jax.Array, count: int, repeats: int) -> jax.Array:
  """Fills in zeros for the examples that a level does not see.

  Args:
    seen: [n, ...], the examples that `take` selects.
    count: examples in the batch.
    repeats: periods in the batch.

  Returns:
    [count, ...].
  """
  if count == len(seen):
    return seen
  rest = jnp.zeros((count - len(seen), *seen.shape[1:]), seen.dtype)
  return join(seen, rest, repeats)
