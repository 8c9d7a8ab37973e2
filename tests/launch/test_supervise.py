"""The supervisor restarts a command, but not for ever."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'supervise.py'
# Counts its runs in WORKDIR/runs, then runs the test's code.
COMMAND = """
import os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
with (workdir / 'runs').open('a') as file:
  file.write('x')
run = len((workdir / 'runs').read_text())
def save(step):
  (workdir / 'checkpoints' / '0_8' / str(step)).mkdir(parents=True)
"""


@pytest.fixture
def start(tmp_path):
  """(code) -> a supervisor that runs the code."""
  started = []

  def start(code, *options):
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
  (tmp_path / 'checkpoints' / '0_8' / '9.uncommitted').mkdir(parents=True)
  process = start('if run in (2, 4): save(run)\nsys.exit(1)')
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (1, 7)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(start, tmp_path, number):
  process = start("""
for number in (signal.SIGTERM, signal.SIGINT):
  signal.signal(number, lambda number, frame: sys.exit(75))
(workdir / 'ready').touch()
time.sleep(60)
""")
  while not (tmp_path / 'ready').exists():
    time.sleep(0.01)
  process.send_signal(number)
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (75, 1)


def test_a_signal_ends_the_pause(start, tmp_path):
  process = start('sys.exit(1)', '--pause=60')
  process.stderr.readline()
  process.terminate()
  process.communicate(timeout=600)
  assert (process.returncode, runs(tmp_path)) == (75, 1)
