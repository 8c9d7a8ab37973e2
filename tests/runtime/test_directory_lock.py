"""Real processes that want to write to one directory."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mdm_jax.runtime import directory_lock

ROOT = pathlib.Path(__file__).parents[2]
# Holds a lock until its input ends; its child outlives it.
HOLDER = """
import os, sys, time
from mdm_jax.runtime import directory_lock
with getattr(directory_lock, sys.argv[1])(*eval(sys.argv[2])):
  if not os.fork():
    time.sleep(60)
    os._exit(0)
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def hold():
  """(function, arguments) -> a process that has called it."""
  started = []

  def hold(function, *arguments):
    started.append(
      subprocess.Popen(
        [
          sys.executable,
          '-c',
          HOLDER,
          function,
          repr(
            [str(x) if isinstance(x, os.PathLike) else x for x in arguments]
          ),
        ],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
      )
    )
    assert started[-1].stdout.readline() == 'held\n'
    return started[-1]

  yield hold
  for process in started:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_second_is_refused_and_told_who_is_first(hold, tmp_path):
  directory = tmp_path / 'a' / 'b'
  before = time.time()
  first = hold('holding', directory)
  with (
    pytest.raises(directory_lock.InUse) as refused,
    directory_lock.holding(directory),
  ):
    raise AssertionError
  text = str(refused.value)
  assert text.startswith(
    f'{directory} is in use: process {first.pid} on {os.uname().nodename}, '
    f'since {time.strftime("%Y-%m-%d %H:", time.localtime(before))}'
  )
  assert '\n' not in text
  first.stdin.close()
  first.wait()
  assert not (tmp_path / 'a').exists()  # Nothing was written.


def test_no_crash_leaves_it_behind(hold, tmp_path):
  """The holder's child is still alive, and has inherited nothing."""
  first = hold('holding', tmp_path)
  first.kill()
  first.wait()
  assert os.listdir(tmp_path) == [directory_lock.NAME]
  second = hold('holding', tmp_path)
  assert json.loads((tmp_path / directory_lock.NAME).read_text())['pid'] == (
    second.pid
  )


def test_different_parts_share_a_directory(hold, tmp_path):
  path = tmp_path / 'out'
  first, second = (hold('holding_part', path, index, 3) for index in (0, 2))
  with directory_lock.holding_part(path, 1, 3):
    pass
  for index, count, holder in [(2, 3, second), (0, 3, first), (0, 1, None)]:
    with (
      pytest.raises(directory_lock.InUse) as refused,
      directory_lock.holding_part(path, index, count),
    ):
      raise AssertionError
    text = str(refused.value)
    assert any(
      text.startswith(f'{path} is in use: process {one.pid} on ')
      for one in ([holder] if holder else [first, second])
    )
  second.kill()
  second.wait()
  with (
    pytest.raises(directory_lock.InUse, match=f'process {first.pid} on'),
    directory_lock.holding_part(path, 0, 1),
  ):
    raise AssertionError


def test_the_whole_excludes_all_parts(hold, tmp_path):
  hold('holding_part', tmp_path, 0, 1)
  with (
    pytest.raises(directory_lock.InUse),
    directory_lock.holding_part(tmp_path, 1, 3),
  ):
    raise AssertionError


def test_files_of_a_directory_have_locks_of_their_own(hold, tmp_path):
  hold('holding_file', tmp_path / 'a')
  hold('holding_file', tmp_path / 'b')
  with (
    pytest.raises(directory_lock.InUse),
    directory_lock.holding_file(tmp_path / 'b'),
  ):
    raise AssertionError


def test_a_directory_of_two_names_has_one_lock(hold, tmp_path, monkeypatch):
  path = tmp_path / 'a'
  path.mkdir()
  (tmp_path / 'link').symlink_to(path)
  hold('holding_part', path, 0, 1)
  monkeypatch.chdir(path)
  for other in ('.', tmp_path / 'link', tmp_path / 'link' / '..' / 'a'):
    with (
      pytest.raises(directory_lock.InUse),
      directory_lock.holding_part(other, 0, 1),
    ):
      raise AssertionError


@pytest.fixture
def of_another_machine(hold, tmp_path, monkeypatch):
  """A directory that seems to be held by another machine."""
  monkeypatch.setattr(directory_lock, '_SILENCE', 0.5)
  monkeypatch.setattr(directory_lock, '_POLL', 0.05)
  hold('holding', tmp_path)
  path = tmp_path / directory_lock.NAME
  # Opened by this process after it has no lock of its own to lose.
  path.write_text(json.dumps(json.loads(path.read_text()) | {'machine': 'a'}))
  return tmp_path


def test_a_machine_that_has_vanished_holds_nothing(of_another_machine, caplog):
  """An NFS server may keep its lock for ever."""
  with directory_lock.holding(of_another_machine):
    pass
  assert 'Waiting up to 0.5 s for a sign of life' in caplog.text


def test_a_machine_that_is_alive_is_found_so(of_another_machine, monkeypatch):
  monkeypatch.setattr(directory_lock, '_SILENCE', 600)
  path = of_another_machine / directory_lock.NAME

  def beat(seconds):
    os.utime(path)

  monkeypatch.setattr(directory_lock.time, 'sleep', beat)
  with (
    pytest.raises(directory_lock.InUse),
    directory_lock.holding(of_another_machine),
  ):
    raise AssertionError


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(directory_lock, '_BEAT', 0.01)
  with directory_lock.holding(tmp_path):
    path = tmp_path / directory_lock.NAME
    os.utime(path, (0, 0))
    while not os.stat(path).st_mtime:
      time.sleep(0.01)


@pytest.mark.parametrize('number', ['ENOLCK', 'ENOSYS', 'EOPNOTSUPP'])
def test_without_locks_it_warns(tmp_path, monkeypatch, caplog, number):
  def lockf(*args):
    raise OSError(getattr(directory_lock.errno, number), 'no locks')

  monkeypatch.setattr(fcntl, 'lockf', lockf)
  with directory_lock.holding(tmp_path):
    pass
  assert 'cannot be locked (no locks): start one writer only' in caplog.text
  assert len(caplog.records) == 1


def test_a_bucket_is_not_locked(caplog):
  with directory_lock.holding('gs://bucket/run'):
    pass
  assert 'gs://bucket/run cannot be locked' in caplog.text


def test_where_nothing_can_be_written(tmp_path):
  (tmp_path / 'file').touch()
  with (
    pytest.raises(ValueError, match='file cannot be written to: '),
    directory_lock.holding(tmp_path / 'file'),
  ):
    raise AssertionError
