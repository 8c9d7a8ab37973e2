"""A classifier is trained on labelled images; its features tell them apart."""

import json

import numpy as np
import pytest

from mdm_jax.eval import classifier
from mdm_jax.inference import labelled_features

_CHANNELS = ('red', 'green', 'blue')


def data(count, seed):
  """Dark images with much of one colour, and their keys and labels."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 60, (count, 16, 16, 3), np.uint8)
  colors = rng.integers(3, size=count)
  images[np.arange(count), :, :, colors] += 150
  keys = [f'{seed}/{i}' for i in range(count)]
  return (
    images,
    keys,
    {key: {'color': _CHANNELS[color]} for key, color in zip(keys, colors)},
  )


def test_features_tell_classes_apart(monkeypatch):
  monkeypatch.setattr(classifier, '_WIDTHS', (8,))  # compiles faster
  images, keys, labels = data(140, 0)
  others, other_keys, other_labels = data(140, 1)
  labels |= other_labels
  encode, accuracy = labelled_features.train(images, keys, labels, 30)
  assert accuracy(others, other_keys)['color'] > 0.95
  # Classes of which none was seen are never right.
  unseen = {key: {'color': 'grey'} for key in other_keys}
  with pytest.raises(ValueError, match='140 of 140 images have no label'):
    accuracy(others, [f'x{key}' for key in other_keys])
  labels |= unseen
  assert accuracy(others, other_keys) == {'color': 0}
  features = encode(others)
  assert features.shape == (140, 64)
  np.testing.assert_allclose(encode(others[130:]), features[130:], atol=1e-4)
  distance = labelled_features.frechet_distance
  same = distance(encode(images), features)
  assert 0 <= same < distance(encode(255 - images), features) / 5


@pytest.mark.parametrize(
  'lines, message',
  [
    ([], "each line needs a 'key'"),
    ([{'kind': 'a'}], "each line needs a 'key'"),
    ([{'key': 'a'}], "each line needs a 'key'"),
    ([{'key': 'a', 'b': 'c'}, {'key': 'd'}], 'has not the attributes'),
  ],
)
def test_lines_that_are_no_labels(lines, message, tmp_path):
  path = tmp_path / 'labels.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with pytest.raises(ValueError, match=message):
    labelled_features.read_labels(path)


def test_labels_are_read(tmp_path):
  path = tmp_path / 'labels.jsonl'
  path.write_text('{"key": "a", "style": "flat"}\n{"style": "3D", "key": "b"}')
  assert labelled_features.read_labels(path) == {
    'a': {'style': 'flat'},
    'b': {'style': '3D'},
  }
