"""Real processes that end in every way: with the right code, and soon."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

from mdm_jax.child_process import STOP_SIGNALS
from mdm_jax.runtime import ending

ROOT = pathlib.Path(__file__).parents[2]
# Threads that never end, as those of a library whose disk is full.
COMMAND = r"""
import concurrent.futures, ctypes, os, sys, threading, time
from absl import logging
from mdm_jax.runtime import command, directory_lock, ending, watchdog

def hang():
  threading.Event().wait()

def main(argv):
  concurrent.futures.ThreadPoolExecutor().submit(hang)
  threading.Thread(target=hang).start()
  os.write(1, b"done\n")
  %s

command.run(main)
"""
# What `main` does last, the exit code, and the last line of standard error.
SOON = {
  'pass': (0, ''),
  'sys.exit(0)': (0, ''),
  'sys.exit(3)': (3, ''),
  'sys.exit("error: one line")': (1, 'error: one line'),
  'import tempfile; tempfile._candidate_tempdir_list = lambda: ["/proc"]; '
  'tempfile.mkdtemp()': (
    1,
    "error: No usable temporary directory found in ['/proc']: set TMPDIR to "
    'one that is writable.',
  ),
  # As JAX's is.
  'raise RuntimeError("Unable to initialize backend \'tpu\':\\n none")': (
    1,
    "error: Unable to initialize backend 'tpu': none",
  ),
  'raise KeyError("key")': (1, "KeyError: 'key'"),
  'raise OSError(28, "No space left on device", "a")': (
    1,
    "error: [Errno 28] No space left on device: 'a'. What is finished is kept.",
  ),
  'import types; os.statvfs = lambda path: types.SimpleNamespace(f_blocks=64, '
  'f_frsize=2**20); raise OSError(28, "No space left on device")': (
    1,
    'error: [Errno 28] No space left on device. What is finished is kept. Data '
    'workers share /dev/shm, which has only 64 MiB: a container needs more '
    '(docker run --shm-size=8g).',
  ),
  'directory_lock.holding_file("/dev/null/a").__enter__()': (
    1,
    'error: /dev/null cannot be written to: File exists.',
  ),
  'threading.Thread(target=ending.leave, args=(70,)).start(); hang()': (70, ''),
}
# The same where the ending itself hangs, with a limit of `SHORT` seconds.
SHORT = 3.0
LATE = {
  # The reader of standard error has stopped reading.
  'os.write(2, bytes(2**16)); sys.exit("error: ever so much")': 1,
  'os.write(1, bytes(2**16 - 5)); print("."); sys.exit(3)': 3,
  'ending.say_farewell(lambda code: hang()); sys.exit(75)': 75,
  # Holds the interpreter lock, as a defect of a library might.
  'ending.say_farewell(lambda code: ctypes.PyDLL(None).sleep(60))': 1,
  'os.write(2, bytes(2**16)); '
  'dog = watchdog.Watchdog({"step": 0.5}); dog.watch("step"); hang()': 70,
}


def start(last):
  return subprocess.Popen(
    [sys.executable, '-c', COMMAND % last],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.mark.parametrize('last', SOON)
def test_no_thread_holds_up_the_ending(last):
  process = start(last)
  assert process.stdout.readline() == 'done\n'
  begin = time.monotonic()
  _, errors = process.communicate(timeout=600)
  code, line = SOON[last]
  assert process.returncode == code
  assert (errors.splitlines() or [''])[-1] == line
  # The limit is for endings that hang; this one does not.
  assert time.monotonic() - begin < ending.LIMIT - 1


def test_an_ending_that_hangs_is_short():
  # As docs/reliability.md promises.
  assert ending.LIMIT + 0.5 < 10
  processes = {last: start(f'ending.LIMIT = {SHORT}; {last}') for last in LATE}
  for process in processes.values():
    assert process.stdout.readline() == 'done\n'
  begin = time.monotonic()
  codes = {last: process.wait(600) for last, process in processes.items()}
  assert codes == LATE
  assert SHORT - 1 < time.monotonic() - begin < SHORT + 6
  for process in processes.values():
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_a_signal_ends_any_command(number):
  process = start('ctypes.CDLL(None).sleep(60)')
  assert process.stdout.readline() == 'done\n'
  process.send_signal(number)
  process.communicate(timeout=30)
  assert process.returncode == 75


def test_output_that_is_lost_is_an_error():
  with open('/dev/full', 'w') as full:
    process = subprocess.run(
      [sys.executable, '-c', COMMAND % 'print("result")'],
      cwd=ROOT,
      stdout=full,
      timeout=600,
    )
  assert process.returncode == 1


def test_standard_error_may_vanish():
  """As with a full disk, or the terminal: a progress bar ends nothing."""
  with open('/dev/full', 'w') as full:
    process = subprocess.run(
      [
        sys.executable,
        '-c',
        COMMAND % 'print("bar", file=sys.stderr, flush=True); sys.exit(3)',
      ],
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=full,
      timeout=600,
    )
  assert process.returncode == 3


def test_all_commands_end_so():
  """None calls `app.run`, which ends as Python does."""
  calls = []
  for path in (ROOT / 'mdm_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) == 'app.run':
        calls.append(path.name)
  assert calls == ['command.py']
