"""Text encoder and NestedUNet together: from text to predictions."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models.conditioning import Cond
from mdm_jax.models.initialize import initial_params
from mdm_jax.models.nested_unet import NestedUNet


@dataclasses.dataclass(frozen=True)
class Matryoshka:
  """The whole model; its parameters lie under the fields' names.

  Attributes:
    unet: the network.
    text_encoder: tokens [B, L], or whatever else a batch's 'text' is, ->
      text [B, L, D], mask [B, L]. Has a `width`, D.
    resolutions: of the pyramid in pixels, coarse to fine.
    frozen_text: the text encoder is not trained. Its parameters are then no
      part of `shapes` and `init`; whoever applies the model adds them.
  """

  unet: NestedUNet
  text_encoder: nn.Module
  resolutions: tuple[int, ...]
  frozen_text: bool = False

  def shapes(self, num_tokens: int) -> dict:
    """The trained parameters' `jax.ShapeDtypeStruct`s.

    Args:
      num_tokens: of the captions.
    """

    def init(rng):
      cond = Cond(
        jnp.zeros((1, num_tokens, self.text_encoder.width)),
        jnp.ones((1, num_tokens), bool),
      )
      x_t = tuple(jnp.zeros((1, r, r, 3)) for r in self.resolutions)
      params = {'unet': self.unet.init(rng, x_t, jnp.zeros(1), cond)['params']}
      if not self.frozen_text:
        tokens = jnp.ones((1, num_tokens), jnp.int32)
        params['text_encoder'] = self.text_encoder.init(rng, tokens)['params']
      return params

    return jax.eval_shape(init, jax.random.key(0))

  def init(self, seed: int, num_tokens: int) -> dict:
    """Fresh float32 parameters on the host."""
    return initial_params(self.shapes(num_tokens), seed)

  def encode(
    self, params: dict, text: jax.Array, scale: jax.Array | None = None
  ) -> Cond:
    """What the network is conditioned on.

    Args:
      params: the text encoder's, if it has any, and maybe more.
      text: tokens [B, L] int32, 0 is padding, or what the encoder reads.
      scale: [B] original shorter sides in pixels, or None.
    """
    text, mask = self.text_encoder.apply(
      {'params': params.get('text_encoder', {})}, text
    )
    return Cond(text, mask, scale)

  def prepare(self, params: dict, cond: Cond) -> Cond:
    """Conditioning for many calls of `denoise`, under `jax.jit`.

    The text's keys and values in all layers of attention are computed here
    and not again. The images that the network is given are nothing to them:
    the rest of it is dead code, which the compiler leaves out.
    """
    batch = len(cond.text)
    x_t = tuple(jnp.zeros((batch, r, r, 3)) for r in self.resolutions)
    _, variables = self.unet.apply(
      {'params': params['unet']}, x_t, jnp.zeros(batch), cond, mutable='context'
    )
    return cond._replace(context=variables['context'])

  def denoise(
    self,
    params: dict,
    x_t: tuple[jax.Array, ...],
    t: jax.Array,
    cond: Cond,
    repeats: int = 1,
  ) -> tuple[jax.Array, ...]:
    """The network's prediction at every level, see `NestedUNet`."""
    variables = {'params': params['unet']}
    if cond.context is not None:
      variables['context'] = cond.context
    return self.unet.apply(variables, x_t, t, cond, repeats)
