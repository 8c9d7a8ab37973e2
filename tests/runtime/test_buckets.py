"""Paths in buckets: what is there, what is wrong with them, in one line."""

import os
import pathlib
import subprocess
import sys
import time

from etils import epath
import pytest

from mdm_jax.runtime import (
  buckets,
  ending,
  files,
  google_storage,
  remote_reads,
  value_types,
)

DIRECTORY = value_types.Path('directory')
OUTPUT = value_types.Path('directory', output=True)
FILE = value_types.Path('file')


def refusal(kind, path):
  with pytest.raises(ValueError) as caught:
    kind.check(path)
  message = str(caught.value)
  assert '\n' not in message and message.endswith('.')
  return message


def test_copies_are_removed_at_the_end(bucket, monkeypatch):
  monkeypatch.setattr(remote_reads, '_COPIES', {})
  monkeypatch.setattr(ending, '_last_calls', [])
  path = epath.Path(bucket.path) / 'a'
  path.write_text('x')
  copy = remote_reads.kept_copy(path)
  assert remote_reads.kept_copy(path) == copy and copy.read_text() == 'x'
  (call,) = ending._last_calls
  call()
  assert not copy.parent.exists()


def test_copies_of_a_killed_process_are_removed_by_the_next(tmp_path):
  text = """
import os, signal, sys
from mdm_jax.runtime import remote_reads
print(remote_reads.temporary_directory(), flush=True)
if sys.argv[1] == 'die':
  os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""
  (tmp_path / 'mdm_jax_copies_mine').mkdir()  # Of another program.

  def start(how):
    process = subprocess.Popen(
      [sys.executable, '-c', text, how],
      env=os.environ | {'TMPDIR': str(tmp_path)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    return process, process.stdout.readline().strip()

  process, killed = start('die')
  process.wait()
  assert pathlib.Path(killed).parent == tmp_path
  assert pathlib.Path(killed).exists()
  first, kept = start('wait')
  assert not pathlib.Path(killed).exists()
  second, other = start('wait')
  assert pathlib.Path(kept).exists() and pathlib.Path(other).exists()
  first.communicate()
  second.communicate()
  assert os.listdir(tmp_path) == ['mdm_jax_copies_mine']


def test_a_file_is_written_and_read(bucket):
  path = epath.Path(bucket.path) / 'a' / 'b.json'
  files.write_json(path, {'x': 1})
  assert files.read_json(path) == {'x': 1}
  size, version = files.require_file(path)
  assert size == 13
  files.write_json(path, {'x': 2})
  assert files.require_file(path)[1] != version
  assert bucket.files() == {'a/b.json': b'{\n  "x": 2\n}\n'}
  with files.local_copy(path) as copy:
    assert copy.read_text() == '{\n  "x": 2\n}\n'
  assert not copy.exists()
  with pytest.raises(files.UnreadableFile, match='is a directory'):
    files.require_file(path.parent)
  with pytest.raises(files.UnreadableFile, match='cannot be read .No such'):
    files.read_bytes(path.parent / 'c')
  assert files.is_there(path) and not files.is_there(path.parent / 'c')


def test_an_error_inside_leaves_the_object_as_it_was(bucket):
  path = f'{bucket.path}/a'
  files.write_text(path, 'old')
  with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
    temporary.write_text('new')
    raise KeyboardInterrupt
  assert bucket.files() == {'a': b'old'}


def test_a_path_is_checked_as_on_a_disk(bucket):
  files.write_text(f'{bucket.path}/directory/file', '')
  for kind, name in (
    (DIRECTORY, 'directory'),
    (OUTPUT, 'directory'),
    (OUTPUT, 'new/one'),
    (FILE, 'directory/file'),
  ):
    path = f'{bucket.path}/{name}'
    assert kind.check(path) == path
  file, directory = f'{bucket.path}/directory/file', f'{bucket.path}/directory'
  for written in (f'{directory}/', f'{bucket.path}//./directory'):
    assert DIRECTORY.check(written) == directory
  assert "know no '..'" in refusal(OUTPUT, f'{directory}/../run')
  assert 'this is a file' in refusal(OUTPUT, file)
  assert 'this is a directory' in refusal(FILE, directory)
  assert 'no such file' in refusal(FILE, directory + '/other')
  assert 'no such directory' in refusal(DIRECTORY, directory + '/other')
  assert 'create it (gcloud' in refusal(OUTPUT, 'gs://not-there/run')
  assert 'name of a bucket' in refusal(OUTPUT, 'gs://')
  assert 'with two slashes' in refusal(OUTPUT, f'gs:/{bucket.name}/run')
  assert 'gs://, s3://, az://' in refusal(OUTPUT, 'gcs://a/run')
  assert 'not supported' in refusal(
    value_types.Path('directory', schemes=()), directory
  )


@pytest.mark.parametrize(
  ['status', 'body', 'expected'],
  [
    (401, b'Anonymous caller', 'gcloud auth application-default login'),
    (403, b'{"error": {"message": "x has no\\naccess"}}', 'Storage Object'),
    (400, b'Bucket is a requester pays bucket', google_storage.BILLING),
    (
      400,
      b'Invalid JWT: Token must be a short-lived token and in a reasonable '
      b'timeframe',
      'set the clock',
    ),
  ],
)
def test_a_refusal_says_what_to_do(bucket, status, body, expected):
  with bucket.failing('.', status=status, body=body) as fault:
    assert expected in refusal(OUTPUT, f'{bucket.path}/run')
  assert fault.hit <= 2  # Two requests at once, neither of them again.


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(buckets.PACKAGES, 's3', 'no_such_package')
  message = refusal(OUTPUT, 's3://a/b')
  assert message == 's3:// needs a package: pip install no_such_package.'


@pytest.mark.parametrize(
  'fault',
  [
    {'status': 503},
    {'status': 429},
    {'reset': 'request'},
    {'reset': 'response'},
    {'stall': 1},
  ],
  ids=str,
)
def test_a_passing_fault_is_overcome(bucket, fault):
  path, content = f'{bucket.path}/a', 'x' * 100_000
  with bucket.failing(bucket.name, times=1, **fault) as harm:
    files.write_text(path, content)
    assert harm.hit == 1
  with bucket.failing(bucket.name, times=1, **fault) as harm:
    assert files.read_bytes(path) == content.encode()
    assert harm.hit == 1


def test_a_clock_that_is_wrong_is_said_once(caplog):
  google_storage._warn_once.cache_clear()
  with caplog.at_level('INFO', logger='absl'):
    google_storage.warn_of_clock(
      time.strftime('%a, %d %b %Y %T GMT', time.gmtime())
    )
    google_storage.warn_of_clock(None)
    assert not caplog.messages
    hour_ago = time.gmtime(time.time() - 3600)
    for _ in range(2):
      google_storage.warn_of_clock(
        time.strftime('%a, %d %b %Y %T GMT', hour_ago)
      )
  (line,) = caplog.messages
  assert '1.0 hours ahead' in line and 'set it' in line
