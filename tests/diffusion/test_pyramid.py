import numpy as np
import pytest

from mdm_jax.diffusion import pyramid as pyramids


def shapes(*sides):
  return [(side, side, 3) for side in sides]


def _pool(images, factor):
  batch, height, width, channels = images.shape
  pooled = np.zeros((batch, height // factor, width // factor, channels))
  for y in range(height // factor):
    for x in range(width // factor):
      block = images[
        :, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor
      ]
      pooled[:, y, x] = block.mean((1, 2))
  return pooled


def test_every_pixel_survives_the_round_trip():
  pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  floats = pyramids.to_float(pixels)
  assert floats.min() == -127 / 128 and floats.max() == 1
  np.testing.assert_array_equal(pyramids.to_uint8(floats), pixels)


def test_pixels_are_rounded_and_clipped():
  values = np.array([-2.0, -1, (9.4 - 127) / 128, (9.6 - 127) / 128, 1, 1.1])
  np.testing.assert_array_equal(
    pyramids.to_uint8(values), [0, 0, 9, 10, 255, 255]
  )


def test_pixels_are_truncated_as_in_the_release():
  values = np.array([-2.0, -1, (9.4 - 127) / 128, (9.6 - 127) / 128, 1, 1.1])
  np.testing.assert_array_equal(
    pyramids.to_uint8(values, 'truncate'), [0, 0, 9, 9, 255, 255]
  )
  pixels = np.arange(256, dtype=np.uint8)
  floats = pyramids.to_float(pixels)
  np.testing.assert_array_equal(pyramids.to_uint8(floats, 'truncate'), pixels)


def test_levels_are_block_means_of_the_first_examples():
  images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
  images = images.astype(np.float32)
  levels = pyramids.make_pyramid(images, shapes(4, 16, 32), (1, 0.75, 0.5))
  np.testing.assert_array_equal(levels[2], images[:2])
  np.testing.assert_allclose(levels[1], _pool(images, 2)[:3], atol=1e-6)
  np.testing.assert_allclose(levels[0], _pool(images, 8), atol=1e-6)


def test_images_of_the_coarse_examples_take_their_places():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(8, 16, 16, 3)).astype(np.float32)
  sizes = (1, 0.75, 0.5)
  whole = pyramids.make_pyramid(images, shapes(4, 8, 16), sizes, repeats=2)
  np.testing.assert_array_equal(whole[2], images[[0, 1, 4, 5]])
  levels = pyramids.make_pyramid(
    images[[0, 1, 4, 5]],
    shapes(4, 8, 16),
    sizes,
    repeats=2,
    coarse={1: _pool(images[[2, 6]], 2), 0: _pool(images[[3, 7]], 4)},
  )
  for found, expected in zip(levels, whole, strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-6)
  with pytest.raises(ValueError, match='8x8: crop them to 4x4, as of level 0'):
    pyramids.make_pyramid(
      images[:4], shapes(4, 16), (1, 0.5), coarse={0: images[:4, :8, :8]}
    )


def test_wrong_resolutions_are_refused():
  images = np.zeros((1, 24, 24, 3), np.float32)
  with pytest.raises(
    ValueError, match='24x24: crop them to 16x16, as of level 1'
  ):
    pyramids.make_pyramid(images, shapes(8, 16), (1, 1))
  with pytest.raises(ValueError, match='divide'):
    pyramids.make_pyramid(images, shapes(16, 24), (1, 1))
