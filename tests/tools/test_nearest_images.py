"""Samples are compared with held-out images, or not at all."""

import pytest

from configs import emoji_64, moving_shapes
from mdm_jax.builders.stage import make_stage
from mdm_jax.tools import nearest_images


def test_a_stage_of_clips_is_refused():
  config = moving_shapes.get_config('').lock()
  training, held_out = nearest_images.read_images(make_stage(config, 0), 2, 1)
  assert (len(training.images), len(held_out.images)) == (2, 1)
  clips = make_stage(config, len(config.stages) - 1)
  with pytest.raises(ValueError, match='^stage .* has clips, not images: name'):
    nearest_images.read_images(clips, 2, 1)


def test_a_data_set_without_validation_split_is_refused():
  config = emoji_64.get_config('')
  config.data.update(name='tfds:some', validation_split='')
  with pytest.raises(ValueError, match='no validation split, so nothing tells'):
    nearest_images.read_images(make_stage(config, 0), 2, 1)
