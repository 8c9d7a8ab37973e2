"""Captioned clips of shapes that move: an endless procedural data set.

A scene is that of `shapes`, one or two objects on a background, and each object
moves, turns, grows, shrinks, changes its colour or rests. What moves starts at
a side of the image and moves away from it. The caption says all this. A clip is
a pure function of (seed, split, index), and can be drawn at any resolution and
number of frames: frame k of T shows the time k / T, so that a clip of fewer
frames has every n-th frame of a longer one.
"""

import dataclasses
import math

import numpy as np

from mdm_jax.data import shapes
from mdm_jax.data.shapes import Object, Scene, between, pick

# As that of `shapes`, by which objects are drawn.
VERSION = f'{shapes.VERSION}.1'
DIRECTIONS = {'left': (-1, 0), 'right': (1, 0), 'up': (0, -1), 'down': (0, 1)}
_AWAY_FROM = {'left': 'right', 'right': 'left', 'top': 'down', 'bottom': 'up'}
# Paths of a whole clip, as fractions of the side.
SPEEDS = {'slowly': (0.16, 0.2), 'fast': (0.4, 0.46)}
TURNS = {'clockwise': 1, 'counterclockwise': -1}
_TURN = math.pi / 2  # radians of a whole clip
_GROWTH = 0.6  # smallest radius over the largest
# Those of other shapes cannot be seen.
_TURNABLE = ('square', 'triangle', 'star', 'cross')


@dataclasses.dataclass(frozen=True)
class Motion:
  """What an object does during a clip.

  Attributes:
    kind: 'moving', 'turning', 'growing', 'shrinking', 'changing' (its colour)
      or 'resting'.
    to: the direction of 'moving', the turn of 'turning', the new colour of
      'changing'.
    speed: of 'moving', one of SPEEDS.
    path: of 'moving', a fraction of the side.
  """

  kind: str
  to: str = ''
  speed: str = ''
  path: float = 0.0

  @property
  def stated(self) -> dict[str, str]:
    """What a caption says of it, see `describe`."""
    others = {'turning': 'turn', 'changing': 'new_color'}
    to = others.get(self.kind, 'direction')
    found = {'motion': self.kind, to: self.to, 'speed': self.speed}
    return {name: value for name, value in found.items() if value}


@dataclasses.dataclass(frozen=True)
class MovingScene:
  """A scene at the start of a clip, and the motion of each of its objects.

  A growing object has the size of its end, a shrinking one that of its start.
  """

  scene: Scene
  motions: tuple[Motion, ...]

  def at(self, time: float) -> Scene:
    """The scene at a time from 0, the start, to 1."""
    objects = map(_moved, self.scene.objects, self.motions, [time] * 2)
    return dataclasses.replace(self.scene, objects=tuple(objects))


def _moved(item: Object, motion: Motion, time: float) -> Object:
  match motion.kind:
    case 'moving':
      x, y = DIRECTIONS[motion.to]
      path = motion.path * time
      return dataclasses.replace(item, x=item.x + x * path, y=item.y + y * path)
    case 'turning':
      angle = TURNS[motion.to] * _TURN * time
      return dataclasses.replace(item, angle=angle)
    case 'growing' | 'shrinking':
      share = time if motion.kind == 'growing' else 1 - time
      factor = _GROWTH + (1 - _GROWTH) * share
      return dataclasses.replace(item, radius=factor * item.radius)
    case 'changing':
      return dataclasses.replace(item, blend=(motion.to, time))
  return item


def sample_scene(
  rng: np.random.Generator, held_out: bool, two_objects: float
) -> MovingScene:
  """Samples a scene and motions that keep its objects inside and apart.

  Args:
    rng: the source of randomness.
    held_out: as in `shapes.sample_scene`.
    two_objects: probability of two objects.
  """
  scene = shapes.sample_scene(rng, held_out, two_objects)
  objects, motions = [], []
  directions = _directions(scene)
  for item in scene.objects:
    kinds = ['growing', 'shrinking', 'changing', 'resting']
    if directions:
      kinds += ['moving', 'moving']
    if item.shape in _TURNABLE:
      kinds.append('turning')
    match pick(rng, kinds):
      case 'moving':
        item, motion = _start_moving(rng, item, pick(rng, directions))
        directions = (motion.to,)  # Two that move stay side by side.
      case 'turning':
        motion = Motion('turning', pick(rng, tuple(TURNS)))
      case 'changing':
        others = [color for color in shapes.COLORS if color != item.color]
        motion = Motion('changing', pick(rng, others))
      case kind:
        motion = Motion(kind)
    objects.append(item)
    motions.append(motion)
  scene = dataclasses.replace(scene, objects=tuple(objects))
  return MovingScene(scene, tuple(motions))


