"""Text is checked where it comes in, by one function for all sources."""

import json

import numpy as np
import pytest

from mdm_jax.data import (
  captions,
  labels,
  sources,
  tar_index,
  tars,
  tfds_source,
)
from mdm_jax.data.images import BadRecord
from mdm_jax.data.transforms import Transform
from mdm_jax.tools import prepare_data
from tests.tools.test_prepare_data import image_file, read_rejects, write_tar

GOOD = [
  ('a cat', ['a cat']),
  (b'  a\n\tcat\r\n', ['a cat']),
  (b'\xef\xbb\xbfa cat', ['a cat']),
  ('a\x1b[31m cat\x07\x9b!\x7f', ['a [31m cat !']),
  ('a\u2028cat\x85sat', ['a cat sat']),
  ('\u202eright to left\u202c \u200f', ['\u202eright to left\u202c \u200f']),
  ('\U0001f408 🏳️\u200d🌈', ['\U0001f408 🏳️\u200d🌈']),
  ('nan', ['nan']),
  (['one', b'two', ' ', None], ['one', 'two']),
  (np.array([b'one', b'two'], object), ['one', 'two']),
]
BAD = [
  (None, 'empty caption'),
  ('\ufeff ', 'empty caption'),
  (b'\xef\xbb\xbf', 'empty caption'),
  (['', None], 'empty caption'),
  ([], 'no caption'),
  (b'caf\xe9', 'unreadable caption'),
  ('a' * (2**20 + 1), 'unreadable caption'),
  (b'\xff\xfea\0', 'unreadable caption'),
  (b'a\0b\0', 'unreadable caption'),
  (b'\xed\xa0\xbd', 'unreadable caption'),
  ('a \ud83d', 'unreadable caption'),
  (['good', 'a \ud83d'], 'unreadable caption'),
  (['good', 3], 'unreadable caption'),
  ([['nested']], 'unreadable caption'),
  (float('nan'), 'unreadable caption'),
  (0, 'unreadable caption'),
  (True, 'unreadable caption'),
  ({'en': 'a cat'}, 'unreadable caption'),
]


@pytest.mark.parametrize('value, expected', GOOD)
def test_captions_are_kept_word_for_word(value, expected):
  found = captions.read(value, 'key')
  assert found == expected
  assert captions.split(captions.join(found).encode()) == [
    caption.encode() for caption in expected
  ]


@pytest.mark.parametrize('value, reason', BAD, ids=range(len(BAD)))
def test_what_is_no_caption_is_a_bad_record(value, reason):
  with pytest.raises(BadRecord) as info:
    captions.read(value, 'key')
  assert info.value.reason == reason
  str(info.value).encode()


def test_captions_in_json():
  def read(value):
    return captions.read_json(json.dumps({'caption': value}).encode(), 'key')

  assert read('a \U0001f408') == ['a \U0001f408']
  assert read(['a', 'b']) == ['a', 'b']
  assert captions.read_json(b'\xef\xbb\xbf{"caption": "a"}', 'k') == ['a']
  for value, _ in BAD:
    if not isinstance(value, bytes):
      with pytest.raises(BadRecord):
        read(value)
  for data in (
    b'{"caption": "\\ud83d"}',
    b'[]',
    b'"caption"',
    b'{}',
    b'{"caption": 1' + b'0' * 5000 + b'}',
    b'[' * 100_000,
    b'\xff',
    b'',
  ):
    with pytest.raises(BadRecord, match='key: unreadable caption'):
      captions.read_json(data, 'key')


