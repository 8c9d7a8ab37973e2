"""Edge width: how blurred the outlines of objects are, in pixels.

Of an object of one colour on a plain background. A patterned or outlined
object is of one colour if all its shades are proportional, as are those of the
shapes: only the share of the background is measured, and shades do not count.
"""

import math

import numpy as np
from scipy import ndimage, optimize, special

# Smoothing that finds the outline to a fraction of a pixel, in pixels. It moves
# straight outlines nowhere, and those of a circle of 10 px by 0.1 px.
_SMOOTHING = 1.5
_REACH = 4.0  # pixels on either side of the outline that are compared
_LARGEST = 12.0  # pixels: the largest width that is told from a wider one
# Least difference of object and background, in levels of 0..255, beside shades.
_CONTRAST = 50.0
_CURVATURE = 1 / 6  # of the outline, at most, so that corners do not count
_MIN_PIXELS = 60  # that an outline has within `_REACH`
_TEN_TO_NINETY = 2 * special.ndtri(0.9)  # 2.563 standard deviations


def step(distance: np.ndarray, sigma: float) -> np.ndarray:
  """An edge, blurred by a Gaussian and averaged over a pixel.

  Args:
    distance: from the edge, in pixels.
    sigma: of the Gaussian, in pixels; above 0.

  Returns:
    From 0 far below to 1 far above the edge.
  """

  def integral(z):  # of the normal distribution function
    return z * special.ndtr(z) + np.exp(-z * z / 2) / math.sqrt(2 * math.pi)

  above, below = (distance + 0.5) / sigma, (distance - 0.5) / sigma
  return sigma * (integral(above) - integral(below))


def width_of(sigma: float) -> float:
  """The 10-to-90 % width of `step` in pixels: 0.8 without a Gaussian."""
  if sigma < 1e-3:
    return 0.8
  most = 0.5 + _TEN_TO_NINETY * sigma
  return 2 * optimize.brentq(lambda d: step(d, sigma) - 0.9, 0, most)


def edge_width(image: np.ndarray) -> float | None:
  """The 10-to-90 % width of the outline of an image's only object, in pixels.

  The object and the background are told apart by their colours; the outline is
  where the share of the background is a half. The result is the width of the
  blurred step that fits best to the shares of all pixels near the outline, by
  their distance from it: many pixels together show the edge at all its
  positions relative to the grid.

  Args:
    image: uint8 `[H, W, 3]`.

  Returns:
    0.8, which is an edge averaged over a pixel, or more; None if it cannot be
    measured: there is no object, or it is too small, or its colour is nearly a
    shade of the background's.
  """
  share = _share(np.asarray(image, np.float64))
  if share is None:
    return None
  distance, share = _near_outline(share)
  if len(distance) < _MIN_PIXELS:
    return None

  def residuals(values):
    sigma, center = values
    # From 0 to 1: with free ends, halos would widen the step.
    return step(distance - center, sigma) - share

  found = optimize.least_squares(
    residuals,
    (0.6, 0.0),
    bounds=((1e-3, -1), (_LARGEST / _TEN_TO_NINETY, 1)),
    # Halos, spots and dents count little.
    loss='soft_l1',
    f_scale=0.1,
  )
  return width_of(found.x[0])


def _share(image: np.ndarray) -> np.ndarray | None:
  """The background's share of each pixel, [H, W]; None without an object."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  background = np.median(border, axis=0)
  contrast = np.linalg.norm(image - background, axis=-1)
  labels, count = ndimage.label(contrast > contrast.max() / 2)
  if not count:
    return None
  largest = np.bincount(labels.flat)[1:].argmax() + 1
  inside = ndimage.binary_erosion(labels == largest, iterations=2)
  if not inside.any():
    return None
  color = np.median(image[inside], axis=0)
  # Orthogonal to the colour: 0 for all its shades.
  direction = background - color * (background @ color) / max(color @ color, 1)
  length = np.linalg.norm(direction)
  if length < _CONTRAST:
    return None
  return image @ (direction / length) / (background @ (direction / length))


def _near_outline(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Signed distances of pixels from the outline, and their shares, both [N].

  Distances are to the nearest point at which the smoothed share is a half,
  which Newton's method finds from each pixel along the gradient.
  """
  smooth = ndimage.gaussian_filter(share, _SMOOTHING, mode='nearest')
  gradient = np.stack(np.gradient(smooth))
  slope = np.maximum(np.linalg.norm(gradient, axis=0), 1e-9)
  normal = gradient / slope
  curvature = np.abs(sum(np.gradient(normal[i], axis=i) for i in range(2)))
  rows, columns = np.nonzero(
    ndimage.distance_transform_edt(smooth > 0.5) <= _REACH
  )
  keep = ndimage.distance_transform_edt(smooth <= 0.5) <= _REACH
  keep = keep[rows, columns]
  start = np.stack([rows[keep], columns[keep]]).astype(np.float64)

  def at(field, places):
    return ndimage.map_coordinates(field, places, order=1, mode='nearest')

  spline = ndimage.spline_filter(smooth, order=3, mode='mirror')

  def value(places):
    return ndimage.map_coordinates(
      spline, places, order=3, mode='mirror', prefilter=False
    )

  foot = start.copy()
  for _ in range(8):
    towards = np.stack([at(part, foot) for part in gradient])
    steep = np.maximum((towards**2).sum(0), 1e-4)
    move = (0.5 - value(foot)) / steep * towards
    foot += move / np.maximum(np.linalg.norm(move, axis=0), 1)
  towards = np.stack([at(part, foot) for part in normal])
  offset = start - foot
  distance = (offset * towards).sum(0)
  aside = np.linalg.norm(offset - distance * towards, axis=0)
  height, width = share.shape
  inner = (foot >= 2).all(0) & (foot[0] <= height - 3) & (foot[1] <= width - 3)
  is_good = (
    inner
    & (np.abs(value(foot) - 0.5) < 0.02)
    & (at(curvature, foot) < _CURVATURE)
    & (aside < 0.5)
    & (np.abs(distance) <= _REACH)
  )
  i, j = start.astype(int)
  return distance[is_good], share[i, j][is_good]
