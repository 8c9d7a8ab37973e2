"""Several real processes that train, stop and end together."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time

from etils import epath
import jax
import numpy as np
import pytest

from mdm_jax.checkpoint import restore, saved_steps
from tests import commands, toy

KEEPING = dict(
  averages__widths=(0.05, 0.1),
  averages__snapshot_every=10,
  eval__best_metric='held_out_loss_8',
)
CONFIG = toy.recipe(
  1,
  60,
  log_every=1,
  sample_every=60,
  checkpoint_every=10,
  eval__every=30,
  eval__loss_every=20,
  **KEEPING,
)
TWO_STAGES = toy.recipe(
  2,
  40,
  log_every=1,
  sample_every=40,
  checkpoint_every=10,
  checkpoint_minutes=0.005,  # So that both kinds of saves occur.
  eval__every=40,
  **KEEPING,
)

# Seconds, also on a machine that is busy with other things; without what is
# tested, it would take longer.
SOON = 80

# JAX's, of the process that it misses.
MESSAGE = r'Task 2 heartbeat timeout|sending heartbeats\):\s+2'


class Processes:
  """`mdm_jax.main` in several processes, with two devices or one each.

  Processes in `absent` are not started. With `slurm`, Slurm's variables give
  their number and indices.
  """

  def __init__(
    self,
    directory,
    workdir,
    count,
    *flags,
    absent=(),
    slurm=False,
    config=CONFIG,
    env=None,
    real=False,
  ):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    recipe = directory / 'toy.py'
    recipe.write_text(config)
    self.workdir = workdir
    self.outputs, self.all = [], []
    for i in range(count):
      if i in absent:
        continue
      variables, joined = commands.on_devices(2 // count or 1), ()
      if count > 1:
        joined = ('--distributed',)
      if slurm:
        variables |= {
          'SLURM_JOB_ID': '1',
          'SLURM_STEP_NODELIST': 'localhost,other',
          'SLURM_NTASKS': str(count),
          'SLURM_PROCID': str(i),
          'SLURM_LOCALID': str(i),
          'JAX_COORDINATOR_PORT': str(port),
        }
      elif count > 1:
        joined += (
          f'--coordinator=127.0.0.1:{port}',
          f'--num_processes={count}',
          f'--process_id={i}',
        )
      self.outputs.append(directory / f'{workdir.name}_{i}.log')
      with self.outputs[-1].open('w') as file:
        self.all.append(
          commands.start(
            'mdm_jax.main',
            f'--config={recipe}',
            f'--workdir={workdir}',
            *joined,
            *flags,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables | (env or {}),
            real=real,
          )
        )

  def wait(self, seconds=600):
    """Waits for all processes, and returns their exit codes."""
    try:
      return [process.wait(seconds) for process in self.all]
    finally:
      for process in self.all:
        process.kill()

  def text(self):
    return '\n'.join(path.read_text() for path in self.outputs)

  def wait_for(self, words):
    """Waits until the log or the metrics contain these words."""
    path = self.workdir / 'metrics.jsonl'
    end = time.monotonic() + 600
    while time.monotonic() < end:
      if words in self.outputs[0].read_text() or (
        path.exists() and words in path.read_text()
      ):
        return
      assert self.all[0].poll() is None, self.text()
      time.sleep(0.02)
    raise AssertionError(self.text())

  def wait_for_step(self, step):
    """Waits until a training step has been logged."""
    self.wait_for(f'"step": {step},')


def digest(directory, step):
  """SHA-256 of the contents of a stage's last checkpoint, of a given step."""
  assert saved_steps.latest_step(directory) == step
  sha = hashlib.sha256()
  for key in ('step', 'params', 'ema', 'opt_state', 'guard', 'lags'):
    item = restore.restore_item(directory, None, key)
    for leaf in jax.tree.leaves(item):
      sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


def losses(workdir):
  lines = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """The working directory of an undisturbed run of two processes."""
  directory = tmp_path_factory.mktemp('straight')
  processes = Processes(directory, directory / 'run', 2, real=True)
  assert processes.wait() == [0, 0], processes.text()
  return directory / 'run'


