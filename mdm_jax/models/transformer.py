"""A transformer as the innermost level, in the place of its UNet.

Blocks are pre-RMSNorm with QK-norm (Henry et al., arXiv 2010.04245; per head as
in ViT-22B, arXiv 2302.05442), two-dimensional rotary positions (RoPE-ViT, arXiv
2403.13298) and SwiGLU (Shazeer, arXiv 2002.05202). Time, micro-condition and
text are tokens beside those of the image; nothing modulates the norms.

Parameters, norms and softmax are float32; matrix products are in `dtype`.
"""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models import attention, layers, packing
from mdm_jax.models.packing import Features
from mdm_jax.models.unet import (
  LevelSpec,
  capped_scale,
  folded,
  frame_attention,
  rematerialised,
)


def ffn_size(width: int) -> int:
  """Hidden channels of SwiGLU: about 8/3 of the width, a multiple of 8.

  Its three matrices then cost what the two of a feed-forward block of four
  times the width cost.
  """
  return 8 * max(round(width / 3), 1)


class Block(nn.Module):
  """Attention to all tokens and to the text in one softmax, then SwiGLU.

  Attributes:
    num_heads: heads of the attention.
    grid: rows and columns of the image's tokens.
    dtype: of matrix products and the output.
    flash: see `attention.attend`.
  """

  num_heads: int
  grid: tuple[int, int]
  dtype: jnp.dtype
  flash: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, text: jax.Array, text_mask: jax.Array | None
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: [B, N, C] tokens, those of the image first.
      text: [B, L, D]; of the examples, where x has several frames of each.
      text_mask: [B, L] bool, True for tokens, which come first; None for all.

    Returns:
      [B, N, C].
    """
    batch, count, width = x.shape
    norm = functools.partial(
      nn.RMSNorm, epsilon=layers.EPSILON, dtype=self.dtype
    )
    dense = functools.partial(
      layers.dense_layer, dtype=self.dtype, use_bias=False
    )

    def keys_and_values():
      key, value = jnp.split(
        dense(2 * width, 'text_kv')(norm(name='norm_text')(text)), 2, axis=-1
      )
      heads = key.reshape(*key.shape[:2], self.num_heads, -1)
      return norm(name='text_k_norm')(heads).reshape(key.shape), value

    angles = attention.rotary_angles(
      self.grid, width // self.num_heads, count - math.prod(self.grid)
    )

    query, key, value = jnp.split(
      dense(3 * width, 'qkv')(norm(name='norm')(x)), 3, axis=-1
    )
    query, key = (
      attention.rotary_heads(each, self.num_heads, angles, f'{name}_norm')
      for name, each in (('q', query), ('k', key))
    )
    text_key, text_value = (
      attention.per_frame(each, batch)
      for each in layers.once(self, 'text_kv', keys_and_values)
    )
    mask = attention.per_frame(text_mask, batch)
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)
    h = attention.attend(
      query,
      jnp.concatenate([key, text_key], axis=1),
      jnp.concatenate([value, text_value], axis=1),
      self.num_heads,
      mask,
      self.flash,
    )
    x += dense(width, 'proj', zero=True)(h)
    h = dense(2 * ffn_size(width), 'ffn_in')(norm(name='ffn_norm')(x))
    gate, h = jnp.split(h, 2, axis=-1)
    return x + dense(width, 'ffn_out', zero=True)(nn.silu(gate) * h)


class Blocks(nn.Module):
  """All blocks of the level."""

  spec: LevelSpec
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    h: Features,
    tokens: jax.Array,
    text: jax.Array,
    mask: jax.Array | None,
  ) -> Features:
    """Applies the blocks.

    Args:
      h: [B, H, W, C] features of patches.
      tokens: [B, n, C] tokens beside them.
      text: [B, L, D].
      mask: [B, L] bool or None.

    Returns:
      Features of the shape of `h`.
    """
    batch, *grid, width = h.x.shape
    x = jnp.concatenate([h.x.reshape(batch, -1, width), tokens], axis=1)
    for i in range(self.spec.num_blocks[0]):
      x = rematerialised(Block, self.spec)(
        self.spec.num_heads,
        tuple(grid),
        self.dtype,
        self.spec.flash,
        name=f'block_{i}',
      )(x, text, mask)
      for k in range(self.spec.frame_layers(0)):
        name = f'frame_attention_{i}_{k}'
        layer = frame_attention(self.spec, self.dtype, name, tuple(grid))
        x = layer(Features(x[:, None])).x[:, 0]
    return h.replace(x=x[:, : math.prod(grid)].reshape(h.x.shape))


class Transformer(nn.Module):
  """The innermost level, in the parts that `NestedUNet` interleaves.

  They are those of `unet.UNet`: `embed`, `descend`, `middle`, which is all of
  the transformer's blocks, `ascend`, which has nothing to do, and `out`.
  """

  spec: LevelSpec
  dtype: jnp.dtype

  # A transformer has no coarser level inside.
  inner_channels = None

  def setup(self):
    spec, dtype = self.spec, self.dtype
    (width,) = spec.channels

    def dense(features, zero=False):
      return layers.dense_layer(features, dtype=dtype, zero=zero)

    self.time_in, self.time_out = (dense(spec.temporal_dim) for _ in range(2))
    self.time_token = dense(width)
    self.scale_in, self.scale_token = dense(spec.temporal_dim), dense(width)
    # Convolutions of patches with as large a stride; rules for the first and
    # last layer of any level know them by these names.
    self.conv_in = dense(width)
    self.conv_out = dense(spec.image_channels * spec.patch_size**2, zero=True)
    if spec.position_waves:
      self.position = dense(width)
    blocks = nn.remat(Blocks) if spec.remat == 'level' else Blocks
    self.middle = blocks(spec, dtype)
    self.norm_out = nn.RMSNorm(epsilon=layers.EPSILON, dtype=dtype)

  def embed(
    self, t: jax.Array, scale: jax.Array | None, pooled_text: jax.Array
  ) -> jax.Array:
    """The tokens of time, with the pooled text, and of the micro-condition.

    Args:
      t: [B] time indices.
      scale: [B] shorter side of the original images in pixels; None for
        `scale_condition`.
      pooled_text: [B, temporal_dim].

    Returns:
      [B, 2, C].
    """
    t, scale = (
      layers.sinusoidal_embedding(value, self.spec.temporal_dim // 4)
      for value in (t, capped_scale(self.spec, t, scale))
    )
    temb = self.time_out(nn.silu(self.time_in(t))) + pooled_text
    time = self.time_token(nn.silu(temb))
    scale = self.scale_token(nn.silu(self.scale_in(scale)))
    return jnp.stack([time, scale], axis=1)

  def descend(self, x, tokens, text, mask, outer):
    """The noisy images as features of patches, those of finer levels added.

    Args:
      x: [B, H, W, 3] noisy images of this level, or frames of its clips.
      tokens: [B, n, C] as for `Blocks`; the first, that of the time, is added
        to each patch.
      text, mask: as for `Blocks`; not used.
      outer: Features from the `in_adapter` of the next finer level; None for
        the finest level.

    Returns:
      Features [B, H/p, W/p, C], and no skips.
    """
    h = Features(self.conv_in(folded(x, self.spec)))
    # What a noisy pixel says depends on the time, which the first block would
    # otherwise have to find out by attention.
    h = h.replace(x=h.x + tokens[:, None, :1])
    if outer is not None:
      h = h.replace(x=h.x + outer.as_patch(h.patch).x)
    if self.spec.position_waves:
      position = self.position(
        layers.position_features(h.size, self.spec.position_waves)
      )
      h = h.replace(x=h.x + position)
    return h, []

  def ascend(self, h, skips, tokens, text, mask):
    """Returns the features: there is nothing to do after the blocks."""
    return h

  def out(self, h: Features) -> jax.Array:
    """Features of patches -> prediction [B, H, W, 3] in float32."""
    h = self.conv_out(self.norm_out(h.x)).astype(jnp.float32)
    return packing.unfold(h, (self.spec.patch_size,) * 2)
