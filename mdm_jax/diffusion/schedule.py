"""Noise schedules: one table of gammas for each level of the pyramid.

A gamma is the share of signal in a noisy image's variance:
`x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps`. A table has T + 1 entries, of
which `gammas[0] = 1` is the clean image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Schedule(NamedTuple):
  """The gammas of every level, coarse to fine: float32 [levels, T + 1]."""

  gammas: np.ndarray

  @property
  def num_steps(self) -> int:
    """T, the number of noising steps."""
    return self.gammas.shape[1] - 1

  def gamma(self, level: int, t: jax.Array) -> jax.Array:
    """The gamma of `level` at the noising steps `t` [B] in 0..T.

    Returns:
      float32 [B, 1, 1, 1], to broadcast over images.
    """
    return jnp.asarray(self.gammas)[level, t][:, None, None, None]

  def log_snr(self, t: int) -> np.ndarray:
    """log(gamma / (1 - gamma)) at the noising step `t` in 1..T, [levels]."""
    gammas = self.gammas[:, t].astype(np.float64)
    return np.log(gammas) - np.log1p(-gammas)


def make_gammas(name: str, num_steps: int = 1000) -> np.ndarray:
  """Builds the gammas of a schedule, computed in float64.

  Args:
    name: 'deepfloyd' (the squared cosine of Nichol & Dhariwal, arXiv
      2102.09672, eq. 17; all released models), 'ddpm' (linear betas, Ho et
      al., arXiv 2006.11239, section 4) or 'cosine' (logSNR = -2 log tan,
      Hoogeboom et al., arXiv 2301.11093, truncated to logSNRs of -5..5).
    num_steps: T, the number of noising steps.

  Returns:
    float32 [T + 1], from 1 (clean) towards 0.

  Raises:
    ValueError: if there is no such schedule.
  """
  step = np.arange(num_steps, dtype=np.float64)
  if name == 'deepfloyd':

    def signal(time):
      return np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2

    betas = 1 - signal((step + 1) / num_steps) / signal(step / num_steps)
    gammas = np.cumprod(1 - np.minimum(betas, 0.999))
  elif name == 'ddpm':
    gammas = np.cumprod(1 - np.linspace(1e-4, 2e-2, num_steps))
  elif name == 'cosine':
    low, high = np.arctan(np.exp(-2.5)), np.arctan(np.exp(2.5))
    # sigmoid(-2 log tan(angle)) is cos(angle)^2.
    gammas = np.cos(low + (high - low) * step / (num_steps - 1)) ** 2
  else:
    raise ValueError(
      f'Unknown schedule {name!r}: use deepfloyd, ddpm or cosine.'
    )
  return np.concatenate([[1.0], gammas]).astype(np.float32)


def shift_gammas(gammas: np.ndarray, scale: float, power: float) -> np.ndarray:
  """Divides the signal-to-noise ratio by `scale ** power`.

  A larger image needs more noise to hide the same content (Hoogeboom et al.,
  arXiv 2301.11093).

  Args:
    gammas: float32 [T + 1].
    scale: the level's resolution over that of the coarsest level.
    power: exponent of the scale; 0 shifts nothing.

  Returns:
    float32 [T + 1]; an entry of 1 stays 1.
  """
  gammas = np.asarray(gammas, np.float32)
  divisor = np.float32(scale**power)
  if divisor == 1:
    return gammas
  with np.errstate(divide='ignore'):
    snr = gammas / (1 - gammas) / divisor
  # Rounds as the released models' code does, and is 1 at an infinite SNR.
  return 1 / (1 + 1 / snr)


def vdm_weights(gammas: np.ndarray) -> np.ndarray:
  """Weights of the eps loss in the variational lower bound.

  `SNR[t - 1] / SNR[t] - 1` (Kingma et al., arXiv 2107.00630, section 4). The
  first two entries would be undefined and infinite; they repeat the third.

  Args:
    gammas: float32 [T + 1].

  Returns:
    float32 [T + 1], indexed like `gammas`.
  """
  signal = np.asarray(gammas, np.float64)
  before, after = signal[1:-1], signal[2:]
  weights = before * (1 - after) / ((1 - before) * after) - 1
  return np.concatenate([weights[:1], weights[:1], weights]).astype(np.float32)


def make_schedule(
  name: str,
  resolutions: Sequence[int],
  shift_power: float,
  num_steps: int = 1000,
) -> Schedule:
  """Builds the schedule of a pyramid.

  Args:
    name: as in `make_gammas`.
    resolutions: side of each level in pixels, coarse to fine.
    shift_power: the power of `shift_gammas`. Its scale is a level's resolution
      over the coarsest, so the coarsest level is never shifted.
    num_steps: T, the number of noising steps.

  Returns:
    A schedule with one row of gammas for each resolution.

  Raises:
    ValueError: if there is no such schedule.
  """
  gammas = make_gammas(name, num_steps)
  return Schedule(
    np.stack(
      [
        shift_gammas(gammas, resolution / resolutions[0], shift_power)
        for resolution in resolutions
      ]
    )
  )
