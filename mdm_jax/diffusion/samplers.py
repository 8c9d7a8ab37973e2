"""Samplers: from noise to a pyramid of images, all levels together.

A sampling step goes from the noising step t to a less noisy one, s < t. `at`
and `at_s` are a level's signal and noise there, on any path (see `schedule`);
images and noise are [B, H, W, C], or clips [B, T, H, W, C]. On a path that is
not variance-preserving the formulas are those of the papers for
x / sqrt(signal^2 + noise^2).
"""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.diffusion import process
from mdm_jax.diffusion.process import Coefficients, DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.diffusion.schedule import Schedule

SAMPLERS = ('ddim', 'heun', 'dpm', 'ddpm', 'dpm_sde')
THRESHOLDS = ('none', 'clip', 'dynamic', 'dynamic_if')


def is_stochastic(sampler: str, eta: float) -> bool:
  """Whether a sampler adds fresh noise at every step."""
  return sampler in ('ddpm', 'dpm_sde') or (sampler == 'ddim' and eta > 0)


def start_noise(
  rng: jax.Array, shapes: Sequence[Sequence[int]], batch: int
) -> Pyramid:
  """Samples the noise to start from.

  Args:
    rng: a random key.
    shapes: of an example at each level, coarse to fine.
    batch: B, the number of examples.

  Returns:
    Standard normal noise, coarse to fine, float32 [B, *shapes[r]].
  """
  return process.sample_noise(
    rng,
    [jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in shapes],
  )


def time_steps(num_steps: int, schedule: Schedule) -> np.ndarray:
  """The noising steps to visit: noisiest first, evenly spaced, ending at 0.

  On the linear path they begin at T; on the others, as in the release, below
  it: 50 steps of 1000 begin at 981.

  Args:
    num_steps: how many times the network is called.
    schedule: the noise of each level.

  Returns:
    int32 [num_steps + 1].

  Raises:
    ValueError: if `num_steps` is not in 1..T.
  """
  total_steps = schedule.num_steps
  if not 1 <= num_steps <= total_steps:
    raise ValueError(
      f'num_steps is {num_steps}: it must be in 1..{total_steps}.'
    )
  count = num_steps + 1
  if schedule.is_linear:
    steps = np.round(np.linspace(0, total_steps, count))
  else:
    steps = np.round(np.arange(count) * (total_steps + 1) / count)
  return steps[::-1].astype(np.int32)


