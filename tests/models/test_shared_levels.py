"""Levels that use weights of the next coarser level."""

import dataclasses
import math
import pathlib

from flax import traverse_util
import jax
import numpy as np
import pytest

from configs import cc12m_256, common
from mdm_jax.builders.model import make_levels
from mdm_jax.diffusion import guidance
from mdm_jax.models.conditioning import Cond, TextSpec
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.shared_layers import (
  shared_layers,
  with_shared,
  without_shared,
)
from mdm_jax.models.unet import LevelSpec
from mdm_jax.report import console
from mdm_jax.runtime import sharding
from mdm_jax.training.grow import grow

RNG = np.random.default_rng(0)
B, TEXT_WIDTH = 4, 12
COND = Cond(
  RNG.standard_normal((B, 5, TEXT_WIDTH)).astype(np.float32),
  np.arange(5) < np.array([[5], [3], [1], [4]]),
)
TIMES = np.array([20.0, 700.0, 300.0, 999.0], np.float32)
SHARED = {'temporal_dim': 16, 'num_heads': 2, 'num_groups': 4}
INNER = LevelSpec((8, 16), (1, 0), (1, 0), scale_condition=8, **SHARED)
OUTER = LevelSpec(
  (8, 8), (0, 1), (0, 1), scale_condition=16, share='all', **SHARED
)
EMBEDDINGS = ('time_in', 'time_out', 'scale_in', 'scale_out')
ENDS = ('conv_in', 'conv_out', 'norm_out')


class Encoder:
  width = TEXT_WIDTH


def model_of(*levels, resolutions=None):
  resolutions = resolutions or tuple(8 * 2**r for r in range(len(levels)))
  return Matryoshka(
    NestedUNet(levels, TextSpec(10, 0, 1)), Encoder(), resolutions, True
  )


def alone(model):
  """The same network, whose levels share nothing."""
  levels = (dataclasses.replace(x, share='none') for x in model.unet.levels)
  return dataclasses.replace(
    model, unet=NestedUNet(tuple(levels), TextSpec(10, 0, 1))
  )


def noise(model, seed=1):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.standard_normal((B, *shape), np.float32) for shape in model.level_shapes
  )


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def copied(params, names):
  """Parameters of the network that shares nothing, `names` from the inner."""
  unet = flat(params['unet'])
  embedding = unet.pop('level_1/level_embedding')
  for path, owner in names.items():
    for name in [name for name in unet if name.startswith(f'{owner}/')]:
      unet[path + name.removeprefix(owner)] = unet[name]
  # The embedding is added to what `time_out` adds its bias to.
  bias = 'level_1/time_out/bias'
  unet[bias] = unet[bias] + embedding
  return {'unet': traverse_util.unflatten_dict(unet, sep='/')}


# What `OUTER` takes from `INNER`.
TAKEN = {
  'level_1/down_1/block_0': 'level_0/down_0/block_0',
  'level_1/down_1/attention_0_0': 'level_0/down_0/attention_0_0',
  # The first on the way up of the inner level has 16 + 8 channels.
  'level_1/up_1/block_0': 'level_0/up_0/block_1',
  'level_1/up_1/attention_0_0': 'level_0/up_0/attention_0_0',
  'level_1/up_1/attention_1_0': 'level_0/up_0/attention_1_0',
  **{f'level_1/{name}': f'level_0/{name}' for name in (*EMBEDDINGS, *ENDS)},
}


def without_embedding(params):
  """The same parameters, with a level embedding of zero."""
  params = jax.tree.map(np.copy, params)
  params['unet']['level_1']['level_embedding'][:] = 0
  return params


def measure(model, params, x_t=None):
  """The loss of all levels, their predictions, and the gradients."""
  x_t = noise(model) if x_t is None else x_t
  target = noise(model, 2)

  def loss(params, x_t):
    out = model.denoise(params, x_t, TIMES, COND)
    return sum(((x - w) ** 2).mean() for x, w in zip(out, target)), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x_t)
  return jax.device_get((out, grads))


