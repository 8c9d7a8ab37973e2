"""A convolutional autoencoder of images: the first stage of latent diffusion.

Its code is a smaller image of a few channels (Rombach et al., 2112.10752),
standardised such that each channel has mean 0 and variance 1. There is no
attention and no time embedding; the loss is in `steps.autoencoder`.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models import layers, packing
from mdm_jax.models.initialize import initial_params
from mdm_jax.models.packing import Features

# Of the codes: a point, or a normal distribution.
KINDS = ('plain', 'kl')
# Bounds of the log variance of a code's values, as in latent diffusion.
_LOG_VARIANCE = (-30.0, 20.0)
# Mean and log standard deviation of the codes are so many times their
# parameters. An optimizer like Adam moves a parameter by about the learning
# rate in a step, whatever its gradient; the codes change faster than that.
_SPEED = 10.0


@dataclasses.dataclass(frozen=True)
class AutoencoderSpec:
  """The architecture of an autoencoder.

  `channels` and `num_blocks` have one entry for each resolution, fine to
  coarse. The decoder mirrors the encoder.
  """

  resolution: int  # of the images, in pixels a side
  channels: tuple[int, ...]
  num_blocks: tuple[int, ...]  # residual blocks of encoder and decoder, each
  latent_channels: int  # of the code
  patch_size: int = 1  # side of the patches folded into channels
  num_groups: int = 32  # of the group norms
  kind: str = 'plain'  # 'kl': a code is sampled from a normal distribution
  kl_weight: float = 0.0  # of kl: of its divergence from a standard normal one

  def __post_init__(self):
    """Raises ValueError for an invalid setting."""
    if self.kind not in KINDS:
      raise ValueError(f'kind={self.kind!r}: use one of {KINDS}.')
    if not self.channels or len(self.channels) != len(self.num_blocks):
      raise ValueError(
        'channels and num_blocks must have one entry a resolution: got '
        f'{self.channels} and {self.num_blocks}.'
      )
    for channels in self.channels:
      if channels % self.num_groups:
        raise ValueError(
          f'num_groups={self.num_groups} does not divide the {channels} '
          f'channels of {self.channels}.'
        )
    if self.resolution % self.downsampling:
      raise ValueError(
        f'resolution={self.resolution} cannot be divided into patches of '
        f'{self.patch_size} px and halved {len(self.channels) - 1} times: use '
        f'a multiple of {self.downsampling}, or fewer entries in channels.'
      )

  @property
  def downsampling(self) -> int:
    """The resolution of the images over that of the code."""
    return self.patch_size * 2 ** (len(self.channels) - 1)

  @property
  def code_shape(self) -> tuple[int, int, int]:
    """Shape of the code of an image, [h, w, c]."""
    side = self.resolution // self.downsampling
    return side, side, self.latent_channels


class _Blocks(nn.Module):
  """The residual blocks of one resolution."""

  spec: AutoencoderSpec
  index: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, h: Features) -> Features:
    for j in range(self.spec.num_blocks[self.index]):
      h = layers.ResidualBlock(
        self.spec.channels[self.index],
        self.spec.num_groups,
        self.dtype,
        name=f'block_{j}',
      )([h])
    return h


class Encoder(nn.Module):
  """Images to codes that are not standardised yet."""

  spec: AutoencoderSpec
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, H, 3] floats in [-1, 1].

    Returns:
      float32 [B, h, w, c]; of kind 'kl' [B, h, w, 2 * c], means and log
      variances.
    """
    spec = self.spec
    conv = _convolution(self.dtype)
    h = Features(packing.fold(images, (spec.patch_size,) * 2))
    h = conv(spec.channels[0], 'conv_in')(h)
    for i in range(len(spec.channels)):
      h = _Blocks(spec, i, self.dtype, name=f'down_{i}')(h)
      if i + 1 < len(spec.channels):
        h = conv(spec.channels[i + 1], f'downsample_{i}', stride=2)(h)
    (h,) = layers.GroupNorm(spec.num_groups, self.dtype, name='norm_out')(h)
    size = spec.latent_channels * (2 if spec.kind == 'kl' else 1)
    return conv(size, 'to_code')(layers.silu(h)).x.astype(jnp.float32)


