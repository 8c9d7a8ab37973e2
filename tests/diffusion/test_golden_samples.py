"""DDIM and DDPM against the release, with small networks of the release."""

import numpy as np
import pytest

from mdm_jax.diffusion import guidance, samplers
from mdm_jax.diffusion.schedule import make_schedule


def _levels(file, prefix):
  """The arrays `{prefix}_{level}`, coarse to fine."""
  levels = sum(key.startswith('z_') for key in file)
  return tuple(file[f'{prefix}_{level}'] for level in reversed(range(levels)))


def _setting(file, golden_model):
  """The guided network, its schedule and the options of a sampling run."""
  network = golden_model(str(file['model']))
  resolutions = tuple(level.shape[1] for level in _levels(file, 'z'))
  schedule = make_schedule(
    str(file['schedule']), resolutions, float(file['shift_power'])
  )
  # A guided file holds the unconditional half first.
  batch = len(file['z_0'])
  cond = file['cond'][-batch:], file['mask'][-batch:]
  uncond = file['cond'][:batch], file['mask'][:batch]
  denoise = guidance.guided_denoise_fn(
    lambda x_t, t, cond: network(x_t, t, *cond),
    cond,
    uncond,
    float(file['guidance']),
  )
  options = {
    'sampler': str(file['sampler']),
    'eta': float(file['eta']),
    'threshold': str(file['threshold']),
    'parameterization': 'v',
  }
  return denoise, schedule, options


def _assert_close(pyramid, file, prefix):
  for level, expected in zip(pyramid, _levels(file, prefix), strict=True):
    np.testing.assert_allclose(level, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  'name',
  [
    'ddim_eta1_unguided_none',
    'ddim_nested3_power2_w3_clip',
    'ddim_w1.2_dynamic_if',
    'ddim_w3_clip',
    'ddim_w7.5_dynamic_if',
    'ddpm_w2_dynamic',
  ],
)
def test_steps_equal_the_release(golden, golden_model, name):
  file = golden(f'sample_{name}')
  denoise, schedule, options = _setting(file, golden_model)
  num_steps = len(file['timesteps']) - 1
  times = samplers.time_steps(num_steps, schedule)
  np.testing.assert_array_equal(times, file['timesteps'])
  x = _levels(file, 'z')
  for step in range(num_steps):
    noise = None
    if 'noise_0_0' in file:
      noise = _levels(file, f'noise_{step}')
    x, x0 = samplers.sample_step(
      denoise, x, schedule, times[step], times[step + 1], noise, **options
    )
    if step == 0:
      _assert_close(x0, file, 'x0_first')
      _assert_close(x, file, 'x_first')
  _assert_close(x0, file, 'x0_last')
  _assert_close(x, file, 'x_last')