def threshold_x0(x0: jax.Array, method: str) -> jax.Array:
  """Keeps a predicted image in range (Imagen, arXiv 2205.11487, section 2.3).

  Args:
    x0: [B, H, W, C], or clips.
    method: 'none'; 'clip' to [-1, 1]; 'dynamic' divides each example by the
      .995 quantile of its magnitudes, limited to 1..100, and clips to [-1, 1];
      'dynamic_if' does so with the .95 quantile, limited to 1..1.5.

  Returns:
    Of the shape of `x0`.

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
    jnp.abs(x0), quantile, axis=tuple(range(1, x0.ndim)), keepdims=True
  ).clip(1, largest)
  return jnp.clip(x0, -scale, scale) / scale


def _snr_ratio(at: Coefficients, at_s: Coefficients) -> jax.Array:
  """The SNR at t over that at s; 0 where s is clean."""
  return (at.signal * at_s.noise / (at_s.signal * at.noise)) ** 2


def posterior_variance(at: Coefficients, at_s: Coefficients) -> jax.Array:
  """Variance of x_s given x_t and x0: noise_s^2 (1 - SNR_t / SNR_s).

  Ho et al., arXiv 2006.11239, eq. 7; for any path Kingma et al., arXiv
  2107.00630, appendix A.
  """
  # Where s is t, a device whose division rounds may find a ratio above 1.
  return at_s.noise**2 * jnp.maximum(1 - _snr_ratio(at, at_s), 0)


def ddpm_step(
  x0: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  at_s: Coefficients,
  noise: jax.Array,
) -> jax.Array:
  """Samples x_s from its posterior given x_t and x0.

  With r = SNR_t / SNR_s its mean is signal_s (1 - r) x0 + sqrt(r) noise_s /
  noise_t x_t: Ho et al., arXiv 2006.11239, eqs. 6 and 7; for any path Kingma et
  al., arXiv 2107.00630, appendix A. `noise` is standard normal.
  """
  ratio = _snr_ratio(at, at_s)
  mean = (
    at_s.signal * (1 - ratio) * x0
    + jnp.sqrt(ratio) * at_s.noise / at.noise * x_t
  )
  return mean + jnp.sqrt(posterior_variance(at, at_s)) * noise


def ddim_step(
  x0: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  at_s: Coefficients,
  noise: jax.Array | None = None,
  eta: float = 0.0,
) -> jax.Array:
  """A step of DDIM to x_s (Song et al., arXiv 2010.02502, eqs. 12 and 16).

  On the linear path this is Euler's method along the velocity. `eta` is 0 for
  the deterministic sampler, which takes no noise, and 1 for DDPM's variance.
  eps is recomputed from x_t and the given x0, as x0 may have been thresholded.
  """
  eps = process.predict_eps(x0, x_t, at, 'x0')
  if eta == 0:
    return process.add_noise(x0, eps, at_s)
  variance = eta**2 * posterior_variance(at, at_s)
  # Rounding may leave the difference below zero when it should be zero.
  direction = jnp.sqrt(jnp.maximum(at_s.noise**2 - variance, 0))
  return at_s.signal * x0 + direction * eps + jnp.sqrt(variance) * noise


def heun_step(
  x0: jax.Array,
  x0_s: jax.Array,
  x_s: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  at_s: Coefficients,
  is_linear: bool,
) -> jax.Array:
  """A step of Heun's method to s: along the mean of the slopes at t and s.

  The differential equation is DDIM's, d(x / signal) = eps d(noise / signal)
  (Song et al., arXiv 2010.02502, eq. 14; Karras et al., arXiv 2206.00364, alg.
  1). On the linear path it is dx = (eps - x0) d(noise), as noise / signal is in
  the thousands where sampling begins. `x0` is predicted at `x_t`, `x0_s` at the
  `x_s` that DDIM steps to.
  """
  eps = process.predict_eps(x0, x_t, at, 'x0')
  eps_s = process.predict_eps(x0_s, x_s, at_s, 'x0')
  if is_linear:
    slope = (eps - x0 + eps_s - x0_s) / 2
    return x_t + (at_s.noise - at.noise) * slope
  ratio = at_s.signal / at.signal
  slope = (eps + eps_s) / 2
  return ratio * x_t + (at_s.noise - ratio * at.noise) * slope


def half_logsnr(at: Coefficients) -> jax.Array:
  """DPM-Solver's lambda, log(signal / noise); infinite where noise is 0."""
  return jnp.log(at.signal) - jnp.log(at.noise)


def extrapolate_x0(
  x0: jax.Array,
  at: Coefficients,
  at_s: Coefficients,
  x0_r: jax.Array,
  at_r: Coefficients,
) -> jax.Array:
  """Extrapolates x0 from the predictions at r and t to half way from t to s.

  Linear in `half_logsnr`: D of DPM-Solver++(2M) (Lu et al., arXiv 2211.01095,
  alg. 2). With it, `ddim_step` is a step of that solver, and `ddpm_step` a
  step of its SDE form; with x0 instead, both are of first order.

  Args:
    x0: predicted at t.
    at: signal and noise at t.
    at_s: those at s.
    x0_r: predicted at r, where the previous sampling step started.
    at_r: signal and noise at r.

  Returns:
    The extrapolated x0. It is `x0` itself at the first sampling step (r is t),
    and where s has no noise left.
  """
  step, last = (
    half_logsnr(end) - half_logsnr(start)
    for start, end in ((at, at_s), (at_r, at))
  )
  is_first_order = (last == 0) | (at_s.noise == 0)
  slope = jnp.where(is_first_order, 0, step / jnp.where(last == 0, 1, last))
  return x0 + slope / 2 * (x0 - x0_r)


