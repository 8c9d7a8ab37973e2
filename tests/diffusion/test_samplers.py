import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import mixed_batch
from mdm_jax.diffusion import process, samplers
from mdm_jax.diffusion.schedule import make_schedule, offset_levels

RESOLUTIONS = (4, 8)
SHAPES = (4, 4, 3), (8, 8, 3)
SCHEDULE = make_schedule('deepfloyd', RESOLUTIONS, 1.0)


def vp(gamma):
  """Signal and noise of a variance-preserving path."""
  gamma = np.float32(gamma)
  return process.Coefficients(np.sqrt(gamma), np.sqrt(1 - gamma))


def _images(seed=6):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.uniform(-0.9, 0.9, (2, side, side, 3)).astype(np.float32)
    for side in RESOLUTIONS
  )


def _knows(images, parameterization):
  """A perfect network: it knows the images, and so the noise in x_t."""

  def denoise(x_t, t):
    predictions = []
    for level, (x, x0) in enumerate(zip(x_t, images, strict=True)):
      at = SCHEDULE.at(level, t + 1)
      eps = process.predict_eps(x0, x, at, 'x0')
      predictions.append(process.target(x0, eps, at, parameterization))
    return tuple(predictions)

  return denoise


def _constant(value):
  return lambda x_t, t: tuple(jnp.full_like(x, value) for x in x_t)


@pytest.mark.parametrize('num_steps', (10, 50, 250))
def test_steps_equal_the_released(golden, num_steps):
  steps = samplers.time_steps(num_steps, SCHEDULE)
  np.testing.assert_array_equal(
    steps, golden('schedules')[f'timesteps_{num_steps}']
  )


@pytest.mark.parametrize('num_steps', (1, 7, 1000))
def test_steps_fall_to_zero(num_steps):
  steps = samplers.time_steps(num_steps, SCHEDULE)
  assert len(steps) == num_steps + 1
  assert np.all(np.diff(steps) < 0)
  assert steps[-1] == 0 and steps[0] <= 1000


@pytest.mark.parametrize('num_steps', (0, 1001))
def test_steps_beyond_the_schedule_are_refused(num_steps):
  with pytest.raises(ValueError, match=str(num_steps)):
    samplers.time_steps(num_steps, SCHEDULE)


@pytest.mark.parametrize(
  'method, quantile, largest',
  [('dynamic', 0.995, 100), ('dynamic_if', 0.95, 1.5)],
)
def test_dynamic_thresholding_is_per_example(method, quantile, largest):
  rng = np.random.default_rng(7)
  spread = np.array([0.1, 0.8, 500])[:, None, None, None]
  x0 = (spread * rng.normal(size=(3, 6, 6, 3))).astype(np.float32)
  got = samplers.threshold_x0(x0, method)
  for image, result in zip(x0, got, strict=True):
    scale = np.clip(np.quantile(np.abs(image), quantile), 1, largest)
    expected = np.clip(image, -scale, scale) / scale
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_plain_thresholds():
  x0 = np.array([-3, -1, 0.5, 2], np.float32).reshape(1, 2, 2, 1)
  np.testing.assert_array_equal(samplers.threshold_x0(x0, 'none'), x0)
  np.testing.assert_array_equal(
    samplers.threshold_x0(x0, 'clip').ravel(), [-1, -1, 0.5, 1]
  )
  with pytest.raises(ValueError, match="'hard'"):
    samplers.threshold_x0(x0, 'hard')


@pytest.mark.parametrize('parameterization', ['v', 'eps', 'x0'])
def test_ddim_recovers_the_images_that_a_network_knows(parameterization):
  images = _images()
  got = samplers.sample(
    _knows(images, parameterization),
    samplers.start_noise(jax.random.key(0), SHAPES, 2),
    SCHEDULE,
    jax.random.key(1),
    num_steps=10,
    threshold='none',
    parameterization=parameterization,
  )
  for level, image in zip(got, images, strict=True):
    np.testing.assert_allclose(level, image, atol=2e-4)


