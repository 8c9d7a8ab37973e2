"""Peak performance of devices, and FLOPs of compiled programs."""

from collections.abc import Iterator
import dataclasses
import functools
import math
import time
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

from mdm_jax.models import target


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one accelerator chip, as its vendor states them.

  Attributes:
    kind: how the device's `device_kind` begins.
    flops: FLOP/s in bfloat16, without sparsity.
    memory: GiB that XLA leaves to a program; None where it isn't known. On a
      GPU it takes three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says
      otherwise.
    bandwidth: bytes/s of its memory.
    links: bytes/s of all its links to other chips together.
  """

  kind: str
  flops: float
  memory: float | None = None
  bandwidth: float | None = None
  links: float | None = None


# https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e), and NVIDIA's data
# sheets, whose numbers with sparsity, and of links in both directions, are
# twice these. The first match counts.
CHIPS = (
  Chip('TPU v4', 275e12),
  Chip('TPU v5 lite', 197e12, 15.75, 819e9, 200e9),
  Chip('TPU v5e', 197e12, 15.75, 819e9, 200e9),
  Chip('TPU v5', 459e12, 95.74, 2765e9, 600e9),
  Chip('TPU v6', 918e12, 31.25, 1640e9, 448e9),
  Chip('NVIDIA A100', 312e12),
  Chip('NVIDIA H100 PCIe', 756e12),
  Chip('NVIDIA H100 NVL', 835e12),
  Chip('NVIDIA H100', 989e12, 59.36, 3352e9, 450e9),
  Chip('NVIDIA H200 NVL', 835e12),
  Chip('NVIDIA H200', 989e12, 104.85, 4800e9, 450e9),
  Chip('NVIDIA L40S', 362e12),
  Chip('NVIDIA L40', 181e12),
  Chip('NVIDIA L4', 121e12),
)


def find_chip(device_kind: str) -> Chip | None:
  """The table's entry for a `jax.Device.device_kind`, None if it has none."""
  return next(
    (chip for chip in CHIPS if device_kind.startswith(chip.kind)), None
  )


def peak_flops(device: jax.Device) -> float | None:
  """The FLOP/s of which model FLOPs utilisation (MFU) is a fraction.

  Returns:
    For a TPU or GPU the vendor's bfloat16 peak of one chip, None if it is not
    in the table. For a CPU, whose vendor states none, what
    `measure_matmul_flops` reaches (0.3 s), shared by the CPU's devices: MFU is
    then a fraction of the best matrix product.
  """
  if device.platform == 'cpu':
    return measure_matmul_flops(device) / jax.local_device_count()
  chip = find_chip(device.device_kind)
  return chip and chip.flops


@functools.cache
def measure_matmul_flops(
  device: jax.Device, size: int = 1024, seconds: float = 0.2
) -> float:
  """Best FLOP/s of a float32 product of `[size, size]` matrices, timed.

  A process measures a device once: its peak is the same in every stage.
  """
  x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
  matmul = jax.jit(jnp.matmul)
  matmul(x, x).block_until_ready()
  best, end = math.inf, time.monotonic() + seconds
  while time.monotonic() < end:
    begin = time.monotonic()
    matmul(x, x).block_until_ready()
    best = min(best, time.monotonic() - begin)
  return 2 * size**3 / best


def flops_per_step(
  lowered: jax.stages.Lowered,
  compiled: jax.stages.Compiled,
  num_devices: int,
  rounds: int = 1,
) -> float | None:
  """XLA's count of one call's FLOPs on one device, None if it has none.

  On a GPU the compiled program calls libraries, whose work XLA does not count:
  the program before compilation is counted, all but cuDNN's flash attention.

  The count has what rematerialisation computes again, and of packed levels on a
  TPU the products with zeros: MFU by it is an upper bound there. For a step
  without them see `tools.recipe_costs.count`.

  Args:
    lowered: the program before compilation, of all devices.
    compiled: the compiled program, of one device.
    num_devices: number of devices that the program is partitioned over.
    rounds: iterations of the loop that the program spends its time in; XLA
      counts one of them.
  """
  on_gpu = target.platform() == 'gpu'
  cost = (lowered if on_gpu else compiled).cost_analysis()
  if isinstance(cost, list):  # Some back ends give one for each program.
    cost = cost[0] if cost else None
  flops = (cost or {}).get('flops', 0.0)
  if on_gpu:
    flops /= num_devices
  return flops * rounds if flops > 0 else None


def count_flops(traced: jax.stages.Traced) -> float:
  """FLOPs of one call of a program on all devices; nothing is compiled.

  XLA counts the body of a loop once. Here it counts as often as the loop runs:
  the iterations of Muon, microbatches, sampling steps. A loop whose length only
  the run decides counts as one iteration, and branches as the most expensive.

  Args:
    traced: the program, of a jitted function.
  """
  return _with_loops(traced.jaxpr.jaxpr, _count_once(traced.lower()))


def _with_loops(jaxpr: core.Jaxpr, flops: float) -> float:
  """Adds the further iterations of its loops to XLA's count of a program."""
  for loop in _loops(jaxpr):
    body = loop.params['jaxpr']
    inputs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in body.in_avals)
    function = jax.jit(core.jaxpr_as_fun(body))
    once = _count_once(function.lower(*inputs))
    flops += loop.params['length'] * _with_loops(body.jaxpr, once) - once
  return flops


def _loops(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  """The loops of known length of a program that are in no other loop."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'scan':
      yield equation
      continue
    for part in _parts(list(equation.params.values())):
      yield from _loops(part)


def _parts(value: Any) -> Iterator[core.Jaxpr]:
  """The programs that an equation calls."""
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, list | tuple):
    for each in value:
      yield from _parts(each)


def _count_once(lowered: jax.stages.Lowered) -> float:
  return (lowered.cost_analysis() or {}).get('flops', 0.0)


def memory_in_use() -> dict[str, float]:
  """Memory of the fullest of this process's devices, in GiB.

  Returns:
    'device_memory_gib' now and 'device_memory_peak_gib' since the start of the
    process; nothing where devices do not tell, as CPUs.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  names = {
    'device_memory_gib': 'bytes_in_use',
    'device_memory_peak_gib': 'peak_bytes_in_use',
  }
  return {
    name: max(each[key] for each in stats) / 2**30
    for name, key in names.items()
    if all(key in each for each in stats)
  }
