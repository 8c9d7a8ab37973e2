"""Pyramids: the same images at the resolution of every level."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch

Pyramid = tuple[jax.Array, ...]
# How images become uint8.
PIXELS = ('round', 'truncate')


def to_float(images: jax.Array) -> jax.Array:
  """Maps uint8 pixels to float32 `(x - 127) / 128`, within [-1, 1]."""
  return (images.astype(jnp.float32) - 127) / 128


def to_uint8(images: jax.Array, pixels: str = 'round') -> jax.Array:
  """Maps floats to uint8 pixels: `x * 128 + 127`, clipped.

  Args:
    images: floats of any shape.
    pixels: one of PIXELS. 'round' makes it the inverse of `to_float`; halves
      round to even. 'truncate' is what the release does.
  """
  values = jnp.clip(images.astype(jnp.float32) * 128 + 127, 0, 255)
  return (jnp.round(values) if pixels == 'round' else values).astype(jnp.uint8)


def make_pyramid(
  images: jax.Array,
  resolutions: Sequence[int],
  fractions: Sequence[float],
  *,
  coarse: Mapping[int, jax.Array] | None = None,
  repeats: int = 1,
) -> Pyramid:
  """Average-pools each level from the next finer one.

  Args:
    images: [N, H, H, 3] at the finest resolution: of the examples that the
      finest level sees, or of more.
    resolutions: of the levels in pixels, coarse to fine; each must divide the
      next.
    fractions: the share of the batch that each level sees, coarse to fine.
    coarse: level -> images [M, H_r, H_r, 3] of the examples whose finest level
      it is, for the examples that `images` does not hold.
    repeats: periods of a mixed batch, see `mixed_batch`.

  Returns:
    Coarse to fine, `pyramid[r]` of [fractions[r] * B, H_r, H_r, 3].

  Raises:
    ValueError: if images do not have their level's resolution, a resolution
      does not divide the next, or a fraction of the batch is not a whole
      number of examples.
  """
  coarse = coarse or {}
  batch = len(images) + sum(map(len, coarse.values()))
  sizes = mixed_batch.level_batch_sizes(batch, fractions)
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
  """Average pooling: [B, H, H, 3] -> [B, resolution, resolution, 3]."""
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
