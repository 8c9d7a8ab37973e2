"""Convolutions, norms and residual blocks, as in Apple's release of MDM.

Parameters and normalisation statistics are float32; matrix products and
activations are in `dtype`. 1x1 convolutions are written as `nn.Dense`.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models import packing, target
from mdm_jax.models.packing import Features, Patch

# PyTorch's default. Flax's 1e-6 changes the network's output by 3e-5.
EPSILON = 1e-5

zeros = nn.initializers.zeros_init()


def dense_layer(
  features: int,
  name: str | None = None,
  *,
  dtype,
  zero: bool = False,
  use_bias: bool = True,
) -> nn.Dense:
  """A linear map of the last axis (a 1x1 convolution on images)."""
  return nn.Dense(
    features,
    use_bias,
    dtype=dtype,
    kernel_init=zeros if zero else nn.initializers.lecun_normal(),
    name=name,
  )


def sinusoidal_embedding(value: jax.Array, dim: int) -> jax.Array:
  """[sin, cos] features of `value` [B] at `dim // 2` frequencies: [B, dim]."""
  half = dim // 2
  frequency = jnp.exp(-math.log(10000.0) / half * jnp.arange(half))
  angle = value.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def position_features(shape: tuple[int, int], waves: int) -> jax.Array:
  """Sinusoidal features of each pixel's row and column: [H, W, 4 * waves].

  Args:
    shape: H and W.
    waves: frequencies per axis. Wave k = 0, 1, ... has (k + 1) / 2 periods
      across the image.
  """
  rows, columns = (jnp.pi * (jnp.arange(size) + 0.5) / size for size in shape)
  grid = jnp.stack(jnp.meshgrid(rows, columns, indexing='ij'), axis=-1)
  angles = grid[..., None] * jnp.arange(1, waves + 1)
  angles = angles.reshape(*shape, -1)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Conv3x3(nn.Module):
  """3x3 convolution, padded by one pixel on every side at any stride.

  Attributes:
    features: D, the number of output channels.
    dtype: of the matrix products and the output.
    stride: 1 or 2.
    upsample: 1 or 2; 2 repeats each input pixel along both axes before the
      convolution (nearest-neighbour upsampling).
    zero: the kernel starts as zero.
  """

  features: int
  dtype: jnp.dtype
  stride: int = 1
  upsample: int = 1
  zero: bool = False

  @nn.compact
  def __call__(self, *inputs: Features, patch: Patch | None = None) -> Features:
    """Convolves the inputs as if they were concatenated.

    Args:
      *inputs: Features with the same size and patch.
      patch: patch of the output; that of the inputs by default.

    Returns:
      Features [B, H * upsample / stride, W * upsample / stride, D].
    """
    patch = patch or inputs[0].patch
    kernel_init = zeros if self.zero else nn.initializers.lecun_normal()
    channels = sum(x.channels for x in inputs)
    kernel = self.param('kernel', kernel_init, (3, 3, channels, self.features))
    bias = self.param('bias', zeros, (self.features,))
    # An output patch has to hold whole input pixels.
    pixels = self.upsample > min(patch)
    inner = (
      (1, 1)
      if pixels
      else tuple(
        min(ours * self.stride // self.upsample, theirs)
        for ours, theirs in zip(patch, inputs[0].patch)
      )
    )

    def convolve(features, kernel):
      x = features.as_patch(inner).x.astype(self.dtype)
      if pixels:
        return Features(_doubled_conv(x, kernel)).as_patch(patch).x
      return _conv(
        x,
        *packing.pack_kernel(kernel, inner, patch, self.stride, self.upsample),
      )

    # A sum of convolutions, as concatenating would copy the features.
    out = Features(sum(map(convolve, inputs, _split(kernel, inputs, 2))), patch)
    return out.replace(x=out.x + out.per_channel(bias.astype(self.dtype)))


def _conv(x, kernel, strides, padding) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    strides,
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _doubled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The 3x3 convolution of an image after nearest-neighbour upsampling by 2.

  Of three neighbouring taps, two read the same input pixel. The result is
  therefore four 2x2 convolutions of the original image, one for each output
  pixel of a 2x2 block: 16 products instead of 36.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, D].

  Returns:
    [B, 2H, 2W, D].
  """

  def halves(kernel, axis):  # For the first and second output of a pair.
    before, here, after = jnp.split(kernel, 3, axis)
    return (
      jnp.concatenate([before, here + after], axis),
      jnp.concatenate([before + here, after], axis),
    )

  rows = []
  for i, row in enumerate(halves(kernel, 0)):
    columns = [
      _conv(x, pixel, (1, 1), ((1 - i, i), (1 - j, j)))
      for j, pixel in enumerate(halves(row, 1))
    ]
    rows.append(jnp.stack(columns, axis=3))  # [B, H, W, 2, D]
  batch, height, width, _ = x.shape
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def once(module: nn.Module, name: str, compute: Callable[[], Any]) -> Any:
  """Computes a value that depends on the conditioning alone, or reads it.

  Args:
    module: the value is read from its variable collection 'context'. If it is
      not there it is computed, and stored there if the collection is mutable.
    name: of the variable.
    compute: returns the value, a pytree of arrays [B, ...].

  Returns:
    The value.
  """
  if module.has_variable('context', name):
    return module.get_variable('context', name)
  value = compute()
  if module.is_mutable_collection('context'):
    module.put_variable('context', name, value)
  return value


