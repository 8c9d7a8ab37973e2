"""Preprocessing and weights of Inception; `test_features` checks features."""

import pathlib

import numpy as np
import pytest

from mdm_jax.eval import inception

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'eval'


def test_resize_equals_pytorch():
  """One side grows; the other shrinks, without antialiasing as in pytorch."""
  rng = np.random.default_rng(0)
  rng.integers(0, 256, (2, 4, 5, 3), np.uint8)
  images = rng.integers(0, 256, (1, 320, 24, 3), np.uint8)
  resized = inception.preprocess(images)
  assert resized.shape == (1, 299, 299, 3)
  with np.load(DATA / 'inception.npz') as golden:
    np.testing.assert_allclose(
      (resized[:, ::23, ::23] + 1) / 2, golden['resized'], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
  'change, message',
  [
    # The number of classes of torchvision's network.
    (
      {'fc.weight': np.zeros((1000, 2048))},
      r'another network: fc.weight is \(1000, 2048\), not \(1008, 2048\)',
    ),
    ({'AuxLogits.fc.bias': np.zeros(1000)}, 'AuxLogits.fc.bias is unexpected'),
    (
      {'Mixed_7c.branch_pool.conv.weight': None},
      'Mixed_7c.branch_pool.conv.weight is missing: give pt_inception',
    ),
  ],
)
def test_other_networks_are_refused(inception_weights, change, message):
  weights = {
    name: value
    for name, value in (inception_weights | change).items()
    if value is not None
  }
  with pytest.raises(ValueError, match=message):
    inception.from_state_dict(weights)


def test_problems_are_counted(inception_weights):
  weights = {
    name: value
    for name, value in inception_weights.items()
    if not name.startswith('Mixed_7c')
  }
  with pytest.raises(ValueError, match='and 40 more: give'):
    inception.from_state_dict(weights)


def test_counters_are_ignored(inception_weights):
  """PyTorch saves a counter with each batch norm."""
  inception.from_state_dict(
    inception_weights
    | {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.zeros((), np.int64)}
  )
