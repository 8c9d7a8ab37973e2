"""Figures by which models and pictures are judged, and their settings.

The settings are what another one needs to get the same figure.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax import (
  build,
  compilation_cache,
  features,
  inputs,
  sharding,
  trained,
)
from mdm_jax import step as steps
from mdm_jax.draw import DrawFn
from mdm_jax.eval import fid, prompt_accuracy
from mdm_jax.eval.pictures import Pictures
from mdm_jax.state import Params

OF_SETS = ('fid', 'kid', 'precision_recall')
METRICS = ('loss', 'prompt_accuracy', *OF_SETS, 'clip')
_LOSS_SEED = 1  # That of the evaluation at the end of training.
_NUM_BANDS = 10
_SUBSETS = {'subset_size': 1000, 'num_subsets': 100, 'seed': 0}
_NEIGHBOURS = 3
_PROMPTS_AT_ONCE = 1024
_SHOWN = 64  # pictures that are kept, to be looked at


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured, and with what.

  Attributes:
    metrics: some of METRICS; None for those that need no files.
    num_samples: pictures to draw; None for as many as training does.
    seed: picture i has seed + i.
    num_reference: pictures of the data set to compare with, at most.
    reference_split: of the data set; None for what is held out.
    reference: a directory of pictures instead.
    inception: the standard's file.
    clip: a directory as Hugging Face lays it out.
    cache: where what is computed of references is kept; None for this user's.
    width: of the parameters' average, see `trained.restore_average`.
    best: the average that is kept as the best, see there.
  """

  metrics: Sequence[str] | None = None
  num_samples: int | None = None
  seed: int = trained.GRID_PROMPTS  # As at the end of training.
  num_reference: int = 10_000
  reference_split: str | None = None
  reference: str | None = None
  inception: str | None = None
  clip: str | None = None
  cache: str | None = None
  width: float | None = None
  best: bool = False


class Result(NamedTuple):
  """What was measured.

  Attributes:
    figures: by name; a dict is a table, a list a column.
    settings: JSON.
  """

  figures: dict[str, Any]
  settings: dict[str, Any]


def of_folders(
  images: str, options: Options, batch_size: int, mesh: Mesh
) -> Result:
  """Of a directory of pictures against `options.reference`.

  Raises:
    ValueError, FileNotFoundError: an option is wrong, a picture or the
      weights cannot be used.
  """
  names = _wanted(options, OF_SETS, OF_SETS)
  if not options.reference:
    raise ValueError('--images needs --reference=DIR to compare with.')
  network = features.Inception(options.inception, batch_size, mesh)
  pictures = features.Folder(images)
  reference, about = _reference_folder(options, network, batch_size)
  sample = features.collect(
    network,
    features.reported(pictures.batches(batch_size), len(pictures), images),
    len(pictures),
  )
  figures, settings = _compare(names, sample, reference)
  return Result(
    figures,
    settings
    | {
      'images': {'directory': images, 'files': pictures.fingerprint()},
      'reference': about,
    },
  )


def of_model(
  config: ConfigDict, workdir: str, options: Options, mesh: Mesh
) -> Result:
  """Of the newest stage of a run.

  The first pictures that were drawn are in `eval/<stage>_<step>/index.html`.

  Args:
    config: of the run; its sampler draws, in its `eval.batch_size`.
    workdir: of the run.
    options: see there.
    mesh: the devices.

  Raises:
    ValueError, FileNotFoundError: an option is wrong, weights cannot be used,
      or nothing has been saved yet.
  """
  has_marks = inputs.states_what_is_seen(config)
  without_files = ('loss', 'prompt_accuracy') if has_marks else ('loss',)
  names = _wanted(
    options,
    tuple(name for name in METRICS if has_marks or name != 'prompt_accuracy'),
    without_files,
  )
  if (
    'clip' in names
    and config.text.encoder == 'label'
    and (not config.text.class_names)
  ):
    raise ValueError(
      '--metrics=clip needs words, but text.class_names is '
      'empty: the captions are numbers.'
    )
  size = config.eval.batch_size
  network = (
    features.Inception(options.inception, size, mesh)
    if (set(names) & set(OF_SETS))
    else None
  )
  clip = features.Clip(options.clip, size, mesh) if 'clip' in names else None

  average = trained.restore_average(
    config, workdir, mesh, width=options.width, best=options.best
  )
  index = average.index
  params = average.params | build.load_frozen(config, mesh)
  stage = config.stages[index]
  trained.warn_if_unfinished(config, average, options.best)
  model = trained.describe(
    config, workdir, average, width=options.width, best=options.best
  )
  settings = {
    'workdir': str(workdir),
    **model,
    'resolution': build.resolutions(config, stage)[-1],
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'jax': jax.__version__,
  }
  figures = {}
  if 'loss' in names:
    figures, settings['loss'] = _losses(config, stage, params, mesh)
  if set(names) == {'loss'}:
    return Result(figures, settings)

  reference = None
  if network:
    reference, settings['reference'] = (
      _reference_folder(options, network, size)
      if options.reference
      else _reference_split(config, stage, options, network)
    )
  if clip:
    settings['clip'] = clip.fingerprint
  shown = _first_pictures(config, workdir, options, model)
  found, about = _judge(
    config,
    names,
    options,
    trained.make_draw(config, index, mesh, params),
    params,
    network,
    clip,
    reference,
    shown,
  )
  figures |= found
  settings |= about | {
    'seed': options.seed,
    'prompts': inputs.held_out_split(config),
    'sampler': config.sampler.to_dict(),
  }
  shown.finish(
    {
      'Figures': {
        name: f'{value:.4g}'
        for name, value in figures.items()
        if not isinstance(value, dict)
      },
      'Settings': settings,
    }
  )
  return Result(figures, settings)


