"""The fuzzing harness sees what it is there to see."""

import os
import threading
import time

import pytest

from tests import fuzzing


def _byte(rng):
  return int(rng.integers(256))


def _check(read, **options):
  fuzzing.check(read, _byte, 50, refuses=ValueError, **options)


def test_results_and_refusals_pass():
  def read(value):
    if value % 2:
      raise ValueError(value)

  _check(read)


def test_another_error_is_an_escape_and_its_case_can_be_made_again():
  wrong = fuzzing.case(_byte, 0, 7)

  def read(value):
    if value == wrong:
      raise KeyError(value)

  with pytest.raises(pytest.fail.Exception, match=f'KeyError: {wrong}'):
    _check(read)


def test_a_crash_a_hang_and_a_want_of_memory_are_escapes(monkeypatch):
  with pytest.raises(pytest.fail.Exception, match='case 0 .* ended the proc'):
    _check(lambda value: os.kill(os.getpid(), 11))

  def hang(value):
    begin = time.process_time()
    while time.process_time() < begin + 10:
      pass

  with pytest.raises(pytest.fail.Exception, match='took more than 0.2 s'):
    _check(hang, seconds=0.2)
  monkeypatch.setattr(fuzzing, '_SILENCE', 0.5)
  with pytest.raises(pytest.fail.Exception, match='case 0 .* waits for ever'):
    _check(lambda value: threading.Event().wait())
  with pytest.raises(pytest.fail.Exception, match='MemoryError'):
    _check(lambda value: bytearray(2**29), megabytes=256)
