"""Samplers: from noise to a pyramid of images, all levels together.

A step goes from the noising step t to an earlier one, s. `gamma` and
`gamma_s` are a level's gammas there, and `alpha = gamma / gamma_s`.
"""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.diffusion import process
from mdm_jax.diffusion.process import DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.diffusion.schedule import Schedule

SAMPLERS = ('ddim', 'heun', 'dpm', 'ddpm', 'dpm_sde')
THRESHOLDS = ('none', 'clip', 'dynamic', 'dynamic_if')


def draws_noise(sampler: str, eta: float) -> bool:
  """Whether a sampler draws fresh noise at every step."""
  return sampler in ('ddpm', 'dpm_sde') or (sampler == 'ddim' and eta > 0)


def start_noise(
  rng: jax.Array, resolutions: Sequence[int], batch: int
) -> Pyramid:
  """Noise to start from, coarse to fine, float32 [batch, H_r, H_r, 3]."""
  return process.draw_noise(
    rng,
    [
      jax.ShapeDtypeStruct((batch, resolution, resolution, 3), jnp.float32)
      for resolution in resolutions
    ],
  )


def time_steps(num_steps: int, total_steps: int) -> np.ndarray:
  """The noising steps to visit, latest first, evenly spaced, ending at 0.

  Args:
    num_steps: how many times the network is called.
    total_steps: T of the schedule.

  Returns:
    int32 [num_steps + 1].

  Raises:
    ValueError: if `num_steps` is not in 1..`total_steps`.
  """
  if not 1 <= num_steps <= total_steps:
    raise ValueError(
      f'num_steps is {num_steps}: it must be in 1..{total_steps}.'
    )
  count = num_steps + 1
  steps = np.round(np.arange(count) * (total_steps + 1) / count)
  return steps[::-1].astype(np.int32)


def threshold_x0(x0: jax.Array, method: str) -> jax.Array:
  """Keeps a predicted image in range (Imagen, arXiv 2205.11487, section 2.3).

  Args:
    x0: [B, H, W, C].
    method: 'none'; 'clip' to [-1, 1]; 'dynamic' divides each example by the
      .995 quantile of its magnitudes where that is over 1 (and at most by
      100), then clips; 'dynamic_if' the same with the .95 quantile, at most
      by 1.5.

  Raises:
    ValueError: if there is no such method.
  """
  match method:
    case 'none':
      return x0
    case 'clip':
      return jnp.clip(x0, -1, 1)
    case 'dynamic':
      quantile, largest = 0.995, 100.0
    case 'dynamic_if':
      quantile, largest = 0.95, 1.5
    case _:
      raise ValueError(
        f'Unknown threshold {method!r}: use none, clip, dynamic or dynamic_if.'
      )
  scale = jnp.quantile(
    jnp.abs(x0), quantile, axis=(1, 2, 3), keepdims=True
  ).clip(1, largest)
  return jnp.clip(x0, -scale, scale) / scale


def posterior_variance(gamma: jax.Array, gamma_s: jax.Array) -> jax.Array:
  """Variance of x_s given x_t and x0 (Ho et al., arXiv 2006.11239, eq. 7)."""
  return (1 - gamma / gamma_s) * (1 - gamma_s) / (1 - gamma)


def ddpm_step(
  x0: jax.Array,
  x_t: jax.Array,
  gamma: jax.Array,
  gamma_s: jax.Array,
  noise: jax.Array,
) -> jax.Array:
  """x_s drawn from its posterior given x_t and x0 (Ho et al., eqs. 6, 7)."""
  alpha = gamma / gamma_s
  mean = (
    jnp.sqrt(gamma_s) * (1 - alpha) * x0 + jnp.sqrt(alpha) * (1 - gamma_s) * x_t
  ) / (1 - gamma)
  return mean + jnp.sqrt(posterior_variance(gamma, gamma_s)) * noise


