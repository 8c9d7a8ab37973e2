"""Device meshes, and how parameters and batches are sharded over them."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from mdm_jax.runtime import environment

AXES = ('data', 'fsdp', 'spatial')
# Mesh axes that divide a batch; `spatial` divides the rows of each image.
BATCH_AXES = ('data', 'fsdp')

# (regular expression, mesh axes) pairs; the first match wins. The axes are
# those of the parameter's last dimensions.
Rules = Sequence[tuple[str, Sequence[str | None]]]


def mesh_sizes(axes: Mapping[str, int], count: int) -> dict[str, int]:
  """Sizes of a mesh's axes, with -1 replaced by a number.

  Args:
    axes: size of each of `AXES`; one may be -1, for the remaining devices.
    count: number of devices.

  Raises:
    ValueError: if the sizes do not multiply to `count`.
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

  A batch is divided among processes in their order: process p reads the p-th
  part of it. On slices of several hosts JAX's own order is another.

  Args:
    axes: size of each of `AXES`; one may be -1, for the remaining devices.
    devices: the devices to arrange; None for all. A warning is then logged if
      these are CPUs, although the machine has accelerators.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or
      JAX_PLATFORMS asks for devices that there are not.
  """
  if devices is None:
    environment.check_accelerators()
  sizes = mesh_sizes(axes, len(devices or jax.devices())).values()
  axis_types = (AxisType.Auto,) * len(AXES)
  mesh = jax.make_mesh(
    tuple(sizes), AXES, axis_types=axis_types, devices=devices
  )
  by_process = sorted(
    mesh.devices.reshape(-1, mesh.devices.shape[-1]),
    key=lambda row: row[0].process_index,
  )
  return Mesh(
    np.reshape(by_process, mesh.devices.shape), AXES, axis_types=axis_types
  )


def one_cpu() -> Mesh:
  """A mesh of one CPU, for programs that are checked or counted, not run."""
  return make_mesh(dict.fromkeys(AXES, 1), jax.devices('cpu')[:1])


def check_images_stay_in_processes(mesh: Mesh) -> None:
  """Checks that no image is divided among processes, which read whole images.

  Raises:
    ValueError: the `spatial` axis of the mesh spans several processes.
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
  """Number of shards of a batch: the product of the `BATCH_AXES` sizes."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array of which every device has a whole copy."""
  return NamedSharding(mesh, PartitionSpec())


def gather_kernels(params: Any, mesh: Mesh | None) -> Any:
  """Gathers the kernels of convolutions, for gradients where rows are divided.

  Otherwise XLA may divide the sum over a kernel's channels, where the images'
  features are smaller than the kernel, and adds up what each device has: also
  the copies along `spatial`. Gradients then are too large by a factor of that
  axis (seen with XLA of JAX 0.10 and 0.11, on CPUs; its partitioner is that of
  all devices).

  Args:
    params: sharded parameters, inside of `jax.jit`.
    mesh: the devices; without a divided `spatial` axis nothing is done.
  """
  if mesh is None or mesh.shape['spatial'] == 1:
    return params
  return jax.tree.map(
    lambda x: (
      jax.lax.with_sharding_constraint(x, replicated(mesh))
      if x.ndim == 4
      else x
    ),
    params,
  )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Shards examples over `BATCH_AXES`, rows or frames over `spatial`.

  Args:
    mesh: the devices.
    ndim: rank of the array; 4 for images [B, H, W, 3], 5 for clips
      [B, T, H, W, 3].
  """
  inner = ('spatial',) if ndim in (4, 5) else ()
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *inner))


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes global arrays on the mesh of each process's part of a batch."""
  return {
    name: jax.make_array_from_process_local_data(
      batch_sharding(mesh, value.ndim), value
    )
    for name, value in batch.items()
  }


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """The sharding of every leaf, by the first rule that matches its path.

  A path is the leaf's keys joined by '/'. The paths of an optimizer's moments
  and of the EMA end in the parameter's own path, so one rule shards all three.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    mesh: the mesh.
    rules: pairs of a regular expression, searched for in the path, and mesh
      axes for the last dimensions. A leaf that no rule matches, or that has
      fewer dimensions than its rule, is replicated.

  Raises:
    ValueError: if the size of a mesh axis does not divide the dimension that it
      shards.
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
  """XLA options for jitted steps on this mesh; none except on TPUs.

  Space-to-batch is off: for fewer than 8 images it splits their width into a
  batch, and copies the borders around every convolution, five times the bytes.
  Windowed einsums are off: multiplying by sharded kernels in a ring, as their
  shards arrive, takes more memory and traffic for features than gathering the
  kernels first (docs/tpu_memory.md).
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


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """`jax.ShapeDtypeStruct`s with the shardings of another tree."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )


def round_up(batch_size: int, mesh: Mesh) -> int:
  """Rounds a batch size up to a multiple of `batch_shards`."""
  shards = batch_shards(mesh)
  return -(-batch_size // shards) * shards


def place(tree: Any, shardings: Any) -> Any:
  """Shards arrays of which every process has a whole copy."""
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    ),
    tree,
    shardings,
  )
