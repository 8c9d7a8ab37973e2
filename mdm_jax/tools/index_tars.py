"""Indexes captioned images in tars, to train on them without a copy.

  python -m mdm_jax.tools.index_tars --input='…/*.tar' --output=DIR

The tars must be uncompressed and on a local disk. Only their headers are read,
which takes seconds where prepare_data takes hours. Images are not checked:
training replaces records that cannot be used.
"""

import sys

from absl import app, flags

from mdm_jax.data import tar_index, tars
from mdm_jax.runtime import command, directory_lock


def main(argv: list[str]) -> None:
  """Runs `write_index` with the flags and prints the size of each split."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  values = flags.FLAGS
  try:
    with directory_lock.holding_file(values.output):
      counts = tar_index.write_index(
        tars.find(values.input), values.output, values.validation_fraction
      )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  for split, count in counts.items():
    print(f'{split}: {count}')


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flags.DEFINE_multi_string(
    'input', None, 'Glob of tars; may be repeated.', required=True
  )
  flags.DEFINE_string(
    'output', None, 'Directory to write the index to.', required=True
  )
  flags.DEFINE_float(
    'validation_fraction',
    0.01,
    'Fraction of the records for the validation split.',
  )
  command.run(main)
