"""Files are written whole or not at all, and anything may be read back."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from mdm_jax.runtime import files
from tests import fuzzing

ROOT = pathlib.Path(__file__).parents[2]


def test_replaces_a_file_and_creates_its_directory(tmp_path):
  path = tmp_path / 'a' / 'b.json'
  for value in ({'x': [1]}, {'x': 'ü'}):
    files.write_json(path, value)
  assert path.read_text(encoding='utf-8') == '{\n  "x": "\\u00fc"\n}\n'
  files.write_text(path, 'ü')
  assert path.read_bytes() == b'\xc3\xbc'
  assert [other.name for other in path.parent.iterdir()] == ['b.json']


def test_an_error_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a'
  path.write_text('old')
  with pytest.raises(KeyError), files.replacing(path) as temporary:
    temporary.write_text('half of it')
    raise KeyError
  assert path.read_text() == 'old'
  assert [*tmp_path.iterdir()] == [path]


def test_a_killed_writer_leaves_the_old_file_and_the_next_cleans_up(tmp_path):
  path = tmp_path / 'a'
  path.write_text('old')
  program = f"""
import os, signal
from mdm_jax.runtime import files
from tests import fuzzing
with files.replacing({str(path)!r}) as temporary:
  temporary.write_text('half of it')
  os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT)
  assert done.returncode == -signal.SIGKILL
  assert path.read_text() == 'old'
  assert len([*tmp_path.iterdir()]) == 2
  files.write_text(path, 'new')
  assert path.read_text() == 'new'
  assert [*tmp_path.iterdir()] == [path]


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path):
  path = tmp_path / 'a'
  with files.replacing(path, shared=True) as first:
    with files.replacing(path, shared=True) as second:
      assert first != second
      second.write_text('second')
    first.write_text('first')
  assert path.read_text() == 'first'
  assert [*tmp_path.iterdir()] == [path]


def be_a_pipe(path):
  os.mkfifo(path)


def be_a_socket(path):
  with socket.socket(socket.AF_UNIX) as bound:
    bound.bind(os.path.relpath(path))


def be_sparse(path):
  path.touch()
  os.truncate(path, 2**40)


def link_to(target):
  return lambda path: path.symlink_to(target)


def hold(data):
  return lambda path: path.write_bytes(data)


# What stands where a JSON file of a dict should be, and what is said of it.
UNREADABLE = {
  'missing': (lambda path: None, 'cannot be read (No such file or directory)'),
  'directory': (pathlib.Path.mkdir, 'is a directory, not a file'),
  'pipe': (be_a_pipe, 'is a named pipe, not a file'),
  'socket': (be_a_socket, 'is a socket, not a file'),
  'device': (link_to('/dev/zero'), 'is a device, not a file'),
  'dangling link': (link_to('nowhere'), 'cannot be read (No such file'),
  'circular link': (lambda path: path.symlink_to(path), 'cannot be read (Too'),
  'I/O error': (link_to('/proc/self/mem'), 'cannot be read (Input/output err'),
  '1 TB': (be_sparse, 'is larger than 64 MiB'),
  'empty': (hold(b''), 'is empty'),
  'blank': (hold(b' \n'), 'is empty'),
  'zeros': (hold(bytes(4096)), 'is no JSON'),
  'cut off': (hold(b'{"step": 1'), 'is no JSON'),
  'not UTF-8': (hold(b'{"step": "\xff\xff"}'), 'is no JSON'),
  'more after it': (hold(b'{"step": 1}{}'), 'is no JSON'),
  'digits': (hold(b'1' * 10_000), 'is no JSON'),
  'deep': (hold(b'[' * 10_000), 'is nested too deep'),
  'rather deep': (hold(b'[' * 99 + b']' * 99), 'is nested too deep'),
  'list': (hold(b'[1]'), 'does not hold what it should'),
  'null': (hold(b'null'), 'does not hold what it should'),
  'NaN': (hold(b'NaN'), 'does not hold what it should'),
}
# Values that are no step and no number of seconds.
ODD = (
  '"1" true null [] {} NaN Infinity -Infinity 1e999 -1 "\\ud800" 1.5e300'
).split()


@pytest.mark.parametrize('case', UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, case):
  make, reason = UNREADABLE[case]
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'a.json'
  make(path)
  with pytest.raises(files.UnreadableFile) as error:
    files.read_json(path)
  assert str(error.value).startswith(f'{path} {reason}')
  assert '\n' not in str(error.value)


def test_json_is_read_as_editors_write_it(tmp_path):
  path = tmp_path / 'a.json'
  for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
    path.write_text('{"a":\r\n "ü"}', encoding=encoding)
    assert files.read_json(path) == {'a': 'ü'}
  (tmp_path / 'link').symlink_to(path)
  assert files.read_json(tmp_path / 'link') == {'a': 'ü'}


def test_odd_numbers_are_told_apart():
  assert files.is_count(3) and files.is_number(3) and files.is_number(-0.5)
  assert not any(map(files.is_count, map(json.loads, [*ODD, '1.0'])))
  assert [x for x in ODD if files.is_number(json.loads(x))] == ['-1', '1.5e300']


@pytest.mark.parametrize('case', UNREADABLE)
def test_lines_that_cannot_be_read_are_left_out(
  tmp_path, monkeypatch, caplog, case
):
  make, _ = UNREADABLE[case]
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'a.jsonl'
  make(path)
  assert files.read_json_lines(path) == []
  assert len(caplog.records) == (case not in ('missing', 'empty', 'blank'))


def test_good_lines_among_others_are_read(tmp_path, caplog):
  path = tmp_path / 'a.jsonl'
  long = b'{"a": "%s"}' % (b' {"a": 9} ' * 2**18)
  path.write_bytes(b'{"a": 1}\n\xff\n\n' + long + b'\r\n[2]\n{"a": 3}\n{"a": 4')
  assert files.read_json_lines(path) == [{'a': 1}, {'a': 3}]
  (record,) = caplog.records
  assert record.getMessage() == f'{path}: 4 lines cannot be read; skipped.'


def test_nothing_set_aside_is_lost(tmp_path):
  path = tmp_path / 'a.json'
  for text in 'xyz':
    path.write_text(text)
    files.set_aside(path)
  left = {other.name: other.read_text() for other in tmp_path.iterdir()}
  assert left == {
    'a.json.unreadable': 'x',
    'a.json.unreadable+': 'y',
    'a.json.unreadable++': 'z',
  }


_FILE = b"""{"run": "a", "step": 10, "seconds": {"step": 1.5e3, "\\u00fc": -2},
"files": [null, true, [[]], "\xc3\xbc"]}
{"b": 2}
"""


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_file_is_read_or_refused(tmp_path, count):
  path = tmp_path / 'a'

  def read(data):
    path.write_bytes(data)
    assert all(isinstance(x, dict) for x in files.read_json_lines(path))
    assert isinstance(files.read_json(path), dict)

  fuzzing.check(
    read,
    lambda rng: fuzzing.damage(_FILE[: rng.choice((-9, None))], rng),
    count,
    refuses=files.UnreadableFile,
  )
