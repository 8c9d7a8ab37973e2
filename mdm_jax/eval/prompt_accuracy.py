"""Marks generated pictures of shapes against what their prompts asked for.

Plain image analysis, no network: what was asked is known exactly, so every
attribute of a picture is either right or wrong. Lengths and positions are
fractions of the image's side, y pointing down.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import itertools

import numpy as np
from scipy import ndimage

# Finer pictures are averaged down to about this: their texture is no shape.
_RESOLUTION = 64
_CONTRAST = 30.0  # of 255: farther from the background is foreground
_BLURS = (0.0, 0.08, 0.16, 0.24)  # of a silhouette's radius
_MIN_AREA = 0.008  # of the image: less is a speck
_MIN_DARKENING = 0.2  # of the brightness: less is no pattern
_MIN_CORRELATION = 0.57  # with a pattern's tile: less is chance
_GRID = 32  # silhouettes are compared at this many pixels a side
_SHIFTS = 8  # a pattern's phases tried, per axis
_CENTRE = 0.115  # a place this close to the middle is called central
OBJECT_ATTRIBUTES = ('color', 'shape', 'pattern', 'size')
# What `accuracy` may return.
NAMES = ('background', 'count', *OBJECT_ATTRIBUTES, 'position', 'all')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What the words look like."""

  colors: Mapping[str, tuple[int, int, int]]
  backgrounds: Mapping[str, tuple[int, int, int]]
  silhouettes: Mapping[str, np.ndarray]  # bool [S, S], over ± the radius
  patterns: Mapping[str, np.ndarray]  # darkness [P, P] of a period, or 0
  period: float  # of the patterns
  sizes: Mapping[str, float]  # typical radii

  @functools.cached_property
  def templates(self) -> list[tuple[str, np.ndarray]]:
    """Names and silhouettes, sharp and blurred, cropped to `[_GRID, _GRID]`."""
    templates = []
    for name, silhouette in self.silhouettes.items():
      side = silhouette.shape[0]
      padded = np.pad(silhouette.astype(np.float32), side // 2)
      for blur in _BLURS:
        blurred = ndimage.gaussian_filter(padded, blur * side / 2)
        templates.append((name, _crop(blurred > 0.5)))
    return templates


@dataclasses.dataclass(frozen=True)
class Found:
  """An object that was seen in a picture."""

  shape: str
  color: str
  pattern: str
  size: str
  x: float
  y: float
  radius: float


def _hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Hue angle in radians and chroma of `[..., 3]`."""
  red, green, blue = np.moveaxis(np.asarray(rgb, np.float32), -1, 0)
  angle = np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)
  chroma = np.maximum(np.maximum(red, green), blue)
  return angle, chroma - np.minimum(np.minimum(red, green), blue)


def _background(image: np.ndarray, vocabulary: Vocabulary):
  """The background's name, and its colour in this picture."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  names = list(vocabulary.backgrounds)
  colors = np.array([vocabulary.backgrounds[name] for name in names])
  distance = np.linalg.norm(border[:, None] - colors, axis=-1)
  nearest = distance.argmin(1)
  winner = np.bincount(nearest).argmax()
  return names[winner], np.median(border[nearest == winner], axis=0)


def _sharpen(mask: np.ndarray, contrast: np.ndarray, cut: float) -> np.ndarray:
  """Cuts soft edges off, or they would fill holes and corners."""
  sharp = mask & (contrast > cut)
  holes, _ = ndimage.label(ndimage.binary_fill_holes(sharp) & ~sharp)
  # Where no background shows through, it is a dark dot and no hole.
  return sharp | ((holes > 0) & ~np.isin(holes, holes[~mask]))


def _crop(mask: np.ndarray) -> np.ndarray:
  """The mask's bounding box, stretched to float `[_GRID, _GRID]`."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  # Linear interpolation between pixel centres, a blank pixel all round.
  axes = [
    (np.arange(_GRID) + 0.5) * ((i[-1] - i[0] + 1) / _GRID) - 0.5 + i[0] + 1
    for i in (rows, columns)
  ]
  padded = np.pad(mask.astype(np.float32), 1)
  grid = np.meshgrid(*axes, indexing='ij')
  return ndimage.map_coordinates(padded, grid, order=1)


def _shape(
  mask: np.ndarray, contrast: np.ndarray, vocabulary: Vocabulary
) -> tuple[str, np.ndarray]:
  """The silhouette with the largest intersection over union, and the mask.

  Soft edges are cut off halfway: between the background and a pattern's dark
  part, and between it and the bright part, as a blurred object has no dark
  one. What looks most like any shape decides.
  """
  best, best_overlap = None, -1.0
  for typical in np.percentile(contrast[mask], (40, 90)):
    sharp = _sharpen(mask, contrast, 0.5 * typical)
    found = _crop(sharp)
    for name, template in vocabulary.templates:
      overlap = (
        np.minimum(found, template).sum() / np.maximum(found, template).sum()
      )
      if overlap > best_overlap:
        best, best_overlap = (name, sharp), overlap
  return best


def _radius(mask: np.ndarray, silhouette: np.ndarray) -> float:
  """Half the side of the square that a shape fills, in pixels."""
  ratios = [
    np.count_nonzero(mask.any(axis)) / np.count_nonzero(silhouette.any(axis))
    for axis in (0, 1)
  ]
  return float(np.mean(ratios)) * silhouette.shape[0] / 2


def _color(pixels: np.ndarray, vocabulary: Vocabulary) -> str:
  """The hue with most votes of `pixels` `[N, 3]`, weighted by chroma."""
  names = list(vocabulary.colors)
  hues, _ = _hue(np.array([vocabulary.colors[name] for name in names]))
  angle, chroma = _hue(pixels)
  nearest = np.cos(angle[:, None] - hues).argmax(1)
  return names[np.bincount(nearest, chroma).argmax()]


def _pattern(brightness, weight, rows, columns, vocabulary, resolution) -> str:
  """The pattern that, at its best phase, explains most of the brightness.

  Args:
    brightness: of each pixel `[N]`.
    weight: how far it is inside the object `[N]`.
    rows: the pixel's row `[N]`.
    columns: its column `[N]`.
    vocabulary: gives the patterns.
    resolution: the image's side.
  """
  weight = weight / weight.sum()
  centered = brightness - (weight * brightness).sum()
  variance = (weight * centered**2).sum()
  best, best_correlation, plain = None, _MIN_CORRELATION, None
  for name, tile in vocabulary.patterns.items():
    if np.ptp(tile) == 0:
      plain = name
      continue
    side = tile.shape[0]
    pixel = side / (vocabulary.period * resolution)
    tile = ndimage.uniform_filter(tile, max(round(pixel), 1), mode='wrap')
    shifts = np.arange(_SHIFTS) * (side / _SHIFTS)
    at_rows = (shifts[:, None] + rows * pixel).astype(int) % side
    at_columns = (shifts[:, None] + columns * pixel).astype(int) % side
    dark = tile[at_rows[:, None], at_columns[None]]
    dark = dark - (dark * weight).sum(-1, keepdims=True)
    covariance = -(dark * weight * centered).sum(-1)
    spread = (dark**2 * weight).sum(-1) + 1e-6
    correlation = np.maximum(covariance, 0) / np.sqrt(spread * variance + 1e-6)
    phase = correlation.argmax()
    darkening = covariance.flat[phase] / spread.flat[phase] / brightness.mean()
    if (
      correlation.flat[phase] > best_correlation and darkening > _MIN_DARKENING
    ):
      best, best_correlation = name, correlation.flat[phase]
  return best or plain


def _found(image, shape, mask, vocabulary) -> Found:
  """Reads one object's attributes; `mask` bool `[R, R]` is its silhouette."""
  resolution = image.shape[0]
  radius = _radius(mask, vocabulary.silhouettes[shape]) / resolution
  rows, columns = np.nonzero(mask)
  depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
  # The outermost pixels are mixed with the background and the outline.
  weight = np.clip(depth[mask] - 1, 0.01, 1)
  pixels = image[mask]
  return Found(
    shape=shape,
    color=_color(pixels[weight >= min(weight.max(), 0.4)], vocabulary),
    pattern=_pattern(
      pixels.max(-1), weight, rows, columns, vocabulary, resolution
    ),
    size=min(
      vocabulary.sizes,
      key=lambda name: abs(vocabulary.sizes[name] - radius),
    ),
    x=float(columns.min() + columns.max() + 1) / (2 * resolution),
    y=float(rows.min() + rows.max() + 1) / (2 * resolution),
    radius=radius,
  )


def analyze(
  image: np.ndarray, vocabulary: Vocabulary
) -> tuple[str, tuple[Found, ...]]:
  """Reads a picture: its background, and its objects, the largest first.

  Args:
    image: uint8 `[R, R, 3]`.
    vocabulary: what there is to be found.

  Raises:
    ValueError: if the image is not a square of three channels.
  """
  if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
    raise ValueError(f'image of shape {image.shape}: must be [R, R, 3]')
  image = image.astype(np.float32)
  factor = max(image.shape[0] // _RESOLUTION, 1)
  side = image.shape[0] // factor
  image = image[: side * factor, : side * factor]
  image = image.reshape(side, factor, side, factor, 3).mean((1, 3))

  background, color = _background(image, vocabulary)
  contrast = np.linalg.norm(image - color, axis=-1)
  labels, _ = ndimage.label(contrast > _CONTRAST, np.ones((3, 3)))
  objects = []
  areas = np.bincount(labels.flat)[1:]
  for label in np.argsort(-areas) + 1:
    if areas[label - 1] < _MIN_AREA * side * side:
      break
    shape, mask = _shape(labels == label, contrast, vocabulary)
    if np.count_nonzero(mask) >= _MIN_AREA * side * side:
      objects.append(_found(image, shape, mask, vocabulary))
  return background, tuple(objects)


def _at(place: str, item: Found) -> bool:
  """Whether an object is at one of nine places, 'top left' or 'centre', say."""

  def third(center, before, after):
    want = (after in place) - (before in place)
    return want == (center > 0.5 + _CENTRE) - (center < 0.5 - _CENTRE)

  return third(item.x, 'left', 'right') and third(item.y, 'top', 'bottom')


def _related(first: Found, relation: str, second: Found) -> bool:
  right, down = first.x - second.x, first.y - second.y
  if abs(right) > abs(down):
    return relation == ('right of' if right > 0 else 'left of')
  return relation == ('below' if down > 0 else 'above')


def _marks(stated: dict, objects: tuple[Found | None, ...]) -> dict:
  """Marks for one assignment of what was found to what was asked."""
  marks = {
    attribute: [
      item is not None and getattr(item, attribute) == asked[attribute]
      for asked, item in zip(stated['objects'], objects)
      if attribute in asked
    ]
    for attribute in OBJECT_ATTRIBUTES
  }
  marks['position'] = []
  if 'position' in stated:
    (item,) = objects
    marks['position'] = [item is not None and _at(stated['position'], item)]
  elif 'relation' in stated:
    first, second = objects
    marks['position'] = [
      None not in objects and _related(first, stated['relation'], second)
    ]
  return marks


def score(
  image: np.ndarray, stated: dict, vocabulary: Vocabulary
) -> dict[str, list[bool]]:
  """Marks a picture; found objects are assigned to the asked ones at best.

  Args:
    image: uint8 `[R, R, 3]`.
    stated: `background`; `objects`, a list of dicts with any of `shape`,
      `color`, `pattern`, `size`; `position` (a place of a single object) or
      `relation` (what the first of two is to the second), if any.
    vocabulary: what there is to be found.

  Returns:
    For `background`, `count` (as many objects as asked for), `position` and
    each of OBJECT_ATTRIBUTES: one mark for each time it was stated. All of a
    missing object's marks are False.
  """
  background, objects = analyze(image, vocabulary)
  count = len(stated['objects'])
  candidates = (*objects, *[None] * count)
  marks = max(
    (
      _marks(stated, assigned)
      for assigned in itertools.permutations(candidates, count)
    ),
    key=lambda marks: sum(map(sum, marks.values())),
  )
  return {
    'background': [background == stated['background']],
    'count': [len(objects) == count],
    **marks,
  }


def accuracy(
  images: Iterable[np.ndarray],
  statements: Iterable[dict],
  vocabulary: Vocabulary,
) -> dict[str, float]:
  """Mean marks (0..1) of each attribute, over every time it was stated.

  Args:
    images: uint8 `[R, R, 3]` each.
    statements: what each image's prompt stated, see `score`.
    vocabulary: what there is to be found.

  Returns:
    The means of `score`'s marks, and `all`: the share of images in which
    nothing was wrong. What was never stated is left out.

  Raises:
    ValueError: if there are not as many images as statements.
  """
  return mean_marks(
    score(image, stated, vocabulary)
    for image, stated in zip(images, statements, strict=True)
  )


def mean_marks(marks: Iterable[dict[str, list[bool]]]) -> dict[str, float]:
  """What `accuracy` returns, of the images' marks as `score` gives them."""
  totals: dict[str, list[bool]] = {}
  for each in marks:
    each = each | {'all': [all(map(all, each.values()))]}
    for attribute, marked in each.items():
      totals.setdefault(attribute, []).extend(marked)
  return {name: float(np.mean(each)) for name, each in totals.items() if each}