def _split(
  x: jax.Array, inputs: Sequence[Features], axis: int
) -> list[jax.Array]:
  """Splits an axis of concatenated channels into those of each input."""
  borders = np.cumsum([features.channels for features in inputs])
  return jnp.split(x, borders[:-1].tolist(), axis)


class Pointwise(nn.Module):
  """A linear map of each pixel's channels: a 1x1 convolution."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, *inputs: Features) -> Features:
    """Maps the inputs as if they were concatenated.

    Args:
      *inputs: Features with the same size and patch.

    Returns:
      Features of that size and patch.
    """
    channels = sum(x.channels for x in inputs)
    kernel = self.param(
      'kernel', nn.initializers.lecun_normal(), (channels, self.features)
    )
    bias = self.param('bias', zeros, (self.features,))
    pixels = jnp.eye(inputs[0].pixels, dtype=kernel.dtype)
    out = inputs[0].replace(
      x=sum(
        x.x.astype(self.dtype) @ jnp.kron(pixels, part).astype(self.dtype)
        for x, part in zip(inputs, _split(kernel, inputs, 0))
      )
    )
    return out.replace(x=out.x + out.per_channel(bias.astype(self.dtype)))


class GroupNorm(nn.Module):
  """Group normalisation, its statistics and arithmetic in float32."""

  num_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, *inputs: Features) -> list[Features]:
    """Normalises features of the same size as if they were concatenated."""
    total = sum(x.channels for x in inputs)
    scale = self.param('scale', nn.initializers.ones_init(), (total,))
    bias = self.param('bias', zeros, (total,))

    size = total // self.num_groups
    on_gpu = target.platform() == 'gpu'
    # Matrix products map channels to groups and back. jnp.repeat would be
    # evaluated for each pixel, and keep XLA's CPU loops from vectorising.
    groups = jnp.kron(jnp.eye(self.num_groups), jnp.ones((1, size)))
    product = functools.partial(jnp.matmul, precision='highest')

    def pixel_means(x):  # [B, H, W, C] -> [B, C]
      if on_gpu:
        # XLA turns the product below into a reduction too, in more kernels. One
        # by many threads is a sum of sums anyway.
        return x.mean(axis=(1, 2))
      # A sum over all pixels at once loses digits as it grows; a mean of the
      # means of a few blocks of rows loses fewer. Devices that share the
      # rows of an image have whole blocks.
      blocks = math.gcd(x.shape[1], 16)
      x = x.reshape(len(x), blocks, -1, x.shape[-1])
      # A matrix product, because its order of summation does not depend on
      # what it is fused with: a level computes the same numbers alone and
      # inside of a larger network.
      return jnp.einsum(
        'bkn,bknc->bkc',
        jnp.full(x.shape[:3], 1 / x.shape[2]),
        x,
        precision='highest',
      ).mean(axis=1)

    def group_means(arrays):  # [B, groups]
      means = [
        pixel_means(x).reshape(len(x), features.pixels, -1).mean(axis=1)
        for features, x in zip(inputs, arrays)
      ]
      means = jnp.concatenate(means, axis=-1)
      if on_gpu:
        return means.reshape(len(means), self.num_groups, size).mean(axis=-1)
      return product(means, groups.T) / size

    def per_channel(x):  # [B, groups] -> [B, channels]
      return jnp.repeat(x, size, axis=-1) if on_gpu else product(x, groups)

    # XLA fuses differences and squares into the sums and never stores them.
    arrays = [features.x.astype(jnp.float32) for features in inputs]
    mean = group_means(arrays)
    # E[x^2] - mean^2 would cancel where the mean is large. The variance is at
    # its minimum over the centre, so that no gradient flows through that.
    centre = _split(per_channel(jax.lax.stop_gradient(mean)), inputs, -1)
    variance = group_means(
      (x - features.per_channel(channels)) ** 2
      for features, x, channels in zip(inputs, arrays, centre)
    )
    factor = jax.lax.rsqrt(variance + EPSILON)
    mean, factor = map(per_channel, (mean, factor))
    factor *= scale
    parts = zip(inputs, *(_split(x, inputs, -1) for x in (mean, factor, bias)))
    out = []
    for features, *parameters in parts:
      mean, factor, bias = map(features.per_channel, parameters)
      x = (features.x.astype(jnp.float32) - mean) * factor + bias
      out.append(features.replace(x=x.astype(self.dtype)))
    return out


@jax.custom_jvp
def _silu(x: jax.Array) -> jax.Array:
  return x * nn.sigmoid(x)


@_silu.defjvp
def _silu_jvp(primals, tangents):
  # Computed from x alone, with an exponential of its own. Otherwise XLA keeps
  # sigmoid(x), one more array of all features, for the backward pass.
  (x,), (tangent,) = primals, tangents
  rest = nn.sigmoid(-x)
  return _silu(x), tangent * (1 - rest) * (1 + x * rest)


def silu(features: Features) -> Features:
  """x * sigmoid(x)."""
  return features.replace(x=_silu(features.x))


class ResidualBlock(nn.Module):
  """A residual block that may be modulated by a time embedding.

  GroupNorm, SiLU, conv; GroupNorm, scale and shift by a linear map of the time
  embedding, if there is one, SiLU, conv; plus a shortcut.
  """

  features: int
  num_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, inputs: Sequence[Features], temb: jax.Array | None = None
  ) -> Features:
    """Applies the block to the inputs as if they were concatenated.

    Args:
      inputs: Features with the same size and patch.
      temb: [B, temporal_dim] time embedding, or None.

    Returns:
      Features of that size and patch.
    """

    def norm(name):
      return GroupNorm(self.num_groups, self.dtype, name=name)

    def conv(name, **options):
      return Conv3x3(self.features, self.dtype, name=name, **options)

    h = conv('conv_in')(*map(silu, norm('norm_in')(*inputs)))
    if temb is None:
      (h,) = norm('norm_out')(h)
    else:
      modulation = nn.Dense(2 * self.features, dtype=self.dtype, name='time')(
        nn.silu(temb)
      )
      scale, shift = map(h.per_channel, jnp.split(modulation, 2, axis=-1))
      (h,) = norm('norm_out')(h)
      h = h.replace(x=h.x * (1 + scale) + shift)
    h = silu(h)
    h = conv('conv_out', zero=True)(h)
    if sum(x.channels for x in inputs) != self.features:
      x = Pointwise(self.features, self.dtype, name='shortcut')(*inputs)
    else:
      x = packing.concatenate(inputs)
    return x.replace(x=x.x + h.x)
