"""A tokenizer's file may be anything: it is read, or refused in one line."""

import functools
import pathlib

import numpy as np
from PIL import Image
import pytest

from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.tools import train_tokenizer
from mdm_jax.tools.conversion import Options, prepare
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


def test_captions_of_a_prepared_data_set(tmp_path):
  (tmp_path / 'images').mkdir()
  for i in range(9):
    image = np.full((16, 16, 3), i, np.uint8)
    Image.fromarray(image).save(tmp_path / f'images/{i}.png')
    (tmp_path / f'images/{i}.txt').write_text(f'a cat on sofa {i}')
  data, model = tmp_path / 'data', tmp_path / 'x.model'
  prepare(str(tmp_path / 'images'), str(data), Options(validation_fraction=0.0))
  run = functools.partial(
    commands.run,
    'mdm_jax.tools.train_tokenizer',
    f'--output={model}',
    '--vocab_size=280',
  )
  assert run(f'--data_path={data}').returncode == 0
  assert Tokenizer(str(model), 8).known_words == {
    *('a', 'cat', 'on', 'sofa'),
    *map(str, range(9)),
  }
  for flags, message in (
    ([f'--data_path={tmp_path}/images'], 'There is no prepared data set in'),
    (
      [f'--data_path={data}', f'--captions={tmp_path}/images/0.txt'],
      'give either --captions or --data_path.',
    ),
  ):
    (line,) = run(*flags).stderr.splitlines()
    assert line.startswith('error: ') and message in line
