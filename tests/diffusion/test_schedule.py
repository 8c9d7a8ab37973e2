import jax
import numpy as np
import pytest

from mdm_jax.diffusion import schedule as schedules

NAMES = ('deepfloyd', 'ddpm', 'cosine')


@pytest.mark.parametrize('name', NAMES)
def test_gammas_equal_the_released(golden, name):
  gammas = schedules.make_gammas(name)
  assert gammas.dtype == np.float32
  assert gammas.shape == (1001,)
  np.testing.assert_array_equal(gammas, golden('schedules')[f'{name}_gammas'])


@pytest.mark.parametrize('power', (1, 2))
@pytest.mark.parametrize('scale', (4, 16))
def test_shift_equals_the_released(golden, scale, power):
  shifted = schedules.shift_gammas(
    golden('schedules')['deepfloyd_gammas'], scale, power
  )
  np.testing.assert_array_equal(
    shifted, golden('schedules')[f'deepfloyd_shift_scale{scale}_power{power}']
  )


@pytest.mark.parametrize('name', NAMES)
def test_gammas_fall_from_one(name):
  gammas = schedules.make_gammas(name, 100)
  assert gammas[0] == 1
  assert np.all(np.diff(gammas) < 0)
  assert gammas[-1] > 0


def test_an_unknown_schedule_is_named():
  with pytest.raises(ValueError, match="'quadratic'"):
    schedules.make_gammas('quadratic')


def test_schedule_shifts_all_but_the_smallest_level():
  schedule = schedules.make_schedule('deepfloyd', (64, 256, 1024), 2.0)
  gammas = schedules.make_gammas('deepfloyd')
  assert schedule.num_steps == 1000
  assert schedule.gammas.dtype == np.float32
  np.testing.assert_array_equal(schedule.gammas[0], gammas)
  snr = schedule.gammas[:, 500].astype(float)
  snr /= 1 - snr
  np.testing.assert_allclose(snr[0] / snr, [1, 16, 256], rtol=1e-5)
  assert np.all(schedule.gammas[:, 0] == 1)


def test_signal_and_noise_are_read_per_example_inside_jit():
  schedule = schedules.make_schedule('ddpm', (8, 16), 1.0)
  t = np.array([3, 1000, 0])
  at = jax.jit(lambda t: schedule.at(1, t))(t)
  gamma = schedule.gammas[1, t]
  for found, expected in ((at.signal, gamma), (at.noise, 1 - gamma)):
    assert found.shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(found.ravel(), np.sqrt(expected))


@pytest.mark.parametrize('power', (0.0, 1.0, 2.0))
def test_the_linear_path_in_float64(power):
  """Times are shifted as in SD3: t' = c t / (1 + (c - 1) t), c^2 = m / n."""
  schedule = schedules.make_schedule('linear', (16, 64), power, 500)
  assert schedule.is_linear and schedule.num_steps == 500
  t = (np.arange(1, 501) - 0.5) / 500
  for level, scale in enumerate((1, 4)):
    c = np.sqrt(scale**power)
    shifted = c * t / (1 + (c - 1) * t)
    signals, noises = (table[level] for table in schedule.coefficients)
    assert signals[0] == 1 and noises[0] == 0
    assert signals.dtype == noises.dtype == np.float32
    np.testing.assert_allclose(noises[1:], shifted, rtol=1e-6)
    np.testing.assert_allclose(signals[1:], 1 - shifted, rtol=1e-6)
    np.testing.assert_allclose(
      schedule.log_snr(250)[level],
      2 * np.log((1 - shifted[249]) / shifted[249]),
      atol=1e-9,
    )


@pytest.mark.parametrize('name', (*NAMES, 'linear'))
def test_an_offset_moves_the_rows_of_finer_levels(name):
  plain, same, moved = (
    schedules.make_schedule(name, (8, 16, 32), 1.0, level_offset=offset)
    for offset in (0.0, 0.0, 1.5)
  )
  assert same.gammas.tobytes() == plain.gammas.tobytes()
  assert moved.gammas[0].tobytes() == plain.gammas[0].tobytes()
  steps = np.arange(100, 1001)
  np.testing.assert_allclose(
    plain.log_snr(steps) - moved.log_snr(steps),
    np.outer([0, 1.5, 3], np.ones(901)),
    atol=2e-3,
  )
  assert np.all(moved.gammas[:, 0] == 1)


def test_an_offset_in_sampling_reads_the_rows_of_training():
  schedule = schedules.make_schedule('deepfloyd', (8, 16), 1.0)
  moved = schedules.offset_levels(schedule, 2.0)
  assert moved.times.shape == (2, 1001) and moved.times.dtype == np.int32
  np.testing.assert_array_equal(moved.times[0], np.arange(1001))
  assert np.all(np.diff(moved.times[1]) >= 0)
  assert moved.times[1, 0] == 0 and moved.times[1, -1] == 1000
  np.testing.assert_array_equal(
    moved.gammas[1], schedule.gammas[1][moved.times[1]]
  )
  steps = np.arange(10, 950)
  np.testing.assert_allclose(
    schedule.log_snr(steps)[1] - moved.log_snr(steps)[1], 2, atol=0.06
  )


@pytest.mark.parametrize('name', (*NAMES, 'linear'))
def test_the_reference_is_the_level_without_a_shift(name):
  whole = schedules.make_schedule(name, (8, 16, 32), 1.5)
  part = schedules.make_schedule(name, (16, 32), 1.5, reference_resolution=8)
  assert part.gammas.tobytes() == whole.gammas[1:].tobytes()
  same = schedules.make_schedule(name, (8, 16, 32), 1.5, reference_resolution=8)
  assert same.gammas.tobytes() == whole.gammas.tobytes()


def test_log_snr_of_each_level():
  """A level of twice the side has a quarter of the signal-to-noise ratio."""
  made = schedules.make_schedule('cosine', (8, 16), 2.0)
  coarse, fine = made.log_snr(600)
  gamma = float(made.gammas[0, 600])
  assert coarse == pytest.approx(np.log(gamma / (1 - gamma)))
  assert fine == pytest.approx(coarse - np.log(4), abs=1e-4)
