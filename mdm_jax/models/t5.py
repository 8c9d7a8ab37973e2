"""The encoder of T5 v1.1 and Flan-T5, for frozen text features.

Pre-RMSNorm blocks without biases, unscaled attention with a relative position
bias for each head, and gated GELU (Raffel et al., arXiv 1910.10683; Shazeer,
arXiv 2002.05202). Norms and softmax are in float32, matrix products and
activations in `dtype`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import reprlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

_FAMILY = 'a T5 v1.1 or Flan-T5 model, such as google/flan-t5-xl'


# Far beyond every model; with more, nothing would end.
_RANGES = {
  'vocab_size': (1, 2**24),
  'width': (1, 2**20),
  'head_width': (1, 2**20),
  'ffn_width': (1, 2**20),
  'num_layers': (1, 1000),
  'num_heads': (1, 2**12),
  'num_buckets': (4, 2**12),
  'max_distance': (2, 2**20),
}


@dataclasses.dataclass(frozen=True)
class T5Spec:
  """The architecture; the defaults are shared by every size."""

  vocab_size: int
  width: int  # of the features
  head_width: int
  ffn_width: int
  num_layers: int
  num_heads: int
  num_buckets: int = 32  # relative distances with a bias of their own
  max_distance: int = 128  # tokens; all larger distances share a bucket
  epsilon: float = 1e-6

  def __post_init__(self):
    """Raises ValueError if a field is of another type or not in its range."""
    for name, (least, most) in _RANGES.items():
      value = getattr(self, name)
      if type(value) is not int or not least <= value <= most:
        raise ValueError(
          f'{name} is {reprlib.repr(value)}, not a whole number from {least} '
          f'to {most}: give {_FAMILY}.'
        )
    if type(self.epsilon) is not float or not 0 < self.epsilon < 1:
      raise ValueError(
        f'epsilon is {reprlib.repr(self.epsilon)}, not between 0 and 1: give '
        f'{_FAMILY}.'
      )
    if self.max_distance <= self.num_buckets // 4:
      raise ValueError(
        f'max_distance {self.max_distance} is too small for num_buckets '
        f'{self.num_buckets}: give {_FAMILY}.'
      )

  @classmethod
  def from_hugging_face(cls, config: Mapping[str, Any]) -> 'T5Spec':
    """Reads the fields of a `config.json`.

    Raises:
      ValueError: the config is not that of a T5 with gated GELU.
    """
    kind = config.get('feed_forward_proj')
    if config.get('model_type') != 't5' or kind != 'gated-gelu':
      raise ValueError(
        f'model_type {reprlib.repr(config.get("model_type"))} with '
        f'feed_forward_proj {reprlib.repr(kind)}: give {_FAMILY}.'
      )
    names = {
      'vocab_size': 'vocab_size',
      'width': 'd_model',
      'head_width': 'd_kv',
      'ffn_width': 'd_ff',
      'num_layers': 'num_layers',
      'num_heads': 'num_heads',
      'num_buckets': 'relative_attention_num_buckets',
      'max_distance': 'relative_attention_max_distance',
      'epsilon': 'layer_norm_epsilon',
    }
    defaults = 'num_buckets', 'max_distance', 'epsilon'
    try:
      return cls(
        **{
          ours: config[theirs]
          for ours, theirs in names.items()
          # Older files lack some; all models have the defaults.
          if theirs in config or ours not in defaults
        }
      )
    except KeyError as error:
      raise ValueError(f'no {error} in it: give {_FAMILY}.') from None

  @classmethod
  def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> 'T5Spec':
    """Finds the architecture of weights that have no `config.json`.

    Args:
      shapes: shapes of the tensors, by Hugging Face's names.

    Raises:
      ValueError: they are not those of a T5 with gated GELU.
    """
    try:
      embedding, bias, query, ffn = (shapes[name] for name in FIRST_LAYER)
      (vocab_size, width), (num_buckets, num_heads) = embedding, bias
      (inner, _), (ffn_width, _) = query, ffn
      head_width = inner // num_heads
    except (KeyError, ValueError, ZeroDivisionError):
      raise ValueError(
        f'no config.json, and no weights of a T5 with gated GELU: give '
        f'{_FAMILY}.'
      ) from None
    query_of = FIRST_LAYER[2].replace('block.0', 'block.{}')
    num_layers = 1
    while query_of.format(num_layers) in shapes:
      num_layers += 1
    return cls(
      vocab_size=vocab_size,
      width=width,
      head_width=head_width,
      ffn_width=ffn_width,
      num_layers=num_layers,
      num_heads=num_heads,
      num_buckets=num_buckets,
    )


def distance_buckets(
  length: int, num_buckets: int, max_distance: int
) -> jax.Array:
  """Relative position buckets of [query, key], int32 [length, length].

  Half of the buckets are for keys after the query. In each half, the first
  half holds one distance each; the rest grow logarithmically.
  """
  half = num_buckets // 2
  exact = half // 2
  position = jnp.arange(length)
  offset = position[None, :] - position[:, None]  # key minus query
  distance = jnp.abs(offset)
  growth = jnp.log(
    jnp.maximum(distance, 1).astype(jnp.float32) / exact
  ) / math.log(max_distance / exact)
  far = exact + (growth * (half - exact)).astype(jnp.int32)
  bucket = jnp.where(distance < exact, distance, jnp.minimum(far, half - 1))
  return bucket + jnp.where(offset > 0, half, 0)


class T5Encoder(nn.Module):
  """tokens [B, L] int32, 0 is padding -> text [B, L, width], mask [B, L]."""

  spec: T5Spec
  dtype: jnp.dtype

  @property
  def width(self) -> int:
    """Width of the features."""
    return self.spec.width

  @nn.compact
  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    spec, length = self.spec, tokens.shape[1]
    mask = tokens != 0
    x = nn.Embed(
      spec.vocab_size, spec.width, dtype=self.dtype, name='embedding'
    )(tokens)
    bias = nn.Embed(spec.num_buckets, spec.num_heads, name='distance_bias')(
      distance_buckets(length, spec.num_buckets, spec.max_distance)
    )
    bias = bias.transpose(2, 0, 1).astype(jnp.float32)  # [heads, L, L]
    # Not -inf, which would turn a row of only padding into NaN.
    bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
    for i in range(spec.num_layers):
      x = _Layer(spec, self.dtype, name=f'layer_{i}')(x, bias)
    x = _norm(spec, self.dtype, 'norm_out')(x)
    return x * mask[..., None], mask


class _Layer(nn.Module):
  """Self-attention and gated GELU, each with a pre-norm and a residual."""

  spec: T5Spec
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    spec = self.spec

    def dense(features, name):
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    def heads(h):
      return h.reshape(*h.shape[:2], spec.num_heads, spec.head_width)

    inner = spec.num_heads * spec.head_width
    h = _norm(spec, self.dtype, 'norm')(x)
    query, key, value = (
      heads(dense(inner, name)(h)) for name in ('query', 'key', 'value')
    )
    logits = jnp.einsum(
      'bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(self.dtype)
    h = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    x += dense(spec.width, 'out')(h.reshape(*h.shape[:2], inner))

    h = _norm(spec, self.dtype, 'ffn_norm')(x)
    h = nn.gelu(dense(spec.ffn_width, 'ffn_gate')(h)) * dense(
      spec.ffn_width, 'ffn_in'
    )(h)
    return x + dense(spec.width, 'ffn_out')(h)


def _norm(spec: T5Spec, dtype: jnp.dtype, name: str) -> nn.RMSNorm:
  return nn.RMSNorm(epsilon=spec.epsilon, dtype=dtype, name=name)


_LAYER_NAMES = {
  'norm': 'layer.0.layer_norm',
  'query': 'layer.0.SelfAttention.q',
  'key': 'layer.0.SelfAttention.k',
  'value': 'layer.0.SelfAttention.v',
  'out': 'layer.0.SelfAttention.o',
  'ffn_norm': 'layer.1.layer_norm',
  'ffn_gate': 'layer.1.DenseReluDense.wi_0',
  'ffn_in': 'layer.1.DenseReluDense.wi_1',
  'ffn_out': 'layer.1.DenseReluDense.wo',
}
_NAMES = {
  'embedding': 'shared',
  'norm_out': 'encoder.final_layer_norm',
  'distance_bias': (
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias'
  ),
}


# A file with the encoder alone may have the second name instead.
ALIASES = {'shared.weight': 'encoder.embed_tokens.weight'}
# Tensors whose shapes tell the architecture.
FIRST_LAYER = (
  'shared.weight',
  f'{_NAMES["distance_bias"]}.weight',
  'encoder.block.0.layer.0.SelfAttention.q.weight',
  'encoder.block.0.layer.1.DenseReluDense.wi_0.weight',
)


def hugging_face_name(path: Sequence[str]) -> str:
  """The name of a parameter in Hugging Face's files, see also `ALIASES`.

  Their kernels are transposed.
  """
  if path[0].startswith('layer_'):
    layer = path[0].removeprefix('layer_')
    return f'encoder.block.{layer}.{_LAYER_NAMES[path[1]]}.weight'
  return f'{_NAMES[path[0]]}.weight'
