"""What is inside of a step's directory, whether or not it has a manifest.

Orbax writes `state`, a tree of arrays, and `extra`, a JSON file, each into a
directory of its own.
"""

import functools
from typing import Any

from etils import epath, epy
import jax
import numpy as np

from mdm_jax.checkpoint import manifest
from mdm_jax.checkpoint.identity import Identity
from mdm_jax.runtime import files

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

PyTree = Any
_STATE, _EXTRA = 'state/_METADATA', 'extra/metadata'
_STEP = '_CHECKPOINT_METADATA'
# Names of data files are hashes. All others are short, and are read whole.
_DATA = '/d/'
_SHORT = 2**26  # Bytes.


def is_committed(directory: epath.PathLike) -> bool:
  """Whether Orbax has committed a step, as far as its directory tells.

  One that cannot tell is damaged, and so counts as committed.
  """
  path = epath.Path(directory) / _STEP
  try:
    return files.read_json(path).get('commit_timestamp_nsecs') is not None
  except files.UnreadableFile:
    return path.exists()


def state_metadata(directory: epath.PathLike) -> PyTree:
  """Shapes and dtypes of the state of a step, as Orbax describes them."""
  path = epath.Path(directory).absolute() / 'state'
  return ocp.PyTreeCheckpointHandler().metadata(path).tree


def read_state(
  directory: epath.PathLike, item: PyTree, restore_args: PyTree
) -> PyTree:
  """Reads a part of the state of a step.

  Args:
    directory: of the step.
    item: the part, as nested dicts of what `state_metadata` gives.
    restore_args: of the same structure, of `ocp.RestoreArgs`.
  """
  # Unlike a checkpointer, the handler does not wait for other processes, which
  # may have failed.
  return ocp.PyTreeCheckpointHandler().restore(
    epath.Path(directory).absolute() / 'state',
    args=ocp.args.PyTreeRestore(
      item=item, restore_args=restore_args, partial_restore=True
    ),
  )


def read_extra(directory: epath.PathLike) -> dict[str, Any]:
  """Reads the JSON values that were saved with a state.

  Raises:
    UnreadableFile: they cannot be read.
  """
  return files.read_json(epath.Path(directory) / _EXTRA)


def hollow(directory: epath.PathLike) -> str | None:
  """Names an item that a step lacks, as in 'state/_METADATA is missing'."""
  for name in (_STATE, _EXTRA):
    if not (epath.Path(directory) / name).exists():
      return f'{name} is missing'
  return None


def problem(directory: epath.PathLike) -> str | None:
  """Looks into a step that has no manifest, by reading all of it once.

  Returns:
    What keeps the step from being restored, or what other checkpoint it is;
    None if it can be used.
  """
  directory = epath.Path(directory)
  try:
    return _problem(str(directory), manifest.list_files(directory))
  except files.UnreadableFile as error:
    return str(error).removeprefix(f'{directory}/')


def other_identity(directory: epath.PathLike) -> str | None:
  """Compares the place of a readable step with what its content says.

  For steps whose manifests do not say it. The state of a stage in training has
  its step, and `extra` the name of its stage.
  """
  place = Identity.of(directory)
  stage = read_extra(directory).get('stage')
  if stage is not None and stage != place.stage.partition('_')[2]:
    return f'it was saved in stage {stage!r}'
  tree = state_metadata(directory)
  if 'step' not in tree:  # Imported weights, or an EMA.
    return None
  step = int(_read_to_host(directory, {'step': tree['step']})['step'])
  return None if step == place.step else f'it was saved as step {step}'


@functools.lru_cache(maxsize=64)
def _problem(directory: str, listed: manifest.Files) -> str | None:
  directory = epath.Path(directory)
  if lacking := hollow(directory):
    return lacking
  for name, size, _ in listed:
    if _DATA not in name and size > _SHORT:
      return f'{name} is larger than {_SHORT >> 20} MiB'
  for name in (_STEP, _STATE, _EXTRA):
    files.read_json(directory / name)
  # Whatever Orbax and TensorStore raise: there is no limit to the kinds of
  # errors that damaged files cause in them.
  try:
    # One field at a time: a save holds all of them in host memory.
    for key, field in state_metadata(directory).items():
      _read_to_host(directory, {key: field})
    return other_identity(directory)
  except Exception as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    return f'its state cannot be read: {reason}'


def _read_to_host(directory: epath.PathLike, item: PyTree) -> PyTree:
  restore_args = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
  )
  return read_state(directory, item, restore_args)
