"""Checkpoints of any pytree, and the small JSON files beside them.

A working directory holds `config.json` and, for each stage, one directory of
checkpoints: `checkpoints/<index>_<stage name>/<step>/`. A step directory holds
two items: `state`, a tree of arrays, and `extra`, whatever else a resume needs
as JSON. Nothing here knows what a state consists of.
"""

from collections.abc import Mapping
import json
from typing import Any

from absl import logging
from etils import epath, epy
import jax
from jax.experimental import multihost_utils
import numpy as np

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

PyTree = Any

_FINISHED = 'finished.json'
_CONFIG = 'config.json'
_ABSENT = 'absent'


class Checkpoints:
  """The checkpoints of one stage, written while training goes on."""

  def __init__(
      self, directory: epath.PathLike, *, save_interval: int, max_to_keep: int
  ):
    """Opens a directory for training, and creates it if it does not exist.

    One process group may have it open at a time: what an interrupted save has
    left behind is removed, and a step directory that was never committed is
    renamed to `<step>.uncommitted`, since Orbax would count it as a step.

    Args:
      directory: of this stage, local or `gs://`.
      save_interval: steps between two saves.
      max_to_keep: newest checkpoints to keep; older ones are deleted.
    """
    directory = epath.Path(directory).absolute()
    if jax.process_index() == 0:
      _set_uncommitted_aside(directory)
    # The manager's constructor has a barrier before it lists the steps.
    self._manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            # Unlike save_interval_steps, this does not also save the first
            # step it is asked about. Orbax adds saving upon preemption.
            should_save_fn=lambda step, _: step % save_interval == 0,
            max_to_keep=max_to_keep,
            cleanup_tmp_directories=True,
        ),
        item_handlers={
            'state': ocp.StandardCheckpointHandler(),
            'extra': ocp.JsonCheckpointHandler(),
        },
    )

  def save(
      self, step: int, state: PyTree, extra: Mapping[str, Any],
      force: bool = False,
  ) -> bool:
    """Saves if the step is due, upon preemption, or if forced.

    Every process calls it after every step. When it returns, the state is in
    host memory and may be donated; a thread writes and commits it.

    Args:
      step: steps taken so far, that is the number the next run starts from.
      state: tree of `jax.Array`.
      extra: what else a resume needs, as JSON can hold it.
      force: saves whatever the interval says, unless the step exists.

    Returns:
      Whether a save was begun.

    Raises:
      Exception: whatever made the previous save fail.
    """
    if step == self._manager.latest_step():
      return False
    return self._manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            extra=ocp.args.JsonSave(dict(extra)),
        ),
        force=force,
    )

  def restore(
      self, abstract_state: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]]:
    """Restores a state into given shardings, on any number of devices.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      step: the latest if None.

    Returns:
      The state, of the structure of `abstract_state`, and `extra`.

    Raises:
      FileNotFoundError: if there is no such step.
      ValueError: if a leaf is missing, unexpected, or of another shape or
        dtype than in the checkpoint. The message names the leaves.
    """
    directory = epath.Path(self._manager.directory)
    step = _require_step(directory, step)
    _require_same_leaves(directory / str(step), abstract_state)
    restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state),
            extra=ocp.args.JsonRestore(),
        ),
    )
    return restored['state'], restored['extra']

  def latest_step(self) -> int | None:
    """The newest step saved or being saved, None if there is none."""
    return self._manager.latest_step()

  def reached_preemption(self, step: int) -> bool:
    """Whether this machine is about to be taken away: save, wait and leave.

    Needs `jax.distributed.initialize`, also for a single process; without it
    this is always False.
    """
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until every save is committed; raises what made one fail."""
    self._manager.wait_until_finished()

  def check_for_errors(self) -> None:
    """Raises what made a save in the background fail, without waiting."""
    self._manager.check_for_errors()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    self._manager.close()


def latest_step(directory: epath.PathLike) -> int | None:
  """The newest committed step in a directory that may be in use, or None."""
  return max(_committed_steps(epath.Path(directory)), default=None)


def abstract_item(
    directory: epath.PathLike, step: int | None, key: str
) -> PyTree:
  """Shapes and dtypes of one part of a checkpointed state.

  Args:
    directory: of one stage.
    step: the latest if None.
    key: top-level field of the state, such as 'params'.

  Returns:
    Nested dicts of `jax.ShapeDtypeStruct` without shardings.

  Raises:
    FileNotFoundError: if there is no such step.
    ValueError: if the state has no such part.
  """
  directory = epath.Path(directory)
  step_directory = directory / str(_require_step(directory, step))
  tree = _metadata(step_directory)
  if key not in tree:
    raise ValueError(
        f'{step_directory} has no {key!r}, only {", ".join(sorted(tree))}.'
    )
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree[key]
  )


def restore_item(
    directory: epath.PathLike, step: int | None, key: str,
    shardings: PyTree = None,
) -> PyTree:
  """Restores one part of a state, reading no other part.

  Args:
    directory: of one stage.
    step: the latest if None.
    key: top-level field of the state, such as 'params'.
    shardings: one `jax.sharding.Sharding` for every leaf, or a tree of them
      shaped as `abstract_item` says. None restores to host memory.

  Returns:
    Nested dicts of `jax.Array`, or of NumPy arrays if shardings is None.

  Raises:
    FileNotFoundError: if there is no such step.
    ValueError: if the state has no such part.
  """
  directory = epath.Path(directory).absolute()
  step = _require_step(directory, step)
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
        item, shardings,
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


def mark_finished(directory: epath.PathLike, step: int) -> None:
  """Records that a stage is complete at this step. All processes call it.

  Args:
    directory: of the stage.
    step: its last one, committed: call `Checkpoints.wait` first.

  Raises:
    FileNotFoundError: if the step is not committed.
  """
  directory = epath.Path(directory)
  _require_step(directory, step)
  if jax.process_index() == 0:
    _write_json(directory / _FINISHED, {'step': step})
  multihost_utils.sync_global_devices(f'{directory} is finished')


def finished_step(directory: epath.PathLike) -> int | None:
  """The last step of a complete stage, None if it is not complete."""
  path = epath.Path(directory) / _FINISHED
  return json.loads(path.read_text())['step'] if path.exists() else None


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
  """Writes `config.json`, replacing it at once. One process calls it."""
  _write_json(epath.Path(workdir) / _CONFIG, config)


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
  """Reads `config.json`; tuples have become lists.

  Raises:
    FileNotFoundError: if there is none.
  """
  path = epath.Path(workdir) / _CONFIG
  if not path.exists():
    raise FileNotFoundError(
        f'{path} does not exist: is this the directory of a training run?'
    )
  return json.loads(path.read_text())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Names every value that two configurations do not share.

  Args:
    old, new: nested dicts and sequences, compared as JSON, so that a tuple
      equals a list.

  Returns:
    One line a value, such as `stages[1].steps: 100 -> 200`; a value that only
    one of them has is `absent` in the other.
  """
  old, new = (_leaves(json.loads(json.dumps(tree)), '') for tree in (old, new))
  return [
      f'{path}: {old.get(path, _ABSENT)} -> {new.get(path, _ABSENT)}'
      for path in dict.fromkeys([*old, *new])
      if old.get(path) != new.get(path)
  ]


