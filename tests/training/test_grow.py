"""Growing a network from a smaller one, and finding the next stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.builders.config import stage_directory
from mdm_jax.builders.model import make_model
from mdm_jax.checkpoint import restore
from mdm_jax.training import grow
from tests import toy


def test_grow_copies_trained_parameters():
  fresh = {
    'text_encoder': {'embedding': np.zeros((4, 2))},
    'unet': {
      'level_0': {'conv_in': {'kernel': np.zeros((3, 2))}},
      'level_1': {'conv_in': {'kernel': np.ones((3, 2)), 'bias': np.ones(2)}},
    },
  }
  trained = {
    'text_encoder': {'embedding': np.full((4, 2), 5.0)},
    'unet': {'level_0': {'conv_in': {'kernel': np.full((3, 2), 6)}}},
  }
  grown = grow.grow(fresh, trained)
  assert jax.tree.structure(grown) == jax.tree.structure(fresh)
  assert grown['text_encoder'] is not fresh['text_encoder']
  values = jax.tree.map(lambda x: float(x.ravel()[0]), grown)
  assert values == {
    'text_encoder': {'embedding': 5.0},
    'unet': {
      'level_0': {'conv_in': {'kernel': 6.0}},
      'level_1': {'conv_in': {'kernel': 1.0, 'bias': 1.0}},
    },
  }


def test_grow_names_parameters_that_do_not_fit():
  level = {'conv_in': {'kernel': np.zeros((3, 2)), 'bias': np.zeros(2)}}
  fresh = {'unet': {'level_0': level, 'level_1': level}}
  trained = {
    'unet': {
      'level_0': {
        'conv_in': {'kernel': np.zeros((3, 4))},
        'norm': {'scale': np.zeros(2)},
      }
    }
  }
  with pytest.raises(ValueError) as error:
    grow.grow(fresh, trained)
  assert str(error.value) == (
    'The last stage does not fit into this one: '
    'unet/level_0/conv_in/bias is missing; '
    'unet/level_0/conv_in/kernel is (3, 4), not (3, 2); '
    'unet/level_0/norm/scale has no place'
  )


def test_growing_to_the_same_size_changes_nothing():
  trained = {'unet': {'level_0': {'bias': np.ones(2)}}}
  fresh = {'unet': {'level_0': {'bias': np.zeros(2)}}}
  assert grow.grow(fresh, trained)['unet']['level_0']['bias'][0] == 1


@pytest.fixture
def optimized():
  """Turns XLA's optimisations on, as in a real run."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


# By default XLA skips roundings to bfloat16 inside what it fuses, and it fuses
# the two networks differently: 0.005 (rms) of an output of size 0.5.
@pytest.mark.parametrize(
  'dtype, kind, share',
  [
    ('float32', 'unet', 'none'),
    ('float32', 'transformer', 'none'),
    ('float32', 'unet', 'all'),
    ('bfloat16', 'unet', 'none'),
    ('bfloat16', 'transformer', 'none'),
  ],
)
def test_coarse_output_equals_the_trained_network(
  make_config, random_params, optimized, dtype, kind, share
):
  options = {'xla_allow_excess_precision': False} if dtype == 'bfloat16' else {}
  config = make_config(kind)
  config.dtype = dtype
  config.model.levels[1].share = share
  small, large = (make_model(config, stage) for stage in config.stages)
  trained = random_params(small, 8)
  grown = grow.grow(large.init(1, 8), trained)
  rng = np.random.default_rng(0)
  x_t = tuple(
    jnp.float32(rng.standard_normal((4, size, size, 3))) for size in (8, 16)
  )
  t = jnp.array([0, 1, 500, 999])
  tokens = jnp.int32(rng.integers(0, 9, (4, 8)))
  scale = jnp.float32([4, 8, 12, 16])

  def predict(model, params, x_t):
    def denoise(params, x_t, t):
      return model.denoise(params, x_t, t, model.encode(params, tokens, scale))

    return jax.jit(denoise, compiler_options=options)(params, x_t, t)

  (expected,) = predict(small, trained, x_t[:1])
  coarse, fine = predict(large, grown, x_t)
  assert float(jnp.std(expected)) > 0.1
  # Its own conv_out starts as zero.
  assert np.any(fine) == (share == 'all')
  np.testing.assert_array_equal(coarse, expected)


def test_a_stage_that_adds_a_level_with_shared_layers(tmp_path, monkeypatch):
  namespace = {}
  changes = {f'stages[{i}].learning_rate': 0.01 for i in range(2)}
  changes |= {f'stages[{i}].warmup_steps': 0 for i in range(2)}
  changes |= {'model.levels[1].share': 'all', 'optimizer.ema_decay': 0.0}
  exec(toy.recipe(2, 2, **changes), namespace)
  config, grown = namespace['get_config'](), []

  def grow_and_keep(fresh, trained, grow=grow.grow):
    grown.append((trained, grow(fresh, trained)))
    return grown[-1][1]

  monkeypatch.setattr(grow, 'grow', grow_and_keep)
  toy.run(config, tmp_path)
  ((trained, begun),) = grown
  small, large = (make_model(config, stage) for stage in config.stages)
  rng = np.random.default_rng(0)
  x_t = tuple(
    jnp.float32(rng.standard_normal((2, size, size, 3))) for size in (8, 16)
  )
  tokens = jnp.int32(rng.integers(1, 9, (2, 32)))

  @functools.partial(jax.jit, static_argnums=0)
  def predict(model, params, x_t):
    cond = model.encode(params, tokens)
    return model.denoise(params, x_t, jnp.array([9, 900]), cond)

  (expected,) = predict(small, trained, x_t[:1])
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_array_equal(predict(large, begun, x_t)[0], expected)
  # Training then changes what both levels use, which is saved once.
  directory = stage_directory(tmp_path, config, 1)
  saved = restore.restore_item(directory, None, 'params')['unet']
  assert 'up_1' in saved['level_1']
  assert 'block_0' not in saved['level_1']['up_1']
  assert 'conv_out' not in saved['level_1']
  for name in ('up_0', 'time_in', 'conv_out'):
    assert not np.array_equal(
      jax.tree.leaves(saved['level_0'][name])[0],
      jax.tree.leaves(begun['unet']['level_0'][name])[0],
    )
  assert np.all(saved['level_1']['level_embedding'] != 0)


def test_next_stage(tmp_path):
  directories = [tmp_path / name for name in ('0_8', '1_16', '2_32')]
  assert grow.next_stage(directories) == 0
  for index, directory in enumerate(directories):
    directory.mkdir()
    assert grow.next_stage(directories) == index
    (directory / 'finished.json').write_text('{"step": 20}')
    assert grow.next_stage(directories) == index + 1
