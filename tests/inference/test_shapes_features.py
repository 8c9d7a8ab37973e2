"""Features of shapes: trained once, and the same for the same images."""

import numpy as np
import pytest

from mdm_jax.data.shapes import ShapesSource
from mdm_jax.eval import classifier, fid
from mdm_jax.inference import shapes_features


def test_the_classifier_is_trained_once(tmp_path, monkeypatch):
  def make():
    return shapes_features.Features(
      16, str(tmp_path), num_images=64, num_steps=2
    )

  first = make()
  reference = first.reference()
  source = ShapesSource(0, 'held_out', 64, 16)
  images = np.stack([source[i]['image'] for i in range(32)])
  found = fid.Statistics.of(first.encode(images))
  # On every device, as the reference of one may be used on another.
  program = first._apply.lower(images).as_text()
  assert 'precision = [HIGHEST, HIGHEST]' in program
  assert 'precision = [DEFAULT, DEFAULT]' not in program
  # Half as many held-out images as were trained on.
  distance = fid.frechet_distance(found, reference.statistics)
  assert distance == pytest.approx(0, abs=1e-4)
  halves = (first.encode(part) for part in (images[:16], images[16:]))
  expected = fid.frechet_distance(*map(fid.Statistics.of, halves))
  assert shapes_features.halves(reference) == pytest.approx(expected, rel=1e-4)
  # Others of the data are not those of the reference.
  others = first.of_data(32)
  assert others.count == 32
  assert fid.frechet_distance(others, reference.statistics) > 10 * distance

  monkeypatch.delattr(classifier, 'train')
  again = make()
  assert again.settings == first.settings and again.settings['weights']
  np.testing.assert_array_equal(again.encode(images), first.encode(images))
  np.testing.assert_array_equal(again.reference().rows, reference.rows)
  with pytest.raises(AttributeError):
    shapes_features.Features(16, str(tmp_path), num_images=64, num_steps=3)


def test_the_words_of_the_labels_are_those_of_the_data():
  images, labels = shapes_features._images_and_labels(40, 16)
  source = ShapesSource(0, 'train', 40, 16)
  assert images.shape == (40, 16, 16, 3)
  words = shapes_features._words()
  for i in range(40):
    scene, *_ = source.scene(i)
    assert words['count'][labels['count'][i]] == len(scene.objects)
    assert words['layout'][labels['layout'][i]] == scene.layout
    assert words['color'][labels['color'][i]] == scene.objects[0].color