def _directions(scene: Scene) -> tuple[str, ...]:
  """Where objects of a scene can move; nowhere from the centre."""
  # One of two objects moves across the line between them.
  if len(scene.objects) == 2:
    return ('up', 'down') if scene.layout == 'left of' else ('left', 'right')
  return tuple(
    away for side, away in _AWAY_FROM.items() if side in scene.layout
  )


def _start_moving(
  rng: np.random.Generator, item: Object, direction: str
) -> tuple[Object, Motion]:
  """Places an object at the side that it moves away from."""
  speed = pick(rng, tuple(SPEEDS))
  if item.size == 'large':
    speed = 'slowly'  # It has no space for more.
  path = between(rng, *SPEEDS[speed])
  x, y = DIRECTIONS[direction]
  first = item.radius + between(rng, shapes.MARGIN, 3 * shapes.MARGIN)
  start = first if x + y > 0 else 1 - first
  item = dataclasses.replace(item, **{'x' if x else 'y': start})
  return item, Motion('moving', direction, speed, path)


def describe(moving: MovingScene, rng: np.random.Generator) -> tuple[str, dict]:
  """Writes a caption, which may omit some attributes.

  Returns:
    The caption, and a dict of what it states, as `shapes.describe`. An object
    also has the `motion`, and if it has them `direction`, `turn`, `new_color`
    and `speed`, which may be omitted. The `position` is that of the first
    frame.
  """
  phrases, objects = zip(
    *(
      _phrase(rng, item, motion)
      for item, motion in zip(moving.scene.objects, moving.motions)
    )
  )
  scene = moving.scene
  stated = {'background': scene.background, 'objects': list(objects)}
  template = pick(rng, shapes.TEMPLATES)
  if len(objects) == 2:
    (first, second), relation = phrases, scene.layout
    if rng.random() < 0.5:
      first, second, relation = second, first, shapes.INVERSE[relation]
      stated['objects'].reverse()
    stated['relation'] = relation
    subject = f'{" ".join(first)}, {relation} {" ".join(second)}'
  else:
    ((noun, motion),) = phrases
    place = ''
    if rng.random() < 0.85:
      stated['position'] = scene.layout
      place = f' {shapes.place_phrase(rng, scene.layout)}'
    subject = f'{noun}{place} {motion}'
  return template.format(subject=subject, ground=scene.background), stated


def _phrase(
  rng: np.random.Generator, item: Object, motion: Motion
) -> tuple[tuple[str, str], dict]:
  """A noun and a participle, and what they state."""
  has_size = motion.kind not in ('growing', 'shrinking')
  noun, stated = shapes.noun_phrase(rng, item, has_size)
  stated |= motion.stated
  words = motion.kind
  if motion.to:
    words += (
      f' to {motion.to}' if motion.kind == 'changing' else f' {motion.to}'
    )
  if motion.speed:
    if rng.random() < 0.8:
      words += f' {motion.speed}'
    else:
      del stated['speed']
  return (noun, words), stated


@dataclasses.dataclass(frozen=True)
class MovingShapesSource:
  """A random-access source of captioned clips; its splits are those of shapes.

  Attributes:
    seed: of the random streams.
    split: one of `shapes.SPLITS`.
    size: number of records.
    resolution: side of the frames in pixels; does not change the scenes.
    frames: of a clip; does not change the scenes. A record of one frame is an
      image.
    two_objects: share of the scenes that show two objects.
  """

  seed: int
  split: str
  size: int
  resolution: int
  frames: int
  two_objects: float = shapes.TWO_OBJECTS

  def __post_init__(self):
    """Raises ValueError if there is no such split."""
    shapes.check_split(self.split)

  def __len__(self) -> int:
    """The number of records."""
    return self.size

  def scene(self, index: int) -> tuple[MovingScene, str, dict]:
    """The scene, its caption, and what the caption states (see `describe`).

    Raises:
      IndexError: if the index is not in 0..size - 1.
    """
    if not 0 <= index < self.size:
      raise IndexError(f'index {index}: {self!r} has {self.size} records')
    rng = shapes.generator(self.seed, self.split, index)
    moving = sample_scene(rng, self.split == 'held_out', self.two_objects)
    return moving, *describe(moving, rng)

  def __getitem__(self, index: int) -> dict:
    """A record: image uint8 `[T, R, R, 3]`, caption, key, size in pixels.

    With one frame the image is `[R, R, 3]`.
    """
    moving, caption, _ = self.scene(index)
    clip = [
      shapes.draw(moving.at(k / self.frames), self.resolution)
      for k in range(self.frames)
    ]
    return {
      'image': np.stack(clip) if self.frames > 1 else clip[0],
      'caption': caption,
      'key': f'{self.split}/{index}',
      'size': self.resolution,
    }
