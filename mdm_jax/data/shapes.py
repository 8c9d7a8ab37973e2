"""Captioned shapes: an endless procedural data set.

A scene is one or two coloured, patterned shapes on a plain background. It is
a pure function of (seed, split, index), and can be drawn at any resolution.
Its caption states its attributes, so that the prompt accuracy of generated
images can be measured. Lengths and positions are fractions of the image's
side; y points down.
"""

import dataclasses
import itertools

import numpy as np

COLORS = {
  'red': (225, 30, 35),
  'orange': (250, 135, 15),
  'yellow': (250, 225, 40),
  'green': (40, 170, 50),
  'cyan': (60, 210, 255),
  'blue': (45, 100, 255),
  'purple': (150, 50, 215),
  'pink': (255, 120, 190),
}
# Neither 0 nor 255, so that the grain can make pixels darker and brighter.
BACKGROUNDS = {
  'white': (246, 246, 246),
  'grey': (128, 128, 128),
  'black': (10, 10, 10),
  'beige': (232, 216, 182),
  'navy': (10, 12, 54),
  'teal': (10, 135, 105),
}
SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
PATTERNS = ('solid', 'striped', 'dotted', 'checked')
SIZES = {'small': (0.17, 0.19), 'large': (0.26, 0.30)}
PLACES = (
    'top left', 'top', 'top right',
    'left', 'centre', 'right',
    'bottom left', 'bottom', 'bottom right',
)  # fmt: skip
INVERSE = {
  'left of': 'right of',
  'right of': 'left of',
  'above': 'below',
  'below': 'above',
}
TEMPLATES = (
  '{subject}, on {ground}',
  '{subject} on a {ground} background',
  '{subject}, {ground} background',
  '{subject} against a {ground} background',
  'on a {ground} background, {subject}',
  'on {ground}, {subject}',
  'a picture of {subject}, on {ground}',
  'a drawing of {subject} on a {ground} background',
)
SPLITS = ('train', 'validation', 'held_out')
# Raised with whatever changes a scene, its caption or its image: runs of
# another version are not continued, nor features of it read from a cache.
VERSION = '1'

# (shape, color) pairs that never occur on a background in training. Every pair
# is held out on one background only. Otherwise colours would predict shapes,
# and a network could assign the colours of two objects without their order in
# the caption.
HELD_OUT = {
  background: tuple(
    (shape, color)
    for i, shape in enumerate(SHAPES)
    for j, color in enumerate(COLORS)
    if (i + j) % len(BACKGROUNDS) == k
  )
  for k, background in enumerate(BACKGROUNDS)
}
SEEN = {
  background: tuple(
    pair for pair in itertools.product(SHAPES, COLORS) if pair not in missed
  )
  for background, missed in HELD_OUT.items()
}

TWO_OBJECTS = 0.25  # of the scenes, where no other share is asked for
PERIOD = 0.1  # of the patterns, a fraction of the image's side
DARK = 0.42  # the second colour's brightness, relative to the first
_OUTLINE = 0.01
_DOT_RADIUS = 0.3 * PERIOD
_HATCH_PERIOD = 1 / 96
_HATCH = 0.14  # amplitude relative to the object's brightness
_GRAIN_PERIOD = 1 / 80
_GRAIN = 8.0  # amplitude in levels of 0..255
MARGIN = 0.02
_GAP = 0.06


@dataclasses.dataclass(frozen=True)
class Object:
  """One shape, inside the square `x ± radius`, `y ± radius`.

  Attributes:
    shape: one of SHAPES.
    color: one of COLORS.
    pattern: one of PATTERNS.
    size: one of SIZES.
    x, y: of its centre.
    radius: half the side of its square.
    angle: radians that it is turned clockwise.
    blend: another colour, and its share from 0 to 1.
  """

  shape: str
  color: str
  pattern: str
  size: str
  x: float
  y: float
  radius: float
  angle: float = 0.0
  blend: tuple[str, float] = ('', 0.0)


