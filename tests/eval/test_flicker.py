"""Pixels that flicker are told from those that change evenly."""

import numpy as np

from mdm_jax.eval.flicker import flicker


def test_only_uneven_changes_count():
  clips = np.zeros((4, 5, 2, 2, 3), np.uint8)
  clips[1] += 40 * np.arange(5, dtype=np.uint8)[:, None, None, None]
  clips[2, 1::2] = 255
  clips[3, 2, 0, 0, 0] = 30  # Of 12 values, in one frame.
  np.testing.assert_allclose(
    flicker(clips), [0, 0, 510, (30 + 60 + 30) / 3 / 12]
  )
  assert flicker(clips[:, :2]).tolist() == [0, 0, 0, 0]
