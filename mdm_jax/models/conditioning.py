"""What the network is conditioned on, and how the text enters it."""

import dataclasses
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models.layers import (
  EPSILON,
  TransformerLayer,
  dense_layer,
  sinusoidal_embedding,
)


class Cond(NamedTuple):
  """Conditioning of a batch.

  Attributes:
    text: [B, L, D] text features, zero where masked.
    text_mask: [B, L] bool, True for tokens.
    scale: [B] float32, the original images' shorter side in pixels; None for
      each level's default (its own resolution's constant).
    context: what the network makes of the text alone, see
      `Matryoshka.prepare`; None: it does so at every call.
  """

  text: jax.Array
  text_mask: jax.Array
  scale: jax.Array | None = None
  context: dict | None = None


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """How the network takes text features in.

  The defaults are the released models'.
  """

  width: int = 2048  # features after `lm_proj`
  num_layers: int = 0  # transformer layers over the projected text
  num_heads: int = 8  # of those layers
  masked_attention: bool = False  # cross-attention leaves padding out


class TextConditioning(nn.Module):
  """Projects the text features and pools them into the time embedding."""

  spec: TextSpec
  temporal_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, cond: Cond
  ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Text [B, L, width], its mask or None, pooled [B, temporal_dim]."""
    spec = self.spec
    attention_mask = cond.text_mask if spec.masked_attention else None
    text = dense_layer(spec.width, 'lm_proj', dtype=self.dtype)(cond.text)
    for i in range(spec.num_layers):
      text = TransformerLayer(spec.num_heads, self.dtype, name=f'layer_{i}')(
        text, attention_mask
      )
    # The release pools over padding too once unmasked layers have mixed it in.
    if spec.num_layers and not spec.masked_attention:
      pooled = text.mean(axis=1)
    else:
      weight = cond.text_mask.astype(jnp.float32)
      weight /= jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
      pooled = jnp.einsum('bld,bl->bd', text.astype(jnp.float32), weight)
    pooled = nn.Dense(
      self.temporal_dim, use_bias=False, dtype=self.dtype, name='cond_emb'
    )(pooled)
    return text, attention_mask, pooled


class PrecomputedTextEncoder(nn.Module):
  """Takes in features that an encoder has computed before."""

  width: int
  dtype: jnp.dtype

  def __call__(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """text [B, L, width], 0 is padding -> text [B, L, width], mask [B, L]."""
    return text.astype(self.dtype), (text != 0).any(axis=-1)


class LabelEncoder(nn.Module):
  """A vector for each class, trained with the network."""

  vocab_size: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """tokens [B, L] int32, 0 is padding -> text [B, L, width], mask [B, L]."""
    mask = tokens != 0
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
    mask = tokens != 0
    x = nn.Embed(
      self.vocab_size,
      self.width,
      name='embedding',
      embedding_init=nn.initializers.normal(1.0),
    )(tokens)
    # The waves let attention find a word's neighbours, whose attributes are
    # its own, from the first step on; the learned part starts near zero.
    x += sinusoidal_embedding(jnp.arange(tokens.shape[1]), self.width)
    x += self.param(
      'position', nn.initializers.normal(0.02), (tokens.shape[1], self.width)
    )
    x = x.astype(self.dtype)
    for i in range(self.num_layers):
      x = TransformerLayer(self.num_heads, self.dtype, name=f'layer_{i}')(
        x, mask
      )
    # The factor makes the mean over a caption's dozen of words, to which each
    # adds little, as large as the time embedding that it is added to.
    x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name='norm_out')(x)
    x *= 4.0
    return x * mask[..., None], mask
