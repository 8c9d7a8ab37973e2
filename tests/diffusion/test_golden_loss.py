"""The loss against that of the release, with small networks of the release."""

import numpy as np
import pytest

from mdm_jax import mixed_batch
from mdm_jax.diffusion import loss, process
from mdm_jax.diffusion import pyramid as pyramids
from mdm_jax.diffusion.schedule import make_schedule


def _coarse_to_fine(ratio, levels):
  """Converts the release's '16:4:1', fine to coarse, to (1, 4, 16)."""
  if not ratio:
    return (1.0,) * levels
  return tuple(float(share) for share in ratio.split(':')[::-1])


@pytest.mark.parametrize(
  'name',
  [
    'nested2_mixed2to1',
    'nested3_mixed2_1_1',
    'nested3_weights16_4_1_power2',
  ],
)
def test_loss_equals_the_release(golden, golden_model, name):
  file = golden(f'loss_{name}')
  levels = sum(key.startswith('eps_') for key in file)
  resolutions = tuple(
    file[f'eps_{level}'].shape[1] for level in reversed(range(levels))
  )
  fractions = (1.0,) * levels
  if mixed_ratio := str(file['mixed_ratio']):
    ratio = _coarse_to_fine(mixed_ratio, levels)
    fractions = mixed_batch.batch_fractions(ratio)
  shapes = [(side, side, 3) for side in resolutions]
  pyramid = pyramids.make_pyramid(file['images'], shapes, fractions)
  eps = tuple(
    file[f'eps_{levels - 1 - level}'][: len(images)]
    for level, images in enumerate(pyramid)
  )
  schedule = make_schedule(
    str(file['schedule']), resolutions, float(file['shift_power'])
  )
  network = golden_model(str(file['model']))
  seen = {}

  def denoise(x_t, t):
    seen['x_t'] = x_t
    seen['prediction'] = network(x_t, t, file['cond'], file['mask'])
    return seen['prediction']

  losses, _ = loss.multi_resolution_loss(
    denoise,
    schedule,
    pyramid,
    file['t'],
    eps,
    weights=_coarse_to_fine(str(file['level_weights']), levels),
  )

  x_t = seen['x_t'][-1]
  size = len(x_t)
  at = loss.training_coefficients(schedule, pyramid, file['t'])[-1]
  pred_eps = process.predict_eps(seen['prediction'][-1], x_t, at, 'v')
  np.testing.assert_allclose(x_t, file['x_t_0'][:size], atol=1e-6)
  # The release goes through x0, which magnifies its rounding of numbers
  # around 2 by 1 / noise: to 2e-5 at time index 0.
  rounding = 2 * np.finfo(np.float32).eps / at.noise
  difference = np.abs(pred_eps - file['pred_eps_0'][:size])
  assert np.all(difference < 1e-5 + rounding)
  # Almost pure noise is easy: time index 999 has a loss of about 1e-9.
  np.testing.assert_allclose(
    losses, file['loss_per_example'], rtol=1e-5, atol=1e-12
  )
