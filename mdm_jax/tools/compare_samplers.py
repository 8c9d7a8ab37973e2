"""Compares samplers and numbers of steps on a model of shapes.

  python -m mdm_jax.tools.compare_samplers --workdir=runs/shapes_64

Samples the same held-out prompts with each sampler and number of steps, scores
the images by their prompts, and measures the Fréchet distance to held-out
images in the features of a small classifier, which it trains first, and caches.
"""

import itertools
import json
import sys
import time
from typing import Any

from absl import flags, logging
from etils import epath

from mdm_jax.builders import ranges
from mdm_jax.runtime import (
  command,
  cpu,
  directory_lock,
  flag_types,
  value_types,
)


def main(_: list[str]) -> None:
  """Compares samplers, prints a table, and plots it."""
  from mdm_jax.inference import session
  from mdm_jax.report import console, plots
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  values = flags.FLAGS
  try:
    if values.plot:
      plots.check_installed()
    pairs = itertools.product(values.steps, values.samplers)
    # Once each, also if a number or a name is given twice.
    cases = list(dict.fromkeys((name, steps) for steps, name in pairs))
    path = epath.Path(
      values.output or epath.Path(values.workdir) / 'samplers.json'
    )
    value_types.check_outputs(path.parent)
    opened = session.open_run(values.workdir)
    _check(opened, cases)
    with directory_lock.holding_file(path):
      known = _read(path)
      found = _compare(opened.restore(), cases, path, known)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  found.sort(
    key=lambda one: (
      cases.index((one['sampler'], one['steps']))
      if (one['sampler'], one['steps']) in cases
      else len(cases)
    )
  )
  chance = _chance()
  print(
    console.table(
      [
        [
          one['sampler'],
          one['steps'],
          f'{one["accuracy"]:.1%}',
          f'{one["color"]:.1%}',
          f'{one["shape"]:.1%}',
          f'{one["frechet"]:.2f}',
          f'{one["seconds_per_image"]:.2f}',
        ]
        for one in found
      ]
      + [
        ['chance', None]
        + [f'{chance[name]:.1%}' for name in ('accuracy', 'color', 'shape')]
        + [None, None]
      ],
      ['sampler', 'steps', 'accuracy', 'color', 'shape', 'distance', 's/image'],
    )
  )
  if values.plot:
    _plot(found, values.plot)


def _check(opened, cases: list[tuple[str, int]]) -> None:
  """Raises ValueError if images cannot be scored, or a case is wrong."""
  from mdm_jax.builders.check import check
  from mdm_jax.builders.prompts import can_score_prompts

  config = opened.config
  if not can_score_prompts(config):
    raise ValueError(
      f'{opened.workdir} was not trained on captions of shapes, whose '
      'images alone can be scored.'
    )
  if any(level.frames > 1 for level in config.model.levels):
    raise ValueError(
      f'{opened.workdir} has clips, and images alone are compared: measure '
      'clips by mdm_jax.tools.sweep.'
    )
  for name, steps in cases:
    changed = config.copy_and_resolve_references()
    changed.sampler.update(name=name, num_steps=steps)
    check(changed, opened.mesh, training=False)


def _read(path: epath.Path) -> list[dict[str, Any]]:
  """Earlier results; raises ValueError if a file has something else."""
  from mdm_jax.runtime import files

  if not path.exists():
    return []

  def is_valid(found):
    return isinstance(found, list) and all(
      isinstance(one, dict) and {'sampler', 'steps'} <= one.keys()
      for one in found
    )

  try:
    return files.read_json(path, is_valid)
  except files.UnreadableFile as error:
    raise ValueError(
      f'{path} has no results of this command (it {error.reason}): give '
      'another --output.'
    ) from None


def _compare(
  model,
  cases: list[tuple[str, int]],
  path: epath.Path,
  known: list[dict[str, Any]],
) -> list[dict[str, Any]]:
  """Measures the cases that are not in a results file, and adds them to it.

  Args:
    model: an opened model.
    cases: pairs of a sampler and a number of steps.
    path: the JSON file of results.
    known: the results in it.

  Returns:
    All results with this model and these settings, old and new.
  """
  from mdm_jax.builders.prompts import make_prompts
  from mdm_jax.runtime import files

  values, config = flags.FLAGS, model.stage.config
  found, others = [], []
  for one in known:
    (found if _is_of(one, model) else others).append(one)
  done = {(one['sampler'], one['steps']) for one in found}
  prompts = make_prompts(config, values.num_images)
  distance = _make_distance(model.stage.resolutions[-1])
  for name, steps in cases:
    if (name, steps) in done:
      continue
    images, seconds = _sample(model, name, steps, prompts)
    found.append(
      {
        'sampler': name,
        'steps': steps,
        **_settings(model, name),
        'seconds_per_image': seconds,
        'frechet': distance(images),
        **_accuracy(images, prompts),
      }
    )
    # After each case, so that an interrupted command loses little.
    files.write_json(path, others + found)
    logging.info(
      '%s, %d steps: accuracy %.1f %%, distance %.2f, %.2f s an image.',
      name,
      steps,
      100 * found[-1]['accuracy'],
      found[-1]['frechet'],
      seconds,
    )
  return found


