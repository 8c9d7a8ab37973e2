"""A slow or failing disk drops writes, and does not block the caller."""

import json
import threading
import time

import pytest

from mdm_jax.report import background


def test_calls_run_in_order_without_waiting():
  writer, free, done = background.BackgroundWriter('log'), threading.Event(), []
  writer.submit(free.wait)
  for i in range(100):  # Would never return if `submit` waited.
    writer.submit(done.append, i)
  assert not done
  free.set()
  writer.close()
  assert done == list(range(100))
  assert not writer._thread.is_alive()


def test_excess_calls_are_dropped_and_counted(monkeypatch, caplog):
  monkeypatch.setattr(background, '_CAPACITY', 5)
  writer, free, done = background.BackgroundWriter('log'), threading.Event(), []
  writer.submit(free.wait)
  while not writer._queue.empty():  # Until the thread runs the first call.
    time.sleep(0.001)
  for i in range(8):
    writer.submit(done.append, i)
  free.set()
  writer.close()
  assert done == [0, 1, 2, 3, 4]
  assert caplog.text.count('too many writes are pending') == 1
  assert 'log: 3 writes were dropped' in caplog.text


def test_close_does_not_wait_for_hanging_calls(monkeypatch, caplog):
  monkeypatch.setattr(background, '_CLOSING', 0.1)
  writer = background.BackgroundWriter('log')
  for _ in range(2):
    writer.submit(threading.Event().wait)
  writer.close()
  assert 'log: 2 writes were dropped' in caplog.text


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_an_unexpected_error_ends_the_thread(caplog):
  def fail():
    raise ValueError('a defect')

  writer = background.BackgroundWriter('log')
  writer.submit(fail)
  writer._thread.join(30)
  begin = time.monotonic()
  for _ in range(2):
    writer.submit(fail)
  writer.close()
  assert time.monotonic() - begin < 5
  assert 'the thread that writes it has died' in caplog.text
  assert 'log: 2 writes were dropped' in caplog.text


def test_consecutive_failures_are_one_log_line(caplog):
  def fail():
    raise OSError('disk is gone')

  writer, done = background.BackgroundWriter('log'), []
  for function in (fail, fail, lambda: done.append(0), fail):
    writer.submit(function)
  writer.close()
  assert done == [0]
  assert caplog.text.count('log cannot be written: disk is gone') == 2
  assert 'log: 3 writes were dropped' in caplog.text


@pytest.mark.parametrize('torn', ['', '{"step": 1}\n', '{"step": 1}\n{"st'])
def test_lines_are_appended_to_an_existing_file(tmp_path, torn):
  path = tmp_path / 'new' / 'log.jsonl'
  if torn:
    path.parent.mkdir()
    path.write_text(torn)
  lines = background.LineFile(path)
  lines.append({'step': 2})
  lines.append({'step': 3})
  lines.close()
  assert list(map(json.loads, path.read_text().splitlines()[-2:])) == [
    {'step': 2},
    {'step': 3},
  ]
  assert path.read_text().startswith(torn)
