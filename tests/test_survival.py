"""A killed writer loses nothing that was committed; a full disk is an error."""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

from etils import epath
import jax
import numpy as np
import pytest

from mdm_jax.checkpoint import saved_steps
from mdm_jax.inference import session
from mdm_jax.runtime import directory_lock
from tests import commands, toy
from tests.test_distributed import digest

ROOT = pathlib.Path(__file__).parents[1]

# Restores, prints the step, then saves every step. Each line of its input
# forks a writer, so that JAX is imported only once.
_WRITER = """
import os, sys
from absl import logging
import jax
import numpy as np
import orbax.checkpoint  # Lazily imported otherwise, by each writer.
from mdm_jax.checkpoint import manager, manifest

def content(step):
  return np.random.default_rng(step).standard_normal(2**18).astype(np.float32)

def write():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda step: jax.device_put(
      {'step': np.int32(step), 'w': content(step)}, sharding)
  checkpoints = manager.Checkpoints(
      sys.argv[1], save_interval=1, max_to_keep=2)
  step = 0
  if checkpoints.latest_step() is not None:
    state, extra = checkpoints.restore(jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        place(0)))
    step = extra['step']
    assert int(state['step']) == step
    np.testing.assert_array_equal(state['w'], content(step))
    assert step == 1 or manifest.exists(f'{sys.argv[1]}/{step}')
  print('restored', step, flush=True)
  while True:
    step += 1
    checkpoints.save(step, place(step), {'step': step})
    print('committed', step - 1, flush=True)  # Or the save had waited.

logging.set_verbosity(logging.FATAL)
for _ in sys.stdin:
  child = os.fork()
  if not child:
    write()
  print('writer', child, flush=True)
  os.waitpid(child, 0)
  print('killed', flush=True)
"""


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
  """A directory on a disk or in a bucket."""
  if request.param == 'disk':
    return epath.Path(tmp_path)
  return epath.Path(request.getfixturevalue('bucket').path)


@pytest.mark.parametrize('kills', [8, pytest.param(25, marks=pytest.mark.soak)])
def test_kills_at_random_moments(place, kills):
  directory = place / 'checkpoints' / '0_32'
  rng = random.Random(kills)
  process = subprocess.Popen(
    [sys.executable, '-c', _WRITER, directory],
    cwd=ROOT,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    bufsize=1,
  )
  too_long = threading.Timer(60 * kills, process.kill)
  too_long.start()
  last, interrupted = 0, 0
  for _ in range(kills):
    process.stdin.write('\n')
    told = dict(process.stdout.readline().split() for _ in range(2))
    restored = int(told['restored'])
    # Nothing is lost that was told; what is committed is told a bit later.
    assert last <= restored <= last + 2
    time.sleep(rng.uniform(0, 0.5))
    os.kill(int(told['writer']), signal.SIGKILL)
    last = restored
    # What it wrote last may be cut off.
    while not (line := process.stdout.readline()).endswith('killed\n'):
      last = int(line.removeprefix('committed '))
    steps = [
      path
      for path in (directory.iterdir() if directory.exists() else ())
      if path.name != str(last)
    ]
    interrupted += any(not (path / 'manifest.json').exists() for path in steps)
  process.stdin.close()
  assert process.wait() == 0
  too_long.cancel()
  assert interrupted  # Or no kill came during a save.
  assert not list(directory.glob('*.corrupt'))


def run_and_time(directory, *arguments, at='', act=None):
  """Runs a command to its end; calls `act(process)` at some words in its log.

  Returns:
    The exit code, the log, and the seconds from its last line to the end.
  """
  path = directory / 'log'
  with path.open('w') as log:
    process = commands.start(*arguments, stdout=log, stderr=log)
  while at not in path.read_text():
    assert process.poll() is None, path.read_text()
    time.sleep(0.02)
  if act:
    act(process)
  code = process.wait(600)
  return code, path.read_text(), time.time() - path.stat().st_mtime