def _settings(model, name: str) -> dict[str, Any]:
  """What results of a sampler depend on beside its number of steps. JSON."""
  from mdm_jax.builders.config import sampler_settings
  from mdm_jax.inference import shapes_features

  values = flags.FLAGS
  config = model.stage.config.copy_and_resolve_references()
  config.sampler.name = name
  sampler = sampler_settings(config)
  del sampler['name'], sampler['num_steps']
  classifier = (values.classifier_images, values.classifier_steps)
  if config.seed != shapes_features.SEED:
    # Earlier results are of a classifier with the seed of the run.
    classifier += (shapes_features.SEED,)
  settings = {
    **model.description,
    'images': values.num_images,
    'classifier': classifier,
    **sampler,
  }
  # To compare with results from disk, where tuples have become lists.
  return json.loads(json.dumps(settings))


def _is_of(one: dict[str, Any], model) -> bool:
  """Whether a result is of a model and these settings."""
  settings = _settings(model, one['sampler'])
  if settings.get('eta') == 0 and 'eta' not in one:
    # Earlier results lack it where the run's own sampler was another.
    del settings['eta']
  return one | settings == one


def _sample(model, name: str, steps: int, prompts):
  """Images of the finest level for the prompts, and seconds for each."""
  sample_fn = model.stage.make_sample_fn(
    model.mesh, model.params, name=name, num_steps=steps
  )
  size, count = model.stage.config.eval.batch_size, len(prompts.text)
  sample_fn(model.params, prompts.text[:size], range(size))  # Compiles.
  begin = time.monotonic()
  images = sample_fn(model.params, prompts.text, range(count))[-1]
  return images, (time.monotonic() - begin) / count


def _accuracy(images, prompts) -> dict[str, float]:
  """Prompt accuracy of each attribute, and 'accuracy', their mean.

  The mean excludes `all`, the share of images with every attribute right.
  """
  import numpy as np

  from mdm_jax.builders.prompts import make_vocabulary
  from mdm_jax.eval import prompt_accuracy

  marks = prompt_accuracy.accuracy(
    images, prompts.statements, make_vocabulary()
  )
  attributes = [value for name, value in marks.items() if name != 'all']
  return {'accuracy': float(np.mean(attributes)), **marks}


def _chance() -> dict[str, float]:
  """What images of other prompts score, by the names of `_accuracy`."""
  import numpy as np

  from mdm_jax.builders.prompts import chance_accuracy
  from mdm_jax.eval import prompt_accuracy

  values = chance_accuracy()
  attributes = [values[name] for name in prompt_accuracy.NAMES if name != 'all']
  return {'accuracy': float(np.mean(attributes)), **values}


def _make_distance(resolution: int):
  """Returns the Fréchet distance of uint8 [N, R, R, 3] to held-out images."""
  from mdm_jax.eval import fid
  from mdm_jax.inference import shapes_features

  features = shapes_features.Features(
    resolution,
    cache=None,
    num_images=flags.FLAGS.classifier_images,
    num_steps=flags.FLAGS.classifier_steps,
  )
  reference = features.reference()
  logging.info(
    'Fréchet distance between two halves of the held-out images: %.2f.',
    shapes_features.halves(reference),
  )

  def distance(images):
    found = fid.Statistics.of(features.encode(images))
    return fid.frechet_distance(found, reference.statistics)

  return distance


def _plot(found: list[dict], path: str) -> None:
  from mdm_jax.report import plots

  with plots.panels(path, 2) as axes:
    for axis, key, factor, label in (
      (axes[0], 'accuracy', 100, 'prompt accuracy, %'),
      (axes[1], 'frechet', 1, 'Fréchet distance'),
    ):
      for name in dict.fromkeys(one['sampler'] for one in found):
        points = sorted(
          (one['steps'], factor * one[key])
          for one in found
          if one['sampler'] == name
        )
        axis.plot(*zip(*points), marker='o', markersize=4, label=name)
      axis.set(xscale='log', xlabel='steps', ylabel=label)
      axis.set_xticks(ticks := sorted({one['steps'] for one in found}), ticks)
      axis.minorticks_off()
      axis.grid(alpha=0.3)
    axes[1].set_yscale('log')
    axes[0].legend()


if __name__ == '__main__':
  cpu.use_huge_pages()
  # Here, so that importing this module leaves other programs' flags alone.
  flag_types.define(
    'workdir',
    None,
    value_types.RUN,
    'Working directory of a run on shapes.',
    required=True,
  )
  flag_types.define(
    'samplers',
    ['ddim', 'dpm', 'heun', 'ddpm', 'dpm_sde'],
    value_types.List(ranges.KEYS['sampler.name']),
    'Samplers to compare.',
  )
  flag_types.define(
    'steps',
    [5, 10, 20, 50, 250],
    value_types.List(ranges.KEYS['sampler.num_steps']),
    'Numbers of sampling steps to compare.',
  )
  flag_types.integer(
    'num_images', 512, 2, 10**7, 'Images to sample in each case.'
  )
  flag_types.integer(
    'classifier_images',
    8192,
    8,
    10**7,
    'Images to train the classifier on. Half as many held-out images are the '
    'reference of the Fréchet distance.',
  )
  flag_types.integer(
    'classifier_steps', 1500, 1, 10**7, 'Training steps of the classifier.'
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('file', output=True),
    'JSON file for the results. Cases that it already has for the same model '
    'and settings are not measured again. Default: WORKDIR/samplers.json.',
  )
  flag_types.define(
    'plot',
    None,
    value_types.Path('file', output=True, suffixes=('.svg', '.png')),
    'File for a plot of the results, .svg or .png.',
  )
  command.run(main)
