"""Features of images of shapes, for Fréchet distances between sets of them."""

from collections.abc import Iterator, Sequence

from absl import logging
import numpy as np

from mdm_jax.data import shapes
from mdm_jax.eval import fid
from mdm_jax.inference import classifier_features, references

NUM_IMAGES = 8192  # that the classifier is trained on
NUM_STEPS = 1500
# Of the data set of the classifier and of the reference. It is not the run's:
# distances of runs with several seeds are to be of the same features.
SEED = 0


class Features(classifier_features.ClassifierFeatures):
  """Those of a classifier of shapes."""

  def __init__(
    self,
    resolution: int,
    cache: str | None,
    num_images: int = NUM_IMAGES,
    num_steps: int = NUM_STEPS,
  ):
    """Trains the classifier, or reads it from the cache.

    Args:
      resolution: side of the images in pixels.
      cache: directory of the cache; None for the user's own.
      num_images: to train on; half as many held-out ones are the reference.
      num_steps: of training.
    """
    self._resolution, self._num_images = resolution, num_images
    super().__init__(
      {
        'features': 'shapes classifier',
        'resolution': resolution,
        'seed': SEED,
        'images': num_images,
        'steps': num_steps,
      },
      lambda: _images_and_labels(num_images, resolution),
      cache,
    )
    if not self.from_cache:
      held_out = _images_and_labels(num_images // 2, resolution, 'held_out')
      for name, share in self.accuracy(*held_out).items():
        logging.info(
          'Accuracy of the classifier on %s: %.1f %%.', name, 100 * share
        )

  def reference(self) -> fid.Sample:
    """Features of the first held-out images, half as many as of training."""
    count = self._num_images // 2

    def make():
      sample = fid.Sample(self.width, count, count)
      for images in _held_out(range(count), self._resolution):
        sample.add(self.encode(images))
      return sample

    return references.cached(self._cache, self.settings, make)

  def of_data(self, count: int) -> fid.Statistics:
    """Statistics of as many held-out images that are not in the reference."""
    first, found = self._num_images // 2, fid.Statistics(self.width)
    rows = range(first, first + count)
    for images in _held_out(rows, self._resolution):
      found.update(self.encode(images))
    return found


def halves(reference: fid.Sample) -> float:
  """The Fréchet distance between two halves of the reference."""
  halves = np.split(reference.rows, [len(reference.rows) // 2])
  return fid.frechet_distance(*map(fid.Statistics.of, halves))


def _held_out(rows: range, resolution: int) -> Iterator[np.ndarray]:
  """Batches of held-out images, uint8 [<= BATCH, R, R, 3]."""
  source = shapes.ShapesSource(SEED, 'held_out', rows.stop, resolution)
  size = classifier_features.BATCH
  for start in range(0, len(rows), size):
    yield np.stack([source[i]['image'] for i in rows[start : start + size]])


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
  count: int, resolution: int, split: str = 'train'
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The first images of a split, and classes of their first objects."""
  source = shapes.ShapesSource(SEED, split, count, resolution)
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
