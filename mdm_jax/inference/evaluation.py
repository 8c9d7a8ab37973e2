"""Metrics of models and of image folders, with the settings they depend on.

The settings are what someone else needs to get the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders import ranges
from mdm_jax.builders.config import sampler_settings
from mdm_jax.builders.data import held_out_split, loss_names, make_source
from mdm_jax.builders.prompts import (
  can_score_prompts,
  is_moving,
  make_prompts,
  make_vocabulary,
)
from mdm_jax.builders.stage import Stage, make_stages
from mdm_jax.eval import edge_width, estimate, fid, motion, prompt_accuracy
from mdm_jax.eval.estimate import Estimate
from mdm_jax.inference import (
  feature_extractors,
  references,
  shapes_features,
  validation,
)
from mdm_jax.inference.session import Model
from mdm_jax.report.evaluations import Evaluation
from mdm_jax.report.sample_directory import SampleDirectory
from mdm_jax.runtime import value_types
from mdm_jax.steps.evaluate import make_band_step
from mdm_jax.steps.sample import SampleFn

METRICS = ranges.METRICS
# Metrics that compare two sets of images.
SET_METRICS = ('fid', 'kid', 'precision_recall')
# Metrics of images of shapes, whose prompts state all that they show.
_OF_SHAPES = ('prompt_accuracy', 'edge_width', 'frechet')
_NUM_BANDS = 10
_SUBSETS = {'subset_size': 1000, 'num_subsets': 100, 'seed': 0}
_NEIGHBOURS = 3
_PROMPTS_AT_ONCE = 1024
_SAVED = 64  # sampled images that are written to disk


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured, and with what.

  Attributes:
    metrics: some of METRICS; None for those that need no files, but `frechet`,
      which trains a classifier.
    num_samples: images to sample; None for as many as training does.
    seed: sample i has seed + i.
    num_reference: images of the data set to compare with, at most.
    reference_split: of the data set; None for the held-out one.
    reference: a directory of images to compare with instead.
    resolution: in pixels a side, to which images of directories are cropped and
      resized; None if they all have one size.
    inception: file of the FID's Inception weights.
    clip: directory of a CLIP as Hugging Face lays it out.
    cache: directory of cached reference features; None for the user's own.
  """

  metrics: Sequence[str] | None = None
  num_samples: int | None = None
  seed: int = validation.GRID_PROMPTS  # As at the end of training.
  num_reference: int = 10_000
  reference_split: str | None = None
  reference: str | None = None
  resolution: int | None = None
  inception: str | None = None
  clip: str | None = None
  cache: str | None = None


def make_options(given: Mapping[str, Any]) -> Options:
  """Options of which those that are None have their defaults."""
  return Options(
    **{name: value for name, value in given.items() if value is not None}
  )


class _Extractors(NamedTuple):
  """Networks that see images; None for those that no metric needs."""

  inception: feature_extractors.Inception | None
  clip: feature_extractors.Clip | None
  shapes: shapes_features.Features | None


def check_options(config: ConfigDict, options: Options) -> None:
  """Raises ValueError if these metrics cannot be computed of a run."""
  _select_for_run(config, options)


def evaluate_folder(
  images: str, options: Options, batch_size: int, mesh: Mesh
) -> Evaluation:
  """Compares a directory of images with that of `options.reference`.

  Raises:
    ValueError, FileNotFoundError: an option is wrong, an image or the
      weights cannot be used.
  """
  names = _select(options, SET_METRICS, SET_METRICS)
  if not options.reference:
    raise ValueError('--images needs --reference=DIR to compare with.')
  network = feature_extractors.Inception(options.inception, batch_size, mesh)
  folder = feature_extractors.ImageFolder(images, options.resolution)
  reference, about = references.of_folder(
    options.reference, network, batch_size, options.cache, options.resolution
  )
  batches = feature_extractors.log_progress(
    folder.batches(batch_size), len(folder), f'images of {images}'
  )
  sample = feature_extractors.collect(network, batches, len(folder))
  metrics, settings = _compare(names, sample, reference)
  return Evaluation(
    metrics,
    settings
    | {
      'images': {
        'directory': images,
        'files': folder.fingerprint(),
        'resolution': options.resolution,
      },
      'reference': about,
    },
  )


