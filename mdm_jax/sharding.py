"""Meshes, and which axis of which array lies along which axis of them."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'spatial')
# Examples are spread over every device that holds no part of the same image.
BATCH_AXES = ('data', 'fsdp')

# First match wins. A rule's axes stand for the parameter's last dimensions.
Rules = Sequence[tuple[str, Sequence[str | None]]]


def mesh_sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
  """The sizes of a mesh of so many devices, without -1.

  Raises:
    ValueError: if they do not multiply to `count`.
  """
  sizes = [axes[name] for name in AXES]
  if sizes.count(-1) == 1:
    known = -math.prod(sizes)
    sizes[sizes.index(-1)] = count // known if known > 0 else 0
  if min(sizes) < 1 or math.prod(sizes) != count:
    raise ValueError(
      f'mesh {dict(axes)} does not arrange {count} devices: sizes must '
      f'multiply to {count} (one may be -1).'
    )
  return dict(zip(AXES, sizes))


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges devices in a mesh.

  Args:
    axes: size of each of `AXES`; one may be -1, for what is left.
    devices: all of them, if None.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  sizes = mesh_sizes(axes, len(devices or jax.devices())).values()
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def check_images_stay_in_processes(mesh: Mesh) -> None:
  """Every process reads whole images, so none may lie on several.

  Raises:
    ValueError: the mesh divides an image's rows among processes.
  """
  spatial = mesh.shape['spatial']
  for devices in mesh.devices.reshape(-1, spatial):
    processes = {device.process_index for device in devices}
    if len(processes) > 1:
      raise ValueError(
        f'mesh.spatial={spatial} divides the rows of an image among '
        f'processes {sorted(processes)}, which read whole images: use fewer, '
        "at most a process's own devices."
      )


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch is divided."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Examples over `BATCH_AXES`; an image's height over `spatial`."""
  height = ('spatial',) if ndim == 4 else ()
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *height))


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """This process's slices of a global batch -> global arrays on the mesh."""
  return {
    name: jax.make_array_from_process_local_data(
      batch_sharding(mesh, value.ndim), value
    )
    for name, value in batch.items()
  }


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """The sharding of every leaf, by the first rule that matches its path.

  A path is the leaf's keys joined by '/'. The moments of an optimizer and the
  average of the parameters end in the parameter's own path, so one rule
  places all of them.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    mesh: the mesh.
    rules: pairs of a regular expression, searched for in the path, and mesh
      axes for the last dimensions. Without a match, or if the leaf has fewer
      dimensions than the rule, it is replicated.

  Raises:
    ValueError: if an axis does not divide the dimension it is to shard.
  """

  def sharding(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    axes = next(
      (axes for pattern, axes in rules if re.search(pattern, name)), ()
    )
    if len(axes) > len(leaf.shape):
      axes = ()
    spec = (None,) * (len(leaf.shape) - len(axes)) + tuple(axes)
    for size, axis in zip(leaf.shape, spec):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f'{name} {leaf.shape}: the {mesh.shape[axis]} devices of mesh '
          f'axis {axis!r} do not divide {size}; exempt it by an earlier '
          'rule in sharding_rules.'
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
  """What XLA is to do otherwise than by default, on a TPU.

  For fewer than 8 images it splits their width into a batch, and copies the
  borders around every convolution: five times the bytes. And it multiplies by
  sharded kernels in a ring, as their parts arrive: more memory and traffic for
  features than gathering them takes (docs/tpu_memory.md).
  """
  if mesh.devices.flat[0].platform != 'tpu':
    return {}
  return dict.fromkeys(
    (
      'xla_tpu_run_space_to_batch',
      'xla_tpu_run_space_to_batch_on_new_platforms',
      'xla_tpu_enable_windowed_einsum_for_all_gather',
      'xla_tpu_enable_windowed_einsum_for_reduce_scatter',
    ),
    False,
  )


def place(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has whole -> global arrays in their shards."""
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    ),
    tree,
    shardings,
  )
