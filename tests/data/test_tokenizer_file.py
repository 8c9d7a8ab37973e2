"""A tokenizer's file may be anything: it is read, or refused in one line."""

import pathlib

import pytest

from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.tools import train_tokenizer
from tests import commands, fuzzing

MODEL = pathlib.Path(CAPTIONS_MODEL).read_bytes()


@pytest.mark.parametrize(
  'data', [b'', b'junk', b'\0' * 1000, MODEL[:100], MODEL[:-1], b'{"a": 1}']
)
def test_junk_is_named(data, tmp_path):
  path = tmp_path / 'junk.model'
  path.write_bytes(data)
  with pytest.raises(ValueError) as error:
    Tokenizer(str(path), 8)
  assert str(error.value).startswith(f"'{path}' is no SentencePiece model: ")
  assert '\n' not in str(error.value)
  with pytest.raises(FileNotFoundError, match=f'no tokenizer at .{tmp_path}'):
    Tokenizer(str(tmp_path), 8)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_file_is_read_or_refused(count, tmp_path):
  path = tmp_path / 'x.model'

  def read(data):
    path.write_bytes(data)
    tokenizer = Tokenizer(str(path), 8)
    assert tokenizer.encode('a red ring \u2028 é').shape == (8,)
    tokenizer.count('')

  fuzzing.check(
    read, lambda rng: fuzzing.damage(MODEL, rng), count, refuses=ValueError
  )


@pytest.mark.parametrize(
  'data, message',
  [
    (b'', 'has no captions'),
    (b'\r\n \n', 'has no captions'),
    (b'a\n\xff', 'line 2: this is not in UTF-8.'),
    (''.join(map(chr, range(0x4E00, 0x4F00))).encode(), '--vocab_size=260'),
  ],
)
def test_captions_that_train_nothing(data, message, tmp_path):
  (tmp_path / 'captions').write_bytes(data)
  result = commands.run(
    'mdm_jax.tools.train_tokenizer',
    f'--captions={tmp_path}/captions',
    f'--output={tmp_path}/new/x.model',
    '--vocab_size=260',
  )
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line
  assert not (tmp_path / 'new').exists()


def test_other_line_separators_stay_in_a_caption(tmp_path):
  (tmp_path / 'captions').write_bytes('a\u2028b\x85c\n'.encode() * 9)
  commands.run(
    'mdm_jax.tools.train_tokenizer',
    f'--captions={tmp_path}/captions',
    f'--output={tmp_path}/x.model',
    '--vocab_size=280',
  )
  model = train_tokenizer.train(['a\u2028b\x85c'] * 9, 280)
  assert (tmp_path / 'x.model').read_bytes() == model
