"""T5 against the outputs of PyTorch's T5EncoderModel (transformers 5.23)."""

import dataclasses
import json

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.models import t5
from tests import fuzzing


def test_equals_pytorch(t5_directory):
  text, mask = t5_directory.encode(t5_directory.tokens)
  found = np.asarray(text)[t5_directory.tokens != 0]
  np.testing.assert_allclose(found, t5_directory.text, rtol=0, atol=2e-5)
  np.testing.assert_array_equal(mask, t5_directory.tokens != 0)


def test_padding_changes_nothing_and_is_zero(t5_directory):
  tokens = t5_directory.tokens[1:]
  text, _ = t5_directory.encode(tokens)
  shorter, _ = t5_directory.encode(tokens[:, :40])
  np.testing.assert_allclose(text[:, :40], shorter, rtol=0, atol=1e-5)
  assert not np.any(np.asarray(text)[tokens == 0])


def test_empty_row_is_finite(t5_directory):
  text, _ = t5_directory.encode(np.zeros((1, 8), np.int32))
  np.testing.assert_array_equal(text, 0)


def test_half_precision_is_close(t5_directory):
  spec = t5_directory.spec
  encoder = t5.T5Encoder(spec, jnp.bfloat16)
  text, _ = encoder.apply({'params': t5_directory.params}, t5_directory.tokens)
  assert text.dtype == jnp.bfloat16
  found = np.asarray(text, np.float32)[t5_directory.tokens != 0]
  error = np.abs(found - t5_directory.text)
  assert error.mean() < 0.02 < 0.5 * np.abs(t5_directory.text).mean()


def test_distance_buckets():
  buckets = np.asarray(t5.distance_buckets(300, 32, 128))
  assert buckets[0, 0] == 0
  # Keys before the query, then keys at the same distances after it.
  np.testing.assert_array_equal(buckets[7, :7], [7, 6, 5, 4, 3, 2, 1])
  np.testing.assert_array_equal(buckets[0, 1:8], 16 + np.arange(1, 8))
  assert buckets[8, 0] == 8 and buckets[12, 0] == 9
  assert (buckets[128:, 0] == 15).all() and (buckets[0, 128:] == 31).all()


def test_reads_the_published_sizes():
  spec = t5.T5Spec.from_hugging_face(
    {
      'model_type': 't5',
      'feed_forward_proj': 'gated-gelu',
      'vocab_size': 32128,
      'd_model': 2048,
      'd_kv': 64,
      'd_ff': 5120,
      'num_layers': 24,
      'num_heads': 32,
      'relative_attention_num_buckets': 32,
      'layer_norm_epsilon': 1e-6,
    }
  )
  shapes = jax.eval_shape(
    t5.T5Encoder(spec, jnp.bfloat16).init,
    jax.random.key(0),
    jnp.ones((1, 4), jnp.int32),
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  # Flan-T5-XL's encoder.
  assert count == 1_223_527_424


@pytest.mark.parametrize(
  'change, message',
  [
    ({'model_type': 'bert'}, "model_type 'bert' .* give a T5 v1.1"),
    ({'feed_forward_proj': 'relu'}, "feed_forward_proj 'relu'"),
    ({'d_model': None}, "no 'd_model' in it"),
  ],
)
def test_other_models_are_refused(t5_directory, change, message):
  config = {
    name: value
    for name, value in (t5_directory.config | change).items()
    if value is not None
  }
  with pytest.raises(ValueError, match=message):
    t5.T5Spec.from_hugging_face(config)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('d_model', '40', "width is '40', not a whole number from 1 to"),
    ('d_model', 40.0, 'width is 40.0, not a whole number'),
    ('d_model', True, 'width is True, not a whole number'),
    ('d_model', None, 'width is None, not a whole number'),
    ('d_model', [[1] * 99] * 99, r'width is \[\[1, .* not a whole number'),
    ('num_layers', 10**9, 'num_layers is 1000000000, not .* from 1 to 1000:'),
    ('num_layers', 0, 'num_layers is 0, not'),
    ('vocab_size', -1, 'vocab_size is -1, not'),
    ('num_heads', float('nan'), 'num_heads is nan, not'),
    ('relative_attention_num_buckets', 2, 'num_buckets is 2, not .* from 4'),
    ('relative_attention_max_distance', 8, 'max_distance 8 is too small for'),
    ('layer_norm_epsilon', '1e-6', "epsilon is '1e-6', not between 0 and 1"),
    ('layer_norm_epsilon', float('nan'), 'epsilon is nan, not'),
    (
      'feed_forward_proj',
      ['gated-gelu'],
      r"feed_forward_proj \['gated-gelu'\]",
    ),
  ],
)
def test_odd_values_are_named(t5_directory, field, value, message):
  with pytest.raises(ValueError, match=message + '.* give a T5') as error:
    t5.T5Spec.from_hugging_face(t5_directory.config | {field: value})
  assert len(str(error.value)) < 300


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_config_is_read_or_refused(t5_directory, count):
  def make(rng):
    try:
      config = json.loads(fuzzing.damage_json(t5_directory.config, rng))
    except (ValueError, RecursionError):
      return t5_directory.config
    return config if isinstance(config, dict) else {}

  fuzzing.check(t5.T5Spec.from_hugging_face, make, count, refuses=ValueError)


def test_shapes_tell_the_architecture(t5_directory):
  shapes = {
    t5.hugging_face_name(path): leaf.shape[::-1]
    for path, leaf in traverse_util.flatten_dict(t5_directory.params).items()
  }
  # Embeddings are not transposed.
  for name in ('shared.weight', t5.FIRST_LAYER[1]):
    shapes[name] = shapes[name][::-1]
  assert t5.T5Spec.from_shapes(shapes) == dataclasses.replace(
    t5_directory.spec, max_distance=128, epsilon=1e-6
  )
  for name in t5.FIRST_LAYER:
    for other in (None, (3,), (0, 0)):
      changed = {**shapes, name: other}
      if other is None:
        del changed[name]
      with pytest.raises(ValueError, match='give a T5 v1.1'):
        t5.T5Spec.from_shapes(changed)