@dataclasses.dataclass(frozen=True)
class Scene:
  """One or two objects on a background.

  Attributes:
    objects: one or two.
    background: one of BACKGROUNDS.
    layout: of one object, its place (one of PLACES); of two, the relation of
      the first to the second ('left of' or 'above').
  """

  objects: tuple[Object, ...]
  background: str
  layout: str


def _wave(t):
  """Signed distance to the dark half of each period; it is bright around 0."""
  t = t / PERIOD
  return (np.abs(t - np.floor(t) - 0.5) - 0.25) * PERIOD


def pattern_distance(pattern: str, x, y):
  """Signed distance to the dark part of a pattern, and its share of the area.

  Args:
    pattern: 'striped', 'dotted' or 'checked'.
    x: offsets of the columns from the object's centre, `[1, W]`.
    y: offsets of the rows from the object's centre, `[H, 1]`.
  """
  if pattern == 'striped':
    return _wave(y), 0.5
  if pattern == 'dotted':
    x = x - PERIOD * np.round(x / PERIOD)
    y = y - PERIOD * np.round(y / PERIOD)
    share = np.pi * (_DOT_RADIUS / PERIOD) ** 2
    return np.sqrt(x * x + y * y) - _DOT_RADIUS, share
  x, y = _wave(x), _wave(y)
  nearer = np.minimum(np.abs(x), np.abs(y))
  return np.where((x < 0) == (y < 0), nearer, -nearer), 0.5


def shape_distance(shape: str, x, y, radius: float):
  """Signed distance to a shape's edge `[H, W]`, negative inside.

  Args:
    shape: one of SHAPES.
    x: offsets of the columns from the shape's centre, `[1, W]`.
    y: offsets of the rows from the shape's centre, `[H, 1]`.
    radius: half the side of the square that the shape fills.
  """
  if shape == 'circle':
    return np.sqrt(x * x + y * y) - radius
  if shape == 'ring':
    rho = np.sqrt(x * x + y * y)
    return np.abs(rho - 0.76 * radius) - 0.24 * radius
  if shape == 'square':
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
  if shape == 'cross':
    x, y = np.abs(x), np.abs(y)
    long, short = np.maximum(x, y), np.minimum(x, y)
    return np.maximum(long - 0.97 * radius, short - 0.33 * radius)
  if shape == 'triangle':
    half_height = 0.75**0.5 * radius
    slope = 0.75**0.5 * np.abs(x) - 0.5 * (y + half_height)
    return np.maximum(slope, y - half_height)
  # A star has ten equal edges, each from an outer to an inner corner.
  y = y - 0.1 * radius
  rho, angle = np.sqrt(x * x + y * y), np.arctan2(x, -y)
  fifth = np.float32(2 * np.pi / 5)
  angle = np.abs(angle - fifth * np.round(angle / fifth))
  outer, inner = 1.05 * radius, 0.5 * radius
  edge_x = inner * np.cos(np.pi / 5) - outer
  edge_y = inner * np.sin(np.pi / 5)
  norm = np.hypot(edge_x, edge_y)
  along, across = rho * np.cos(angle) - outer, rho * np.sin(angle)
  return along * (edge_y / norm) - across * (edge_x / norm)


def _coverage(distance, resolution: int):
  """The share of each pixel that is inside, from the signed distance."""
  return np.minimum(np.maximum(0.5 - resolution * distance, 0), 1)


def silhouettes(side: int = 64) -> dict[str, np.ndarray]:
  """The silhouette of every shape, bool `[side, side]`, over `± radius`."""
  t = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1
  x, y = t[None], t[:, None]
  return {name: shape_distance(name, x, y, 1.0) < 0 for name in SHAPES}


