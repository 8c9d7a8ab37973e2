"""Makes a working directory of weights that Apple's `ml-mdm` released.

  python -m mdm_jax.tools.import_ml_mdm --checkpoint=vis_model_64x64.pth \
      --config=configs/flickr_64.py --config.text.path=T5 --workdir=DIR

`mdm_jax.sample` draws with it; `mdm_jax.main` with the same config and
working directory trains on from it, or grows the next stage out of it. Needs
no PyTorch, and nothing that the file names is run.
"""

import json
import sys

from absl import app, flags, logging
from ml_collections import config_flags


def main(argv: list[str]) -> None:
  """Flags to one call."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  from mdm_jax import metrics  # Slow to import, and not needed for --help.

  metrics.setup_logging()
  try:
    values = flags.FLAGS
    import_checkpoint(values.checkpoint, values.config, values.workdir)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')


def import_checkpoint(path: str, config, workdir: str) -> None:
  """Writes the weights as step 0 of the stage that they fit.

  That stage is the last with as many levels as the file. It counts as
  finished if another one follows.

  Raises:
    ValueError, FileNotFoundError: the file is damaged, its tensors are not
      the config's, or the working directory has checkpoints already.
  """
  from mdm_jax import build, checkpoint, hugging_face, torch_files
  from mdm_jax.models import release

  read = (
    hugging_face.read_file
    if str(path).endswith('.safetensors')
    else torch_files.read_state_dict
  )
  tensors = read(path)
  num_levels = 1 + max(name.count('inner_unet.') for name in tensors)
  stages = [
    index
    for index, stage in enumerate(config.stages)
    if stage.num_levels == num_levels
  ]
  if not stages:
    raise ValueError(
      f'{path} has {num_levels} levels, the stages of the config have '
      f'{[stage.num_levels for stage in config.stages]}: give its config.'
    )
  index = stages[-1]
  model = build.make_model(config, config.stages[index])
  shapes = model.shapes(config.text.max_length)
  if set(shapes) != {'unet'}:
    raise ValueError(
      f'text.encoder={config.text.encoder!r} is trained with the network, '
      "but the file holds none: use 't5'."
    )
  params = {
    'unet': release.from_release(shapes['unet'], model.unet.levels, tensors)
  }

  directory = build.stage_directory(workdir, config, index)
  if directory.exists():
    raise ValueError(f'{directory} exists: give another --workdir.')
  checkpoint.write_config(workdir, json.loads(config.to_json()))
  checkpoints = checkpoint.Checkpoints(
    directory, save_interval=1, max_to_keep=1
  )
  checkpoints.save(0, {'ema': params}, {'imported': str(path)}, force=True)
  del tensors, params  # Orbax has copied them, and writes its copies yet.
  checkpoints.close()
  if index < len(config.stages) - 1:
    checkpoint.mark_finished(directory, 0)
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
    'config', None, 'One whose levels are those of the file.'
  )
  flags.DEFINE_string(
    'checkpoint',
    None,
    'The .pth file, or a .safetensors with such names.',
    required=True,
  )
  flags.DEFINE_string('workdir', None, 'To be made.', required=True)
  flags.mark_flag_as_required('config')
  app.run(main)
