"""The network has exactly the parameters of the released ml-mdm models."""

import dataclasses
import json
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.interop import hugging_face
from mdm_jax.interop.ml_mdm import (
  NAMES,
  from_release,
  release_names,
  to_release,
)
from mdm_jax.models.conditioning import Cond, TextSpec
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.unet import LevelSpec

GOLDEN = pathlib.Path(__file__).parents[1] / 'data' / 'golden'
LEVEL_64 = LevelSpec(
  channels=(256, 512, 768),
  num_blocks=(2, 2, 2),
  attention_layers=(0, 1, 5),
  temporal_dim=1024,
  scale_condition=64,
)
LEVEL_256, LEVEL_1024 = (
  LevelSpec(
    channels=channels,
    num_blocks=(2, 2, 1),
    attention_layers=(0, 0, 0),
    temporal_dim=1024,
    scale_condition=resolution,
  )
  for channels, resolution in (((64, 128, 256), 256), ((32, 32, 64), 1024))
)
RELEASED = {
  64: ((LEVEL_64,), 461_359_107),
  256: ((LEVEL_64, LEVEL_256), 476_613_958),
  1024: ((LEVEL_64, LEVEL_256, LEVEL_1024), 480_970_057),
}


def parameter_shapes(levels, text_width, text_spec):
  # Sizes of images do not matter: the smallest that can be halved.
  sizes = [levels[0].downsampling]
  for level in levels[1:]:
    sizes.append(sizes[-1] * level.downsampling)
  x_t = tuple(jnp.zeros((1, size, size, 3)) for size in sizes)
  cond = Cond(jnp.zeros((1, 2, text_width)), jnp.ones((1, 2), bool))
  return jax.eval_shape(
    NestedUNet(levels, text_spec).init,
    jax.random.key(0),
    x_t,
    jnp.zeros(1),
    cond,
  )['params']


