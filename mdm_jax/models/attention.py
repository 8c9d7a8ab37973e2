"""Attention to pixels, text and frames.

Parameters and softmax are float32; matrix products and activations are in
`dtype`.
"""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.layers import EPSILON, GroupNorm, dense_layer, once
from mdm_jax.models.packing import Features

# The fastest pairs of a head turn by this many radians a token, so that single
# neighbours can be told apart. With 1, as for texts, that is learned later.
_HIGHEST_FREQUENCY = 2.0


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  num_heads: int,
  mask: jax.Array | None = None,
  flash: bool = False,
) -> jax.Array:
  """Multi-head attention, softmax in float32.

  Args:
    query: [B, N, C]; head h owns channels h*C/heads .. (h+1)*C/heads - 1.
    key: [B, M, C].
    value: [B, M, C].
    num_heads: divides C.
    mask: [B, M] bool, True for keys that are attended to; None for all.
    flash: use cuDNN's flash attention (Dao, arXiv 2307.08691), which does not
      store the N x M weights, if dtype, size of the heads, and N and M, which
      must be even, allow it. The keys that are attended to must then come
      first. Without any it attends to the first: an empty caption's are equal.

  Returns:
    [B, N, C].
  """

  def heads(x):
    return x.reshape(*x.shape[:2], num_heads, -1)

  size = query.shape[-1] // num_heads
  options = {}
  if (
    flash
    and query.dtype.itemsize == 2
    and size % 8 == 0
    and size <= 128
    # JAX refuses gradients with lengths of the keys otherwise.
    and query.shape[1] % 2 == key.shape[1] % 2 == 0
  ):
    options['implementation'] = 'cudnn'
    if mask is not None:
      lengths = mask.sum(axis=1, dtype=jnp.int32)
      options['key_value_seq_lengths'] = jnp.maximum(lengths, 1)
  elif mask is not None:
    options['mask'] = mask[:, None, None, :]
  out = jax.nn.dot_product_attention(
    heads(query), heads(key), heads(value), **options
  )
  return out.reshape(query.shape)


