"""Real signals to real processes: their exit codes, and how soon they exit."""

import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

from mdm_jax.child_process import STOP_SIGNALS
from mdm_jax.runtime import preemption
from tests import commands, toy

ROOT = pathlib.Path(__file__).parents[2]
# Seconds; a lenient limit, since the machine may be busy with other tests.
SOON = 30
# `work` stays in C code for minutes, as a compilation does.
BUSY = """
import hashlib, os, time
from absl import logging
from mdm_jax.child_process import STOP_SIGNALS
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
  """(flags, env=None) -> a training on a device, its output in a pipe."""
  started = []

  def train(*flags, env=None):
    started.append(
      commands.start(
        'mdm_jax.main',
        *flags,
        env=commands.on_devices(1) | (env or {}),
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


def test_these_signals_are_stop_requests():
  assert {number.name for number in STOP_SIGNALS} == {
    'SIGHUP',
    'SIGINT',
    'SIGQUIT',
    'SIGTERM',
    'SIGUSR1',
    'SIGUSR2',
    'SIGXCPU',
  }


@pytest.mark.parametrize('number', STOP_SIGNALS)
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
  process = start(
    '-c',
    BUSY
    + """
from mdm_jax.report import console
logging.use_absl_handler()
console.setup_logging()
stop.defer()
say('ready')
work()
""",
  )
  read_until(process, 'ready')
  process.terminate()
  read_until(process, 'the same signal again')
  time.sleep(2 * preemption._SAME)
  code, output, seconds = end(process)
  assert (code, output) == (75, '')
  assert seconds < SOON


@pytest.mark.parametrize(
  'number, pause',
  [
    # `timeout` and Slurm may send it to the process and to its group.
    (signal.SIGTERM, 0),
    # From the kernel and from the shell, when a terminal is closed.
    (signal.SIGHUP, 2 * preemption._SAME),
    # Every second, until the hard limit.
    (signal.SIGXCPU, 2 * preemption._SAME),
  ],
)
def test_a_request_may_come_twice(start, number, pause):
  process = start(
    '-c',
    BUSY
    + """
stop.defer()
say('ready')
while not stop.requested:
  time.sleep(0.01)
time.sleep(1.5)
say('saved')
stop.allow()
""",
  )
  read_until(process, 'ready')
  process.send_signal(number)
  time.sleep(pause)
  code, output, _ = end(process, number)
  assert code == 75
  assert 'saved' in output


@pytest.mark.parametrize(
  'ignored, number, expected',
  [
    ([signal.SIGHUP], signal.SIGHUP, 3),  # nohup
    # A command in the background of a script.
    ([signal.SIGINT, signal.SIGQUIT], signal.SIGINT, 3),
    ([signal.SIGINT, signal.SIGQUIT], signal.SIGQUIT, 3),
    ([signal.SIGINT, signal.SIGQUIT, signal.SIGHUP], signal.SIGTERM, 75),
    ([signal.SIGTERM], signal.SIGTERM, 75),
  ],
)
def test_what_is_ignored_at_the_start(start, ignored, number, expected):
  process = start(
    '-c',
    'import os, signal, sys\n'
    f'for number in {list(map(int, ignored))}:\n'
    '  signal.signal(number, signal.SIG_IGN)\n'
    'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])',
    '-c',
    BUSY + "say('ready'); time.sleep(1); os._exit(3)",
  )
  read_until(process, 'ready')
  assert end(process, number)[0] == expected


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


def test_a_failed_process_that_is_gone_ends_the_others(start):
  process = start(
    '-c',
    BUSY
    + """
class Peers:
  def __getattr__(self, name):
    return lambda: name == 'have_failed'
preemption.StopHandler(lambda: say('finish'), Peers())
work()
""",
  )
  output, _ = process.communicate(timeout=SOON)
  assert process.returncode == 1
  assert 'Another process ended with an error' in output


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
  assert 'Metrics of stage' not in output
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


# Instead of training: tests/training/test_loop.py has runs that diverge.
_DIVERGES = """
from mdm_jax.optim import skip_step
from mdm_jax.training import loop

def train(*given):
  raise skip_step.Diverged('2 consecutive steps were skipped')
loop.train = train
"""


def test_divergence_ends_in_one_line(train, tmp_path):
  (tmp_path / 'toy.py').write_text(RECIPE + _DIVERGES)
  process = train(
    f'--config={tmp_path / "toy.py"}', f'--workdir={tmp_path / "run"}'
  )
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 1
  *_, last = output.splitlines()
  assert last == 'error: 2 consecutive steps were skipped'
  assert 'Traceback' not in output


@commands.lists_processes
def test_a_run_whose_terminal_is_closed_saves(tmp_path):
  """Its data workers get the signal too, and nothing can be logged any more."""
  (tmp_path / 'toy.py').write_text(
    toy.recipe(
      1,
      100_000,
      data__num_workers=1,
      log_every=1,
      sample_every=100_000,
      checkpoint_every=100_000,
    )
  )
  run, lines = tmp_path / 'run', tmp_path / 'run' / 'metrics.jsonl'
  master, slave = pty.openpty()
  process = subprocess.Popen(
    [
      sys.executable,
      '-c',
      # The terminal is that of the session, as after a login.
      'import os, sys; os.login_tty(0); '
      'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])',
      '-m',
      'mdm_jax.main',
      f'--config={tmp_path / "toy.py"}',
      f'--workdir={run}',
    ],
    cwd=ROOT,
    env=os.environ | commands.on_devices(1),
    stdin=slave,
    stdout=slave,
    stderr=slave,
  )
  os.close(slave)
  output = b''
  while b' step 5/100000 ' not in output:
    output += os.read(master, 2**16)
  os.close(master)
  assert process.wait(600) == 75
  assert commands.all_end(process.pid)
  [step] = [
    int(path.name)
    for path in (run / 'checkpoints' / '0_8').glob('*')
    if (path / 'manifest.json').exists()
  ]
  assert step >= 5
  done = map(json.loads, lines.read_text().splitlines())
  assert [line['step'] for line in done if 'loss' in line] == (
    [*range(1, step + 1)]
  )