def ddim_step(
  x0: jax.Array,
  x_t: jax.Array,
  gamma: jax.Array,
  gamma_s: jax.Array,
  noise: jax.Array | None = None,
  eta: float = 0.0,
) -> jax.Array:
  """x_s of DDIM (Song et al., arXiv 2010.02502, eqs. 12, 16).

  `eta` is 0 for the deterministic sampler, which takes no noise, and 1 for
  DDPM's variance. The noise's direction is that of the given x0, which may
  have been thresholded.
  """
  eps = process.predict_eps(x0, x_t, gamma, 'x0')
  if eta == 0:
    return process.add_noise(x0, eps, gamma_s)
  variance = eta**2 * posterior_variance(gamma, gamma_s)
  # Rounding may leave the difference below zero when it should be zero.
  direction = jnp.sqrt(jnp.maximum(1 - gamma_s - variance, 0))
  return jnp.sqrt(gamma_s) * x0 + direction * eps + jnp.sqrt(variance) * noise


def heun_step(
  eps: jax.Array,
  eps_s: jax.Array,
  x_t: jax.Array,
  gamma: jax.Array,
  gamma_s: jax.Array,
) -> jax.Array:
  """x_s along the mean of the slopes at t and at s.

  Heun's method on DDIM's differential equation, d(x / signal) = eps d(noise /
  signal) (Song et al., eq. 14; Karras et al., arXiv 2206.00364, alg. 1).
  `eps_s` is that at DDIM's x_s.
  """
  ratio = jnp.sqrt(gamma_s / gamma)
  slope = (eps + eps_s) / 2
  return (
    ratio * x_t + (jnp.sqrt(1 - gamma_s) - ratio * jnp.sqrt(1 - gamma)) * slope
  )


def half_logsnr(gamma: jax.Array) -> jax.Array:
  """Lambda of DPM-Solver, log(signal / noise); infinite where gamma is 1."""
  return (jnp.log(gamma) - jnp.log1p(-gamma)) / 2


def extrapolate_x0(
  x0: jax.Array,
  gamma: jax.Array,
  gamma_s: jax.Array,
  x0_r: jax.Array,
  gamma_r: jax.Array,
) -> jax.Array:
  """x0 half way from t to s, on the line through those at r and at t.

  Half way in `half_logsnr`: D of DPM-Solver++(2M) (Lu et al., arXiv
  2211.01095, alg. 2). With it `ddim_step` is that solver's step, and
  `ddpm_step` that of its SDE form; with x0 they are those of first order. The
  step r was before t. Where r is t, or s has no noise left, x0 is returned.
  """
  step, last = (
    half_logsnr(end) - half_logsnr(start)
    for start, end in ((gamma, gamma_s), (gamma_r, gamma))
  )
  is_first_order = (last == 0) | (gamma_s == 1)
  slope = jnp.where(is_first_order, 0, step / jnp.where(last == 0, 1, last))
  return x0 + slope / 2 * (x0 - x0_r)


def sample_step(
  denoise_fn: DenoiseFn,
  x_t: Pyramid,
  schedule: Schedule,
  t: jax.Array,
  s: jax.Array,
  noise: Pyramid | None,
  before: tuple[jax.Array, Pyramid] | None = None,
  *,
  sampler: str,
  eta: float,
  parameterization: str,
  threshold: str,
) -> tuple[Pyramid, Pyramid]:
  """Takes every level from the noising step `t` to `s`, scalars, s < t.

  The network is given t - 1, the draw that it saw this noise under in
  training. The other arguments are those of `sample`; `noise` may be None if
  the step draws none. `before` is the noising step r before t, and its x0;
  None at the first.

  Returns:
    The pyramids x_s and the thresholded x0, float32.
  """
  batch = len(x_t[0])

  def gammas(step):
    return tuple(
      schedule.gamma(level, jnp.full(batch, step)) for level in range(len(x_t))
    )

  def predict(x_t, step):
    return tuple(
      threshold_x0(
        process.predict_x0(
          prediction.astype(jnp.float32), x, gamma, parameterization
        ),
        threshold,
      )
      for prediction, x, gamma in zip(
        denoise_fn(x_t, jnp.full(batch, step - 1)),
        x_t,
        gammas(step),
        strict=True,
      )
    )

  x0, gamma, gamma_s = predict(x_t, t), gammas(t), gammas(s)
  target = x0
  if sampler.startswith('dpm') and before is not None:
    r, x0_r = before
    target = tuple(map(extrapolate_x0, x0, gamma, gamma_s, x0_r, gammas(r)))
  match sampler:
    case 'ddpm' | 'dpm_sde':
      x_s = tuple(map(ddpm_step, target, x_t, gamma, gamma_s, noise))
    case 'ddim' if eta:
      x_s = tuple(
        map(
          functools.partial(ddim_step, eta=eta), x0, x_t, gamma, gamma_s, noise
        )
      )
    case 'ddim' | 'dpm' | 'heun':
      x_s = tuple(map(ddim_step, target, x_t, gamma, gamma_s))
    case _:
      raise ValueError(f'Unknown sampler {sampler!r}: use one of {SAMPLERS}.')
  if sampler == 'heun':

    def correct(x_s):
      slopes, slopes_s = (
        tuple(process.predict_eps(*level, 'x0') for level in zip(*at))
        for at in ((x0, x_t, gamma), (predict(x_s, s), x_s, gamma_s))
      )
      return tuple(map(heun_step, slopes, slopes_s, x_t, gamma, gamma_s))

    # The network knows no images without noise.
    x_s = jax.lax.cond(s > 0, correct, lambda x_s: x_s, x_s)
  return x_s, x0


