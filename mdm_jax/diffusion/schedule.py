"""Noise schedules: signal and noise of each level at every noising step.

A noisy image is `x_t = signal x0 + noise eps`. On a variance-preserving path
signal^2 + noise^2 = 1; on the linear path, that of rectified flow, signal +
noise = 1. A table of gammas, the share of the signal in the variance, describes
both: signal^2 / noise^2 = gamma / (1 - gamma) is the signal-to-noise ratio
(SNR). It has T + 1 entries, of which `gammas[0] = 1` is the clean image.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.diffusion.process import Coefficients

# The schedule whose path is linear.
LINEAR = 'linear'


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """The noise of every level, coarse to fine.

  Attributes:
    gammas: [levels, T + 1], the share of the signal in the variance; float32,
      or float64 on the linear path.
    is_linear: signal + noise is 1, not signal^2 + noise^2.
    times: int32 [levels, T + 1], the noising step of training whose noise a
      level has; None where that is the step itself. See `offset_levels`.
  """

  gammas: np.ndarray
  is_linear: bool = False
  times: np.ndarray | None = None

  @property
  def num_steps(self) -> int:
    """T, the number of noising steps."""
    return self.gammas.shape[1] - 1

  @functools.cached_property
  def coefficients(self) -> Coefficients:
    """Tables of signal and noise, float32 [levels, T + 1]."""
    signals, noises = np.sqrt(self.gammas), np.sqrt(1 - self.gammas)
    if self.is_linear:
      total = signals + noises
      signals, noises = signals / total, noises / total
    return Coefficients(signals.astype(np.float32), noises.astype(np.float32))

  def at(self, level: int, t: jax.Array, ndim: int = 4) -> Coefficients:
    """Signal and noise of `level` at the noising steps `t` [B] in 0..T.

    Args:
      level: from 0, the coarsest.
      t: noising steps.
      ndim: rank of what they are for: 4 for images, 5 for clips.

    Returns:
      float32 [B, 1, 1, 1], or of rank 5.
    """

    def read(table):
      values = jnp.asarray(table)[level, t]
      return values.reshape(-1, *(1,) * (ndim - 1))

    if self.is_linear:
      return Coefficients(*map(read, self.coefficients))
    # Roots are computed in the program: a table of roots would change samples
    # in the last bit.
    gamma = read(self.gammas)
    return Coefficients(jnp.sqrt(gamma), jnp.sqrt(1 - gamma))

  def log_snr(self, t: int | np.ndarray) -> np.ndarray:
    """log(gamma / (1 - gamma)) at noising steps in 1..T, [levels, ...]."""
    gammas = self.gammas[:, t].astype(np.float64)
    return np.log(gammas) - np.log1p(-gammas)


def make_gammas(name: str, num_steps: int = 1000) -> np.ndarray:
  """Builds the gammas of a schedule, computed in float64.

  Args:
    name: 'deepfloyd' (the squared cosine of Nichol & Dhariwal, arXiv
      2102.09672, eq. 17; all released models), 'ddpm' (linear betas, Ho et
      al., arXiv 2006.11239, section 4), 'cosine' (logSNR = -2 log tan,
      Hoogeboom et al., arXiv 2301.11093, truncated to logSNRs of -5..5), or
      'linear' (rectified flow: signal 1 - t, noise t; Liu et al., arXiv
      2209.03003, and Esser et al., arXiv 2403.03206, eq. 13). Step k of
      'linear' has t = (k - 1/2) / T, the middle of its share of (0, 1), so that
      neither signal nor noise is 0.
    num_steps: T, the number of noising steps.

  Returns:
    [T + 1], from 1 (clean) towards 0: float32, for 'linear' float64.

  Raises:
    ValueError: if there is no such schedule.
  """
  step = np.arange(num_steps, dtype=np.float64)
  if name == LINEAR:
    t = (step + 0.5) / num_steps
    return np.concatenate([[1.0], (1 - t) ** 2 / ((1 - t) ** 2 + t**2)])
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
      f'Unknown schedule {name!r}: use deepfloyd, ddpm, cosine or linear.'
    )
  return np.concatenate([[1.0], gammas]).astype(np.float32)


def shift_gammas(
  gammas: np.ndarray, scale: float, power: float, log_snr: float = 0.0
) -> np.ndarray:
  """Divides the signal-to-noise ratio by `scale ** power * exp(log_snr)`.

  A larger image needs more noise to hide the same content (Hoogeboom et al.,
  arXiv 2301.11093). On the linear path this is the shift of Esser et al. (arXiv
  2403.03206, eq. 23), whose m / n is the divisor.

  Args:
    gammas: float32 or float64 [T + 1].
    scale: the level's resolution over that which is not shifted.
    power: exponent of the scale; 0 shifts nothing.
    log_snr: nats by which the logSNR is lowered as well.

  Returns:
    [T + 1] of the dtype of `gammas`; an entry of 1 stays 1.
  """
  gammas = np.asarray(gammas)
  divisor = gammas.dtype.type(scale**power * np.exp(log_snr))
  if divisor == 1:
    return gammas
  with np.errstate(divide='ignore'):
    snr = gammas / (1 - gammas) / divisor
  # Rounds as the released models' code does, and is 1 at an infinite SNR.
  return 1 / (1 + 1 / snr)


def make_schedule(
  name: str,
  resolutions: Sequence[int],
  shift_power: float,
  num_steps: int = 1000,
  level_offset: float = 0.0,
  reference_resolution: int = 0,
  frames: Sequence[int] | None = None,
  frame_shift_power: float = 0.0,
) -> Schedule:
  """Builds the schedule of a pyramid.

  Args:
    name: as in `make_gammas`.
    resolutions: side of each level in pixels, coarse to fine.
    shift_power: the power of `shift_gammas`. Its scale is a level's resolution
      over that of reference.
    num_steps: T, the number of noising steps.
    level_offset: nats of logSNR by which each level is ahead of the next finer
      one at all steps, so that coarse levels are denoised first.
    reference_resolution: side in pixels of images whose schedule is not
      shifted; 0 for that of the coarsest level.
    frames: of each level; None for one.
    frame_shift_power: the power of `shift_gammas` whose scale is a level's
      number of frames over that of the coarsest one.

  Returns:
    A schedule with one row of gammas for each resolution.

  Raises:
    ValueError: there is no such schedule, or a noising step would have no
      noise.
  """
  gammas = make_gammas(name, num_steps)
  reference = reference_resolution or resolutions[0]
  frames = frames or [1] * len(resolutions)
  # Nats of logSNR beyond those of the resolution.
  further = level_offset * np.arange(len(frames)) + frame_shift_power * np.log(
    np.divide(frames, frames[0])
  )
  shifted = np.stack(
    [
      shift_gammas(gammas, resolution / reference, shift_power, nats)
      for resolution, nats in zip(resolutions, further, strict=True)
    ]
  )
  if (shifted[:, 1:] == 1).any():  # To the precision of the dtype.
    raise ValueError(
      f'diffusion.reference_resolution={reference} leaves no noise at the '
      f'first noising steps of {min(resolutions)} px: give less.'
    )
  return Schedule(shifted, is_linear=name == LINEAR)


def offset_levels(schedule: Schedule, level_offset: float) -> Schedule:
  """Lets each level be ahead of the next finer one, for sampling.

  A level's row is read at another step, at which its logSNR is lower by
  `level_offset` for each coarser level, or at T where no step has that little:
  there a level waits until the coarser ones are far enough ahead. Thus a
  network that was trained with independent times of its levels sees only noise
  that it knows, and is told its time (`Schedule.times`). The coarsest level
  keeps its row.

  Args:
    schedule: of training.
    level_offset: nats of logSNR, at least 0.
  """
  steps = np.arange(1, schedule.num_steps + 1)
  times = np.zeros(schedule.gammas.shape, np.int32)
  for level, known in enumerate(schedule.log_snr(steps)):
    wanted = known - level_offset * level
    # The nearest step; logSNR falls along the steps.
    times[level, 1:] = np.round(
      np.interp(-wanted, -known, steps.astype(np.float64))
    )
  gammas = np.take_along_axis(schedule.gammas, times, axis=1)
  return dataclasses.replace(schedule, gammas=gammas, times=times)