@pytest.mark.processes
def test_a_run_in_a_bucket_ends_as_one_on_a_disk(tmp_path, bucket):
  """Although it is killed, and cannot save for a while."""
  recipe, here = tmp_path / 'recipe.py', epath.Path(bucket.path)
  recipe.write_text(
    toy.recipe(
      1,
      24,
      log_every=1,
      sample_every=24,
      checkpoint_every=8,
      averages__widths=(0.1,),
    )
  )

  def train(workdir, **harm):
    return run_and_time(
      tmp_path,
      'mdm_jax.main',
      f'--config={recipe}',
      f'--workdir={workdir}',
      **harm,
    )[:2]

  code, text = train(tmp_path / 'run')
  assert code == 0, text
  code, text = train(here, at='Saved step 8 ', act=commands.Fork.kill)
  assert code == -signal.SIGKILL
  with bucket.failing('upload.*checkpoints/0_8/16/', status=403) as fault:
    code, text = train(here)
  assert code == 0, text
  assert fault.hit
  assert 'continuing from step 8' in text
  assert 'checkpoints/0_8: saving step 16 failed (1 of ' in text
  assert 'no permission (' in text and 'Traceback' not in text
  stage = pathlib.Path('checkpoints', '0_8')
  assert saved_steps.finished_step(here / stage) == 24
  assert saved_steps.good_steps(here / stage) == [8, 24]
  assert digest(here / stage, 24) == digest(tmp_path / 'run' / stage, 24)
  for widths in ({}, {'sigma_rel': 0.2}):
    found, expected = (
      session.open_run(str(workdir), **widths).restore().params
      for workdir in (here, tmp_path / 'run')
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def fill(directory, what):
  """Fills a disk with blocks, or with files."""
  with pytest.raises(OSError, match='No space'):
    if what == 'files':
      for i in itertools.count():
        (directory / f'ballast{i}').touch()
    with (directory / 'ballast').open('wb', buffering=0) as file:
      while True:
        file.write(bytes(4096))


@pytest.mark.processes
@pytest.mark.parametrize('kind', ['tmpfs', 'ext4', 'ext4, files'])
def test_a_disk_that_fills_up_and_stays_full_ends_the_command(tmp_path, kind):
  """Each failed save, and the end of the command, is one log line."""
  disk = tmp_path / 'run' / 'checkpoints'
  disk.mkdir(parents=True)
  words = ['-t', 'tmpfs', '-o', 'size=32m', 'tmpfs']
  if kind != 'tmpfs':
    image = tmp_path / 'image'
    with image.open('wb') as file:
      file.truncate(2**25)
    if not shutil.which('mkfs.ext4'):
      pytest.skip('there is no mkfs.ext4')
    subprocess.run(['mkfs.ext4', '-q', '-F', '-m0', '-N256', image], check=True)
    words = ['-o', 'loop', image]
  mounted = subprocess.run(
    ['mount', *words, disk], capture_output=True, text=True
  )
  if mounted.returncode:
    pytest.skip(f'may not mount: {mounted.stderr}')
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(
    toy.recipe(
      1, 300, log_every=1, sample_every=300, checkpoint_every=1, save_failures=2
    )
  )

  try:
    code, text, seconds = run_and_time(
      tmp_path,
      'mdm_jax.main',
      f'--config={recipe}',
      f'--workdir={tmp_path / "run"}',
      at=' step 2/300 ',
      act=lambda _: fill(disk, 'files' if 'files' in kind else 'blocks'),
    )
  finally:
    subprocess.run(['umount', disk], check=True)
  assert code == 1
  lines = text.splitlines()
  first, second, last = (line for line in lines if ' in a row): ' in line)
  assert last == lines[-1]
  assert ' failed (1 of 2 in a row): ' in first
  assert ' failed (2 of 2 in a row): ' in second
  assert last.startswith('error: ') and ' failed (2 of 2 in a row)' in last
  assert 'Traceback' not in text
  assert seconds < 10


# Saves never end, and in one case a step fails while one is in flight.
_HANGS = """
import threading
from mdm_jax.checkpoint import manifest
from mdm_jax.training import monitor

manifest.write = lambda *_, **__: threading.Event().wait()
add = monitor.Monitor.add
def add_or_fail(self, step, values):
  if step == %d:
    raise KeyError('a defect')
  add(self, step, values)
monitor.Monitor.add = add_or_fail
"""


@pytest.mark.processes
@pytest.mark.parametrize('how', ['is stopped', 'has an error'])
def test_a_save_that_hangs_ends_with_its_limit(tmp_path, how):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(
    toy.recipe(
      1,
      300,
      log_every=1,
      sample_every=1000,
      checkpoint_every=100,
      watchdog__save=3,
    )
    + _HANGS % (110 if how == 'has an error' else 0)
  )
  code, text, seconds = run_and_time(
    tmp_path,
    'mdm_jax.main',
    f'--config={recipe}',
    f'--workdir={tmp_path / "run"}',
    at=' step 100/300 ',
    act=commands.Fork.terminate if how == 'is stopped' else None,
  )
  assert code == 70
  assert 'watchdog: save has not ended in 3 s, watchdog.save' in text
  assert seconds < 10


@pytest.mark.processes
def test_a_second_run_is_refused(tmp_path):
  (tmp_path / 'recipe.py').write_text(toy.recipe(1, 8))
  workdir = tmp_path / 'run'
  with directory_lock.holding(workdir):
    result = commands.run(
      'mdm_jax.main',
      f'--config={tmp_path / "recipe.py"}',
      f'--workdir={workdir}',
    )
    assert os.listdir(workdir) == ['.lock']
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith(
    f'error: {workdir} is in use: process {os.getpid()} on '
  )
  assert 'Traceback' not in result.stderr


@commands.lists_processes
def wait_for(run, condition):
  while not condition():
    assert run.poll() is None
    time.sleep(0.05)


@pytest.mark.processes
@pytest.mark.parametrize('victim', ['a worker', 'all', 'SIGTERM to all'])
def test_no_worker_outlives_its_run(tmp_path, victim):
  """Nor does a run outlive a worker; a broken TensorBoard ends neither."""
  recipe, workdir = tmp_path / 'recipe.py', tmp_path / 'run'
  recipe.write_text(
    toy.recipe(
      1,
      100_000,
      data__num_workers=2,
      log_every=1,
      sample_every=100_000,
      checkpoint_every=100_000,
    )
  )
  lines = workdir / 'metrics.jsonl'
  with (tmp_path / 'log').open('w') as log:
    run = commands.start(
      'mdm_jax.main',
      f'--config={recipe}',
      f'--workdir={workdir}',
      stdout=log,
      stderr=log,
    )
  wait_for(run, (workdir / 'config.json').exists)
  # Training compiles now. Earlier, a file in this place would be refused.
  (workdir / 'tensorboard').write_text('no directory')
  wait_for(run, lambda: lines.exists() and '"step": 20,' in lines.read_text())
  workers = commands.children(run.pid, 'spawn_main')
  assert len(workers) == 2
  if victim == 'SIGTERM to all':  # As Slurm does it.
    os.killpg(run.pid, signal.SIGTERM)
  else:
    os.kill(workers[1] if victim == 'a worker' else run.pid, signal.SIGKILL)
  code = run.wait(600)
  text = (tmp_path / 'log').read_text()
  if victim == 'a worker':
    assert code == 1
    assert 'error: Worker process was terminated' in text
  if victim == 'SIGTERM to all':
    assert code == 75
    [step] = (workdir / 'checkpoints' / '0_8').glob('*/manifest.json')
    assert int(step.parent.name) >= 20
  assert 'Traceback' not in text
  assert 'resource_tracker' not in text
  assert commands.all_end(run.pid)
  assert 'TensorBoard cannot be written' in text
  steps = [
    line['step']
    for line in map(json.loads, lines.read_text().splitlines())
    if 'loss' in line
  ]
  assert steps == [*range(1, len(steps) + 1)]
