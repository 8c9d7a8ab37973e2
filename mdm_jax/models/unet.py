"""The UNet of one level; its middle may be the next coarser level."""

from collections.abc import Sequence
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models import attention, layers, packing
from mdm_jax.models.packing import Features

# What a level may be: `UNet`, or `transformer.Transformer`.
KINDS = ('unet', 'transformer')
# Kinds of temporal attention, see `LevelSpec.frame_attention_kind`.
FRAME_ATTENTION = ('divided', 'joint')
# Activations that the backward pass computes again, see `LevelSpec.remat`.
REMAT = ('none', 'block', 'level')
# What a level takes from the next coarser one, see `shared_layers`.
SHARE = ('none', 'blocks', 'all')


@dataclasses.dataclass(frozen=True)
class LevelSpec:
  """The architecture of one level.

  Tuples have one entry for each resolution inside the level, fine to coarse.
  The defaults are those that all of the released models share.
  """

  channels: tuple[int, ...]
  num_blocks: tuple[int, ...]  # residual blocks on the way down; up: one more
  attention_layers: tuple[int, ...]  # after each residual block; 0: none
  temporal_dim: int  # width of the time embedding
  scale_condition: int  # N of the micro-condition 'scale:N', in pixels
  normalize_input: bool = False  # divide the noisy input by its std
  attention_ffn: bool = True  # feed-forward block after attention
  num_heads: int = 8  # attention heads
  num_groups: int = 32  # of the group norms
  # Frequencies of a sinusoidal position embedding of pixels, added to the
  # output of `conv_in`. 0 adds none, as in the release, where the network can
  # only tell positions from the padding of its convolutions.
  position_waves: int = 0
  # Side of the patches of pixels that are folded into channels before
  # `conv_in` and unfolded after `conv_out`. 1 folds none, as in the release.
  # More makes a level cheaper; its channels may then be too few to carry the
  # noise to the output, so let the network predict x0.
  patch_size: int = 1
  # Rematerialisation, which trades compute for memory. The backward pass
  # recomputes nothing ('none'), the inside of each block ('block'), or all but
  # the outputs of each of the level's resolutions ('level').
  remat: str = 'none'
  # Pack neighbouring pixels into up to this many channels (see `packing`):
  # 128 on a TPU, where narrow levels would leave most lanes empty; 1 packs
  # nothing. `lanes` and `remat` change speed, memory and rounding alone.
  lanes: int = 1
  # 'unet', or for the coarsest level 'transformer': channels=(width,),
  # num_blocks=(depth,), attention_layers=(0,). A transformer does not read
  # num_groups, attention_ffn and lanes, which must have their defaults.
  kind: str = 'unet'
  # Self-attention by cuDNN's flash kernels, see `attention.attend`. They need
  # an NVIDIA GPU, and all rows of an image on one device.
  flash: bool = False
  # Of the clips that the level denoises; with 1 they are images. All layers but
  # those of `frame_attention` see each frame as an image.
  frames: int = 1
  # Layers of temporal attention, between the frames of a clip, one entry for
  # each resolution as in `attention_layers`, which they follow; () for none.
  # With frames=1 they see that frame alone; networks for images have none.
  frame_attention: tuple[int, ...] = ()
  # What a position sees in them: itself in all frames ('divided'), or all
  # positions of all frames ('joint'), for features of few positions.
  frame_attention_kind: str = 'divided'
  # Of what the level denoises: 3 of images, or those of an autoencoder's codes.
  image_channels: int = 3
  # A level of a cascade: it is no part of a nest, and is given the coarser
  # images beside its noisy ones (Ho et al., arXiv 2106.15282).
  given_coarse: bool = False
  # Use the weights of the next coarser level: of the residual blocks and
  # attention layers at the resolution where the levels meet ('blocks'), or also
  # of the embeddings and of the first and last layers ('all'), where they have
  # the same shapes. The rule is in `shared_layers`.
  share: str = 'none'

  def __post_init__(self):
    """Raises ValueError for an invalid setting."""
    if self.kind not in KINDS:
      raise ValueError(f'kind={self.kind!r}: use one of {KINDS}.')
    if self.remat not in REMAT:
      raise ValueError(f'remat={self.remat!r}: use one of {REMAT}.')
    if self.share not in SHARE:
      raise ValueError(f'share={self.share!r}: use one of {SHARE}.')
    if self.lanes < 1:
      raise ValueError(f'lanes={self.lanes}: give a number of channels.')
    if self.patch_size < 1:
      raise ValueError(
        f'patch_size={self.patch_size}: give a number of pixels, 1 for none.'
      )
    if self.frames < 1:
      raise ValueError(f'frames={self.frames}: give a number, 1 for images.')
    if self.frame_attention_kind not in FRAME_ATTENTION:
      raise ValueError(
        f'frame_attention_kind={self.frame_attention_kind!r}: use one of '
        f'{FRAME_ATTENTION}.'
      )
    if len(self.frame_attention) not in (0, len(self.channels)):
      raise ValueError(
        f'frame_attention={self.frame_attention}: give one entry for each of '
        f'the channels {self.channels}, or ().'
      )
    lengths = {
      len(self.channels),
      len(self.num_blocks),
      len(self.attention_layers),
    }
    if len(lengths) != 1:
      raise ValueError(
        'channels, num_blocks and attention_layers must have one entry a '
        f'resolution: got {self.channels}, {self.num_blocks} and '
        f'{self.attention_layers}.'
      )
    self._check_frame_attention()
    if self.kind == 'transformer':
      self._check_transformer()
      return
    for channels in self.channels:
      for name in ('num_groups', 'num_heads'):
        attends = any((*self.attention_layers, *self.frame_attention))
        if name == 'num_heads' and not attends:
          continue
        if channels % getattr(self, name):
          raise ValueError(
            f'{name}={getattr(self, name)} does not divide the '
            f'{channels} channels of {self.channels}.'
          )

  def _check_frame_attention(self) -> None:
    """Raises ValueError for heads of a size that has no rotations."""
    is_joint = self.frame_attention_kind == 'joint'
    for channels, count in zip(self.channels, self.frame_attention):
      if count and channels % ((8 if is_joint else 2) * self.num_heads):
        raise ValueError(
          f'num_heads={self.num_heads} does not divide {channels} channels, '
          f'which have {self.frame_attention_kind} frame_attention, into heads '
          f'of {"a multiple of 8 channels" if is_joint else "an even size"}.'
        )

  def _check_transformer(self) -> None:
    """Raises ValueError for settings that a transformer cannot have."""
    if len(self.channels) != 1 or not self.num_blocks[0]:
      raise ValueError(
        f"kind='transformer' with channels={self.channels} and num_blocks="
        f'{self.num_blocks}: give one width and one depth, as in '
        'channels=(384,), num_blocks=(8,).'
      )
    for name, only in (
      ('attention_layers', (0,)),
      ('attention_ffn', True),
      ('num_groups', 32),
      ('lanes', 1),
    ):
      if getattr(self, name) != only:
        raise ValueError(
          f"kind='transformer' with {name}={getattr(self, name)}: that is of "
          f'UNets; leave it at {only}.'
        )
    (width,) = self.channels
    # Each head has pairs of dimensions for rows and for columns.
    if width % (4 * self.num_heads):
      raise ValueError(
        f'num_heads={self.num_heads} does not divide the width {width} of '
        "kind='transformer' into heads of a multiple of 4 channels."
      )

  def frame_layers(self, index: int) -> int:
    """Layers of temporal attention at a resolution inside the level."""
    return self.frame_attention[index] if self.frame_attention else 0

  @property
  def downsampling(self) -> int:
    """The level's resolution over that of its coarsest features."""
    return self.patch_size * 2 ** (len(self.channels) - 1)

  @property
  def down_channels(self) -> int:
    """Channels after the way down: blocks alone change their number."""
    for channels, count in zip(reversed(self.channels), self.num_blocks[::-1]):
      if count:
        return channels
    return self.channels[0]

  def patch(self, index: int, size: Sequence[int]) -> packing.Patch:
    """The patch by which features of a resolution are packed.

    Args:
      index: of the resolution inside the level, from 0 for the finest.
      size: H and W of the features.
    """
    return packing.best_patch(self.channels[index], self.lanes, size)


