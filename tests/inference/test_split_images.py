"""Images of a split are read together, and one that is damaged is skipped."""

import numpy as np
import pytest

from configs import emoji_64, moving_shapes
from mdm_jax.builders.stage import make_stage
from mdm_jax.data import shapes, tar_index
from mdm_jax.inference import split_images
from tests.data.test_pipeline import Requested
from tests.tools.test_prepare_data import good_files, write_tar


def test_a_damaged_image_is_skipped(make_config, tmp_path, caplog):
  files = good_files(4)
  files['001.jpg'] = files['001.jpg'][:-200]
  write_tar(tmp_path / 's.tar', files)
  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  config = make_config()
  config.data.update(name='tars', path=f'{tmp_path}/index')
  stage = make_stage(config, 0)
  found = split_images.read(stage, 'train')
  assert found.captions == found.prompts == [f'picture {i}' for i in (0, 2, 3)]
  assert found.images.shape == (3, 8, 8, 3) and len(found.keys) == 3
  assert 'Skipped an unusable record: ' in caplog.text
  config.data.max_pixels = 1
  with pytest.raises(ValueError, match='none of the images that were read'):
    split_images.read(stage, 'train')


def test_records_are_requested_ahead(make_config, monkeypatch):
  class Images(Requested):
    def request(self, index):
      read = super().request(index)
      image = np.full((8, 8, 3), index, np.uint8)
      return lambda: read() | {'image': image, 'caption': 'a'}

  source = Images(200)
  monkeypatch.setattr(split_images, 'make_source', lambda *_: source)
  found = split_images.read(make_stage(make_config(), 0), count=100)
  np.testing.assert_array_equal(found.images[:, 0, 0, 0], range(100))
  assert source.most == 32


def test_a_stage_of_clips_is_refused():
  config = moving_shapes.get_config('').lock()
  training, held_out = split_images.read_both(make_stage(config, 0), 2, 1)
  assert (len(training.images), len(held_out.images)) == (2, 1)
  clips = make_stage(config, len(config.stages) - 1)
  with pytest.raises(ValueError, match='^stage .* has clips, not images: name'):
    split_images.read_both(clips, 2, 1)


def test_images_beside_clips_are_those_that_were_trained_on():
  config = moving_shapes.get_config('').lock()
  stage = make_stage(config, 0)
  trained = split_images.on_training_images(stage)
  found = split_images.read(stage, 'train', 2)
  (batch,) = trained.make_dataset('train', num_batches=1)
  for i in range(2):
    expected = shapes.ShapesSource(
      config.seed, 'train', 10, stage.resolutions[-1], config.data.two_objects
    )[i]
    np.testing.assert_array_equal(found.images[i], expected['image'])
    np.testing.assert_array_equal(batch['image'][i], expected['image'])
  assert found.captions != split_images.read(stage, count=2).captions
  clips = make_stage(config, len(config.stages) - 1)
  assert split_images.on_training_images(clips) is clips


def test_a_data_set_without_validation_split_is_refused():
  config = emoji_64.get_config('')
  config.data.update(name='tfds:some', validation_split='')
  with pytest.raises(ValueError, match='no validation split, so nothing tells'):
    split_images.read_both(make_stage(config, 0), 2, 1)