@pytest.fixture(scope='module')
def two_stages(tmp_path_factory):
  """Digests of the checkpoints of an undisturbed run in two stages."""
  directory = tmp_path_factory.mktemp('two_stages')
  processes = Processes(directory, directory / 'run', 2, config=TWO_STAGES)
  assert processes.wait() == [0, 0], processes.text()
  return digests(directory / 'run')


def digests(workdir):
  return [
    digest(workdir / 'checkpoints' / name, 40) for name in ('0_8', '1_16')
  ]


@pytest.mark.processes
@pytest.mark.parametrize('count', [1, 2])
def test_stopped_anywhere_it_ends_as_if_left_alone(two_stages, tmp_path, count):
  workdir = tmp_path / 'run'

  def begin(**env):
    return Processes(tmp_path, workdir, count, config=TWO_STAGES, env=env)

  last, first, both = [-1], [0], range(count)
  for words, receivers, stage in [
    ('px, 40 steps', last, None),  # It compiles.
    ('"stage": "8", "step": 20,', last, '0_8'),
    ('"stage": "8", "step": 40,', first, None),  # It is about to draw.
    ('"stage": "16", "step": 20,', both, '1_16'),
    ('Sampling 8 held-out prompts', last, None),
  ]:  # At the stage's end.
    # What another test has compiled would be read back at once.
    compiles = words == 'px, 40 steps'
    processes = begin(JAX_ENABLE_COMPILATION_CACHE=not compiles)
    processes.wait_for(words)
    for receiver in receivers:
      processes.all[receiver].send_signal(signal.SIGTERM)
      time.sleep(0.5)  # They are asked one after the other.
    sent = time.monotonic()
    assert processes.wait() == [75] * count, processes.text()
    assert time.monotonic() - sent < SOON
    assert 'Traceback' not in processes.text()
    if stage:
      step = saved_steps.latest_step(workdir / 'checkpoints' / stage)
      assert 20 <= step < 40
      assert (
        f'"stage": "{stage[2:]}", "step": {step + 1},'
        not in (workdir / 'metrics.jsonl').read_text()
      )
  processes = begin()
  assert processes.wait() == [0] * count, processes.text()
  for name in ('8_40', '16_40'):
    assert (workdir / 'samples' / f'{name}.png').exists()
  assert digests(workdir) == two_stages
  for name in ('0_8', '1_16'):
    assert saved_steps.good_steps(workdir / 'averages' / name) == [
      10,
      20,
      30,
      40,
    ]
    assert saved_steps.good_steps(workdir / 'best' / name) == [40]


@pytest.mark.processes
def test_in_a_bucket_they_end_as_on_a_disk(two_stages, tmp_path, bucket):
  workdir = epath.Path(bucket.path) / 'run'

  def begin():
    return Processes(tmp_path, workdir, 2, config=TWO_STAGES)

  processes = begin()
  processes.wait_for('Saved step 10 ')
  processes.all[1].send_signal(signal.SIGTERM)
  assert processes.wait() == [75, 75], processes.text()
  step = saved_steps.latest_step(workdir / 'checkpoints' / '0_8')
  assert 10 <= step < 40
  processes = begin()
  processes.wait_for("'16'  step 25/40 ")
  for process in processes.all:
    process.kill()
  processes.wait()
  processes = begin()
  assert processes.wait() == [0, 0], processes.text()
  assert 'Traceback' not in processes.text()
  assert digests(workdir) == two_stages
  assert not list(workdir.glob('checkpoints/*/*.corrupt'))


@pytest.mark.processes
def test_when_one_dies_the_other_ends_and_one_goes_on(straight, tmp_path):
  workdir = tmp_path / 'run'
  processes = Processes(tmp_path, workdir, 2, '--heartbeat=5')
  processes.wait_for_step(25)
  processes.all[1].kill()
  begin = time.monotonic()
  codes = processes.wait()
  assert codes[0] not in (0, 75), processes.text()
  assert time.monotonic() - begin < SOON
  # On one host what two have begun.
  again = Processes(tmp_path, workdir, 1)
  assert again.wait() == [0], again.text()
  assert 'continuing from step 20' in again.text()
  expected, found = losses(straight), losses(workdir)
  np.testing.assert_allclose(
    [found[step] for step in range(21, 61)],
    [expected[step] for step in range(21, 61)],
    rtol=1e-6,
  )
  assert saved_beside(straight)[0] == [*range(10, 70, 10)]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    saved_beside(workdir),
    saved_beside(straight),
  )


