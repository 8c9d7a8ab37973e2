"""Commands start quickly, and report a wrong flag in one line."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = '--config=configs/shapes_64.py:smoke'


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | variables,
  )


@pytest.mark.parametrize('module', ['main', 'sample', 'evaluate', 'demo'])
def test_nothing_slow_is_imported(module):
  result = run('-c', f'import sys, mdm_jax.{module}; print(*sys.modules)')
  loaded = set(result.stdout.split())
  assert 'absl.flags' in loaded
  assert not loaded & {
    'jax',
    'flax',
    'optax',
    'orbax',
    'grain',
    'tensorflow_datasets',
  }


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      [SMOKE, '--config.nonsense=1'],
      '--config.nonsense=1: no such key (nonsense)',
    ),
    (
      [SMOKE, '--config.data.nonsense=1'],
      '--config.data.nonsense=1: no such key (data.nonsense)',
    ),
    (
      [SMOKE, '--config.stages[9].steps=1'],
      '--config.stages[9].steps=1: no such key',
    ),
    (
      [SMOKE, '--config.seed=abc'],
      '--config.seed=abc: give an integer from 0 to',
    ),
    ([SMOKE, '--nonsense=1'], "Unknown command line flag 'nonsense'"),
    (
      [SMOKE, '--num_processes=2', '--process_id=1'],
      '--num_processes needs --distributed: give both.',
    ),
    (['--config=configs/nonsense.py'], 'configs/nonsense.py'),
    (
      ['--config=configs/nonsense.py', '--config.seed=1'],
      'configs/nonsense.py',
    ),
    ([], '--config is missing: give a value.'),
  ],
)
def test_bad_flag(arguments, message):
  result = run('-m', 'mdm_jax.main', *arguments)
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line


def test_mistake_in_a_recipe_is_placed(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(
    'from configs import common\n'
    'def get_config():\n'
    '  return common.get_config().sampeler\n'
  )
  result = run('-m', 'mdm_jax.main', f'--config={path}')
  assert result.returncode == 1
  assert result.stderr == (
    f'error: --config={path}: {path}, line 3: no such key (sampeler): '
    'did you mean sampler? configs/common.py has all keys.\n'
  )


def test_the_configuration_is_printed_without_devices_or_data(tmp_path):
  result = run(
    '-m',
    'mdm_jax.main',
    SMOKE,
    f'--workdir={tmp_path}/run',
    '--print_config',
    '--config.stages[1].steps=7',
    '--config.data.name=tars',  # There are none.
    JAX_PLATFORMS='nonsense',
  )
  assert (result.returncode, result.stderr) == (0, '')
  first, *lines, last = result.stdout.splitlines()
  assert first == f'# {SMOKE} --workdir={tmp_path}/run'
  assert lines[:3] == ['seed: 0', "dtype: 'float32'", 'mesh:']
  changed = [line for line in lines if 'command line' in line]
  assert [' '.join(line.split()) for line in changed] == [
    "name: 'tars' # command line; recipe: 'shapes'; default: 'shapes'",
    'steps: 7 # command line; recipe: 6; default: 100000',
  ]
  assert last.startswith(f'# {tmp_path}/run has no run yet')
  assert not (tmp_path / 'run').exists()


def test_bad_value_ends_in_one_line(tmp_path):
  result = run(
    '-m',
    'mdm_jax.main',
    SMOKE,
    f'--workdir={tmp_path}',
    '--config.dtype=float8',
  )
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith("error: dtype='float8'")
  assert 'Traceback' not in result.stderr


def test_sample_without_a_workdir(tmp_path):
  result = run(
    '-m',
    'mdm_jax.sample',
    f'--workdir={tmp_path}/nonsense',
    '--prompt=a red ring',
  )
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith(
    f'error: --workdir={tmp_path}/nonsense: there is no such directory.'
  )
  assert 'Traceback' not in result.stderr