def _leaves(tree: Any, path: str) -> dict[str, str]:
  """Maps paths to values' `repr`; an empty dict or list is a value."""
  if isinstance(tree, dict) and tree:
    prefix = f'{path}.' if path else ''
    children = [(f'{prefix}{key}', child) for key, child in tree.items()]
  elif isinstance(tree, list) and tree:
    children = [(f'{path}[{i}]', child) for i, child in enumerate(tree)]
  else:
    return {path: repr(tree)}
  leaves = {}
  for child_path, child in children:
    leaves |= _leaves(child, child_path)
  return leaves


def _write_json(path: epath.Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  temporary.replace(path)


def _committed_steps(directory: epath.Path) -> list[int]:
  # Orbax takes any directory with a number for a name as a step. Only a
  # committed one has the time of its commit.
  if not directory.exists():
    return []
  found = ocp.path.step.standard_name_format().find_all(directory)
  return [s.step for s in found if s.commit_timestamp_nsecs is not None]


def _set_uncommitted_aside(directory: epath.Path) -> None:
  if not directory.exists():
    return
  found = ocp.path.step.standard_name_format().find_all(directory)
  for step in found:
    if step.commit_timestamp_nsecs is None:
      target = directory / f'{step.step}.uncommitted'
      logging.warning('%s was never committed: now %s', step.path, target)
      if target.exists():
        target.rmtree()
      step.path.rename(target)


def _require_step(directory: epath.Path, step: int | None) -> int:
  committed = sorted(_committed_steps(directory))
  if not committed or step not in (None, *committed):
    raise FileNotFoundError(
        f'{directory} has no checkpoint{"" if step is None else f" {step}"}:'
        f' committed steps are {committed}.'
    )
  return committed[-1] if step is None else step


def _metadata(step_directory: epath.Path) -> PyTree:
  path = (step_directory / 'state').absolute()
  return ocp.PyTreeCheckpointHandler().metadata(path).tree


def _require_same_leaves(
    step_directory: epath.Path, abstract_state: PyTree
) -> None:
  # Orbax raises for shapes and keys, one at a time, but casts dtypes silently.
  def describe(tree: PyTree) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'):
        f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }

  saved = describe(_metadata(step_directory))
  wanted = describe(abstract_state)
  different = [
      f'{path} is {saved.get(path, _ABSENT)}, not {wanted.get(path, _ABSENT)}'
      for path in dict.fromkeys([*wanted, *saved])
      if saved.get(path) != wanted.get(path)
  ]
  if different:
    more = f'; and {len(different) - 8} more' if len(different) > 8 else ''
    raise ValueError(
        f'{step_directory} was saved by another model or optimizer: '
        + '; '.join(different[:8]) + more
    )