def every_source(tmp_path, write_tfds, texts):
  """Captions, or the reason why there is none, of every source."""
  import tensorflow_datasets as tfds

  write_tar(
    tmp_path / 's.tar',
    {
      f'{i}.{suffix}': data
      for i, text in enumerate(texts)
      for suffix, data in (('jpg', image_file()), ('txt', text))
    },
  )
  found, rejects = {'tars': {}}, []
  for key, _, read in tars.read_records(f'{tmp_path}/s.tar', rejects):
    found['tars'][int(key[2:])] = read
  found['tars'] |= {int(bad.key[2:]): bad.reason for bad in rejects}

  def open_all(source):
    for i in range(len(source)):
      try:
        yield source[i]['captions']
      except BadRecord as bad:
        yield bad.reason

  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  source = tar_index.open_source(f'{tmp_path}/index', 'train')
  found['tar_index'] = dict(enumerate(open_all(source)))

  options = prepare_data.Options(validation_fraction=0)
  prepare_data.prepare(f'{tmp_path}/s.tar', f'{tmp_path}/out', options)
  source = sources.open_source(f'{tmp_path}/out', 'train')
  found['prepare_data'] = {
    int(source[i]['key'][2:]): source[i]['captions'] for i in range(len(source))
  } | {int(r['key'][2:]): r['reason'] for r in read_rejects(tmp_path / 'out')}

  features = {'image': tfds.features.Image(), 'caption': tfds.features.Text()}
  rows = [{'image': image_file(), 'caption': text} for text in texts]
  write_tfds(tmp_path / 'tfds', 'some', features, {'train': rows})
  source = tfds_source.open_by_name(
    'some',
    f'{tmp_path}/tfds',
    'train',
    tfds_source.Features(caption='caption'),
  )
  found['tfds_source'] = dict(enumerate(open_all(source)))
  return found


def test_all_sources_check_alike(tmp_path, write_tfds):
  cases = [
    (value if isinstance(value, bytes) else value.encode(), expected)
    for value, expected in GOOD + BAD
    if isinstance(value, bytes)
    or (isinstance(value, str) and value != 'a \ud83d' and len(value) < 99)
  ]
  expected = dict(enumerate(result for _, result in cases))
  found = every_source(tmp_path, write_tfds, [text for text, _ in cases])
  assert len(found) == 4 and len(expected) > 12
  for name, results in found.items():
    assert results == expected, name


def test_all_sources_use_one_function(tmp_path, write_tfds, monkeypatch):
  monkeypatch.setattr(captions, 'clean', lambda text: 'checked')
  for name, results in every_source(tmp_path, write_tfds, [b'a cat']).items():
    assert results == {0: ['checked']}, name
  path = tmp_path / 'names.txt'
  path.write_bytes(b'a\nb')
  assert labels.read_names(str(path)) == ('checked', 'checked')


def test_class_names(tmp_path):
  path = tmp_path / 'names.txt'
  path.write_bytes('\ufeffbig cat\r\n\nsnow\u2028man\n'.encode())
  assert labels.read_names(str(path)) == ('big cat', 'snow man')
  path.write_bytes(b'caf\xe9')
  with pytest.raises(ValueError, match='names.txt.* is not a file of text: '):
    labels.read_names(str(path))


def test_training_chooses_among_the_captions_of_an_image(tmp_path):
  class Lengths:
    def encode(self, caption):
      return np.array([len(caption)], np.int32)

  texts = ['a', 'bb', 'c' * 600]
  write_tar(
    tmp_path / 's.tar',
    {'0.jpg': image_file(), '0.json': json.dumps({'caption': texts}).encode()},
  )
  options = prepare_data.Options(validation_fraction=0)
  prepare_data.prepare(f'{tmp_path}/s.tar', f'{tmp_path}/out', options)
  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  for opener, path, kept in (
    (sources, 'out', texts[:2]),  # Options.max_caption_length
    (tar_index, 'index', texts),
  ):
    record = opener.open_source(f'{tmp_path}/{path}', 'train')[0]
    assert (record['caption'], record['captions']) == ('a', kept)
    lengths = {
      int(Transform(Lengths(), 8)(record, np.random.default_rng(i))['text'][0])
      for i in range(30)
    }
    assert lengths == set(map(len, kept))
