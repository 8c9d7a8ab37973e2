"""Nearest neighbours of images, by which one sees whether a model copies."""

import numpy as np

_BLOCK = 512  # rows of the second set that are compared at once


def nearest(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The nearest row of another set, by the Euclidean distance.

  Args:
    x: images or features, `[N, ...]`.
    y: those to choose from, `[M, ...]`, with the same other dimensions.

  Returns:
    Of each x the index of the nearest y, int `[N]`, and the root mean square
    of their difference over all other dimensions, float32 `[N]`.

  Raises:
    ValueError: the shapes do not fit, or y is empty.
  """
  if x.shape[1:] != y.shape[1:] or not len(y):
    raise ValueError(f'shapes {x.shape} and {y.shape} cannot be compared.')
  x = x.reshape(len(x), -1).astype(np.float32)
  index = np.zeros(len(x), int)
  least = np.full(len(x), np.inf, np.float32)
  for start in range(0, len(y), _BLOCK):
    rows = y[start : start + _BLOCK].reshape(-1, x.shape[1]).astype(np.float32)
    # Squared distances, less the square of x.
    distances = (rows * rows).sum(1) - 2 * x @ rows.T
    best = distances.argmin(1)
    found = distances[np.arange(len(x)), best]
    is_nearer = found < least
    index[is_nearer] = start + best[is_nearer]
    least[is_nearer] = found[is_nearer]
  # Anew, as the difference of large squares is not exact.
  difference = x - y[index].reshape(x.shape)
  return index, np.sqrt(np.square(difference).mean(1))
