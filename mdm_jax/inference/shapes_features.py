"""Features of images of shapes, for Fréchet distances between sets of them.

They are those of a small classifier, which is trained on the data set when it
is first needed, and cached. Inception is trained on photographs, and says
little about procedurally drawn shapes.
"""

from collections.abc import Iterator, Sequence
import hashlib

from absl import logging
from flax import traverse_util
import jax
import numpy as np

from mdm_jax.data import shapes
from mdm_jax.eval import classifier, fid
from mdm_jax.inference import references

NUM_IMAGES = 8192  # that the classifier is trained on
NUM_STEPS = 1500
_BATCH = 128  # images that the classifier sees at once


class Features:
  """The classifier: uint8 `[B, R, R, 3]` -> float32 `[B, FEATURES]`.

  Attributes:
    width: of the features.
    settings: of the classifier, as JSON.
  """

  width = classifier.FEATURES

  def __init__(
    self,
    resolution: int,
    seed: int,
    cache: str | None,
    num_images: int = NUM_IMAGES,
    num_steps: int = NUM_STEPS,
  ):
    """Trains the classifier, or reads it from the cache.

    Args:
      resolution: side of the images in pixels.
      seed: of the data set.
      cache: directory of the cache; None for the user's own.
      num_images: to train on; half as many held-out ones are the reference.
      num_steps: of training.
    """
    self._resolution, self._seed = resolution, seed
    self._cache = references.cache_directory(cache)
    self._num_images = num_images
    self.settings = {
      'features': 'shapes classifier',
      'resolution': resolution,
      'seed': seed,
      'images': num_images,
      'steps': num_steps,
    }

    def train():
      logging.info(
        'Training the classifier of shapes for %d steps, once.', num_steps
      )
      images, labels = _images_and_labels(seed, num_images, resolution)
      network, params = classifier.train(images, labels, num_steps=num_steps)
      _log_accuracy(network, params, seed, num_images // 2, resolution)
      return traverse_util.flatten_dict(jax.device_get(params), sep='/')

    arrays = references.cached_arrays(
      'weights of the classifier of shapes',
      self._cache,
      self.settings,
      train,
      lambda arrays: arrays['Dense_0/kernel'].shape[1] == self.width,
    )
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
      digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    self.settings['weights'] = digest.hexdigest()
    params = traverse_util.unflatten_dict(arrays, sep='/')
    network = classifier.Classifier({})
    self._apply = jax.jit(
      lambda images: network.apply({'params': params}, images)[0]
    )

  def encode(self, images: np.ndarray) -> np.ndarray:
    """The features of uint8 images `[B, R, R, 3]`."""
    return np.concatenate(
      [
        np.asarray(self._apply(images[start : start + _BATCH]))
        for start in range(0, len(images), _BATCH)
      ]
    )

  def reference(self) -> fid.Sample:
    """Features of the first held-out images, half as many as of training."""
    count = self._num_images // 2

    def make():
      sample = fid.Sample(self.width, count, count)
      for images in _held_out(self._seed, range(count), self._resolution):
        sample.add(self.encode(images))
      return sample

    return references.cached(self._cache, self.settings, make)

  def of_data(self, count: int) -> fid.Statistics:
    """Statistics of as many held-out images that are not in the reference."""
    first, found = self._num_images // 2, fid.Statistics(self.width)
    rows = range(first, first + count)
    for images in _held_out(self._seed, rows, self._resolution):
      found.update(self.encode(images))
    return found


def halves(reference: fid.Sample) -> float:
  """The Fréchet distance between two halves of the reference."""
  rows = reference.rows
  parts = []
  for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
    parts.append(fid.Statistics(rows.shape[1]))
    parts[-1].update(half)
  return fid.frechet_distance(*parts)


def _held_out(seed: int, rows: range, resolution: int) -> Iterator[np.ndarray]:
  """Batches of held-out images, uint8 [<= _BATCH, R, R, 3]."""
  source = shapes.ShapesSource(seed, 'held_out', rows.stop, resolution)
  for start in range(0, len(rows), _BATCH):
    yield np.stack([source[i]['image'] for i in rows[start : start + _BATCH]])


def _words() -> dict[str, Sequence]:
  """The words of each attribute, in the order of the classes."""
  return {
    'count': (1, 2),
    'background': sorted(shapes.BACKGROUNDS),
    'layout': sorted([*shapes.PLACES, 'left of', 'above']),
    'color': sorted(shapes.COLORS),
    'shape': sorted(shapes.SHAPES),
    'pattern': sorted(shapes.PATTERNS),
    'size': sorted(shapes.SIZES),
  }


def _images_and_labels(
  seed: int, count: int, resolution: int, split: str = 'train'
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The first images of a split, and classes of their first objects."""
  source = shapes.ShapesSource(seed, split, count, resolution)
  scenes = [source.scene(i)[0] for i in range(count)]
  images = np.stack([shapes.draw(scene, resolution) for scene in scenes])
  values = {
    'count': [len(scene.objects) for scene in scenes],
    'background': [scene.background for scene in scenes],
    'layout': [scene.layout for scene in scenes],
    **{
      name: [getattr(scene.objects[0], name) for scene in scenes]
      for name in ('color', 'shape', 'pattern', 'size')
    },
  }
  return images, {
    name: np.array([words.index(value) for value in values[name]])
    for name, words in _words().items()
  }


def _log_accuracy(
  network: classifier.Classifier,
  params: dict,
  seed: int,
  count: int,
  resolution: int,
) -> None:
  """Logs the classifier's accuracy on held-out images."""
  apply = jax.jit(lambda images: network.apply({'params': params}, images)[1])
  images, labels = _images_and_labels(seed, count, resolution, 'held_out')
  logits = [
    apply(images[start : start + _BATCH]) for start in range(0, count, _BATCH)
  ]
  for name, expected in labels.items():
    found = np.concatenate([each[name].argmax(-1) for each in logits])
    logging.info(
      'Accuracy of the classifier on %s: %.1f %%.',
      name,
      100 * (found == expected).mean(),
    )