def test_ddim_keeps_the_noise_and_moves_along_the_forward_process():
  rng = np.random.default_rng(8)
  x0, eps = rng.normal(size=(2, 1, 4, 4, 3)).astype(np.float32)
  x_t = process.add_noise(x0, eps, vp(0.3))
  np.testing.assert_allclose(
    samplers.ddim_step(x0, x_t, vp(0.3), vp(0.8)),
    process.add_noise(x0, eps, vp(0.8)),
    atol=1e-5,
  )


def test_ddim_with_full_eta_is_ddpm():
  rng = np.random.default_rng(9)
  x0, x_t, noise = rng.normal(size=(3, 1, 4, 4, 3)).astype(np.float32)
  for gamma, gamma_s in ((0.01, 0.2), (0.5, 0.9), (0.9, 1.0)):
    ends = vp(gamma), vp(gamma_s)
    np.testing.assert_allclose(
      samplers.ddim_step(x0, x_t, *ends, noise, eta=1.0),
      samplers.ddpm_step(x0, x_t, *ends, noise),
      atol=2e-6,
    )


def test_eta_scales_the_standard_deviation_of_fresh_noise():
  x0, x_t = _images()[0], _images(13)[0]
  ends = vp(0.2), vp(0.7)
  with_noise, without = (
    samplers.ddim_step(x0, x_t, *ends, jnp.float32(noise), eta=0.5)
    for noise in (1, 0)
  )
  # (1 - alpha)(1 - gamma_s)/(1 - gamma) = 5/7 * 0.3 / 0.8
  expected = 0.5 * np.sqrt(5 / 7 * 0.3 / 0.8)
  np.testing.assert_allclose(with_noise - without, expected, rtol=1e-5)


def test_ddpm_steps_from_the_forward_process_stay_on_it():
  """From x_t of a known x0, x_s has the forward process's mean and spread."""
  keys = jax.random.split(jax.random.key(2))
  shape = (1, 200, 200, 3)
  eps, noise = (jax.random.normal(key, shape) for key in keys)
  x_t = process.add_noise(0.7, eps, vp(0.3))
  x_s = np.array(samplers.ddpm_step(0.7, x_t, vp(0.3), vp(0.6), noise), float)
  assert x_s.mean() == pytest.approx(0.7 * np.sqrt(0.6), abs=0.01)
  assert x_s.var() == pytest.approx(0.4, abs=0.01)


def test_the_last_step_lands_on_x0_without_noise():
  x0 = _images()[0]
  noise = np.full_like(x0, 1e6)
  ends = vp(SCHEDULE.gammas[0, 1]), vp(1)
  for step in (
    samplers.ddpm_step(x0, 3 * x0, *ends, noise),
    samplers.ddim_step(x0, 3 * x0, *ends, noise, eta=1.0),
    samplers.ddim_step(x0, 3 * x0, *ends),
  ):
    np.testing.assert_allclose(step, x0, atol=1e-6)


def test_the_whole_schedule_stays_finite_from_almost_no_signal():
  schedule = make_schedule('deepfloyd', (4, 64), 2.0)
  x_t = tuple(x * 3 for x in _images())
  for sampler, eta in (('ddim', 1.0), ('ddpm', 0.0)):
    got = samplers.sample(
      _constant(0.3),
      x_t,
      schedule,
      jax.random.key(3),
      num_steps=1000,
      sampler=sampler,
      eta=eta,
      threshold='clip',
    )
    for level in got:
      assert np.all(np.abs(level) <= 1)


@pytest.mark.parametrize('sampler, eta', [('ddpm', 0.0), ('ddim', 0.5)])
def test_the_compiled_loop_equals_single_steps(sampler, eta):
  x = _images(10)
  rng = np.random.default_rng(11)
  noise = tuple(
    rng.normal(size=(5, *level.shape)).astype(np.float32) for level in x
  )
  options = {
    'sampler': sampler,
    'eta': eta,
    'parameterization': 'v',
    'threshold': 'none',
  }
  got = jax.jit(
    lambda x: samplers.sample(
      _constant(0.2),
      x,
      SCHEDULE,
      jax.random.key(4),
      num_steps=5,
      noise_fn=lambda index: tuple(jnp.asarray(n)[index] for n in noise),
      **options,
    )
  )(x)
  times = samplers.time_steps(5, SCHEDULE)
  for index in range(5):
    x, _ = samplers.sample_step(
      _constant(0.2),
      x,
      SCHEDULE,
      times[index],
      times[index + 1],
      tuple(n[index] for n in noise),
      **options,
    )
  for level, expected in zip(got, x, strict=True):
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(level, np.clip(expected, -1, 1), atol=1e-5)


