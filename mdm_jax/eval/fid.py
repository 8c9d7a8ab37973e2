"""FID, KID, precision and recall: distances between sets of image features.

All in float64. The generated images come first and the reference second;
exchanging them exchanges precision and recall.
"""

from collections.abc import Iterator, Mapping

from absl import logging
import numpy as np
import scipy.linalg

_BLOCK = 1024  # rows of the distance matrix that are in memory at once


class Statistics:
  """Streaming mean and covariance of features, in constant memory.

  Attributes:
    count: number of features so far.
    mean: float64 `[D]`.
    scatter: sum of the outer products of deviations from the mean, `[D, D]`.
  """

  def __init__(self, width: int):
    """Makes the statistics of no features; `width` is D."""
    self.count = 0
    self.mean = np.zeros(width)
    self.scatter = np.zeros((width, width))

  @classmethod
  def of(cls, features: np.ndarray) -> 'Statistics':
    """The statistics of features `[N, D]`; raises what `update` raises."""
    found = cls(features.shape[1])
    found.update(features)
    return found

  def update(self, features: np.ndarray) -> None:
    """Adds features `[N, D]`.

    Raises:
      ValueError: a feature is not finite.
    """
    if not len(features):
      return
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
      raise ValueError('A feature is not finite: check the weights.')
    part = Statistics(features.shape[1])
    part.count, part.mean = len(features), features.mean(0)
    deviations = features - part.mean
    part.scatter = deviations.T @ deviations
    self.merge(part)

  def merge(self, other: 'Statistics') -> None:
    """Adds the features of other statistics (Chan et al. 1979)."""
    count = self.count + other.count
    if not count:
      return
    step = other.mean - self.mean
    self.scatter += other.scatter
    self.scatter += np.outer(step, step) * (self.count * other.count / count)
    self.mean = self.mean + step * (other.count / count)
    self.count = count

  def covariance(self) -> np.ndarray:
    """Sample covariance (divided by count - 1), `[D, D]`.

    Raises:
      ValueError: there are fewer than two features.
    """
    if self.count < 2:
      raise ValueError(
        f'{self.count} images have no covariance: give at least 2.'
      )
    return self.scatter / (self.count - 1)


class Sample:
  """A summary of a set's features: statistics of all, and a random subset.

  Attributes:
    statistics: of all features.
    rows: the subset, float32 `[<= limit, D]`.
  """

  def __init__(self, width: int, count: int, limit: int, seed: int = 0):
    """Makes the summary of no features.

    Args:
      width: D.
      count: the largest number of features that will be added.
      limit: size of the subset, which is sampled uniformly from `count`.
      seed: of the subset.
    """
    self.statistics = Statistics(width)
    rng = np.random.default_rng(seed)
    self._is_kept = np.zeros(count, bool)
    self._is_kept[rng.choice(count, min(count, limit), replace=False)] = True
    self._kept = []
    self._added = 0

  def add(self, features: np.ndarray) -> None:
    """Adds features `[N, D]`.

    Raises:
      ValueError: a feature is not finite.
    """
    self.statistics.update(features)
    is_kept = self._is_kept[self._added : self._added + len(features)]
    self._kept.append(np.asarray(features, np.float32)[is_kept])
    self._added += len(features)

  @property
  def rows(self) -> np.ndarray:
    """The random subset of the features, float32 `[<= limit, D]`."""
    none = np.zeros((0, len(self.statistics.mean)), np.float32)
    return np.concatenate([none, *self._kept])

  def to_arrays(self) -> dict[str, np.ndarray]:
    """Arrays by name, for `from_arrays`."""
    return {
      'count': np.array(self.statistics.count),
      'mean': self.statistics.mean,
      'scatter': self.statistics.scatter,
      'rows': self.rows,
    }

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> 'Sample':
    """Restores a summary from `to_arrays`; features cannot be added to it."""
    sample = cls(len(arrays['mean']), 0, 0)
    statistics = sample.statistics
    statistics.count = int(arrays['count'])
    statistics.mean, statistics.scatter = arrays['mean'], arrays['scatter']
    sample._kept = [arrays['rows']]
    return sample


