"""A long run that is harmed in every way ends like an undisturbed one.

  SOAK_STEPS=20000 python -m pytest -n 0 -m soak tests/test_soak.py -s

The run is harmed every 25 s, and a start takes about 10 s. With this number of
steps a stage, it takes some twenty minutes on two idle cores.
"""

import collections
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests import commands, toy
from tests.test_distributed import digest

ROOT = pathlib.Path(__file__).parents[1]
STEPS = int(os.environ.get('SOAK_STEPS', 20_000))
RECIPE = toy.recipe(
  2,
  STEPS,
  data__num_workers=1,
  log_every=100,
  sample_every=1000,
  checkpoint_every=50,
)
HARMS = ('kill', 'terminate', 'kill a worker', 'flip a bit')


def good_steps(workdir):
  """Committed steps of the newest stage that has any, newest first."""
  for stage in sorted((workdir / 'checkpoints').glob('*_*'), reverse=True):
    steps = [
      path
      for path in stage.iterdir()
      if path.name.isdigit() and (path / 'manifest.json').exists()
    ]
    if steps:
      return sorted(steps, key=lambda path: int(path.name), reverse=True)
  return []


def flip_a_bit(step, rng):
  path = rng.choice(
    sorted(
      path for path in step.rglob('*') if path.is_file() and path.stat().st_size
    )
  )
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def harm(how, supervisor, workdir, rng, flipped):
  """Does a harm if that is possible now, and returns whether it did."""
  runs = commands.children(supervisor.pid, 'mdm_jax.main')
  workers = runs and commands.children(runs[0], 'spawn_main')
  steps = good_steps(workdir)
  if not runs or (how == 'kill a worker' and not workers):
    return False
  if how == 'flip a bit':
    # One that it may fall back to must be left.
    if len(steps) < 2 or steps[0] in flipped or steps[1] in flipped:
      return False
    flip_a_bit(steps[0], rng)
    flipped.add(steps[0])
  try:
    os.kill(
      workers[0] if how == 'kill a worker' else runs[0],
      signal.SIGTERM if how == 'terminate' else signal.SIGKILL,
    )
  except ProcessLookupError:  # It has just ended.
    return False
  return True


@pytest.mark.soak
@commands.lists_processes
def test_a_harmed_run_ends_as_an_undisturbed_one(tmp_path):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(RECIPE)

  def start(workdir):
    with (tmp_path / f'{workdir.name}.log').open('w') as log:
      return subprocess.Popen(
        [
          sys.executable,
          'launch/supervise.py',
          f'--workdir={workdir}',
          '--attempts=30',
          '--pause=0.1',
          '--',
          sys.executable,
          '-m',
          'mdm_jax.main',
          f'--config={recipe}',
          f'--workdir={workdir}',
        ],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        start_new_session=True,
      )

  begin = time.monotonic()
  undisturbed, harmed = tmp_path / 'undisturbed', tmp_path / 'harmed'
  assert start(undisturbed).wait() == 0
  print(f'undisturbed: {time.monotonic() - begin:.0f} s')
  begin, rng = time.monotonic(), random.Random(0)
  done, flipped = collections.Counter(), set()
  harms = itertools.cycle(HARMS)
  supervisor = start(harmed)
  while supervisor.poll() is None:
    time.sleep(rng.uniform(5, 45))
    how = next(harms)
    done[how] += harm(how, supervisor, harmed, rng, flipped)
  print(f'harmed: {time.monotonic() - begin:.0f} s, {dict(done)}')
  assert supervisor.returncode == 0, (tmp_path / 'harmed.log').read_text()
  assert not commands.alive(supervisor.pid)
  stops = (tmp_path / 'harmed.log').read_text().count('exit code 75')
  assert 0 < stops <= done['terminate']
  assert min(done[how] for how in HARMS) > 0
  for stage in ('0_8', '1_16'):
    assert digest(harmed / 'checkpoints' / stage, STEPS) == (
      digest(undisturbed / 'checkpoints' / stage, STEPS)
    )
