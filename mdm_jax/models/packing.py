"""Neighbouring pixels side by side in the channels, for wide vector units.

A TPU pads the last axis of an array to 128 lanes. Features of 32 channels
fill a quarter of them, so a patch of 2 x 2 pixels is kept as one pixel of 128
channels. Parameters stay what they are: `pack_kernel` rearranges a 3x3 kernel
into that of the same convolution between patches, most of it zeros.
"""

from collections.abc import Sequence
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

Patch = tuple[int, int]  # height and width in pixels, powers of two
TPU_LANES = 128  # of a vector


@struct.dataclass
class Features:
  """Features [B, H, W, C], packed.

  Attributes:
    x: [B, H / height, W / width, height * width * C]; the channels of a pixel
      stay together, pixels run along rows.
    patch: height and width of a patch.
  """

  x: jax.Array
  patch: Patch = struct.field(pytree_node=False, default=(1, 1))

  @property
  def pixels(self) -> int:
    """In a patch."""
    return math.prod(self.patch)

  @property
  def channels(self) -> int:
    """C."""
    return self.x.shape[-1] // self.pixels

  @property
  def size(self) -> tuple[int, int]:
    """H and W."""
    return tuple(n * side for n, side in zip(self.x.shape[1:3], self.patch))

  def as_patch(self, patch: Patch) -> 'Features':
    """The same features, packed by another patch."""
    if patch == self.patch:
      return self
    return Features(fold(unfold(self.x, self.patch), patch), patch)

  def per_channel(self, values: jax.Array) -> jax.Array:
    """Values [C] or [B, C], to be used with `x`."""
    # Not sooner: a CPU's loop over channels uses no vectors if XLA finds
    # anything between a product or parameter and its use but arithmetic.
    values = jnp.tile(values, self.pixels)
    return values if values.ndim == 1 else values[:, None, None]


def best_patch(channels: int, lanes: int, size: Sequence[int]) -> Patch:
  """The patch whose channels fill `lanes`, or the largest that does not.

  Args:
    channels: of a pixel.
    lanes: to fill.
    size: height and width of the features, which a patch must divide.
  """
  patch = [1, 1]
  axis = 1
  while channels * 2 * math.prod(patch) <= lanes:
    if size[axis] % (2 * patch[axis]):
      break
    patch[axis] *= 2
    axis = 1 - axis
  return tuple(patch)


def fold(x: jax.Array, patch: Patch) -> jax.Array:
  """Patches into channels: [B, H, W, C] -> [B, H/h, W/w, h * w * C]."""
  batch, height, width, channels = x.shape
  rows, columns = patch
  if patch == (1, 1):
    return x
  x = x.reshape(
    batch, height // rows, rows, width // columns, columns, channels
  )
  return x.swapaxes(2, 3).reshape(
    batch, height // rows, width // columns, rows * columns * channels
  )


def unfold(x: jax.Array, patch: Patch) -> jax.Array:
  """Undoes `fold`."""
  batch, height, width, _ = x.shape
  rows, columns = patch
  if patch == (1, 1):
    return x
  x = x.reshape(batch, height, width, rows, columns, -1)
  return x.swapaxes(2, 3).reshape(batch, height * rows, width * columns, -1)


def _taps(
  inner: int, outer: int, stride: int, upsample: int
) -> tuple[np.ndarray, int, int]:
  """Along one axis, which pixel of which input patch a tap of 3 reads.

  Args:
    inner: pixels of an input patch.
    outer: pixels of an output patch.
    stride: of the convolution of pixels.
    upsample: how often each input pixel is repeated before it.

  Returns:
    Zeros and ones [input patches, inner, outer, 3], the offset of the first
    input patch, and the stride in input patches.
  """
  # Output pixel i reads the upsampled input at stride * i - 1, + 0, + 1.
  read = {
    (i, tap): divmod((stride * i + tap - 1) // upsample, inner)
    for i in range(outer)
    for tap in range(3)
  }
  first = min(patch for patch, _ in read.values())
  last = max(patch for patch, _ in read.values())
  chosen = np.zeros((last - first + 1, inner, outer, 3), np.float32)
  for (i, tap), (patch, pixel) in read.items():
    chosen[patch - first, pixel, i, tap] = 1
  return chosen, first, stride * outer // (upsample * inner)


def pack_kernel(
  kernel: jax.Array, inner: Patch, outer: Patch, stride: int, upsample: int
) -> tuple[jax.Array, list[int], list[Patch]]:
  """The 3x3 convolution of pixels as a convolution of patches.

  Args:
    kernel: [3, 3, C, D].
    inner: patch of the input; `upsample` times it divides `stride` times
      `outer`.
    outer: patch of the output.
    stride: of the convolution of pixels, which are padded by 1 on each side.
    upsample: how often each input pixel is repeated before it.

  Returns:
    Kernel [h, w, pixels of inner * C, pixels of outer * D], strides, paddings.
  """
  axes = [_taps(*sides, stride, upsample) for sides in zip(inner, outer)]
  (rows, _, _), (columns, _, _) = axes
  # A sum of one term each: exact.
  if max(inner + outer) > 1:
    kernel = jnp.einsum(
      'tiax,ujby,xycd->tuijcabd', rows, columns, kernel, precision='highest'
    )
    kernel = kernel.reshape(*kernel.shape[:2], math.prod(kernel.shape[2:5]), -1)
  strides = [step for _, _, step in axes]
  padding = [
    (-first, len(chosen) + first - step) for chosen, first, step in axes
  ]
  return kernel, strides, padding
