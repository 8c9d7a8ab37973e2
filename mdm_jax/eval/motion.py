"""What shapes do in a clip: where they move, turn, grow or change colour.

Each frame is analysed as an image, and an object is followed by its place.
Times are shares of the clip, of which frame k of T shows k / T. Lengths and
positions are fractions of the image's side; y points down.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from mdm_jax.eval import prompt_accuracy
from mdm_jax.eval.prompt_accuracy import Found, Vocabulary

# Changes in a whole clip from which on an object does something.
_MOVED = 0.08  # of its place
_FAST = 0.3  # of its place
_GROWN = 1.35  # of its radius, as a factor
_TURNED = 0.5  # radians
# An object that is further away in the next frame is another one.
_NEAR = 0.2
# Turned by a full circle over this, a shape looks as before.
_SYMMETRY = {'triangle': 3, 'square': 4, 'cross': 4, 'star': 5}


def analyze(
  clip: np.ndarray, vocabulary: Vocabulary
) -> tuple[str, tuple[Found, ...]]:
  """Finds the background, and the objects with their motions.

  Args:
    clip: uint8 [T, R, R, 3], of at least two frames.
    vocabulary: the appearance of each word.

  Returns:
    The background's name, and the objects, the largest first. They are and look
    as in the first frame, but growing ones look as in the last.
  """
  frames = [prompt_accuracy.analyze(frame, vocabulary) for frame in clip]
  # Small objects may be missed where they begin to grow.
  anchor = max(range(len(clip)), key=lambda k: len(frames[k][1]))
  objects = []
  for item in frames[anchor][1]:
    track = _follow(item, anchor, [found for _, found in frames])
    objects.append(_motion(track, clip, vocabulary))
  return frames[0][0], tuple(objects)


def score(
  sample: np.ndarray, stated: dict, vocabulary: Vocabulary
) -> dict[str, list[bool]]:
  """Marks each stated attribute of an image or a clip as right or wrong.

  Args:
    sample: uint8 [R, R, 3], whose motion is not marked, or [T, R, R, 3].
    stated: as for `prompt_accuracy.score`; objects of a clip also have
      'motion' and any other of `prompt_accuracy.MOTION_ATTRIBUTES`.
    vocabulary: the appearance of each word.

  Returns:
    As `prompt_accuracy.score`, with the attributes of motion.
  """
  if sample.ndim == 4:
    found = analyze(sample, vocabulary)
    return prompt_accuracy.compare(*found, stated)
  return prompt_accuracy.score(sample, without_motion(stated), vocabulary)


def without_motion(stated: dict) -> dict:
  """What a prompt states of an image, see `score`."""
  objects = [
    {
      name: value
      for name, value in each.items()
      if name not in prompt_accuracy.MOTION_ATTRIBUTES
    }
    for each in stated['objects']
  ]
  return {**stated, 'objects': objects}


def _follow(
  item: Found, anchor: int, frames: Sequence[Sequence[Found]]
) -> dict[int, Found]:
  """The same object in other frames, by their indices in order."""
  track = {anchor: item}
  for indices in (range(anchor + 1, len(frames)), range(anchor - 1, -1, -1)):
    last = item
    for k in indices:
      near = min(frames[k], key=lambda x: _distance(x, last), default=None)
      if near is not None and _distance(near, last) < _NEAR:
        track[k] = last = near
  return dict(sorted(track.items()))


def _distance(first: Found, second: Found) -> float:
  return float(np.hypot(first.x - second.x, first.y - second.y))


def _motion(
  track: dict[int, Found], clip: np.ndarray, vocabulary: Vocabulary
) -> Found:
  """An object with its motion, of which there is one at most."""
  (begin, *_, end) = track if len(track) > 1 else [*track] * 2
  first, last = track[begin], track[end]
  share = max(end - begin, 1) / len(clip)
  right, down = (last.x - first.x) / share, (last.y - first.y) / share
  growth = (last.radius / first.radius) ** (1 / share)
  if max(abs(right), abs(down)) > _MOVED:
    if abs(right) > abs(down):
      direction = 'right' if right > 0 else 'left'
    else:
      direction = 'down' if down > 0 else 'up'
    path = max(abs(right), abs(down))
    found = {
      'motion': 'moving',
      'direction': direction,
      'speed': 'fast' if path > _FAST else 'slowly',
    }
  elif growth > _GROWN:
    first = dataclasses.replace(last, color=first.color)
    found = {'motion': 'growing'}
  elif growth < 1 / _GROWN:
    found = {'motion': 'shrinking'}
  elif first.color != last.color:
    found = {'motion': 'changing', 'new_color': last.color}
  else:
    angle = _turn(first.shape, track, clip, vocabulary) / share
    found = {'motion': 'resting'}
    if abs(angle) > _TURNED:
      turn = 'clockwise' if angle > 0 else 'counterclockwise'
      found = {'motion': 'turning', 'turn': turn}
  return dataclasses.replace(first, **found)


def _turn(
  shape: str, track: dict[int, Found], clip: np.ndarray, vocabulary: Vocabulary
) -> float:
  """Radians that an object turns clockwise from its first frame to its last.

  The angle is the phase of the outline's harmonic of the shape's symmetry. It
  is followed from frame to frame, as it has no beginning.
  """
  if shape not in _SYMMETRY:
    return 0.0
  order = _SYMMETRY[shape]
  phases = [
    _phase(clip[k], item, order, vocabulary) for k, item in track.items()
  ]
  return float(np.unwrap(phases)[-1] - phases[0]) / order


def _phase(
  image: np.ndarray, item: Found, order: int, vocabulary: Vocabulary
) -> float:
  """The phase of an object's harmonic, in radians."""
  side = len(image)
  places = (np.arange(side) + 0.5) / side
  x, y = (places - item.x)[None], (places - item.y)[:, None]
  radius = np.hypot(x, y) / item.radius
  inside = prompt_accuracy.contrast(image, vocabulary) > (
    prompt_accuracy.CONTRAST
  )
  weight = radius**order * (inside & (radius < 1.3))
  return float(np.angle((weight * np.exp(1j * order * np.arctan2(y, x))).sum()))