def saved_beside(workdir):
  """Steps of the snapshots, the last one, the best step, and its metric."""
  averages, best = workdir / 'averages' / '0_8', workdir / 'best' / '0_8'
  return (
    saved_steps.good_steps(averages),
    restore.restore_item(averages, 60, '0.1'),
    saved_steps.good_steps(best),
    restore.read_extra(best)['value'],
  )


@commands.lists_processes
def test_an_error_in_one_stops_the_other(tmp_path):
  processes = Processes(
    tmp_path, tmp_path / 'run', 2, '--config.data.num_workers=1'
  )
  processes.wait_for_step(13)
  [worker] = commands.children(processes.all[1].pid, 'spawn_main')
  os.kill(worker, signal.SIGKILL)
  begin = time.monotonic()
  # Not 75, after which schedulers start it again, without end.
  assert processes.wait() == [1, 1], processes.text()
  assert time.monotonic() - begin < SOON
  assert 'error: Worker process was' in processes.outputs[1].read_text()
  assert 'Another process ended with an error' in (
    processes.outputs[0].read_text()
  )
  assert 'Traceback' not in processes.text()
  for process in processes.all:
    assert commands.all_end(process.pid)


@pytest.mark.processes
def test_a_hanging_peer_is_not_waited_for(tmp_path):
  processes = Processes(
    tmp_path, tmp_path / 'run', 2, '--config.watchdog.step=20'
  )
  processes.wait_for_step(13)
  processes.all[1].send_signal(signal.SIGSTOP)
  begin = time.monotonic()
  assert processes.all[0].wait(600) == 70, processes.text()
  assert time.monotonic() - begin < SOON
  processes.all[1].kill()
  text = processes.outputs[0].read_text()
  assert 'watchdog: step has not ended in 20 s, watchdog.step' in text
  assert 'in train_stage' in text


@pytest.mark.processes
def test_of_four_one_dies_and_the_others_end_with_a_message(straight, tmp_path):
  workdir = tmp_path / 'run'
  processes = Processes(tmp_path, workdir, 4, '--heartbeat=10', slurm=True)
  processes.wait_for_step(13)
  processes.all[2].kill()
  begin = time.monotonic()
  codes = processes.wait()
  assert codes.pop(2) == -signal.SIGKILL
  assert not {0, 75} & set(codes), processes.text()
  assert time.monotonic() - begin < SOON
  for i in (0, 1, 3):
    text = processes.outputs[i].read_text()
    assert re.search(MESSAGE, text), text
  # Process 0 alone tells and writes.
  assert [' step 9/60 ' in path.read_text() for path in processes.outputs] == [
    True,
    False,
    False,
    False,
  ]
  found, expected = losses(workdir), losses(straight)
  assert len(found) >= 13
  np.testing.assert_allclose(
    list(found.values()), [expected[step] for step in found], rtol=1e-5
  )


@pytest.mark.processes
def test_of_three_one_never_comes(tmp_path):
  processes = Processes(
    tmp_path, tmp_path / 'run', 3, '--arrival=20', absent=(1,)
  )
  assert processes.wait() == [1, 1], processes.text()
  for path in processes.outputs:
    assert path.read_text().splitlines()[-1] == (
      'error: Of 3 processes, 1 did not arrive within 20 s: see their own '
      'logs, or give more time with --arrival.'
    )
    assert 'Traceback' not in path.read_text()


def test_who_cannot_be_joined_is_named(tmp_path):
  (tmp_path / 'toy.py').write_text(CONFIG)
  done = commands.run(
    'mdm_jax.main',
    '--distributed',
    f'--config={tmp_path}/toy.py',
    f'--workdir={tmp_path}/run',
  )
  assert done.returncode == 1
  assert 'error: The other processes cannot be joined' in done.stderr
  assert '--coordinator=HOST:PORT' in done.stderr
  assert 'Traceback' not in done.stderr
