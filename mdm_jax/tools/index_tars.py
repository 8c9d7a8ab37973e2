"""Indexes captioned images in tars, to train on them where they are.

  python -m mdm_jax.tools.index_tars --input='…/*.tar' --output=DIR

The tars must be uncompressed and on a disk. Nothing is checked but their
headers, so that this takes seconds where prepare_data takes hours; a record
that cannot be used is replaced in training.
"""

import sys

from absl import app, flags

from mdm_jax.data import tar_index, tars


def main(argv: list[str]) -> None:
  """Flags to one call."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  values = flags.FLAGS
  try:
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
    'input', None, 'A glob of tars; may be repeated.', required=True
  )
  flags.DEFINE_string('output', None, 'The directory to make.', required=True)
  flags.DEFINE_float(
    'validation_fraction', 0.01, 'Of the records, held out of training.'
  )
  app.run(main)
