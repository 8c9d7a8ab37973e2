"""Settings that make JAX faster on CPUs. Call them before JAX is used."""

from collections.abc import Sequence
import contextlib
import importlib.metadata
import importlib.util
import os
import sys

_TUNABLES = 'GLIBC_TUNABLES'


def use_huge_pages() -> None:
  """Restarts this program, once, with huge pages for its memory.

  XLA's CPU client allocates the arrays of a step, and frees them after it. The
  kernel clears their memory page by page, which takes a sixth of a training
  step.
  glibc requests pages of 2 MiB instead if GLIBC_TUNABLES says so when the
  process starts. Does nothing where JAX may use an accelerator, where the
  variable is set already, or on another system than Linux.
  """
  if (
    sys.platform != 'linux'
    or _TUNABLES in os.environ
    or _may_have_accelerators()
  ):
    return
  os.environ[_TUNABLES] = 'glibc.malloc.hugetlb=1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_cores(parts: Sequence[int]) -> None:
  """Makes JAX use CPU cores as devices, as many as divide every batch.

  Few operations of a small network are large enough to spread over cores, but
  the examples of a batch can always be spread. Changes nothing for
  accelerators, where XLA_FLAGS sets the number of devices, or once JAX is in
  use.

  Args:
    parts: for each batch, the number of equal parts that it divides into.
  """
  import jax  # Slow, and `use_huge_pages` does not need it.

  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  # Those that a scheduler or a container gives to this process.
  has_affinity = hasattr(os, 'sched_getaffinity')
  count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
  while any(number % count for number in parts):
    count -= 1
  with contextlib.suppress(RuntimeError):  # JAX is in use, as in a notebook.
    jax.config.update('jax_num_cpu_devices', count)


def _may_have_accelerators() -> bool:
  """Whether JAX may find devices other than CPUs."""
  if platforms := os.environ.get('JAX_PLATFORMS'):
    return platforms != 'cpu'
  return bool(
    importlib.metadata.entry_points(group='jax_plugins')
    or importlib.util.find_spec('libtpu')
  )
