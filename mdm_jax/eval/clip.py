"""CLIP with a ViT image encoder, and CLIPScore.

Two pre-norm transformers, one over image patches and one over tokens, with
projections to a common space (Radford et al., arXiv 2103.00020). It runs the
checkpoints of Hugging Face's `CLIPModel`, such as openai/clip-vit-base-patch16
and openai/clip-vit-large-patch14. All in float32.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import reprlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

_FAMILY = 'give a CLIP model with a ViT, such as openai/clip-vit-base-patch16'
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# Far beyond every model; with more, nothing would end.
_MAX_SIZE, _MAX_LAYERS, _MAX_IMAGE = 2**24, 1000, 4096
# Defaults of Hugging Face's CLIPConfig, which config.json omits.
_TOWER = {
  'hidden_act': 'quick_gelu',
  'layer_norm_eps': 1e-5,
  'num_hidden_layers': 12,
}
_TEXT = _TOWER | {
  'hidden_size': 512,
  'intermediate_size': 2048,
  'num_attention_heads': 8,
  'vocab_size': 49408,
  'max_position_embeddings': 77,
}
_VISION = _TOWER | {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_attention_heads': 12,
  'image_size': 224,
  'patch_size': 32,
}
_ACTIVATIONS = {
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
  'gelu': lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TowerSpec:
  """The architecture of one of the two transformers."""

  width: int
  ffn_width: int
  num_layers: int
  num_heads: int
  activation: str
  epsilon: float

  def __post_init__(self):
    """Raises ValueError if a field is of another type or not in its range."""
    _check_sizes(
      width=self.width,
      ffn_width=self.ffn_width,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
    )
    if self.width % self.num_heads or self.num_layers > _MAX_LAYERS:
      raise ValueError(
        f'{self.num_heads} heads of {self.width} features in '
        f'{self.num_layers} layers: {_FAMILY}.'
      )
    if type(self.epsilon) is not float or not 0 < self.epsilon < 1:
      raise ValueError(
        f'layer_norm_eps is {reprlib.repr(self.epsilon)}: {_FAMILY}.'
      )


@dataclasses.dataclass(frozen=True)
class ClipSpec:
  """The architecture of the whole model."""

  vision: TowerSpec
  text: TowerSpec
  image_size: int  # pixels
  patch_size: int
  vocab_size: int
  max_length: int  # tokens
  width: int  # of the common space

  def __post_init__(self):
    """Raises ValueError if a field is of another type or not in its range."""
    _check_sizes(
      image_size=self.image_size,
      patch_size=self.patch_size,
      vocab_size=self.vocab_size,
      max_length=self.max_length,
      projection_dim=self.width,
    )
    if not self.patch_size <= self.image_size <= _MAX_IMAGE:
      raise ValueError(
        f'images of {self.image_size} px in patches of {self.patch_size}: '
        f'{_FAMILY}.'
      )

  @classmethod
  def from_hugging_face(cls, config: Mapping[str, Any]) -> 'ClipSpec':
    """Reads the fields of a `config.json`.

    Raises:
      ValueError: the config is that of another model.
    """
    if config.get('model_type') != 'clip':
      raise ValueError(
        f'model_type is {reprlib.repr(config.get("model_type"))}: {_FAMILY}.'
      )
    config = {
      'projection_dim': 512,
      'text_config': {},
      'vision_config': {},
      **config,
    }
    vision, text = (
      defaults | _section(config, name)
      for defaults, name in (
        (_VISION, 'vision_config'),
        (_TEXT, 'text_config'),
      )
    )
    return cls(
      vision=_tower(vision),
      text=_tower(text),
      image_size=vision['image_size'],
      patch_size=vision['patch_size'],
      vocab_size=text['vocab_size'],
      max_length=text['max_position_embeddings'],
      width=config['projection_dim'],
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  section = config[name] or {}  # Some files have null.
  if not isinstance(section, dict):
    raise ValueError(f'{name} is {reprlib.repr(section)}: {_FAMILY}.')
  return section


def _check_sizes(**values: Any) -> None:
  for name, value in values.items():
    if type(value) is not int or not 0 < value <= _MAX_SIZE:
      raise ValueError(f'{name} is {reprlib.repr(value)}: {_FAMILY}.')


def _tower(config: Mapping[str, Any]) -> TowerSpec:
  if config['hidden_act'] not in list(_ACTIVATIONS):
    raise ValueError(
      f'hidden_act is {reprlib.repr(config["hidden_act"])}, supported are '
      f'{sorted(_ACTIVATIONS)}: {_FAMILY}.'
    )
  return TowerSpec(
    width=config['hidden_size'],
    ffn_width=config['intermediate_size'],
    num_layers=config['num_hidden_layers'],
    num_heads=config['num_attention_heads'],
    activation=config['hidden_act'],
    epsilon=config['layer_norm_eps'],
  )


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes the shorter side with Pillow's bicubic filter, and crops.

  Args:
    image: uint8 `[H, W, 3]`.
    size: side of the square at the centre that is returned, in pixels.

  Returns:
    uint8 `[size, size, 3]`.
  """
  height, width = image.shape[:2]
  shorter = min(height, width)
  height, width = size * height // shorter, size * width // shorter
  resized = np.asarray(
    Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
  )
  top, left = (height - size) // 2, (width - size) // 2
  return resized[top : top + size, left : left + size]


