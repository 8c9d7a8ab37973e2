"""Restores parts of a checkpointed state onto given devices."""

from typing import Any

from etils import epath, epy
import jax
import numpy as np

from mdm_jax.checkpoint import saved_steps

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

PyTree = Any


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
    ValueError: if the state has no such field.
  """
  directory = epath.Path(directory)
  step_directory = directory / str(saved_steps.require_step(directory, step))
  tree = _metadata(step_directory)
  if key not in tree:
    raise ValueError(
      f'{step_directory} has no {key!r}, only {", ".join(sorted(tree))}.'
    )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree[key]
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
    ValueError: if the state has no such field.
  """
  directory = epath.Path(directory).absolute()
  step = saved_steps.require_step(directory, step)
  item = abstract_item(directory, step, key)
  if shardings is None:
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
    )
  else:
    if isinstance(shardings, jax.sharding.Sharding):
      shardings = jax.tree.map(lambda _: shardings, item)
    restore_args = jax.tree.map(
      lambda _, sharding: ocp.ArrayRestoreArgs(sharding=sharding),
      item,
      shardings,
    )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(
      directory / str(step) / 'state',
      args=ocp.args.PyTreeRestore(
        item={key: item},
        restore_args={key: restore_args},
        partial_restore=True,
      ),
    )[key]


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
  directory = epath.Path(directory).absolute()
  step = saved_steps.require_step(directory, step)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(
      directory / str(step) / 'extra', args=ocp.args.JsonRestore()
    )


def require_same_leaves(
  step_directory: epath.Path, abstract_state: PyTree
) -> None:
  """Checks that a checkpoint has the leaves of a given state.

  Raises:
    ValueError: a leaf is missing, unexpected, or of another shape or dtype.
  """

  # Orbax raises for shapes and keys, one at a time, but casts dtypes silently.
  def describe(tree: PyTree) -> dict[str, str]:
    return {
      jax.tree_util.keystr(
        path, simple=True, separator='/'
      ): f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }

  saved = describe(_metadata(step_directory))
  wanted = describe(abstract_state)
  different = [
    f'{path} is {saved.get(path, "absent")}, not {wanted.get(path, "absent")}'
    for path in dict.fromkeys([*wanted, *saved])
    if saved.get(path) != wanted.get(path)
  ]
  if different:
    more = f'; and {len(different) - 8} more' if len(different) > 8 else ''
    raise ValueError(
      f'{step_directory} was saved by another model or optimizer: '
      + '; '.join(different[:8])
      + more
    )


def _metadata(step_directory: epath.Path) -> PyTree:
  path = (step_directory / 'state').absolute()
  return ocp.PyTreeCheckpointHandler().metadata(path).tree
