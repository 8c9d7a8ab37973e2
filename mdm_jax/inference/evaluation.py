"""Metrics of models and of image folders, with the settings they depend on.

The settings are what someone else needs to get the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders import ranges
from mdm_jax.builders.check import metric_names
from mdm_jax.builders.config import AUTOENCODER, sampler_settings
from mdm_jax.builders.data import held_out_split, loss_names, make_source
from mdm_jax.builders.model import frames
from mdm_jax.builders.prompts import (
  can_score_prompts,
  make_prompts,
)
from mdm_jax.builders.stage import Stage, make_stages
from mdm_jax.eval import fid, i3d, prompt_accuracy
from mdm_jax.inference import (
  feature_extractors,
  references,
  sample_metrics,
  shapes_features,
  validation,
)
from mdm_jax.inference.sample_metrics import Samples
from mdm_jax.inference.session import Model
from mdm_jax.report.evaluations import Evaluation
from mdm_jax.report.sample_directory import SampleDirectory
from mdm_jax.runtime import buckets, directory_lock, sharding, value_types
from mdm_jax.steps.evaluate import make_band_step
from mdm_jax.steps.sample import SampleFn

METRICS = ranges.METRICS
# Metrics that compare two sets of images.
SET_METRICS = ('fid', 'kid', 'precision_recall')
# The options that nothing else uses.
_NEEDED_BY = {
  'reference': SET_METRICS,
  'inception': SET_METRICS,
  'clip': ('clip',),
  'i3d': ('fvd',),
}
# Metrics of images of shapes, whose prompts state all that they show.
_OF_SHAPES = ('prompt_accuracy', 'edge_width', 'frechet')
_OF_CLIPS = ('flicker', 'fvd')
# What metrics yield that have several values, or one of another name.
_VALUES = {
  'edge_width': ('edge_width', 'edge_width_of_data'),
  'frechet': ('frechet', 'frechet_of_data', 'frechet_of_halves'),
  'kid': ('kid', 'kid_standard_deviation'),
  'precision_recall': ('precision', 'recall'),
  'clip': ('clip_score',),
  'flicker': ('flicker', 'flicker_of_data'),
}
_NUM_BANDS = 10
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
    i3d: file of the FVD's weights.
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
  i3d: str | None = None
  cache: str | None = None


def make_options(given: Mapping[str, Any]) -> Options:
  """Options of which those that are None have their defaults."""
  return Options(
    **{name: value for name, value in given.items() if value is not None}
  )


def check_options(
  config: ConfigDict, options: Options, stage: str | None = None
) -> None:
  """Checks options before a run is trained, or its weights are read.

  Args:
    config: of the run.
    options: what is to be measured.
    stage: name of the stage; None for the last one.

  Raises:
    ValueError: these metrics cannot be computed of the stage.
  """
  measured = _section(config, stage)
  if measured.kind == AUTOENCODER:
    raise ValueError(
      f'stage {measured.name!r} is an autoencoder, which makes no images of '
      'prompts: measure a stage of diffusion.'
    )
  _check_options(config, options, frames(config, measured)[-1])


def value_names(
  config: ConfigDict, options: Options, stage: str | None = None
) -> list[str]:
  """Names of the numbers that an evaluation can find; some may have no value.

  Args:
    config, options, stage: as for `check_options`, which accepts them.
  """
  measured = _section(config, stage)
  losses, scores = metric_names(config, measured)
  by_objects = [
    f'{score}_{prompt_accuracy.group_name(count)}'
    for count in (1, 2)
    for score in scores
  ]
  values = {**_VALUES, 'loss': losses, 'prompt_accuracy': scores + by_objects}
  of_clips = frames(config, measured)[-1] > 1
  return [
    value
    for name in _select_for_run(config, options, of_clips)
    for value in values.get(name, (name,))
  ]


def _section(config: ConfigDict, stage: str | None) -> ConfigDict:
  """The section of the stage of this name; of the last one if there is none."""
  stages = {each.name: each for each in config.stages}
  return stages.get(stage, config.stages[-1])


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
  sample_metrics.check_count(names, len(folder), f'--images={images}')
  reference, about = references.of_folder(
    options.reference, network, batch_size, options.cache, options.resolution
  )
  sample_metrics.check_reference(names, reference)
  batches = feature_extractors.log_progress(
    folder.batches(batch_size), len(folder), f'images of {images}'
  )
  sample = feature_extractors.collect(network, batches, len(folder))
  metrics, settings = sample_metrics.compare(names, sample, reference)
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
  shape = model.stage.model.image_shapes[-1]
  names = _check_options(config, options, shape[0] if len(shape) == 4 else 1)
  settings = {
    'workdir': str(model.workdir),
    **model.description,
    'resolution': model.stage.resolutions[-1],
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'jax': jax.__version__,
  }
  # First, so that a file that cannot be used ends it early.
  of_samples, metrics = _sample_metrics(model, names, options), {}
  if 'loss' in names:
    metrics = _losses(model)
    settings['loss'] = validation.loss_settings(model.stage)
  if of_samples:
    of_samples, about = _evaluate_samples(
      model, of_samples, options, sample_fn, settings
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
  metrics: Sequence[sample_metrics.SampleMetric],
  options: Options,
  sample_fn: SampleFn,
  settings: dict,
) -> tuple[dict, dict]:
  """Metrics of samples, and their settings; writes the first samples."""
  with _first_samples(model, options) as saved:
    found, about = _measure_samples(model, metrics, options, sample_fn, saved)
    about |= validation.sample_settings(
      model.stage, _count(model, options), options.seed
    )
    chance = validation.chance(model.stage)
    scalars = {
      name: f'{value:.4g}'
      + (f' (chance {chance[name]:.2g})' if name in chance else '')
      for name, value in found.items()
      if not isinstance(value, dict)
    }
    try:
      if saved:
        saved.finish({'Metrics': scalars, 'Settings': settings | about})
    except buckets.errors() as error:
      # The metrics may have taken hours.
      logging.warning('The page of the samples cannot be written: %s', error)
  return found, about


def _check_options(
  config: ConfigDict, options: Options, num_frames: int
) -> Sequence[str]:
  """The metrics to compute for a run.

  Args:
    config: of the run.
    options: what to measure.
    num_frames: of the clips that the model samples; 1 for images.

  Raises:
    ValueError: an option is wrong, or there are too few images for a metric.
  """
  names = _select_for_run(config, options, num_frames > 1)
  if options.resolution and not options.reference:
    raise ValueError(
      '--resolution is that of images in directories: give --reference too.'
    )
  count = options.num_samples or config.eval.num_prompts
  value_types.check_seeds('--seed', options.seed, count)
  if 'fvd' in names and num_frames < i3d.MIN_FRAMES:
    raise ValueError(
      f'--metrics=fvd needs clips of {i3d.MIN_FRAMES} frames or more, and '
      f'those of the model have {num_frames}.'
    )
  for name in names:
    rows = num_frames if name in SET_METRICS else 1
    sample_metrics.check_count([name], count * rows, f'--num_samples={count}')
    # Directories, and the images that `frechet` makes, have their own number.
    if name != 'frechet' and not options.reference:
      number = options.num_reference
      sample_metrics.check_count(
        [name], number * rows, f'--num_reference={number}'
      )
  return names


def _select_for_run(
  config: ConfigDict, options: Options, of_clips: bool
) -> Sequence[str]:
  """The metrics to compute for a run, see `_select`.

  Args:
    config: of the run.
    options: what to measure.
    of_clips: whether the model samples clips.
  """
  has_clips = any(level.frames > 1 for level in config.model.levels)
  left_out = set() if of_clips else set(_OF_CLIPS)
  if not can_score_prompts(config):
    left_out |= set(_OF_SHAPES)
  elif has_clips:
    left_out |= {'edge_width', 'frechet'}
  possible = tuple(name for name in METRICS if name not in left_out)
  default = [
    name
    for name in ('loss', 'prompt_accuracy', 'edge_width', 'flicker')
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
  if 'fvd' in names and not options.i3d:
    raise ValueError(
      '--metrics=fvd needs --i3d=FILE, rgb_imagenet.pt: see docs/evaluation.md.'
    )
  if 'fvd' in names and options.reference:
    raise ValueError(
      '--metrics=fvd compares with clips of the data set, and --reference is a '
      'directory of images: leave one of them out.'
    )
  if 'clip' in names and not options.clip:
    raise ValueError(
      '--metrics=clip needs --clip=DIR, such as a download of '
      'openai/clip-vit-base-patch16: see docs/evaluation.md.'
    )
  for option, metrics in _NEEDED_BY.items():
    if getattr(options, option) and not set(names) & set(metrics):
      raise ValueError(
        f'--{option} is for the metrics {", ".join(metrics)}: add one of them '
        'to --metrics, or leave it out.'
      )
  return names


def _reference(
  model: Model, options: Options, network: feature_extractors.FeatureNetwork
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


@contextlib.contextmanager
def _first_samples(
  model: Model, options: Options
) -> Iterator[SampleDirectory | None]:
  """Where the samples that are written to disk go.

  None while another evaluation writes there, or if nothing can be written:
  commands that read a run are never refused.
  """
  config, count = model.stage.config, _count(model, options)
  captions = make_prompts(config, count, range(min(count, _SAVED))).captions
  about = model.description | sampler_settings(config)
  directory = (
    epath.Path(model.workdir)
    / 'eval'
    / f'{model.stage.name}_{model.weights.step}'
  )
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(directory_lock.holding(directory))
    except directory_lock.NotWritable as error:
      logging.warning('%s This evaluation writes no samples.', error)
      yield None
      return
    yield SampleDirectory(
      directory,
      [
        {'prompt': caption, 'seed': options.seed + i, **about}
        for i, caption in enumerate(captions)
      ],
    )


def _losses(model: Model) -> dict[str, Any]:
  """Held-out losses of each level, over all noise and by bands of it."""
  stage = model.stage
  shards = sharding.batch_shards(model.mesh)
  if stage.batch_size % shards:
    raise ValueError(
      f'--metrics=loss is of batches of {stage.batch_size}, as in training, '
      f'which {shards} devices cannot share: give the other metrics, or fewer '
      'devices.'
    )
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
  totals = validation.mean_losses(found, validation.count_held_out(stage))
  return dict(zip(names, totals)) | {'losses_by_noise': bands}


def _measure_samples(
  model: Model,
  metrics: Sequence[sample_metrics.SampleMetric],
  options: Options,
  sample_fn: SampleFn,
  saved: SampleDirectory | None,
) -> tuple[dict, dict]:
  """Samples batch by batch; keeps only features, scores and first images."""
  config, count = model.stage.config, _count(model, options)
  size = config.eval.batch_size
  missing = set(saved.missing) if saved else ()

  def batches() -> Iterator[Samples]:
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
        yield Samples(
          levels[-1],
          rows[part],
          prompts.captions[part],
          prompts.statements and prompts.statements[part],
        )

  for samples in feature_extractors.log_progress(batches(), count, 'samples'):
    for metric in metrics:
      metric.add(samples)
  found, settings = {}, {}
  for metric in metrics:
    values, about = metric.result()
    found |= values
    settings |= about
  return found, settings


def _sample_metrics(
  model: Model, names: Sequence[str], options: Options
) -> list[sample_metrics.SampleMetric]:
  """What measures the samples, with its networks and references loaded."""
  stage, mesh, found = model.stage, model.mesh, []
  size, count = stage.config.eval.batch_size, _count(model, options)
  if set(names) & set(SET_METRICS):
    network = feature_extractors.Inception(options.inception, size, mesh)
    reference = _reference(model, options, network)
    shape = stage.model.image_shapes[-1]
    rows = count * network.num_rows(shape)
    found.append(
      sample_metrics.OfSets(len(shape) == 4, names, network, rows, *reference)
    )
  if 'fvd' in names:
    network = feature_extractors.I3D(options.i3d, size, mesh)
    reference = _reference(model, options, network)
    found.append(
      sample_metrics.VideoDistance(['fvd'], network, count, *reference)
    )
  if 'clip' in names:
    network = feature_extractors.Clip(options.clip, size, mesh)
    found.append(sample_metrics.ClipScore(network))
  if 'flicker' in names:
    split = options.reference_split or held_out_split(stage.config)
    source = make_source(stage.config, split, stage.resolutions[-1])
    clips = references.images_of_split(stage, split, min(count, len(source)))
    found.append(sample_metrics.Flicker(clips, split))
  if set(names) & set(_OF_SHAPES):
    features = None
    if 'frechet' in names:
      features = shapes_features.Features(stage.resolutions[-1], options.cache)
    found.append(sample_metrics.OfShapes(stage, names, features))
  return found
