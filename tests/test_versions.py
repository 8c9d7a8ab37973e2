"""Runs of earlier versions are continued, sampled and evaluated by this one.

`data/runs` holds runs that were killed in the middle of their last stage, and
what the version that began them made of them; the noise of samples was another
one at 388c729, so that its sample is that of 58532d1. CONTRIBUTING.md says how
to add a run. None may ever be changed.
"""

import json
import pathlib
import re
import tarfile

import numpy as np
from PIL import Image
import pytest

from mdm_jax.checkpoint import manifest
from tests import commands

RUNS = pathlib.Path(__file__).parent / 'data' / 'runs'
# What the log says of what a run lacks, how the command line continues it, and
# the post-hoc EMA that it then has.
CASES = {
  '388c729': (
    ["model.levels[].remat='none'", "text.padding='max_length'"],
    'whose state had no guard and no lags: they begin with zeros.',
    ['--config.averages.widths=(0.1,)', '--config.averages.snapshot_every=3'],
    0.1,
  ),
  '58532d1': (["diffusion.level_times='shared'"], None, [], 0.1),
}
# Of losses. Another JAX rounds in another order.
TOLERANCE = 1e-3


def run(module: str, *arguments) -> str:
  """Runs a command to its end on one device: its log."""
  process = commands.run(module, *arguments, env=commands.on_devices(1))
  assert process.returncode == 0, process.stderr
  assert 'Traceback' not in process.stderr
  return process.stdout + process.stderr


def sample(workdir, expected, output, *flags) -> np.ndarray:
  """An image of the run's prompt."""
  run(
    'mdm_jax.sample',
    f'--workdir={workdir}',
    f'--prompt={expected["prompt"]}',
    '--num_samples=1',
    f'--output={output}',
    *flags,
  )
  return np.asarray(Image.open(output / '0000_16.png')).astype(int)


def test_every_run_is_tested():
  assert {path.parent.name for path in RUNS.glob('*/*')} == {*CASES}


def unpack(name, directory) -> pathlib.Path:
  """A copy of a run: its working directory."""
  with tarfile.open(RUNS / name / 'run.tar.xz') as tar:
    tar.extractall(directory, filter='data')
  return directory / 'run'


@pytest.mark.parametrize('name', CASES)
def test_damage_to_a_run_of_an_earlier_version_is_found(name, tmp_path):
  (step,) = unpack(name, tmp_path).glob('checkpoints/*/3')
  assert manifest.problem(step) is None
  path = max(step.glob('state/d/*'))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  assert manifest.problem(step) == f'state/d/{path.name} has changed'


@pytest.mark.parametrize('name', CASES)
def test_a_run_of_an_earlier_version_goes_on(name, tmp_path):
  keys, state, flags, sigma_rel = CASES[name]
  expected = json.loads((RUNS / name / 'expected.json').read_text())
  workdir = unpack(name, tmp_path)
  config = f'--config={RUNS / name / "recipe.py"}', f'--workdir={workdir}'

  listed = run('mdm_jax.main', *config, '--print_config')
  assert '(refused)' not in listed
  image = sample(workdir, expected, tmp_path / 'samples')
  recorded = np.asarray(Image.open(RUNS / name / 'sample.png')).astype(int)
  assert abs(image - recorded).max() <= 2

  # Another Grain may shuffle in another order; this one does not.
  log = run('mdm_jax.main', *config, '--config.data.may_change=True', *flags)
  lines = [line for line in log.splitlines() if 'Keys added since' in line]
  assert len(lines) == bool(keys)
  assert all(key in lines[0] for key in keys)
  assert state is None or re.search(f'checkpoints/0_16/\\d .*{state}', log)
  assert f'continuing from step {expected["step"]}' in log
  metrics = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  losses = {
    str(line['step']): line['loss'] for line in metrics if 'loss' in line
  }
  assert losses == pytest.approx(expected['losses'], rel=TOLERANCE)

  output = tmp_path / 'evaluation.json'
  run(
    'mdm_jax.evaluate',
    f'--workdir={workdir}',
    '--metrics=loss',
    f'--output={output}',
  )
  measured = json.loads(output.read_text())['metrics']
  held_out = {key: measured[key] for key in expected['held_out']}
  assert held_out == pytest.approx(expected['held_out'], rel=TOLERANCE)
  # The new EMA differs from the other, which has hardly moved.
  other = sample(workdir, expected, tmp_path / 'x', f'--sigma_rel={sigma_rel}')
  assert abs(other - recorded).max() > 2
