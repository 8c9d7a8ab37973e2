"""What a process does to make the most of a CPU."""

import os
import subprocess
import sys
import types

import pytest

from mdm_jax import cpu


def output_of(code):
  environment = {key: value for key, value in os.environ.items()
                 if key != 'XLA_FLAGS'}
  return subprocess.run(
      [sys.executable, '-c', code], env=environment, capture_output=True,
      text=True, check=True).stdout


def test_cores_that_divide_every_batch_become_devices():
  assert int(output_of(
      'import os; os.cpu_count = lambda: 6; from mdm_jax import cpu; '
      'cpu.use_cores([8, 12]); import jax; print(jax.device_count())')) == 4


def test_memory_that_was_freed_is_not_cleared_again():
  # As much as a step needs, allocated and freed as XLA does, in a thread.
  assert int(output_of('''
import ctypes, resource, threading
from mdm_jax import cpu
cpu.keep_memory()
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = ctypes.c_void_p,
def step():
  block = libc.aligned_alloc(64, 2 ** 27)
  libc.memset(block, 1, 2 ** 27)
  libc.free(block)
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  thread = threading.Thread(target=step)
  thread.start()
  thread.join()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
''')) < 50  # Of 32768 pages.


@pytest.mark.parametrize('platforms, found', [
    ('cpu', False), ('cuda,cpu', True), ('tpu', True)])
def test_memory_is_not_kept_beside_accelerators(monkeypatch, platforms, found):
  monkeypatch.setattr(
      cpu.jax, 'config', types.SimpleNamespace(jax_platforms=platforms))
  assert cpu._may_have_accelerators() == found