def frechet_distance(first: Statistics, second: Statistics) -> float:
  """FID: the Frechet distance between the Gaussians of two sets.

  Heusel et al., arXiv 1706.08500, eq. 6. The trace of (C1 C2)^(1/2) is
  computed as that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric: the
  result is real, and singular covariances need no offset. They make it too
  high, with a warning.

  Raises:
    ValueError: a set has fewer than two features.
  """
  covariances = first.covariance(), second.covariance()
  if min(first.count, second.count) <= len(first.mean):
    logging.warning(
      'Fréchet distance of %d images and %d: no more than its %d features, so '
      'a covariance is singular and the distance too high. Compare it only '
      'with those of the same numbers of images.',
      first.count,
      second.count,
      len(first.mean),
    )
  values, vectors = scipy.linalg.eigh(covariances[0])
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  values = scipy.linalg.eigvalsh(root @ covariances[1] @ root)
  step = first.mean - second.mean
  return float(
    step @ step
    + sum(map(np.trace, covariances))
    - 2 * np.sqrt(np.maximum(values, 0)).sum()
  )


def kernel_distance(
  first: np.ndarray,
  second: np.ndarray,
  *,
  subset_size: int = 1000,
  num_subsets: int = 100,
  seed: int = 0,
) -> tuple[float, float]:
  """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3.

  Binkowski et al., arXiv 1801.01401.

  Args:
    first: features of the generated images, `[N, D]`.
    second: features of the reference, `[M, D]`.
    subset_size: features per subset, sampled without replacement; reduced to
      N or M if that is smaller.
    num_subsets: pairs of subsets to average over.
    seed: of the subsets.

  Returns:
    Mean and standard deviation over the subsets.

  Raises:
    ValueError: a set has fewer than two features.
  """
  size = min(subset_size, len(first), len(second))
  if size < 2:
    raise ValueError('KID needs at least 2 images in each set.')
  if size == len(first) == len(second):
    num_subsets = 1  # All subsets are the same.
  rng = np.random.default_rng(seed)
  values = []
  for _ in range(num_subsets):
    x, y = (
      np.asarray(each[rng.choice(len(each), size, replace=False)], np.float64)
      for each in (first, second)
    )
    same = sum(
      kernel.sum() - np.trace(kernel)
      for kernel in (_kernel(x, x), _kernel(y, y))
    )
    values.append(same / (size * (size - 1)) - 2 * _kernel(x, y).mean())
  return float(np.mean(values)), float(np.std(values))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(
  first: np.ndarray,
  second: np.ndarray,
  neighbours: int = 3,
) -> tuple[float, float]:
  """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

  The manifold of a set is estimated by a ball around each of its features,
  which reaches to the feature's k-th nearest neighbour in the set.

  Args:
    first: features of the generated images, `[N, D]`.
    second: features of the reference, `[M, D]`.
    neighbours: k.

  Returns:
    Precision, the share of `first` on the manifold of `second`, and recall,
    the share of `second` on the manifold of `first`.

  Raises:
    ValueError: a set has no more than k features.
  """
  if min(len(first), len(second)) <= neighbours:
    raise ValueError(
      f'Precision and recall need more than {neighbours} images in each set.'
    )
  first, second = (np.asarray(x, np.float64) for x in (first, second))
  return (
    _covered(first, second, _radii(second, neighbours)),
    _covered(second, first, _radii(first, neighbours)),
  )


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
  """Squared distance of each feature to its k-th neighbour, `[N]`."""
  return np.concatenate(
    [
      # The nearest is the feature itself.
      np.partition(distances, neighbours, axis=1)[:, neighbours]
      for distances in _distances(features, features)
    ]
  )


def _covered(
  points: np.ndarray, centers: np.ndarray, radii: np.ndarray
) -> float:
  """The share of points that lie in at least one ball."""
  return float(
    np.concatenate(
      [(distances <= radii).any(1) for distances in _distances(points, centers)]
    ).mean()
  )


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
  """Yields squared distances in blocks `[<= _BLOCK, len(y)]`."""
  squares = (y * y).sum(1)
  for start in range(0, len(x), _BLOCK):
    rows = x[start : start + _BLOCK]
    yield np.maximum(
      (rows * rows).sum(1)[:, None] + squares - 2 * rows @ y.T, 0
    )
