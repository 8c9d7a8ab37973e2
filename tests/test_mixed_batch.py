import numpy as np
import pytest

from mdm_jax import mixed_batch

LETTERS = np.array(list('abcdefghijkl'))


@pytest.mark.parametrize(
  'ratio, fractions',
  [
    ((1,), (1,)),
    ((1, 2), (1, 2 / 3)),
    ((1, 1, 2), (1, 3 / 4, 1 / 2)),
    ((0, 0, 1), (1, 1, 1)),
  ],
)
def test_shares_accumulate_towards_the_coarse_levels(ratio, fractions):
  assert mixed_batch.batch_fractions(ratio) == pytest.approx(fractions)


@pytest.mark.parametrize('ratio', [(1, 0), (-1, 2)])
def test_shares_that_leave_a_level_empty_are_refused(ratio):
  with pytest.raises(ValueError, match='mixed_ratio'):
    mixed_batch.batch_fractions(ratio)


def test_a_batch_that_does_not_divide_is_refused():
  fractions = mixed_batch.batch_fractions((1, 2))
  assert mixed_batch.level_batch_sizes(3 * 2**20, fractions) == (
    3 * 2**20,
    2**21,
  )
  with pytest.raises(ValueError, match='4 examples'):
    mixed_batch.level_batch_sizes(4, fractions)


@pytest.mark.parametrize(
  'ratio, batch',
  [
    ((1,), 1),
    ((1, 2), 3),
    ((2, 4), 3),
    ((0, 1, 1), 2),
    ((9, 1), 10),
    ((0.5, 0.5), 2),
    ((0.3, 0.6), 3),
    ((0.1, 0.2, 0.4), 7),
    ((1, 4095), 4096),
  ],
)
def test_least_batch(ratio, batch):
  assert mixed_batch.least_batch(ratio) == batch
  fractions = mixed_batch.batch_fractions(ratio)
  assert (
    mixed_batch.num_repeats(mixed_batch.level_batch_sizes(batch, fractions))
    == 1
  )


@pytest.mark.parametrize(
  'sizes, repeats, levels',
  [
    ((12, 8), 4, (1, 1, 0)),
    ((8, 6, 4), 2, (2, 2, 1, 0)),
    ((6, 6, 3), 3, (2, 1)),
    ((8, 8), 8, (1,)),
    ((8,), 8, (0,)),
  ],
)
def test_shortest_pattern(sizes, repeats, levels):
  assert mixed_batch.num_repeats(sizes) == repeats
  assert mixed_batch.finest_levels(sizes) == levels


@pytest.mark.parametrize(
  'repeats, seen', [(1, 'abcdefgh'), (2, 'abcdghij'), (4, 'abdeghjk')]
)
def test_a_level_sees_the_first_of_each_period(repeats, seen):
  x = np.arange(24, dtype=np.float32).reshape(12, 2)
  rows = [LETTERS.tolist().index(letter) for letter in seen]
  taken = mixed_batch.take({'x': x, 'none': None}, 8, repeats)
  assert taken['none'] is None
  np.testing.assert_array_equal(taken['x'], x[rows])
  rest = np.delete(x, rows, axis=0)
  np.testing.assert_array_equal(mixed_batch.join(taken['x'], rest, repeats), x)
  padded = np.zeros_like(x)
  padded[rows] = x[rows]
  np.testing.assert_array_equal(
    mixed_batch.pad(taken['x'], 12, repeats), padded
  )


def test_devices_keep_their_share_of_every_part():
  # Periods of 3 and of 2 on two devices, dealt out in two parts.
  tree = {'x': LETTERS, 'y': np.arange(8)}
  parts = mixed_batch.split(tree, 2, 4)
  assert [''.join(row) for row in parts['x']] == ['abcghi', 'defjkl']
  np.testing.assert_array_equal(parts['y'], [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_names_of_images():
  sizes = (16, 1), (64, 1), (64, 4), (256, 8)
  shapes = [mixed_batch.example_shape(*size) for size in sizes]
  assert shapes == [(16, 16, 3), (64, 64, 3), (4, 64, 64, 3), (8, 256, 256, 3)]
  assert mixed_batch.image_names(shapes) == (
    'image_16',
    'image_64',
    'image_4x64',
    'image',
  )


def test_images_of_levels_have_names_of_their_own():
  """Also those that are decoded from codes of the same size."""
  image, clip = mixed_batch.example_shape(64), mixed_batch.example_shape(64, 4)
  names = mixed_batch.image_level_names([image, image, clip])
  assert names == ('latent_64', '64', '4x64')
  assert mixed_batch.image_level_names([image, clip]) == ('64', '4x64')
  assert [*map(mixed_batch.named_shape, names)] == [image, image, clip]
  assert mixed_batch.named_shape('path') is None
  keys = 'image_latent_64', 'image_64', 'image'
  assert mixed_batch.image_names([image, image, clip]) == keys
