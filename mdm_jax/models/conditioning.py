"""Conditioning: text encoders, and how text features enter the network."""

import dataclasses
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models.attention import TransformerLayer
from mdm_jax.models.layers import EPSILON, dense_layer, sinusoidal_embedding


class Cond(NamedTuple):
  """Conditioning of a batch.

  Attributes:
    text: [B, L, D] text features, zero where masked.
    text_mask: [B, L] bool, True for tokens, False for padding.
    scale: [B] float32, the shorter side of the original images in pixels; None
      for each level's `LevelSpec.scale_condition`.
    length: [B] int32, positions of the text that exist, padding included. The
      network does as if the arrays ended there. None for L.
    context: the parts of the network that depend on the text alone, computed
      once by `Matryoshka.prepare`; None computes them at every call.
    coarse: [B, h, w, 3] the coarser images that a level of a cascade is given,
      noised up to `coarse_t`; None without a cascade.
    coarse_t: [B] noising steps of `coarse`, 0 for clean images.
  """

  text: jax.Array
  text_mask: jax.Array
  scale: jax.Array | None = None
  length: jax.Array | None = None
  context: dict | None = None
  coarse: jax.Array | None = None
  coarse_t: jax.Array | None = None

  def existing(self) -> jax.Array | None:
    """Mask [B, L] of the positions that exist; None for all."""
    if self.length is None:
      return None
    return jnp.arange(self.text.shape[1]) < self.length[:, None]


def token_mask(text: jax.Array) -> jax.Array:
  """Mask [B, L] of a text encoder's input, True for tokens.

  Args:
    text: tokens [B, L] or features [B, L, D], where zeros are padding.
  """
  return text != 0 if text.ndim == 2 else (text != 0).any(axis=-1)


def num_positions(text: jax.Array) -> jax.Array:
  """Positions up to the last token, int32 [B], of a text encoder's input."""
  mask = token_mask(text)
  return jnp.max(jnp.arange(1, mask.shape[1] + 1) * mask, axis=1)


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """How text features enter the network.

  The defaults are those of the released models.
  """

  width: int = 2048  # of the text features after `lm_proj`
  num_layers: int = 0  # transformer layers over the projected text
  num_heads: int = 8  # attention heads of those layers
  masked_attention: bool = False  # cross-attention ignores padding


class TextConditioning(nn.Module):
  """Projects the text features and pools them into the time embedding."""

  spec: TextSpec
  temporal_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, cond: Cond
  ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Projects and pools the text.

    Returns:
      Text [B, L, width]; the mask [B, L] for attention, None to attend to all
      positions; pooled text [B, temporal_dim].
    """
    spec = self.spec
    # Without `masked_attention` padding is attended to, as in the release.
    attention_mask = (
      cond.text_mask if spec.masked_attention else cond.existing()
    )
    text = dense_layer(spec.width, 'lm_proj', dtype=self.dtype)(cond.text)
    for i in range(spec.num_layers):
      text = TransformerLayer(spec.num_heads, self.dtype, name=f'layer_{i}')(
        text, attention_mask
      )
    # As in the release, padding is pooled too if layers have not masked it.
    pooled_mask = attention_mask if spec.num_layers else cond.text_mask
    if pooled_mask is None:
      pooled = text.mean(axis=1)
    else:
      weight = pooled_mask.astype(jnp.float32)
      weight /= jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
      pooled = jnp.einsum('bld,bl->bd', text.astype(jnp.float32), weight)
    pooled = nn.Dense(
      self.temporal_dim, use_bias=False, dtype=self.dtype, name='cond_emb'
    )(pooled)
    return text, attention_mask, pooled


class PrecomputedTextEncoder(nn.Module):
  """Passes on text features that were computed before training."""

  width: int
  dtype: jnp.dtype

  def __call__(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """text [B, L, width], 0 is padding -> text [B, L, width], mask [B, L]."""
    return text.astype(self.dtype), token_mask(text)


class LabelEncoder(nn.Module):
  """An embedding of each class, trained with the network."""

  vocab_size: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """tokens [B, L] int32, 0 is padding -> text [B, L, width], mask [B, L]."""
    mask = token_mask(tokens)
    x = nn.Embed(
      self.vocab_size,
      self.width,
      name='embedding',
      embedding_init=nn.initializers.normal(1.0),
    )(tokens)
    return x.astype(self.dtype) * mask[..., None], mask


class LearnedTextEncoder(nn.Module):
  """A small transformer over tokens, trained with the network."""

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """tokens [B, L] int32, 0 is padding -> text [B, L, width], mask [B, L]."""
    mask = token_mask(tokens)
    x = nn.Embed(
      self.vocab_size,
      self.width,
      name='embedding',
      embedding_init=nn.initializers.normal(1.0),
    )(tokens)
    # Sinusoidal positions let attention find the neighbours of a word, such
    # as a noun's adjectives, from the first step on. The learned positions
    # start near zero.
    x += sinusoidal_embedding(jnp.arange(tokens.shape[1]), self.width)
    x += self.param(
      'position', nn.initializers.normal(0.02), (tokens.shape[1], self.width)
    )
    x = x.astype(self.dtype)
    for i in range(self.num_layers):
      x = TransformerLayer(self.num_heads, self.dtype, name=f'layer_{i}')(
        x, mask
      )
    # The text is pooled by a mean over about a dozen words, which shrinks it.
    # The factor brings it to the size of the time embedding it is added to.
    x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name='norm_out')(x)
    x *= 4.0
    return x * mask[..., None], mask
