"""The nearest image is found, and how far it is."""

import numpy as np
import pytest

from mdm_jax.eval import nearest as nearest_module
from mdm_jax.eval.nearest import nearest


def test_equals_all_differences(monkeypatch):
  monkeypatch.setattr(nearest_module, '_BLOCK', 3)
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
  y = rng.integers(0, 256, (8, 4, 4, 3), np.uint8)
  y[6], y[4] = x[2], x[3]
  index, distance = nearest(x, y)
  differences = x[:, None].astype(float) - y[None]
  expected = np.sqrt(np.square(differences).mean((2, 3, 4)))
  np.testing.assert_array_equal(index, expected.argmin(1))
  np.testing.assert_allclose(distance, expected.min(1), rtol=1e-6)
  assert index[2] == 6 and distance[2] == 0 == distance[3]


def test_other_shapes_are_refused():
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(0, 3\)'):
    nearest(np.zeros((2, 3)), np.zeros((0, 3)))
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(2, 4\)'):
    nearest(np.zeros((2, 3)), np.zeros((2, 4)))