def pattern_tiles(side: int = 32) -> dict[str, np.ndarray]:
  """The darkness of every pattern, 0 or 1, over one period `[side, side]`."""
  t = (np.arange(side, dtype=np.float32) + 0.5) * (PERIOD / side)
  tiles = {'solid': np.zeros((side, side), np.float32)}
  for name in PATTERNS[1:]:
    distance, _ = pattern_distance(name, t[None], t[:, None])
    dark = (distance < 0).astype(np.float32)
    tiles[name] = np.broadcast_to(dark, (side, side))
  return tiles


def _visibility(period: float, resolution: int) -> float:
  """Fades a texture out before it aliases.

  Returns:
    1 for 3 pixels per period or more, 0 for 2 or fewer, linear in between.
  """
  return min(max(period * resolution - 2, 0), 1)


def _draw_object(canvas, item: Object) -> None:
  """Draws one object over `canvas`, uint8 `[R, R, 3]`, in place."""
  resolution = canvas.shape[0]
  reach = item.radius + 1 / resolution
  if item.angle:  # Corners may leave the square.
    reach = 1.25 * item.radius + 1 / resolution
  columns, rows = (
    slice(
      max(int((center - reach) * resolution), 0),
      min(int((center + reach) * resolution) + 1, resolution),
    )
    for center in (item.x, item.y)
  )
  scale = np.float32(1 / resolution)
  x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) * scale
  y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) * scale
  x, y = (x - np.float32(item.x))[None], (y - np.float32(item.y))[:, None]
  if item.angle:
    cos, sin = np.float32(np.cos(item.angle)), np.float32(np.sin(item.angle))
    x, y = cos * x + sin * y, cos * y - sin * x

  distance = shape_distance(item.shape, x, y, item.radius)
  inside = _coverage(distance, resolution)
  dark = inside - _coverage(distance + _OUTLINE, resolution)
  if item.pattern != 'solid':
    distance, share = pattern_distance(item.pattern, x, y)
    visible = _visibility(PERIOD, resolution)
    pattern = _coverage(distance, resolution)
    dark = np.maximum(dark, share + visible * (pattern - share))
  shade = 1 - (1 - DARK) * dark
  visible = _visibility(_HATCH_PERIOD, resolution)
  if visible:
    hatch = np.sin((2 * np.pi / _HATCH_PERIOD * 0.5**0.5) * (x + y))
    shade *= 1 + _HATCH * visible * (hatch - 1)
  # Channels first, because NumPy is slow if the last axis has three elements.
  color = np.array(COLORS[item.color], np.float32)[:, None, None]
  other, share = item.blend
  if share:
    other = np.array(COLORS[other], np.float32)[:, None, None]
    color = color + np.float32(share) * (other - color)
  behind = canvas[rows, columns].transpose(2, 0, 1)
  patch = (1 - inside) * behind + (inside * shade) * color + 0.5
  canvas[rows, columns] = patch.transpose(1, 2, 0)


def draw(scene: Scene, resolution: int) -> np.ndarray:
  """Draws a scene with anti-aliasing: close to area averages of a finer image.

  Args:
    scene: what to draw.
    resolution: side of the image in pixels, 8 to 1024.

  Returns:
    uint8 `[resolution, resolution, 3]`.

  Raises:
    ValueError: if the resolution is not in 8..1024.
  """
  if not 8 <= resolution <= 1024:
    raise ValueError(f'resolution {resolution}: shapes are drawn at 8..1024')
  rows = np.array(BACKGROUNDS[scene.background] * resolution, np.float32)
  visible = _visibility(_GRAIN_PERIOD, resolution)
  if visible:
    t = np.arange(resolution, dtype=np.float32) + 0.5
    wave = np.sin((2 * np.pi / _GRAIN_PERIOD / resolution) * t)
    across = np.repeat(_GRAIN * visible * wave, 3)
    rows = rows + 0.5 + wave[:, None] * across
  canvas = np.empty((resolution, 3 * resolution), np.uint8)
  canvas[:] = rows
  canvas = canvas.reshape(resolution, resolution, 3)
  for item in scene.objects:
    _draw_object(canvas, item)
  return canvas