def _coefficients(
  schedule: Schedule, x_t: Pyramid, step: jax.Array
) -> tuple[Coefficients, ...]:
  """Each level's signal and noise at a noising step, coarse to fine."""
  batch = len(x_t[0])
  return tuple(
    schedule.at(level, jnp.full(batch, step), images.ndim)
    for level, images in enumerate(x_t)
  )


def _network_times(
  schedule: Schedule, step: jax.Array, batch: int
) -> jax.Array:
  """The time indices that the network is given, [B] or [B, levels]."""
  if schedule.times is None:
    return jnp.full(batch, step - 1)
  times = jnp.asarray(schedule.times)[:, step] - 1
  return jnp.broadcast_to(times, (batch, len(times)))


def _predict_x0(
  denoise_fn: DenoiseFn,
  schedule: Schedule,
  x_t: Pyramid,
  step: jax.Array,
  parameterization: str,
  threshold: str,
  known: Pyramid | None,
  num_codes: int,
) -> Pyramid:
  """The network's thresholded x0 at a noising step, float32 at every level."""
  predictions = denoise_fn(x_t, _network_times(schedule, step, len(x_t[0])))
  x0 = tuple(
    threshold_x0(
      process.predict_x0(
        prediction.astype(jnp.float32), x, at, parameterization
      ),
      'none' if level < num_codes else threshold,
    )
    for level, (prediction, x, at) in enumerate(
      zip(predictions, x_t, _coefficients(schedule, x_t, step), strict=True)
    )
  )
  return x0 if known is None else tuple(map(_with_known, x0, known))


def start_known(
  noise: Pyramid, known: Pyramid, schedule: Schedule, t: int | jax.Array
) -> Pyramid:
  """Adds noise to the known first frames, to start at the noising step `t`.

  Args:
    noise: all frames, see `start_noise`.
    known: as in `sample`.
    schedule: the noise of each level.
    t: where the first sampling step starts.

  Returns:
    Of the shapes of `noise`.
  """
  return tuple(
    _with_known(
      x,
      process.add_noise(
        first, x if x.ndim == 4 else x[:, : first.shape[1]], at
      ),
    )
    for x, first, at in zip(
      noise, known, _coefficients(schedule, noise, t), strict=True
    )
  )


def _with_known(clip: jax.Array, known: jax.Array) -> jax.Array:
  """Replaces the first frames of [B, T, H, W, C], or images as a whole."""
  if clip.ndim == 4:
    return known
  return jnp.concatenate([known, clip[:, known.shape[1] :]], axis=1)


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
  known: Pyramid | None = None,
  num_codes: int = 0,
) -> tuple[Pyramid, Pyramid]:
  """Takes every level from the noising step `t` to `s`.

  The network is given the time index t - 1, which had the same noise in
  training.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to the predictions; t is [B, levels]
      where the schedule has `times`.
    x_t: noisy pyramid, coarse to fine.
    schedule: the noise of each level.
    t, s: noising steps to start from and to go to, int scalars, s < t.
    noise: standard normal noise of the shapes of `x_t`; None if the sampler
      adds none (see `is_stochastic`).
    before: noising step r where the previous sampling step started, and the
      x0 that it returned; None at the first step.
    sampler, eta, parameterization, threshold, known, num_codes: as in `sample`.

  Returns:
    The pyramids x_s and the thresholded x0, float32.

  Raises:
    ValueError: if a name is unknown.
  """

  def coefficients(step):
    return _coefficients(schedule, x_t, step)

  def predict(x, step):
    return _predict_x0(
      denoise_fn,
      schedule,
      x,
      step,
      parameterization,
      threshold,
      known,
      num_codes,
    )

  x0, at, at_s = predict(x_t, t), coefficients(t), coefficients(s)
  target = x0
  if sampler.startswith('dpm') and before is not None:
    r, x0_r = before
    target = tuple(map(extrapolate_x0, x0, at, at_s, x0_r, coefficients(r)))
  match sampler:
    case 'ddpm' | 'dpm_sde':
      x_s = tuple(map(ddpm_step, target, x_t, at, at_s, noise))
    case 'ddim' if eta:
      x_s = tuple(
        map(functools.partial(ddim_step, eta=eta), x0, x_t, at, at_s, noise)
      )
    case 'ddim' | 'dpm' | 'heun':
      x_s = tuple(map(ddim_step, target, x_t, at, at_s))
    case _:
      raise ValueError(f'Unknown sampler {sampler!r}: use one of {SAMPLERS}.')
  if sampler == 'heun':

    def correct(x_s):
      step = functools.partial(heun_step, is_linear=schedule.is_linear)
      return tuple(map(step, x0, predict(x_s, s), x_s, x_t, at, at_s))

    # The network is not trained on images without noise, as at s = 0.
    x_s = jax.lax.cond(s > 0, correct, lambda x_s: x_s, x_s)
  return x_s, x0