class _Blocks(nn.Module):
  """Residual blocks and attention layers of one resolution, down or up."""

  spec: LevelSpec
  index: int
  dtype: jnp.dtype

  def block(self, j, inputs, temb, text, mask):
    spec = self.spec
    h = rematerialised(layers.ResidualBlock, spec)(
      spec.channels[self.index], spec.num_groups, self.dtype, name=f'block_{j}'
    )(inputs, temb)
    for k in range(spec.attention_layers[self.index]):
      h = rematerialised(attention.Attention, spec)(
        spec.num_heads,
        spec.num_groups,
        spec.attention_ffn,
        self.dtype,
        spec.flash,
        name=f'attention_{j}_{k}',
      )(h, text, mask)
    for k in range(spec.frame_layers(self.index)):
      h = frame_attention(spec, self.dtype, f'frame_attention_{j}_{k}')(h)
    return h


def rematerialised(module, spec: LevelSpec):
  """The module; with `remat` one that keeps nothing for the backward pass."""
  return module if spec.remat == 'none' else nn.remat(module)


def frame_attention(
  spec: LevelSpec, dtype, name: str, grid: tuple[int, int] | None = None
) -> nn.Module:
  """A layer of temporal attention, between the frames of a level."""
  return rematerialised(attention.FrameAttention, spec)(
    spec.frames,
    spec.num_heads,
    dtype,
    spec.frame_attention_kind == 'joint',
    grid,
    spec.flash,
    name=name,
  )