def per_frame(x: jax.Array | None, count: int) -> jax.Array | None:
  """Repeats what an example has for each of its frames.

  Args:
    x: [B, ...] of examples, or of frames that stand for several; None stays
      None.
    count: a multiple of B. The frames of an example are adjacent.

  Returns:
    [count, ...].
  """
  if x is None or len(x) == count:
    return x
  return jnp.repeat(x, count // len(x), axis=0)


def rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
  """Turns dimensions i and i + D/2 of each head by angle i (RoPE, 2104.09864).

  Args:
    x: [B, N, heads, D].
    angles: [N, D/2] in radians.
  """
  cos, sin = (np.float32(f(angles))[:, None] for f in (np.cos, np.sin))
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def rotary_heads(
  x: jax.Array, num_heads: int, angles: np.ndarray, name: str
) -> jax.Array:
  """Normalises queries or keys per head, and turns them, in float32.

  Args:
    x: [B, N, heads * D].
    num_heads: of x.
    angles: [N, D/2] in radians.
    name: of the RMSNorm, a submodule of the module that calls this.
  """
  heads = x.reshape(*x.shape[:2], num_heads, -1)
  norm = nn.RMSNorm(epsilon=EPSILON, dtype=jnp.float32, name=name)
  return rotate(norm(heads), angles).reshape(x.shape).astype(x.dtype)


def rotary_angles(
  grid: tuple[int, int], head_size: int, others: int = 0
) -> np.ndarray:
  """Angles by which a head's queries and keys are turned at each token.

  The first half of the pairs turns with the row, the second with the column.
  Both are counted from the middle of the image, which is also the position of
  tokens that have none. The slowest pairs turn by one radian from one side of
  the image to the other: slower ones would tell nothing apart.

  Args:
    grid: rows and columns of tokens.
    head_size: dimensions of a head, a multiple of 4.
    others: tokens without a position, which follow those of the image.

  Returns:
    [rows * columns + others, head_size / 2] float64, in radians.
  """
  count = head_size // 4
  frequencies = np.geomspace(_HIGHEST_FREQUENCY, 1 / max(grid), count)
  rows, columns = (np.arange(side) - (side - 1) / 2 for side in grid)
  places = np.stack(np.meshgrid(rows, columns, indexing='ij'), axis=-1)
  angles = (places[..., None] * frequencies).reshape(-1, 2 * count)
  return np.pad(angles, ((0, others), (0, 0)))


class Attention(nn.Module):
  """Self-attention plus cross-attention to the text, sharing the queries.

  The two softmaxes are separate, and their outputs are added. `ffn` appends a
  pointwise feed-forward block.
  """

  num_heads: int
  num_groups: int
  ffn: bool
  dtype: jnp.dtype
  flash: bool = False  # see `attend`

  @nn.compact
  def __call__(
    self, features: Features, text: jax.Array, text_mask: jax.Array | None
  ) -> Features:
    """Attends to the pixels and the text.

    Args:
      features: of B images, or of all frames of B clips.
      text: [B, L, D].
      text_mask: [B, L] bool, True for tokens; None for all.

    Returns:
      Features of the same shape.
    """

    def norm(name, x):
      (h,) = GroupNorm(self.num_groups, self.dtype, name=name)(Features(x))
      return h.x

    dense = functools.partial(dense_layer, dtype=self.dtype)
    x = features.as_patch((1, 1)).x
    batch, height, width, channels = x.shape
    h = norm('norm', x).reshape(batch, height * width, channels)
    q, k, v = jnp.split(dense(3 * channels, 'qkv')(h), 3, axis=-1)

    def keys_and_values():
      norm_text = nn.LayerNorm(
        epsilon=EPSILON, dtype=self.dtype, name='norm_text'
      )
      return dense(2 * channels, 'text_kv')(norm_text(text))

    text_kv = per_frame(once(self, 'text_kv', keys_and_values), batch)
    text_k, text_v = jnp.split(text_kv, 2, -1)
    h = attend(q, k, v, self.num_heads, flash=self.flash)
    text_mask = per_frame(text_mask, batch)
    h += attend(q, text_k, text_v, self.num_heads, text_mask, self.flash)
    x += dense(channels, 'proj', zero=True)(h).reshape(x.shape)
    if self.ffn:
      h = dense(4 * channels, 'ffn_in')(norm('ffn_norm', x))
      h = nn.gelu(h, approximate=False)
      x += dense(channels, 'ffn_out', zero=True)(h)
    return Features(x).as_patch(features.patch)


class FrameAttention(nn.Module):
  """Temporal attention: between the frames of a clip.

  Each position sees itself in all frames, or all positions of all frames:
  divided and joint space-time attention (Bertasius et al., arXiv 2102.05095).
  Other layers attend within a frame (spatial attention). The frames have rotary
  and sinusoidal positions, and queries and keys are normalised per head. The
  output is zero at first: a clip's frames are then those of a network without
  this layer. Its parameters do not depend on the number of frames.

  Attributes:
    frames: T, of each clip.
    num_heads: divides the channels into heads of an even size, for joint
      attention of a multiple of 8.
    dtype: of matrix products and the output.
    joint: see all positions.
    grid: rows and columns of the positions, which tokens without one follow;
      None for all.
    flash: of joint attention, see `attend`.
  """

  frames: int
  num_heads: int
  dtype: jnp.dtype
  joint: bool = False
  grid: tuple[int, int] | None = None
  flash: bool = False

  @nn.compact
  def __call__(self, features: Features) -> Features:
    """Features [B * T, H, W, C], a clip's frames adjacent -> the same shape."""
    x = features.as_patch((1, 1)).x
    *shape, channels = x.shape
    size, count = channels // self.num_heads, math.prod(shape[1:])

    def waves(number):  # From 2 radians a frame to 1 radian in 64 frames.
      angles = np.arange(self.frames)[:, None] * np.geomspace(2, 1 / 64, number)
      return np.repeat(angles, count, axis=0) if self.joint else angles

    angles = waves(size // 2)
    if self.joint:
      # Half of the pairs of a head turn with the position.
      grid = self.grid or tuple(shape[1:])
      places = rotary_angles(grid, size // 2, count - math.prod(grid))
      angles = np.tile(places, (self.frames, 1))
      angles = np.concatenate([waves(size // 4), angles], axis=1)

    # [B * T, H, W, D] -> [B * H * W, T, D], or [B, T * H * W, D]
    def clips(x):
      x = x.reshape(-1, self.frames, count, x.shape[-1])
      x = x if self.joint else x.swapaxes(1, 2)
      return x.reshape(-1, len(angles), x.shape[-1])

    dense = functools.partial(dense_layer, dtype=self.dtype, use_bias=False)
    # Rotations tell how far apart two frames are, but not which is which: what
    # moves left is further left the later it is.
    times = waves(channels // 2)
    times = np.concatenate([np.sin(times), np.cos(times)], axis=-1)
    norm = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype, name='norm')
    h = clips(norm(x)) + times.astype(self.dtype)
    qkv = dense(3 * channels, 'qkv')(h)
    query, key, value = jnp.split(qkv, 3, axis=-1)
    query, key = (
      rotary_heads(each, self.num_heads, angles, f'{name}_norm')
      for name, each in (('q', query), ('k', key))
    )
    flash = self.joint and self.flash
    h = attend(query, key, value, self.num_heads, flash=flash)
    if not self.joint:
      h = h.reshape(-1, count, self.frames, channels).swapaxes(1, 2)
    h = h.reshape(x.shape)
    x += dense(channels, 'proj', zero=True)(h)
    return Features(x).as_patch(features.patch)


class TransformerLayer(nn.Module):
  """Pre-LN transformer layer with exact GELU and zero-initialised outputs."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, L, D], mask [B, L] bool or None -> [B, L, D]."""

    def norm(name):
      return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)

    dense = functools.partial(dense_layer, dtype=self.dtype)
    width = x.shape[-1]
    q, k, v = jnp.split(dense(3 * width, 'qkv')(norm('norm')(x)), 3, axis=-1)
    h = attend(q, k, v, self.num_heads, mask)
    x += dense(width, 'proj', zero=True)(h)
    h = dense(4 * width, 'ffn_in')(norm('ffn_norm')(x))
    return x + dense(width, 'ffn_out', zero=True)(nn.gelu(h, approximate=False))
