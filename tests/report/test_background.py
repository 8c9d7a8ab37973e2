"""A slow or failing disk drops writes, and does not block the caller."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from mdm_jax.report import background
from mdm_jax.runtime import appending, files


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


def names(bucket):
  """Names of objects, without their random part."""
  return [name.rpartition('-')[0] for name in sorted(bucket.files())]


def test_lines_in_a_bucket_are_read_as_one_file(bucket, monkeypatch, tmp_path):
  """Of three sessions, one of which wrote several objects."""
  path = f'{bucket.path}/run/log.jsonl'
  lines = [{'step': step} for step in range(60)]
  for session in range(3):
    monkeypatch.setattr(appending, '_FULL', 100 if session == 1 else 2**20)
    log = background.LineFile(path)
    for line in lines[20 * session : 20 * session + 20]:
      log.append(line)
    log.close()
  assert files.read_json_lines(path) == lines
  # 20 lines of 14 bytes, 8 of which are an object with more than 100 bytes.
  assert names(bucket) == [f'run/log-{index:06d}' for index in range(5)]
  # A copy on a disk is read the same, and continued.
  for name, data in bucket.files().items():
    (tmp_path / pathlib.Path(name).name).write_bytes(data)
  log = background.LineFile(tmp_path / 'log.jsonl')
  for step in (60, 61):
    log.append({'step': step})
  log.close()
  expected = [*lines, {'step': 60}, {'step': 61}]
  assert files.read_json_lines(tmp_path / 'log.jsonl') == expected
  assert not (tmp_path / 'log.jsonl').exists()


def test_a_file_is_read_before_the_objects_beside_it(bucket):
  system, path = bucket.past_the_proxy, f'{bucket.path}/64_250.jsonl'
  for name, value in {
    '64_250.jsonl': 0,
    '64_250-000002-abcdef.jsonl': 1,
    '64_250-000010-000000.jsonl': 2,
    '64_2500.jsonl': -1,
    '64_250-12.jsonl': -1,
    '64_250-000003-abcdef.jsonl.tmp': -1,
    '64_250-000003-abcdef/a.jsonl': -1,
  }.items():
    system.pipe_file(f'{bucket.path}/{name}', b'{"a": %d}\n' % value)
  assert [line['a'] for line in files.read_json_lines(path)] == [0, 1, 2]
  assert files.new_part(path).name.startswith('64_250-000011-')


def test_lines_are_uploaded_now_and_then(bucket, monkeypatch):
  monkeypatch.setattr(background, '_UPLOAD_EVERY', 0.3)
  log = background.LineFile(f'{bucket.path}/log.jsonl')
  begin, uploads = time.monotonic(), 0
  while uploads < 3:
    log.append({'a': 1})
    time.sleep(0.005)
    uploads = sum(request.startswith('POST') for request in bucket.requests)
  assert time.monotonic() - begin > 0.6
  assert len(files.read_json_lines(f'{bucket.path}/log.jsonl')) > 20
  assert log.settle(30)
  bucket.requests.clear()
  time.sleep(0.5)
  # Nothing is new.
  assert not any(request.startswith('POST') for request in bucket.requests)
  log.close()


# Appends lines until it is killed, and prints the number of each.
_ENDLESS = """
import itertools, sys, time
from mdm_jax.report import background
background._UPLOAD_EVERY = 0.5
log = background.LineFile(sys.argv[1])
for i in itertools.count():
  log.append({'i': i, 'text': 'x' * 1000})
  print(i, flush=True)
  time.sleep(0.001)
"""


def test_a_killed_process_loses_the_last_seconds_only(bucket):
  path = f'{bucket.path}/log.jsonl'
  killed = subprocess.Popen(
    [sys.executable, '-c', _ENDLESS, path],
    cwd=pathlib.Path(__file__).parents[2],
    stdout=subprocess.PIPE,
    text=True,
  )
  times = {}
  for line in killed.stdout:
    times[int(line)] = time.monotonic()
    uploads = sum(request.startswith('POST') for request in bucket.requests)
    if uploads > 2:  # The second one has been answered.
      killed.send_signal(signal.SIGKILL)
      break
  killed.wait()
  found = [line['i'] for line in files.read_json_lines(path)]
  assert found == list(range(len(found)))
  # Those of the first uploads are there, and the last ones are lost indeed.
  assert max(times.values()) - times[found[-1]] < 10
  assert 0 < found[-1] < max(times)


def test_a_bucket_that_fails_for_a_while_loses_nothing(
  bucket, monkeypatch, caplog
):
  monkeypatch.setattr(background, '_UPLOAD_EVERY', 0.05)
  path = f'{bucket.path}/log.jsonl'
  caplog.set_level('INFO', logger='absl')
  with bucket.failing('POST', status=403) as fault:
    log = background.LineFile(path)
    log.append({'a': 0})
    while fault.hit < 3:
      time.sleep(0.01)
    log.append({'a': 1})
    assert not bucket.files()
  log.append({'a': 2})
  log.close()
  assert files.read_json_lines(path) == [{'a': 0}, {'a': 1}, {'a': 2}]
  messages = [record.getMessage() for record in caplog.records]
  assert len(messages) == 2
  assert messages[0].startswith(f'{path} cannot be uploaded now: ')
  assert 'no permission' in messages[0] and '\n' not in messages[0]
  assert messages[1] == f'{path} is uploaded again.'


def test_a_stalled_bucket_does_not_block(bucket, monkeypatch, caplog):
  monkeypatch.setattr(background, '_UPLOAD_EVERY', 0.05)
  path = f'{bucket.path}/log.jsonl'
  with bucket.failing('POST', stall=3) as fault:
    log = background.LineFile(path)
    log.append({'a': 0})
    while not fault.hit:
      time.sleep(0.01)
    begin = time.monotonic()
    for _ in range(9):
      log.append({'a': 1})
    assert not log.settle(0.2)
    log.close(0.2)
    assert time.monotonic() - begin < 2
  assert f'{path}: 10 writes were dropped' in caplog.text


def test_what_waits_for_a_bucket_is_limited(monkeypatch):
  monkeypatch.setattr(appending, '_MOST', 10)
  objects = appending.AppendedObjects('gs://bucket/a')
  objects.append(b'x' * 11)
  with pytest.raises(OSError, match='wait for the bucket'):
    objects.append(b'x')
