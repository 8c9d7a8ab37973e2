"""What a request looked like at its sampling steps, small enough to keep."""

from typing import NamedTuple

import numpy as np

MAX_FRAMES = 24  # of a request, spread evenly over its steps
MAX_IMAGES = 4  # of a request, its first ones
MAX_SIDE = 64  # px of a frame


class Frame(NamedTuple):
  """A sampling step.

  Attributes:
    step: from 1.
    log_snr: of x_t at each level, [levels].
    x_t: the noisy images that the network was given, uint8 [N, S_r, S_r, 3],
      coarse to fine. Of large ones every so many pixels: averages would show
      less noise than there is.
    x0: the images that it predicted from them; at the last step the samples.
      Large ones are averaged down.
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


def make_frame(
  step: int,
  log_snr: np.ndarray,
  x_t: tuple[np.ndarray, ...],
  x0: tuple[np.ndarray, ...],
) -> Frame:
  """A frame of full images, uint8 [N, H_r, H_r, 3], or of clips' middles."""
  x_t, x0 = (
    [_middle(np.asarray(level)[:MAX_IMAGES]) for level in levels]
    for levels in (x_t, x0)
  )
  factors = [_factor(level, MAX_SIDE) for level in x_t]
  sparse = (level[:, ::k, ::k] for level, k in zip(x_t, factors))
  return Frame(step, log_snr, tuple(sparse), tuple(map(shrink, x0)))


def shrink(images: np.ndarray, most: int = MAX_SIDE) -> np.ndarray:
  """Averages images or clips [N, ..., H, H, 3] down to a side of `most`."""
  factor = _factor(images, most)
  if factor == 1:
    return images
  side = images.shape[-2] // factor
  images = images[..., : side * factor, : side * factor, :]
  return (
    images.reshape(*images.shape[:-3], side, factor, side, factor, 3)
    .mean((-4, -2))
    .astype(np.uint8)
  )


def _middle(level: np.ndarray) -> np.ndarray:
  """Of clips [N, T, H, H, 3] the frames in the middle."""
  return level if level.ndim == 4 else level[:, level.shape[1] // 2]


def _factor(images: np.ndarray, most: int) -> int:
  return -(-images.shape[-2] // most)
