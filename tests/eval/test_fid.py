"""Distances of Gaussian features; Frechet distances against pytorch-fid."""

import numpy as np
import pytest

from mdm_jax.eval import fid


def sets(first: int, second: int, width: int = 24):
  rng = np.random.default_rng(0)
  mixed = rng.standard_normal((width, width)) / np.sqrt(width)
  return (
    rng.standard_normal((first, width)) @ mixed,
    0.8 * rng.standard_normal((second, width)) + 0.1,
  )


def statistics(features, parts=(0.1, 0.6)):
  found = fid.Statistics(features.shape[1])
  for part in np.split(features, [int(p * len(features)) for p in parts]):
    found.update(part)
  return found


@pytest.mark.parametrize('parts', [(), (0.0, 0.3), (0.1, 0.6)])
def test_statistics_are_numpys(parts):
  features = 100 + sets(50, 0)[0]
  found = statistics(features, parts)
  np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-13)
  np.testing.assert_allclose(
    found.covariance(), np.cov(features, rowvar=False), atol=1e-12
  )
  assert found.count == 50


def test_merged_statistics():
  features = sets(50, 0)[0]
  merged = statistics(features[:20])
  merged.merge(statistics(features[20:]))
  merged.merge(fid.Statistics(24))
  np.testing.assert_allclose(
    merged.covariance(), np.cov(features, rowvar=False), atol=1e-13
  )


@pytest.mark.parametrize(
  'count, expected',
  [
    (200, 7.6862902621714895),
    (10, 18.957874199637107),  # A singular covariance.
  ],
)
def test_frechet_distance_equals_pytorch_fid(count, expected):
  """Expected: pytorch-fid 0.3.0's distance of the same random features."""
  first, second = map(statistics, sets(count, 300))
  assert fid.frechet_distance(first, second) == pytest.approx(
    expected, rel=1e-8
  )
  assert fid.frechet_distance(second, first) == pytest.approx(
    expected, rel=1e-8
  )


def test_frechet_distance_to_itself_is_zero():
  first = statistics(sets(200, 0)[0])
  assert abs(fid.frechet_distance(first, first)) < 1e-8


def test_too_few_or_broken_features():
  with pytest.raises(ValueError, match='1 images have no covariance'):
    statistics(np.zeros((1, 4))).covariance()
  with pytest.raises(ValueError, match='not finite: check the weights'):
    statistics(np.full((2, 4), np.nan))
  with pytest.raises(ValueError, match='KID needs at least 2'):
    fid.kernel_distance(np.zeros((1, 4)), np.zeros((5, 4)))
  with pytest.raises(ValueError, match='more than 3 images'):
    fid.precision_recall(np.zeros((3, 4)), np.zeros((5, 4)))


def test_kernel_distance_is_the_double_sum():
  """The only subset of the size of a set is the set itself."""
  x, y = sets(12, 12, 5)

  def kernel(a, b):
    return (a @ b / 5 + 1) ** 3

  pairs = [(i, j) for i in range(12) for j in range(12)]
  expected = np.mean(
    [kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j]
  ) - 2 * np.mean([kernel(x[i], y[j]) for i, j in pairs])
  mean, spread = fid.kernel_distance(x, y, num_subsets=3)
  assert mean == pytest.approx(expected, rel=1e-12)
  assert spread == 0


def test_kernel_distance_is_unbiased_and_seeded():
  both = sets(0, 800)[1]
  same, spread = fid.kernel_distance(
    both[:400], both[400:], subset_size=50, num_subsets=200
  )
  assert abs(same) < 3 * spread / np.sqrt(200) + 0.01
  assert fid.kernel_distance(*sets(90, 80), subset_size=20) == (
    fid.kernel_distance(*sets(90, 80), subset_size=20)
  )
  assert fid.kernel_distance(*sets(90, 80), subset_size=20, seed=1) != (
    fid.kernel_distance(*sets(90, 80), subset_size=20)
  )


@pytest.mark.parametrize('block', [1024, 2])
def test_precision_and_recall(monkeypatch, block):
  monkeypatch.setattr(fid, '_BLOCK', block)
  # On a line. A ball reaches to the third neighbour: at an end of the
  # reference its radius is 3. All generated images are at one end.
  reference = np.arange(10.0)[:, None]
  generated = np.array([[-3.0], [-2.9], [-2.8], [-3.1], [-3.2]])
  precision, recall = fid.precision_recall(generated, reference)
  assert precision == 3 / 5  # -3.0, -2.9 and -2.8.
  assert recall == 0
  assert fid.precision_recall(reference, reference) == (1, 1)
  # The generated images are close together, so their balls are small.
  assert fid.precision_recall(reference, generated) == (0, 3 / 5)


def test_sample_keeps_some_rows_and_all_statistics():
  features = sets(100, 0)[0].astype(np.float32)
  sample = fid.Sample(24, 100, 30)
  for part in np.split(features, [1, 50, 50]):
    sample.add(part)
  kept = [i for i, row in enumerate(features) if row in sample.rows]
  assert len(kept) == 30 and len(sample.rows) == 30
  assert 30 < np.mean(kept) < 70  # Not the first ones.
  assert sample.statistics.count == 100
  again = fid.Sample.from_arrays(sample.to_arrays())
  np.testing.assert_array_equal(again.rows, features[kept])
  assert fid.frechet_distance(
    again.statistics, statistics(features)
  ) == pytest.approx(0, abs=1e-9)


def test_sample_of_fewer_features_than_its_limit():
  sample = fid.Sample(4, 10, 100)
  sample.add(np.ones((7, 4)))
  assert len(sample.rows) == sample.statistics.count == 7


def test_sample_of_no_features():
  assert fid.Sample(4, 10, 100).to_arrays()['rows'].shape == (0, 4)