class DownBlocks(_Blocks):
  """One resolution on the way down."""

  @nn.compact
  def __call__(self, h, temb, text, mask):
    """Features -> features for the next resolution, and skips for UpBlocks."""
    skips = []
    for j in range(self.spec.num_blocks[self.index]):
      h = self.block(j, [h], temb, text, mask)
      skips.append(h)
    if self.index + 1 < len(self.spec.channels):
      size = [side // 2 for side in h.size]
      h = layers.Conv3x3(h.channels, self.dtype, stride=2, name='downsample')(
        h, patch=self.spec.patch(self.index + 1, size)
      )
      skips.append(h)
    return h, skips


class UpBlocks(_Blocks):
  """One resolution on the way up."""

  @nn.compact
  def __call__(self, h, skips, temb, text, mask):
    """Features, and skips in order of use -> features for the next one."""
    for j, skip in enumerate(skips):
      h = self.block(j, [h, skip], temb, text, mask)
    if self.index > 0:
      size = [side * 2 for side in h.size]
      h = layers.Conv3x3(h.channels, self.dtype, upsample=2, name='upsample')(
        h, patch=self.spec.patch(self.index - 1, size)
      )
    return h


class Middle(nn.Module):
  """The bottom of the coarsest level: residual block, attention, block."""

  spec: LevelSpec
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h, temb, text, mask):
    spec = self.spec

    def block(name):
      return rematerialised(layers.ResidualBlock, spec)(
        spec.channels[-1], spec.num_groups, self.dtype, name=name
      )

    h = block('block_0')([h], temb)
    h = rematerialised(attention.Attention, spec)(
      spec.num_heads,
      spec.num_groups,
      spec.attention_ffn,
      self.dtype,
      spec.flash,
      name='attention',
    )(h, text, mask)
    for k in range(spec.frame_layers(-1)):
      h = frame_attention(spec, self.dtype, f'frame_attention_{k}')(h)
    return block('block_1')([h], temb)


def capped_scale(
  spec: LevelSpec, t: jax.Array, scale: jax.Array | None
) -> jax.Array:
  """The micro-condition: the size of the original images, up to a level's cap.

  Args:
    spec: of the level.
    t: [B] time indices.
    scale: [B] shorter side of the original images in pixels; None for
      `scale_condition`.

  Returns:
    [B] in pixels.
  """
  limit = spec.scale_condition
  if scale is None:
    scale = jnp.full(t.shape, limit, jnp.float32)
  return jnp.minimum(scale / limit, 1) * limit


def folded(x: jax.Array, spec: LevelSpec) -> jax.Array:
  """A level's input: noisy images [B, H, W, 3] in patches, as it takes them."""
  if spec.normalize_input:
    x = x / x.std(axis=(1, 2, 3), keepdims=True, ddof=1)
  return packing.fold(x, (spec.patch_size,) * 2)


