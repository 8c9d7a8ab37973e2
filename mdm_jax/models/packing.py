"""Packs patches of pixels into channels (space to depth), for TPUs.

A TPU pads the last axis of an array to 128 lanes, of which features of 32
channels fill a quarter. Such features are packed: a patch of 2 x 2 pixels
becomes one pixel of 128 channels. The parameters do not change:
`pack_kernel` turns a 3x3 kernel into the kernel of the same convolution
between patches, most of which is zero.
"""

from collections.abc import Sequence
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

Patch = tuple[int, int]  # height and width in pixels, powers of two
TPU_LANES = 128  # elements along the last axis of a vector register


@struct.dataclass
class Features:
  """Features [B, H, W, C], packed.

  Attributes:
    x: [B, H / height, W / width, height * width * C]. The channels of a pixel
      are adjacent, and the pixels of a patch are in row-major order.
    patch: height and width of a patch in pixels.
  """

  x: jax.Array
  patch: Patch = struct.field(pytree_node=False, default=(1, 1))

  @property
  def pixels(self) -> int:
    """Number of pixels in a patch."""
    return math.prod(self.patch)

  @property
  def channels(self) -> int:
    """C, the channels of a pixel."""
    return self.x.shape[-1] // self.pixels

  @property
  def size(self) -> tuple[int, int]:
    """H and W in pixels."""
    return tuple(n * side for n, side in zip(self.x.shape[1:3], self.patch))

  def as_patch(self, patch: Patch) -> 'Features':
    """Repacks the features into another patch."""
    if patch == self.patch:
      return self
    return Features(fold(unfold(self.x, self.patch), patch), patch)

  def per_channel(self, values: jax.Array) -> jax.Array:
    """Shapes values [C] or [B, C] so that they broadcast with `x`."""
    # Call this just before the values are used. XLA's CPU loops over channels
    # are only vectorised if nothing but arithmetic lies between a matrix
    # product (or parameter) and its use.
    values = jnp.tile(values, self.pixels)
    return values if values.ndim == 1 else values[:, None, None]


def concatenate(inputs: Sequence[Features]) -> Features:
  """Concatenates the channels of features of the same size and patch."""
  if len(inputs) == 1:
    return inputs[0]
  x = jnp.concatenate([x.as_patch((1, 1)).x for x in inputs], axis=-1)
  return Features(x).as_patch(inputs[0].patch)


def best_patch(channels: int, lanes: int, size: Sequence[int]) -> Patch:
  """The largest patch that has at most `lanes` channels and divides `size`.

  Its sides are doubled in turn, the width first.

  Args:
    channels: C, of a pixel.
    lanes: how many channels a patch may have.
    size: H and W of the features; the patch divides them.
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
  """Packs patches into channels: [B, H, W, C] -> [B, H/h, W/w, h * w * C]."""
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
  """Undoes `fold`: [B, H/h, W/w, h * w * C] -> [B, H, W, C]."""
  batch, height, width, _ = x.shape
  rows, columns = patch
  if patch == (1, 1):
    return x
  x = x.reshape(batch, height, width, rows, columns, -1)
  return x.swapaxes(2, 3).reshape(batch, height * rows, width * columns, -1)


def _taps(
  inner: int, outer: int, stride: int, upsample: int
) -> tuple[np.ndarray, int, int]:
  """The input pixels that the 3 taps of a kernel read, along one axis.

  Args:
    inner: pixels of an input patch.
    outer: pixels of an output patch.
    stride: of the convolution of pixels.
    upsample: how often each input pixel is repeated before the convolution.

  Returns:
    [input patches, inner, outer, 3], 1 where a tap reads an input pixel for an
    output pixel, else 0; the offset of the first input patch; and the stride
    in input patches.
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
  """Turns a 3x3 convolution of pixels into a convolution of patches.

  Args:
    kernel: [3, 3, C, D].
    inner: patch of the input; `upsample * inner` must divide `stride * outer`
      along both axes.
    outer: patch of the output.
    stride: of the convolution of pixels, which is padded by 1 on each side.
    upsample: how often each input pixel is repeated before the convolution.

  Returns:
    Kernel [h, w, pixels of inner * C, pixels of outer * D], strides, paddings.
  """
  axes = [_taps(*sides, stride, upsample) for sides in zip(inner, outer)]
  (rows, _, _), (columns, _, _) = axes
  # Every sum has one nonzero term, so the values are exact.
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