class Decoder(nn.Module):
  """Codes that are not standardised to images."""

  spec: AutoencoderSpec
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, code: jax.Array) -> jax.Array:
    """[B, h, w, c] -> float32 images [B, H, H, 3], about within [-1, 1]."""
    spec = self.spec
    conv = _convolution(self.dtype)
    h = conv(spec.channels[-1], 'from_code')(Features(code))
    for i in reversed(range(len(spec.channels))):
      h = _Blocks(spec, i, self.dtype, name=f'up_{i}')(h)
      if i:
        h = conv(spec.channels[i - 1], f'upsample_{i}', upsample=2)(h)
    (h,) = layers.GroupNorm(spec.num_groups, self.dtype, name='norm_out')(h)
    h = conv(3 * spec.patch_size**2, 'conv_out', zero=True)(layers.silu(h))
    images = packing.unfold(h.x, (spec.patch_size,) * 2)
    return images.astype(jnp.float32)


def _convolution(dtype):
  return lambda features, name, **options: layers.Conv3x3(
    features, dtype, name=name, **options
  )


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """Encoder, decoder, and the mean and standard deviation of the codes.

  Its parameters are {'autoencoder': {'encoder': ..., 'decoder': ...,
  'code_mean': [c], 'code_log_std': [c]}}; see `statistics`.

  Attributes:
    spec: the architecture.
    dtype: of the activations.
  """

  spec: AutoencoderSpec
  dtype: jnp.dtype

  @property
  def image_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shape of an image, as the one level of a pyramid."""
    return ((self.spec.resolution, self.spec.resolution, 3),)

  @property
  def resolutions(self) -> tuple[int, ...]:
    """Pixels a side of an image, as of the one level of a pyramid."""
    return (self.spec.resolution,)

  def shapes(self) -> dict:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`s."""
    spec = self.spec

    def init(rng):
      image = jnp.zeros((1, *self.image_shapes[0]))
      code = jnp.zeros((1, *spec.code_shape))
      parts = {
        'encoder': Encoder(spec, self.dtype).init(rng, image)['params'],
        'decoder': Decoder(spec, self.dtype).init(rng, code)['params'],
        'code_mean': jnp.zeros(spec.latent_channels),
        'code_log_std': jnp.zeros(spec.latent_channels),
      }
      return {'autoencoder': parts}

    return jax.eval_shape(init, jax.random.key(0))

  def init(self, seed: int) -> dict:
    """Initial float32 parameters, as NumPy arrays; see `initial_params`."""
    return initial_params(self.shapes(), seed)

  def moments(
    self, params: dict, images: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Codes that are not standardised.

    Args:
      params: the autoencoder's.
      images: [B, H, H, 3] floats in [-1, 1].

    Returns:
      Means [B, h, w, c]; and of kind 'kl' the log variances, else None.
    """
    encoder = Encoder(self.spec, self.dtype)
    found = encoder.apply({'params': params['autoencoder']['encoder']}, images)
    if self.spec.kind == 'plain':
      return found, None
    mean, log_variance = jnp.split(found, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCE)

  def encode(self, params: dict, images: jax.Array) -> jax.Array:
    """Images to codes whose channels have mean 0 and variance 1.

    Of kind 'kl' they are the means of the distributions.

    Args:
      params: the autoencoder's.
      images: [B, H, H, 3] floats in [-1, 1], see `pyramid.to_float`.

    Returns:
      float32 [B, h, w, c].
    """
    code, _ = self.moments(params, images)
    mean, log_std = self.statistics(params)
    return (code - mean) * jnp.exp(-log_std)

  def decode(self, params: dict, code: jax.Array) -> jax.Array:
    """Codes of `encode` to float32 images [B, H, H, 3], about in [-1, 1]."""
    mean, log_std = self.statistics(params)
    return self.decode_raw(params, code * jnp.exp(log_std) + mean)

  def decode_raw(self, params: dict, code: jax.Array) -> jax.Array:
    """Codes that are not standardised to images, see `decode`."""
    decoder = Decoder(self.spec, self.dtype)
    return decoder.apply({'params': params['autoencoder']['decoder']}, code)

  def statistics(self, params: dict) -> tuple[jax.Array, jax.Array]:
    """Mean and log standard deviation of each channel of `moments`, [c]."""
    params = params['autoencoder']
    return _SPEED * params['code_mean'], _SPEED * params['code_log_std']
