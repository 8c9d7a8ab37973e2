"""A classifier of labelled images: trained once, and tells them apart."""

import numpy as np
import pytest

from mdm_jax.eval import classifier, fid
from mdm_jax.inference import labelled_features
from mdm_jax.inference.split_images import SplitImages

_CHANNELS = ('red', 'green', 'blue')


def data(count, seed):
  """Dark images with much of one colour, and their labels."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 60, (count, 16, 16, 3), np.uint8)
  colors = rng.integers(3, size=count)
  images[np.arange(count), :, :, colors] += 150
  keys = [f'{seed}/{i}' for i in range(count)]
  labels = {
    key: {'the/color': _CHANNELS[color]} for key, color in zip(keys, colors)
  }
  return SplitImages([], [], images, keys), labels


def test_features_tell_classes_apart(tmp_path, monkeypatch):
  """And the classifier is trained once for the same images, labels, steps."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(classifier, '_WIDTHS', (8,))  # compiles faster
  (training, labels), (others, other_labels) = data(140, 0), data(140, 1)

  def train(labels, training=training, num_steps=30):
    return labelled_features.train(training, others, labels, num_steps)

  with pytest.raises(ValueError, match='140 of 280 images have no label'):
    train(labels)
  index = others._replace(keys=[f's@{i}' for i in range(140)])
  with pytest.raises(ValueError, match='as s@0, of a tar .* such as 0/0.$'):
    labelled_features.train(index, index, labels, 30)
  labels |= other_labels
  features, accuracy = train(labels)
  assert not features.from_cache and accuracy['the/color'] > 0.95
  found = features.encode(others.images)
  assert found.shape == (140, 64)
  np.testing.assert_array_equal(
    features.encode(others.images[130:]), found[130:]
  )
  of_others = fid.Statistics.of(found)
  same, different = (
    fid.frechet_distance(fid.Statistics.of(features.encode(images)), of_others)
    for images in (training.images, 255 - training.images)
  )
  assert 0 <= same < different / 5

  # Classes of which none was seen are never right.
  unseen = {key: {'the/color': 'grey'} for key in others.keys}
  monkeypatch.setattr(classifier, 'train', None)
  again, accuracy = train(labels | unseen)
  assert again.from_cache and accuracy == {'the/color': 0}
  np.testing.assert_array_equal(again.encode(others.images), found)
  one = training.keys[0]
  other_color = next(
    each for each in _CHANNELS if each != labels[one]['the/color']
  )
  for changed in (
    {'training': training._replace(images=255 - training.images)},
    {'num_steps': 31},
    {'labels': labels | {one: {'the/color': other_color}}},
  ):
    with pytest.raises(TypeError, match='not callable'):
      train(**{'labels': labels} | changed)


@pytest.mark.parametrize(
  'text, message',
  [
    ('', ' has no lines'),
    ('{"kind": "a", "b": "c"}', ", line 1: give a 'key' and the classes"),
    ('{"key": "a"}', ", line 1: give a 'key' and the classes"),
    ('{"key": "a", "b": "c"}\n\n{"key": "d"', ", line 3: give a 'key' and"),
    ('{"key": "a", "b": "c"}\n{"key": "d", "b": 1}', ", line 2: give a 'key'"),
    ('{"key": "a", "b": "c"}\n["d"]', ", line 2: give a 'key' and the"),
    (
      '{"key": "a", "b": "c"}\n{"key": "d", "e": "f"}',
      ', line 2: it has not the attributes of the first line',
    ),
  ],
)
def test_lines_that_are_no_labels(text, message, tmp_path):
  path = tmp_path / 'labels.jsonl'
  path.write_text(text)
  with pytest.raises(ValueError, match=f'labels.jsonl{message}'):
    labelled_features.read_labels(path)
  with pytest.raises(IsADirectoryError):
    labelled_features.read_labels(tmp_path)


def test_labels_are_read(tmp_path):
  path = tmp_path / 'labels.jsonl'
  path.write_text('{"key": "a", "style": "flat"}\n{"style": "3D", "key": "b"}')
  assert labelled_features.read_labels(path) == {
    'a': {'style': 'flat'},
    'b': {'style': '3D'},
  }
