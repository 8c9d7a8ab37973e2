"""Prompt accuracy: whether generated shapes are what their prompts ask for.

Classical image analysis without a network. What a prompt states is known
exactly, so every attribute of an image is either right or wrong. Lengths and
positions are fractions of the image's side; y points down.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import itertools

import numpy as np
from scipy import ndimage

from mdm_jax.eval import estimate
from mdm_jax.eval.estimate import Estimate

# Pixels. Larger images are averaged down to about this, which removes their
# fine texture.
_RESOLUTION = 64
# Pixels that differ by more from the background's colour are foreground, in
# levels of 0..255.
CONTRAST = 30.0
_BLURS = (0.0, 0.08, 0.16, 0.24)  # sigmas, as shares of the radius
_MIN_AREA = 0.008  # of an object, as a share of the image
_MIN_DARKENING = 0.2  # of a pattern, as a share of the brightness
_MIN_CORRELATION = 0.57  # of an object's brightness with a pattern
_GRID = 32  # side in pixels at which silhouettes are compared
_SHIFTS = 8  # phases of a pattern that are tried along each axis
_CENTRE = 0.115  # largest distance from the middle that counts as central
OBJECT_ATTRIBUTES = ('color', 'shape', 'pattern', 'size')
# Of clips alone, see `motion`.
MOTION_ATTRIBUTES = ('motion', 'direction', 'turn', 'new_color', 'speed')
# Keys that `accuracy` may return.
NAMES = ('background', 'count', *OBJECT_ATTRIBUTES, 'position', 'all')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The appearance of each word.

  Attributes:
    colors: of objects, RGB in 0..255.
    backgrounds: colours of the background, RGB in 0..255.
    silhouettes: of shapes, bool [S, S], over the square `± radius`.
    patterns: darkness over one period, [P, P]; zeros for no pattern.
    period: of the patterns, as a fraction of the image's side.
    sizes: typical radii.
  """

  colors: Mapping[str, tuple[int, int, int]]
  backgrounds: Mapping[str, tuple[int, int, int]]
  silhouettes: Mapping[str, np.ndarray]
  patterns: Mapping[str, np.ndarray]
  period: float
  sizes: Mapping[str, float]

  @functools.cached_property
  def templates(self) -> list[tuple[str, np.ndarray]]:
    """Names and silhouettes at several blurs, cropped to `[_GRID, _GRID]`."""
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
  """An object that was found in an image, or in a clip with its motion."""

  shape: str
  color: str
  pattern: str
  size: str
  x: float
  y: float
  radius: float
  motion: str = ''
  direction: str = ''
  turn: str = ''
  new_color: str = ''
  speed: str = ''


def _hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Hue angle in radians and chroma of colours `[..., 3]`."""
  red, green, blue = np.moveaxis(np.asarray(rgb, np.float32), -1, 0)
  angle = np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)
  chroma = np.maximum(np.maximum(red, green), blue)
  return angle, chroma - np.minimum(np.minimum(red, green), blue)


def contrast(image: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
  """How much each pixel differs from the background's colour, [R, R]."""
  image = image.astype(np.float32)
  return np.linalg.norm(image - _background(image, vocabulary)[1], axis=-1)


