"""The notebook runs from its first cell to its last, and installs itself."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests import commands

ROOT = pathlib.Path(__file__).parents[1]
CELLS = [
  cell
  for cell in json.loads((ROOT / 'docs/quickstart.ipynb').read_text())['cells']
  if cell['cell_type'] == 'code'
]
CODE = [''.join(cell['source']) for cell in CELLS]
STEPS = re.findall(r'\.steps = (\d+)', '\n'.join(CODE))  # of the stages


def test_every_cell_runs(tmp_path):
  code = '\n\n'.join(CODE)
  # A smaller network that is trained for fewer steps shows as much.
  for old, new in (
    ('shapes_64.get_config()', "toy.shrink(shapes_64.get_config('smoke'))"),
    (f'steps = {STEPS[0]}', 'steps = 8'),
    (f'steps = {STEPS[1]}', 'steps = 8'),
    ('num_prompts = 64', 'num_prompts, config.eval.loss_every = 8, 0'),
    ('log_every = 100', 'log_every = config.sample_every = 100'),
    ('num_samples=64', 'num_samples=8'),
    ('steps=6', 'steps=4'),
  ):
    assert old in code
    code = code.replace(old, new)
  code = f"""
from tests import toy

{code}
assert [level.shape[:2] for level in samples.levels] == [(6, 8), (6, 16)]
assert [level.shape for level in steps[-1]] == [(8, 8, 3), (16, 16, 3)]
assert len(steps) == 4
assert abs(coarse[0] - both[0]).max() == abs(both[1]).max() == 0
"""
  result = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,  # As if outside of the clone.
    capture_output=True,
    text=True,
    env=os.environ
    | {'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path)}
    | commands.on_devices(1),
  )
  assert result.returncode == 0, result.stderr
  assert 'accuracy_all' in result.stdout
  # Progress is logged, and nothing of what libraries log.
  assert "stage 2/2 '64'" in result.stderr
  assert 'CheckpointManager' not in result.stderr


def test_its_log_is_that_of_commands(tmp_path):
  code = """
from mdm_jax.report import console, progress
console.setup_logging()
progress.Progress('a stage', 0, 9, 8).report(
  1, loss=0.0, parts={}, grad_norm=0.0, learning_rate=0.0
)
"""
  result = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )
  (line,) = result.stderr.splitlines()
  assert re.match(r'\d\d:\d\d:\d\d a stage  step 1/9', line)


def test_outputs_are_stored():
  shown = [output for cell in CELLS for output in cell['outputs']]
  pictures = [each for each in shown if 'image/png' in each.get('data', {})]
  assert len(pictures) == 3
  assert not [each for each in shown if each['output_type'] == 'error']
  # What the cells print is of these cells.
  text = ''.join(''.join(each.get('text', '')) for each in shown)
  assert f'of stage 64 at step {STEPS[1]}' in text
  assert 'largest difference of the coarse output: 0.0' in text
  assert (ROOT / 'docs/quickstart.ipynb').stat().st_size < 2**20


def test_the_address_is_that_of_the_project():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  address = project['urls']['Repository']
  assert f"REPOSITORY = '{address}'\n" in CODE[0]


def test_without_the_package_it_says_what_to_do(tmp_path):
  result = subprocess.run(
    [sys.executable, '-S', '-c', CODE[0]],  # Without installed packages.
    cwd=tmp_path,
    capture_output=True,
    text=True,
    env={name: os.environ[name] for name in os.environ.keys() - {'PYTHONPATH'}},
  )
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('mdm_jax is not installed: run `pip install .` in a')


@pytest.mark.parametrize('gpu, extra', [(None, ''), ('/bin/nvidia', '[cuda]')])
def test_it_installs_the_package(tmp_path, monkeypatch, gpu, extra):
  called = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(shutil, 'which', lambda name: gpu)
  monkeypatch.setattr(subprocess, 'run', lambda *args, **_: called.append(args))
  exec(CODE[0].replace('github.com/OWNER', 'github.com/someone'), {})
  assert called == [
    (
      [sys.executable, '-m', 'pip', 'install']
      + [f'mdm_jax{extra} @ git+https://github.com/someone/mdm_jax'],
    )
  ]
