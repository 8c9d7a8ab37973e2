"""Metrics of samples, which are added batch by batch.

They keep features and scores, not the samples.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from absl import logging
import numpy as np

from mdm_jax.builders.data import held_out_split, make_source
from mdm_jax.builders.prompts import make_vocabulary
from mdm_jax.builders.stage import Stage
from mdm_jax.eval import (
  edge_width,
  estimate,
  fid,
  flicker,
  motion,
  prompt_accuracy,
)
from mdm_jax.eval.estimate import Estimate
from mdm_jax.inference import (
  feature_extractors,
  shapes_features,
  validation,
)

_SUBSETS = {'subset_size': 1000, 'num_subsets': 100, 'seed': 0}
_NEIGHBOURS = 3
# Fewest images in a set, without which a metric has no value.
_LEAST = {
  'fid': 2,
  'kid': 2,
  'fvd': 2,
  'frechet': 2,
  'precision_recall': _NEIGHBOURS + 1,
}


class Samples(NamedTuple):
  """A batch of samples of the finest level.

  Attributes:
    images: uint8 [B, R, R, 3], or clips [B, T, R, R, 3].
    rows: indices of the prompts.
    captions: the prompts.
    statements: what they state, see `make_prompts`; None if that is not known.
  """

  images: np.ndarray
  rows: Sequence[int]
  captions: list[str]
  statements: list[dict] | None


class SampleMetric(Protocol):
  """A metric, or several that share a network."""

  def add(self, samples: Samples) -> None:
    """Measures samples."""

  def result(self) -> tuple[dict, dict]:
    """The metrics of all samples, and the settings they depend on (JSON)."""


def check_count(names: Sequence[str], count: int, what: str) -> None:
  """Raises ValueError if so few images have no value of one of the metrics.

  Args:
    names: of the metrics.
    count: images of a set, or frames of its clips.
    what: the set, to begin the message with.
  """
  for name in names:
    if count < (least := _LEAST.get(name, 0)):
      raise ValueError(f'{what}: {name} needs {least} images or more.')


def check_reference(names: Sequence[str], reference: fid.Sample) -> None:
  """Raises ValueError if a reference is too small for one of the metrics."""
  count = reference.statistics.count
  check_count(names, count, f'The reference has {count} images')


class _OfFeatures:
  """Collects features of samples, to compare them with those of a reference."""

  def __init__(
    self,
    names: Sequence[str],
    network: feature_extractors.FeatureNetwork,
    num_rows: int,
    reference: fid.Sample,
    about: dict,
  ):
    """Collects nothing yet.

    Args:
      names: of the metrics.
      network: that makes the features.
      num_rows: of all samples.
      reference: features to compare with.
      about: what they depend on (JSON).

    Raises:
      ValueError: the reference is too small.
    """
    check_reference(names, reference)
    self._names = names
    self._network, self._about = network, about
    self._reference = reference
    limit = feature_extractors.MAX_ROWS
    self._sample = fid.Sample(network.width, num_rows, limit)

  def add(self, samples: Samples) -> None:
    """Collects features of samples."""
    self._sample.add(self._network.encode(samples.images))


class OfSets(_OfFeatures):
  """FID, KID, precision and recall of images, or of the frames of clips."""

  def __init__(self, of_frames: bool, *arguments):
    """Of images, or of frames; further arguments are those of `_OfFeatures`."""
    super().__init__(*arguments)
    self._of_frames = of_frames

  def result(self) -> tuple[dict, dict]:
    """The metrics of all samples, and their settings."""
    found, settings = compare(
      self._names, self._sample, self._reference, self._of_frames
    )
    return found, {'reference': self._about, **settings}


class VideoDistance(_OfFeatures):
  """The Fréchet video distance (arXiv 1812.01717)."""

  def result(self) -> tuple[dict, dict]:
    """The metric of all samples, and its settings."""
    ours, theirs = self._sample.statistics, self._reference.statistics
    distance = fid.frechet_distance(ours, theirs)
    return {'fvd': Estimate(distance, ours.count)}, {'fvd': self._about}


class ClipScore:
  """How well samples fit their prompts; of clips, the mean over frames."""

  def __init__(self, network: feature_extractors.Clip):
    """Measures nothing yet."""
    self._network, self._scores, self._captions = network, [], []

  def add(self, samples: Samples) -> None:
    """Measures samples."""
    self._scores += [*self._network.scores(samples.images, samples.captions)]
    self._captions += samples.captions

  def result(self) -> tuple[dict, dict]:
    """The metric of all samples, and its settings."""
    # A set of few captions repeats them, and some are harder than others.
    of_captions = collections.defaultdict(list)
    for caption, score in zip(self._captions, self._scores):
      of_captions[caption].append(score)
    groups = of_captions.values()
    score = estimate.of_groups([*map(sum, groups)], [*map(len, groups)])
    return {'clip_score': score}, {'clip': self._network.fingerprint}


class Flicker:
  """`flicker.flicker` of clips, and that of the data set's."""

  def __init__(self, clips: Iterable[np.ndarray], split: str):
    """Measures batches of clips of a split of the data set."""
    self._found, self._split = [], split
    self._of_data = np.concatenate([*map(flicker.flicker, clips)])

  def add(self, samples: Samples) -> None:
    """Measures samples."""
    self._found += [*flicker.flicker(samples.images)]

  def result(self) -> tuple[dict, dict]:
    """The metrics of all samples, and the clips of the data (JSON)."""
    about = {'split': self._split, 'count': len(self._of_data)}
    return {
      'flicker': estimate.mean(self._found),
      'flicker_of_data': estimate.mean(self._of_data),
    }, {'flicker': about}


