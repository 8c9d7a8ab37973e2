"""Post-hoc EMA: an EMA whose length, sigma_rel, is chosen after training.

A power-function EMA weighs the parameters of training time s by s ** gamma. Its
sigma_rel is the standard deviation of that profile, as a fraction of the
training time. From snapshots of two such EMAs, an EMA of nearly any sigma_rel
can be reconstructed (Karras et al., 2024, 2312.02696, section 3 and appendix
C).

Training time counts updates, so skipped steps do not count. The parameters
before the first update have no weight.

During training an EMA is stored as its lag, the EMA minus the parameters. Late
in a long training, a step changes the EMA by less than float32 can represent
next to its value; the lag is small, and keeps those digits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# sigma_rel of the plain mean over all of training, gamma = 0.
MAX_SIGMA_REL = 12**-0.5


def exponent(sigma_rel: float) -> float:
  """gamma for a sigma_rel (Karras et al., section 3.1, appendix C.1).

  sigma_rel ** 2 = (gamma + 1) / ((gamma + 2) ** 2 (gamma + 3)).

  Raises:
    ValueError: sigma_rel is not between 0 and `MAX_SIGMA_REL`.
  """
  if not 0 < sigma_rel < MAX_SIGMA_REL:
    raise ValueError(
      f'sigma_rel={sigma_rel}: it must be more than 0 and less than '
      f'{MAX_SIGMA_REL:.4f}, that of the plain mean.'
    )
  inverse = sigma_rel**-2
  return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def new_lags(params: Any, sigma_rels: Sequence[float]) -> dict[str, Any]:
  """Zero lags, by sigma_rel as text: each EMA starts at the parameters."""
  return {
    str(sigma_rel): jax.tree.map(jnp.zeros_like, params)
    for sigma_rel in sigma_rels
  }


def update_lags(
  lags: dict[str, Any], old: Any, new: Any, count: jax.Array
) -> dict[str, Any]:
  """One step of each EMA (Karras et al., section 3.1).

  After any number of updates t, the parameters after update s have the weight
  (s ** (gamma + 1) - (s - 1) ** (gamma + 1)) / t ** (gamma + 1).

  Args:
    lags: each EMA minus the parameters, by its sigma_rel as text.
    old: parameters before this update.
    new: parameters after this update.
    count: int32 scalar, number of updates so far, including this one.
  """

  def step(sigma_rel, lag):
    # 1 - (1 - 1 / t) ** (gamma + 1), in a form that loses no digits in float32.
    share = -jnp.expm1((exponent(float(sigma_rel)) + 1) * jnp.log1p(-1 / count))

    def leaf(lag, old, new):
      lag += old - new
      return lag - share * lag

    return jax.tree.map(leaf, lag, old, new)

  return {sigma_rel: step(sigma_rel, lag) for sigma_rel, lag in lags.items()}


def from_lags(lags: dict[str, Any], params: Any) -> dict[str, Any]:
  """The EMAs that lags stand for, by their sigma_rel as text."""
  return {
    sigma_rel: jax.tree.map(jnp.add, params, lag)
    for sigma_rel, lag in lags.items()
  }


def coefficients(
  sigma_rels: Sequence[float],
  counts: Sequence[int],
  sigma_rel: float,
  count: int,
) -> np.ndarray:
  """Weights whose weighted sum of snapshots is an EMA of another sigma_rel.

  They minimise the squared distance between the profiles (Karras et al.,
  section 3.2, appendix C.3) among weights that add up to one, so that a
  parameter that never changes keeps its value however few snapshots there are.

  Args:
    sigma_rels: [N], sigma_rel of each snapshot.
    counts: [N], number of updates before each snapshot. No two snapshots have
      the same sigma_rel and count.
    sigma_rel: sigma_rel of the EMA to reconstruct.
    count: number of updates before it, at most that of the newest snapshot.

  Returns:
    float64 [N].
  """
  times = np.array(counts) / count
  products = _inner_products(sigma_rels, times, sigma_rels, times)
  wanted = _inner_products(sigma_rels, times, [sigma_rel], [1.0])[:, 0]
  ones = np.ones((len(wanted), 1))
  # The last unknown is the Lagrange multiplier of the constraint.
  return np.linalg.solve(
    np.block([[products, ones], [ones.T, np.zeros((1, 1))]]),
    np.append(wanted, 1),
  )[:-1]


def _inner_products(
  sigma_rels: Sequence[float],
  times: Sequence[float],
  other_sigma_rels: Sequence[float],
  other_times: Sequence[float],
) -> np.ndarray:
  """Integrals over the products of two EMAs' profiles, float64 [N, M].

  A profile is (gamma + 1) s ** gamma / t ** (gamma + 1) for s up to t.
  """
  a, b = (
    np.array(list(map(exponent, each)))
    for each in (sigma_rels, other_sigma_rels)
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
