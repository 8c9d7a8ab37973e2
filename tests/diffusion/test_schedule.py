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


@pytest.mark.parametrize('name', NAMES)
def test_vdm_weights_equal_the_released(golden, name):
  weights = schedules.vdm_weights(schedules.make_gammas(name))
  expected = golden('schedules')[f'{name}_vdm_loss_weights']
  np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


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
  with pytest.raises(ValueError, match="'linear'"):
    schedules.make_gammas('linear')


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


def test_gamma_is_read_per_example_inside_jit():
  schedule = schedules.make_schedule('ddpm', (8, 16), 1.0)
  t = np.array([3, 1000, 0])
  gamma = jax.jit(lambda schedule, t: schedule.gamma(1, t))(schedule, t)
  assert gamma.shape == (3, 1, 1, 1)
  np.testing.assert_array_equal(gamma.ravel(), schedule.gammas[1, t])


def test_log_snr_of_each_level():
  """A level of twice the side has a quarter of the signal-to-noise ratio."""
  made = schedules.make_schedule('cosine', (8, 16), 2.0)
  coarse, fine = made.log_snr(600)
  gamma = float(made.gammas[0, 600])
  assert coarse == pytest.approx(np.log(gamma / (1 - gamma)))
  assert fine == pytest.approx(coarse - np.log(4), abs=1e-4)
