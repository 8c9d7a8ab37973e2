"""The evaluations of a sweep of a finished run: samplers and EMAs."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path
import numpy as np

from mdm_jax.builders import ranges, sweep_grid
from mdm_jax.builders.check import check
from mdm_jax.builders.config import (
  differences,
  sampler_settings,
  stage_directory,
)
from mdm_jax.builders.text import empty_text
from mdm_jax.checkpoint import manifest
from mdm_jax.diffusion import guidance
from mdm_jax.inference import evaluation
from mdm_jax.inference.session import Model, Session
from mdm_jax.inference.weights import saved_weights
from mdm_jax.report import sweep_results
from mdm_jax.report.sweep_results import Results
from mdm_jax.runtime import files
from mdm_jax.steps.sample import SampleFn, make_sample_steps

_SIGMA_REL = 'sigma_rel'
# Of weights: whether they are post-hoc, and their directory.
_KINDS = {'EMA': (False, 'checkpoints'), 'post-hoc EMA': (True, 'averages')}


def parse(config: ConfigDict, key: str, text: str) -> tuple[str, Any]:
  """A key that needs no training, and the value that a text means.

  Raises:
    ValueError: it is another key, or the value is wrong.
  """
  if key == _SIGMA_REL:
    try:
      value = None if text == 'none' else ranges.SIGMA_REL.parse(text)
      return key, value
    except ValueError:
      raise ValueError(
        f'--grid: {key}={text}: give {ranges.SIGMA_REL}, or none for the EMA '
        "with the optimizer's decay."
      ) from None
  if not key.startswith('sampler.'):
    raise ValueError(
      f'--grid: {key}={text}: of a finished run, give sigma_rel or a key of '
      'sampler, such as sampler.guidance; --config trains with other keys.'
    )
  return sweep_grid.parse(config, key, text)


def evaluate(
  opened: Session,
  points: Sequence[sweep_grid.Changes],
  options: evaluation.Options,
  *,
  output: epath.Path,
  metrics: Sequence[str],
  plot: str | None = None,
) -> Results:
  """Evaluates a run with each combination that has no results yet.

  Args:
    opened: the run.
    points: values of sigma_rel and of keys of sampler, for each evaluation.
    options: what is measured.
    output: directory of the results, and of samples of each evaluation.
    metrics, plot: as for `sweep_training.train`.

  Raises:
    ValueError, FileNotFoundError: a value is wrong, the run lacks weights, the
      directory is of something else, or there is no such metric.
  """
  config = opened.config
  evaluation.check_options(config, options, opened.stage)
  for point in points:
    changed = sweep_grid.changed(config, _of_sampler(point))
    check(changed, opened.mesh, training=False)
  results = sweep_results.read(
    output,
    metrics,
    lambda key: (
      None if key == _SIGMA_REL else config_path.get_value(key, config)
    ),
  )
  steps = _steps(opened, points)
  settings = {
    'workdir': str(opened.workdir),
    **steps,
    **dataclasses.asdict(options),
    'num_samples': options.num_samples or config.eval.num_prompts,
    'sampler': sampler_settings(config),
  }
  _check_settings(results, settings)
  names = [
    name
    for kind in _KINDS
    if kind in steps
    for name in evaluation.value_names(config, options, steps[kind][0])
  ]
  sweep_results.require_metrics(metrics, names)
  # The weights of a width are loaded once.
  points = sorted(points, key=lambda point: point.get(_SIGMA_REL) or 0)
  width, model, programs = -1, None, {}
  for i, point in enumerate(points):
    if results.find(point):
      continue
    if width != point.get(_SIGMA_REL):
      width, model = point.get(_SIGMA_REL), None  # Frees the memory first.
      model = dataclasses.replace(opened, sigma_rel=width).restore()
    name = sweep_grid.run_name(point)
    logging.info('Evaluation %d of %d: %s', i + 1, len(points), name)
    found = _measure(
      model, _of_sampler(point), options, programs, output / name
    )
    results.add(
      name, point, status=sweep_results.FINISHED, settings=settings, **found
    )
    results.write(plot)
  results.write(plot)
  return results


def _of_sampler(point: sweep_grid.Changes) -> dict[str, Any]:
  return {key: point[key] for key in point if key != _SIGMA_REL}


def _steps(
  opened: Session, points: Sequence[sweep_grid.Changes]
) -> dict[str, Any]:
  """The stage, step and fingerprint of the weights that are evaluated.

  Raises:
    ValueError: the run lacks some of them, or the stage.
  """
  found = [
    saved
    for saved in saved_weights(opened.config, opened.workdir, opened.stage)
    if not saved.best
  ]
  names = {each.name: i for i, each in enumerate(opened.config.stages)}
  steps = {}
  for kind, (is_post_hoc, directory) in _KINDS.items():
    if any(bool(point.get(_SIGMA_REL)) == is_post_hoc for point in points):
      saved = [
        each for each in found if (each.sigma_rel is not None) == is_post_hoc
      ]
      if not saved:
        remedy = 'set averages.widths when training, see docs/post_hoc_ema.md'
        raise ValueError(
          f'{opened.workdir} has no {kind}: '
          f'{remedy if is_post_hoc else "train longer first"}.'
        )
      stage, step, *_ = saved[0]
      steps[kind] = [stage, step]
      # Earlier results lack it.
      steps[f'fingerprint of the {kind}'] = manifest.fingerprint(
        stage_directory(opened.workdir, opened.config, names[stage], directory)
        / str(step)
      )
  return steps


def _check_settings(results: Results, settings: dict[str, Any]) -> None:
  """Raises ValueError if there are results that were measured otherwise."""
  for run in results.runs.values():
    if not run.settings:
      raise ValueError(
        f'--output={results.directory} is a sweep of trainings: give another '
        'directory.'
      )
    # Another grid may need other weights.
    known = {key: run.settings[key] for key in run.settings if key in settings}
    wanted = {key: settings[key] for key in known}
    if found := differences(known, wanted):
      raise ValueError(
        f'--output={results.directory} has results of other settings '
        f'({"; ".join(found[:5])}): give another directory.'
      )


def _measure(
  model: Model,
  changes: sweep_grid.Changes,
  options: evaluation.Options,
  programs: dict,
  directory: epath.Path,
) -> dict[str, Any]:
  """Metrics, their standard errors, and the seconds of an image.

  Args:
    model: with the weights.
    changes: of the sampler.
    options: what is measured.
    programs: compiled samplers, see `_make_sample_fn`.
    directory: for some of the samples.
  """
  changed = model.changed(
    {key.removeprefix('sampler.'): value for key, value in changes.items()}, {}
  )
  sample_fn, times = _make_sample_fn(changed, programs)
  found = evaluation.evaluate_run(
    dataclasses.replace(changed, workdir=str(directory)),
    options,
    sample_fn,
    model.stage,
  )
  logging.info('%s', found)
  metrics = {
    name: float(value)
    for name, value in found.values.items()
    if files.is_number(value)
  }
  return {
    'metrics': metrics,
    'errors': {
      name: getattr(found.values[name], 'standard_error', None)
      for name in metrics
    },
    'seconds': sum(times) / len(times) if times else None,
  }


def _make_sample_fn(
  model: Model, programs: dict
) -> tuple[SampleFn, list[float]]:
  """A sampler that is compiled once for all steps, guidance and weights.

  Guidance 1, which is none, has a program of its own.

  Args:
    model: with the options of the sampler.
    programs: those that are compiled already, to which it is added.

  Returns:
    The function, and a list to which it adds the seconds of an image of each
    batch, but for the one with which it was compiled.
  """
  config = model.stage.config
  sampler = model.stage.make_sampler(model.mesh)
  size, spec, times = config.eval.batch_size, sampler.spec, []
  # Post-hoc EMAs may be those of an earlier stage.
  kind = (
    model.stage.name,
    dataclasses.replace(spec, num_steps=0, guidance=0),
    guidance.is_none(spec.guidance),
  )
  negative = np.broadcast_to(
    empty_text(config), (size, *empty_text(config).shape)
  )

  def sample_fn(params, text, seeds):
    batches = []
    for start in range(0, len(text), size):
      if is_new := kind not in programs:
        shardings = jax.tree.map(lambda x: x.sharding, params)
        programs[kind] = make_sample_steps(sampler, shardings)
      rows = np.arange(start, start + size) % len(text)
      inputs = text[rows], negative, np.asarray(seeds)[rows]
      begin = time.monotonic()
      for images in programs[kind](
        params, *inputs, spec.num_steps, spec.guidance
      ):
        # One step at a time: with many in flight, collectives between the cores
        # of a CPU have deadlocked.
        jax.block_until_ready(images)
      left = len(text) - start
      batches.append([np.asarray(level)[:left] for level in images])
      if not is_new:
        times.append((time.monotonic() - begin) / size)
    return tuple(map(np.concatenate, zip(*batches)))

  return sample_fn, times
