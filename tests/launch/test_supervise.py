"""The supervisor restarts a command, but not for ever."""

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import pytest

SIGNALS = (
  signal.SIGHUP,
  signal.SIGINT,
  signal.SIGQUIT,
  signal.SIGTERM,
  signal.SIGUSR1,
  signal.SIGUSR2,
  signal.SIGXCPU,
)
SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'supervise.py'
# Counts its runs in WORKDIR/runs, then runs the test's code.
COMMAND = """
import os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
with (workdir / 'runs').open('a') as file:
  file.write('x')
run = len((workdir / 'runs').read_text())
def save(step):
  path = workdir / 'checkpoints' / '0_8' / str(step)
  path.mkdir(parents=True)
  (path / 'manifest.json').touch()
"""


@pytest.fixture
def start(tmp_path):
  """(code) -> a supervisor that runs the code."""
  started = []

  def start(code, *options, wrapper=()):
    started.append(
      subprocess.Popen(
        [
          sys.executable,
          SCRIPT,
          f'--workdir={tmp_path}',
          '--attempts=3',
          '--pause=0.1',
          *options,
          '--',
          *wrapper,
          sys.executable,
          '-c',
          COMMAND + code,
          tmp_path,
        ],
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.wait()


def runs(tmp_path):
  path = tmp_path / 'runs'
  return len(path.read_text()) if path.exists() else 0


def test_restarts_until_finished(start, tmp_path):
  process = start('sys.exit([75, 1, 75, 0][run - 1])', '--attempts=9')
  _, errors = process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (0, 4)
  assert [line.split('code ')[1] for line in errors.splitlines()] == [
    '75, starting again in 0 s.',
    '1, starting again in 0.1 s.',
    '75, starting again in 0 s.',
  ]


@pytest.mark.parametrize(
  'code, expected',
  [
    ('sys.exit(7)', 7),
    ('sys.exit(75)', 75),
    ('os.kill(os.getpid(), signal.SIGKILL)', 137),
  ],
)
def test_gives_up_without_progress(start, tmp_path, code, expected):
  process = start(code)
  _, errors = process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (expected, 3)
  assert errors.splitlines()[-1] == (
    f'supervise: exit code {expected}, and no newer checkpoint after 3 '
    'attempts: giving up.'
  )
  if expected == 7:
    assert '0.1 s' in errors and '0.2 s' in errors


def test_progress_resets_the_count(start, tmp_path):
  for name in ('9.uncommitted/manifest.json', '9/params'):
    path = tmp_path / 'checkpoints' / '0_8' / name
    path.parent.mkdir(parents=True)
    path.touch()
  process = start('if run in (2, 4): save(run)\nsys.exit(1)')
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (1, 7)


def test_progress_in_a_bucket(bucket, capfd):
  progress = runpy.run_path(str(SCRIPT))['progress']
  assert progress(bucket.path) == (-1, -1)
  for name in (
    'checkpoints/0_8/20/manifest.json',
    'checkpoints/1_16/3/manifest.json',
    'checkpoints/1_16/12/manifest.json',
    'checkpoints/1_16/40.damaged/manifest.json',
    'checkpoints/1_16/80/params/manifest.ocdbt',  # Only begun.
  ):
    bucket.past_the_proxy.pipe_file(f'{bucket.path}/{name}', b'{}')
  assert progress(bucket.path) == progress(f'{bucket.path}/') == (1, 12)
  assert not capfd.readouterr().err
  with bucket.failing('/o', status=403):
    assert progress(bucket.path) == (-1, -1)
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith(f'supervise: {bucket.path} cannot be listed: ')
  assert 'permission' in line


# Saves when it is asked to stop, which takes a while, and tells the signal.
SAVE_AND_STOP = """
def stop(number, frame):
  time.sleep(0.3)
  (workdir / 'saved').write_text(signal.Signals(number).name)
  sys.exit(75)
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM,
               signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
  signal.signal(number, stop)
(workdir / 'ready').write_text('x')
for _ in range(6000):
  time.sleep(0.01)  # A signal just before a sleep is handled after it.
"""


def wait_for(path):
  end = time.monotonic() + 60
  while not (path.exists() and path.read_text()):
    assert time.monotonic() < end, f'no {path}'
    time.sleep(0.01)
  return path.read_text()


@pytest.mark.parametrize('number', SIGNALS)
def test_signals_are_passed_on(start, tmp_path, number):
  process = start(SAVE_AND_STOP)
  wait_for(tmp_path / 'ready')
  process.send_signal(number)
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (75, 1)
  assert (tmp_path / 'saved').read_text() == number.name


@pytest.mark.parametrize('wrapper', [(), ('bash', '-c', '"$@"; exit', 'bash')])
def test_a_killed_supervisor_leaves_no_run(start, tmp_path, wrapper):
  """The run saves, also if it is the child of a script."""
  process = start(SAVE_AND_STOP, wrapper=wrapper)
  wait_for(tmp_path / 'ready')
  process.kill()
  assert wait_for(tmp_path / 'saved') == 'SIGTERM'
  # All processes that have its standard error have ended.
  process.communicate(timeout=600)
  assert runs(tmp_path) == 1


def test_killed_at_any_moment_it_leaves_no_run(start, tmp_path):
  for i in range(12):
    process = start('sys.exit(75)', '--attempts=1000')
    process.stderr.readline()
    time.sleep(0.003 * i)
    process.kill()
    process.communicate(timeout=60)


def test_a_script_that_is_killed_takes_its_run_along(start, tmp_path):
  """Or the next attempt would make two."""
  process = start(
    'if run > 1: sys.exit(0)\n' + SAVE_AND_STOP,
    wrapper=('bash', '-c', 'echo $$ > "${@: -1}/pid"; "$@"; exit', 'bash'),
  )
  wait_for(tmp_path / 'ready')
  os.kill(int((tmp_path / 'pid').read_text()), signal.SIGKILL)
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (0, 2)
  assert (tmp_path / 'saved').read_text() == 'SIGTERM'


def test_what_is_ignored_stays_ignored(start, tmp_path):
  """As SIGHUP under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    process = start(
      "(workdir / 'ready').write_text('x'); time.sleep(0.5); sys.exit(0)"
    )
  finally:
    signal.signal(signal.SIGHUP, before)
  wait_for(tmp_path / 'ready')
  process.send_signal(signal.SIGHUP)
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (0, 1)


def test_it_goes_on_without_its_terminal(start, tmp_path):
  process = start('sys.exit([75, 75, 0][run - 1])')
  process.stderr.close()
  assert process.wait(600) == 0
  assert runs(tmp_path) == 3


def test_a_signal_ends_the_pause(start, tmp_path):
  process = start('sys.exit(1)', '--pause=60')
  process.stderr.readline()
  process.terminate()
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (75, 1)
