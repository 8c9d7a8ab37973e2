"""Figures of a trained model, with the settings that make them comparable.

  python -m mdm_jax.evaluate --workdir=runs/shapes_64
  python -m mdm_jax.evaluate --workdir=runs/shapes_64 --num_samples=10000 \
      --metrics=fid,kid --inception=pt_inception-2015-12-05-6726825d.pth

Or of one directory of pictures against another, without a model:

  python -m mdm_jax.evaluate --images=DIR --reference=DIR \
      --inception=pt_inception-2015-12-05-6726825d.pth
"""

import json
import pathlib
import sys

from absl import app, flags, logging

from mdm_jax import cpu

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of the training run.')
_METRICS = flags.DEFINE_list(
  'metrics',
  None,
  'Some of loss, prompt_accuracy, fid, kid, '
  'precision_recall, clip. Default: the first two, which need no files; of '
  'directories, what compares sets.',
)
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples',
  None,
  'Pictures to draw. Default: as in the config.',
  lower_bound=1,
)
_SEED = flags.DEFINE_integer(
  'seed',
  None,
  'Picture i has seed + i. Default: as in the evaluation at '
  'the end of training.',
  lower_bound=0,
)
_SAMPLER = flags.DEFINE_string('sampler', None, 'Default: as in the config.')
_STEPS = flags.DEFINE_integer(
  'steps', None, 'Sampling steps. Default: as in the config.'
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, 'Guidance weight, 1 is none. Default: as in the config.'
)
_THRESHOLD = flags.DEFINE_string(
  'threshold',
  None,
  'What keeps predicted images in range. Default: as in the config.',
)
_LOSS_BATCHES = flags.DEFINE_integer(
  'loss_batches',
  None,
  'Held-out batches of the loss. Default: as in the config.',
  lower_bound=1,
)
_INCEPTION = flags.DEFINE_string(
  'inception',
  None,
  'pt_inception-2015-12-05-6726825d.pth, for fid, kid and precision_recall.',
)
_CLIP = flags.DEFINE_string(
  'clip', None, "A CLIP's directory, as Hugging Face lays it out."
)
_NUM_REFERENCE = flags.DEFINE_integer(
  'num_reference',
  None,
  'Pictures of the data set to compare with, at most. Default: 10,000.',
  lower_bound=1,
)
_REFERENCE_SPLIT = flags.DEFINE_string(
  'reference_split', None, 'Of the data set. Default: what is held out.'
)
_REFERENCE = flags.DEFINE_string(
  'reference',
  None,
  'A directory of pictures to compare with, instead of the data set.',
)
_IMAGES = flags.DEFINE_string(
  'images', None, 'A directory of pictures to judge, instead of a workdir.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Pictures at once. Default: as in the config, or 16.',
  lower_bound=1,
)
_CACHE = flags.DEFINE_string(
  'cache',
  None,
  'Keeps what is computed of references. Default: ~/.cache/mdm_jax/references.',
)
_WIDTH = flags.DEFINE_float(
  'width',
  None,
  'Of the average of the weights, where training has kept '
  'snapshots: see docs/averages.md. Default: the decaying average.',
)
_BEST = flags.DEFINE_boolean(
  'best', False, 'The average that training has kept as the best.'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'Figures and settings are added to this file, one JSON a '
  'line. Default: WORKDIR/eval/<stage>_<step>.jsonl, or none.',
)


def main(argv: list[str]) -> None:
  """Measures, prints, writes."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Slow to import, and not needed for --help.
  from mdm_jax import (
    build,
    checkpoint,
    checks,
    compilation_cache,
    figures,
    metrics,
    sharding,
  )

  metrics.setup_logging()
  compilation_cache.enable()
  given = {
    'metrics': _METRICS.value,
    'num_samples': _NUM_SAMPLES.value,
    'seed': _SEED.value,
    'num_reference': _NUM_REFERENCE.value,
    'reference_split': _REFERENCE_SPLIT.value,
    'reference': _REFERENCE.value,
    'inception': _INCEPTION.value,
    'clip': _CLIP.value,
    'cache': _CACHE.value,
    'width': _WIDTH.value,
    'best': _BEST.value,
  }
  options = figures.Options(
    **{name: value for name, value in given.items() if value is not None}
  )
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
  try:
    if bool(_WORKDIR.value) == bool(_IMAGES.value):
      raise ValueError('give either --workdir, or --images and --reference.')
    if _IMAGES.value:
      mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'spatial': 1})
      result = figures.of_folders(
        _IMAGES.value,
        options,
        _whole_shards(_BATCH_SIZE.value or 16, mesh),
        mesh,
      )
    else:
      config = build.load_config(checkpoint.read_config(_WORKDIR.value))
      for section, changes in [
        (
          config.sampler,
          {
            'num_steps': _STEPS.value,
            'name': _SAMPLER.value,
            'guidance': _GUIDANCE.value,
            'threshold': _THRESHOLD.value,
          },
        ),
        (
          config.eval,
          {
            'batch_size': _BATCH_SIZE.value,
            'loss_batches': _LOSS_BATCHES.value,
          },
        ),
      ]:
        section.update(
          {name: value for name, value in changes.items() if value is not None}
        )
      # Whatever it was trained on, here there may be other devices.
      config.mesh.update(data=-1, fsdp=1, spatial=1)
      cpu.use_cores(checks.parts_of_batches(config))
      mesh = sharding.make_mesh(config.mesh)
      config.eval.batch_size = _whole_shards(config.eval.batch_size, mesh)
      checks.check(config, mesh)
      result = figures.of_model(config, _WORKDIR.value, options, mesh)
      output = output or pathlib.Path(
        _WORKDIR.value, 'eval', '{stage}_{step}.jsonl'.format(**result.settings)
      )
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')

  tables = {
    name: value
    for name, value in result.figures.items()
    if isinstance(value, dict)
  }
  for name, columns in tables.items():
    logging.info(
      '%s:\n%s',
      name.replace('_', ' '),
      metrics.table(list(zip(*columns.values())), list(columns)),
    )
  logging.info(
    'Figures:\n%s',
    metrics.table(
      [
        [name.replace('_', ' '), value]
        for name, value in result.figures.items()
        if name not in tables
      ],
      ['metric', 'value'],
    ),
  )
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open('a') as lines:
      lines.write(json.dumps(result._asdict()) + '\n')
    logging.info('Added to %s.', output)


def _whole_shards(batch_size: int, mesh) -> int:
  """At least so many pictures, as many on each device."""
  from mdm_jax import sharding

  shards = sharding.batch_shards(mesh)
  return -(-batch_size // shards) * shards


if __name__ == '__main__':
  cpu.use_huge_pages()
  app.run(main)
