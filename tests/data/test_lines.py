"""Lines of text files end at a newline, and nowhere else."""

import pathlib

import pytest

import mdm_jax
from mdm_jax.data import lines
from mdm_jax.data.labels import read_names
from tests import fuzzing

# All at which `str.splitlines` ends a line, beside the newline.
OTHERS = '\r\v\f\x1c\x1d\x1e\x85\u2028\u2029'


@pytest.mark.parametrize(
  'data, expected',
  [
    (b'', []),
    (b'\n', ['']),
    (b'a', ['a']),
    (b'a\n', ['a']),
    (b'a\r\nb\r\n', ['a', 'b']),
    (b'a\n\nb\n', ['a', '', 'b']),
    (b'\xef\xbb\xbfa\nb', ['a', 'b']),
    (f'a{OTHERS}b\nc'.encode(), [f'a{OTHERS}b', 'c']),
  ],
)
def test_lines(data, expected, tmp_path):
  (tmp_path / 'x').write_bytes(data)
  assert lines.read_lines(tmp_path / 'x') == expected


def test_entries_are_not_empty(tmp_path):
  path = tmp_path / 'names'
  path.write_bytes('\ufeffa red\u2028ring \r\n \n\ttwo\x85dots\n'.encode())
  assert lines.read_entries(path) == ['a red\u2028ring', 'two\x85dots']
  # Names are tokens of one line: white space in them becomes one space.
  assert read_names(str(path)) == ('a red ring', 'two dots')


@pytest.mark.parametrize('data', [b'a\n\xff\n', b'a\n\xed\xa0\x80', b'a\n\xc3'])
def test_what_is_not_utf8_is_placed(data, tmp_path):
  (tmp_path / 'x').write_bytes(data)
  with pytest.raises(ValueError, match='x, line 2: this is not in UTF-8.'):
    lines.read_lines(tmp_path / 'x')


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_file_is_read_or_refused(count, tmp_path):
  path = tmp_path / 'x'

  def make(rng):
    text = '\ufeffa red ring\r\n\n' + OTHERS + 'two → dots\n'
    return fuzzing.damage(text.encode(), rng)

  def read(data):
    path.write_bytes(data)
    found = lines.read_lines(path)
    data = data.removeprefix(b'\xef\xbb\xbf')
    assert len(found) == data.count(b'\n') + (data[-1:] not in (b'\n', b''))

  fuzzing.check(read, make, count, refuses=ValueError)


def test_nothing_else_splits_lines():
  for path in pathlib.Path(mdm_jax.__file__).parent.rglob('*.py'):
    for line in path.read_text().split('\n'):
      if 'splitlines(' in line:  # Only of an error, to show its first line.
        assert 'str(error).splitlines()' in line, path
