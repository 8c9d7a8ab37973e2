"""Meshes and the sharding of arrays, on 8 simulated devices."""

import contextlib
import dataclasses
import math
import types

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mdm_jax.runtime import sharding


def mesh_of(data, fsdp=1, spatial=1, devices=None):
  return sharding.make_mesh(
    {'data': data, 'fsdp': fsdp, 'spatial': spatial}, devices
  )


@pytest.mark.parametrize(
  'sizes, expected',
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 1), (2, 4, 1)),
    ((2, 2, -1), (2, 2, 2)),
    ((1, 8, 1), (1, 8, 1)),
  ],
)
def test_make_mesh(sizes, expected):
  mesh = mesh_of(*sizes)
  assert mesh.axis_names == ('data', 'fsdp', 'spatial')
  assert mesh.devices.shape == expected
  assert len(set(mesh.devices.flat)) == 8


def test_make_mesh_of_some_devices():
  mesh = mesh_of(-1, 2, devices=jax.devices()[2:6])
  assert mesh.devices.shape == (2, 2, 1)
  assert set(mesh.devices.flat) == set(jax.devices()[2:6])


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int


@pytest.mark.parametrize(
  'shape, processes, expected',
  [
    # JAX's orders of v5e:4x4 and of v5p:2x2x2.
    (
      (16, 1, 1),
      '0011110233332220',
      [0, 1, 6, 15, 2, 3, 4, 5, 7, 12, 13, 14, 8, 9, 10, 11],
    ),
    ((2, 4, 1), '01010101', [0, 2, 4, 6, 1, 3, 5, 7]),
    # Whatever divides an image stays together.
    ((2, 2, 2), '11001100', [2, 3, 6, 7, 0, 1, 4, 5]),
    ((2, 4, 1), '00001111', [*range(8)]),
  ],
)
def test_processes_have_their_parts_of_a_batch_in_order(
  shape, processes, expected, monkeypatch
):
  devices = [Device(i, int(process)) for i, process in enumerate(processes)]
  monkeypatch.setattr(
    jax,
    'make_mesh',
    lambda sizes, *_, devices, **__: types.SimpleNamespace(
      devices=np.reshape(devices, sizes)
    ),
  )
  found = mesh_of(*shape, devices=devices).devices
  assert found.shape == shape
  assert [device.id for device in found.flat] == expected


@pytest.mark.parametrize(
  'sizes',
  [(4, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, -1, 1), (-2, -4, 1), (-1, 16, 1)],
)
def test_make_mesh_rejects(sizes):
  with pytest.raises(ValueError, match='does not arrange 8 devices'):
    mesh_of(*sizes)


@pytest.mark.parametrize(
  'processes, accepted', [((0, 0, 1, 1), True), ((0, 1, 0, 1), False)]
)
def test_an_image_stays_in_one_process(processes, accepted):
  devices = np.array(
    [types.SimpleNamespace(process_index=index) for index in processes]
  )
  mesh = types.SimpleNamespace(
    shape={'spatial': 2}, devices=devices.reshape(2, 1, 2)
  )
  with (
    contextlib.nullcontext()
    if accepted
    else pytest.raises(
      ValueError, match=r'spatial=2 .* among processes \[0, 1\]'
    )
  ):
    sharding.check_images_stay_in_processes(mesh)


