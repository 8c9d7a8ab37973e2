"""Edge width follows the theory of blurred edges, and ignores shades."""

import numpy as np
import pytest
from scipy import ndimage

from mdm_jax.data import shapes
from mdm_jax.eval import edge_width

RESOLUTION, FINER = 64, 4


def scene(shape, pattern='solid', background='white', color='red'):
  item = shapes.Object(shape, color, pattern, 'large', 0.47, 0.52, 0.28)
  return shapes.Scene((item,), background, 'centre')


def blurred(scene, sigma):
  """A scene, blurred by a Gaussian of `sigma` pixels, averaged over pixels."""
  image = shapes.draw(scene, FINER * RESOLUTION).astype(np.float64)
  blur = FINER * sigma
  image = ndimage.gaussian_filter(image, (blur, blur, 0), mode='nearest')
  image = image.reshape(RESOLUTION, FINER, RESOLUTION, FINER, 3)
  return image.mean((1, 3)).round().astype(np.uint8)


def test_width_of_a_blurred_step():
  """Against a step that is blurred and averaged numerically."""
  assert edge_width.width_of(0) == 0.8  # A ramp of one pixel.
  fine = 0.01
  position = np.arange(-30, 30, fine)
  for sigma in (0.3, 0.8, 2.5):
    profile = ndimage.gaussian_filter1d((position >= 0) * 1.0, sigma / fine)
    profile = ndimage.uniform_filter1d(profile, round(1 / fine))
    low, high = np.interp([0.1, 0.9], profile, position)
    assert edge_width.width_of(sigma) == pytest.approx(high - low, abs=0.02)
  # A wide Gaussian is 2.563 sigma wide, whatever the pixels.
  assert edge_width.width_of(4) == pytest.approx(2.563 * 4, abs=0.03)


@pytest.mark.parametrize('shape', ['circle', 'square', 'triangle', 'star'])
def test_width_follows_the_blur(shape):
  drawn = shapes.draw(scene(shape), RESOLUTION)
  assert edge_width.edge_width(drawn) == pytest.approx(0.8, abs=0.05)
  for sigma in (0.5, 1.0, 1.5):
    expected = edge_width.width_of(sigma)
    found = edge_width.edge_width(blurred(scene(shape), sigma))
    assert found == pytest.approx(expected, abs=0.1), sigma


@pytest.mark.parametrize(
  'look',
  [
    {'pattern': 'striped'},
    {'pattern': 'dotted', 'background': 'grey', 'color': 'yellow'},
    {'background': 'beige', 'color': 'purple'},
    {'background': 'teal', 'color': 'orange'},
  ],
  ids=str,
)
def test_shades_do_not_count(look):
  found = edge_width.edge_width(blurred(scene('circle', **look), 1.0))
  assert found == pytest.approx(edge_width.width_of(1.0), abs=0.15)


def test_noise_hardly_counts():
  image = blurred(scene('circle'), 1.0)
  noise = np.random.default_rng(0).normal(0, 6, image.shape)
  image = (image + noise).clip(0, 255).astype(np.uint8)
  expected = edge_width.width_of(1.0)
  assert edge_width.edge_width(image) == pytest.approx(expected, abs=0.15)


def test_a_halo_hardly_counts():
  """A band around a circle in which the background overshoots by a tenth."""
  image = blurred(scene('circle', background='grey'), 1.0).astype(np.float64)
  y, x = (np.indices((RESOLUTION, RESOLUTION)) + 0.5) / RESOLUTION
  distance = RESOLUTION * (np.hypot(x - 0.47, y - 0.52) - 0.28)
  color, background = np.array(shapes.COLORS['red']), 128
  image[(distance > 2) & (distance < 5)] += 0.1 * (background - color)
  expected = edge_width.width_of(1.0)
  found = edge_width.edge_width(image.clip(0, 255).astype(np.uint8))
  assert found == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
  'image',
  [
    np.full((64, 64, 3), 128, np.uint8),
    np.zeros((4, 4, 3), np.uint8),
    np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8),
    # Of which an orange object is almost a shade.
    shapes.draw(scene('circle', background='black'), 64),
    shapes.draw(scene('circle'), 8),
  ],
  ids=['plain', 'black', 'noise', 'shade', 'small'],
)
def test_without_an_outline_there_is_no_width(image):
  assert edge_width.edge_width(image) is None
