"""Features of images of a labelled data set, from a small classifier.

The labels are the lines of a JSON file: each has the 'key' of a record, and its
class, a text, by each of some attributes. The classifier is trained on images
of the training split. Inception, which is trained on photographs, says little
about drawings.
"""

from collections.abc import Callable, Mapping, Sequence

from absl import logging
from etils import epath
import jax
import numpy as np

from mdm_jax.eval import classifier, fid
from mdm_jax.runtime import files

_KEY = 'key'
_BATCH = 128  # images that the classifier sees at once

Labels = Mapping[str, Mapping[str, str]]


def read_labels(path: epath.PathLike) -> Labels:
  """Reads the classes of records.

  Returns:
    key -> attribute -> class.

  Raises:
    ValueError: a line is not of that form, or lacks an attribute of the others.
    OSError: it cannot be read.
  """

  def is_valid(line):
    return isinstance(line, dict) and all(
      isinstance(value, str) for value in line.values()
    )

  lines = files.read_json_lines(path, is_valid)
  names = set(lines[0]) if lines else set()
  if _KEY not in names or len(names) < 2:
    raise ValueError(
      f"{path}: each line needs a 'key' and the classes of that record."
    )
  if bad := next((line for line in lines if set(line) != names), None):
    raise ValueError(f'{path}: {bad} has not the attributes of the first line.')
  return {
    line[_KEY]: {name: line[name] for name in names - {_KEY}} for line in lines
  }


def train(
  images: np.ndarray, keys: Sequence[str], labels: Labels, num_steps: int
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[..., dict]]:
  """Trains a classifier on all attributes at once.

  Args:
    images: uint8 [N, R, R, 3].
    keys: of them.
    labels: see `read_labels`.
    num_steps: of training.

  Returns:
    A function from uint8 [B, R, R, 3] to features, float32 [B, FEATURES], and
    one from images and their keys to the accuracy on each attribute.

  Raises:
    ValueError: an image has no label.
  """
  _require(keys, labels)
  names = sorted(labels[keys[0]])
  classes = {
    name: sorted({labels[key][name] for key in keys}) for name in names
  }
  number = {
    name: {each: i for i, each in enumerate(found)}
    for name, found in classes.items()
  }
  network, params = classifier.train(
    images,
    {
      name: np.array([number[name][labels[key][name]] for key in keys])
      for name in names
    },
    num_steps=num_steps,
  )
  apply = jax.jit(lambda images: network.apply({'params': params}, images))

  def batches(images):
    for start in range(0, len(images), _BATCH):
      part = images[start : start + _BATCH]
      # Filled up, so that it is compiled once.
      filled = part[np.arange(_BATCH) % len(part)]
      features, logits = jax.device_get(apply(filled))
      yield (
        features[: len(part)],
        {name: each[: len(part)].argmax(-1) for name, each in logits.items()},
      )

  def encode(images):
    return np.concatenate([features for features, _ in batches(images)])

  def accuracy(images, keys):
    _require(keys, labels)
    found = [guesses for _, guesses in batches(images)]
    return {
      name: float(
        np.mean(
          np.concatenate([each[name] for each in found])
          # A class that training does not have is never right.
          == [number[name].get(labels[key][name], -1) for key in keys]
        )
      )
      for name in names
    }

  return encode, accuracy


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
  """The Fréchet distance of two sets of features, [N, D] and [M, D]."""
  statistics = []
  for features in (first, second):
    if len(features) <= features.shape[1]:
      logging.warning(
        'Fréchet distance of %d images with %d features: it is too high, and '
        'compares only with those of as many images.',
        *features.shape,
      )
    statistics.append(fid.Statistics(features.shape[1]))
    statistics[-1].update(features)
  return fid.frechet_distance(*statistics)


def _require(keys: Sequence[str], labels: Labels) -> None:
  missing = [key for key in keys if key not in labels]
  if missing:
    raise ValueError(
      f'{len(missing)} of {len(keys)} images have no label, such as '
      f'{missing[0]}: give the labels of this data set.'
    )
