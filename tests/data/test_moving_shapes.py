"""Moving shapes: what a caption says is what a clip shows."""

import numpy as np
import pytest

from configs import moving_shapes as recipe
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data import shapes
from mdm_jax.data.moving_shapes import (
  DIRECTIONS,
  SPEEDS,
  MovingShapesSource,
)
from mdm_jax.data.text import words_of


def source(frames=8, split='train', two_objects=0.3):
  return MovingShapesSource(0, split, 500, 32, frames, two_objects)


def test_a_clip_of_fewer_frames_has_every_nth_frame():
  whole = source(8)[3]
  for frames in (2, 4):
    record = source(frames)[3]
    assert record['caption'] == whole['caption']
    np.testing.assert_array_equal(
      record['image'], whole['image'][:: 8 // frames]
    )
  np.testing.assert_array_equal(source(1)[3]['image'], whole['image'][0])
  assert not np.array_equal(source(8)[4]['image'], whole['image'])


def test_objects_stay_inside_and_apart():
  for index in range(500):
    moving, _, _ = source().scene(index)
    for time in (0, 0.5, 1):
      objects = moving.at(time).objects
      for item in objects:
        assert item.radius < item.x < 1 - item.radius
        assert item.radius < item.y < 1 - item.radius
      if len(objects) == 2:
        first, second = objects
        gap = np.abs([first.x - second.x, first.y - second.y]).max()
        assert gap > first.radius + second.radius


def test_motions_are_those_of_the_caption():
  seen = set()
  for index in range(500):
    moving, caption, stated = source().scene(index)
    start, end = moving.at(0), moving.at(1)
    pairs = list(zip(start.objects, end.objects, moving.motions))
    if [start.objects[0].shape, start.objects[0].color] != [
      stated['objects'][0][key] for key in ('shape', 'color')
    ]:
      pairs.reverse()
    for (first, last, motion), said in zip(pairs, stated['objects']):
      assert motion.kind == said['motion'] and said['motion'] in caption
      seen.add((motion.kind, motion.to))
      moved = np.array([last.x - first.x, last.y - first.y])
      if motion.kind == 'moving':
        np.testing.assert_allclose(
          moved,
          motion.path * np.array(DIRECTIONS[said['direction']]),
          atol=1e-9,
        )
        low, high = SPEEDS[said.get('speed', motion.speed)]
        assert low <= motion.path <= high
        assert motion.speed in caption or 'speed' not in said
      else:
        assert not moved.any()
      assert (last.radius > first.radius) == (motion.kind == 'growing')
      assert (last.radius < first.radius) == (motion.kind == 'shrinking')
      assert (last.angle > 0) == (motion.to == 'clockwise')
      assert (last.angle < 0) == (motion.to == 'counterclockwise')
      assert last.blend == (motion.to, 1) or motion.kind != 'changing'
  assert {kind for kind, _ in seen} == {
    *('moving', 'turning', 'growing', 'shrinking', 'changing', 'resting')
  }
  assert {to for kind, to in seen if kind == 'moving'} == {*DIRECTIONS}
  assert {to for kind, to in seen if kind == 'changing'} == {*shapes.COLORS}


def test_what_moves_starts_at_the_side_that_it_leaves():
  sides = {'left': 'right', 'right': 'left', 'up': 'bottom', 'down': 'top'}
  positions = set()
  for index in range(500):
    moving, _, stated = source().scene(index)
    for item, motion in zip(moving.scene.objects, moving.motions):
      if motion.kind != 'moving':
        continue
      x, y = DIRECTIONS[motion.to]
      start = item.x if x else item.y
      margin = (start if x + y > 0 else 1 - start) - item.radius
      assert shapes.MARGIN <= margin <= 3 * shapes.MARGIN
      if 'position' in stated:
        assert sides[motion.to] in stated['position']
        positions.add(stated['position'])
    kinds = [motion.kind for motion in moving.motions]
    if kinds == ['moving'] * 2:
      assert len({motion.to for motion in moving.motions}) == 1
  assert positions == {*shapes.PLACES} - {'centre'}


def test_an_object_is_drawn_turned_and_blended():
  item = shapes.Object('square', 'red', 'striped', 'large', 0.5, 0.5, 0.3)
  image = shapes.draw(shapes.Scene((item,), 'white', 'centre'), 64)

  def turned(**changes):
    other = shapes.dataclasses.replace(item, **changes)
    return shapes.draw(shapes.Scene((other,), 'white', 'centre'), 64)

  # A quarter turn clockwise of the pixels, but for rounding.
  quarter = turned(angle=np.pi / 2).astype(int)
  assert np.abs(quarter - np.rot90(image, -1)).max() <= 2
  # Corners are whole after an eighth of a turn: as much is covered.
  covered, expected = (
    (each.min(axis=-1) < 200).sum() for each in (turned(angle=np.pi / 4), image)
  )
  assert covered == pytest.approx(expected, rel=0.05)
  blue = turned(blend=('blue', 1.0))
  np.testing.assert_array_equal(blue, turned(color='blue'))


def test_held_out_clips_have_held_out_pairs():
  for index in range(100):
    moving, _, _ = source(split='held_out').scene(index)
    pairs = [(item.shape, item.color) for item in moving.scene.objects]
    held_out = shapes.HELD_OUT[moving.scene.background]
    assert any(pair in held_out for pair in pairs)


def test_captions_fit_and_have_no_unknown_word():
  config = recipe.get_config()
  tokenizer = make_tokenizer(config)
  # Its images may be those of shapes.
  images = shapes.ShapesSource(0, 'train', 500, 32, 0.3)
  captions = [
    each.scene(index)[1] for each in (source(), images) for index in range(500)
  ]
  words = {word for text in captions for word in words_of(text)}
  assert words <= tokenizer.known_words
  longest = max(map(len, (tokenizer.encode(x).nonzero()[0] for x in captions)))
  assert longest < config.text.max_length
  assert not any(tokenizer.excess(caption) for caption in captions)