def _knows_the_spread(spread, schedule=SCHEDULE):
  """The best network for images of N(0, spread^2), whose ODE has a solution."""

  def denoise(x_t, t):
    predictions = []
    for level, x in enumerate(x_t):
      signal, noise = schedule.at(level, t + 1)
      variance = signal**2 * spread**2 + noise**2
      predictions.append(signal * spread**2 / variance * x)
    return tuple(predictions)

  return denoise


@pytest.mark.parametrize(
  'sampler, order', [('ddim', 1), ('dpm', 2), ('heun', 2)]
)
def test_order_of_convergence(sampler, order):
  """With 4 times the steps, the error is 1/4 (order 1) or 1/16 (order 2)."""
  spread, times = 0.3, np.linspace(900, 100, 65).round().astype(int)
  x_t = _images()
  exact = [
    x
    * np.sqrt(spread**2 * ends[1] + 1 - ends[1])
    / np.sqrt(spread**2 * ends[0] + 1 - ends[0])
    for x, row in zip(x_t, SCHEDULE.gammas, strict=True)
    for ends in [row[[900, 100]].astype(float)]
  ]

  @jax.jit
  def run(steps):
    def advance(state, step):
      x, x0 = state
      r, t, s = step
      return samplers.sample_step(
        _knows_the_spread(spread),
        x,
        SCHEDULE,
        t,
        s,
        None,
        (r, x0),
        sampler=sampler,
        eta=0.0,
        parameterization='x0',
        threshold='none',
      ), None

    return jax.lax.scan(advance, (x_t, x_t), steps)[0][0]

  errors = []
  for stride in (8, 2):
    t = times[::stride]
    got = run((np.append(t[0], t[:-2]), t[:-1], t[1:]))
    errors.append([np.abs(x - y).max() for x, y in zip(got, exact)])
  rates = np.log2(np.array(errors[0]) / errors[1]) / 2
  assert max(errors[1]) < (0.01, 0.001)[order - 1]
  assert order - 0.4 < min(rates), rates
  assert order == 2 or max(rates) < 1.4


@pytest.mark.parametrize('sampler', ['heun', 'dpm', 'dpm_sde'])
def test_all_recover_the_images_that_a_network_knows(sampler):
  images = _images()
  got = samplers.sample(
    _knows(images, 'v'),
    samplers.start_noise(jax.random.key(0), SHAPES, 2),
    SCHEDULE,
    jax.random.key(1),
    num_steps=8,
    sampler=sampler,
    threshold='none',
  )
  for level, image in zip(got, images, strict=True):
    np.testing.assert_allclose(level, image, atol=5e-4)


def test_extrapolation_is_along_the_logsnr():
  x0, x0_r = _images()[0], _images(14)[0]
  at_r, at, at_s = map(vp, (0.1, 0.4, 0.7))
  first, middle, last = (np.log(g / (1 - g)) / 2 for g in (0.1, 0.4, 0.7))
  expected = x0 + (last - middle) / 2 * (x0 - x0_r) / (middle - first)
  np.testing.assert_allclose(
    samplers.extrapolate_x0(x0, at, at_s, x0_r, at_r),
    expected,
    rtol=1e-4,
    atol=1e-5,
  )
  for ends in (
    (at, at_s, x0_r, at),
    (at, vp(1), x0_r, at_r),
  ):
    np.testing.assert_array_equal(samplers.extrapolate_x0(x0, *ends), x0)