class Clip(nn.Module):
  """Both encoders: apply the methods `encode_images` and `encode_text`."""

  spec: ClipSpec

  def setup(self):
    self.vision = _ImageTower(self.spec)
    self.text = _TextTower(self.spec)

  def __call__(self, images, tokens):
    return self.encode_images(images), self.encode_text(tokens, 0)

  def encode_images(self, images: jax.Array) -> jax.Array:
    """uint8 `[B, S, S, 3]`, resized by `resize` -> `[B, width]`."""
    return self.vision(images)

  def encode_text(self, tokens: jax.Array, end: int) -> jax.Array:
    """Encodes tokens.

    Args:
      tokens: int32 `[B, L]`; every row must contain `end`.
      end: the token that ends a caption, `ClipTokenizer.end`.

    Returns:
      `[B, width]`.
    """
    return self.text(tokens, end)


class _ImageTower(nn.Module):
  spec: ClipSpec

  @nn.compact
  def __call__(self, images):
    spec, tower = self.spec, self.spec.vision
    x = images.astype(jnp.float32) / 255
    x = (x - jnp.array(_MEAN)) / jnp.array(_STD)
    side, patch = spec.image_size // spec.patch_size, spec.patch_size
    x = x[:, : side * patch, : side * patch].reshape(
      len(x), side, patch, side, patch, 3
    )
    x = _Patches(tower.width, patch, name='patch')(x).reshape(
      len(x), -1, tower.width
    )
    token = self.param('class_embedding', nn.initializers.zeros, (tower.width,))
    x = jnp.concatenate(
      [jnp.broadcast_to(token, (len(x), 1, tower.width)), x], axis=1
    )
    x += nn.Embed(x.shape[1], tower.width, name='position')(
      jnp.arange(x.shape[1])
    )
    x = _norm(tower, 'norm_in')(x)
    x = _layers(tower, x, is_causal=False)
    x = _norm(tower, 'norm_out')(x[:, 0])
    return nn.Dense(spec.width, use_bias=False, name='project')(x)


class _Patches(nn.Module):
  """[B, rows, P, columns, P, 3] -> [B, rows, columns, width]."""

  width: int
  size: int

  @nn.compact
  def __call__(self, x):
    # Reversing all axes of the files' kernel puts columns before rows.
    kernel = self.param(
      'kernel',
      nn.initializers.lecun_normal(),
      (self.size, self.size, 3, self.width),
    )
    return jnp.einsum('brpcqi,qpio->brco', x, kernel)


