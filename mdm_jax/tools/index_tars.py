"""Indexes captioned images in tars, to train on them without a copy.

  python -m mdm_jax.tools.index_tars --input='…/*.tar' --output=DIR

The tars must be uncompressed, on a disk or in a bucket; so may DIR. On a disk
only their headers are read, which takes seconds where prepare_data takes hours;
from a bucket all of them are. Images are not checked: training replaces records
that cannot be used. Tars and members that cannot be read are listed in
DIR/rejects.jsonl.
"""

import sys

from absl import flags

from mdm_jax.data import tar_index, tars
from mdm_jax.runtime import (
  command,
  directory_lock,
  flag_types,
  remote_reads,
  value_types,
)


def main(_: list[str]) -> None:
  """Runs `write_index` with the flags and prints the size of each split."""
  values = flags.FLAGS
  try:
    with directory_lock.holding_file(values.output):
      counts = tar_index.write_index(
        tars.find(values.input), values.output, values.validation_fraction
      )
  except (ValueError, OSError, remote_reads.Unavailable) as error:
    sys.exit(f'error: {error}')
  for split, count in counts.items():
    print(f'{split}: {count}')
  for reason, count in tar_index.read_index(values.output)['rejected'].items():
    print(f'skipped, {reason}: {count}')


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flag_types.define_repeated(
    'input',
    None,
    value_types.Path('glob'),
    'Glob of tars',
    required=True,
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('directory', output=True),
    'Directory to write the index to.',
    required=True,
  )
  flag_types.define(
    'validation_fraction',
    0.01,
    value_types.Number(float, 0, 1, below=True),
    'Fraction of the records for the validation split.',
  )
  command.run(main)
