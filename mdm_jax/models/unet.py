"""One level of the pyramid: a UNet whose middle may be another level."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models import layers


@dataclasses.dataclass(frozen=True)
class LevelSpec:
  """The architecture of one level; tuples run from fine to coarse inside it.

  The defaults are those that all of the released models share.
  """
  channels: tuple[int, ...]         # at each of the level's resolutions
  num_blocks: tuple[int, ...]       # residual blocks, down; one more, up
  attention_layers: tuple[int, ...]  # after each residual block; 0 is none
  temporal_dim: int                 # width of the time embedding
  scale_condition: int              # N of the micro-condition 'scale:N'
  normalize_input: bool = False     # divide the noisy input by its std
  attention_ffn: bool = True        # feed-forward block after attention
  num_heads: int = 8
  num_groups: int = 32              # of the group norms
  # Waves across the image that tell a pixel where it is, added to `conv_in`;
  # 0 as in the release, which has to learn that from the padding.
  position_waves: int = 0
  # Pixels a side that are folded into channels before `conv_in` and unfolded
  # after `conv_out`; 1 as in the release. It makes a level cheap, but narrow
  # channels then cannot carry the noise through: predict x0.
  patch_size: int = 1

  def __post_init__(self):
    if self.patch_size < 1:
      raise ValueError(
          f'patch_size={self.patch_size}: give a number of pixels, 1 for none.')
    lengths = {
        len(self.channels), len(self.num_blocks), len(self.attention_layers)}
    if len(lengths) != 1:
      raise ValueError(
          'channels, num_blocks and attention_layers must have one entry a '
          f'resolution: got {self.channels}, {self.num_blocks} and '
          f'{self.attention_layers}.')
    for channels in self.channels:
      for name in ('num_groups', 'num_heads'):
        if name == 'num_heads' and not any(self.attention_layers):
          continue
        if channels % getattr(self, name):
          raise ValueError(
              f'{name}={getattr(self, name)} does not divide the '
              f'{channels} channels of {self.channels}.')

  @property
  def downsampling(self) -> int:
    """Ratio of the level's resolution to that of its coarsest features."""
    return self.patch_size * 2 ** (len(self.channels) - 1)


class _Blocks(nn.Module):
  """The residual blocks and attention layers of one resolution, one way."""
  spec: LevelSpec
  index: int
  dtype: jnp.dtype

  def block(self, j, h, temb, text, mask):
    spec = self.spec
    h = layers.ResidualBlock(
        spec.channels[self.index], spec.num_groups, self.dtype,
        name=f'block_{j}')(h, temb)
    for k in range(spec.attention_layers[self.index]):
      h = layers.Attention(
          spec.num_heads, spec.num_groups, spec.attention_ffn, self.dtype,
          name=f'attention_{j}_{k}')(h, text, mask)
    return h


class DownBlocks(_Blocks):
  """One resolution on the way down."""

  @nn.compact
  def __call__(self, h, temb, text, mask):
    """h [B, H, W, C] -> next h and the skips that this resolution leaves."""
    skips = []
    for j in range(self.spec.num_blocks[self.index]):
      h = self.block(j, h, temb, text, mask)
      skips.append(h)
    if self.index + 1 < len(self.spec.channels):
      h = layers.conv3x3(
          h.shape[-1], self.dtype, stride=2, name='downsample')(h)
      skips.append(h)
    return h, skips


class UpBlocks(_Blocks):
  """One resolution on the way up."""

  @nn.compact
  def __call__(self, h, skips, temb, text, mask):
    """Consumes `skips` from its end; h [B, H, W, C] -> the next h."""
    for j in range(self.spec.num_blocks[self.index] + 1):
      h = jnp.concatenate([h, skips.pop()], axis=-1)
      h = self.block(j, h, temb, text, mask)
    if self.index > 0:
      h = h.repeat(2, axis=1).repeat(2, axis=2)
      h = layers.conv3x3(h.shape[-1], self.dtype, name='upsample')(h)
    return h


