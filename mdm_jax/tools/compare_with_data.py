r"""Writes an image of samples beside the images of the data set.

  python -m mdm_jax.tools.compare_with_data --workdir=runs/shapes_64 \
      --output=comparison.png

Each cell shows one caption of the held-out split: the samples of all levels,
coarse to fine, and then the image that the data set has for this caption. The
records are the first ones of the split, so nothing is selected.
"""

import sys

from absl import flags, logging

from mdm_jax.inference import run_flags
from mdm_jax.runtime import command, cpu, flag_types, value_types

_OUTPUT = flag_types.define(
  'output',
  None,
  value_types.Path('file', output=True),
  'PNG file to write.',
  required=True,
)
_SPLIT = flag_types.define(
  'split',
  None,
  value_types.Choice(('train', 'validation', 'held_out')),
  'Split of the data set. Default: the held-out one.',
)
_NUM_IMAGES = flag_types.integer(
  'num_images', 16, 1, 1000, 'Number of captions.'
)
_SEED = flag_types.define('seed', 0, value_types.SEED, 'Sample i has seed + i.')


def main(_: list[str]) -> None:
  """Samples, and writes the image."""
  # Slow to import, and not needed for --help.
  from mdm_jax.inference import split_images
  from mdm_jax.inference.pipeline import load
  from mdm_jax.report import console, grid
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  try:
    value_types.check_seeds('--seed', _SEED.value, _NUM_IMAGES.value)
    model = load(run_flags.workdir(), **run_flags.model())
    data = split_images.read(model.model.stage, _SPLIT.value, _NUM_IMAGES.value)
    samples = model.sample(
      data.prompts,
      seed=[_SEED.value + i for i in range(len(data.prompts))],
      **run_flags.sampling(),
    )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  grid.save_png(
    _OUTPUT.value, grid.grid([*samples.levels, data.images], data.captions)
  )
  logging.info('Wrote %s.', _OUTPUT.value)


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('workdir')
  command.run(main)
