"""Initial parameters made by NumPy have the distributions of Flax's `init`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.builders.model import make_model
from mdm_jax.models.conditioning import Cond
from mdm_jax.models.initialize import initial_params


def leaves(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.fixture(scope='module', params=['unet', 'transformer'])
def model(make_config, request):
  """A two-level network with every kind of layer."""
  config = make_config(request.param)
  config.text.num_layers = config.model.text.num_layers = 1
  if request.param == 'unet':
    config.model.levels[0].attention_layers = (1,)
  return make_model(config, config.stages[1])


def test_distributions_are_those_of_flax(model):
  tokens = jnp.ones((1, 8), jnp.int32)
  x_t = tuple(jnp.zeros((1, r, r, 3)) for r in model.resolutions)

  @jax.jit
  def init(rng):
    (text, mask), variables = model.text_encoder.init_with_output(rng, tokens)
    unet = model.unet.init(rng, x_t, jnp.zeros(1), Cond(text, mask))
    return {'text_encoder': variables['params'], 'unet': unet['params']}

  expected, actual = leaves(init(jax.random.key(0))), leaves(model.init(0, 8))
  assert actual.keys() == expected.keys()
  compared = 0
  for name, value in actual.items():
    other = np.asarray(expected[name])
    assert (value.shape, value.dtype) == (other.shape, other.dtype), name
    for constant in (0, 1):
      assert np.all(value == constant) == np.all(other == constant), name
    if value.std() and value.size >= 500:
      assert value.std() == pytest.approx(other.std(), rel=0.15), name
      assert abs(value.mean()) < 5 * value.std() / value.size**0.5, name
      compared += 1
  assert compared > 8


def test_seed_decides(model):
  first, again, other = (leaves(model.init(seed, 8)) for seed in (0, 0, 1))
  for name, value in first.items():
    np.testing.assert_array_equal(value, again[name])
    assert (value.std() == 0) == np.array_equal(value, other[name]), name


def test_no_two_parameters_are_alike(model):
  values = [
    value.ravel()[:3].tobytes()
    for value in leaves(model.init(0, 8)).values()
    if value.std()
  ]
  assert len(set(values)) == len(values) > 28


def test_independent_of_order_and_of_other_parameters(model):
  def reverse(tree):
    if not isinstance(tree, dict):
      return tree
    return {key: reverse(tree[key]) for key in reversed(tree)}

  shapes = model.shapes(8)
  expected = leaves(initial_params(shapes, 0))
  part = {'unet': {'level_1': shapes['unet']['level_1']}}
  for tree in (reverse(shapes), part):
    for name, value in leaves(initial_params(tree, 0)).items():
      np.testing.assert_array_equal(value, expected[name])
