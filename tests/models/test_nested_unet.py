"""The network against the release's outputs, parameter by parameter."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[1] / 'data' / 'golden'
FORWARD = sorted(path.stem for path in GOLDEN.glob('forward_*.npz'))
# Above the cap of every level, as is what the network takes without a scale.
LARGE = np.float32(2**20)


@pytest.mark.parametrize(
  'name, lanes',
  [
    *((name, 1) for name in FORWARD),
    ('forward_nested2_mixed', 64),
  ],
)
def test_forward_equals_release(name, lanes, golden, golden_model):
  data = golden(name)
  levels = sum(key.startswith('x_t_') for key in data)
  x_t = tuple(data[f'x_t_{i}'] for i in reversed(range(levels)))
  model = golden_model(str(data['model']), lanes)
  scale = data.get('scale')
  # Then one program serves two files. Without one: a UNet, and mixed batches.
  if name.endswith('default') and name != 'forward_unet_default':
    scale = np.full(len(data['t']), LARGE)
  out = model(x_t, data['t'], data['cond'], data['mask'] > 0, scale)
  for i in range(levels):
    expected = data[f'out_{i}']
    actual = np.asarray(out[levels - 1 - i])
    assert actual.shape == expected.shape
    print(name, i, np.abs(actual - expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  'name', ['forward_unet_masked_scale', 'forward_nested2_mixed']
)
def test_forward_in_bfloat16_is_near_the_release(name, golden, golden_model):
  data = golden(name)
  levels = sum(key.startswith('x_t_') for key in data)
  x_t = tuple(data[f'x_t_{i}'] for i in reversed(range(levels)))
  flash = jax.default_backend() == 'gpu'
  model = golden_model(str(data['model']), 1, jnp.bfloat16, flash)
  out = model(x_t, data['t'], data['cond'], data['mask'] > 0, data.get('scale'))
  for i in range(levels):
    expected = data[f'out_{i}']
    error = np.asarray(out[levels - 1 - i], np.float32) - expected
    relative = np.sqrt(np.mean(error**2) / np.mean(expected**2))
    print(name, i, 'bfloat16', relative)
    assert 1e-5 < relative < 0.04


def test_a_pattern_that_repeats(golden, golden_model):
  data = golden('forward_nested3_mixed')
  levels = sum(key.startswith('x_t_') for key in data)
  twice = {
    key: np.concatenate([value, value])
    for key, value in data.items()
    if value.ndim
  }
  x_t = tuple(twice[f'x_t_{i}'] for i in reversed(range(levels)))
  out = golden_model(str(data['model']))(
    x_t, twice['t'], twice['cond'], twice['mask'] > 0, repeats=2
  )
  for i in range(levels):
    np.testing.assert_allclose(
      out[levels - 1 - i], twice[f'out_{i}'], rtol=0, atol=2e-5
    )
