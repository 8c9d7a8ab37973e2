"""Motions of drawn clips are found; those of other clips are not."""

import numpy as np
import pytest

from mdm_jax.builders.prompts import chance_accuracy, make_vocabulary
from mdm_jax.data.moving_shapes import MovingShapesSource
from mdm_jax.eval import motion, prompt_accuracy

VOCABULARY = make_vocabulary()


def clips(count, frames, resolution=64, split='held_out'):
  source = MovingShapesSource(0, split, count, resolution, frames, 0.3)
  for index in range(count):
    yield source[index]['image'], source.scene(index)[2]


@pytest.mark.parametrize('frames, resolution', [(8, 64), (16, 32)])
def test_drawn_clips_are_right(frames, resolution):
  marks = [
    motion.score(clip, stated, VOCABULARY)
    for clip, stated in clips(60, frames, resolution)
  ]
  found = prompt_accuracy.mean_marks(marks)
  assert {*prompt_accuracy.MOTION_ATTRIBUTES} < found.keys()
  assert min(found.values(), key=float) >= 0.98, found


def test_played_backwards_they_are_wrong():
  """Of one object, as two could be taken for each other."""
  opposite = {'moving': 'moving', 'growing': 'shrinking'}
  opposite['shrinking'] = 'growing'
  seen = set()
  for clip, stated in clips(60, 8):
    kind, *others = [each['motion'] for each in stated['objects']]
    if others or kind not in opposite:
      continue
    seen.add(kind)
    _, (item,) = motion.analyze(clip[::-1], VOCABULARY)
    assert item.motion == opposite[kind]
    found = motion.score(clip[::-1], stated, VOCABULARY)
    assert not any(found['direction'])
    assert found['motion'] == [kind == 'moving']
  assert seen == {*opposite}


def test_a_still_clip_rests():
  for clip, _ in clips(20, 8):
    still = np.repeat(clip[:1], 8, axis=0)
    _, objects = motion.analyze(still, VOCABULARY)
    assert {item.motion for item in objects} <= {'resting'}


def test_images_are_marked_without_motion():
  for clip, stated in clips(20, 8):
    found = motion.score(clip[0], stated, VOCABULARY)
    assert not {*prompt_accuracy.MOTION_ATTRIBUTES} & found.keys()
    assert all(found['background'])


def test_nothing_is_found_in_noise_or_nothing():
  rng = np.random.default_rng(0)
  stated = next(clips(1, 4))[1]
  for clip in (
    rng.integers(0, 256, (4, 64, 64, 3), np.uint8),
    np.zeros((4, 64, 64, 3), np.uint8),
  ):
    found = motion.score(clip, stated, VOCABULARY)
    assert not any(found['motion'])


def test_chance_is_low_for_motions():
  at_random = chance_accuracy('moving_shapes', moving=True)
  for name in prompt_accuracy.MOTION_ATTRIBUTES:
    assert 0 < at_random[name] < 0.3
  # Of images of them nothing moves, so that more is right by chance.
  of_images = chance_accuracy('moving_shapes')
  for found in (of_images, chance_accuracy()):
    assert not {*prompt_accuracy.MOTION_ATTRIBUTES} & found.keys()
  assert of_images['all'] > at_random['all']
  assert of_images['size'] != chance_accuracy()['size']
