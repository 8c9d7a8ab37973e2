"""Converts captioned images to ArrayRecords, to train on.

  python -m mdm_jax.tools.prepare_data --input=FOLDER --output=DIR

--input is a folder, or a glob of files in quotes, of one of these forms:

  images, each with a caption in a text file of the same name: a.jpg, a.txt
  images, with their captions in metadata.csv or metadata.jsonl (imagefolder)
  tars of img2dataset or webdataset
  Parquet files of img2dataset or Hugging Face

Every image is decoded as a check, and stored unchanged unless --reduce_to
makes it smaller. Unusable records are skipped, listed in DIR/rejects.jsonl and
counted by reason in DIR/summary.json; they never stop the run. If the command
is killed, the same command continues with the parts that are not finished: a
tar, a Parquet file, or some hundred images of a folder. Several machines with a
shared file system divide the parts by --part=0/4, --part=1/4, …; afterwards the
command without --part completes the data set. DIR appears when everything is
written, and can be read by `mdm_jax.data.sources` and by TFDS.

Inputs and DIR may be in a bucket. Each file is made on the local disk, in
$TMPDIR, and then uploaded.
"""

import dataclasses
import os
import sys
from typing import Any

from absl import flags

from mdm_jax.data.inputs import counted
from mdm_jax.runtime import (
  command,
  directory_lock,
  files,
  flag_types,
  value_types,
)
from mdm_jax.runtime.printable import command_line, printable
from mdm_jax.tools.conversion import Options, prepare

_CONFIG = 'configs/captioned_images.py'
# Up to this many images, a small model that memorizes them is a first check.
_FEW = 50


def describe(summary: dict[str, Any], output: str) -> str:
  """The summary of a data set in words, and the command that comes next.

  Args:
    summary: that `prepare` has returned.
    output: directory of the data set.
  """
  records, rejected = summary['records'], summary['rejected']
  inputs = [
    counted(n, noun) for noun, n in summary.items() if isinstance(n, int)
  ]
  lines = [f'{", ".join(inputs)} -> {output}']
  lines += [f'  {split}: {count}' for split, count in records.items()]
  if 'validation' not in records:
    lines.append(
      '  validation: 0 (no validation split: losses will be those of training '
      'images)'
    )
  lines += [f'  skipped, {reason}: {n}' for reason, n in rejected.items()]
  if rejected:
    lines.append(f'  (details: {os.path.join(output, "rejects.jsonl")})')
  if not files.is_local(output):
    output = f'/mnt/{output.partition("://")[2]}'
    lines.append(
      f'Mount the bucket with gcsfuse, as launch/ does: here {output}.'
    )
  path = {'config.data.path': output}
  if sum(records.values()) <= _FEW:
    lines += [
      'Next, train a small model that memorizes these images, to see that they '
      'are read correctly:',
      f'  {command_line("main", config=f"{_CONFIG}:memorize", **path)}',
      'Then train at full size:',
    ]
  else:
    lines.append('Next, train:')
  lines.append(f'  {command_line("main", config=_CONFIG, **path)}')
  return printable('\n'.join(lines))


def main(_) -> None:
  """Runs `prepare` with the flags, and prints the summary and what is next."""
  values = flags.FLAGS
  options = Options(
    **{
      field.name: values[field.name].value
      for field in dataclasses.fields(Options)
    }
  )
  try:
    with directory_lock.holding_part(
      values.output, *value_types.parse_part(values.part)
    ):
      summary = prepare(
        values.input, values.output, options, values.num_workers, values.part
      )
  except ValueError as error:
    sys.exit(f'error: {error}')
  except (OSError, RuntimeError) as error:
    sys.exit(
      f'error: {error}. Finished parts are kept: run the same command '
      'again to continue.'
    )
  if summary is None:
    print(
      'This part is finished. When all parts are, run the command without '
      '--part.'
    )
    return
  print(describe(summary, values.output))


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flag_types.define_repeated(
    'input',
    None,
    value_types.Path('input', schemes=('*',)),
    'Folder of images, tars or Parquet files, or glob in quotes',
    required=True,
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('directory', output=True),
    'Directory to write the data set to.',
    required=True,
  )
  flag_types.define(
    'name',
    Options.name,
    value_types.Text(
      'lower-case letters, digits and _', r'[a-z][a-z0-9_]*', 100
    ),
    'Name of the data set in TFDS.',
  )
  flag_types.define(
    'caption_column',
    Options.caption_column,
    value_types.Text('the name of a column', longest=1000),
    'Column of the captions in metadata.csv, metadata.jsonl or Parquet files; '
    'empty: text, caption, captions, prompt or description.',
  )
  flag_types.define(
    'validation_fraction',
    Options.validation_fraction,
    value_types.Number(float, 0, 1, below=True),
    'Fraction of the records for the validation split.',
  )
  flag_types.integer(
    'max_caption_length',
    Options.max_caption_length,
    1,
    10**9,
    'Skip records with longer captions, in characters.',
  )
  flag_types.integer(
    'min_side',
    Options.min_side,
    1,
    10**6,
    'Skip images whose shorter side has fewer pixels.',
  )
  flag_types.define(
    'max_aspect',
    Options.max_aspect,
    value_types.Number(float, 1, 10**6, also=(0,)),
    'Skip images with a larger ratio of longer to shorter side; 0: skip none.',
  )
  flags.DEFINE_boolean(
    'deduplicate', Options.deduplicate, 'Use each image file only once.'
  )
  flag_types.integer(
    'reduce_to',
    Options.reduce_to,
    0,
    10**6,
    'Reduce larger images to this shorter side in pixels, to save disk space; '
    '0: store all images unchanged.',
  )
  flag_types.integer(
    'max_pixels',
    Options.max_pixels,
    1,
    2**32,
    'Skip images of more pixels, counted as by data.max_pixels of a config.',
  )
  flag_types.integer(
    'num_workers', os.cpu_count() or 1, 1, 1000, 'Number of worker processes.'
  )
  flag_types.define(
    'part',
    '0/1',
    value_types.PART,
    'k/n: this is machine k, from 0, of n machines that share the work.',
  )
  command.run(main)
