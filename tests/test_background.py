"""What is slow or broken costs what it writes, and no time."""

import json
import threading
import time

import pytest

from mdm_jax import background


def test_in_order_and_without_waiting():
  writer, free, done = background.Background('log'), threading.Event(), []
  writer.submit(free.wait)
  for i in range(100):  # Would never return.
    writer.submit(done.append, i)
  assert not done
  free.set()
  writer.close()
  assert done == list(range(100))
  assert not writer._thread.is_alive()


def test_more_than_fits_is_dropped_and_counted(monkeypatch, caplog):
  monkeypatch.setattr(background, '_CAPACITY', 5)
  writer, free, done = background.Background('log'), threading.Event(), []
  writer.submit(free.wait)
  while not writer._queue.empty():  # Until the thread has it.
    time.sleep(0.001)
  for i in range(8):
    writer.submit(done.append, i)
  free.set()
  writer.close()
  assert done == [0, 1, 2, 3, 4]
  assert caplog.text.count('does not keep up') == 1
  assert 'log: 3 writes were lost' in caplog.text


def test_what_never_ends_is_given_up(monkeypatch, caplog):
  monkeypatch.setattr(background, '_CLOSING', 0.1)
  writer = background.Background('log')
  for _ in range(2):
    writer.submit(threading.Event().wait)
  writer.close()
  assert 'log: 2 writes were lost' in caplog.text


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_a_defect_of_the_program_ends_it_without_delay(caplog):
  def fail():
    raise ValueError('a defect')

  writer = background.Background('log')
  writer.submit(fail)
  writer._thread.join(30)
  begin = time.monotonic()
  for _ in range(2):
    writer.submit(fail)
  writer.close()
  assert time.monotonic() - begin < 5
  assert 'the thread that writes it has ended' in caplog.text
  assert 'log: 2 writes were lost' in caplog.text


def test_failures_in_a_row_are_one_line(caplog):
  def fail():
    raise OSError('disk is gone')

  writer, done = background.Background('log'), []
  for function in (fail, fail, lambda: done.append(0), fail):
    writer.submit(function)
  writer.close()
  assert done == [0]
  assert caplog.text.count('log cannot be written: disk is gone') == 2
  assert 'log: 3 writes were lost' in caplog.text


@pytest.mark.parametrize('torn', ['', '{"step": 1}\n', '{"step": 1}\n{"st'])
def test_lines_follow_what_is_there(tmp_path, torn):
  path = tmp_path / 'new' / 'log.jsonl'
  if torn:
    path.parent.mkdir()
    path.write_text(torn)
  lines = background.Lines(path)
  lines.append({'step': 2})
  lines.append({'step': 3})
  lines.close()
  assert list(map(json.loads, path.read_text().splitlines()[-2:])) == [
    {'step': 2},
    {'step': 3},
  ]
  assert path.read_text().startswith(torn)