def test_sde_steps_stay_on_the_forward_process():
  """Second-order steps with fresh noise keep the spread of the images."""
  spread = 0.3
  x_t = samplers.start_noise(jax.random.key(5), [(64, 64, 3)] * 2, 2)
  got = samplers.sample(
    _knows_the_spread(spread),
    x_t,
    SCHEDULE,
    jax.random.key(6),
    num_steps=40,
    sampler='dpm_sde',
    parameterization='x0',
    threshold='none',
  )
  for level in got:
    assert np.std(level) == pytest.approx(spread, rel=0.03)


def test_noise_comes_from_the_key_only_where_it_is_sampled():
  def sampler(**options):
    def run(seed):
      return samplers.sample(
        _constant(0.2),
        _images(12),
        SCHEDULE,
        jax.random.key(seed),
        num_steps=4,
        threshold='clip',
        **options,
      )[0]

    return jax.jit(run)

  def refuse(index):
    raise AssertionError('noise sampled')

  sampler(noise_fn=refuse)(0)
  noisy = sampler(eta=0.5)
  np.testing.assert_array_equal(noisy(0), noisy(0))
  assert np.abs(noisy(0) - noisy(1)).max() > 0.1


def test_invalid_settings_are_named():
  x_t = _images()
  for options, word in (
    ({'sampler': 'euler'}, "'euler'"),
    ({'eta': 1.5}, '1.5'),
    ({'threshold': 'hard'}, "'hard'"),
  ):
    with pytest.raises(ValueError, match=word):
      samplers.sample(
        _constant(0), x_t, SCHEDULE, jax.random.key(0), num_steps=2, **options
      )


FLOW = make_schedule('linear', RESOLUTIONS, 2.0)


def linear(t):
  """Signal and noise of the linear path."""
  return process.Coefficients(np.float32(1 - t), np.float32(t))


def test_the_linear_path_is_sampled_from_pure_noise():
  np.testing.assert_array_equal(
    samplers.time_steps(4, FLOW), [1000, 750, 500, 250, 0]
  )


def test_ddim_is_eulers_method_on_the_linear_path():
  x0, x_t = _images()[0], _images(13)[0]
  for t, s in ((0.9, 0.6), (0.6, 0.05), (0.3, 0.0)):
    velocity = process.predict_velocity(x0, x_t, linear(t), 'x0')
    np.testing.assert_allclose(
      samplers.ddim_step(x0, x_t, linear(t), linear(s)),
      x_t + (s - t) * velocity,
      atol=2e-6,
    )


STEPS = {
  'ddim': lambda x0, x, noise, *ends: samplers.ddim_step(x0, x, *ends),
  'eta': lambda x0, x, noise, *ends: samplers.ddim_step(
    x0, x, *ends, noise, eta=0.4
  ),
  'ddpm': lambda x0, x, noise, *ends: samplers.ddpm_step(x0, x, *ends, noise),
}


@pytest.mark.parametrize('step', STEPS)
def test_steps_on_the_linear_path_are_the_others_rescaled(step):
  """x is multiplied by the norm of (signal, noise), and fresh noise too."""
  rng = np.random.default_rng(15)
  x0, x_t, noise = rng.normal(size=(3, 1, 4, 4, 3)).astype(np.float32)
  for t, s in ((0.9, 0.6), (0.5, 0.1)):
    norm, norm_s = (np.sqrt((1 - time) ** 2 + time**2) for time in (t, s))
    found = STEPS[step](x0, norm * x_t, noise, linear(t), linear(s))
    shares = ((1 - t) ** 2 / norm**2, (1 - s) ** 2 / norm_s**2)
    expected = norm_s * STEPS[step](x0, x_t, noise, *map(vp, shares))
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize('num_steps, share', [(4, 1.0), (8, 0.75)])
def test_heuns_method_is_the_better_one_on_the_linear_path(num_steps, share):
  """Its first step begins where noise / signal is in the thousands."""
  x_t = samplers.start_noise(jax.random.key(0), SHAPES, 2)
  errors = {}
  for sampler in ('ddim', 'heun'):
    got = samplers.sample(
      _knows_the_spread(0.3, FLOW),
      x_t,
      FLOW,
      jax.random.key(1),
      num_steps=num_steps,
      sampler=sampler,
      threshold='none',
      parameterization='x0',
    )
    errors[sampler] = max(
      np.abs(level / x - 0.3).max() for level, x in zip(got, x_t, strict=True)
    )
  assert errors['heun'] < share * errors['ddim'], errors


