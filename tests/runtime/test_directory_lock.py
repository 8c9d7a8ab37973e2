"""Real processes that want to write to one directory."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mdm_jax.runtime import (
  bucket_lock,
  directory_lock,
  lock_holder,
  preemption,
)

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
  monkeypatch.setattr(lock_holder, 'SILENCE', 0.5)
  monkeypatch.setattr(lock_holder, 'POLL', 0.05)
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
  monkeypatch.setattr(lock_holder, 'SILENCE', 600)
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
  monkeypatch.setattr(lock_holder, 'BEAT', 0.01)
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


def test_where_nothing_can_be_written(tmp_path):
  (tmp_path / 'file').touch()
  with (
    pytest.raises(ValueError, match='file cannot be written to: '),
    directory_lock.holding(tmp_path / 'file'),
  ):
    raise AssertionError


def objects(bucket):
  return {
    name: json.loads(data)
    for name, data in bucket.files().items()
    if directory_lock.NAME in name
  }


def test_a_bucket_has_one_writer(hold, bucket):
  path = f'{bucket.path}/run'
  first = hold('holding', path)
  with (
    pytest.raises(directory_lock.InUse) as refused,
    directory_lock.holding(path),
  ):
    raise AssertionError
  assert str(refused.value).startswith(
    f'{path} is in use: process {first.pid} on {os.uname().nodename}, since '
  )
  first.stdin.close()
  first.wait()
  assert not bucket.files()
  # One that is killed leaves its object, but not its lock.
  for number in range(2):
    killed = hold('holding', path)
    assert list(objects(bucket)) == [f'run/.lock-{number:06d}']
    killed.kill()
  killed.wait()
  with directory_lock.holding(path):
    assert list(objects(bucket)) == ['run/.lock-000002']
  assert not bucket.files()


def test_parts_in_a_bucket(hold, bucket):
  path = f'{bucket.path}/out'
  first = hold('holding_part', path, 0, 3)
  with directory_lock.holding_part(path, 1, 3):
    pass
  for index, count in ((0, 3), (0, 1)):
    with (
      pytest.raises(directory_lock.InUse, match=f'process {first.pid} on'),
      directory_lock.holding_part(path, index, count),
    ):
      raise AssertionError
  with directory_lock.holding_file(f'{bucket.path}/other'):
    pass
  first.kill()
  first.wait()
  whole = hold('holding_part', path, 0, 1)
  with (
    pytest.raises(directory_lock.InUse, match=f'process {whole.pid} on'),
    directory_lock.holding_part(path, 1, 3),
  ):
    raise AssertionError
  # Another lock, of a process that was killed.
  assert set(objects(bucket)) == {
    '.out.lock-000000',
    '.out.lock-0-of-3-000000',
  }


@pytest.fixture
def of_another_machine_in_a_bucket(bucket, monkeypatch):
  """(directory, function that writes a sign of life)."""
  monkeypatch.setattr(lock_holder, 'POLL', 0.02)
  monkeypatch.setattr(lock_holder, 'SILENCE', 0.4)
  system, beats = bucket.past_the_proxy, iter(range(9999))
  info = {'host': 'far', 'pid': 7, 'since': 'ever', 'machine': 'a'}

  def beat():
    text = json.dumps(info | {'beats': next(beats)})
    system.pipe_file(f'{bucket.path}/run/.lock-000004', text.encode())

  beat()
  return f'{bucket.path}/run', beat


def test_of_two_that_wait_for_a_vanished_machine_one_wins(
  of_another_machine_in_a_bucket, bucket, caplog
):
  path, _ = of_another_machine_in_a_bucket
  begin, ends = time.monotonic(), []
  release = threading.Event()

  def take():
    try:
      with directory_lock.holding(path):
        ends.append(time.monotonic() - begin)
        release.wait()
    except directory_lock.InUse as error:
      ends.append(str(error))

  threads = [threading.Thread(target=take) for _ in range(2)]
  for thread in threads:
    thread.start()
  while len(ends) < 2:
    time.sleep(0.01)
  assert list(objects(bucket)) == ['run/.lock-000005']
  release.set()
  for thread in threads:
    thread.join()
  # The one that is refused may be told before the other goes on.
  waited, refused = sorted(ends, key=lambda end: isinstance(end, str))
  assert waited >= 0.4
  assert refused.startswith(f'{path} is in use: process {os.getpid()} on')
  assert f'{path} is in use: process 7 on far, since ever, w' in caplog.text
  assert 'Waiting up to 0.4 s for a sign of life' in caplog.text
  assert 'There was none' in caplog.text
  assert not bucket.files()


def test_of_two_that_begin_at_the_same_time_one_sees_the_other(
  hold, bucket, monkeypatch
):
  path = f'{bucket.path}/out'
  first = hold('holding_part', path, 0, 3)
  before = objects(bucket)
  look, looks = bucket_lock.BucketLock._others, iter([{}])
  monkeypatch.setattr(
    bucket_lock.BucketLock, '_others', lambda self: next(looks, look(self))
  )
  with (
    pytest.raises(directory_lock.InUse, match=f'process {first.pid} on'),
    directory_lock.holding_part(path, 0, 1),
  ):
    raise AssertionError
  assert objects(bucket) == before


def test_a_distant_machine_that_is_alive(
  of_another_machine_in_a_bucket, monkeypatch
):
  path, beat = of_another_machine_in_a_bucket
  monkeypatch.setattr(lock_holder, 'SILENCE', 600)
  timer = threading.Timer(0.2, beat)
  timer.start()
  with (
    pytest.raises(directory_lock.InUse, match='process 7 on far'),
    directory_lock.holding(path),
  ):
    raise AssertionError
  timer.join()


def test_a_holder_in_a_bucket_gives_signs_of_life(bucket, monkeypatch):
  """Also after the bucket has failed for a while."""
  monkeypatch.setattr(lock_holder, 'BEAT', 0.02)
  with directory_lock.holding(f'{bucket.path}/run'):
    for _ in range(2):
      with bucket.failing('.', status=403) as fault:
        while fault.hit < 2:
          time.sleep(0.01)
      before = objects(bucket)['run/.lock-000000']['beats']
      while objects(bucket)['run/.lock-000000']['beats'] == before:
        time.sleep(0.01)
  assert not bucket.files()


@pytest.mark.parametrize('found', ['successor', 'nothing', 'another'])
def test_a_holder_that_was_replaced_ends(bucket, found):
  """It was suspended for long, and others have gone on without it."""
  path = f'{bucket.path}/run'
  holder = subprocess.Popen(
    [
      sys.executable,
      '-c',
      'import sys, time\n'
      'from mdm_jax.runtime import directory_lock, lock_holder\n'
      'lock_holder.BEAT = 1\n'
      'with directory_lock.holding(sys.argv[1]):\n'
      "  print('held', flush=True)\n"
      '  time.sleep(60)\n',
      path,
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert holder.stdout.readline() == 'held\n'
  other = {'host': 'far', 'pid': 7, 'since': 'then', 'token': 'b'}
  system = bucket.past_the_proxy
  name = {'successor': '000001', 'another': '000000'}.get(found)
  system.rm_file(f'{path}/.lock-000000')
  if name:
    info = other | {'replaces': ['.lock-000000'] if name[-1] == '1' else []}
    system.pipe_file(f'{path}/.lock-{name}', json.dumps(info).encode())
  _, stderr = holder.communicate(timeout=30)
  assert holder.returncode == 1
  who = 'process 7 on far, since then,' if name else 'another process'
  assert f'{path} has been taken over: {who} writes to it' in stderr
  assert len(objects(bucket)) == bool(name)  # Not its own to remove.


@pytest.mark.parametrize('how', ['SIGTERM', 'another thread'])
def test_a_lock_in_a_bucket_is_released_at_the_end(bucket, how):
  program = """
    import os, threading, time
    from mdm_jax.runtime import command, directory_lock, ending
    def main(_):
      with directory_lock.holding(os.environ['TEST_PATH']):
        if os.environ['TEST_HOW'] == 'another thread':
          threading.Thread(target=ending.leave, args=(3,)).start()
        print('held', flush=True)
        time.sleep(60)
    command.run(main)
  """
  run = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(program)],
    cwd=ROOT,
    env=os.environ | {'TEST_PATH': f'{bucket.path}/run', 'TEST_HOW': how},
    stdout=subprocess.PIPE,
  )
  assert run.stdout.readline() == b'held\n'
  if how == 'SIGTERM':
    run.terminate()
  run.wait(timeout=30)
  assert run.returncode == (preemption.EXIT_CODE if how == 'SIGTERM' else 3)
  assert not bucket.files()


def test_a_bucket_that_cannot_be_written_to(bucket):
  with (
    bucket.failing('POST', status=403),
    pytest.raises(directory_lock.NotWritable) as refused,
    directory_lock.holding(f'{bucket.path}/run'),
  ):
    raise AssertionError
  text = str(refused.value)
  assert text.startswith(f'{bucket.path}/run cannot be written to: no permissi')
  assert '\n' not in text


def test_a_bucket_that_stalls_holds_up_no_end(bucket, monkeypatch):
  monkeypatch.setattr(bucket_lock, '_RELEASE', 0.2)
  with directory_lock.holding(f'{bucket.path}/run'):
    fault = bucket.failing('.', stall=3)
    fault.__enter__()
    begin = time.monotonic()
  assert time.monotonic() - begin < 2
