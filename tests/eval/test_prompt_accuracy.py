"""Prompt accuracy of drawn scenes, whose right answers are known."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from mdm_jax.data import shapes
from mdm_jax.eval import prompt_accuracy

VOCABULARY = prompt_accuracy.Vocabulary(
  colors=shapes.COLORS,
  backgrounds=shapes.BACKGROUNDS,
  silhouettes=shapes.silhouettes(),
  patterns=shapes.pattern_tiles(),
  period=shapes.PERIOD,
  sizes={name: sum(ends) / 2 for name, ends in shapes.SIZES.items()},
)
ATTRIBUTES = ('background', 'count', 'position', 'all')
ATTRIBUTES += prompt_accuracy.OBJECT_ATTRIBUTES


def _state(scene):
  """A statement of every attribute of a scene."""
  objects = [
    {name: getattr(item, name) for name in prompt_accuracy.OBJECT_ATTRIBUTES}
    for item in scene.objects
  ]
  layout = 'position' if len(objects) == 1 else 'relation'
  return {
    'background': scene.background,
    'objects': objects,
    layout: scene.layout,
  }


def _examples(count, resolution, seed=5):
  source = shapes.ShapesSource(seed, 'validation', count, resolution)
  scenes = [source.scene(index)[0] for index in range(count)]
  images = [shapes.draw(scene, resolution) for scene in scenes]
  return images, [_state(scene) for scene in scenes]


@pytest.mark.parametrize('resolution, count', [(64, 200), (256, 40)])
def test_drawn_scenes_are_right(resolution, count):
  images, statements = _examples(count, resolution)
  found = prompt_accuracy.accuracy(images, statements, VOCABULARY)
  assert set(found) == set(ATTRIBUTES)
  assert min(found.values()) >= 0.99, found


def test_small_images_are_nearly_right():
  images, statements = _examples(100, 32)
  found = prompt_accuracy.accuracy(images, statements, VOCABULARY)
  assert min(found[name] for name in ATTRIBUTES if name != 'all') >= 0.95


def test_noise_blur_and_specks_do_no_harm():
  rng = np.random.default_rng(0)
  images, statements = _examples(150, 64)
  spoilt = []
  for image in images:
    image = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0))
    image += 6 * rng.standard_normal(image.shape)
    for row, column in rng.integers(2, 60, (3, 2)):
      image[row : row + 2, column] = rng.integers(0, 255, 3)
    spoilt.append(np.clip(image, 0, 255).astype(np.uint8))
  found = prompt_accuracy.accuracy(spoilt, statements, VOCABULARY)
  assert min(found[name] for name in ATTRIBUTES if name != 'all') >= 0.97


def test_blurred_shapes_are_right():
  """A network early in training generates soft edges around clear shapes."""
  images, statements = _examples(200, 64)
  blurred = [
    ndimage.gaussian_filter(image.astype(np.float32), (1.5, 1.5, 0))
    for image in images
  ]
  found = prompt_accuracy.accuracy(
    np.clip(blurred, 0, 255).astype(np.uint8), statements, VOCABULARY
  )
  for attribute in ('shape', 'color', 'size', 'count', 'background'):
    assert found[attribute] >= 0.98, found


def test_other_prompts_are_wrong():
  images, statements = _examples(100, 64)
  shuffled = statements[1:] + statements[:1]
  found = prompt_accuracy.accuracy(images, shuffled, VOCABULARY)
  assert found['all'] < 0.05
  assert found['background'] < 0.4 and found['color'] < 0.4
  assert found['shape'] < 0.4 and found['pattern'] < 0.45
  assert found['position'] < 0.35 and found['size'] < 0.7


def test_every_attribute_can_be_wrong_alone():
  right = shapes.Object('ring', 'red', 'solid', 'small', 0.28, 0.28, 0.17)
  scene = shapes.Scene((right,), 'grey', 'top left')
  changes = {
    'shape': {'shape': 'circle'},
    'color': {'color': 'orange'},
    'pattern': {'pattern': 'dotted'},
    'size': {'size': 'large', 'radius': 0.27},
    'position': {'x': 0.5},
  }
  for attribute, change in changes.items():
    changed = dataclasses.replace(right, **change)
    image = shapes.draw(dataclasses.replace(scene, objects=(changed,)), 64)
    marks = prompt_accuracy.score(image, _state(scene), VOCABULARY)
    wrong = {name for name, each in marks.items() if not all(each)}
    assert wrong == {attribute}
  image = shapes.draw(dataclasses.replace(scene, background='white'), 64)
  marks = prompt_accuracy.score(image, _state(scene), VOCABULARY)
  assert marks['background'] == [False] and marks['color'] == [True]


@pytest.fixture
def pair():
  left = shapes.Object('star', 'green', 'striped', 'large', 0.28, 0.5, 0.255)
  right = shapes.Object('cross', 'pink', 'checked', 'small', 0.8, 0.5, 0.17)
  return shapes.Scene((left, right), 'beige', 'left of')


def test_two_objects_are_matched_whatever_the_order(pair):
  image = shapes.draw(pair, 64)
  stated = _state(pair)
  turned = {
    **stated,
    'objects': stated['objects'][::-1],
    'relation': 'right of',
  }
  for each in (stated, turned):
    marks = prompt_accuracy.score(image, each, VOCABULARY)
    assert all(map(all, marks.values())) and len(marks['color']) == 2
  for wrong in ('right of', 'above', 'below'):
    stated['relation'] = wrong
    marks = prompt_accuracy.score(image, stated, VOCABULARY)
    assert marks['position'] == [False] and all(marks['shape'])


def test_a_missing_object_is_wrong_in_everything(pair):
  alone = dataclasses.replace(pair, objects=pair.objects[:1])
  marks = prompt_accuracy.score(
    shapes.draw(alone, 64), _state(pair), VOCABULARY
  )
  assert marks['count'] == [False] and marks['position'] == [False]
  for attribute in prompt_accuracy.OBJECT_ATTRIBUTES:
    assert sorted(marks[attribute]) == [False, True]
  blank = np.full((64, 64, 3), 128, np.uint8)
  marks = prompt_accuracy.score(blank, _state(pair), VOCABULARY)
  assert not any(map(any, marks.values()))


def test_what_is_not_stated_is_not_marked(pair):
  image = shapes.draw(pair, 64)
  stated = {
    'background': 'beige',
    'objects': [
      {'shape': 'star', 'color': 'green'},
      {'shape': 'cross', 'color': 'blue', 'size': 'small'},
    ],
    'relation': 'left of',
  }
  marks = prompt_accuracy.score(image, stated, VOCABULARY)
  assert marks['pattern'] == [] and marks['size'] == [True]
  assert marks['color'] == [True, False]
  means = prompt_accuracy.accuracy([image], [stated], VOCABULARY)
  assert 'pattern' not in means
  assert means['color'] == 0.5 and means['all'] == 0


def test_errors():
  with pytest.raises(ValueError, match=r'\(64, 32, 3\)'):
    prompt_accuracy.analyze(np.zeros((64, 32, 3), np.uint8), VOCABULARY)
  with pytest.raises(ValueError, match='longer'):
    prompt_accuracy.accuracy([], [{}], VOCABULARY)