def steps(num_steps: int, schedule: Schedule) -> tuple[np.ndarray, ...]:
  """The inputs of each sampling step, noisiest first.

  Args:
    num_steps: how many sampling steps.
    schedule: the noise of each level.

  Returns:
    Four arrays with one entry for each sampling step, int [num_steps]: its
    index from 0, and the noising steps r (where the previous one started), t
    (where it starts) and s (where it ends). At the first one, r is t.

  Raises:
    ValueError: if `num_steps` is not in 1..T.
  """
  times = time_steps(num_steps, schedule)
  return (
    np.arange(num_steps),
    np.append(times[0], times[:-2]),
    times[:-1],
    times[1:],
  )


def called_times(
  sampler: str, num_steps: int, schedule: Schedule
) -> np.ndarray:
  """The times that the network is given, of the coarsest level, int [calls].

  Args:
    sampler: one of `SAMPLERS`.
    num_steps: how many sampling steps.
    schedule: the noise of each level.

  Raises:
    ValueError: if `num_steps` is not in 1..T.
  """
  _, _, t, s = steps(num_steps, schedule)
  called = np.append(t, s[:-1]) if sampler == 'heun' else t
  if schedule.times is not None:
    called = schedule.times[0, called]
  return called - 1


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
  known: Pyramid | None = None,
  num_codes: int = 0,
) -> Pyramid:
  """Denoises a pyramid, in one compiled loop over the sampling steps.

  Args:
    denoise_fn: maps (x_t pyramid, t [B]) to the predictions.
    x_t: standard normal noise to start from, see `start_noise`.
    schedule: the noise of each level.
    rng: a random key for the noise that steps add.
    num_steps: sampling steps. Each calls the network once; a step of 'heun'
      calls it twice, except for the last.
    sampler: one of `SAMPLERS`: 'ddim', 'heun' (Heun's method), 'dpm'
      (DPM-Solver++(2M)), 'dpm_sde' (its SDE form) or 'ddpm'.
    eta: fresh noise that DDIM adds, from 0 (none) to 1 (DDPM's variance).
    parameterization: what the network predicts, see `process`.
    threshold: method of `threshold_x0`.
    noise_fn: maps a step's index, counted from 0 at the noisiest, to the noise
      that it adds. None samples the noise from `rng`.
    known: images in [-1, 1] of the first frames, [B, K_r, H, W, C], and of
      levels of images [B, H, W, C]: each step's x0 is replaced by them there
      (the replacement method of Ho et al., arXiv 2204.03458, section 3.1), so
      that their noise is that of x_t. None if there are none.
    num_codes: so many levels, from the coarsest, are not images but codes of an
      autoencoder, which have no range to be kept in.

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
      known=known,
      num_codes=num_codes,
    ), None

  x_t, each = tuple(x_t), steps(num_steps, schedule)
  if known is not None:
    x_t = start_known(x_t, known, schedule, each[2][0])
  (images, _), _ = jax.lax.scan(advance, (x_t, x_t), each)
  return tuple(
    level if index < num_codes else jnp.clip(level, -1, 1)
    for index, level in enumerate(images)
  )
