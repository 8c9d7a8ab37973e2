"""Writes the EMA weights of a trained model to one file.

  python -m mdm_jax.tools.export_weights --workdir=DIR --output=FILE.safetensors

`--names=release` writes the network alone, with the names and layout of Apple's
`ml-mdm`, whose code loads it from a FILE.pth. PyTorch is not needed to write
one. `mdm_jax.tools.import_ml_mdm` reads both kinds of files with these names.
"""

import sys

from absl import flags, logging
from etils import epath
import numpy as np
import safetensors.numpy

from mdm_jax.runtime import command, directory_lock, flag_types, value_types


def main(_: list[str]) -> None:
  """Exports the weights of a run."""
  from mdm_jax.report import (
    console,
  )  # Slow to import, and not needed for --help.

  console.setup_logging()
  try:
    values = flags.FLAGS
    with directory_lock.holding_file(values.output):
      export(values.workdir, values.output, values.names)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


def export(workdir: str, output: str, names: str) -> None:
  """Writes the EMA weights of the newest stage.

  Args:
    workdir: working directory of the run.
    output: file to write, .safetensors, or .pth with the names 'release'.
    names: 'ours', a parameter's path joined by '.', or 'release', ml-mdm's.

  Raises:
    FileNotFoundError: the run has no checkpoints.
    ValueError: the suffix of `output` is wrong, or no checkpoint is good.
  """
  from flax import traverse_util

  from mdm_jax.builders.model import make_levels
  from mdm_jax.inference import session
  from mdm_jax.interop import ml_mdm, torch_checkpoint
  from mdm_jax.runtime import files

  output = epath.Path(output)
  suffixes = (
    ('.safetensors', '.pth') if names == 'release' else ('.safetensors',)
  )
  if output.suffix not in suffixes:
    raise ValueError(
      f'--output={output} must end in {" or ".join(suffixes)} with '
      f'--names={names}.'
    )
  config, weights = session.read_weights(workdir)
  params = weights.params
  if names == 'ours':
    tensors = traverse_util.flatten_dict(params, sep='.')
  else:
    if further := params.keys() - {'unet', 'text_encoder'}:
      raise ValueError(
        f'--names=release: ml-mdm has nothing like {min(further)!r}, which '
        'this model needs; give --names=ours.'
      )
    levels = make_levels(config, config.stages[weights.index])
    tensors = ml_mdm.to_release(params['unet'], levels)
    if 'text_encoder' in params:
      logging.warning(
        'The text encoder, which was trained with the network, is not '
        'exported: ml-mdm has none like it.'
      )
  with files.replacing(output) as temporary:
    if output.suffix == '.pth':
      torch_checkpoint.write_state_dict(temporary, tensors)
    else:
      # safetensors ignores strides.
      contiguous = {
        name: np.ascontiguousarray(value) for name, value in tensors.items()
      }
      safetensors.numpy.save_file(contiguous, temporary)
  logging.info('Wrote %d tensors to %s.', len(tensors), output)


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flag_types.define(
    'workdir',
    None,
    value_types.RUN,
    'Working directory of the run.',
    required=True,
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('file', output=True, suffixes=('.safetensors', '.pth')),
    'File to write, .safetensors or .pth.',
    required=True,
  )
  flag_types.define(
    'names',
    'ours',
    value_types.Choice(('ours', 'release')),
    "Names of the parameters: this project's, or those of Apple's ml-mdm.",
  )
  command.run(main)
