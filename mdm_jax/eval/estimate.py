"""Means with their standard errors."""

from collections.abc import Sequence

import numpy as np


class Estimate(float):
  """A metric's value, which knows of how many images it is and how exact.

  It is a float, and is logged, compared and stored as one.

  Attributes:
    count: number of things that it is a mean of; None if that is not known.
    standard_error: of the value; None if that is not known.
  """

  count: int | None
  standard_error: float | None

  def __new__(
    cls,
    value: float,
    count: int | None = None,
    standard_error: float | None = None,
  ):
    self = super().__new__(cls, value)
    self.count, self.standard_error = count, standard_error
    return self


def mean(values: Sequence[float]) -> Estimate:
  """The mean of independent values `[N]`."""
  values = np.asarray(values, np.float64)
  return from_sums(values.sum(), (values**2).sum(), len(values))


def from_sums(total: float, squares: float, count: int) -> Estimate:
  """The mean of independent values, by their sum and that of their squares."""
  value = total / count
  error = None
  if count > 1:
    variance = max(squares / count - value**2, 0) * count / (count - 1)
    error = float(np.sqrt(variance / count))
  return Estimate(value, int(count), error)


def of_share(share: float, count: int) -> Estimate:
  """The share of independent things of which something is true."""
  return from_sums(share * count, share * count, count)


def of_groups(totals: Sequence[float], counts: Sequence[int]) -> Estimate:
  """The mean of values that come in independent groups, such as images.

  Values of one group may depend on each other: two objects of an image are
  often both wrong. The standard error is that of a ratio of sums (Cochran,
  Sampling Techniques, eq. 6.13); with one value in each group it is that of
  `mean`.

  Args:
    totals: sum of the values of each group.
    counts: number of values of each group, not all 0.
  """
  totals, counts = np.asarray(totals, np.float64), np.asarray(counts)
  totals, counts = totals[counts > 0], counts[counts > 0]
  groups, count = len(counts), counts.sum()
  value = totals.sum() / count
  error = None
  if groups > 1:
    scatter = ((totals - value * counts) ** 2).sum() * groups / (groups - 1)
    error = float(np.sqrt(scatter)) / float(count)
  return Estimate(value, int(count), error)
