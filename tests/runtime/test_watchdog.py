"""Real processes that hang: the watchdog ends them and prints their stacks."""

import pathlib
import subprocess
import sys
import threading

import pytest

from mdm_jax.runtime import watchdog

ROOT = pathlib.Path(__file__).parents[2]
_HANGS = """
import ctypes, threading, time
from absl import logging
from mdm_jax.runtime import watchdog

logging.set_verbosity('info')
watchdog._GRACE, watchdog._POLL = 0.5, 0.1
dog = watchdog.Watchdog({'start_up': 60, 'step': 1.0, 'idle': 0})
dog.watch('start_up')
dog.watch('step')
time.sleep(2 * watchdog._POLL)

def hang_here():
  %s

hang_here()
"""


def hang(how):
  return subprocess.run(
    [sys.executable, '-c', _HANGS % how],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_a_hanging_phase_ends_with_all_stacks():
  result = hang('threading.Event().wait()')
  assert result.returncode == watchdog.EXIT_CODE
  assert 'step has not ended in 1 s, watchdog.step' in result.stderr
  assert 'in hang_here' in result.stderr
  assert result.stderr.count('hread 0x') >= 2


def test_a_limit_of_0_never_ends_a_phase():
  result = hang("""dog.watch('idle'); time.sleep(2)""")
  assert result.returncode == 0, result.stderr


def test_ends_a_process_that_holds_the_gil():
  # PyDLL does not release the interpreter lock.
  result = hang('ctypes.PyDLL(None).sleep(60)')
  assert result.returncode == 1
  assert 'in hang_here' in result.stderr


@pytest.fixture
def clock(monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(watchdog, '_POLL', 0.05)
  return now


def test_each_phase_has_its_own_limit(clock, monkeypatch):
  codes, left = [], threading.Event()

  def leave(code):
    codes.append(code)
    left.set()

  monkeypatch.setattr(watchdog.ending, 'begin', lambda code: None)
  monkeypatch.setattr(watchdog.ending, 'leave', leave)
  dog = watchdog.Watchdog({'step': 10, 'save': 20, 'evaluate': 0})
  for phase, seconds in [
    ('step', 9),
    ('step', 9),
    ('save', 19),
    ('evaluate', 1e6),
    ('step', 9),
  ]:
    dog.watch(phase)
    clock[0] += seconds
    assert not left.wait(2 * watchdog._POLL)
  clock[0] += 2
  assert left.wait(600)
  dog.close()
  assert set(codes) == {watchdog.EXIT_CODE}
