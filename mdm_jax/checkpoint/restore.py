"""Restores parts of a checkpointed state onto given devices.

A run may be in training while it is read: a step that is removed meanwhile is
replaced by the newest one, unless the step was asked for by its number.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath
import jax
import numpy as np

from mdm_jax.checkpoint import contents, saved_steps
from mdm_jax.runtime import files, sharding

PyTree = Any
T = TypeVar('T')
TRIES = 5  # Steps that may be removed while they are read.


def from_newest(
  directory: epath.PathLike, read: Callable[[int], T], step: int | None = None
) -> T:
  """Returns `read(step)` of the newest good step.

  Args:
    directory: checkpoint directory of one stage.
    read: reads from a step, which has been verified. If it raises because the
      step has been removed or damaged meanwhile, it is called with another.
    step: step to read instead; then there is no other.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step, or with None every step, is damaged.
  """
  for left in reversed(range(TRIES)):
    chosen = saved_steps.require_step(directory, step)
    try:
      return read(chosen)
    except contents.READ_ERRORS:
      try:
        saved_steps.require_step(directory, chosen)
      except (FileNotFoundError, saved_steps.CheckpointError):
        if step is not None or not left:
          raise
      else:
        raise  # It is as it was, so that is not the reason.


def abstract_item(
  directory: epath.PathLike, step: int | None, key: str
) -> PyTree:
  """Shapes and dtypes of one field of a checkpointed state.

  Args:
    directory: checkpoint directory of one stage.
    step: step to read; None for the newest good one.
    key: top-level field of the state, such as 'params'.

  Returns:
    Nested dicts of `jax.ShapeDtypeStruct` without shardings.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step, or with None every step, is damaged.
    CheckpointError: also if the state has no such field.
  """
  directory = files.absolute(directory)
  return from_newest(
    directory, lambda step: _abstract_item(directory / str(step), key), step
  )


def _abstract_item(step_directory: epath.Path, key: str) -> PyTree:
  _require_field(step_directory, key)
  return contents.abstract_state(step_directory, key)[key]


def _require_field(step_directory: epath.Path, key: str) -> None:
  if key not in (fields := contents.fields(step_directory)):
    raise saved_steps.CheckpointError(
      f'{step_directory} has no {key!r}, only {", ".join(fields)}.'
    )


def restore_item(
  directory: epath.PathLike,
  step: int | None,
  key: str,
  shardings: PyTree = None,
) -> PyTree:
  """Restores one field of a state, without reading the others.

  Args:
    directory: checkpoint directory of one stage.
    step: step to read; None for the newest good one.
    key: top-level field of the state, such as 'params'.
    shardings: one `jax.sharding.Sharding` for every leaf, or a tree of them
      of the structure of `abstract_item`. None restores to host memory.

  Returns:
    Nested dicts of `jax.Array`, or of NumPy arrays if shardings is None.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step, or with None every step, is damaged.
    CheckpointError: also if the state has no such field.
  """
  directory = files.absolute(directory)
  return from_newest(
    directory,
    lambda step: _restore_item(directory / str(step), key, shardings),
    step,
  )


def _restore_item(
  step_directory: epath.Path, key: str, shardings: PyTree
) -> PyTree:
  _require_field(step_directory, key)
  item = contents.read_field(step_directory, key)
  if shardings is None:
    return item
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, item)
  return sharding.place(item, shardings)


def read_extra(
  directory: epath.PathLike, step: int | None = None
) -> dict[str, Any]:
  """Reads the JSON values that were saved with a state.

  Args:
    directory: checkpoint directory of one stage.
    step: step to read; None for the newest good one.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step, or with None every step, is damaged.
  """
  directory = epath.Path(directory)
  return from_newest(
    directory, lambda step: contents.read_extra(directory / str(step)), step
  )


def require_same_leaves(
  step_directory: epath.Path, saved: PyTree, wanted: PyTree
) -> None:
  """Checks that a checkpoint has the leaves of a given state.

  Args:
    step_directory: of the checkpoint.
    saved: its `contents.abstract_state`.
    wanted: tree of `jax.ShapeDtypeStruct`.

  Raises:
    CheckpointError: a leaf is missing, unexpected, or of another shape or
      dtype.
  """

  # Orbax raises for shapes and keys, one at a time, but casts dtypes silently.
  def describe(tree: PyTree) -> dict[str, str]:
    return {
      jax.tree_util.keystr(
        path, simple=True, separator='/'
      ): f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }

  saved, wanted = describe(saved), describe(wanted)
  different = [
    f'{path} is {saved.get(path, "absent")}, not {wanted.get(path, "absent")}'
    for path in dict.fromkeys([*wanted, *saved])
    if saved.get(path) != wanted.get(path)
  ]
  if different:
    more = f'; and {len(different) - 8} more' if len(different) > 8 else ''
    raise saved_steps.CheckpointError(
      f'{step_directory} was saved by another model, optimizer or version of '
      f'mdm_jax: {"; ".join(different[:8])}{more}. Continue with the config '
      'and the version that saved it, or give another --workdir.'
    )
