"""Distances between two sets of pictures, by their features.

All in float64. Give the pictures to be judged first and the reference second,
or precision and recall change places.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import scipy.linalg

_BLOCK = 1024  # rows of a matrix of distances that are in memory at once


class Statistics:
  """Mean and covariance of any number of features, in constant memory.

  Attributes:
    count: features so far.
    mean: float64 `[D]`.
    scatter: sum of the outer products of deviations from it, `[D, D]`.
  """

  def __init__(self, width: int):
    """Of no features yet, `width` numbers each."""
    self.count = 0
    self.mean = np.zeros(width)
    self.scatter = np.zeros((width, width))

  def update(self, features: np.ndarray) -> None:
    """Adds features `[N, D]`.

    Raises:
      ValueError: if one is not finite.
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
    """Adds what another one has seen (Chan et al. 1979)."""
    count = self.count + other.count
    if not count:
      return
    step = other.mean - self.mean
    self.scatter += other.scatter
    self.scatter += np.outer(step, step) * (self.count * other.count / count)
    self.mean = self.mean + step * (other.count / count)
    self.count = count

  def covariance(self) -> np.ndarray:
    """Of a sample, divided by count - 1; `[D, D]`.

    Raises:
      ValueError: of fewer than two features.
    """
    if self.count < 2:
      raise ValueError(
        f'{self.count} pictures have no covariance: give at least 2.'
      )
    return self.scatter / (self.count - 1)


class Sample:
  """What is kept of the features of a set: statistics of all, and some rows.

  Attributes:
    statistics: of all.
    rows: float32 `[<= limit, D]`.
  """

  def __init__(self, width: int, count: int, limit: int, seed: int = 0):
    """Of none of them yet.

    Args:
      width: D.
      count: of the features that `add` will be given at most.
      limit: rows that are kept, evenly drawn from the count.
      seed: of the drawing.
    """
    self.statistics = Statistics(width)
    rng = np.random.default_rng(seed)
    self._is_kept = np.zeros(count, bool)
    self._is_kept[rng.choice(count, min(count, limit), replace=False)] = True
    self._kept = []
    self._added = 0

  def add(self, features: np.ndarray) -> None:
    """Adds features `[N, D]`; raises as `Statistics.update` does."""
    self.statistics.update(features)
    is_kept = self._is_kept[self._added : self._added + len(features)]
    self._kept.append(np.asarray(features, np.float32)[is_kept])
    self._added += len(features)

  @property
  def rows(self) -> np.ndarray:
    return np.concatenate(self._kept)

  def to_arrays(self) -> dict[str, np.ndarray]:
    """What `from_arrays` needs, by name."""
    return {
      'count': np.array(self.statistics.count),
      'mean': self.statistics.mean,
      'scatter': self.statistics.scatter,
      'rows': self.rows,
    }

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> 'Sample':
    """The same sample; nothing can be added to it."""
    sample = cls(len(arrays['mean']), 0, 0)
    statistics = sample.statistics
    statistics.count = int(arrays['count'])
    statistics.mean, statistics.scatter = arrays['mean'], arrays['scatter']
    sample._kept = [arrays['rows']]
    return sample


def frechet_distance(first: Statistics, second: Statistics) -> float:
  """Between the Gaussians of two sets (Heusel et al., arXiv 1706.08500, eq. 6).

  The trace of (C1 C2)^(1/2) is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is
  symmetric: singular covariances need no offset and nothing becomes complex.

  Raises:
    ValueError: a set has fewer than two features.
  """
  covariances = first.covariance(), second.covariance()
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
  """KID: the unbiased squared MMD of (x.y / D + 1)^3 (arXiv 1801.01401).

  Args:
    first, second: features `[N, D]`, `[M, D]`.
    subset_size: of each subset, without repetition; at most N and M.
    num_subsets: whose mean it is, if there are as many.
    seed: of the subsets.

  Returns:
    Mean and standard deviation over the subsets.

  Raises:
    ValueError: a set has fewer than two features.
  """
  size = min(subset_size, len(first), len(second))
  if size < 2:
    raise ValueError('KID needs at least 2 pictures on either side.')
  if size == len(first) == len(second):
    num_subsets = 1  # There is no other one.
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

  Around each feature of a set lies a ball that reaches to its third
  neighbour of the same set.

  Args:
    first, second: features `[N, D]`, `[M, D]`.
    neighbours: to which the balls reach.

  Returns:
    The share of the first set in a ball of the second's, and the other way
    round.

  Raises:
    ValueError: a set has too few features.
  """
  if min(len(first), len(second)) <= neighbours:
    raise ValueError(
      f'Precision and recall need more than {neighbours} pictures on either '
      'side.'
    )
  first, second = (np.asarray(x, np.float64) for x in (first, second))
  return (
    _covered(first, second, _radii(second, neighbours)),
    _covered(second, first, _radii(first, neighbours)),
  )


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
  """Squared distance of each to that neighbour, `[N]`."""
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
  """The share of points in any ball."""
  return float(
    np.concatenate(
      [(distances <= radii).any(1) for distances in _distances(points, centers)]
    ).mean()
  )


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
  """Squared distances, `[<= _BLOCK, len(y)]` at a time."""
  squares = (y * y).sum(1)
  for start in range(0, len(x), _BLOCK):
    rows = x[start : start + _BLOCK]
    yield np.maximum(
      (rows * rows).sum(1)[:, None] + squares - 2 * rows @ y.T, 0
    )