def _wanted(
  options: Options, possible: Sequence[str], default: Sequence[str]
) -> Sequence[str]:
  """The metrics, all of them possible and with the weights that they need."""
  names = default if options.metrics is None else options.metrics
  for name in names:
    if name not in possible:
      raise ValueError(
        f'--metrics={name}: here they are some of {",".join(possible)}.'
      )
  if set(names) & set(OF_SETS) and not options.inception:
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


def _count(config: ConfigDict, options: Options) -> int:
  return options.num_samples or config.eval.num_prompts


def _first_pictures(
  config: ConfigDict, workdir: str, options: Options, model: dict[str, Any]
) -> Pictures:
  """Where those that are kept go."""
  count = _count(config, options)
  captions = inputs.make_prompts(
    config, count, range(min(count, _SHOWN))
  ).captions
  # As JSON has it: sequences are lists there.
  sampler = {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in config.sampler.to_dict().items()
  }
  return Pictures(
    pathlib.Path(workdir, 'eval', '{stage}_{step}'.format(**model)),
    [
      {'prompt': caption, 'seed': options.seed + i, **model, **sampler}
      for i, caption in enumerate(captions)
    ],
  )


def _losses(
  config: ConfigDict, stage: ConfigDict, params: Params, mesh: Mesh
) -> tuple[dict, dict]:
  """Held-out losses of each level, of all noise and by bands."""
  model = build.make_model(config, stage)
  split = inputs.held_out_split(config)
  if split == 'train':
    logging.warning('No validation split: losses are of training images.')
  band_step = jax.jit(
    steps.make_band_step(
      model, build.make_objective(config, stage), _LOSS_SEED, _NUM_BANDS
    )
  )
  batches = inputs.make_dataset(
    config,
    split,
    model.resolutions,
    build.batch_sizes(stage),
    process_index=0,
    process_count=1,
    num_batches=config.eval.loss_batches,
  )
  sums, counts = np.sum(
    [
      band_step(params, sharding.shard_batch(batch, mesh), i)
      for i, batch in enumerate(batches)
    ],
    axis=0,
    dtype=np.float64,
  )
  names = [f'held_out_loss_{pixels}' for pixels in model.resolutions]
  bands = {'noise': [f'{10 * i} to {10 * i + 10} %' for i in range(_NUM_BANDS)]}
  for name, row, number in zip(names, sums, counts):
    bands[name] = [
      float(each / n) if n else None for each, n in zip(row, number)
    ]
  bands['examples'] = [int(n) for n in counts[0]]
  totals = sums.sum(1) / counts.sum(1)
  return dict(zip(names, map(float, totals))) | {'losses_by_noise': bands}, {
    'split': split,
    'batches': config.eval.loss_batches,
    'batch_size': stage.batch_size,
    'seed': _LOSS_SEED,
    'loss_space': config.diffusion.loss_space,
  }


def _cache(options: Options) -> pathlib.Path:
  return pathlib.Path(
    options.cache or compilation_cache.directory('references')
  )


def _reference_folder(
  options: Options, network: features.Inception, batch_size: int
) -> tuple[fid.Sample, dict]:
  """Of the pictures in a directory; and what they are."""
  folder = features.Folder(options.reference)
  about = {'files': folder.fingerprint(), 'inception': network.fingerprint}
  sample = features.cached(
    _cache(options),
    about,
    lambda: features.collect(
      network,
      features.reported(folder.batches(batch_size), len(folder), 'reference'),
      len(folder),
    ),
  )
  return sample, about | {'directory': options.reference}


