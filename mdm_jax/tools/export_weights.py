"""Writes a trained model's averaged weights to one file.

  python -m mdm_jax.tools.export_weights --workdir=DIR --output=FILE.safetensors

`--names=release` gives them the names and the layout of Apple's `ml-mdm`, for
which only the network is written. FILE.pth is then what its code loads; no
PyTorch is needed to write it. `mdm_jax.tools.import_ml_mdm` reads both back.
"""

import pathlib
import sys

from absl import app, flags, logging
import numpy as np
import safetensors.numpy


def main(argv: list[str]) -> None:
  """Flags to one call."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  from mdm_jax import metrics  # Slow to import, and not needed for --help.

  metrics.setup_logging()
  try:
    values = flags.FLAGS
    export(values.workdir, values.output, values.names)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')


def export(workdir: str, output: str, names: str) -> None:
  """Writes the newest stage's averaged parameters.

  Args:
    workdir: of a training run.
    output: ends in .safetensors, or in .pth with names 'release'.
    names: 'ours', a parameter's path joined by '.', or 'release'.

  Raises:
    ValueError, FileNotFoundError: there is nothing to export, or no way to.
  """
  from flax import traverse_util

  from mdm_jax import build, checkpoint, torch_files, trained
  from mdm_jax.models import release

  output = pathlib.Path(output)
  suffixes = (
    ('.safetensors', '.pth') if names == 'release' else ('.safetensors',)
  )
  if output.suffix not in suffixes:
    raise ValueError(
      f'--output={output} must end in {" or ".join(suffixes)} with '
      f'--names={names}.'
    )
  config = build.load_config(checkpoint.read_config(workdir))
  index, _, params = trained.restore_average(config, workdir)
  if names == 'ours':
    tensors = traverse_util.flatten_dict(params, sep='.')
  else:
    levels = build.make_levels(config, config.stages[index])
    tensors = release.to_release(params['unet'], levels)
    if 'text_encoder' in params:
      logging.warning(
        'The text encoder was trained along: ml-mdm has none '
        'like it, so it is left out.'
      )
  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_name(f'{output.name}.tmp')
  if output.suffix == '.pth':
    torch_files.write_state_dict(temporary, tensors)
  else:
    # It writes memory as it lies.
    safetensors.numpy.save_file(
      {name: np.ascontiguousarray(value) for name, value in tensors.items()},
      temporary,
    )
  temporary.replace(output)
  logging.info('Wrote %d tensors to %s.', len(tensors), output)


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flags.DEFINE_string('workdir', None, 'Of the training run.', required=True)
  flags.DEFINE_string(
    'output', None, 'The .safetensors or .pth file.', required=True
  )
  flags.DEFINE_enum(
    'names', 'ours', ['ours', 'release'], "This project's, or ml-mdm's."
  )
  app.run(main)