def evaluate_run(
  model: Model, options: Options, sample_fn: SampleFn, trained: Stage
) -> Evaluation:
  """Measures a stage of a run.

  The first samples are written to `eval/<stage>_<step>/`, with an
  `index.html`.

  Args:
    model: the stage, with weights.
    options: what to measure.
    sample_fn: samples images with `model.params`.
    trained: the stage with the options of the run's own config.

  Raises:
    ValueError, FileNotFoundError: an option is wrong, or a file cannot be used.
  """
  config = model.stage.config
  names = _select_for_run(config, options)
  if options.resolution and not options.reference:
    raise ValueError(
      '--resolution is that of images in directories: give --reference too.'
    )
  count = options.num_samples or config.eval.num_prompts
  value_types.check_seeds('--seed', options.seed, count)
  if count < 2 and {'fid', 'frechet'} & set(names):
    raise ValueError(
      f'--num_samples={count}: a Fréchet distance needs 2 samples or more.'
    )
  extractors = _load_extractors(names, options, model)
  settings = {
    'workdir': str(model.workdir),
    **model.description,
    'resolution': model.stage.resolutions[-1],
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'jax': jax.__version__,
  }
  metrics = {}
  if 'loss' in names:
    metrics = _losses(model)
    settings['loss'] = validation.loss_settings(model.stage)
  if set(names) - {'loss'}:
    of_samples, about = _evaluate_samples(
      model, names, options, extractors, sample_fn, settings
    )
    metrics |= of_samples
    settings |= about
  return Evaluation(
    metrics,
    settings,
    validation.chance(model.stage),
    # At its end, training measures the last stage.
    validation.find_earlier(make_stages(trained.config)[-1], model.workdir),
  )


def _evaluate_samples(
  model: Model,
  names: Sequence[str],
  options: Options,
  extractors: _Extractors,
  sample_fn: SampleFn,
  settings: dict,
) -> tuple[dict, dict]:
  """Metrics of samples, and their settings; writes the first samples."""
  reference, about = None, {}
  if extractors.inception:
    reference, about['reference'] = _reference(
      model, options, extractors.inception
    )
  if extractors.clip:
    about['clip'] = extractors.clip.fingerprint
  if extractors.shapes:
    about['frechet'] = extractors.shapes.settings
  saved = _first_samples(model, options)
  metrics, of_metrics = _measure_samples(
    model, names, options, extractors, sample_fn, reference, saved
  )
  about |= of_metrics | validation.sample_settings(
    model.stage, _count(model, options), options.seed
  )
  chance = validation.chance(model.stage)
  scalars = {
    name: f'{value:.4g}'
    + (f' (chance {chance[name]:.2g})' if name in chance else '')
    for name, value in metrics.items()
    if not isinstance(value, dict)
  }
  saved.finish({'Metrics': scalars, 'Settings': settings | about})
  return metrics, about


def _select_for_run(config: ConfigDict, options: Options) -> Sequence[str]:
  """The metrics to compute for a run, see `_select`."""
  can_score = can_score_prompts(config)
  possible = tuple(
    name for name in METRICS if can_score or name not in _OF_SHAPES
  )
  if is_moving(config):
    possible = 'loss', 'prompt_accuracy'
  elif any(level.frames > 1 for level in config.model.levels):
    possible = ('loss',)  # All others are of images.
  default = [
    name
    for name in ('loss', 'prompt_accuracy', 'edge_width')
    if name in possible
  ]
  names = _select(options, possible, default)
  labels = config.text.encoder == 'label' and not config.text.class_names
  if 'clip' in names and labels:
    raise ValueError(
      '--metrics=clip needs words, but text.class_names is '
      'empty: the captions are numbers.'
    )
  return names