def pick(rng: np.random.Generator, options):
  """One of the options, each as likely as the others."""
  return options[int(rng.integers(len(options)))]


def between(rng: np.random.Generator, low: float, high: float) -> float:
  """A number from low to high, uniformly."""
  return low + (high - low) * float(rng.random())


def sample_scene(
  rng: np.random.Generator,
  held_out: bool = False,
  two_objects: float = TWO_OBJECTS,
) -> Scene:
  """Samples a scene of one object, or of two that do not overlap.

  Args:
    rng: the source of randomness.
    held_out: whether the shape and colour of one object are HELD_OUT on the
      background; otherwise those of no object are.
    two_objects: probability of two objects.
  """
  background = pick(rng, tuple(BACKGROUNDS))
  seen = SEEN[background]
  pairs = [pick(rng, HELD_OUT[background] if held_out else seen)]
  if rng.random() < two_objects:
    others = tuple(pair for pair in seen if pair != pairs[0])
    pairs.insert(int(rng.integers(2)), pick(rng, others))
  looks = []
  for pair in pairs:
    solid = rng.random() < 0.4
    pattern = 'solid' if solid else pick(rng, PATTERNS[1:])
    size = pick(rng, tuple(SIZES))
    low, high = SIZES[size]
    if len(pairs) == 2:
      # Two objects side by side: at most one can be large, and both have
      # about the smallest radius of their size.
      if any('large' in look for look in looks):
        size, (low, high) = 'small', SIZES['small']
      high = low + 0.005
    looks.append((*pair, pattern, size, between(rng, low, high)))

  if len(pairs) == 1:
    *look, radius = looks[0]
    place = int(rng.integers(len(PLACES)))
    reach = 0.5 - radius - 2 * MARGIN
    row, column = place // 3 - 1, place % 3 - 1
    x = 0.5 + reach * column + between(rng, -MARGIN, MARGIN)
    y = 0.5 + reach * row + between(rng, -MARGIN, MARGIN)
    item = Object(*look, x, y, radius)
    return Scene((item,), background, PLACES[place])

  # From the left (or the top): margin, first object, gap, second object,
  # margin. The remaining space is spread about equally before, between and
  # behind the objects.
  radii = [look[-1] for look in looks]
  slack = 1 - 2 * sum(radii) - 2 * MARGIN - _GAP
  before, apart = (
    slack * (third + between(rng, -0.1, 0.1)) for third in (1 / 3, 2 / 3)
  )
  first = MARGIN + before + radii[0]
  second = MARGIN + apart + _GAP + 2 * radii[0] + radii[1]
  across = [between(rng, -0.06, 0.06) + 0.5 for _ in radii]
  along = [float(first), float(second)]
  sideways = bool(rng.integers(2))
  xs, ys = (along, across) if sideways else (across, along)
  objects = tuple(
    Object(*look[:-1], x, y, look[-1]) for look, x, y in zip(looks, xs, ys)
  )
  return Scene(objects, background, 'left of' if sideways else 'above')


def noun_phrase(
  rng: np.random.Generator, item: Object, has_size: bool = True
) -> tuple[str, dict]:
  """Words for an object, and what they state; its size only if `has_size`."""
  stated = {'shape': item.shape, 'color': item.color}
  if item.pattern != 'solid' or rng.random() < 0.3:
    stated['pattern'] = item.pattern
  if has_size and rng.random() < 0.85:
    stated['size'] = item.size
  words = [
    stated[key]
    for key in ('size', 'pattern', 'color', 'shape')
    if key in stated
  ]
  article = 'an' if words[0][0] in 'aeiou' else 'a'
  return ' '.join([article, *words]), stated


