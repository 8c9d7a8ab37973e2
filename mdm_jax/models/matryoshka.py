"""The whole model: a text encoder and a NestedUNet."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch
from mdm_jax.models.autoencoder import Autoencoder
from mdm_jax.models.conditioning import Cond, num_positions
from mdm_jax.models.initialize import initial_params
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.shared_layers import with_shared, without_shared

Images = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Matryoshka:
  """The whole model. Its parameters are {'unet': ..., 'text_encoder': ...}.

  Attributes:
    unet: the denoising network.
    text_encoder: maps tokens [B, L], or what else a batch has as 'text', to
      text features [B, L, D] and a mask [B, L]. Its `width` is D.
    resolutions: of the images of the pyramid in pixels, coarse to fine.
    frozen_text: the text encoder is not trained. `shapes` and `init` then omit
      its parameters, and the caller of `encode` adds them.
    to_longest: the texts of a batch count as padded to the longest of them, as
      in the release, whatever the length of the arrays.
    coarse_resolution: of the images that a level of a cascade is given, see
      `LevelSpec.given_coarse`; None for a nest of levels.
    autoencoder: the coarsest level denoises its codes instead of images; None
      if all levels are of images. `params['autoencoder']` is frozen, and the
      caller of `to_codes` and `to_images` adds it.
  """

  unet: NestedUNet
  text_encoder: nn.Module
  resolutions: tuple[int, ...]
  frozen_text: bool = False
  to_longest: bool = False
  coarse_resolution: int | None = None
  autoencoder: Autoencoder | None = None

  @property
  def image_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shape of an image at each level, see `mixed_batch.example_shape`."""
    return tuple(
      mixed_batch.example_shape(pixels, spec.frames)
      for pixels, spec in zip(self.resolutions, self.unet.levels, strict=True)
    )

  @property
  def level_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shape of what each level denoises: that of its images, or of a code."""
    if self.autoencoder is None:
      return self.image_shapes
    return self.autoencoder.spec.code_shape, *self.image_shapes[1:]

  @property
  def num_codes(self) -> int:
    """Number of levels, from the coarsest, that denoise codes."""
    return 0 if self.autoencoder is None else 1

  def to_codes(self, params: dict, images: Images) -> Images:
    """A pyramid of images, of `image_shapes`, to one of `level_shapes`."""
    if self.autoencoder is None:
      return images
    code = self.autoencoder.encode(params, images[0])
    return jax.lax.stop_gradient(code), *images[1:]

  def to_images(self, params: dict, levels: Images) -> Images:
    """Undoes `to_codes`, but for what the autoencoder loses."""
    if self.autoencoder is None:
      return levels
    return self.autoencoder.decode(params, levels[0]), *levels[1:]

  def with_frames(self, frames: int) -> 'Matryoshka':
    """The same network for clips of another length, for the same parameters.

    Args:
      frames: of the finest level; those of the others change in proportion,
        but levels of images stay such.

    Raises:
      ValueError: a level would not have a whole number of frames.
    """
    levels = self.unet.levels
    counts = [
      (1, 0) if x.frames == 1 else divmod(x.frames * frames, levels[-1].frames)
      for x in levels
    ]
    if any(rest for _, rest in counts):
      coarsest = min(x.frames for x in levels if x.frames > 1)
      fewest = levels[-1].frames // coarsest
      raise ValueError(
        f'frames={frames}: of levels of '
        f'{", ".join(str(x.frames) for x in levels)} frames, the last can have '
        f'fewer: a multiple of {fewest}.'
      )
    levels = (
      dataclasses.replace(level, frames=count)
      for level, (count, _) in zip(levels, counts)
    )
    return dataclasses.replace(self, unet=self.unet.clone(levels=tuple(levels)))

  def shapes(self, num_tokens: int) -> dict:
    """Shapes and dtypes of the trained parameters.

    What levels share is there once, see `shared_layers`.

    Args:
      num_tokens: L, the length of the captions.

    Returns:
      Nested dicts of `jax.ShapeDtypeStruct`, which are the caller's.
    """
    return jax.tree.map(lambda shape: shape, _shapes(self, num_tokens))

  def init(self, seed: int, num_tokens: int) -> dict:
    """Initial float32 parameters, as NumPy arrays; see `initial_params`."""
    return initial_params(self.shapes(num_tokens), seed)

  def encode(
    self,
    params: dict,
    text: jax.Array,
    scale: jax.Array | None = None,
    length: jax.Array | None = None,
  ) -> Cond:
    """Encodes text into the network's conditioning.

    Args:
      params: the model's; of these, only those of the text encoder are read.
      text: tokens [B, L] int32, where 0 is padding, or what else the text
        encoder reads.
      scale: [B] shorter sides of the original images in pixels, or None.
      length: int32 [B], positions that each text is padded to; None for the
        longest of these texts. Only read with `to_longest`.
    """
    if not self.to_longest:
      length = None
    elif length is None:
      length = longest(text)
    text, mask = self.text_encoder.apply(
      {'params': params.get('text_encoder', {})}, text
    )
    return Cond(text, mask, scale, length)

  def prepare(self, params: dict, cond: Cond) -> Cond:
    """Adds to the conditioning what `denoise` would compute at every call.

    That is the projected text, and its keys and values in every attention
    layer. Call it under `jax.jit`: the network runs on images of zeros, and
    the compiler removes all that does not depend on the text alone.
    """
    batch = len(cond.text)
    x_t = tuple(jnp.zeros((batch, *shape)) for shape in self.level_shapes)
    with_coarse = cond._replace(**self.placeholder_coarse(batch))
    _, variables = self.unet.apply(
      {'params': with_shared(params['unet'], self.unet.levels)},
      x_t,
      jnp.zeros(batch),
      with_coarse,
      mutable='context',
    )
    return cond._replace(context=variables['context'])

  def placeholder_coarse(self, batch: int) -> dict[str, jax.Array]:
    """Fields of a `Cond`: coarser images of zeros, if the network takes any."""
    if self.coarse_resolution is None:
      return {}
    shape = mixed_batch.example_shape(self.coarse_resolution, 1)
    return {'coarse': jnp.zeros((batch, *shape)), 'coarse_t': jnp.zeros(batch)}

  def denoise(
    self,
    params: dict,
    x_t: tuple[jax.Array, ...],
    t: jax.Array,
    cond: Cond,
    repeats: int = 1,
  ) -> tuple[jax.Array, ...]:
    """The network's predictions for every level, as `NestedUNet.__call__`."""
    variables = {'params': with_shared(params['unet'], self.unet.levels)}
    if cond.context is not None:
      variables['context'] = cond.context
    return self.unet.apply(variables, x_t, t, cond, repeats)


@functools.lru_cache(maxsize=16)
def _shapes(model: Matryoshka, num_tokens: int) -> dict:
  """`Matryoshka.shapes`; tracing the network takes a second or more."""

  def init(rng):
    cond = Cond(
      jnp.zeros((1, num_tokens, model.text_encoder.width)),
      jnp.ones((1, num_tokens), bool),
      **model.placeholder_coarse(1),
    )
    x_t = tuple(jnp.zeros((1, *shape)) for shape in model.level_shapes)
    unet = model.unet.init(rng, x_t, jnp.zeros(1), cond)['params']
    params = {'unet': without_shared(unet, model.unet.levels)}
    if not model.frozen_text:
      tokens = jnp.ones((1, num_tokens), jnp.int32)
      params['text_encoder'] = model.text_encoder.init(rng, tokens)['params']
    return params

  return jax.eval_shape(init, jax.random.key(0))


def longest(text: jax.Array) -> jax.Array:
  """The most positions of any text of a batch, for each of them: int32 [B]."""
  lengths = num_positions(text)
  return jnp.full_like(lengths, lengths.max())
