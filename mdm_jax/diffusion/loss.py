"""Formulas of the multi-resolution loss (MDM, arXiv 2310.15111, section 3)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch
from mdm_jax.diffusion import process
from mdm_jax.diffusion.process import DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.diffusion.schedule import Schedule


def sample_time(rng: jax.Array, batch: int, num_steps: int) -> jax.Array:
  """Samples time indices uniformly from 0..num_steps - 1, int32 [batch]."""
  return jax.random.randint(rng, (batch,), 0, num_steps)


def training_gammas(
  schedule: Schedule, pyramid: Pyramid, t: jax.Array, repeats: int = 1
) -> tuple[jax.Array, ...]:
  """Each level's gammas at the time indices `t`, coarse to fine.

  Time index 0 is the first noisy step. Entry 0 of the gamma table is the clean
  image, so the table is read at t + 1.

  Args:
    schedule: one row of gammas for each level.
    pyramid: B_r images at each level, coarse to fine.
    t: int [B], in 0..T-1.
    repeats: periods of a mixed batch, see `mixed_batch`.

  Returns:
    float32 [B_r, 1, 1, 1] for each level.
  """
  return tuple(
    schedule.gamma(level, mixed_batch.take(t, len(images), repeats) + 1)
    for level, images in enumerate(pyramid)
  )


def weights_at(time_weights: jax.Array, t: jax.Array) -> jax.Array:
  """Weights [B] of the time indices `t` [B], read at t + 1 like the gammas."""
  return jnp.asarray(time_weights)[t + 1]


def level_loss(
  prediction: jax.Array,
  x_t: jax.Array,
  x0: jax.Array,
  eps: jax.Array,
  gamma: jax.Array,
  *,
  parameterization: str,
  loss_space: str,
) -> jax.Array:
  """Mean squared error over pixels and channels, float32 [B].

  Args:
    prediction: the network's output, [B, H, W, C].
    x_t: the noisy images that the network was given, [B, H, W, C].
    x0: the clean images, [B, H, W, C].
    eps: the noise that was added, [B, H, W, C].
    gamma: the share of signal in the variance of `x_t`, [B, 1, 1, 1].
    parameterization: what the network predicts: 'v', 'eps' or 'x0'.
    loss_space: where the error is measured: 'v', 'eps' or 'x0'. The same
      error weighs SNR times as much in 'eps' as in 'x0', and SNR + 1 times
      as much in 'v'.

  Raises:
    ValueError: if `parameterization` or `loss_space` is unknown.
  """
  target = process.target(x0, eps, gamma, loss_space)
  convert = {
    'v': process.predict_v,
    'eps': process.predict_eps,
    'x0': process.predict_x0,
  }[loss_space]
  prediction = prediction.astype(jnp.float32)
  error = convert(prediction, x_t, gamma, parameterization) - target
  return jnp.mean(error**2, axis=(1, 2, 3))


def multi_resolution_loss(
  denoise_fn: DenoiseFn,
  schedule: Schedule,
  pyramid: Pyramid,
  t: jax.Array,
  eps: Pyramid,
  *,
  parameterization: str = 'v',
  loss_space: str = 'eps',
  weights: Sequence[float],
  time_weights: jax.Array | None = None,
  repeats: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The weighted sum of the levels' losses, for each example.

  In a mixed batch, level r sees only B_r of the B examples (see
  `mixed_batch`). Its loss is multiplied by B / B_r, so that its mean over the
  batch is its mean over the examples that it sees.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to the predictions, a pyramid of the
      same shapes. Conditioning is closed over.
    schedule: one row of gammas for each level.
    pyramid: float32 images [B_r, H_r, W_r, C], coarse to fine.
    t: int [B], time indices in 0..T-1, shared by all levels.
    eps: standard normal noise of the shapes of `pyramid`.
    parameterization: as in `level_loss`.
    loss_space: as in `level_loss`.
    weights: one for each level, coarse to fine; not normalised.
    time_weights: float32 [T + 1], indexed like the gammas, such as
      `vdm_weights`; None weighs all time indices equally.
    repeats: periods of a mixed batch, see `mixed_batch`.

  Returns:
    The loss per example, float32 [B], and {'losses': a tuple with the
    unweighted losses [B_r] of each level, 'level_losses': their means
    [levels]}.

  Raises:
    ValueError: if `parameterization` or `loss_space` is unknown.
  """
  gammas = training_gammas(schedule, pyramid, t, repeats)
  x_t = tuple(map(process.add_noise, pyramid, eps, gammas))
  predictions = denoise_fn(x_t, t)
  total = jnp.zeros(len(t), jnp.float32)
  level_losses = []  # of examples
  for weight, *level in zip(
    weights, predictions, x_t, pyramid, eps, gammas, strict=True
  ):
    losses = level_loss(
      *level, parameterization=parameterization, loss_space=loss_space
    )
    level_losses.append(losses)
    scale = weight * len(t) / len(losses)
    total += scale * mixed_batch.pad(losses, len(t), repeats)
  if time_weights is not None:
    total *= weights_at(time_weights, t)
  return total, {
    'losses': tuple(level_losses),
    'level_losses': jnp.stack([losses.mean() for losses in level_losses]),
  }
