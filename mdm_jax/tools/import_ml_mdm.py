"""Makes a working directory from weights that Apple's `ml-mdm` released.

  python -m mdm_jax.tools.import_ml_mdm --checkpoint=vis_model_64x64.pth \
      --config=configs/flickr_64.py --config.text.path=T5 --workdir=DIR

`mdm_jax.sample` samples with it; `mdm_jax.main` with the same config and
working directory fine-tunes the model, or grows the next stage from it. PyTorch
is not needed, and no code in the file is run.
"""

import json
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mdm_jax.builders import recipes
from mdm_jax.runtime import command, directory_lock


def main(argv: list[str]) -> None:
  """Imports a checkpoint."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Slow to import, and not needed for --help.
  from mdm_jax.report import console

  console.setup_logging()
  try:
    values = flags.FLAGS
    with directory_lock.holding(values.workdir):
      import_checkpoint(values.checkpoint, values.config, values.workdir)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')


def import_checkpoint(path: str, config, workdir: str) -> None:
  """Writes the weights of a file as step 0 of the stage that they fit.

  That is the last stage with as many levels as the file. It counts as finished
  if another stage follows.

  Args:
    path: a .pth or .safetensors file with ml-mdm's names.
    config: configuration of the run.
    workdir: working directory to create.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, its tensors do not fit the config, or the
      working directory has checkpoints already.
  """
  from mdm_jax.builders.config import write_config
  from mdm_jax.builders.stage import make_stage
  from mdm_jax.checkpoint import saved_steps
  from mdm_jax.checkpoint.manager import Checkpoints
  from mdm_jax.interop import hugging_face, ml_mdm, torch_checkpoint

  read = (
    hugging_face.read_file
    if str(path).endswith('.safetensors')
    else torch_checkpoint.read_state_dict
  )
  tensors = read(path)
  num_levels = 1 + max(name.count('inner_unet.') for name in tensors)
  stages = [
    index
    for index, settings in enumerate(config.stages)
    if settings.num_levels == num_levels
  ]
  if not stages:
    raise ValueError(
      f'{path} has {num_levels} levels, but the stages of the config have '
      f'{[settings.num_levels for settings in config.stages]}: give the config '
      'of this model.'
    )
  index = stages[-1]
  stage = make_stage(config, index)
  model = stage.model
  shapes = model.shapes(config.text.max_length)
  if set(shapes) != {'unet'}:
    raise ValueError(
      f'text.encoder={config.text.encoder!r} is trained with the network, '
      "but the file has no text encoder: use 't5'."
    )
  params = {
    'unet': ml_mdm.from_release(shapes['unet'], model.unet.levels, tensors)
  }

  directory = stage.directory(workdir)
  if directory.exists():
    raise ValueError(f'{directory} exists: give another --workdir.')
  write_config(workdir, json.loads(config.to_json()))
  checkpoints = Checkpoints(directory, save_interval=1, max_to_keep=1)
  checkpoints.save(0, {'ema': params}, {'imported': str(path)}, force=True)
  del tensors, params  # Orbax has copied them, and is writing the copies.
  checkpoints.close()
  if not stage.is_last:
    saved_steps.mark_finished(directory, 0)
  logging.info(
    'Imported %s as stage %d of %s.\nNext:\n  python -m mdm_jax.sample '
    '--workdir=%s --prompt="a cat in the snow"',
    path,
    index + 1,
    workdir,
    workdir,
  )


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  config_flags.DEFINE_config_file(
    'config', None, 'Recipe with the levels of the model in the file.'
  )
  flags.DEFINE_string(
    'checkpoint',
    None,
    "File to import: a .pth of ml-mdm, or a .safetensors with ml-mdm's names.",
    required=True,
  )
  flags.DEFINE_string(
    'workdir', None, 'Working directory to create.', required=True
  )
  flags.mark_flag_as_required('config')
  command.run(main, flags_parser=recipes.parse_flags)