class OfShapes:
  """Metrics of images or clips of shapes, added batch by batch."""

  def __init__(
    self,
    stage: Stage,
    names: Sequence[str],
    features: shapes_features.Features | None,
  ):
    """Measures those of `names` that it knows; `features` are for 'frechet'."""
    config = stage.config
    self._names, self._vocabulary = names, make_vocabulary()
    self._marks, self._statements = [], []
    self._widths, self._widths_of_data = [], []
    self._features, self._found = features, None
    if features:
      self._found = fid.Statistics(features.width)
    if 'edge_width' in names:
      self._data = make_source(
        config, held_out_split(config), stage.resolutions[-1]
      )

  def add(self, samples: Samples) -> None:
    """Measures samples."""
    images, statements = samples.images, samples.statements
    if 'prompt_accuracy' in self._names:
      self._statements += statements
      self._marks += [
        motion.score(sample, stated, self._vocabulary)
        for sample, stated in zip(images, statements, strict=True)
      ]
    if 'edge_width' in self._names:
      for row, image, stated in zip(
        samples.rows, images, statements, strict=True
      ):
        if prompt_accuracy.is_one_plain_object(stated):
          data = self._data[row % len(self._data)]['image']
          self._widths.append(edge_width.edge_width(image))
          self._widths_of_data.append(edge_width.edge_width(data))
    if self._features:
      self._found.update(self._features.encode(images))

  def result(self) -> tuple[dict, dict]:
    """The metrics of all samples, and their settings."""
    found, settings = {}, {}
    if self._marks:
      found |= validation.accuracies(self._marks, self._statements)
    for name, widths in (
      ('edge_width', self._widths),
      ('edge_width_of_data', self._widths_of_data),
    ):
      if widths := [width for width in widths if width is not None]:
        found[name] = estimate.mean(widths)
      elif 'edge_width' in self._names:
        logging.warning('%s: no image has an outline to measure.', name)
    if self._features:
      reference, count = self._features.reference(), self._found.count
      found['frechet'] = Estimate(
        fid.frechet_distance(self._found, reference.statistics), count
      )
      of_data = self._features.of_data(count)
      found['frechet_of_data'] = Estimate(
        fid.frechet_distance(of_data, reference.statistics), count
      )
      found['frechet_of_halves'] = Estimate(
        shapes_features.halves(reference), len(reference.rows) // 2
      )
      settings['frechet'] = self._features.settings
    return found, settings


def compare(
  names: Sequence[str],
  sample: fid.Sample,
  reference: fid.Sample,
  of_frames: bool = False,
) -> tuple[dict, dict]:
  """Metrics of a set of images against a reference, and their settings.

  Args:
    names: of the metrics.
    sample: features of the images.
    reference: features to compare with.
    of_frames: whether the images are frames of clips. They depend on each
      other, so that the standard error of the precision is not known.
  """
  counts = sample.statistics.count, reference.statistics.count
  metrics = {}
  settings = {'num_samples': counts[0], 'num_reference': counts[1]}
  if 'fid' in names:
    metrics['fid'] = Estimate(
      fid.frechet_distance(sample.statistics, reference.statistics), counts[0]
    )
  if 'kid' in names:
    kid, deviation = fid.kernel_distance(
      sample.rows, reference.rows, **_SUBSETS
    )
    # Subsets of one set overlap: their deviation is not the standard error.
    metrics['kid'] = Estimate(kid, len(sample.rows))
    metrics['kid_standard_deviation'] = deviation
    settings['kid'] = _SUBSETS
  if 'precision_recall' in names:
    precision, recall = fid.precision_recall(
      sample.rows, reference.rows, _NEIGHBOURS
    )
    count = len(sample.rows)
    metrics['precision'] = (
      Estimate(precision, count)
      if of_frames
      else estimate.of_share(precision, count)
    )
    # It depends on the samples that span the manifold, not on rows alone.
    metrics['recall'] = Estimate(recall, len(reference.rows))
    settings['precision_recall'] = {'neighbours': _NEIGHBOURS}
  if {'kid', 'precision_recall'} & set(names):
    settings['rows'] = [len(sample.rows), len(reference.rows)]
  return metrics, settings
