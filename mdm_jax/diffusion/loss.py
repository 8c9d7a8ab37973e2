"""Formulas of the multi-resolution loss (MDM, arXiv 2310.15111, section 3)."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch
from mdm_jax.diffusion import process
from mdm_jax.diffusion.process import Coefficients, DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.diffusion.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class TimeDensity:
  """How the times of training are distributed over (0, 1), 1 being noise.

  Attributes:
    name: 'uniform', or 'logit_normal': sigmoid(mean + std n) of a standard
      normal n (Esser et al., arXiv 2403.03206, eq. 19).
    logit_normal: (mean, std) of the logit. A positive mean favours noise.
    stratified: the times of a batch of B are the density's quantiles
      (i + u) / B, with one u for all of them (Kingma et al., arXiv 2107.00630,
      appendix I.1), in random order. Each has the same density as without.
  """

  name: str = 'uniform'
  logit_normal: tuple[float, float] = (0.0, 1.0)
  stratified: bool = False


def sample_time(
  rng: jax.Array,
  batch: int,
  num_steps: int,
  density: TimeDensity = TimeDensity(),
  num_levels: int | None = None,
) -> jax.Array:
  """Samples time indices in 0..num_steps - 1.

  Args:
    rng: a random key.
    batch: B, the number of examples.
    num_steps: T of the schedule.
    density: of the times.
    num_levels: of a time for each level, independent of each other; None for
      one time of all levels.

  Returns:
    int32 [B], or [B, levels].

  Raises:
    ValueError: if there is no such density.
  """
  shape = (batch,) if num_levels is None else (batch, num_levels)
  if density.name == 'uniform' and not density.stratified:
    return jax.random.randint(rng, shape, 0, num_steps)
  if density.stratified:
    rng, order_rng = jax.random.split(rng)
    first = jax.random.uniform(rng, shape[1:])
    order = jnp.arange(batch).reshape(-1, *(1,) * len(shape[1:]))
    quantile = jax.random.permutation(
      order_rng, (order + first) / batch, independent=True
    )
  else:
    quantile = jax.random.uniform(rng, shape)
  match density.name:
    case 'uniform':
      time = quantile
    case 'logit_normal':
      mean, std = density.logit_normal
      time = jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(quantile))
    case _:
      raise ValueError(
        f'Unknown density {density.name!r}: use uniform or logit_normal.'
      )
  index = (time * num_steps).astype(jnp.int32)
  return index.clip(0, num_steps - 1)


def training_coefficients(
  schedule: Schedule, pyramid: Pyramid, t: jax.Array, repeats: int = 1
) -> tuple[Coefficients, ...]:
  """Each level's signal and noise at the time indices `t`, coarse to fine.

  Time index 0 is the first noisy step. Entry 0 of the schedule is the clean
  image, so it is read at t + 1.

  Args:
    schedule: the noise of each level.
    pyramid: B_r images at each level, coarse to fine.
    t: int [B] or [B, levels], in 0..T-1.
    repeats: periods of a mixed batch, see `mixed_batch`.

  Returns:
    Of float32 [B_r, 1, 1, 1] for each level of images, of rank 5 for clips.
  """
  return tuple(
    schedule.at(
      level,
      mixed_batch.times(t, level, len(images), repeats) + 1,
      images.ndim,
    )
    for level, images in enumerate(pyramid)
  )


def weights_at(time_weights: jax.Array, t: jax.Array) -> jax.Array:
  """Weights of time indices, read at t + 1 like the schedule.

  Args:
    time_weights: [T + 1], or [levels, T + 1] of each level.
    t: int [B], or [B, levels] of each level.

  Returns:
    [B] if neither has levels, otherwise [B, levels].
  """
  table = jnp.asarray(time_weights)
  if table.ndim == 1:
    return table[t + 1]
  if t.ndim == 1:
    return table[:, t + 1].T
  return table[jnp.arange(len(table)), t + 1]


def level_loss(
  prediction: jax.Array,
  x_t: jax.Array,
  x0: jax.Array,
  eps: jax.Array,
  at: Coefficients,
  *,
  parameterization: str,
  loss_space: str,
  noise_floor: float = 0.0,
) -> jax.Array:
  """Mean squared error over pixels and channels, float32 [B].

  Args:
    prediction: the network's output, [B, H, W, C] or [B, T, H, W, C].
    x_t: the noisy images that the network was given, of that shape.
    x0: the clean images, of that shape.
    eps: the noise that was added, of that shape.
    at: signal and noise of `x_t`, [B, 1, 1, 1].
    parameterization: what the network predicts, see `process`.
    loss_space: where the error is measured: 'v', 'eps', 'x0' or 'velocity'.
      The same error weighs SNR times as much in 'eps' as in 'x0', SNR + 1 times
      in 'v' (on a variance-preserving path), and (signal / noise + 1)^2 times
      in 'velocity'.
    noise_floor: with 'x0' prediction, the error in another space is that of x0
      over the noise: over this where the noise is less, as in the code of Li &
      He, arXiv 2511.13720, with 0.05.

  Raises:
    ValueError: if `parameterization` or `loss_space` is unknown.
  """
  target = process.target(x0, eps, at, loss_space)
  convert = {
    'v': process.predict_v,
    'eps': process.predict_eps,
    'x0': process.predict_x0,
    'velocity': process.predict_velocity,
  }[loss_space]
  prediction = prediction.astype(jnp.float32)
  error = convert(prediction, x_t, at, parameterization) - target
  if noise_floor and parameterization == 'x0' and loss_space != 'x0':
    error *= at.noise / jnp.maximum(at.noise, noise_floor)
  return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def multi_resolution_loss(
  denoise_fn: DenoiseFn,
  schedule: Schedule,
  pyramid: Pyramid,
  t: jax.Array,
  eps: Pyramid,
  *,
  parameterization: str = 'v',
  loss_space: str = 'eps',
  noise_floor: float = 0.0,
  weights: Sequence[float],
  time_weights: jax.Array | None = None,
  repeats: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The weighted sum of the levels' losses, for each example.

  In a mixed batch, level r sees only B_r of the B examples (see
  `mixed_batch`). Its loss is multiplied by B / B_r, so that its mean over the
  batch is its mean over the examples that it sees.

  Args:
    denoise_fn: maps (x_t pyramid, t) to the predictions, a pyramid of the same
      shapes. Conditioning is closed over.
    schedule: the noise of each level.
    pyramid: float32 images [B_r, H_r, W_r, C] or clips [B_r, T_r, H_r, W_r, C],
      coarse to fine.
    t: int, time indices in 0..T-1: [B], shared by all levels, or [B, levels].
    eps: standard normal noise of the shapes of `pyramid`.
    parameterization: as in `level_loss`.
    loss_space: as in `level_loss`.
    noise_floor: as in `level_loss`.
    weights: one for each level, coarse to fine; not normalised.
    time_weights: float32, indexed like the schedule: [T + 1], such as
      `vdm_weights`, or [levels, T + 1], such as `level_weights`. None weighs
      all time indices equally.
    repeats: periods of a mixed batch, see `mixed_batch`.

  Returns:
    The loss per example, float32 [B], and {'losses': a tuple with the
    unweighted losses [B_r] of each level, 'level_losses': their means
    [levels]}.

  Raises:
    ValueError: if `parameterization` or `loss_space` is unknown.
  """
  coefficients = training_coefficients(schedule, pyramid, t, repeats)
  x_t = tuple(map(process.add_noise, pyramid, eps, coefficients))
  predictions = denoise_fn(x_t, t)
  at_times = None
  if time_weights is not None:
    at_times = weights_at(time_weights, t)
  total = jnp.zeros(len(t), jnp.float32)
  level_losses = []  # of examples
  for index, (weight, *level) in enumerate(
    zip(weights, predictions, x_t, pyramid, eps, coefficients, strict=True)
  ):
    losses = level_loss(
      *level,
      parameterization=parameterization,
      loss_space=loss_space,
      noise_floor=noise_floor,
    )
    level_losses.append(losses)
    scale = weight * len(t) / len(losses)
    padded = scale * mixed_batch.pad(losses, len(t), repeats)
    if at_times is not None and at_times.ndim == 2:
      padded *= at_times[:, index]
    total += padded
  if at_times is not None and at_times.ndim == 1:
    total *= at_times
  return total, {
    'losses': tuple(level_losses),
    'level_losses': jnp.stack([losses.mean() for losses in level_losses]),
  }
