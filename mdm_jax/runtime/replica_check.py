"""Finds devices whose copies of replicated arrays differ from the others'.

A device that computes or stores wrong numbers raises no error. Where arrays are
replicated, its copies differ from those of the other devices from then on.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np


class ReplicasDiffer(RuntimeError):
  """Copies of a replicated array differ between devices."""


def make_check(tree: Any, shardings: Any, mesh: Mesh) -> Callable[[Any], None]:
  """Makes a function that compares all copies of every shard of a tree.

  Each device hashes its own shards, so that only one number for each device and
  array is communicated.

  Args:
    tree: `jax.ShapeDtypeStruct`s.
    shardings: a `NamedSharding` on the mesh for each of them.
    mesh: the devices.

  Returns:
    tree -> None. All processes call it. It raises `ReplicasDiffer`, naming
    the devices and an array.
  """
  paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
  flat_shardings = jax.tree.leaves(shardings)
  names = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in paths_and_leaves
  ]
  devices = list(mesh.devices.flat)
  holders = [
    _holders(sharding.devices_indices_map(leaf.shape), devices)
    for sharding, (_, leaf) in zip(flat_shardings, paths_and_leaves)
  ]

  def local_digests(*leaves):
    return jnp.stack([_digest(leaf) for leaf in leaves])[None]

  digests = jax.jit(
    jax.shard_map(
      local_digests,
      mesh=mesh,
      in_specs=tuple(sharding.spec for sharding in flat_shardings),
      out_specs=PartitionSpec(mesh.axis_names),
      check_vma=False,
    ),
    out_shardings=jax.sharding.NamedSharding(mesh, PartitionSpec()),
  )

  def check(tree):
    found = np.asarray(digests(*jax.tree.leaves(tree)))  # [devices, arrays]
    odd = {}  # Device -> the arrays in which it differs.
    for name, groups, column in zip(names, holders, found.T):
      for group in groups:
        for place in _odd_ones(column[group]):
          odd.setdefault(devices[group[place]], []).append(name)
    if odd:
      raise ReplicasDiffer(
        '; '.join(
          f'{device} of process {device.process_index} has another copy of '
          f'{names[0]}'
          + (f' and {len(names) - 1} more arrays' if len(names) > 1 else '')
          for device, names in odd.items()
        )
        + ': nothing was saved since all copies were the same, and the same '
        'command continues from there. Leave the device out if it happens '
        'again.'
      )

  return check


def _holders(
  indices: dict[jax.Device, Any], devices: list[jax.Device]
) -> list[np.ndarray]:
  """For each shard, the indices in `devices` of those that hold a copy."""
  groups = {}
  for place, device in enumerate(devices):
    key = tuple((part.start, part.stop) for part in indices[device])
    groups.setdefault(key, []).append(place)
  return [np.array(group) for group in groups.values()]


def _odd_ones(digests: np.ndarray) -> np.ndarray:
  """Indices of digests other than the most frequent one; all in a tie."""
  values, inverse, counts = np.unique(
    digests, return_inverse=True, return_counts=True
  )
  if len(values) == 1:
    return np.array([], int)
  is_best = counts == counts.max()
  if is_best.sum() > 1:
    return np.arange(len(digests))
  return np.flatnonzero(~is_best[inverse])


def _digest(x: jax.Array) -> jax.Array:
  """A uint32 hash of an array that changes with any single flipped bit.

  It sums the words, each times an odd weight of its own. Flipping bit k of a
  word changes the sum by 2 ** k times an odd number, which is not 0 modulo
  2 ** 32.

  Args:
    x: array whose items have at most 32 bits.
  """
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(
    x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  )
  words = bits.astype(jnp.uint32).reshape(-1)
  weights = 2 * jax.lax.iota(jnp.uint32, math.prod(x.shape)) + 1
  return (words * weights).sum(dtype=jnp.uint32)
