"""Images at every resolution, and how many examples each level sees."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch

Pyramid = tuple[jax.Array, ...]


def to_float(images: jax.Array) -> jax.Array:
  """Maps uint8 pixels to float32 `(x - 127) / 128`, within [-1, 1]."""
  return (images.astype(jnp.float32) - 127) / 128


def to_uint8(images: jax.Array) -> jax.Array:
  """Maps floats back to pixels: `x * 128 + 127`, clipped and rounded.

  The inverse of `to_float`. Halves round to even.
  """
  pixels = images.astype(jnp.float32) * 128 + 127
  return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)


def batch_fractions(mixed_ratio: Sequence[float]) -> tuple[float, ...]:
  """The share of the batch that each level of a mixed batch sees.

  An example is assigned to one finest level and is seen by that level and all
  coarser ones.

  Args:
    mixed_ratio: coarse to fine, the relative number of examples that end at
      each level. MDM's "2:1" (fine to coarse) is `(1, 2)` here.

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
        'not divide so: change the batch size or mixed_ratio.'
      )
  return sizes


def make_pyramid(
  images: jax.Array,
  resolutions: Sequence[int],
  fractions: Sequence[float],
  *,
  coarse: Mapping[int, jax.Array] | None = None,
  repeats: int = 1,
) -> Pyramid:
  """Average-pools each level from the one above it.

  Args:
    images: [N, H, H, 3] at the finest resolution: of the examples that the
      finest level sees, or of more.
    resolutions: coarse to fine; each must divide the next.
    fractions: coarse to fine, the share of the batch that each level sees.
    coarse: level -> images [M, H_r, H_r, 3] of the examples whose finest
      level it is, if `images` is without them.
    repeats: of a mixed batch's pattern, see `mixed_batch`.

  Returns:
    Coarse to fine, `pyramid[r]` of [fractions[r] * B, H_r, H_r, 3].

  Raises:
    ValueError: if images are not of their level's resolution, a resolution
      does not divide the next, or a fraction of the batch is not whole.
  """
  coarse = coarse or {}
  batch = len(images) + sum(map(len, coarse.values()))
  sizes = level_batch_sizes(batch, fractions)
  for level, own in {**coarse, len(resolutions) - 1: images}.items():
    if own.shape[1:3] != (resolutions[level],) * 2:
      raise ValueError(
        f'The images are {own.shape[1]}x{own.shape[2]}: crop them to the '
        f'resolution of level {level}, {resolutions[level]}.'
      )
  levels = [images]
  for level in reversed(range(len(resolutions) - 1)):
    pooled = _pool(levels[0], resolutions[level])
    if level in coarse:
      pooled = mixed_batch.join(pooled, coarse[level], repeats)
    levels.insert(0, pooled)
  return tuple(
    mixed_batch.take(images, size, repeats)
    for images, size in zip(levels, sizes, strict=True)
  )


def _pool(images: jax.Array, resolution: int) -> jax.Array:
  """Means of square blocks: [B, H, H, 3] -> [B, resolution, resolution, 3]."""
  batch, side, _, channels = images.shape
  factor, remainder = divmod(side, resolution)
  if remainder:
    raise ValueError(
      f'Resolutions {resolution} and {side}: each must divide the next.'
    )
  blocks = images.reshape(
    batch, resolution, factor, resolution, factor, channels
  )
  return blocks.mean((2, 4))