def _reference_split(
  config: ConfigDict,
  stage: ConfigDict,
  options: Options,
  network: features.Inception,
) -> tuple[fid.Sample, dict]:
  """Of a split of the data set, as the stage sees it; and what it is."""
  split = options.reference_split or inputs.held_out_split(config)
  resolution = build.resolutions(config, stage)[-1]
  size = config.eval.batch_size
  source = inputs.make_source(config, split, resolution)
  count = min(options.num_reference, len(source))
  is_drawn = config.data.name == 'shapes'
  about = {
    'data': config.data.name,
    'split': split,
    'resolution': resolution,
    'count': count,
    'inception': network.fingerprint,
    'fingerprint': inputs.data_fingerprint(config),
    'files': f'seed {config.seed}' if is_drawn else source.fingerprint(),
    'long_captions': config.text.long_captions,
  }

  def batches() -> Iterator[np.ndarray]:
    left = count
    for batch in inputs.make_dataset(
      config,
      split,
      (resolution,),
      (size,),
      process_index=0,
      process_count=1,
      num_batches=-(-count // size),
    ):
      images, is_bad = batch['image'][:left], batch['bad'][:left]
      left -= len(images)
      # What replaces an unusable record is there in its own place too.
      if not is_bad.all():
        yield images[~is_bad]

  return features.cached(
    _cache(options),
    about,
    lambda: features.collect(
      network, features.reported(batches(), count, 'reference'), count
    ),
  ), about


def _compare(
  names: Sequence[str], sample: fid.Sample, reference: fid.Sample
) -> tuple[dict, dict]:
  counts = sample.statistics.count, reference.statistics.count
  figures = {}
  settings = {'num_samples': counts[0], 'num_reference': counts[1]}
  if 'fid' in names:
    width = len(reference.statistics.mean)
    if min(counts) <= width:
      logging.warning(
        'FID of %d pictures against %d: no more than its %d features, so a '
        'covariance is singular and the figure is too high. Compare it with '
        'figures of the same numbers only, or use KID.',
        *counts,
        width,
      )
    figures['fid'] = fid.frechet_distance(
      sample.statistics, reference.statistics
    )
  if 'kid' in names:
    figures['kid'], figures['kid_standard_deviation'] = fid.kernel_distance(
      sample.rows, reference.rows, **_SUBSETS
    )
    settings['kid'] = _SUBSETS
  if 'precision_recall' in names:
    figures['precision'], figures['recall'] = fid.precision_recall(
      sample.rows, reference.rows, _NEIGHBOURS
    )
    settings['precision_recall'] = {'neighbours': _NEIGHBOURS}
  if {'kid', 'precision_recall'} & set(names):
    settings['rows'] = [len(sample.rows), len(reference.rows)]
  return figures, settings


def _judge(
  config: ConfigDict,
  names: Sequence[str],
  options: Options,
  draw_fn: DrawFn,
  params: Params,
  network: features.Inception | None,
  clip: features.Clip | None,
  reference: fid.Sample | None,
  shown: Pictures,
) -> tuple[dict, dict]:
  """Draws batch by batch; keeps features, scores, marks and what is shown."""
  count = _count(config, options)
  size = config.eval.batch_size
  vocabulary = inputs.make_vocabulary()
  marks, scores, missing = [], [], set(shown.missing)

  def batches() -> Iterator[np.ndarray]:
    for first in range(0, count, _PROMPTS_AT_ONCE):
      rows = range(first, min(first + _PROMPTS_AT_ONCE, count))
      prompts = inputs.make_prompts(config, count, rows)
      for start in range(0, len(rows), size):
        part = slice(start, start + size)
        levels = draw_fn(
          params, prompts.text[part], [options.seed + row for row in rows[part]]
        )
        for row, *picture in zip(rows[part], *levels):
          if row in missing:
            shown.add(row, picture)
        pictures = levels[-1]
        if 'prompt_accuracy' in names:
          marks.extend(
            prompt_accuracy.score(picture, stated, vocabulary)
            for picture, stated in zip(pictures, prompts.statements[part])
          )
        if clip:
          scores.append(clip.scores(pictures, prompts.captions[part]))
        yield pictures

  pictures = features.reported(batches(), count, 'drawn')
  figures, settings = {}, {'num_samples': count}
  if network:
    figures, settings = _compare(
      names, features.collect(network, pictures, count), reference
    )
  else:
    for _ in pictures:
      pass
  if clip:
    figures['clip_score'] = float(np.concatenate(scores).mean())
  if marks:
    accuracy = prompt_accuracy.mean_marks(marks)
    figures |= {f'accuracy_{name}': each for name, each in accuracy.items()}
  return figures, settings
