"""Packed features against the same operations on pixels."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.builders.model import make_levels, make_model
from mdm_jax.models import layers, packing
from mdm_jax.models.conditioning import Cond, TextSpec
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.packing import Features
from mdm_jax.models.unet import LevelSpec


@pytest.mark.parametrize(
  'channels, lanes, size, expected',
  [
    (32, 128, (8, 8), (2, 2)),
    (64, 128, (8, 8), (1, 2)),
    (96, 128, (8, 8), (1, 1)),
    (32, 1, (8, 8), (1, 1)),
    (8, 128, (8, 8), (4, 4)),
    (8, 128, (8, 2), (2, 2)),  # A patch divides the features.
    (8, 128, (8, 6), (2, 2)),
  ],
)
def test_patch_fills_the_lanes(channels, lanes, size, expected):
  assert packing.best_patch(channels, lanes, size) == expected


def test_fold_goes_along_rows():
  x = np.arange(2 * 4 * 8 * 3).reshape(2, 4, 8, 3)
  folded = np.asarray(packing.fold(x, (2, 4)))
  assert folded.shape == (2, 2, 2, 24)
  np.testing.assert_array_equal(folded[1, 1, 0], x[1, 2:4, :4].reshape(-1))
  np.testing.assert_array_equal(packing.unfold(folded, (2, 4)), x)
  features = Features(folded, (2, 4))
  assert (features.size, features.channels) == ((4, 8), 3)
  np.testing.assert_array_equal(
    features.as_patch((1, 2)).x, packing.fold(x, (1, 2))
  )


def inputs_of(*channels):
  rng = np.random.default_rng(0)
  return [rng.standard_normal((2, 8, 16, c), np.float32) for c in channels]


def packed(arrays, patch):
  return [Features(packing.fold(x, patch), patch) for x in arrays]


def random_like(tree):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), tree)


@pytest.mark.parametrize(
  'inner, outer, options',
  [
    ((1, 1), (2, 2), {}),
    ((2, 2), (2, 2), {}),
    ((1, 2), (1, 2), {}),
    ((4, 2), (4, 2), {}),
    ((2, 2), (2, 2), {'stride': 2}),
    ((2, 2), (1, 2), {'stride': 2}),
    ((1, 2), (1, 1), {'stride': 2}),
    ((4, 4), (1, 1), {'stride': 2}),
    ((1, 1), (1, 1), {'upsample': 2}),
    ((1, 1), (2, 2), {'upsample': 2}),
    ((2, 2), (2, 2), {'upsample': 2}),
    ((1, 2), (2, 4), {'upsample': 2}),
    ((2, 2), (1, 2), {'upsample': 2}),
  ],
)
def test_convolution_of_patches_is_that_of_pixels(inner, outer, options):
  conv = layers.Conv3x3(5, jnp.float32, **options)
  arrays = inputs_of(3, 4)
  params = random_like(conv.init(jax.random.key(0), *packed(arrays, (1, 1))))

  def on_pixels(params, arrays):
    x = np.concatenate(arrays, axis=-1)
    x = x.repeat(conv.upsample, axis=1).repeat(conv.upsample, axis=2)
    plain = nn.Conv(5, (3, 3), strides=conv.stride, padding=1)
    return plain.apply(params, x)

  def on_patches(params, arrays):
    out = conv.apply(params, *packed(arrays, inner), patch=outer)
    assert out.patch == outer
    return out.as_patch((1, 1)).x

  expected = on_pixels(params, arrays)
  np.testing.assert_allclose(
    on_patches(params, arrays), expected, rtol=0, atol=2e-5
  )
  weight = random_like(expected)
  grads, expected_grads = (
    jax.grad(lambda params, f=f: (f(params, arrays) * weight).sum())(params)
    for f in (on_patches, on_pixels)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3),
    grads,
    expected_grads,
  )


@pytest.mark.parametrize('patch', [(1, 1), (2, 2)])
def test_norm_and_pointwise_of_parts_are_those_of_the_whole(patch):
  # Groups of 3 channels: one lies in both parts.
  arrays = inputs_of(4, 8)
  whole = np.concatenate(arrays, axis=-1) + 1
  arrays = [x + 1 for x in arrays]
  for ours, theirs in [
    (layers.GroupNorm(4, jnp.float32), nn.GroupNorm(4, epsilon=1e-5)),
    (layers.Pointwise(5, jnp.float32), nn.Dense(5)),
  ]:
    params = random_like(theirs.init(jax.random.key(0), whole))
    out = ours.apply(params, *packed(arrays, patch))
    parts = out if isinstance(out, list) else [out]
    np.testing.assert_allclose(
      np.concatenate([x.as_patch((1, 1)).x for x in parts], axis=-1),
      theirs.apply(params, whole),
      rtol=0,
      atol=2e-5,
    )


@pytest.fixture(scope='module')
def network(make_config):
  """(options of the levels) -> loss and gradients of every parameter."""
  config = make_config()
  config.model.levels[0].attention_layers = (1,)
  config.model.levels[1].update(
    channels=(4, 8),
    num_blocks=(1, 1),
    attention_layers=(0, 1),
    position_waves=1,
  )
  model = make_model(config, config.stages[1])
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32),
    model.init(0, 8),
  )['unet']
  x_t = [rng.standard_normal((2, r, r, 3), np.float32) for r in (8, 16)]
  text = rng.standard_normal((2, 8, 16), np.float32)
  target = [rng.standard_normal(x.shape, np.float32) for x in x_t]

  def run(**options):
    unet = dataclasses.replace(
      model.unet,
      levels=tuple(
        dataclasses.replace(level, **options) for level in model.unet.levels
      ),
    )

    def loss(params):
      out = unet.apply(
        {'params': params},
        x_t,
        np.array([3.0, 700.0]),
        Cond(text, np.ones((2, 8), bool)),
      )
      return sum(((x - w) ** 2).sum() for x, w in zip(out, target))

    program = jax.jit(jax.value_and_grad(loss)).lower(params)
    return program.as_text(), program.compile()(params)

  return run


@pytest.fixture(scope='module')
def plain(network):
  return network()


@pytest.mark.parametrize(
  'options',
  [{'lanes': 16, 'remat': 'block'}, {'lanes': 32, 'remat': 'level'}],
)
def test_neither_packing_nor_rematerialisation_changes_numbers(
  network, plain, options
):
  text, (loss, grads) = network(**options)
  plain_text, (expected_loss, expected_grads) = plain
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  # Both differ from float64 by about 1e-5.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=4e-5 * (1 + np.abs(y).max())
    ),
    grads,
    expected_grads,
  )
  # Packing and rematerialisation are in use.
  assert 'optimization_barrier' in text
  assert 'optimization_barrier' not in plain_text
  # 16 px of 4 channels, packed by 4 or by 8 pixels.
  shape = {16: '2x8x8x16', 32: '2x8x4x32'}[options['lanes']]
  assert f'tensor<{shape}xf32>' in text
  assert f'tensor<{shape}xf32>' not in plain_text


@pytest.mark.parametrize(
  'backend, lanes, expected',
  [
    ('tpu', 0, 128),
    ('gpu', 0, 1),
    ('cpu', 0, 1),
    ('tpu', 1, 1),
    ('cpu', 16, 16),
  ],
)
def test_lanes_default_to_those_of_the_device(
  monkeypatch, make_config, backend, lanes, expected
):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  config = make_config()
  config.model.levels[0].lanes = lanes
  level = make_levels(config, config.stages[0])[0]
  assert level.lanes == expected


@pytest.mark.parametrize(
  'backend, version, capability, spatial, expected',
  [
    ('gpu', 'cuda 12090', '9.0', 1, True),
    ('gpu', 'cuda 12090', '12.0', 1, True),
    ('gpu', 'cuda 12090', '7.5', 1, False),
    ('gpu', 'rocm 60000', 'gfx942', 1, False),
    ('gpu', 'cuda 12090', '9.0', 2, False),
    ('cpu', 'cpu', None, 1, False),
  ],
)
def test_flash_attention_is_of_nvidia_gpus(
  monkeypatch, make_config, backend, version, capability, spatial, expected
):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(
    'jax.extend.backend.get_backend',
    lambda: types.SimpleNamespace(platform_version=version),
  )
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  config = make_config()
  config.mesh.spatial = spatial
  levels = make_levels(config, config.stages[1])
  assert [level.flash for level in levels] == [expected] * 2


def test_invalid_level_settings_are_refused(make_config):
  level = make_levels(make_config(), make_config().stages[0])[0]
  with pytest.raises(ValueError, match="remat='all'.*block"):
    dataclasses.replace(level, remat='all')
  with pytest.raises(ValueError, match='lanes=0'):
    dataclasses.replace(level, lanes=0)


@pytest.mark.parametrize('patch', [(1, 1), (2, 4)])
def test_a_block_that_keeps_the_channels_of_two_inputs(patch):
  """The release has no convolution in such a shortcut: it is the inputs."""
  inputs = inputs_of(4, 12)
  block = layers.ResidualBlock(16, 4, jnp.float32)
  temb = jnp.ones((2, 8))
  # Its last convolution begins at zero.
  out, params = block.init_with_output(
    jax.random.key(0), packed(inputs, patch), temb
  )
  assert 'shortcut' not in params['params']
  assert (out.patch, out.channels) == (patch, 16)
  np.testing.assert_array_equal(
    packing.unfold(out.x, patch), np.concatenate(inputs, axis=-1)
  )


@pytest.mark.parametrize(
  'channels, num_blocks, expected',
  [
    ((8, 16), (0, 0), 8),
    ((8, 16), (1, 0), 8),
    ((8, 16), (0, 1), 16),
    ((8, 16, 32), (1, 1, 0), 16),
  ],
)
def test_an_adapter_has_the_channels_that_arrive(
  channels, num_blocks, expected
):
  """Without a block, a resolution keeps the channels of the finer one."""
  inner = LevelSpec((8,), (0,), (0,), 16, 8, num_groups=4)
  outer = LevelSpec(
    channels, num_blocks, (0,) * len(channels), 16, 16, num_groups=4
  )
  size = 4 * outer.downsampling
  net = NestedUNet((inner, outer), TextSpec(8, 0, 1))
  x_t = tuple(jnp.ones((1, side, side, 3)) for side in (4, size))
  shapes = jax.eval_shape(
    net.init,
    jax.random.key(0),
    x_t,
    jnp.ones(1),
    Cond(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool)),
  )['params']['level_1']
  assert shapes['out_adapter']['kernel'].shape[-1] == expected