def place_phrase(rng: np.random.Generator, place: str) -> str:
  """Words for one of PLACES."""
  if place == 'centre':
    return pick(rng, ('in the centre', 'in the middle'))
  if place in ('left', 'right'):
    return pick(rng, (f'on the {place}', f'at the {place}'))
  if place in ('top', 'bottom'):
    return f'at the {place}'
  return pick(rng, (f'at the {place}', f'in the {place} corner'))


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, dict]:
  """Writes a caption, which may omit some attributes.

  Returns:
    The caption, and a dict of what it states. `background` is always there.
    `objects` is a list of dicts in the order of mention, with `shape`, `color`
    and, if mentioned, `pattern` and `size`. For one object, `position` is one
    of PLACES, if mentioned. For two objects, `relation` is that of the first
    mentioned to the second.
  """
  phrases, objects = zip(*(noun_phrase(rng, item) for item in scene.objects))
  stated = {'background': scene.background, 'objects': list(objects)}
  template = pick(rng, TEMPLATES)
  if len(objects) == 2:
    first, second, relation = *phrases, scene.layout
    if rng.random() < 0.5:
      first, second, relation = second, first, INVERSE[relation]
      stated['objects'].reverse()
    stated['relation'] = relation
    if relation.endswith(' of') and rng.random() < 0.3:
      relation = f'to the {relation}'
    if not template.startswith('a ') and rng.random() < 0.3:
      relation = f'is {relation}'
    subject = f'{first} {relation} {second}'
  else:
    subject = phrases[0]
    if rng.random() < 0.85:
      stated['position'] = scene.layout
      subject = f'{subject} {place_phrase(rng, scene.layout)}'
  return template.format(subject=subject, ground=scene.background), stated


def check_split(split: str) -> None:
  """Raises ValueError if there is no such split."""
  if split not in SPLITS:
    raise ValueError(f'split {split!r}: choose one of {SPLITS}')


def generator(seed: int, split: str, index: int) -> np.random.Generator:
  """The random stream of a record."""
  # One key per split, 2^64 random numbers per index: no streams overlap.
  key = np.array([seed, SPLITS.index(split)], np.uint64)
  counter = np.array([0, index, 0, 0], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclasses.dataclass(frozen=True)
class ShapesSource:
  """A random-access source of captioned shapes.

  The splits have independent random streams. `train` and `validation` never
  show a HELD_OUT combination; every scene of `held_out` shows one.

  Attributes:
    seed: of the random streams.
    split: one of SPLITS.
    size: number of records.
    resolution: side of the images in pixels; does not change the scenes.
    two_objects: share of the scenes that show two objects.
  """

  seed: int
  split: str
  size: int
  resolution: int
  two_objects: float = TWO_OBJECTS

  def __post_init__(self):
    """Raises ValueError if there is no such split."""
    check_split(self.split)

  @property
  def num_classes(self) -> int:
    """The number of classes of the label."""
    return len(SHAPES)

  def __len__(self) -> int:
    """The number of records."""
    return self.size

  def scene(self, index: int) -> tuple[Scene, str, dict]:
    """The scene, its caption, and what the caption states (see `describe`).

    Raises:
      IndexError: if the index is not in 0..size - 1.
    """
    if not 0 <= index < self.size:
      raise IndexError(f'index {index}: {self!r} has {self.size} records')
    rng = generator(self.seed, self.split, index)
    scene = sample_scene(rng, self.split == 'held_out', self.two_objects)
    return scene, *describe(scene, rng)

  def __getitem__(self, index: int) -> dict:
    """A record: image uint8 `[R, R, 3]`, caption, label, key, size in pixels.

    The label is the index in SHAPES of the shape; of two objects, of the shape
    on the left or at the top.
    """
    scene, caption, _ = self.scene(index)
    return {
      'image': draw(scene, self.resolution),
      'caption': caption,
      'label': SHAPES.index(scene.objects[0].shape),
      'key': f'{self.split}/{index}',
      'size': self.resolution,
    }
