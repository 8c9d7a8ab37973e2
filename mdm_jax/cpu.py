"""Makes the most of a CPU. For before JAX is used."""

from collections.abc import Sequence
import importlib.metadata
import importlib.util
import os
import sys

_TUNABLES = 'GLIBC_TUNABLES'


def use_huge_pages() -> None:
  """Starts this program anew, once, with huge pages for what it allocates.

  XLA's CPU client allocates all that a step computes, and frees it after the
  step; the system then clears it page by page, a sixth of a training step. It
  is glibc that can ask for pages of 2 MiB, if its environment says so when the
  process begins. Nothing happens where JAX may use anything but a CPU, where
  the variable is set already, or without Linux.
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
  """Makes JAX see a CPU's cores as devices, as many as divide every batch.

  A small network has few operations that are worth spreading over cores, but
  the examples of a batch always are. It changes nothing for accelerators, or
  where XLA_FLAGS sets the number.

  Args:
    parts: that each batch can be divided into.
  """
  import jax  # Slow, and not needed to begin anew.

  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  count = os.cpu_count() or 1
  while any(number % count for number in parts):
    count -= 1
  jax.config.update('jax_num_cpu_devices', count)


def _may_have_accelerators() -> bool:
  """Whether JAX is installed for, and allowed, more than a CPU."""
  if platforms := os.environ.get('JAX_PLATFORMS'):
    return platforms != 'cpu'
  return bool(
    importlib.metadata.entry_points(group='jax_plugins')
    or importlib.util.find_spec('libtpu')
  )
