"""Batches as a configuration asks for them."""

import numpy as np

from mdm_jax import inputs
from mdm_jax.data import shapes


def one_batch(config, resolutions, batch_sizes):
  (batch,) = inputs.make_dataset(
      config, 'train', resolutions, batch_sizes, process_index=0,
      process_count=1, num_batches=1)
  return batch


def test_a_mixed_batch_is_drawn_no_finer_than_it_is_seen(
    make_config, monkeypatch):
  config = make_config()
  drawn = []
  draw = shapes.draw
  def count(scene, resolution):
    drawn.append(resolution)
    return draw(scene, resolution)
  monkeypatch.setattr(shapes, 'draw', count)
  # Of four neighbours, two end at 32 px, one at 16 and one at 8.
  batch = one_batch(config, (8, 16, 32), (8, 6, 4))
  assert sorted(drawn) == [8] * 2 + [16] * 2 + [32] * 4
  rows = {'image': [0, 1, 4, 5], 'image_16': [2, 6], 'image_8': [3, 7]}
  for name, resolution in (('image', 32), ('image_16', 16), ('image_8', 8)):
    plain = one_batch(config, (resolution,), (8,))
    np.testing.assert_array_equal(batch[name], plain['image'][rows[name]])
    np.testing.assert_array_equal(batch['text'], plain['text'])


def test_an_unmixed_batch_has_one_array_of_images(make_config):
  batch = one_batch(make_config(), (8, 16), (4, 4))
  assert sorted(batch) == ['bad', 'image', 'scale', 'text']
  assert batch['image'].shape == (4, 16, 16, 3)
