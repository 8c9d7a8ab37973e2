"""Data sets as TFDS writes them, without TensorFlow."""

import pickle
import shutil
import sys

import numpy as np
import pytest

from mdm_jax.data import tfds_source
from mdm_jax.data.images import BadRecord
from mdm_jax.data.tfds_source import Features, open_by_name
from mdm_jax.data.transforms import Transform

LABEL = Features(label='label')
NESTED = Features(caption='captions/text')


class Lengths:
  """A tokenizer: the length of the caption."""

  def encode(self, caption):
    return np.array([len(caption)], np.int32)


@pytest.fixture
def captions(tmp_path, write_tfds, image_file):
  """A data_dir with the features of COCO's captions; record i has i of them."""
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  write_tfds(
    tmp_path / 'tfds',
    'captions',
    {
      'image': tfds.features.Image(),
      'image/filename': text,
      'captions': tfds.features.Sequence({'id': np.int64, 'text': np.str_}),
      'texts': tfds.features.Sequence(text),
      'mask': tfds.features.Image(),
    },
    {
      'train': [
        {
          'image': image_file(i),
          'image/filename': str(i),
          'captions': [{'id': k, 'text': 'ü' * k + 'x'} for k in range(i)],
          'texts': ['a text'],
          'mask': b'not an image',
        }
        for i in range(6)
      ]
    },
    config='2014',
  )
  return tmp_path / 'tfds'


def test_labels_and_images_come_back(flowers, image_file):
  source = open_by_name('flowers', str(flowers), 'train', LABEL)
  assert len(source) == 7
  assert source.num_classes == 3
  assert [source[i] for i in range(7)] == [
    {'image': image_file(i), 'label': i % 3, 'key': f'flowers[train][{i}]'}
    for i in range(7)
  ]
  assert 'tensorflow' not in sys.modules


def test_a_record_without_label_is_bad(flowers):
  source = open_by_name('flowers', str(flowers), 'test', LABEL)
  assert source[1]['label'] == 2
  with pytest.raises(BadRecord, match=r'flowers\[test\]\[2\]: no label'):
    source[2]


def test_a_record_of_an_unknown_class_is_bad(flowers):
  source = open_by_name('flowers', str(flowers), 'train', LABEL)
  source.__dict__['num_classes'] = 2
  assert source[1]['label'] == 1
  with pytest.raises(BadRecord, match=r'flowers\[train\]\[2\]: no label'):
    source[2]


def test_one_of_several_captions(captions):
  source = open_by_name('captions/2014', str(captions), 'train', NESTED)
  record = source[5]
  assert record['caption'] == 'x'
  assert record['captions'] == ['x', 'üx', 'üüx', 'üüüx', 'üüüüx']
  transform = Transform(Lengths(), 16)
  lengths = [
    [
      int(transform(record, np.random.default_rng(seed))['text'][0])
      for seed in range(60)
    ]
    for _ in range(2)
  ]
  assert lengths[0] == lengths[1]
  counts = np.bincount(lengths[0], minlength=6)
  assert counts[0] == 0 and counts[1:].min() >= 5
  # A single caption uses no random number, so a flip does not depend on it.
  rng = np.random.default_rng(0)
  assert transform(source[1], rng)['text'] == [1]
  assert rng.random() == np.random.default_rng(0).random()


def test_a_record_without_captions_is_bad(captions):
  source = open_by_name('captions/2014', str(captions), 'train', NESTED)
  with pytest.raises(BadRecord, match=r'2014\[train\]\[0\]: no caption'):
    source[0]


def test_paths_of_nested_features(captions):
  texts = Features(caption='texts', key='image/filename')
  for name in ('captions/2014', 'captions/2014:1.0.0'):
    source = open_by_name(name, str(captions), 'train[50%:]', texts)
    assert len(source) == 3
    assert source[2]['caption'] == 'a text'
    assert source[2]['key'] == '5'
    assert source.num_classes == 0


def test_a_source_goes_to_workers_by_its_path(flowers):
  source = open_by_name('flowers', str(flowers), 'train', LABEL)
  first = source[0]
  data = pickle.dumps(source)
  assert len(data) < 1000
  assert pickle.loads(data)[0] == first


def test_a_damaged_record_is_bad_and_the_others_are_not(flowers, image_file):
  (path,) = flowers.glob('flowers/1.0.0/*-train.array_record-00000')
  data = bytearray(path.read_bytes())
  data[data.index(image_file(2)) + 30] ^= 1
  path.write_bytes(data)
  source = open_by_name('flowers', str(flowers), 'train', LABEL)
  with pytest.raises(BadRecord, match=r'flowers\[train\]\[2\]: damaged record'):
    source[2]
  assert [source[i]['label'] for i in (0, 1, 3, 4, 5, 6)] == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
  'name, split, features, error, message',
  [
    (
      'weeds',
      'train',
      LABEL,
      FileNotFoundError,
      "no data set 'weeds' in .*/tfds: .* or run tfds build weeds "
      '--file_format=array_record --data_dir=.*/tfds',
    ),
    ('flowers:2.0.0', 'train', LABEL, FileNotFoundError, "'flowers:2.0.0'"),
    ('a b', 'train', LABEL, FileNotFoundError, "no data set 'a b'"),
    (
      'flowers',
      'validation',
      LABEL,
      ValueError,
      "flowers has no split 'validation', only: train, test",
    ),
    ('flowers', 'train[', LABEL, ValueError, r"no split 'train\['"),
    (
      'flowers',
      'train',
      Features(caption='caption'),
      ValueError,
      "data.caption='caption': flowers has no such caption, only: "
      r'image \(Image\), label \(ClassLabel\)',
    ),
    (
      'flowers',
      'train',
      Features(image='label'),
      ValueError,
      "data.image='label': flowers has no such image",
    ),
    ('flowers', 'train', Features(image=''), ValueError, "data.image=''"),
    (
      'captions/2014',
      'train',
      Features(label='captions/id'),
      ValueError,
      r"data.label='captions/id': .* captions/id \(Sequence\), captions/text",
    ),
    (
      'captions/2014',
      'train',
      Features(caption='captions'),
      ValueError,
      "data.caption='captions'",
    ),
  ],
)
def test_what_is_missing_is_named(
  flowers, captions, name, split, features, error, message
):
  with pytest.raises(error, match=message) as info:
    open_by_name(name, str(flowers), split, features)
  assert '\n' not in str(info.value)


def test_another_file_format_is_named(flowers):
  path = flowers / 'flowers/1.0.0/dataset_info.json'
  path.write_text(path.read_text().replace('array_record', 'tfrecord', 1))
  with pytest.raises(
    ValueError,
    match=(
      'flowers/1.0.0 is in tfrecord format, .* tfds build flowers '
      '--file_format=array_record --data_dir=DIR'
    ),
  ):
    open_by_name('flowers', str(flowers), 'train', LABEL)


def test_tfds_default_directory(flowers, monkeypatch, tmp_path):
  import tensorflow_datasets as tfds

  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(flowers))
  assert len(open_by_name('flowers', '', 'test', LABEL)) == 3
  shutil.rmtree(flowers)
  with pytest.raises(FileNotFoundError, match="'flowers' in its data_dir"):
    tfds_source.open_by_name('flowers', '', 'test', LABEL)