@pytest.mark.parametrize('resolution', RELEASED)
def test_names_and_shapes_equal_the_release(resolution):
  levels, count = RELEASED[resolution]
  manifest = json.loads(
    (GOLDEN / f'manifest_{resolution}x{resolution}.json').read_text()
  )
  shapes = parameter_shapes(levels, 2048, TextSpec())
  names = list(release_names(shapes, levels))
  assert len({name for _, name, _ in names}) == len(names)
  assert {name: list(shape) for _, name, shape in names} == (
    manifest['state_dict']
  )
  assert {path for path, _, _ in names} == set(
    traverse_util.flatten_dict(shapes)
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  assert manifest['num_params'] == count


@pytest.mark.parametrize(
  'prefix', ['', 'module.', '_orig_mod.module.', 'state_dict.', 'ema.module.']
)
@pytest.mark.parametrize('resolution', RELEASED)
def test_a_network_is_found_in_a_checkpoint(resolution, prefix):
  """And not the coarser networks inside of it, which have the same names."""
  manifest = json.loads(
    (GOLDEN / f'manifest_{resolution}x{resolution}.json').read_text()
  )
  own, other = np.zeros(1), np.ones(1)
  tensors = {f'{prefix}{name}': own for name in manifest['state_dict']}
  if prefix.endswith('module.'):
    tensors |= {f'raw.{name}': other for name in [*NAMES][:2]}
  if prefix.startswith('ema'):
    tensors |= {f'state_dict.{name}': other for name in manifest['state_dict']}
  found = hugging_face.select(tensors, NAMES)
  assert found.keys() == manifest['state_dict'].keys()
  assert all(value is own for value in found.values())


@pytest.fixture(scope='module')
def small():
  """Levels, shapes of the parameters, and a state dict that fits them."""
  level = LevelSpec(
    channels=(8,),
    num_blocks=(1,),
    attention_layers=(1,),
    temporal_dim=16,
    scale_condition=8,
    num_groups=4,
    num_heads=2,
  )
  shapes = parameter_shapes((level,), 6, TextSpec(width=10))
  rng = np.random.default_rng(0)
  state_dict = {
    name: rng.standard_normal(shape)
    for _, name, shape in release_names(shapes, (level,))
  }
  return (level,), shapes, state_dict


def test_from_release_transposes_kernels(small):
  levels, shapes, state_dict = small
  params = from_release(shapes, levels, state_dict)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == (
    jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
  )
  level = params['level_0']
  weight = state_dict['conv_in.weight']  # OIHW
  assert weight.shape == (8, 3, 3, 3)
  assert level['conv_in']['kernel'][0, 2, 1, 5] == np.float32(
    weight[5, 1, 0, 2]
  )
  weight = state_dict['down_blocks.0.attn.0.qkv.weight']  # a 1x1 convolution
  assert weight.shape == (24, 8, 1, 1)
  assert level['down_0']['attention_0_0']['qkv']['kernel'][3, 20] == (
    np.float32(weight[20, 3, 0, 0])
  )
  assert params['text']['lm_proj']['kernel'][4, 7] == np.float32(
    state_dict['lm_proj.weight'][7, 4]
  )


def test_a_transformer_has_no_names_there():
  level = LevelSpec((8,), (1,), (0,), 16, 8, num_heads=2, kind='transformer')
  shapes = parameter_shapes((level,), 6, TextSpec(width=10))
  for convert in (
    lambda: from_release(shapes, (level,), {}),
    lambda: to_release(shapes, (level,)),
  ):
    with pytest.raises(ValueError, match="ml-mdm has no levels of kind='tran"):
      convert()


def test_levels_that_share_have_no_names_there():
  level = LevelSpec((8,), (1,), (0,), 16, 8, num_heads=2, num_groups=4)
  levels = level, dataclasses.replace(level, share='all')
  shapes = parameter_shapes(levels, 6, TextSpec(width=10))
  for convert in (
    lambda: from_release(shapes, levels, {}),
    lambda: to_release(shapes, levels),
  ):
    with pytest.raises(ValueError, match=r"model.levels\[1\].share='all': the"):
      convert()


@pytest.mark.parametrize(
  'index, changes, message',
  [
    (
      0,
      {'frames': 2, 'frame_attention': (1,)},
      r'levels\[0\].frame_attention=',
    ),
    (
      1,
      {'frame_attention': (0, 1)},
      r'levels\[1\].frame_attention=\(0, 1\): ml',
    ),
    (0, {'position_waves': 2}, r'levels\[0\].position_waves=2: .* need posit'),
    (1, {'patch_size': 2}, r'levels\[1\].patch_size=2: .* need patch_size=1'),
    (0, {'normalize_input': True}, r'levels\[0\].normalize_input=True: ml-mdm'),
    (0, {'given_coarse': True}, 'model.cascade=True: ml-mdm has no network'),
  ],
)
def test_what_the_release_cannot_have_is_named(index, changes, message):
  levels = [
    LevelSpec((8,), (1,), (0,), 16, 8, num_heads=2, num_groups=4),
    LevelSpec((8, 8), (1, 0), (0, 0), 16, 8, num_heads=2, num_groups=4),
  ]
  levels[index] = dataclasses.replace(levels[index], **changes)
  for convert in (from_release, to_release):
    with pytest.raises(ValueError, match=message) as error:
      convert({}, tuple(levels), *([{}] if convert is from_release else []))
    assert '\n' not in str(error.value)


def test_outer_levels_may_normalize_their_input():
  levels = RELEASED[256][0]
  levels = levels[0], dataclasses.replace(levels[1], normalize_input=True)
  assert to_release({}, levels) == {}


def test_from_release_names_tensors_that_do_not_fit(small):
  levels, shapes, state_dict = small
  state_dict = dict(state_dict)
  del state_dict['lm_proj.bias']
  state_dict['conv_in.weight'] = np.zeros((8, 3, 1, 1))
  state_dict['inner_unet.conv_in.bias'] = np.zeros(8)
  with pytest.raises(ValueError) as error:
    from_release(shapes, levels, state_dict)
  message = str(error.value)
  assert message.startswith('The weights do not fit: ')
  assert set(message.removeprefix('The weights do not fit: ').split('; ')) == {
    'missing lm_proj.bias',
    'conv_in.weight is (8, 3, 1, 1), not (8, 3, 3, 3)',
    'unknown inner_unet.conv_in.bias',
  }


@pytest.mark.parametrize('number', [np.nan, np.inf, 1e300])
def test_from_release_names_tensors_that_are_not_finite(small, number):
  levels, shapes, state_dict = small
  weight = state_dict['lm_proj.weight'].copy()
  weight[1, 2] = number
  state_dict = state_dict | {'lm_proj.weight': weight}
  with pytest.raises(ValueError, match='lm_proj.weight has numbers that are'):
    from_release(shapes, levels, state_dict)


def test_to_release_is_the_inverse(small):
  levels, shapes, state_dict = small
  back = to_release(from_release(shapes, levels, state_dict), levels)
  assert back.keys() == state_dict.keys()
  for name, value in state_dict.items():
    np.testing.assert_array_equal(back[name], np.float32(value))