def _select(
  options: Options, possible: Sequence[str], default: Sequence[str]
) -> Sequence[str]:
  """The metrics to compute, checked.

  Raises:
    ValueError: a metric is not possible, or the weights that it needs are not
      given.
  """
  names = default if options.metrics is None else options.metrics
  if not names:
    raise ValueError(f'--metrics is empty: give some of {",".join(possible)}.')
  for name in names:
    if name not in possible:
      raise ValueError(
        f'--metrics={name}: here they are some of {",".join(possible)}.'
      )
  if set(names) & set(SET_METRICS) and not options.inception:
    raise ValueError(
      f'--metrics={",".join(names)} needs --inception=FILE, '
      'pt_inception-2015-12-05-6726825d.pth: see docs/evaluation.md.'
    )
  if 'clip' in names and not options.clip:
    raise ValueError(
      '--metrics=clip needs --clip=DIR, such as a download of '
      'openai/clip-vit-base-patch16: see docs/evaluation.md.'
    )
  return names


def _load_extractors(
  names: Sequence[str], options: Options, model: Model
) -> _Extractors:
  size, mesh = model.stage.config.eval.batch_size, model.mesh
  inception = clip = None
  if set(names) & set(SET_METRICS):
    inception = feature_extractors.Inception(options.inception, size, mesh)
  if 'clip' in names:
    clip = feature_extractors.Clip(options.clip, size, mesh)
  shapes = None
  if 'frechet' in names:
    shapes = shapes_features.Features(
      model.stage.resolutions[-1], model.stage.config.seed, options.cache
    )
  return _Extractors(inception, clip, shapes)


def _reference(
  model: Model, options: Options, network: feature_extractors.Inception
) -> tuple[fid.Sample, dict]:
  if options.reference:
    batch_size = model.stage.config.eval.batch_size
    return references.of_folder(
      options.reference, network, batch_size, options.cache, options.resolution
    )
  return references.of_split(
    model.stage,
    network,
    options.reference_split,
    options.num_reference,
    options.cache,
  )


def _count(model: Model, options: Options) -> int:
  return options.num_samples or model.stage.config.eval.num_prompts


def _first_samples(model: Model, options: Options) -> SampleDirectory:
  """Where the samples that are written to disk go."""
  config, count = model.stage.config, _count(model, options)
  captions = make_prompts(config, count, range(min(count, _SAVED))).captions
  about = model.description | sampler_settings(config)
  return SampleDirectory(
    epath.Path(model.workdir)
    / 'eval'
    / f'{model.stage.name}_{model.weights.step}',
    [
      {'prompt': caption, 'seed': options.seed + i, **about}
      for i, caption in enumerate(captions)
    ],
  )


def _losses(model: Model) -> dict[str, Any]:
  """Held-out losses of each level, over all noise and by bands of it."""
  stage = model.stage
  validation.warn_if_not_held_out(stage)
  band_step = jax.jit(
    make_band_step(
      stage.model, stage.objective, validation.LOSS_SEED, _NUM_BANDS
    )
  )
  found = list(
    validation.over_held_out(stage, model.mesh, model.params, band_step)
  )
  sums, counts, _ = np.sum(found, axis=0, dtype=np.float64)
  names = loss_names(stage.config, stage.level_names)
  bands = {'noise': [f'{10 * i} to {10 * i + 10} %' for i in range(_NUM_BANDS)]}
  for name, row, number in zip(names, sums, counts):
    bands[name] = [
      float(each / n) if n else None for each, n in zip(row, number)
    ]
  bands['examples'] = [int(n) for n in counts[0]]
  totals = validation.mean_losses(found)
  return dict(zip(names, totals)) | {'losses_by_noise': bands}


