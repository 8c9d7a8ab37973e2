"""Real signals to real processes: how soon they end, and how."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import toy

ROOT = pathlib.Path(__file__).parents[1]
# In C code for minutes, as when it compiles.
BUSY = """
import hashlib, os, time
from absl import logging
from mdm_jax import interrupt
logging.set_verbosity('info')
def say(word):
  os.write(1, word.encode() + b'\\n')
def work(rounds=10**9):
  hashlib.pbkdf2_hmac('sha256', b'', b'', rounds)
stop = interrupt.Interrupt(lambda: say('finish'))
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
  output, _ = process.communicate(timeout=120)
  return process.returncode, output, time.monotonic() - begin


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_at_once_from_within_c_code(start, number):
  process = start('-c', BUSY + "say('ready'); work()")
  read_until(process, 'ready')
  code, output, seconds = end(process, number)
  assert code == 75
  assert output.splitlines()[-1] == 'finish'
  assert seconds < 2


def test_held_until_it_is_asked(start):
  process = start(
    '-c',
    BUSY
    + """
stop.hold()
say('ready')
while not stop.requested:
  time.sleep(0.01)
say('saved')
stop.let_go()
say('never')
""",
  )
  read_until(process, 'ready')
  code, output, _ = end(process)
  assert code == 75
  words = [line for line in output.splitlines() if line.isalpha()]
  assert words == ['saved', 'finish']


def test_second_signal_does_not_wait(start):
  process = start('-c', BUSY + "stop.hold(); say('ready'); work()")
  read_until(process, 'ready')
  process.terminate()
  read_until(process, 'a second signal')
  code, output, seconds = end(process)
  assert (code, output) == (75, '')
  assert seconds < 2


def test_waits_for_what_is_being_saved(start):
  process = start(
    '-c',
    BUSY
    + """
stop.hold(wait=lambda: (time.sleep(0.5), say('saved')))
stop.let_go()
say('ready')
work()
""",
  )
  read_until(process, 'ready')
  code, output, _ = end(process)
  assert code == 75
  assert output.splitlines()[-2:] == ['saved', 'finish']


def test_closed_leaves_signals_as_they_were(start):
  process = start('-c', BUSY + "stop.close(); say('ready'); time.sleep(60)")
  read_until(process, 'ready')
  assert end(process)[0] == -signal.SIGTERM


RECIPE = toy.recipe(
  1, 300, log_every=1, sample_every=1000, checkpoint_every=1000
)


def test_a_run_stopped_anywhere_goes_on(start, tmp_path):
  (tmp_path / 'toy.py').write_text(RECIPE)
  workdir = tmp_path / 'run'
  checkpoints = workdir / 'checkpoints' / '0_8'

  def run(stop_at):
    process = start(
      '-m',
      'mdm_jax.main',
      f'--config={tmp_path / "toy.py"}',
      f'--workdir={workdir}',
    )
    read_until(process, stop_at)
    return end(process) if stop_at != 'Finished' else (process.wait(), '', 0)

  def steps():
    return sorted(
      int(path.name) for path in checkpoints.glob('*') if path.name.isdigit()
    )

  # While it compiles.
  code, output, seconds = run('8 px, 300 steps')
  assert code == 75
  assert 'compiled' not in output
  assert seconds < 5
  assert not steps()
  # Between two steps: nothing is lost.
  code, output, _ = run(' step 5/300')
  assert code == 75
  assert 'The same command continues' in output
  [step] = steps()
  assert 5 <= step < 300
  # While it is evaluated.
  code, output, seconds = run('held-out prompts')
  assert code == 75
  assert 'Held out' not in output
  assert seconds < 5
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


def test_divergence_ends_in_one_line(start, tmp_path):
  (tmp_path / 'toy.py').write_text(RECIPE)
  process = start(
    '-m',
    'mdm_jax.main',
    f'--config={tmp_path / "toy.py"}',
    f'--workdir={tmp_path / "run"}',
    '--config.guard.max_skipped=2',
    '--config.stages[0].learning_rate=1e30',
  )
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 1
  assert output.splitlines()[-1].startswith(
    "error: stage 1/1 '8': 2 steps in a row were left out"
  )
  assert 'Traceback' not in output
