"""Files are written whole or not at all."""

import pathlib
import signal
import subprocess
import sys

import pytest

from mdm_jax.runtime import files

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