def assert_near(found, expected, tolerance=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * (1 + np.abs(y).max())
    ),
    found,
    expected,
  )


@pytest.fixture(scope='module')
def model():
  return model_of(INNER, OUTER)


@pytest.fixture(scope='module')
def params(model, random_params):
  return random_params(model, 5)


@pytest.fixture(scope='module')
def measured(model, params):
  return measure(model, params)


def test_equals_a_network_into_which_the_weights_were_copied(
  model, params, measured
):
  (out, grads), unshared = measured, alone(model)
  whole = copied(params, TAKEN)
  assert jax.tree.map(np.shape, whole) == jax.tree.map(
    lambda x: x.shape, unshared.shapes(5)
  )
  expected, both = measure(unshared, whole)
  assert min(np.std(x) for x in expected) > 0.1
  assert_near(out, expected)
  # Gradients add up; the level embedding's is that of the outer `time_out`.
  both, added = flat(both['unet']), dict.fromkeys(TAKEN.values(), 0)
  embedding = both['level_1/time_out/bias']
  for path, owner in TAKEN.items():
    for name in [name for name in both if name.startswith(f'{path}/')]:
      gradient = both.pop(name)
      name = owner + name.removeprefix(path)
      both[name] = both[name] + gradient
      added[owner] = max(added[owner], np.abs(gradient).max())
  assert min(added.values()) > 1e-4
  both['level_1/level_embedding'] = embedding
  assert_near(flat(grads['unet']), both)
  # With an embedding of zero, as at first, nothing but the weights matters.
  zero = without_embedding(params)
  same = with_shared(zero['unet'], model.unet.levels)
  del same['level_1']['level_embedding']
  jax.tree.map(np.testing.assert_array_equal, same, copied(zero, TAKEN)['unet'])


def test_neither_packing_nor_rematerialisation_changes_numbers(
  model, params, measured
):
  # 'level' recomputes all that 'block' does, too.
  levels = (
    dataclasses.replace(x, remat='level', lanes=16) for x in model.unet.levels
  )
  found = measure(model_of(*levels), params)
  assert_near(found, measured, 4e-5)


def test_a_mesh_equals_one_device(random_params):
  inner = dataclasses.replace(
    INNER, channels=(8,), num_blocks=(0,), attention_layers=(0,)
  )
  outer = dataclasses.replace(OUTER, num_blocks=(0, 0), attention_layers=(0, 0))
  model = model_of(inner, outer)
  params = random_params(model, 5)
  assert 'block_0' not in params['unet']['level_1']['up_1']
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'spatial': 2})
  rules = common.get_config().sharding_rules
  shardings = sharding.tree_shardings(params, mesh, rules)
  kernel = shardings['unet']['level_0']['up_0']['block_0']['conv_in']['kernel']
  assert 'fsdp' in kernel.spec
  placed = sharding.place(params, shardings)
  x_t = tuple(
    jax.device_put(x, sharding.batch_sharding(mesh, x.ndim))
    for x in noise(model)
  )
  found = measure(model, placed, x_t=x_t)
  assert_near(found, measure(model, params), 4e-5)


def test_initial_parameters_and_their_number(model):
  fresh = model.init(0, 5)
  assert not np.any(fresh['unet']['level_1']['level_embedding'])
  whole = alone(model).init(0, 5)
  # Those that stay are the same, and are told by their paths.
  names, all_names = flat(fresh['unet']), flat(whole['unet'])
  gone = all_names.keys() - names.keys()
  assert names.keys() - all_names.keys() == {'level_1/level_embedding'}
  assert gone == {
    name for name in all_names if name.startswith(tuple(f'{x}/' for x in TAKEN))
  }
  for name in names.keys() & all_names.keys():
    np.testing.assert_array_equal(names[name], all_names[name])
  saved = sum(all_names[name].size for name in gone) - 16
  count = console.num_parameters(fresh)
  assert count == console.num_parameters(whole) - saved
  own = sum(x.size for name, x in names.items() if name.startswith('level_1/'))
  assert f'unet/level_1  {own:,}'.split() in [
    line.split() for line in console.parameter_table(fresh).splitlines()
  ]


