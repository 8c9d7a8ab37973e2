"""A flipped bit in one of eight copies is found, and its device is named."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from mdm_jax.runtime import replica_check, sharding

TREE = {
  'params': {'kernel': jnp.float32, 'bias': jnp.bfloat16},
  'step': jnp.int32,
  'done': bool,
}
SHAPES = {'params': {'kernel': (4, 6), 'bias': (8,)}, 'step': (), 'done': (3,)}
AXES = {'params': {'kernel': ('fsdp',), 'bias': ()}, 'step': (), 'done': ()}


@pytest.fixture(scope='module', params=[(8, 1), (2, 4), (4, 2)])
def setting(request):
  """A mesh, a tree of random arrays on it, and its check."""
  data, fsdp = request.param
  mesh = sharding.make_mesh({'data': data, 'fsdp': fsdp, 'spatial': 1})
  rng = np.random.default_rng(0)
  shardings = jax.tree.map(
    lambda axes: NamedSharding(mesh, PartitionSpec(*axes)),
    AXES,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  tree = jax.tree.map(
    lambda dtype, shape, place: jax.device_put(
      (8 * rng.standard_normal(shape)).astype(dtype), place
    ),
    TREE,
    SHAPES,
    shardings,
    is_leaf=lambda x: isinstance(x, type),
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree
  )
  return mesh, tree, replica_check.make_check(abstract, shardings, mesh)


def flip(x, device, bit):
  """Copies an array, with one bit flipped on one device."""
  shards = []
  for shard in x.addressable_shards:
    data = np.array(shard.data)
    if shard.device == device:
      data.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    shards.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def test_equal_copies_pass(setting):
  _, tree, check = setting
  check(tree)


@pytest.mark.parametrize(
  'name, bit',
  [
    ('kernel', 0),
    ('kernel', 31),
    ('kernel', 100),
    ('bias', 127),
    ('step', 7),
    ('done', 0),
  ],
)
def test_one_flipped_bit_names_its_device(setting, name, bit):
  mesh, tree, check = setting
  device = mesh.devices.flat[5]
  branch = dict(tree['params']) if name in tree['params'] else dict(tree)
  branch[name] = flip(branch[name], device, bit)
  harmed = branch if name in tree else tree | {'params': branch}
  copies = len(mesh.devices.flat) // (
    mesh.shape['fsdp'] if name == 'kernel' else 1
  )
  with pytest.raises(replica_check.ReplicasDiffer) as error:
    check(harmed)
  message = str(error.value)
  assert f'{device} of process 0 has another copy' in message
  assert name in message
  # With two copies it is unknown which one is right: both are named.
  assert message.count('has another copy') == (1 if copies > 2 else 2)


def test_exchanged_values_are_found(setting):
  mesh, tree, check = setting
  bias = tree['params']['bias']
  swapped = np.asarray(bias)[[1, 0, *range(2, 8)]]
  shards = [
    jax.device_put(swapped if i == 2 else np.asarray(bias), device)
    for i, device in enumerate(mesh.devices.flat)
  ]
  bias = jax.make_array_from_single_device_arrays(
    bias.shape, bias.sharding, shards
  )
  with pytest.raises(replica_check.ReplicasDiffer, match='params/bias'):
    check(tree | {'params': tree['params'] | {'bias': bias}})
