"""The UNet's building blocks, as in Apple's release of MDM.

Parameters, normalisation statistics and softmax are float32; matrix products
and activations are in `dtype`. 1x1 convolutions are written as `nn.Dense`.
"""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

# PyTorch's epsilon; Flax's default of 1e-6 is off by 3e-5 in the output.
EPSILON = 1e-5

zeros = nn.initializers.zeros_init()


def conv3x3(features: int, dtype, *, stride: int = 1, zero: bool = False,
            name: str | None = None) -> nn.Conv:
  """3x3 convolution, padded by one pixel on every side at any stride."""
  kernel_init = zeros if zero else nn.initializers.lecun_normal()
  # 'SAME' would pad a strided convolution on one side only.
  return nn.Conv(features, (3, 3), strides=stride, padding=1, dtype=dtype,
                 kernel_init=kernel_init, name=name)


def dense_layer(features: int, name: str | None = None, *, dtype,
                zero: bool = False) -> nn.Dense:
  """A linear map of the last axis (a 1x1 convolution on images)."""
  kernel_init = zeros if zero else nn.initializers.lecun_normal()
  return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def sinusoidal_embedding(value: jax.Array, dim: int) -> jax.Array:
  """[sin, cos] features of `value` [B] at `dim // 2` frequencies: [B, dim]."""
  half = dim // 2
  frequency = jnp.exp(-math.log(10000.0) / half * jnp.arange(half))
  angle = value.astype(jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def position_features(shape: tuple[int, int], waves: int) -> jax.Array:
  """Where each pixel is, as sines and cosines: [H, W, 4 * waves].

  Wave k = 0, 1, ... has (k + 1) / 2 periods across the image.
  """
  rows, columns = (
      jnp.pi * (jnp.arange(size) + 0.5) / size for size in shape)
  grid = jnp.stack(jnp.meshgrid(rows, columns, indexing='ij'), axis=-1)
  angles = grid[..., None] * jnp.arange(1, waves + 1)
  angles = angles.reshape(*shape, -1)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fold(x: jax.Array, patch: int) -> jax.Array:
  """Patches into channels: [B, H, W, C] -> [B, H/p, W/p, p * p * C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(
      batch, height // patch, patch, width // patch, patch, channels)
  return x.swapaxes(2, 3).reshape(
      batch, height // patch, width // patch, patch * patch * channels)


def unfold(x: jax.Array, patch: int) -> jax.Array:
  """Undoes `fold`: [B, h, w, p * p * C] -> [B, h * p, w * p, C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, patch, patch, -1)
  return x.swapaxes(2, 3).reshape(batch, height * patch, width * patch, -1)


class ResidualBlock(nn.Module):
  """GN, SiLU, conv; scale and shift by the time embedding; GN, SiLU, conv."""
  features: int
  num_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
    """x [B, H, W, C], temb [B, D] -> [B, H, W, features]."""
    def norm(name):
      return nn.GroupNorm(
          self.num_groups, epsilon=EPSILON, dtype=self.dtype, name=name)

    h = nn.silu(norm('norm_in')(x))
    h = conv3x3(self.features, self.dtype, name='conv_in')(h)
    modulation = nn.Dense(
        2 * self.features, dtype=self.dtype, name='time')(nn.silu(temb))
    scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
    h = nn.silu(norm('norm_out')(h) * (1 + scale) + shift)
    h = conv3x3(self.features, self.dtype, zero=True, name='conv_out')(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name='shortcut')(x)
    return x + h


def attend(query: jax.Array, key: jax.Array, value: jax.Array,
           num_heads: int, mask: jax.Array | None = None) -> jax.Array:
  """Multi-head attention, softmax in float32.

  Args:
    query: [B, N, C]; head h owns channels h*C/heads .. (h+1)*C/heads - 1.
    key: [B, M, C].
    value: [B, M, C].
    num_heads: divides C.
    mask: [B, M] bool, True where a key may be seen.

  Returns:
    [B, N, C].
  """
  def heads(x):
    return x.reshape(*x.shape[:2], num_heads, -1)
  if mask is not None:
    mask = mask[:, None, None, :]
  out = jax.nn.dot_product_attention(
      heads(query), heads(key), heads(value), mask=mask)
  return out.reshape(query.shape)


class Attention(nn.Module):
  """Self-attention plus cross-attention to the text, sharing the queries.

  The two softmaxes are separate and their outputs added. `ffn` appends a
  pointwise feed-forward block.
  """
  num_heads: int
  num_groups: int
  ffn: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array,
               text_mask: jax.Array | None) -> jax.Array:
    """x [B, H, W, C], text [B, L, D], text_mask [B, L] or None: like x."""
    def norm(name):
      return nn.GroupNorm(
          self.num_groups, epsilon=EPSILON, dtype=self.dtype, name=name)

    dense = functools.partial(dense_layer, dtype=self.dtype)
    batch, height, width, channels = x.shape
    h = norm('norm')(x).reshape(batch, height * width, channels)
    q, k, v = jnp.split(dense(3 * channels, 'qkv')(h), 3, axis=-1)
    text = nn.LayerNorm(
        epsilon=EPSILON, dtype=self.dtype, name='norm_text')(text)
    text_k, text_v = jnp.split(dense(2 * channels, 'text_kv')(text), 2, -1)
    h = attend(q, k, v, self.num_heads)
    h += attend(q, text_k, text_v, self.num_heads, text_mask)
    x += dense(channels, 'proj', zero=True)(h).reshape(x.shape)
    if self.ffn:
      h = dense(4 * channels, 'ffn_in')(norm('ffn_norm')(x))
      h = nn.gelu(h, approximate=False)
      x += dense(channels, 'ffn_out', zero=True)(h)
    return x


class TransformerLayer(nn.Module):
  """Pre-LN transformer layer with exact GELU and zero-initialised outputs."""
  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, L, D], mask [B, L] bool or None: [B, L, D]."""
    def norm(name):
      return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)

    dense = functools.partial(dense_layer, dtype=self.dtype)
    width = x.shape[-1]
    q, k, v = jnp.split(dense(3 * width, 'qkv')(norm('norm')(x)), 3, axis=-1)
    h = attend(q, k, v, self.num_heads, mask)
    x += dense(width, 'proj', zero=True)(h)
    h = dense(4 * width, 'ffn_in')(norm('ffn_norm')(x))
    return x + dense(width, 'ffn_out', zero=True)(
        nn.gelu(h, approximate=False))
