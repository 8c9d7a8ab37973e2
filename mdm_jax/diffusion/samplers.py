"""Samplers: from noise to a pyramid of images, all levels together.

A sampling step goes from the noising step t to a less noisy one, s < t.
`gamma` and `gamma_s` are a level's gammas at t and at s (see `schedule`), [B,
1, 1, 1] or scalars; images and noise are [B, H, W, C].
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


def is_stochastic(sampler: str, eta: float) -> bool:
  """Whether a sampler adds fresh noise at every step."""
  return sampler in ('ddpm', 'dpm_sde') or (sampler == 'ddim' and eta > 0)


def start_noise(
  rng: jax.Array, resolutions: Sequence[int], batch: int
) -> Pyramid:
  """Samples the noise to start from.

  Args:
    rng: a random key.
    resolutions: side of each level in pixels, coarse to fine.
    batch: B, the number of examples.

  Returns:
    Standard normal noise, coarse to fine, float32 [B, H_r, H_r, 3].
  """
  return process.sample_noise(
    rng,
    [
      jax.ShapeDtypeStruct((batch, resolution, resolution, 3), jnp.float32)
      for resolution in resolutions
    ],
  )


def time_steps(num_steps: int, total_steps: int) -> np.ndarray:
  """The noising steps to visit: noisiest first, evenly spaced, ending at 0.

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
      .995 quantile of its magnitudes, limited to 1..100, and clips to [-1, 1];
      'dynamic_if' does so with the .95 quantile, limited to 1..1.5.

  Returns:
    [B, H, W, C].

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
  """Samples x_s from its posterior given x_t and x0.

  Ho et al., arXiv 2006.11239, eqs. 6 and 7. `noise` is standard normal.
  """
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
  """A step of DDIM to x_s (Song et al., arXiv 2010.02502, eqs. 12 and 16).

  `eta` is 0 for the deterministic sampler, which takes no noise, and 1 for
  DDPM's variance. eps is recomputed from x_t and the given x0, as x0 may have
  been thresholded.
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
  """A step of Heun's method to x_s: along the mean of the slopes at t and s.

  The differential equation is DDIM's, d(x / signal) = eps d(noise / signal)
  (Song et al., arXiv 2010.02502, eq. 14; Karras et al., arXiv 2206.00364, alg.
  1). `eps` is predicted at x_t, `eps_s` at the x_s that DDIM steps to.
  """
  ratio = jnp.sqrt(gamma_s / gamma)
  slope = (eps + eps_s) / 2
  return (
    ratio * x_t + (jnp.sqrt(1 - gamma_s) - ratio * jnp.sqrt(1 - gamma)) * slope
  )


def half_logsnr(gamma: jax.Array) -> jax.Array:
  """DPM-Solver's lambda, log(signal / noise); infinite where gamma is 1."""
  return (jnp.log(gamma) - jnp.log1p(-gamma)) / 2


def extrapolate_x0(
  x0: jax.Array,
  gamma: jax.Array,
  gamma_s: jax.Array,
  x0_r: jax.Array,
  gamma_r: jax.Array,
) -> jax.Array:
  """Extrapolates x0 from the predictions at r and t to half way from t to s.

  Linear in `half_logsnr`: D of DPM-Solver++(2M) (Lu et al., arXiv 2211.01095,
  alg. 2). With it, `ddim_step` is a step of that solver, and `ddpm_step` a
  step of its SDE form; with x0 instead, both are of first order.

  Args:
    x0: predicted at t.
    gamma: at t.
    gamma_s: at s.
    x0_r: predicted at r, where the previous sampling step started.
    gamma_r: at r.

  Returns:
    The extrapolated x0. It is `x0` itself at the first sampling step (r is t),
    and where s has no noise left.
  """
  step, last = (
    half_logsnr(end) - half_logsnr(start)
    for start, end in ((gamma, gamma_s), (gamma_r, gamma))
  )
  is_first_order = (last == 0) | (gamma_s == 1)
  slope = jnp.where(is_first_order, 0, step / jnp.where(last == 0, 1, last))
  return x0 + slope / 2 * (x0 - x0_r)


