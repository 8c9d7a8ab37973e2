"""Features of a small classifier, for Fréchet distances between drawings.

It is trained on the data set when it is first needed, and cached. Inception is
trained on photographs, and says little about drawings.
"""

from collections.abc import Callable, Mapping
import hashlib
from typing import Any

from absl import logging
from flax import traverse_util
import jax
import numpy as np

from mdm_jax.eval import classifier
from mdm_jax.inference import feature_extractors, references

BATCH = 128  # images that the classifier sees at once
Labels = Mapping[str, np.ndarray]  # attribute -> classes, int [N], from 0


class ClassifierFeatures:
  """The classifier: uint8 `[B, R, R, 3]` -> float32 `[B, FEATURES]`.

  Attributes:
    width: of the features.
    settings: all that the features depend on, as JSON.
    from_cache: whether the classifier was read, and not trained.
  """

  width = classifier.FEATURES

  def __init__(
    self,
    settings: Mapping[str, Any],
    examples: Callable[[], tuple[np.ndarray, Labels]],
    cache: str | None = None,
  ):
    """Trains the classifier, or reads it from the cache.

    Args:
      settings: all that its weights depend on, as JSON: `features`, what it is
        called, `steps` of training, and what the examples are.
      examples: returns images uint8 `[N, R, R, 3]` to train on, and classes.
      cache: directory of the cache; None for the user's own.
    """
    self._cache = references.cache_directory(cache)
    self.from_cache = True

    def train():
      name, num_steps = settings['features'], settings['steps']
      logging.info('Training the %s for %d steps, once.', name, num_steps)
      self.from_cache = False
      _, params = classifier.train(*examples(), num_steps=num_steps)
      return traverse_util.flatten_dict(jax.device_get(params), sep='/')

    arrays = references.cached_arrays(
      f'weights of the {settings["features"]}',
      self._cache,
      settings,
      train,
      lambda arrays: arrays['Dense_0/kernel'].shape[1] == self.width,
    )
    self.settings = settings | {
      'weights': digest(*(arrays[name] for name in sorted(arrays))),
      'precision': feature_extractors.PRECISION,
    }
    self._arrays, network = arrays, classifier.Classifier({})
    params = traverse_util.unflatten_dict(arrays, sep='/')
    self._apply = jax.jit(
      feature_extractors.exactly(
        lambda images: network.apply({'params': params}, images)[0]
      )
    )

  def encode(self, images: np.ndarray) -> np.ndarray:
    """The features of uint8 images `[B, R, R, 3]`."""
    found = []
    for start in range(0, len(images), BATCH):
      part = images[start : start + BATCH]
      # Filled up, so that it is compiled once.
      filled = part[np.arange(BATCH) % len(part)]
      found.append(np.asarray(self._apply(filled))[: len(part)])
    return np.concatenate(found)

  def accuracy(self, images: np.ndarray, labels: Labels) -> dict[str, float]:
    """How often the classifier is right on each attribute, a share of 1.

    Args:
      images: uint8 `[N, R, R, 3]`.
      labels: of them; a class that training does not have is never right.
    """
    hidden, found = np.maximum(self.encode(images), 0), {}
    for name, expected in labels.items():
      logits = hidden @ self._arrays[f'{name}/kernel']
      guesses = (logits + self._arrays[f'{name}/bias']).argmax(-1)
      found[name] = float(np.mean(guesses == expected))
    return found


def digest(*arrays: np.ndarray) -> str:
  """A hash of the values of arrays."""
  found = hashlib.blake2b(digest_size=8)
  for array in arrays:
    found.update(np.ascontiguousarray(array))
  return found.hexdigest()