def test_text_is_encoded_once_for_all_steps(model, params):
  prepare = jax.jit(model.prepare)
  prepared = prepare(params, COND)
  keys = flat(prepared.context)
  for path, owner in TAKEN.items():
    if 'attention' in path:
      np.testing.assert_array_equal(
        keys[f'{path}/text_kv'], keys[f'{owner}/text_kv']
      )
  own = keys['level_0/middle/attention/text_kv']
  assert own.shape == (B, 5, 32) and len(keys) == 8
  x_t, away = noise(model), COND._replace(text=np.zeros_like(COND.text))

  @jax.jit
  def guided(params, *conds):
    return guidance.guided_denoise_fn(
      lambda x_t, t, cond: model.denoise(params, x_t, t, cond), *conds, 3.0
    )(x_t, TIMES)

  found = guided(params, prepared, prepare(params, away))
  assert_near(found, guided(params, COND, away), 1e-5)
  # What is cached is used: the text then changes nothing.
  other = guided(params, prepared._replace(text=away.text), prepared)
  assert_near(other, guided(params, prepared, prepared), 0)


def test_growth_leaves_the_coarse_output_as_it_was(random_params):
  """With shared blocks; `test_grow` has a level that shares all."""
  small = model_of(INNER)
  large = model_of(INNER, dataclasses.replace(OUTER, share='blocks'))
  trained = random_params(small, 5)
  grown = grow(large.init(3, 5), trained)
  jax.tree.map(
    np.testing.assert_array_equal,
    grown['unet']['level_0'],
    trained['unet']['level_0'],
  )
  x_t = noise(large)
  run = lambda model, params, x_t: jax.jit(model.denoise)(
    params, x_t, TIMES, COND
  )
  coarse, fine = run(large, grown, x_t)
  np.testing.assert_array_equal(coarse, run(small, trained, x_t[:1])[0])
  # Its own `conv_out` starts as zero.
  assert not np.any(fine)


def test_a_chain_of_three_levels(random_params):
  """The finest level takes what the middle one takes from the coarsest."""
  inner = dataclasses.replace(
    INNER, channels=(8,), num_blocks=(1,), attention_layers=(1,)
  )
  # Of one resolution, so that it meets both others there, as frames do.
  middle = dataclasses.replace(inner, share='blocks')
  model = model_of(
    inner, middle, dataclasses.replace(OUTER, share='all'),
    resolutions=(8, 8, 16),
  )  # fmt: skip
  params = random_params(model, 5)
  names = flat(params['unet'])
  assert {
    name.split('/')[1] for name in names if name.startswith('level_1/')
  } == {
    *('conv_in', 'conv_out', 'norm_out', 'in_adapter', 'out_adapter'),
    *('level_embedding', *EMBEDDINGS),
  }
  assert {
    '/'.join(name.split('/')[1:3])
    for name in names
    if name.startswith(('level_2/down', 'level_2/up'))
  } == {'down_0/downsample', 'up_0/block_0', 'up_1/upsample'}
  whole = flat(with_shared(params['unet'], model.unet.levels))
  for path in ('down_1/block_0', 'up_1/attention_1_0'):
    kernels = {
      name.removeprefix(f'level_2/{path}')
      for name in whole
      if name.startswith(f'level_2/{path}/')
    }
    assert len(kernels) > 8
    for name in kernels:
      owner = f'level_0/{path.replace("_1/", "_0/", 1)}{name}'
      assert whole[f'level_2/{path}{name}'] is names[owner]
  # The embeddings of the finest level are those of the middle one.
  for name in EMBEDDINGS:
    path = f'{name}/kernel'
    assert whole[f'level_2/{path}'] is names[f'level_1/{path}']
    assert names[f'level_1/{path}'] is not names[f'level_0/{path}']
  again = without_shared(
    traverse_util.unflatten_dict(whole, sep='/'), model.unet.levels
  )
  assert flat(again).keys() == names.keys()
  # It is a network, and every shared weight matters to all of its levels.
  shapes = jax.eval_shape(model.denoise, params, noise(model), TIMES, COND)
  assert [x.shape[1] for x in shapes] == [8, 8, 16]


