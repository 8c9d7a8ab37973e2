"""Makes the most of a CPU. For before JAX is used."""

from collections.abc import Sequence
import ctypes
import importlib.metadata
import importlib.util
import os

import jax

# Of mallopt, in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def prepare(parts: Sequence[int]) -> None:
  """Makes every core work, and work with memory that is there already.

  Args:
    parts: that each batch can be divided into.
  """
  use_cores(parts)
  if not _may_have_accelerators():
    keep_memory()


def use_cores(parts: Sequence[int]) -> None:
  """Makes JAX see a CPU's cores as devices, as many as divide every batch.

  A small network has few operations that are worth spreading over cores, but
  the examples of a batch always are. It changes nothing for accelerators, or
  where XLA_FLAGS sets the number.

  Args:
    parts: that each batch can be divided into.
  """
  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  count = os.cpu_count() or 1
  while any(number % count for number in parts):
    count -= 1
  jax.config.update('jax_num_cpu_devices', count)


def keep_memory() -> None:
  """Lets this process keep what it frees; without glibc it does nothing.

  XLA's CPU client allocates all that a step computes, and frees it after the
  step. glibc would ask the system for it each time, which clears it page by
  page: a sixth of a training step. One arena, as only the first can do this.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # As an unsigned number, the largest.


def _may_have_accelerators() -> bool:
  """Whether JAX is installed for, and allowed, more than a CPU."""
  if jax.config.jax_platforms:
    return jax.config.jax_platforms != 'cpu'
  return bool(importlib.metadata.entry_points(group='jax_plugins')
              or importlib.util.find_spec('libtpu'))
