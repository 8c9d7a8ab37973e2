r"""Makes a working directory from weights that Apple's `ml-mdm` released.

  python -m mdm_jax.tools.import_ml_mdm --checkpoint=vis_model.pth \
      --config=configs/flickr_64.py --config.text.path=T5 --workdir=DIR

`mdm_jax.sample` samples with it; `mdm_jax.main` with the same config and
working directory fine-tunes the model, or grows the next stage from it. PyTorch
is not needed, and no code in the file is run.
"""

from collections.abc import Iterable, Mapping
import json
import re
import sys

from absl import flags, logging
from ml_collections import config_flags

from mdm_jax.builders import recipes
from mdm_jax.runtime import command, directory_lock, flag_types, value_types
from mdm_jax.runtime.printable import command_line


def main(_: list[str]) -> None:
  """Imports a checkpoint."""
  # Slow to import, and not needed for --help.
  from mdm_jax.report import console

  console.setup_logging()
  try:
    values = flags.FLAGS
    given = config_flags.get_override_values(values['config'])
    with directory_lock.holding(values.workdir):
      import_checkpoint(
        values.checkpoint,
        values.config,
        values.workdir,
        dtype=given.get('dtype', 'float32'),
        ignore=values.ignore,
      )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


def import_checkpoint(
  path: str,
  config,
  workdir: str,
  *,
  dtype: str = 'float32',
  ignore: str | None = None,
) -> None:
  """Writes the weights of a file as step 0 of the stage that they fit.

  That is the last stage with as many levels as the file. It counts as finished
  if another stage follows.

  Args:
    path: a .pth or .safetensors file with ml-mdm's names.
    config: configuration of the run.
    workdir: working directory to create.
    dtype: `config.dtype` of the working directory, by which it is sampled.
    ignore: regular expression; tensors that the model does not have are
      skipped if it is found in their names.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, its tensors do not fit the config, the
      working directory is of another config, has this stage or has been
      trained, or `ignore` is no regular expression or is found in no such name.
  """
  from mdm_jax.builders.config import write_config
  from mdm_jax.builders.stage import make_stage
  from mdm_jax.checkpoint import saved_steps
  from mdm_jax.checkpoint.manager import Checkpoints
  from mdm_jax.interop import hugging_face, ml_mdm

  try:
    ignored = re.compile(ignore) if ignore else None
  except re.error as error:
    raise ValueError(
      f'--ignore={ignore!r} is no regular expression: {error}.'
    ) from error
  recipe, config = config, config.copy_and_resolve_references()
  config.dtype = dtype
  tensors = hugging_face.select(hugging_face.open_tensors(path), ml_mdm.NAMES)
  index = _stage_of(path, tensors, config)
  stage = make_stage(config, index)
  params = _params(stage, tensors, ignored)

  directory = stage.directory(workdir)
  # A save that was broken off leaves no step, and is done again.
  if saved_steps.good_steps(directory):
    raise ValueError(f'{directory} exists: give another --workdir.')
  new = json.loads(config.to_json())
  _require_untrained(config, new, workdir)
  write_config(workdir, new)
  checkpoints = Checkpoints(directory, save_interval=1, max_to_keep=1)
  checkpoints.save(0, {'ema': params}, {'imported': str(path)}, force=True)
  del tensors, params  # Orbax has copied them, and is writing the copies.
  checkpoints.close()
  if not stage.is_last:
    saved_steps.mark_finished(directory, 0)
  if dtype != recipe.dtype:
    logging.info(
      'Samples are computed in %s, where the recipe trains in %s: import with '
      '--config.dtype=%s to sample in that.',
      dtype,
      recipe.dtype,
      recipe.dtype,
    )
  logging.info(
    'Imported %s as stage %d of %s.\nNext:\n  %s',
    path,
    index + 1,
    workdir,
    command_line('sample', workdir=workdir, prompt='a cat in the snow'),
  )


def _require_untrained(config, new: Mapping, workdir: str) -> None:
  """Raises ValueError if a directory is of another config, or was trained.

  Args:
    config: of the import.
    new: the same as JSON.
    workdir: working directory, which may have other imported stages.
  """
  from mdm_jax.builders.config import (
    has_config,
    require_same_config,
    stage_directory,
  )
  from mdm_jax.checkpoint import saved_steps

  if not has_config(workdir):
    return
  # Until a run is trained, an import decides on the dtype of its samples.
  require_same_config(workdir, new, ('dtype',))
  for index in range(len(config.stages)):
    directory = stage_directory(workdir, config, index)
    if saved_steps.latest_step(directory):  # An import is step 0.
      raise ValueError(f'{directory} has been trained: give another --workdir.')


def _stage_of(path: str, names: Iterable[str], config) -> int:
  """The index of the last stage that has as many levels as the file."""
  from mdm_jax.interop import ml_mdm

  num_levels = 1 + max(
    (
      name.count('inner_unet.')
      for name in names
      if name.rpartition('inner_unet.')[2] in ml_mdm.NAMES
    ),
    default=0,
  )
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
  return stages[-1]


def _params(stage, tensors: Mapping, ignored: re.Pattern | None) -> dict:
  """The stage's parameters from a file's tensors, see `import_checkpoint`."""
  from mdm_jax.interop import ml_mdm

  config, levels = stage.config, stage.model.unet.levels
  shapes = stage.model.shapes(config.text.max_length)
  if set(shapes) != {'unet'}:
    raise ValueError(
      f'text.encoder={config.text.encoder!r} is trained with the network, '
      "but the file has no text encoder: use 't5'."
    )
  names = {name for _, name, _ in ml_mdm.release_names(shapes['unet'], levels)}
  unknown = sorted(set(tensors) - names)
  if ignored:
    left_out = [name for name in unknown if ignored.search(name)]
    if not left_out:
      raise ValueError(
        f'--ignore={ignored.pattern!r} is found in no tensor that the model '
        f'does not have: those are {", ".join(unknown[:5]) or "none"}.'
      )
    logging.info('Ignored %d tensors: %s.', len(left_out), ', '.join(left_out))
    unknown = [name for name in unknown if name not in left_out]
    tensors = {name: x for name, x in tensors.items() if name not in left_out}
  try:
    return {'unet': ml_mdm.from_release(shapes['unet'], levels, tensors)}
  except ValueError as error:
    if unknown:
      raise ValueError(
        f'{error}. --ignore=REGEX skips unknown tensors.'
      ) from error
    raise


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
    'ignore',
    None,
    value_types.Text('a regular expression', r'.+'),
    'Regular expression: tensors that the model does not have are skipped if '
    'it is found in their names. Default: they are an error.',
  )
  flag_types.define(
    'workdir',
    None,
    value_types.NEW_RUN,
    'Working directory to create.',
    required=True,
  )
  command.run(main, recipes.parse_flags)
