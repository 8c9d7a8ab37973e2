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
  shapes: Sequence[Sequence[int]],
  fractions: Sequence[float],
  *,
  coarse: Mapping[int, jax.Array] | None = None,
  repeats: int = 1,
) -> Pyramid:
  """Average-pools each level from the next finer one.

  A level of fewer frames has every k-th frame of the next finer one, from the
  first on.

  Args:
    images: [N, H, H, 3], or clips [N, T, H, H, 3], of the finest level: of the
      examples that it sees, or of more.
    shapes: of an example at each level, coarse to fine, see
      `mixed_batch.example_shape`. Resolution and frames of each must divide
      those of the next.
    fractions: the share of the batch that each level sees, coarse to fine.
    coarse: level -> images [M, *shapes[r]] of the examples whose finest level
      it is, for the examples that `images` does not hold.
    repeats: periods of a mixed batch, see `mixed_batch`.

  Returns:
    Coarse to fine, `pyramid[r]` of [fractions[r] * B, *shapes[r]].

  Raises:
    ValueError: if images do not have their level's shape, a resolution or
      number of frames does not divide the next, or a fraction of the batch is
      not a whole number of examples.
  """
  coarse = coarse or {}
  batch = len(images) + sum(map(len, coarse.values()))
  sizes = mixed_batch.level_batch_sizes(batch, fractions)
  for level, own in {**coarse, len(shapes) - 1: images}.items():
    if own.shape[1:] != tuple(shapes[level]):
      found, wanted = (
        'x'.join(map(str, shape[:-1]))
        for shape in (own.shape[1:], shapes[level])
      )
      raise ValueError(
        f'The images are {found}: crop them to {wanted}, as of level {level}.'
      )
  levels = [images]
  for level in reversed(range(len(shapes) - 1)):
    pooled = _pool(levels[0], shapes[level])
    if level in coarse:
      pooled = mixed_batch.join(pooled, coarse[level], repeats)
    levels.insert(0, pooled)
  return tuple(
    mixed_batch.take(images, size, repeats)
    for images, size in zip(levels, sizes, strict=True)
  )


def _pool(images: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Takes every k-th frame, and averages pixels: [B, ...] -> [B, *shape]."""
  if images.ndim == 5:
    frames = shape[0] if len(shape) == 4 else 1
    every, remainder = divmod(images.shape[1], frames)
    if remainder:
      raise ValueError(
        f'Levels of {frames} and {images.shape[1]} frames: each must divide '
        'the next.'
      )
    images = images[:, ::every]
  *_, side, _, channels = images.shape
  resolution = shape[-2]
  factor, remainder = divmod(side, resolution)
  if remainder:
    raise ValueError(
      f'Resolutions {resolution} and {side}: each must divide the next.'
    )
  blocks = images.reshape(-1, resolution, factor, resolution, factor, channels)
  return blocks.mean((2, 4)).reshape(len(images), *shape)
