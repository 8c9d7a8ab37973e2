"""Real signals to real processes: their exit codes, and how soon they exit."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mdm_jax.runtime import preemption
from tests import commands, toy

ROOT = pathlib.Path(__file__).parents[2]
# Seconds; a lenient limit, since the machine may be busy with other tests.
SOON = 30
# `work` stays in C code for minutes, as a compilation does.
BUSY = """
import hashlib, os, time
from absl import logging
from mdm_jax.runtime import preemption
logging.set_verbosity('info')
def say(word):
  os.write(1, word.encode() + b'\\n')
def work(rounds=10**9):
  hashlib.pbkdf2_hmac('sha256', b'', b'', rounds)
stop = preemption.StopHandler(lambda: say('finish'))
"""


@pytest.fixture
def start():
  """(arguments of Python) -> a process, with its output in a pipe."""
  started = []

  def start(*arguments):
    started.append(
      subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    )
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.wait()


@pytest.fixture
def train():
  """(flags, env=None) -> a training, with its output in a pipe."""
  started = []

  def train(*flags, env=None):
    started.append(
      commands.start(
        'mdm_jax.main',
        *flags,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    )
    return started[-1]

  yield train
  for process in started:
    process.kill()


def read_until(process, word):
  lines = []
  for line in process.stdout:
    lines.append(line)
    if word in line:
      return lines
  raise AssertionError(f'no {word!r} in ' + ''.join(lines))


def end(process, number=signal.SIGTERM):
  """Sends a signal -> the exit code, the rest of the output, seconds."""
  begin = time.monotonic()
  process.send_signal(number)
  output, _ = process.communicate(timeout=600)
  return process.returncode, output, time.monotonic() - begin


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_c_code_at_once(start, number):
  process = start('-c', BUSY + "say('ready'); work()")
  read_until(process, 'ready')
  code, output, seconds = end(process, number)
  assert code == 75
  assert output.splitlines()[-1] == 'finish'
  assert seconds < SOON


def test_a_deferred_stop_waits_for_allow(start):
  process = start(
    '-c',
    BUSY
    + """
stop.defer()
say('ready')
while not stop.requested:
  time.sleep(0.01)
say('saved')
stop.allow()
say('never')
""",
  )
  read_until(process, 'ready')
  code, output, _ = end(process)
  assert code == 75
  words = [line for line in output.splitlines() if line.isalpha()]
  assert words == ['saved', 'finish']


def test_second_signal_does_not_wait(start):
  process = start('-c', BUSY + "stop.defer(); say('ready'); work()")
  read_until(process, 'ready')
  process.terminate()
  read_until(process, 'the same signal again')
  time.sleep(2 * preemption._SAME)
  code, output, seconds = end(process)
  assert (code, output) == (75, '')
  assert seconds < SOON


def test_waits_for_pending_saves(start):
  process = start(
    '-c',
    BUSY
    + """
stop.defer(wait=lambda: (time.sleep(0.5), say('saved')))
stop.allow()
say('ready')
work()
""",
  )
  read_until(process, 'ready')
  code, output, _ = end(process)
  assert code == 75
  assert output.splitlines()[-2:] == ['saved', 'finish']


def test_close_restores_the_signal_handlers(start):
  process = start('-c', BUSY + "stop.close(); say('ready'); time.sleep(60)")
  read_until(process, 'ready')
  assert end(process)[0] == -signal.SIGTERM


RECIPE = toy.recipe(
  1, 300, log_every=1, sample_every=1000, checkpoint_every=1000
)


def test_a_run_stopped_anywhere_resumes(train, tmp_path):
  (tmp_path / 'toy.py').write_text(RECIPE)
  workdir = tmp_path / 'run'
  checkpoints = workdir / 'checkpoints' / '0_8'

  def run(stop_at):
    # Without the cache, since another test may have compiled the same program.
    compiles = stop_at == '8 px, 300 steps'
    process = train(
      f'--config={tmp_path / "toy.py"}',
      f'--workdir={workdir}',
      env={'JAX_ENABLE_COMPILATION_CACHE': not compiles},
    )
    read_until(process, stop_at)
    return end(process) if stop_at != 'Finished' else (process.wait(), '', 0)

  def steps():
    return sorted(
      int(path.name) for path in checkpoints.glob('*') if path.name.isdigit()
    )

  # During compilation.
  code, output, seconds = run('8 px, 300 steps')
  assert code == 75
  assert 'compiled' not in output
  assert seconds < SOON
  assert not steps()
  # Between two steps: nothing is lost.
  code, output, _ = run(' step 5/300')
  assert code == 75
  assert 'The same command continues' in output
  [step] = steps()
  assert 5 <= step < 300
  # During an evaluation.
  code, output, seconds = run('held-out prompts')
  assert code == 75
  assert 'Held-out metrics' not in output
  assert seconds < SOON
  assert run('Finished')[0] == 0
  lines = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  assert [line['step'] for line in lines if 'loss' in line] == [*range(1, 301)]
  sessions = {
    json.loads(line)['session']
    for line in (workdir / 'goodput.jsonl').read_text().splitlines()
  }
  assert len(sessions) == 4


def test_divergence_ends_in_one_line(train, tmp_path):
  (tmp_path / 'toy.py').write_text(RECIPE)
  process = train(
    f'--config={tmp_path / "toy.py"}',
    f'--workdir={tmp_path / "run"}',
    '--config.guard.max_skipped=2',
    '--config.stages[0].learning_rate=1e30',
  )
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 1
  assert output.splitlines()[-1].startswith(
    "error: stage 1/1 '8': 2 consecutive steps were skipped"
  )
  assert 'Traceback' not in output