def _level_gammas(
  schedule: Schedule, x_t: Pyramid, step: jax.Array
) -> tuple[jax.Array, ...]:
  """Each level's gammas at a noising step, coarse to fine, [B, 1, 1, 1]."""
  batch = len(x_t[0])
  return tuple(
    schedule.gamma(level, jnp.full(batch, step)) for level in range(len(x_t))
  )


def _predict_x0(
  denoise_fn: DenoiseFn,
  schedule: Schedule,
  x_t: Pyramid,
  step: jax.Array,
  parameterization: str,
  threshold: str,
) -> Pyramid:
  """The network's thresholded x0 at a noising step, float32 at every level."""
  predictions = denoise_fn(x_t, jnp.full(len(x_t[0]), step - 1))
  gammas = _level_gammas(schedule, x_t, step)
  return tuple(
    threshold_x0(
      process.predict_x0(
        prediction.astype(jnp.float32), x, gamma, parameterization
      ),
      threshold,
    )
    for prediction, x, gamma in zip(predictions, x_t, gammas, strict=True)
  )


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
  """Takes every level from the noising step `t` to `s`.

  The network is given the time index t - 1, which had the same noise in
  training.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to the predictions.
    x_t: noisy pyramid, coarse to fine, [B, H_r, H_r, C].
    schedule: one row of gammas for each level.
    t: noising step to start from, int scalar.
    s: noising step to go to, int scalar, s < t.
    noise: standard normal noise of the shapes of `x_t`; None if the sampler
      adds none (see `is_stochastic`).
    before: noising step r where the previous sampling step started, and the
      x0 that it returned; None at the first step.
    sampler: as in `sample`.
    eta: as in `sample`.
    parameterization: as in `sample`.
    threshold: as in `sample`.

  Returns:
    The pyramids x_s and the thresholded x0, float32.

  Raises:
    ValueError: if a name is unknown.
  """

  def gammas(step):
    return _level_gammas(schedule, x_t, step)

  def predict(x, step):
    return _predict_x0(
      denoise_fn, schedule, x, step, parameterization, threshold
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

    # The network is not trained on images without noise, as at s = 0.
    x_s = jax.lax.cond(s > 0, correct, lambda x_s: x_s, x_s)
  return x_s, x0


def steps(num_steps: int, total_steps: int) -> tuple[np.ndarray, ...]:
  """The inputs of each sampling step, noisiest first.

  Args:
    num_steps: how many sampling steps.
    total_steps: T of the schedule.

  Returns:
    Four arrays with one entry for each sampling step, int [num_steps]: its
    index from 0, and the noising steps r (where the previous one started), t
    (where it starts) and s (where it ends). At the first one, r is t.

  Raises:
    ValueError: if `num_steps` is not in 1..`total_steps`.
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
  """Denoises a pyramid, in one compiled loop over the sampling steps.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to the predictions.
    x_t: standard normal noise to start from, see `start_noise`.
    schedule: one row of gammas for each level.
    rng: a random key for the noise that steps add.
    num_steps: sampling steps. Each calls the network once; a step of 'heun'
      calls it twice, except for the last.
    sampler: one of `SAMPLERS`: 'ddim', 'heun' (Heun's method), 'dpm'
      (DPM-Solver++(2M)), 'dpm_sde' (its SDE form) or 'ddpm'.
    eta: fresh noise that DDIM adds, from 0 (none) to 1 (DDPM's variance).
    parameterization: what the network predicts: 'v', 'eps' or 'x0'.
    threshold: method of `threshold_x0`.
    noise_fn: maps a step's index, counted from 0 at the noisiest, to the noise
      that it adds. None samples the noise from `rng`.

  Returns:
    Images within [-1, 1], coarse to fine, of the shapes of `x_t`.

  Raises:
    ValueError: if a name is unknown, or `num_steps` or `eta` is out of range.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f'eta is {eta}: it must be in 0..1.')
  if noise_fn is None:

    def noise_fn(index):
      return process.sample_noise(jax.random.fold_in(rng, index), x_t)

  needs_noise = is_stochastic(sampler, eta)

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
