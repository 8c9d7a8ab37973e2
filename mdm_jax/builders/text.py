"""Builds text encoders and tokenizers, and loads frozen text encoders."""

from collections.abc import Iterable
import os
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders.config import naming, reading_prompts
from mdm_jax.data import precomputed
from mdm_jax.data.labels import Labels, read_names
from mdm_jax.data.text import (
  CAPTIONS_MODEL,
  MOVING_CAPTIONS_MODEL,
  TOKENIZERS,
  Tokenizer,
)
from mdm_jax.interop import hugging_face
from mdm_jax.models.conditioning import (
  LabelEncoder,
  LearnedTextEncoder,
  PrecomputedTextEncoder,
)
from mdm_jax.models.t5 import (
  ALIASES,
  FIRST_LAYER,
  T5Encoder,
  T5Spec,
  hugging_face_name,
)
from mdm_jax.runtime import sharding


def make_tokenizer(
  config: ConfigDict, of_captions: bool = False
) -> Tokenizer | Labels:
  """The tokenizer, or the labels of class-conditional models.

  A T5 encoder has T5's own tokenizer, unless `text.tokenizer` names another.

  Args:
    config: configuration of the run.
    of_captions: whether it encodes captions of the data set, to compute losses,
      and not prompts: the release gives captions one more space.

  Raises:
    ValueError, FileNotFoundError: there are no such rules, or no such file.
  """
  if config.text.encoder == 'label':
    path = config.text.class_names
    return Labels(config.text.num_classes, read_names(path) if path else ())
  if config.text.encoder != 'learned':
    folder = hugging_face.folder(config.text.path)
    own = os.path.join(folder, 'spiece.model')
  elif config.data.name == 'moving_shapes':
    own = MOVING_CAPTIONS_MODEL
  else:
    own = CAPTIONS_MODEL
  make = TOKENIZERS[config.text.tokenizer_rules]
  return make(config.text.tokenizer or own, config.text.max_length, of_captions)


def empty_text(config: ConfigDict) -> np.ndarray:
  """The empty prompt as the text encoder reads it: [L] or [L, D].

  Caption dropout trains on it, as it is what guidance leads away from.
  """
  if config.text.encoder == 'precomputed':
    return precomputed.pad(
      precomputed.read_empty(config.data.path), config.text.max_length
    )
  return make_tokenizer(config).encode('')


def make_text_encoder(config: ConfigDict) -> nn.Module:
  """The text encoder, which maps tokens or precomputed features to features.

  Raises:
    FileNotFoundError: `text.path` has no T5.
    ValueError: the T5 in `text.path` is damaged or has another tokenizer, or
      `text.num_heads` does not divide `text.width`.
  """
  text, dtype = config.text, jnp.dtype(config.dtype)
  num_pieces = make_tokenizer(config).vocab_size
  if text.encoder == 'label':
    return LabelEncoder(num_pieces, text.width, dtype)
  if text.encoder == 'learned':
    check_heads('text', text)
    return LearnedTextEncoder(
      num_pieces, text.width, text.num_layers, text.num_heads, dtype
    )
  with naming(f'text.path={text.path!r}'):
    spec = _read_spec(text.path)
    if num_pieces > spec.vocab_size:
      raise ValueError(
        f'the tokenizer has {num_pieces} pieces, but this encoder only '
        f'{spec.vocab_size}: leave text.tokenizer empty to use its own.'
      )
  if text.encoder == 'precomputed':
    return PrecomputedTextEncoder(spec.width, dtype)
  return T5Encoder(spec, dtype)


def text_fingerprint(config: ConfigDict) -> dict[str, Any]:
  """Everything that the features of a caption depend on.

  Returns:
    'encoder' and 'tokenizer', hashes, and 'max_length' in tokens.
  """
  with naming(f'text.path={config.text.path!r}'):
    names = _frozen_names(_frozen_shapes(config))
    encoder = hugging_face.fingerprint(
      _open_encoder(config.text.path, names), names
    )
  return {
    'encoder': encoder,
    'tokenizer': make_tokenizer(config).fingerprint(),
    'max_length': config.text.max_length,
  }


def frozen_shapes(config: ConfigDict, mesh: Mesh) -> dict:
  """Shapes, dtypes and shardings of the parameters that `load_frozen` loads.

  Returns:
    Nested dicts of `jax.ShapeDtypeStruct`.
  """
  if config.text.encoder != 't5':
    return {}
  shapes = {'text_encoder': _frozen_shapes(config)}
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(config.dtype), sharding=place
    ),
    shapes,
    sharding.tree_shardings(shapes, mesh, config.sharding_rules),
  )


def load_frozen(config: ConfigDict, mesh: Mesh) -> dict:
  """Loads the parameters that the model needs but does not train.

  Returns:
    The parameters of the T5 encoder in `config.dtype`, sharded by
    `sharding_rules`; {} if the text encoder is trained or the features are
    precomputed.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: weights are missing, damaged or of another model.
  """
  shapes = frozen_shapes(config, mesh)
  if not shapes:
    return {}
  shapes = shapes['text_encoder']
  with naming(f'text.path={config.text.path!r}'):
    params = hugging_face.load(
      _open_encoder(config.text.path, _frozen_names(shapes)),
      shapes,
      jax.tree.map(lambda x: x.sharding, shapes),
      hugging_face_name,
    )
  return {'text_encoder': params}


def _frozen_shapes(config: ConfigDict) -> dict:
  return jax.eval_shape(
    make_text_encoder(reading_prompts(config)).init,
    jax.random.key(0),
    jnp.ones((1, config.text.max_length), jnp.int32),
  )['params']


def _frozen_names(shapes: dict) -> list[str]:
  return list(map(hugging_face_name, traverse_util.flatten_dict(shapes)))


def _open_encoder(path: str, names: Iterable[str]) -> dict[str, Any]:
  return hugging_face.select(hugging_face.open_tensors(path), names, ALIASES)


def _read_spec(path: str) -> T5Spec:
  """The architecture, from `config.json`, or from the weights without one."""
  try:
    config = hugging_face.read_config(path)
  except FileNotFoundError:
    try:
      tensors = _open_encoder(path, FIRST_LAYER)
    except FileNotFoundError:
      tensors = {}
    if not tensors.keys() & FIRST_LAYER:
      raise
    return T5Spec.from_shapes({k: v.shape for k, v in tensors.items()})
  return T5Spec.from_hugging_face(config)


def check_heads(name: str, section: ConfigDict) -> None:
  """Raises ValueError if a section's num_heads does not divide its width."""
  if section.width % section.num_heads:
    raise ValueError(
      f'{name}.num_heads={section.num_heads} does not divide '
      f'{name}.width={section.width}.'
    )
