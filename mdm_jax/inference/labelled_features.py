"""Features of images of a labelled data set, from a small classifier.

The labels are the lines of a JSON file: each has the 'key' of a record, and its
class, a text, by each of some attributes.
"""

from collections.abc import Mapping
import json

from etils import epath
import numpy as np

from mdm_jax.data import lines
from mdm_jax.inference.classifier_features import ClassifierFeatures, digest
from mdm_jax.inference.split_images import SplitImages

_KEY = 'key'

Labels = Mapping[str, Mapping[str, str]]


def read_labels(path: epath.PathLike) -> Labels:
  """Reads the classes of records.

  Returns:
    key -> attribute -> class.

  Raises:
    ValueError: a line is not of that form, or lacks an attribute of the others,
      or there is none.
    OSError: it cannot be read.
  """
  labels, names = {}, None
  for number, text in enumerate(lines.read_lines(path), 1):
    if not text.strip():
      continue
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):
      line = None
    if (
      not isinstance(line, dict)
      or _KEY not in line
      or len(line) < 2
      or not all(isinstance(value, str) for value in line.values())
    ):
      raise ValueError(
        f"{path}, line {number}: give a 'key' and the classes of that record, "
        'as texts in a JSON object.'
      )
    names = names or set(line)
    if set(line) != names:
      raise ValueError(
        f'{path}, line {number}: it has not the attributes of the first line.'
      )
    labels[line.pop(_KEY)] = line
  if not labels:
    raise ValueError(f'{path} has no lines.')
  return labels


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
    if len(missing) == len(keys) and '@' in missing[0]:
      raise ValueError(
        'no image has a label: the keys of an index of tars are such as '
        f'{missing[0]}, of a tar and a byte in it, those of the labels such as '
        f'{next(iter(labels))}.'
      )
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