@pytest.mark.parametrize(
  'sizes, expected', [((8, 1, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 1)]
)
def test_batch_shards(sizes, expected):
  assert sharding.batch_shards(mesh_of(*sizes)) == expected


def test_tree_shardings():
  tree = {
    'level_0': {
      'conv_in': {'kernel': np.zeros((3, 3, 3, 8))},
      'dense': {'kernel': np.zeros((6, 8)), 'bias': np.zeros(8)},
    },
    'opt_state': [{'dense': {'kernel': np.zeros((6, 8))}}],
    'kernel': np.zeros(8),
    'step': np.zeros(()),
  }
  rules = (
    ('level_0/conv_in/', ()),
    ('dense/kernel$', ('data', 'fsdp')),
    ('kernel$', ('data', 'fsdp')),
    ('level_0', ('fsdp',)),
  )
  found = sharding.tree_shardings(tree, mesh_of(2, 4), rules)
  assert jax.tree.map(lambda x: x.spec, found) == {
    # The first rule that matches wins over later ones.
    'level_0': {
      'conv_in': {'kernel': P(None, None, None, None)},
      'dense': {'kernel': P('data', 'fsdp'), 'bias': P('fsdp')},
    },
    # One rule shards a parameter and its moments.
    'opt_state': [{'dense': {'kernel': P('data', 'fsdp')}}],
    # Replicated: fewer dimensions than the rule's axes, and no matching rule.
    'kernel': P(None),
    'step': P(),
  }


def test_a_rule_applies_to_the_last_dimensions():
  leaf = jax.ShapeDtypeStruct((3, 3, 6, 8), np.float32)
  mesh = mesh_of(2, 4)
  one = sharding.tree_shardings({'a': leaf}, mesh, [('a', ('fsdp',))])['a']
  assert one.spec == P(None, None, None, 'fsdp')
  assert one.shard_shape(leaf.shape) == (3, 3, 6, 2)
  two = sharding.tree_shardings({'a': leaf}, mesh, [('a', ('data', None))])
  assert two['a'].shard_shape(leaf.shape) == (3, 3, 3, 8)


def test_indivisible_parameter_is_named():
  tree = {'level_1': {'conv_out': {'kernel': np.zeros((3, 3, 8, 3))}}}
  with pytest.raises(
    ValueError,
    match=r"^level_1/conv_out/kernel \(3, 3, 8, 3\).*'fsdp' do "
    'not divide 3.*sharding_rules',
  ):
    sharding.tree_shardings(tree, mesh_of(2, 4), [('kernel', ('fsdp',))])


def test_shard_batch():
  batch = {
    'image': np.arange(8 * 4 * 4 * 3, dtype=np.uint8).reshape(8, 4, 4, 3),
    'text': np.arange(16, dtype=np.int32).reshape(8, 2),
    'scale': np.arange(8, dtype=np.float32),
  }
  sharded = sharding.shard_batch(batch, mesh_of(2, 2, 2))
  shards = {
    name: x.sharding.shard_shape(x.shape) for name, x in sharded.items()
  }
  assert shards == {'image': (2, 2, 4, 3), 'text': (2, 2), 'scale': (2,)}
  for name, value in batch.items():
    np.testing.assert_array_equal(sharded[name], value)
    assert sharded[name].dtype == value.dtype


def test_place():
  mesh = mesh_of(2, 4)
  tree = {
    'kernel': np.arange(48, dtype=np.float32).reshape(6, 8),
    'step': np.int32(7),
  }
  shardings = sharding.tree_shardings(tree, mesh, [('kernel', ('fsdp',))])
  placed = sharding.place(tree, shardings)
  assert placed['kernel'].sharding == shardings['kernel']
  assert len(placed['kernel'].addressable_shards) == 8
  for shard in placed['kernel'].addressable_shards:
    assert shard.data.shape == (6, 2)
    np.testing.assert_array_equal(shard.data, tree['kernel'][shard.index])
  assert int(placed['step']) == 7


@pytest.mark.parametrize('sizes', [(1, 2, 2), (2, 2, 2), (1, 2, 4)])
def test_gradients_of_kernels_larger_than_the_features(sizes):
  """Of two convolutions, against one device."""

  def convolve(x, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=numbers
    )

  def loss(kernels, x):
    first, second = kernels
    return (convolve(jnp.tanh(convolve(x, first)), second) ** 2).mean()

  rng = np.random.default_rng(0)
  kernels = [0.1 * rng.standard_normal((3, 3, 16, 16), np.float32)] * 2
  x = rng.standard_normal((8, 4, 4, 16), np.float32)
  expected = jax.grad(loss)(kernels, x)
  mesh = mesh_of(*sizes, devices=jax.devices()[: math.prod(sizes)])
  shardings = [NamedSharding(mesh, P(None, None, None, 'fsdp'))] * 2

  def gradients(kernels, x):
    return jax.grad(loss)(sharding.gather_kernels(kernels, mesh), x)

  found = jax.jit(gradients, out_shardings=shardings)(
    sharding.place(kernels, shardings),
    sharding.shard_batch({'x': x}, mesh)['x'],
  )
  for one, other in zip(found, expected):
    np.testing.assert_allclose(
      one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max()
    )
