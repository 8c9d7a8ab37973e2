"""Makes a working directory from weights that Apple's `ml-mdm` released.

  python -m mdm_jax.tools.import_ml_mdm --checkpoint=vis_model_64x64.pth \
      --config=configs/flickr_64.py --config.text.path=T5 --workdir=DIR

`mdm_jax.sample` samples with it; `mdm_jax.main` with the same config and
working directory fine-tunes the model, or grows the next stage from it. PyTorch
is not needed, and no code in the file is run.
"""

import json
import sys

from absl import flags, logging

from mdm_jax.builders import recipes
from mdm_jax.runtime import flag_types, value_types
from mdm_jax.runtime.printable import command


def main(_: list[str]) -> None:
  """Imports a checkpoint."""
  # Slow to import, and not needed for --help.
  from mdm_jax.report import console

  console.setup_logging()
  try:
    values = flags.FLAGS
    import_checkpoint(values.checkpoint, values.config, values.workdir)
  except (ValueError, OSError) as error:
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
  from mdm_jax.interop import hugging_face, ml_mdm

  tensors = hugging_face.select(hugging_face.open_tensors(path), ml_mdm.NAMES)
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
    'Imported %s as stage %d of %s.\nNext:\n  %s',
    path,
    index + 1,
    workdir,
    command('sample', workdir=workdir, prompt='a cat in the snow'),
  )


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  recipes.define('Recipe with the levels of the model in the file.')
  flag_types.define(
    'checkpoint',
    None,
    value_types.Path('file'),
    "File to import: a .pth of ml-mdm, or a .safetensors with ml-mdm's names.",
    required=True,
  )
  flag_types.define(
    'workdir',
    None,
    value_types.Path('directory', output=True),
    'Working directory to create.',
    required=True,
  )
  flag_types.run(main, recipes.parse_flags)