class UNet(nn.Module):
  """A level of the network, in the parts that `NestedUNet` interleaves.

  In order of use: `embed`, `descend`, `middle` (or the next coarser level,
  between `in_adapter` and `out_adapter`), `ascend`, `out`.
  """

  spec: LevelSpec
  # Channels at the finest resolution of the next coarser level; None for the
  # coarsest level.
  inner_channels: int | None
  dtype: jnp.dtype

  def setup(self):
    spec, dtype = self.spec, self.dtype

    def dense(zero=False):
      return layers.dense_layer(spec.temporal_dim, dtype=dtype, zero=zero)

    self.time_in, self.time_out = dense(), dense()
    self.scale_in, self.scale_out = dense(), dense(zero=True)
    if spec.given_coarse:
      self.augmentation_in = dense()
      self.augmentation_out = dense(zero=True)
    if spec.share != 'none':
      self.level_embedding = self.param(
        'level_embedding', layers.zeros, (spec.temporal_dim,)
      )

    def conv(features, zero=False):
      return layers.Conv3x3(features, dtype, zero=zero)

    self.conv_in = conv(spec.channels[0])
    if spec.position_waves:
      self.position = layers.dense_layer(spec.channels[0], dtype=dtype)

    def resolutions(kind):
      if spec.remat == 'level':
        kind = nn.remat(kind)
      return [kind(spec, i, dtype) for i in range(len(spec.channels))]

    self.down, self.up = resolutions(DownBlocks), resolutions(UpBlocks)
    if self.inner_channels is None:
      self.middle = Middle(spec, dtype)
    else:
      self.in_adapter = conv(self.inner_channels, zero=True)
      self.out_adapter = conv(spec.down_channels, zero=True)
    self.norm_out = layers.GroupNorm(spec.num_groups, dtype)
    self.conv_out = conv(spec.image_channels * spec.patch_size**2, zero=True)

  def embed(
    self,
    t: jax.Array,
    scale: jax.Array | None,
    pooled_text: jax.Array,
    coarse_t: jax.Array | None = None,
  ) -> jax.Array:
    """The sum of the embeddings of times, micro-condition and pooled text.

    A level that shares layers adds a learned embedding of the level.

    Args:
      t: [B] time indices.
      scale: [B] shorter side of the original images in pixels; None for
        `scale_condition`.
      pooled_text: [B, temporal_dim].
      coarse_t: [B] noising steps of the coarser images of a cascade.

    Returns:
      [B, temporal_dim].
    """
    scale = capped_scale(self.spec, t, scale)
    dim = self.spec.temporal_dim // 4

    def sinusoidal(value):
      return layers.sinusoidal_embedding(value, dim)

    temb = self.time_out(nn.silu(self.time_in(sinusoidal(t))))
    temb += self.scale_out(nn.silu(self.scale_in(sinusoidal(scale))))
    if coarse_t is not None:
      augmentation = self.augmentation_in(sinusoidal(coarse_t))
      temb += self.augmentation_out(nn.silu(augmentation))
    if self.spec.share != 'none':
      temb += self.level_embedding.astype(temb.dtype)
    return temb + pooled_text

  def descend(self, x, temb, text, mask, outer, coarse=None):
    """The way down: from the noisy images to features and skips.

    Args:
      x: [B, H, W, 3] noisy images of this level, or frames of its clips.
      temb: [B, temporal_dim] from `embed`.
      text: [B, L, D] projected text, of each image or clip.
      mask: [B, L] bool or None.
      outer: Features from the `in_adapter` of the next finer level; None for
        the finest level.
      coarse: [B, h, w, 3] the coarser images of a cascade.

    Returns:
      Features at the level's coarsest resolution, and the list of skips.
    """
    size, x = x.shape[:-1], folded(x, self.spec)
    if coarse is not None:
      coarse = jax.image.resize(coarse, (*size, 3), 'bilinear')
      coarse = packing.fold(coarse, (self.spec.patch_size,) * 2)
      x = jnp.concatenate([x, coarse], axis=-1)
    x = Features(x)
    h = self.conv_in(x, patch=self.spec.patch(0, x.size))
    if outer is not None:
      h = h.replace(x=h.x + outer.as_patch(h.patch).x)
    if self.spec.position_waves:
      position = self.position(
        layers.position_features(h.size, self.spec.position_waves)
      )
      h = h.replace(x=h.x + packing.fold(position[None], h.patch))
    skips = [h]
    for blocks in self.down:
      h, left = blocks(h, temb, text, mask)
      skips += left
    return h, skips

  def ascend(self, h, skips, temb, text, mask):
    """The way up: from the coarsest features and the skips to the finest."""
    for count, blocks in zip(reversed(self.spec.num_blocks), reversed(self.up)):
      skips, own = skips[: -count - 1], skips[-count - 1 :]
      h = blocks(h, own[::-1], temb, text, mask)
    return h

  def out(self, h: Features) -> jax.Array:
    """The finest features -> prediction [B, H, W, 3] in float32."""

    def last(self, h):
      (h,) = self.norm_out(h)
      return self.conv_out(layers.silu(h))

    if self.spec.remat != 'none':
      last = nn.remat(last)
    h = last(self, h).as_patch((1, 1)).x.astype(jnp.float32)
    return packing.unfold(h, (self.spec.patch_size,) * 2)
