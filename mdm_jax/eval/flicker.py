"""How much the pixels of a clip flicker."""

import numpy as np


def flicker(clips: np.ndarray) -> np.ndarray:
  """The mean change of change of a pixel, from frame to frame.

  That is |x[t - 1] - 2 x[t] + x[t + 1]|, which is zero where a pixel stays as
  it is or changes evenly. Motion has some too, so compare it with that of clips
  of the same kind.

  Args:
    clips: uint8 [B, T, H, W, 3].

  Returns:
    float64 [B] in grey levels, 0 for clips of two frames.
  """
  if clips.shape[1] < 3:
    return np.zeros(len(clips))
  x = clips.astype(np.int16)
  second = np.abs(x[:, :-2] - 2 * x[:, 1:-1] + x[:, 2:])
  return second.mean(axis=(1, 2, 3, 4), dtype=np.float64)
