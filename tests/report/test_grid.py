"""Every pixel of a pyramid is at its documented place on the page."""

import numpy as np
from PIL import Image
import pytest

from mdm_jax.report import grid

MARGIN, GAP, TILE = 16, 2, 128  # at the smallest tile


def make_pyramid(count, *edges, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.integers(0, 250, (count, edge, edge, 3), np.uint8) for edge in edges
  )


def test_levels_are_enlarged_side_by_side():
  pyramid = make_pyramid(1, 16, 32)
  page = grid.grid(pyramid, [''])
  assert page.dtype == np.uint8
  assert page.shape == (2 * MARGIN + TILE + GAP, 2 * MARGIN + 2 * TILE + GAP, 3)
  for r, level in enumerate(pyramid):
    left = MARGIN + r * (TILE + GAP)
    factor = TILE // level.shape[1]
    np.testing.assert_array_equal(
      page[MARGIN : MARGIN + TILE, left : left + TILE],
      level[0].repeat(factor, axis=0).repeat(factor, axis=1),
    )
    page = page.copy()
    page[MARGIN : MARGIN + TILE, left : left + TILE] = 255
  assert (page == 255).all()


def test_a_square_of_prompts_fills_rows_first():
  (level,) = make_pyramid(16, 128)
  page = grid.grid((level,), [''] * 16)
  pitch = TILE + GAP + MARGIN
  for i in range(16):
    top, left = MARGIN + i // 4 * pitch, MARGIN + i % 4 * (TILE + MARGIN)
    np.testing.assert_array_equal(
      page[top : top + TILE, left : left + TILE], level[i]
    )
  assert abs(page.shape[0] / page.shape[1] - 1) < 0.1


@pytest.mark.parametrize('num_levels', [1, 2, 3])
@pytest.mark.parametrize('count', [1, 4, 7, 16])
def test_the_page_is_about_square(num_levels, count):
  pyramid = make_pyramid(count, *(32, 64, 128)[:num_levels])
  height, width, _ = grid.grid(pyramid, ['a red circle'] * count).shape
  assert count == 1 or 1 / 2.5 < width / height < 2.5


def test_the_last_row_is_full_where_it_can_be():
  page = grid.grid(make_pyramid(16, 32, 64), ['a red circle'] * 16)
  assert page.shape[1] == MARGIN + 4 * (2 * TILE + GAP + MARGIN)


def test_a_caption_is_under_its_own_cell_and_not_wider():
  pyramid = make_pyramid(2, 128)
  prompts = ['a tall lighthouse in a storm', '']
  page = grid.grid(pyramid, prompts)
  blank = page.copy()
  for i in range(2):
    left = MARGIN + i * (TILE + MARGIN)
    blank[MARGIN : MARGIN + TILE, left : left + TILE] = 255
  ink_y, ink_x = np.nonzero((blank < 255).any(axis=-1))
  assert ink_y.min() >= MARGIN + TILE + GAP
  assert MARGIN <= ink_x.min() and ink_x.max() < MARGIN + TILE
  assert len(ink_x) > 200


@pytest.mark.parametrize('prompt', ['word ' * 40, 'x' * 200, 'a' + 'x' * 200])
def test_a_long_caption_ends_in_an_ellipsis(prompt):
  font = grid.ImageFont.load_default(size=11)
  lines = grid._wrap(prompt, font, 128)
  assert len(lines) == 3
  assert lines[-1].endswith('…')
  assert all(font.getlength(line) <= 128 for line in lines)
  assert all(font.getlength(line) > 64 for line in lines)


def test_a_caption_that_fits_keeps_every_word():
  font = grid.ImageFont.load_default(size=11)
  prompt = 'a  small red circle above a big blue square\n'
  assert ' '.join(grid._wrap(prompt, font, 128)) == ' '.join(prompt.split())


def test_a_smaller_tile_averages():
  (level,) = make_pyramid(1, 128)
  page = grid.grid((level,), [''], tile=64)
  expected = level[0].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
  image = page[8 : 8 + 64, 8 : 8 + 64].astype(float)
  assert np.abs(image - expected).max() <= 1


def test_wrong_shapes_are_refused():
  fine, coarse = make_pyramid(2, 32, 16)
  with pytest.raises(ValueError, match=r'\[32, 16\]: give them coarse to fine'):
    grid.grid((fine, coarse), ['a', 'b'])
  with pytest.raises(ValueError, match='B = 3, the number of prompts'):
    grid.grid((coarse, fine), ['a', 'b', 'c'])
  with pytest.raises(ValueError, match='give uint8'):
    grid.grid((coarse / 255,), ['a', 'b'])
  with pytest.raises(ValueError, match='divisor of each, not 40'):
    grid.grid((coarse, fine), ['a', 'b'], tile=40)


def test_png_round_trip(tmp_path):
  (level,) = make_pyramid(1, 8)
  path = tmp_path / 'samples' / '0_32_5.png'
  grid.save_png(path, level[0])
  grid.save_png(path, level[0])
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  np.testing.assert_array_equal(np.asarray(Image.open(path)), level[0])