class _TextTower(nn.Module):
  spec: ClipSpec

  @nn.compact
  def __call__(self, tokens, end):
    spec, tower = self.spec, self.spec.text
    x = nn.Embed(spec.vocab_size, tower.width, name='token')(tokens)
    x += nn.Embed(spec.max_length, tower.width, name='position')(
      jnp.arange(tokens.shape[1])
    )
    x = _layers(tower, x, is_causal=True)
    x = _norm(tower, 'norm_out')(x)
    last = jnp.argmax(tokens == end, axis=1)  # The first `end` in each row.
    x = x[jnp.arange(len(x)), last]
    return nn.Dense(spec.width, use_bias=False, name='project')(x)


def _layers(tower: TowerSpec, x: jax.Array, is_causal: bool) -> jax.Array:
  for i in range(tower.num_layers):
    x = _Layer(tower, is_causal, name=f'layer_{i}')(x)
  return x


class _Layer(nn.Module):
  """Self-attention and MLP, each with a pre-norm and a residual."""

  tower: TowerSpec
  is_causal: bool

  @nn.compact
  def __call__(self, x):
    tower = self.tower
    h = _norm(tower, 'norm_1')(x)
    query, key, value = (
      nn.Dense(tower.width, name=name)(h).reshape(
        *h.shape[:2], tower.num_heads, -1
      )
      for name in ('query', 'key', 'value')
    )
    h = jax.nn.dot_product_attention(
      query, key, value, is_causal=self.is_causal
    )
    x += nn.Dense(tower.width, name='out')(h.reshape(x.shape))
    h = nn.Dense(tower.ffn_width, name='ffn_in')(_norm(tower, 'norm_2')(x))
    h = _ACTIVATIONS[tower.activation](h)
    return x + nn.Dense(tower.width, name='ffn_out')(h)


def _norm(tower: TowerSpec, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(tower.epsilon, use_fast_variance=False, name=name)


_TOWER_NAMES = {'vision': 'vision_model', 'text': 'text_model'}
_LAYER_NAMES = {
  'norm_1': 'layer_norm1',
  'query': 'self_attn.q_proj',
  'key': 'self_attn.k_proj',
  'value': 'self_attn.v_proj',
  'out': 'self_attn.out_proj',
  'norm_2': 'layer_norm2',
  'ffn_in': 'mlp.fc1',
  'ffn_out': 'mlp.fc2',
}
_NAMES = {
  ('vision', 'patch'): 'vision_model.embeddings.patch_embedding',
  ('vision', 'position'): 'vision_model.embeddings.position_embedding',
  ('vision', 'norm_in'): 'vision_model.pre_layrnorm',  # spelt so in the files
  ('vision', 'norm_out'): 'vision_model.post_layernorm',
  ('vision', 'project'): 'visual_projection',
  ('text', 'token'): 'text_model.embeddings.token_embedding',
  ('text', 'position'): 'text_model.embeddings.position_embedding',
  ('text', 'norm_out'): 'text_model.final_layer_norm',
  ('text', 'project'): 'text_projection',
}


def hugging_face_name(path: Sequence[str]) -> str:
  """The name of a parameter in Hugging Face's files.

  Their kernels have all axes reversed, also those of four dimensions.
  """
  tower, part, *field = path
  if part == 'class_embedding':
    return 'vision_model.embeddings.class_embedding'
  suffix = 'bias' if field[-1] == 'bias' else 'weight'
  if part.startswith('layer_'):
    layer = part.removeprefix('layer_')
    return (
      f'{_TOWER_NAMES[tower]}.encoder.layers.{layer}.'
      f'{_LAYER_NAMES[field[0]]}.{suffix}'
    )
  return f'{_NAMES[tower, part]}.{suffix}'


def scores(images: np.ndarray, text: np.ndarray) -> np.ndarray:
  """CLIPScore of pairs of encodings, 100 max(cosine, 0).

  Hessel et al., arXiv 2104.08718, eq. 1, with the weight 100 instead of 2.5.

  Args:
    images: encoded images `[B, width]`.
    text: encoded captions `[B, width]`.

  Returns:
    float64 `[B]`, from 0 to 100.
  """
  images, text = (np.asarray(x, np.float64) for x in (images, text))
  lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(text, axis=1)
  return 100 * np.maximum((images * text).sum(1) / lengths, 0)