def test_clips_share_attention_between_frames(random_params):
  inner = dataclasses.replace(
    INNER, frames=2, frame_attention=(1, 0), attention_layers=(0, 0)
  )
  outer = dataclasses.replace(
    OUTER, frames=4, frame_attention=(0, 1), attention_layers=(0, 0)
  )
  model = model_of(inner, outer)
  params = random_params(model, 5)
  names = flat(params['unet'])
  assert not any('level_1' in x and 'frame_attention' in x for x in names)
  assert any('level_0/up_0/frame_attention_1_0/qkv' in x for x in names)
  # With half of the frames the coarser level sees one, which the same weights
  # attend to.
  half = model.with_frames(2)
  assert [level.frames for level in half.unet.levels] == [1, 2]
  x_t = noise(half)
  unshared = alone(half)
  whole = {'unet': with_shared(params['unet'], model.unet.levels)}
  whole['unet']['level_1'].pop('level_embedding')
  params = without_embedding(params)
  found = jax.jit(half.denoise)(params, x_t, TIMES, COND)
  expected = jax.jit(unshared.denoise)(whole, x_t, TIMES, COND)
  assert_near(found, expected)
  # Where only the finer level has clips, it has this attention to itself.
  of_images = {'frames': 1, 'frame_attention': ()}
  images = model_of(dataclasses.replace(inner, **of_images), outer)
  assert [x.frames for x in images.with_frames(2).unet.levels] == [1, 2]
  names = flat(images.shapes(5)['unet'])
  assert not any('level_0' in x and 'frame_attention' in x for x in names)
  assert 'level_1/up_1/frame_attention_1_0/qkv/kernel' in names
  assert 'level_1/up_1/block_0/conv_in/kernel' not in names
  # A run that begins with images grows into the clips.
  begun = model_of(
    *(dataclasses.replace(x, **of_images) for x in (inner, outer))
  )
  grown = grow(model.init(0, 5), random_params(begun, 5))
  assert flat(grown['unet']).keys() == flat(params['unet']).keys()


@pytest.mark.parametrize(
  'inner, outer, expected',
  [
    # As of the released 256 px model around the 64 px one.
    (
      ((32, 64, 96), (2, 2, 2), (0, 1, 5)),
      ((8, 16, 32), (2, 2, 1), (0, 0, 0)),
      {'up_2/block_0': 'up_0/block_1'},
    ),
    # Each once.
    (
      ((8,), (1,), (0,)),
      ((8, 8), (0, 3), (0, 1)),
      {
        'down_1/block_0': 'down_0/block_0',
        'up_1/block_0': 'up_0/block_0',
        'up_1/block_1': 'up_0/block_1',
      },
    ),
    # No blocks on the way down; the finer blocks decide on what arrives.
    (
      ((16, 8), (0, 0), (0, 0)),
      ((8, 8, 16), (0, 1, 0), (0, 0, 0)),
      {'up_2/block_0': None},
    ),
    # Attention alone.
    (
      ((16, 8), (1, 0), (2, 0)),
      ((8, 16), (1, 0), (0, 1)),
      {'up_1/attention_0_0': 'up_0/attention_0_0'},
    ),
  ],
)
def test_which_layers_are_shared(inner, outer, expected):
  inner = LevelSpec(*inner, scale_condition=8, **SHARED)
  outer = LevelSpec(*outer, scale_condition=16, share='blocks', **SHARED)
  if None in expected.values():
    with pytest.raises(ValueError, match=r"^share='blocks': no layer of chann"):
      shared_layers(outer, inner)
    return
  found = shared_layers(outer, inner)
  assert found == expected
  # They have the shapes that the network finds, and none of those that are
  # left over fits another.
  resolutions = (
    8 * 2 ** (len(inner.channels) - 1),
    8 * 2 ** (len(inner.channels) + len(outer.channels) - 2),
  )
  shapes = alone(model_of(inner, outer, resolutions=resolutions)).shapes(5)
  levels = [shapes['unet'][f'level_{r}'] for r in range(2)]
  last = len(outer.channels) - 1
  for way in ('down', 'up'):
    theirs = levels[0].get(f'{way}_0', {})
    ours = levels[1].get(f'{way}_{last}', {})
    rest = dict(theirs)
    for path, owner in found.items():
      if path.startswith(way):
        name, other = path.split('/')[1], owner.split('/')[1]
        assert ours[name] == rest.pop(other)
    for name, layer in ours.items():
      if f'{way}_{last}/{name}' not in found and 'sample' not in name:
        assert layer not in rest.values()