def steps(num_steps: int, total_steps: int) -> tuple[np.ndarray, ...]:
  """What there is to know of each step.

  Args:
    num_steps: see `time_steps`.
    total_steps: T of the schedule.

  Returns:
    The step's index, counted from 0 at the noisiest, and the noising steps r,
    t and s, int [num_steps] each. There is no step before the first: there r
    is t.
  """
  times = time_steps(num_steps, total_steps)
  return (
    np.arange(num_steps),
    np.append(times[0], times[:-2]),
    times[:-1],
    times[1:],
  )


def sample(
  denoise_fn: DenoiseFn,
  x_t: Pyramid,
  schedule: Schedule,
  rng: jax.Array,
  *,
  num_steps: int,
  sampler: str = 'ddim',
  eta: float = 0.0,
  parameterization: str = 'v',
  threshold: str = 'dynamic_if',
  noise_fn: Callable[[jax.Array], Pyramid] | None = None,
) -> Pyramid:
  """Denoises a pyramid, in one compiled loop over the steps.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to the predictions.
    x_t: standard normal noise to start from, as `start_noise` draws it.
    schedule: one row of gammas for each level.
    rng: a random key for the steps' noise.
    num_steps: how many times the network is called; with 'heun' twice as
      often, but for the last step.
    sampler: one of `SAMPLERS`: DDIM; Heun; DPM-Solver++(2M), 'dpm', and its
      SDE form; DDPM.
    eta: DDIM's share of fresh noise, 0 (none is drawn) to 1.
    parameterization: what the network predicts, 'v', 'eps' or 'x0'.
    threshold: see `threshold_x0`.
    noise_fn: maps a step's index, counted from 0 at the noisiest, to its
      noise. None draws it from `rng`.

  Returns:
    Images within [-1, 1], coarse to fine, shaped like `x_t`.

  Raises:
    ValueError: if a name is unknown, or `num_steps` or `eta` out of range.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f'eta is {eta}: it must be in 0..1.')
  if noise_fn is None:

    def noise_fn(index):
      return process.draw_noise(jax.random.fold_in(rng, index), x_t)

  needs_noise = draws_noise(sampler, eta)

  def advance(state, step):
    x, x0 = state
    index, r, t, s = step
    return sample_step(
      denoise_fn,
      x,
      schedule,
      t,
      s,
      noise_fn(index) if needs_noise else None,
      (r, x0),
      sampler=sampler,
      eta=eta,
      parameterization=parameterization,
      threshold=threshold,
    ), None

  x_t = tuple(x_t)
  (images, _), _ = jax.lax.scan(
    advance, (x_t, x_t), steps(num_steps, schedule.num_steps)
  )
  return tuple(jnp.clip(level, -1, 1) for level in images)