def _compare(
  names: Sequence[str], sample: fid.Sample, reference: fid.Sample
) -> tuple[dict, dict]:
  """Metrics of a set of images against a reference, and their settings."""
  counts = sample.statistics.count, reference.statistics.count
  metrics = {}
  settings = {'num_samples': counts[0], 'num_reference': counts[1]}
  if 'fid' in names:
    metrics['fid'] = Estimate(
      fid.frechet_distance(sample.statistics, reference.statistics), counts[0]
    )
  if 'kid' in names:
    rows = len(sample.rows), len(reference.rows)
    kid, deviation = fid.kernel_distance(
      sample.rows, reference.rows, **_SUBSETS
    )
    # Subsets that are a whole set say nothing of how exact it is.
    is_known = min(rows) > _SUBSETS['subset_size']
    metrics['kid'] = Estimate(kid, rows[0], deviation if is_known else None)
    metrics['kid_standard_deviation'] = deviation
    settings['kid'] = _SUBSETS
  if 'precision_recall' in names:
    precision, recall = fid.precision_recall(
      sample.rows, reference.rows, _NEIGHBOURS
    )
    metrics['precision'] = estimate.of_share(precision, len(sample.rows))
    metrics['recall'] = estimate.of_share(recall, len(reference.rows))
    settings['precision_recall'] = {'neighbours': _NEIGHBOURS}
  if {'kid', 'precision_recall'} & set(names):
    settings['rows'] = [len(sample.rows), len(reference.rows)]
  return metrics, settings


class _OfShapes:
  """Metrics of images or clips of shapes, added batch by batch."""

  def __init__(
    self,
    model: Model,
    names: Sequence[str],
    features: shapes_features.Features | None,
  ):
    config = model.stage.config
    self._names, self._vocabulary = names, make_vocabulary()
    self._marks, self._statements = [], []
    self._widths, self._widths_of_data = [], []
    self._features, self._found = features, None
    if features:
      self._found = fid.Statistics(features.width)
    if 'edge_width' in names:
      self._data = make_source(
        config, held_out_split(config), model.stage.resolutions[-1]
      )

  def add(
    self, rows: Sequence[int], images: np.ndarray, statements: Sequence[dict]
  ) -> None:
    """Adds samples uint8 [B, R, R, 3] of the prompts with indices `rows`."""
    if 'prompt_accuracy' in self._names:
      self._statements += statements
      self._marks += [
        motion.score(sample, stated, self._vocabulary)
        for sample, stated in zip(images, statements, strict=True)
      ]
    if 'edge_width' in self._names:
      for row, image, stated in zip(rows, images, statements, strict=True):
        if prompt_accuracy.is_one_plain_object(stated):
          data = self._data[row % len(self._data)]['image']
          self._widths.append(edge_width.edge_width(image))
          self._widths_of_data.append(edge_width.edge_width(data))
    if self._features:
      self._found.update(self._features.encode(images))

  def metrics(self) -> dict[str, Estimate]:
    """The metrics of all images."""
    found = {}
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
    return found


def _measure_samples(
  model: Model,
  names: Sequence[str],
  options: Options,
  extractors: _Extractors,
  sample_fn: SampleFn,
  reference: fid.Sample | None,
  saved: SampleDirectory,
) -> tuple[dict, dict]:
  """Samples batch by batch; keeps only features, scores and first images."""
  config, count = model.stage.config, _count(model, options)
  size, scores, missing = config.eval.batch_size, [], set(saved.missing)
  of_shapes = None
  if set(names) & set(_OF_SHAPES):
    of_shapes = _OfShapes(model, names, extractors.shapes)

  def batches() -> Iterator[np.ndarray]:
    for first in range(0, count, _PROMPTS_AT_ONCE):
      rows = range(first, min(first + _PROMPTS_AT_ONCE, count))
      prompts = make_prompts(config, count, rows)
      for start in range(0, len(rows), size):
        part = slice(start, start + size)
        seeds = [options.seed + row for row in rows[part]]
        levels = sample_fn(model.params, prompts.text[part], seeds)
        for row, *image in zip(rows[part], *levels):
          if row in missing:
            saved.add(row, image)
        images = levels[-1]
        if of_shapes:
          of_shapes.add(rows[part], images, prompts.statements[part])
        if extractors.clip:
          scores.append(extractors.clip.scores(images, prompts.captions[part]))
        yield images

  images = feature_extractors.log_progress(batches(), count, 'samples')
  metrics, settings = {}, {}
  if extractors.inception:
    sample = feature_extractors.collect(extractors.inception, images, count)
    metrics, settings = _compare(names, sample, reference)
  else:
    for _ in images:
      pass
  if extractors.clip:
    metrics['clip_score'] = estimate.mean(np.concatenate(scores))
  if of_shapes:
    metrics |= of_shapes.metrics()
  return metrics, settings