class Middle(nn.Module):
  """Block, attention, block."""
  spec: LevelSpec
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h, temb, text, mask):
    spec = self.spec
    def block(name):
      return layers.ResidualBlock(
          spec.channels[-1], spec.num_groups, self.dtype, name=name)
    h = block('block_0')(h, temb)
    h = layers.Attention(
        spec.num_heads, spec.num_groups, spec.attention_ffn, self.dtype,
        name='attention')(h, text, mask)
    return block('block_1')(h, temb)


class UNet(nn.Module):
  """A level of the network, in the pieces that nesting interleaves.

  `embed`, `descend`, then `middle` (or, in its place, a coarser level between
  `in_adapter` and `out_adapter`), `ascend`, `out`.
  """
  spec: LevelSpec
  inner_channels: int | None  # the next coarser level's first; None: innermost
  dtype: jnp.dtype

  def setup(self):
    spec, dtype = self.spec, self.dtype
    def dense(zero=False):
      return layers.dense_layer(spec.temporal_dim, dtype=dtype, zero=zero)
    self.time_in, self.time_out = dense(), dense()
    self.scale_in, self.scale_out = dense(), dense(zero=True)
    self.conv_in = layers.conv3x3(spec.channels[0], dtype)
    if spec.position_waves:
      self.position = layers.dense_layer(spec.channels[0], dtype=dtype)
    indices = range(len(spec.channels))
    self.down = [DownBlocks(spec, i, dtype) for i in indices]
    self.up = [UpBlocks(spec, i, dtype) for i in indices]
    if self.inner_channels is None:
      self.middle = Middle(spec, dtype)
    else:
      self.in_adapter = layers.conv3x3(self.inner_channels, dtype, zero=True)
      self.out_adapter = layers.conv3x3(spec.channels[-1], dtype, zero=True)
    self.norm_out = nn.GroupNorm(
        spec.num_groups, epsilon=layers.EPSILON, dtype=dtype)
    self.conv_out = layers.conv3x3(
        3 * spec.patch_size ** 2, dtype, zero=True)

  def embed(self, t: jax.Array, scale: jax.Array | None,
            pooled_text: jax.Array) -> jax.Array:
    """Time, micro-condition and pooled text, added: [B, temporal_dim].

    Args:
      t: [B] diffusion time, as the network is given it.
      scale: [B] original shorter side in pixels, or None for N.
      pooled_text: [B, temporal_dim].
    """
    limit = self.spec.scale_condition
    if scale is None:
      scale = jnp.full(t.shape, limit, jnp.float32)
    scale = jnp.minimum(scale / limit, 1) * limit
    dim = self.spec.temporal_dim // 4
    def sinusoidal(value):
      return layers.sinusoidal_embedding(value, dim)
    temb = self.time_out(nn.silu(self.time_in(sinusoidal(t))))
    temb += self.scale_out(nn.silu(self.scale_in(sinusoidal(scale))))
    return temb + pooled_text

  def descend(self, x, temb, text, mask, outer):
    """Noisy image [B, H, W, 3] -> features at the bottom, and the skips.

    Args:
      x: [B, H, W, 3] noisy image of this level.
      temb: [B, temporal_dim] from `embed`.
      text: [B, L, D] projected text.
      mask: [B, L] bool or None.
      outer: what the next finer level's `in_adapter` makes of its features,
        or 0 for the finest.
    """
    if self.spec.normalize_input:
      x = x / x.std(axis=(1, 2, 3), keepdims=True, ddof=1)
    h = self.conv_in(layers.fold(x, self.spec.patch_size)) + outer
    if self.spec.position_waves:
      h += self.position(
          layers.position_features(h.shape[1:3], self.spec.position_waves))
    skips = [h]
    for blocks in self.down:
      h, left = blocks(h, temb, text, mask)
      skips += left
    return h, skips

  def ascend(self, h, skips, temb, text, mask):
    """Bottom features -> the last features [B, H, W, C], before `out`."""
    for blocks in reversed(self.up):
      h = blocks(h, skips, temb, text, mask)
    return h

  def out(self, h: jax.Array) -> jax.Array:
    """Last features [B, h, w, C] -> prediction [B, H, W, 3] in float32."""
    h = self.conv_out(nn.silu(self.norm_out(h))).astype(jnp.float32)
    return layers.unfold(h, self.spec.patch_size)