def _background(image: np.ndarray, vocabulary: Vocabulary):
  """The background's name, and its colour in this image."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  names = list(vocabulary.backgrounds)
  colors = np.array([vocabulary.backgrounds[name] for name in names])
  distance = np.linalg.norm(border[:, None] - colors, axis=-1)
  nearest = distance.argmin(1)
  winner = np.bincount(nearest).argmax()
  return names[winner], np.median(border[nearest == winner], axis=0)


def _sharpen(mask: np.ndarray, contrast: np.ndarray, cut: float) -> np.ndarray:
  """Removes soft edges, which would fill holes and round corners."""
  sharp = mask & (contrast > cut)
  holes, _ = ndimage.label(ndimage.binary_fill_holes(sharp) & ~sharp)
  # A hole that shows no background is a dark dot of the pattern: fill it.
  return sharp | ((holes > 0) & ~np.isin(holes, holes[~mask]))


def _crop(mask: np.ndarray) -> np.ndarray:
  """The mask's bounding box, stretched to float `[_GRID, _GRID]`."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  # Linear interpolation between pixel centres, with a border of one 0 pixel.
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
  """The shape with the largest intersection over union, and its mask.

  Soft edges are cut at half the contrast. Two contrasts are tried, that of the
  pattern's dark part and that of its bright part, because a blurred object may
  have no dark part. The cut that is most like any shape is used.
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
  """The colour whose hue is nearest to most of `pixels` `[N, 3]`.

  Pixels vote with their chroma as the weight.
  """
  names = list(vocabulary.colors)
  hues, _ = _hue(np.array([vocabulary.colors[name] for name in names]))
  angle, chroma = _hue(pixels)
  nearest = np.cos(angle[:, None] - hues).argmax(1)
  return names[np.bincount(nearest, chroma).argmax()]


def _pattern(brightness, weight, rows, columns, vocabulary, resolution) -> str:
  """The pattern that correlates best with the brightness, at any phase.

  Args:
    brightness: of each pixel of the object, `[N]`.
    weight: of each pixel, larger inside the object, `[N]`.
    rows: of the pixels, `[N]`.
    columns: of the pixels, `[N]`.
    vocabulary: holds the patterns.
    resolution: side of the image in pixels.
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
  """Reads the attributes of an object with the given shape and mask.

  Args:
    image: float32 `[R, R, 3]`.
    shape: of the object.
    mask: bool `[R, R]`, True inside the object.
    vocabulary: the appearance of each word.
  """
  resolution = image.shape[0]
  radius = _radius(mask, vocabulary.silhouettes[shape]) / resolution
  rows, columns = np.nonzero(mask)
  depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
  # The outermost pixels also show the background and the outline.
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
  """Finds the background and the objects of an image.

  Args:
    image: uint8 `[R, R, 3]`.
    vocabulary: the appearance of each word.

  Returns:
    The background's name, and the objects, the largest first.

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
  labels, _ = ndimage.label(contrast > CONTRAST, np.ones((3, 3)))
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
  """Whether an object is at a place, such as 'top left' or 'centre'."""

  def is_at(center, before, after):
    want = (after in place) - (before in place)
    return want == (center > 0.5 + _CENTRE) - (center < 0.5 - _CENTRE)

  return is_at(item.x, 'left', 'right') and is_at(item.y, 'top', 'bottom')


def _related(first: Found, relation: str, second: Found) -> bool:
  """Whether the first object is `relation` ('left of', …) the second."""
  right, down = first.x - second.x, first.y - second.y
  if abs(right) > abs(down):
    return relation == ('right of' if right > 0 else 'left of')
  return relation == ('below' if down > 0 else 'above')


def _marks(stated: dict, objects: tuple[Found | None, ...]) -> dict:
  """Marks for one assignment of found objects (or None) to stated ones."""
  attributes = OBJECT_ATTRIBUTES
  if any('motion' in asked for asked in stated['objects']):
    attributes += MOTION_ATTRIBUTES
  marks = {
    attribute: [
      item is not None and getattr(item, attribute) == asked[attribute]
      for asked, item in zip(stated['objects'], objects)
      if attribute in asked
    ]
    for attribute in attributes
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
  """Marks each stated attribute of an image as right or wrong.

  Found objects are assigned to stated objects such that most marks are right.

  Args:
    image: uint8 `[R, R, 3]`.
    stated: `background`; `objects`, a list of dicts with any of `shape`,
      `color`, `pattern` and `size`; optionally `position` (the place of a
      single object) or `relation` (of the first object to the second).
    vocabulary: the appearance of each word.

  Returns:
    For `background`, `count` (whether the number of objects is right),
    `position` (also of a relation) and each of OBJECT_ATTRIBUTES: one mark for
    each time it was stated. All marks of a missing object are False.

  Raises:
    ValueError: if the image is not a square of three channels.
  """
  return compare(*analyze(image, vocabulary), stated)


def is_one_plain_object(stated: dict) -> bool:
  """Whether a prompt states one object and no pattern but 'solid'."""
  objects = stated['objects']
  return len(objects) == 1 and objects[0].get('pattern', 'solid') == 'solid'


def compare(
  background: str, objects: tuple[Found, ...], stated: dict
) -> dict[str, list[bool]]:
  """Marks what `analyze` has found in an image, see `score`."""
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
) -> dict[str, Estimate]:
  """Accuracy (0..1) of each attribute, over every time it was stated.

  Args:
    images: uint8 `[R, R, 3]` each.
    statements: what the prompt of each image states, see `score`.
    vocabulary: the appearance of each word.

  Returns:
    The means of the marks of `score`, and `all`: the share of images in which
    nothing is wrong. Attributes that were never stated are omitted.

  Raises:
    ValueError: if there are not as many images as statements, or an image is
      not a square of three channels.
  """
  return mean_marks(
    score(image, stated, vocabulary)
    for image, stated in zip(images, statements, strict=True)
  )


def mean_marks(marks: Iterable[dict[str, list[bool]]]) -> dict[str, Estimate]:
  """The accuracies that `accuracy` returns, from each image's `score`.

  The count of an accuracy is that of its marks; the marks of an image are not
  independent of each other, which its standard error takes into account.
  """
  groups: dict[str, list[list[bool]]] = {}
  for each in marks:
    each = each | {'all': [all(map(all, each.values()))]}
    for attribute, marked in each.items():
      groups.setdefault(attribute, []).append(marked)
  return {
    name: estimate.of_groups(list(map(sum, each)), list(map(len, each)))
    for name, each in groups.items()
    if any(each)
  }


def group_name(count: int) -> str:
  """How names of accuracies of prompts with so many objects end."""
  return f'{count}_{"object" if count == 1 else "objects"}'


def by_number_of_objects(
  marks: Iterable[dict[str, list[bool]]], statements: Iterable[dict]
) -> dict[str, Estimate]:
  """`mean_marks` of the prompts with one, and of those with two objects.

  Args:
    marks: `score` of each image.
    statements: what the prompt of each image states, see `score`.

  Returns:
    Accuracies by name, such as 'color_1_object' and 'color_2_objects'.
  """
  groups: dict[int, list] = {}
  for each, stated in zip(marks, statements, strict=True):
    groups.setdefault(len(stated['objects']), []).append(each)
  return {
    f'{name}_{group_name(count)}': value
    for count, group in sorted(groups.items())
    for name, value in mean_marks(group).items()
  }
