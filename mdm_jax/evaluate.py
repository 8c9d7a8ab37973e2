r"""Measures a trained model, with the settings that its metrics depend on.

  python -m mdm_jax.evaluate --workdir=runs/shapes_64
  python -m mdm_jax.evaluate --workdir=runs/shapes_64 --num_samples=10000 \
      --metrics=fid,kid --inception=pt_inception-2015-12-05-6726825d.pth

Or compares two directories of images, without a model:

  python -m mdm_jax.evaluate --images=DIR --reference=DIR \
      --inception=pt_inception-2015-12-05-6726825d.pth

All images of a directory have one size, or are cropped and resized to
--resolution. Of samples that mdm_jax.sample wrote, the finest level is used.
"""

import json
import pathlib
import sys

from absl import logging

from mdm_jax.inference import run_flags
from mdm_jax.runtime import command, cpu, flag_types, value_types

# `evaluation.METRICS`, which imports JAX; a test compares them.
_METRIC_NAMES = (
  'loss',
  'prompt_accuracy',
  'fid',
  'kid',
  'precision_recall',
  'clip',
)

_METRICS = flag_types.define(
  'metrics',
  None,
  value_types.List(value_types.Choice(_METRIC_NAMES)),
  'Some of loss, prompt_accuracy, fid, kid, precision_recall, clip. Default: '
  'the first two, which need no files; for directories fid, kid and '
  'precision_recall.',
)
_NUM_SAMPLES = flag_types.integer(
  'num_samples',
  None,
  1,
  10**7,
  'Images to sample. Default: eval.num_prompts of the config.',
)
_SEED = flag_types.define(
  'seed',
  None,
  value_types.SEED,
  'Sample i has seed + i. Default: as at the end of training.',
)
_LOSS_BATCHES = flag_types.integer(
  'loss_batches',
  None,
  1,
  10**6,
  'Batches of the held-out loss. Default: eval.loss_batches of the config.',
)
_INCEPTION = flag_types.define(
  'inception',
  None,
  value_types.Path('file'),
  'File pt_inception-2015-12-05-6726825d.pth, for fid, kid and '
  'precision_recall.',
)
_CLIP = flag_types.define(
  'clip',
  None,
  value_types.Path('directory'),
  'Directory of a CLIP as Hugging Face lays it out, for clip.',
)
_NUM_REFERENCE = flag_types.integer(
  'num_reference',
  None,
  1,
  10**9,
  'Images of the data set to compare with, at most. Default: 10,000.',
)
_REFERENCE_SPLIT = flag_types.define(
  'reference_split',
  None,
  value_types.Text('the name of a split', r'\S.*'),
  'Split of the data set to compare with. Default: the held-out one.',
)
_REFERENCE = flag_types.define(
  'reference',
  None,
  value_types.Path('directory'),
  'Directory of images to compare with, instead of the data set.',
)
_IMAGES = flag_types.define(
  'images',
  None,
  value_types.Path('directory'),
  'Directory of images to measure, such as one that mdm_jax.sample wrote, '
  'instead of a --workdir.',
)
_RESOLUTION = flag_types.integer(
  'resolution',
  None,
  1,
  2**16,
  'Side in pixels, to which the centre square of each image of --images and '
  '--reference is resized. Default: as they are, all of one size.',
)
_CACHE = flag_types.define(
  'cache',
  None,
  value_types.Path('directory', output=True),
  'Directory of cached reference features. Default: '
  '~/.cache/mdm_jax/references.',
)
_OUTPUT = flag_types.define(
  'output',
  None,
  value_types.Path('file', output=True),
  'File to which metrics and settings are appended, as a line of JSON. '
  'Default: WORKDIR/eval/<stage>_<step>.jsonl, or none for --images.',
)


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  # Slow to import, and not needed for --help.
  from mdm_jax.inference import evaluation, session
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache, sharding

  console.setup_logging()
  compilation_cache.enable()
  given = {
    'metrics': _METRICS.value,
    'num_samples': _NUM_SAMPLES.value,
    'seed': _SEED.value,
    'num_reference': _NUM_REFERENCE.value,
    'reference_split': _REFERENCE_SPLIT.value,
    'reference': _REFERENCE.value,
    'resolution': _RESOLUTION.value,
    'inception': _INCEPTION.value,
    'clip': _CLIP.value,
    'cache': _CACHE.value,
  }
  options = evaluation.Options(
    **{name: value for name, value in given.items() if value is not None}
  )
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
  workdir = run_flags.workdir()
  try:
    if bool(workdir) == bool(_IMAGES.value):
      raise ValueError('give either --workdir, or --images and --reference.')
    if _IMAGES.value:
      mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'spatial': 1})
      batch_size = sharding.round_up(run_flags.batch_size() or 16, mesh)
      result = evaluation.evaluate_folder(
        _IMAGES.value, options, batch_size, mesh
      )
    else:
      changes = run_flags.options()
      changes['evaluation']['loss_batches'] = _LOSS_BATCHES.value
      value_types.check_outputs(pathlib.Path(workdir, 'eval'))
      opened = session.open_run(workdir, **changes)
      result = evaluation.evaluate_run(opened, options)
      output = output or pathlib.Path(
        workdir, 'eval', '{stage}_{step}.jsonl'.format(**result.settings)
      )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  _print(result.metrics, console)
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open('a') as lines:
      lines.write(json.dumps(result._asdict()) + '\n')
    logging.info('Added to %s.', output)


def _print(metrics: dict, console) -> None:
  """Logs tables, and then all numbers in one table."""
  tables = {
    name: value for name, value in metrics.items() if isinstance(value, dict)
  }
  for name, columns in tables.items():
    logging.info(
      '%s:\n%s',
      name.replace('_', ' ').capitalize(),
      console.table(list(zip(*columns.values())), list(columns)),
    )
  logging.info(
    'Metrics:\n%s',
    console.table(
      [
        [name.replace('_', ' '), value]
        for name, value in metrics.items()
        if name not in tables
      ],
      ['metric', 'value'],
    ),
  )


if __name__ == '__main__':
  cpu.use_huge_pages()
  command.run(main)
