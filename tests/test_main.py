"""Commands start quickly, and report a wrong flag in one line."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = '--config=configs/shapes_64.py:smoke'


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
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
    'clu',
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
      '--config.data.nonsense=1: no such key (nonsense)',
    ),
    (
      [SMOKE, '--config.stages[9].steps=1'],
      '--config.stages[9].steps=1: no such key',
    ),
    ([SMOKE, '--config.seed=abc'], 'flag --config.seed=abc'),
    ([SMOKE, '--nonsense=1'], "Unknown command line flag 'nonsense'"),
    (['--config=configs/nonsense.py'], 'configs/nonsense.py'),
    (
      ['--config=configs/nonsense.py', '--config.seed=1'],
      'configs/nonsense.py',
    ),
    ([], 'Flag --config must have a value'),
  ],
)
def test_bad_flag(arguments, message):
  result = run('-m', 'mdm_jax.main', *arguments)
  assert result.returncode == 1
  first, *rest = result.stderr.strip().splitlines()
  assert message in first
  assert rest in ([], ['Pass --helpshort or --helpfull to see help on flags.'])


def test_mistake_in_a_recipe_is_traced(tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(
    'from configs import common\n'
    'def get_config():\n'
    '  return common.get_config().sampeler\n'
  )
  result = run('-m', 'mdm_jax.main', f'--config={path}')
  assert result.returncode == 1
  assert f'"{path}", line 3' in result.stderr
  assert 'sampeler' in result.stderr.splitlines()[-1]


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
    f'error: {tmp_path}/nonsense/config.json does not exist'
  )
  assert 'Traceback' not in result.stderr
