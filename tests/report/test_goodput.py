"""Every second is in one bucket, and repeated work counts as lost."""

import json
import time

import pytest

from mdm_jax.report import background, goodput
from tests.runtime.test_files import ODD, UNREADABLE


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until a test adds seconds to `clock[0]`."""
  append = background.LineFile.append

  def append_now(self, line):
    append(self, line)
    assert self.settle(30)

  monkeypatch.setattr(background.LineFile, 'append', append_now)
  now = [1000.0]
  monkeypatch.setattr(goodput.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(goodput.time, 'time', lambda: now[0] + 5e5)
  return now


def spend(times, clock, bucket, seconds):
  with times.time(bucket):
    clock[0] += seconds


def test_buckets_nest_and_add_up(tmp_path, clock):
  times = goodput.Goodput(tmp_path, began=997.0)
  with times.time('evaluate'):
    clock[0] += 1
    spend(times, clock, 'save', 2)
    clock[0] += 4
  times.switch('step')
  clock[0] += 8
  with times.time('data'):
    clock[0] += 16
    times.count_as('step')
  spend(times, clock, 'data', 32)
  clock[0] += 64
  times.close()
  assert goodput.totals(tmp_path) == (
    1,
    {'step': 8 + 16 + 64, 'data': 32, 'evaluate': 5, 'start_up': 3, 'save': 2},
  )


def test_a_line_every_two_seconds_or_when_forced(tmp_path, clock):
  times = goodput.Goodput(tmp_path)

  def number_of_lines():
    path = tmp_path / 'goodput.jsonl'
    return path.read_text().count('\n') if path.exists() else 0

  for step, (seconds, force, expected) in enumerate(
    [(1, False, 0), (1.5, False, 1), (1, True, 2), (0, False, 2)]
  ):
    clock[0] += seconds
    times.write('8', step, force)
    assert number_of_lines() == expected
  last = json.loads((tmp_path / 'goodput.jsonl').read_text().splitlines()[1])
  assert last == {
    'time': 501003.5,
    'session': 501000.0,
    'stage': '8',
    'step': 2,
    'seconds': {'start_up': 1.0},
  }


def train(tmp_path, clock, first, last):
  """A session that takes a second per step and is killed after `last`."""
  times = goodput.Goodput(tmp_path)
  clock[0] += 10
  times.write('8', first, force=True)
  times.switch('step')
  for step in range(first + 1, last + 1):
    spend(times, clock, 'data', 0.25)
    clock[0] += 0.75
    times.write('8', step, force=step % 4 == 0)
  clock[0] += 100  # From the last line to the kill and to the next session.


def test_the_listener_is_called_for_every_bucket(tmp_path):
  heard = []
  times = goodput.Goodput(tmp_path, listener=heard.append)
  with times.time('compile'):
    times.write('8', 0, force=True)
  times.close()
  assert heard == ['start_up', 'compile', 'start_up']


def test_without_a_line_there_are_no_totals(tmp_path):
  assert goodput.totals(tmp_path) == (0, {})


def test_repeated_steps_count_as_lost(tmp_path, clock):
  train(tmp_path, clock, 0, 11)  # Lines at 4, 7, 8, 11.
  with (tmp_path / 'goodput.jsonl').open('a') as file:
    file.write('{"time": 3\n')
  train(tmp_path, clock, 4, 12)  # Repeats the steps 5 to 11.
  train(tmp_path, clock, 12, 16)
  sessions, seconds = goodput.totals(tmp_path)
  assert sessions == 3
  assert seconds == {'start_up': 30.0, 'step': 12.0, 'lost': 7.0, 'data': 4.0}


def test_many_sessions_are_added_up_in_time(tmp_path):
  # Each session repeats the last step of the one before.
  line = '{{"session": {}, "stage": "a", "step": {}, "seconds": {{"step": 1}}}}'
  lines = [
    line.format(session, step)
    for session in range(3000)
    for step in range(10 * session, 10 * session + 12)
  ]
  (tmp_path / 'goodput.jsonl').write_text('\n'.join(lines) + '\n')
  began = time.process_time()
  assert goodput.totals(tmp_path) == (3000, {'step': 33001.0, 'lost': 2999.0})
  assert time.process_time() - began < 5


@pytest.mark.parametrize('key', ['session', 'stage', 'step', 'seconds'])
def test_odd_lines_are_left_out(tmp_path, clock, caplog, key):
  train(tmp_path, clock, 0, 4)
  expected = goodput.totals(tmp_path)
  path = tmp_path / 'goodput.jsonl'
  good = path.read_text().splitlines()[0]
  odd = ODD if key != 'stage' else [x for x in ODD if x[0] != '"']
  if key == 'seconds':
    odd = [x for x in odd if x != '{}']
    odd += ['{"step": ' + x + '}' for x in ODD]
    odd += ['{"a b": 1}', '{"\\u001b[1m": 1}']
  if key == 'session':
    odd = [x for x in odd if x not in ('-1', '1.5e300')]
  lines = []
  for value in odd:
    line = json.loads(good)
    line[key] = '?'
    lines.append(json.dumps(line).replace('"?"', value))
    del line[key]
    lines.append(json.dumps(line))
  with path.open('a') as file:
    file.write('\n'.join(lines) + '\nnull\n3\n')
  assert goodput.totals(tmp_path) == expected
  assert f'{len(lines) + 2} lines cannot be read' in caplog.text


@pytest.mark.parametrize('case', UNREADABLE)
def test_a_file_that_cannot_be_read_has_no_totals(tmp_path, monkeypatch, case):
  monkeypatch.chdir(tmp_path)
  UNREADABLE[case][0](tmp_path / 'goodput.jsonl')
  assert goodput.totals(tmp_path) == (0, {})
