"""Averages of parameters whose width is chosen after training.

An average over a power function of training time weighs time s by s ** gamma,
up to now. Its width sigma_rel is the standard deviation of that profile, as a
share of the training time. Two of them, kept from time to time, span nearly
any other (Karras et al., 2024, 2312.02696, section 3 and appendix C).

Time counts updates: a step that is left out takes none. The parameters before
the first update have no weight.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of gamma = 0, the plain mean of all that there was.
MAX_WIDTH = 12**-0.5


def exponent(width: float) -> float:
  """gamma of a width sigma_rel (Karras et al., section 3.1, appendix C.1).

  sigma_rel ** 2 = (gamma + 1) / ((gamma + 2) ** 2 (gamma + 3)).

  Raises:
    ValueError: the width is not between 0 and `MAX_WIDTH`.
  """
  if not 0 < width < MAX_WIDTH:
    raise ValueError(
      f'an average of width {width}: it must be more than 0 and less than '
      f'{MAX_WIDTH:.4f}, the width of the plain mean.'
    )
  inverse = width**-2
  return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def new_lags(params: Any, widths: Sequence[float]) -> dict[str, Any]:
  """No average lags behind the parameters before the first update."""
  return {str(width): jax.tree.map(jnp.zeros_like, params) for width in widths}


def update_lags(
  lags: dict[str, Any], old: Any, new: Any, count: jax.Array
) -> dict[str, Any]:
  """One step of each average (Karras et al., section 3.1).

  After any number of updates t, the parameters after update s have the share
  (s ** (gamma + 1) - (s - 1) ** (gamma + 1)) / t ** (gamma + 1).

  What is tracked of an average is how far it is from the parameters. Of a
  long training a step changes an average by less than its last digit in
  float32, but not its lag.

  Args:
    lags: by the averages' widths, as text.
    old: parameters before this update.
    new: parameters after it.
    count: scalar, updates with this one.
  """

  def step(width, lag):
    # 1 - (1 - 1 / t) ** (gamma + 1), of which float32 would lose most digits.
    share = -jnp.expm1((exponent(float(width)) + 1) * jnp.log1p(-1 / count))

    def leaf(lag, old, new):
      lag += old - new
      return lag - share * lag

    return jax.tree.map(leaf, lag, old, new)

  return {width: step(width, lag) for width, lag in lags.items()}


def from_lags(lags: dict[str, Any], params: Any) -> dict[str, Any]:
  """The averages, by their widths."""
  return {
    width: jax.tree.map(jnp.add, params, lag) for width, lag in lags.items()
  }


def coefficients(
  widths: Sequence[float], counts: Sequence[int], width: float, count: int
) -> np.ndarray:
  """How snapshots of averages add up to an average of another width.

  The squared distance between the profiles is the least that there is
  (Karras et al., section 3.2, appendix C.3) among sums of snapshots whose
  coefficients add up to one, so that a parameter that never changes keeps its
  value however few snapshots there are.

  Args:
    widths: [N], of each snapshot.
    counts: [N], updates that had been made. No two snapshots are equal.
    width: wanted.
    count: likewise; as the newest snapshot's, or earlier.

  Returns:
    float64 [N].
  """
  times = np.array(counts) / count
  products = _inner_products(widths, times, widths, times)
  wanted = _inner_products(widths, times, [width], [1.0])[:, 0]
  ones = np.ones((len(wanted), 1))
  # The last unknown is Lagrange's multiplier.
  return np.linalg.solve(
    np.block([[products, ones], [ones.T, np.zeros((1, 1))]]),
    np.append(wanted, 1),
  )[:-1]


def _inner_products(
  widths: Sequence[float],
  times: Sequence[float],
  other_widths: Sequence[float],
  other_times: Sequence[float],
) -> np.ndarray:
  """Integrals of the products of profiles [N, M], float64.

  A profile is (gamma + 1) s ** gamma / t ** (gamma + 1) for s up to t.
  """
  a, b = (
    np.array(list(map(exponent, each))) for each in (widths, other_widths)
  )
  a, s, t = a[:, None], np.array(times)[:, None], np.array(other_times)
  first = np.minimum(s, t)
  return (
    (a + 1)
    * (b + 1)
    / (a + b + 1)
    / np.maximum(s, t)
    * (first / s) ** a
    * (first / t) ** b
  )
