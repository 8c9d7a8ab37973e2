"""CPU settings: cores as devices, and a restart with huge pages."""

import os
import pathlib
import subprocess
import sys

import pytest

from mdm_jax.runtime import cpu

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {
  key: value
  for key, value in os.environ.items()
  if key not in ('XLA_FLAGS', 'GLIBC_TUNABLES', 'JAX_PLATFORMS')
}


def output_of(*arguments, **environment):
  return subprocess.run(
    [sys.executable, *arguments],
    env=ENVIRONMENT | environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def test_cores_that_divide_every_batch_become_devices():
  assert (
    int(
      output_of(
        '-c',
        (
          # Of more cores that the machine has.
          'import os; os.cpu_count = lambda: 8; '
          'os.sched_getaffinity = lambda process: {0, 1, 2, 4, 5, 6}; '
          'from mdm_jax.runtime import cpu; cpu.use_cores([8, 12]); '
          'import jax; print(jax.device_count())'
        ),
      )
    )
    == 4
  )


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is on Linux')
@pytest.mark.parametrize(
  'environment, expected',
  [
    ({'JAX_PLATFORMS': 'cpu'}, 'glibc.malloc.hugetlb=1'),
    ({'JAX_PLATFORMS': 'cuda,cpu'}, ''),
    (
      {'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': 'glibc.malloc.check=0'},
      'glibc.malloc.check=0',
    ),
  ],
)
def test_a_program_restarts_once(tmp_path, environment, expected):
  program = tmp_path / 'program.py'
  program.write_text("""
import os, sys
print('begun', flush=True)
from mdm_jax.runtime import cpu
cpu.use_huge_pages()
print(os.environ.get('GLIBC_TUNABLES', ''), sys.argv[1:])
""")
  out = output_of(
    str(program), '--flag', 'two words', PYTHONPATH=str(ROOT), **environment
  ).splitlines()
  times = 2 if expected.endswith('hugetlb=1') else 1
  assert out == ['begun'] * times + [f"{expected} ['--flag', 'two words']"]


@pytest.mark.parametrize('name', ['main', 'evaluate', 'tools.bench'])
def test_commands_restart_with_huge_pages(name):
  line = output_of(
    '-c',
    f"""
import os, runpy
def execv(path, line):
  print(line[1:], flush=True)
  os._exit(0)
os.execv = execv
runpy.run_module('mdm_jax.{name}', run_name='__main__')
""",
    '--help',
    JAX_PLATFORMS='cpu',
  )
  assert line.startswith("['-c', ") and "'--help']" in line


@pytest.mark.parametrize(
  'platforms, expected', [('cpu', False), ('cuda,cpu', True), ('tpu', True)]
)
def test_accelerators_are_left_alone(monkeypatch, platforms, expected):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert cpu._may_have_accelerators() == expected
