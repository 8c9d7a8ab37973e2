"""Features of images of a labelled data set, from a small classifier.

The labels are the lines of a JSON file: each has the 'key' of a record, and its
class, a text, by each of some attributes.
"""

from collections.abc import Mapping

from etils import epath
import numpy as np

from mdm_jax.inference.classifier_features import ClassifierFeatures, digest
from mdm_jax.inference.split_images import SplitImages
from mdm_jax.runtime import files

_KEY = 'key'

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
  training: SplitImages, held_out: SplitImages, labels: Labels, num_steps: int
) -> tuple[ClassifierFeatures, dict[str, float]]:
  """Trains a classifier on all attributes at once, or reads it from the cache.

  Args:
    training: images to train on.
    held_out: images that tell how often it is right.
    labels: of both, see `read_labels`.
    num_steps: of training.

  Returns:
    The classifier, and for each attribute its accuracy on held-out images.

  Raises:
    ValueError: an image has no label.
  """
  keys = [*training.keys, *held_out.keys]
  if missing := [key for key in keys if key not in labels]:
    raise ValueError(
      f'{len(missing)} of {len(keys)} images have no label, such as '
      f'{missing[0]}: give the labels of this data set.'
    )
  number = {}  # attribute -> class -> its place among those of training
  for name in sorted(labels[keys[0]]):
    classes = {labels[key][name] for key in training.keys}
    number[name] = {each: i for i, each in enumerate(sorted(classes))}

  def numbers(keys):
    return {
      name: np.array([found.get(labels[key][name], -1) for key in keys])
      for name, found in number.items()
    }

  classes = numbers(training.keys)
  settings = {
    'features': 'classifier of labelled images',
    'images': digest(training.images),
    'shape': list(training.images.shape),
    'labels': {name: digest(each) for name, each in classes.items()},
    'steps': num_steps,
  }
  features = ClassifierFeatures(settings, lambda: (training.images, classes))
  return features, features.accuracy(held_out.images, numbers(held_out.keys))
