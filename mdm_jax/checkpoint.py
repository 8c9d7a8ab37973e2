"""Checkpoints of any pytree, and the small JSON files beside them.

A working directory holds `config.json` and, for each stage, one directory of
checkpoints: `checkpoints/<index>_<stage name>/<step>/`. A step directory holds
two items: `state`, a tree of arrays, and `extra`, whatever else a resume needs
as JSON. Nothing here knows what a state consists of.

After a step is committed it is given a manifest, and whatever restores a step
compares it with that first. A damaged step is passed over for an older one. A
committed step without a manifest is one whose process died in between, or of
an earlier version: it is used only where no step has a good manifest.
"""

from collections.abc import Mapping
import concurrent.futures
import json
from typing import Any

from absl import logging
from etils import epath, epy
import jax
from jax.experimental import multihost_utils
import numpy as np

from mdm_jax import manifest

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

PyTree = Any

_FINISHED = 'finished.json'
_CONFIG = 'config.json'
_ABSENT = 'absent'


class CheckpointError(ValueError):
  """No checkpoint can be trusted, or none can be saved."""


class Checkpoints:
  """The checkpoints of one stage, written while training goes on."""

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    save_interval: int,
    max_to_keep: int | None,
    save_failures: int = 1,
  ):
    """Opens a directory for training, and creates it if it does not exist.

    One process group may have it open at a time: what an interrupted save has
    left behind is removed. Orbax counts any step directory as a step, so those
    newer than the newest good one are renamed: to `<step>.corrupt` if damaged,
    to `<step>.uncommitted` if never committed or without a manifest.

    Args:
      directory: of this stage, local or `gs://`.
      save_interval: steps between two saves.
      max_to_keep: newest checkpoints to keep; older ones are deleted. None
        keeps all.
      save_failures: in a row, after which to give up.

    Raises:
      CheckpointError: there are checkpoints, but none is good.
    """
    self._directory = epath.Path(directory).absolute()
    # Unlike save_interval_steps, this does not also save the first step it is
    # asked about.
    self._options = dict(
      should_save_fn=lambda step, _: step % save_interval == 0,
      max_to_keep=max_to_keep,
      cleanup_tmp_directories=True,
      # Several directories may save the same step at the same time.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix='_'.join(self._directory.parts[-2:])
      ),
    )
    self._save_failures = save_failures
    self._failures = 0
    self._saving = None  # Future of the save in flight, manifest included.
    self._saving_step = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'manifest')
    self._open()

  def save(
    self,
    step: int,
    state: PyTree,
    extra: Mapping[str, Any],
    force: bool = False,
  ) -> bool:
    """Saves if the step is due, or if forced.

    Every process calls it after every step. When it returns, the state is in
    host memory and may be donated; a thread writes and commits it. A save that
    failed is logged at the next call; the next save due is its retry.

    Args:
      step: steps taken so far, that is the number the next run starts from.
      state: tree of `jax.Array`.
      extra: what else a resume needs, as JSON can hold it.
      force: saves whatever the interval says, unless the step exists.

    Returns:
      Whether a save was begun.

    Raises:
      CheckpointError: `save_failures` saves have failed in a row.
    """
    # Several processes must agree on a failure, so they wait for the save due.
    if jax.process_count() == 1 and self._saving and self._saving.done():
      self._settle()
    if step in self._manager.all_steps():
      return False
    if not force and not self._manager.should_save(step):
      return False
    self._settle()
    self._saving_step = step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          extra=ocp.args.JsonSave(dict(extra)),
        ),
        force=True,
      )
    except OSError as error:  # Orbax makes some files before it returns.
      self._saving = concurrent.futures.Future()
      self._saving.set_exception(error)
    else:
      self._saving = self._thread.submit(self._finish, step)
    return True

  def restore(
    self, abstract_state: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]]:
    """Restores a state into given shardings, on any number of devices.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      step: the newest good one if None.

    Returns:
      The state, of the structure of `abstract_state`, and `extra`.

    Raises:
      FileNotFoundError: if there is no such step.
      CheckpointError: if the step is damaged; if None, if all are.
      ValueError: if a leaf is missing, unexpected, or of another shape or
        dtype than in the checkpoint. The message names the leaves.
    """
    if step is None:
      self._settle()
      self._set_aside()
      self._manager.reload()
      step = latest_step(self._directory)
    step = require_step(self._directory, step)
    _require_same_leaves(self._directory / str(step), abstract_state)
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

  def drain(self) -> None:
    """Waits until the save in flight has ended, well or not.

    Unlike `wait` it needs no other process, and may be called in any thread.
    """
    saving = self._saving
    if saving:
      concurrent.futures.wait([saving])

  def wait(self) -> None:
    """Waits until every save is committed and has its manifest.

    Raises:
      CheckpointError: if the last one failed.
    """
    self._settle(last=True)

  def close(self) -> None:
    """Waits as `wait` does, and frees the threads."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, exc_type, *_) -> None:
    """Closes; after an error waits alone, as others may go on meanwhile."""
    if exc_type is None:
      self.close()
    else:
      self.drain()

  def _open(self) -> None:
    self._set_aside()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(**self._options),
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'extra': ocp.JsonCheckpointHandler(),
      },
    )

  def _set_aside(self) -> None:
    """Leaves the newest good step as the newest step, for every process."""
    try:
      if jax.process_index() == 0:
        _set_uncommitted_aside(self._directory)
        _newest_good_step(self._directory, set_aside=True)
    finally:
      multihost_utils.sync_global_devices(f'{self._directory} is verified')
    latest_step(self._directory)  # Raises where process 0 has raised.

  def _finish(self, step: int) -> None:
    """Follows a save to its commit and adds the manifest, in a thread."""
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      manifest.write(self._directory / str(step))

  def _settle(self, last: bool = False) -> None:
    """Waits for the save in flight; logs what made it fail, or gives up."""
    if self._saving is None:
      return
    error, self._saving = self._saving.exception(), None
    failed = error is not None
    if jax.process_count() > 1:
      failed = multihost_utils.process_allgather(np.array(failed)).any()
    if not failed:
      self._failures = 0
      return
    self._failures += 1
    reason = ' '.join(str(error or 'on another process').split())[:300]
    message = (
      f'{self._directory}: saving step {self._saving_step} failed '
      f'({self._failures} of {self._save_failures} in a row): {reason}'
    )
    logging.error('%s', message)
    # A new manager removes what the failed save has left. The old one raises
    # the error in each of its parts, once, before it lets go.
    closings = (self._thread.submit(self._manager.close) for _ in range(5))
    any(closing.exception() is None for closing in closings)
    self._open()
    if last or self._failures >= self._save_failures:
      raise CheckpointError(
        f'{message}. Older checkpoints are intact: see to the disk, and the '
        'same command continues from them.'
      ) from error


def latest_step(directory: epath.PathLike) -> int | None:
  """The newest committed step in a directory that may be in use, or None.

  Reads names only: see `finished_step` and `restore_item` for what is good.

  Raises:
    CheckpointError: all that there were are set aside as damaged.
  """
  directory = epath.Path(directory)
  step = max(_committed_steps(directory), default=None)
  if step is None:
    _require_none_damaged(directory)
  return step


def abstract_item(
  directory: epath.PathLike, step: int | None, key: str
) -> PyTree:
  """Shapes and dtypes of one part of a checkpointed state.

  Args:
    directory: of one stage.
    step: the newest good one if None.
    key: top-level field of the state, such as 'params'.

  Returns:
    Nested dicts of `jax.ShapeDtypeStruct` without shardings.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step is damaged; if None, if all are.
    ValueError: if the state has no such part.
  """
  directory = epath.Path(directory)
  step_directory = directory / str(require_step(directory, step))
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
  """Restores one part of a state, reading no other part.

  Args:
    directory: of one stage.
    step: the newest good one if None.
    key: top-level field of the state, such as 'params'.
    shardings: one `jax.sharding.Sharding` for every leaf, or a tree of them
      shaped as `abstract_item` says. None restores to host memory.

  Returns:
    Nested dicts of `jax.Array`, or of NumPy arrays if shardings is None.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step is damaged; if None, if all are.
    ValueError: if the state has no such part.
  """
  directory = epath.Path(directory).absolute()
  step = require_step(directory, step)
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
  """What was saved beside a state.

  Args:
    directory: of one stage.
    step: the newest good one if None.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step is damaged; if None, if all are.
  """
  directory = epath.Path(directory).absolute()
  step = require_step(directory, step)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(
      directory / str(step) / 'extra', args=ocp.args.JsonRestore()
    )


def require_step(directory: epath.PathLike, step: int | None = None) -> int:
  """A step that is there and good.

  Args:
    directory: of one stage.
    step: the newest good one if None.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step is damaged; if None, if all are.
  """
  directory = epath.Path(directory)
  committed = sorted(_committed_steps(directory))
  if step is None:
    step = _newest_good_step(directory)
  elif step in committed and manifest.exists(directory / str(step)):
    problem = manifest.problem(directory / str(step))
    if problem:
      raise CheckpointError(f'{directory / str(step)} is damaged: {problem}.')
  if step not in committed:
    raise FileNotFoundError(
      f'{directory} has no checkpoint{"" if step is None else f" {step}"}:'
      f' committed steps are {committed}.'
    )
  return step


def good_steps(directory: epath.PathLike) -> list[int]:
  """All steps that are as they were written, in order; names the others."""
  good, directory = [], epath.Path(directory)
  for step in sorted(_committed_steps(directory)):
    path = directory / str(step)
    problem = 'it has no manifest'
    if manifest.exists(path):
      problem = manifest.problem(path)
    if problem is None:
      good.append(step)
    else:
      logging.warning('%s is damaged: %s.', path, problem)
  return good


def mark_finished(directory: epath.PathLike, step: int) -> None:
  """Records that a stage is complete at this step. All processes call it.

  Args:
    directory: of the stage.
    step: its last one, committed: call `Checkpoints.wait` first.

  Raises:
    FileNotFoundError: if the step is not committed.
  """
  directory = epath.Path(directory)
  if step not in _committed_steps(directory):
    raise FileNotFoundError(f'{directory} has no checkpoint {step}.')
  if jax.process_index() == 0:
    _write_json(directory / _FINISHED, {'step': step})
  multihost_utils.sync_global_devices(f'{directory} is finished')


def finished_step(directory: epath.PathLike) -> int | None:
  """The last step of a complete stage, None if it is not complete.

  It is not complete if its last checkpoint is damaged and an older one is not.

  Raises:
    CheckpointError: there are checkpoints, but none is good.
  """
  directory = epath.Path(directory)
  path = directory / _FINISHED
  if not path.exists():
    return None
  step = json.loads(path.read_text())['step']
  newest = _newest_good_step(directory)
  if newest in (None, step):
    return step
  logging.warning(
    '%s was finished at step %d, but its newest good checkpoint '
    'is %d: it is not finished.',
    directory,
    step,
    newest,
  )
  return None


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
  manifest.replace_text(path, json.dumps(value, indent=2) + '\n')


def _step_directories(directory: epath.Path) -> dict[int, bool]:
  """Steps, and whether each was committed."""
  # Orbax takes any directory with a number for a name as a step. Only a
  # committed one has the time of its commit.
  if not directory.exists():
    return {}
  found = ocp.path.step.standard_name_format().find_all(directory)
  return {
    s.step: manifest.exists(s.path) or s.commit_timestamp_nsecs is not None
    for s in found
  }


def _committed_steps(directory: epath.Path) -> list[int]:
  steps = _step_directories(directory)
  return [step for step, committed in steps.items() if committed]


def _set_uncommitted_aside(directory: epath.Path) -> None:
  newest = max(_committed_steps(directory), default=-1)
  for step, committed in _step_directories(directory).items():
    path = directory / str(step)
    if not committed:
      logging.warning('%s is not committed.', path)
      # An interrupted save leaves some files. An interrupted deletion may
      # leave none, but of an old step.
      emptied = step > newest and not any(path.iterdir())
      _rename(path, 'corrupt' if emptied else 'uncommitted')


def _newest_good_step(
  directory: epath.Path, set_aside: bool = False
) -> int | None:
  """The newest step that is as it was written, None if there was never any.

  Args:
    directory: of one stage.
    set_aside: renames what is newer.

  Raises:
    CheckpointError: there are checkpoints, but none is good.
  """
  newest, problems, unknown = None, {}, []
  for step in sorted(_committed_steps(directory), reverse=True):
    path = directory / str(step)
    if not manifest.exists(path):
      unknown.append(step)
      continue
    problem = manifest.problem(path)
    if problem is None:
      newest = step
      break
    problems[step] = problem
    logging.warning('%s is damaged: %s.', path, problem)
  if newest is None and unknown:
    newest = unknown[0]
    logging.warning(
      '%s has no manifest, nor has a better one: it is used without a check.',
      directory / str(newest),
    )
  if set_aside:
    for step in problems:
      _rename(directory / str(step), 'corrupt')
    for step in unknown:
      if step > newest:
        _rename(directory / str(step), 'uncommitted')
  if newest is None:
    _require_none_damaged(directory, problems)
  return newest


def _require_none_damaged(
  directory: epath.Path, problems: Mapping[int, str] | None = None
) -> None:
  """Raises if there have been checkpoints that are damaged."""
  damaged = [f'{step}: {problem}' for step, problem in (problems or {}).items()]
  if directory.exists() and not damaged:
    damaged = [
      path.name
      for path in directory.iterdir()
      if '.corrupt' in path.name
      or (path.name.isdigit() and not any(path.iterdir()))
    ]
  if damaged:
    raise CheckpointError(
      f'{directory} has checkpoints, but none is good ({"; ".join(damaged)})'
      ': put back a copy of one, or remove the directory to begin it anew.'
    )


def _rename(path: epath.Path, suffix: str) -> None:
  target = path.with_name(f'{path.name}.{suffix}')
  if suffix == 'uncommitted' and target.exists():
    target.rmtree()
  while target.exists():
    target = target.with_name(f'{target.name}+')
  path.rename(target)
  logging.warning('%s is now %s.', path, target.name)


def _metadata(step_directory: epath.Path) -> PyTree:
  path = (step_directory / 'state').absolute()
  return ocp.PyTreeCheckpointHandler().metadata(path).tree


def _require_same_leaves(
  step_directory: epath.Path, abstract_state: PyTree
) -> None:
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
    f'{path} is {saved.get(path, _ABSENT)}, not {wanted.get(path, _ABSENT)}'
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
