"""What a request looked like at its sampling steps, small enough to keep."""

from typing import NamedTuple

import numpy as np

MAX_FRAMES = 24  # of a request, spread evenly over its steps
MAX_SIDE = 128  # px of a frame; larger levels are averaged down


class Frame(NamedTuple):
  """A sampling step.

  Attributes:
    step: from 1.
    log_snr: of x_t at each level, [levels].
    x_t: the noisy images that the network was given, uint8 [N, S_r, S_r, 3],
      coarse to fine.
    x0: the images that it predicted from them; at the last step the samples.
  """

  step: int
  log_snr: np.ndarray
  x_t: tuple[np.ndarray, ...]
  x0: tuple[np.ndarray, ...]


def frame_steps(num_steps: int) -> frozenset[int]:
  """The steps to keep, with the first and the last, counted from 1."""
  count = min(num_steps, MAX_FRAMES)
  return frozenset(
    np.linspace(num_steps, 1, count).round().astype(int).tolist()
  )


def shrink(images: np.ndarray, most: int = MAX_SIDE) -> np.ndarray:
  """Averages images [..., H, H, 3] down to a side of at most `most` pixels."""
  factor = -(-images.shape[-2] // most)
  if factor == 1:
    return images
  side = images.shape[-2] // factor
  images = images[..., : side * factor, : side * factor, :]
  return (
    images.reshape(*images.shape[:-3], side, factor, side, factor, 3)
    .mean((-4, -2))
    .astype(np.uint8)
  )