OFFSET = offset_levels(SCHEDULE, 3.0)


@pytest.mark.parametrize(
  'schedule', [FLOW, OFFSET], ids=['linear', 'with an offset']
)
@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_other_schedules_end_at_the_images_that_a_network_knows(
  sampler, schedule
):
  images = _images()

  def network(x_t, t):
    """Knows its images, and the noise of a level by the time it is told."""
    trained = SCHEDULE if schedule is OFFSET else schedule
    assert t.shape == ((2, 2) if schedule is OFFSET else (2,))
    predictions = []
    for level, (x, x0) in enumerate(zip(x_t, images, strict=True)):
      at = trained.at(level, mixed_batch.times(t, level, 2, 1) + 1)
      eps = process.predict_eps(x0, x, at, 'x0')
      predictions.append(process.target(x0, eps, at, 'velocity'))
    return tuple(predictions)

  got = samplers.sample(
    network,
    samplers.start_noise(jax.random.key(0), SHAPES, 2),
    schedule,
    jax.random.key(1),
    num_steps=8,
    sampler=sampler,
    threshold='none',
    parameterization='velocity',
  )
  for level, image in zip(got, images, strict=True):
    np.testing.assert_allclose(level, image, atol=5e-4)


@pytest.mark.parametrize('sampler', ('ddim', 'heun', 'dpm', 'ddpm'))
def test_known_first_frames_stay_and_have_their_noise(sampler):
  rng = np.random.default_rng(9)
  shapes = (4, 4, 3), (4, 8, 8, 3)  # Images inside of clips.
  known = tuple(
    rng.uniform(-0.9, 0.9, (2, *shape)).astype(np.float32)
    for shape in ((4, 4, 3), (2, 8, 8, 3))
  )
  noise = samplers.start_noise(jax.random.key(1), shapes, 2)
  seen = []

  def denoise(x_t, t):
    if not isinstance(x_t[0], jax.core.Tracer):
      seen.append((t, x_t))
    # What is seen of the known frames decides what the others become.
    mean = x_t[1][:, :2].mean(axis=(1, 2, 3, 4), keepdims=True)
    return tuple(
      jnp.broadcast_to(mean.reshape(2, *[1] * (x.ndim - 1)), x.shape)
      for x in x_t
    )

  options = {'sampler': sampler, 'parameterization': 'x0', 'threshold': 'none'}
  rows = list(zip(*samplers.steps(4, SCHEDULE)))
  x_t = x0 = samplers.start_known(noise, known, SCHEDULE, rows[0][2])
  with jax.disable_jit():
    for index, r, t, s in rows:
      step_noise = process.sample_noise(
        jax.random.fold_in(jax.random.key(2), index), noise
      )
      x_t, x0 = samplers.sample_step(
        denoise,
        x_t,
        SCHEDULE,
        t,
        s,
        step_noise,
        (r, x0),
        eta=0.0,
        known=known,
        **options,
      )
  for image, clip in (x_t, x0):
    np.testing.assert_allclose(image, known[0], atol=1e-6)
    np.testing.assert_allclose(clip[:, :2], known[1], atol=1e-6)
    assert np.ptp(clip[:, 2:]) > 1e-3
  assert len(seen) == (7 if sampler == 'heun' else 4)
  for t, (image, clip) in seen if sampler != 'ddpm' else seen[:1]:
    for level, (found, first, eps) in enumerate(
      ((image, known[0], noise[0]), (clip[:, :2], known[1], noise[1][:, :2]))
    ):
      expected = process.add_noise(
        first, eps, SCHEDULE.at(level, t + 1, first.ndim)
      )
      np.testing.assert_allclose(found, expected, atol=2e-5)
  whole = samplers.sample(
    denoise,
    noise,
    SCHEDULE,
    jax.random.key(2),
    num_steps=4,
    known=known,
    **options,
  )
  for level, expected in zip(whole, x_t, strict=True):
    np.testing.assert_allclose(level, np.clip(expected, -1, 1), atol=1e-4)