@pytest.mark.parametrize(
  'changes, missing',
  [
    ({'num_groups': 2}, {*TAKEN, 'level_1/norm_out'} - {'level_1/conv_in'}),
    ({'num_heads': 4}, {x for x in TAKEN if 'attention' in x}),
    ({'attention_ffn': False}, {x for x in TAKEN if 'attention' in x}),
    ({'patch_size': 2}, {'level_1/conv_in', 'level_1/conv_out'}),
  ],
)
def test_only_layers_that_compute_the_same_are_shared(changes, missing):
  found = shared_layers(dataclasses.replace(OUTER, **changes), INNER)
  found = {f'level_1/{path}' for path in found}
  if 'num_groups' in changes:
    missing -= {f'level_1/{x}' for x in (*EMBEDDINGS, 'conv_in', 'conv_out')}
  assert found == TAKEN.keys() - missing


def test_positions_of_as_many_waves_are_shared():
  waves = dataclasses.replace(OUTER, position_waves=2)
  assert 'position' not in shared_layers(waves, INNER)
  inner = dataclasses.replace(INNER, position_waves=2)
  assert shared_layers(waves, inner)['position'] == 'position'


def test_unknown_ways_to_share_are_refused():
  with pytest.raises(ValueError, match="share='some': use one of"):
    dataclasses.replace(OUTER, share='some')
  with pytest.raises(ValueError, match='the coarsest level has none to share'):
    shared_layers(OUTER, None)


def test_the_page_tells_what_a_recipe_saves():
  """Of the released network, counted by shapes."""
  config, counts = cc12m_256.get_config(), {}
  levels = make_levels(config, config.stages[1])
  assert levels[1].share == 'none'
  net = NestedUNet(levels, TextSpec(**config.model.text))
  whole = Matryoshka(net, Encoder(), (64, 256), True).shapes(5)['unet']
  for share in ('none', 'blocks', 'all'):
    config.model.levels[1].share = share
    levels = make_levels(config, config.stages[1])
    own = without_shared(whole, levels)['level_1']
    counts[share] = sum(math.prod(x.shape) for x in jax.tree.leaves(own))
    if share != 'none':
      counts[share] += levels[1].temporal_dim  # The level embedding.
  assert counts['none'] > counts['blocks'] > counts['all']
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'how_it_works.md'
  none, blocks, both = (f'{count / 1e6:.1f} M' for count in counts.values())
  assert (
    f'`cc12m_256` has {none} parameters of its own, with `blocks` {blocks} and '
    f'with `all` {both}'
  ) in ' '.join(page.read_text().split())


def test_layers_of_codes_and_of_pixels_are_not_shared():
  """The first and last ones, whose shapes differ."""
  codes = dataclasses.replace(INNER, image_channels=2)
  outer = dataclasses.replace(INNER, share='all')
  ends = {'conv_in', 'conv_out'}
  assert ends <= shared_layers(outer, INNER).keys()
  assert not ends & shared_layers(outer, codes).keys()
