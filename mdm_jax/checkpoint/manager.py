"""Saves the checkpoints of one stage while it is trained.

A working directory holds `config.json`, `run.json` and one directory of
checkpoints for each stage: `checkpoints/<index>_<stage name>/<step>/`. A step
directory holds two items: `state`, a tree of arrays, and `extra`, other values
that a resume needs, as JSON. This module does not depend on the structure of
the state.

After a step is committed, a manifest is added to it: file hashes, and which
checkpoint it is. Every restore first compares both.
"""

from collections.abc import Mapping, Sequence
import concurrent.futures
import time
from typing import Any

from absl import logging
from etils import epath, epy
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from mdm_jax.checkpoint import contents, manifest, restore, saved_steps
from mdm_jax.checkpoint.saved_steps import CheckpointError
from mdm_jax.runtime import buckets, distributed, files

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

PyTree = Any


class Checkpoints:
  """The checkpoints of one stage, written while training continues."""

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    save_interval: int,
    max_to_keep: int | None,
    save_failures: int = 1,
  ):
    """Opens a directory for training, and creates it if it does not exist.

    Only one run may have it open at a time, since temporary files of an
    interrupted save are removed. Orbax counts any step directory as a step, so
    those newer than the newest good one are renamed: to `<step>.corrupt` if
    damaged, to `<step>.uncommitted` if never committed or without a manifest.

    Args:
      directory: checkpoint directory of the stage, local or `gs://`.
      save_interval: steps between two saves.
      max_to_keep: number of newest checkpoints to keep; older ones are deleted.
        None keeps all.
      save_failures: consecutive failed saves after which to raise an error.

    Raises:
      CheckpointError: there are checkpoints, but none is good, or the directory
        cannot be opened.
    """
    if buckets.scheme(directory) not in (None, 'gs'):
      raise CheckpointError(
        f'{directory}: Orbax saves checkpoints on disks and in gs:// only.'
      )
    self._given_directory = epath.Path(directory)
    self._directory = files.absolute(directory)
    self._options = dict(
      step_name_format=saved_steps.StepNames(),
      # In a bucket Orbax takes all directories without its last file for
      # temporary ones, those that are set aside among them. It has none there.
      cleanup_tmp_directories=files.is_local(directory),
      # Steps that were copied there from a disk may lack that file as well.
      atomicity_options=ocp.options.AtomicityOptions(
        allow_legacy_atomic_rename=True
      ),
      lightweight_initialize=True,
      # How long a save may take is the watchdog's to say.
      async_options=ocp.options.AsyncOptions(timeout_secs=86400),
      # Several directories may save the same step at the same time.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix='_'.join(self._directory.parts[-2:])
      ),
    )
    self._save_interval, self._max_to_keep = save_interval, max_to_keep
    self._save_failures = save_failures
    self._failures = 0
    self._manager = None  # Orbax's, unless the bucket has not answered.
    self._latest_step = None
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

    Every process calls it after every step. When it returns, the state has been
    copied to host memory and may be donated; a thread writes and commits it.
    The next call logs a save that failed, and the next save that is due
    replaces it.

    Args:
      step: number of steps taken, from which a resumed run continues.
      state: tree of `jax.Array`.
      extra: other values that a resume needs, of JSON's types.
      force: saves even if the step is not due, unless it exists already.

    Returns:
      Whether a save was begun.

    Raises:
      CheckpointError: `save_failures` saves have failed in a row.
    """
    # Several processes settle at the next save that is due: they have to agree.
    if jax.process_count() == 1 and self._saving and self._saving.done():
      self._settle()
    if self._manager and step in self._manager.all_steps():
      return False
    if not force and step % self._save_interval:
      return False
    self._settle()
    self._saving_step, begin = step, time.monotonic()
    try:
      if self._manager is None:
        self._open()
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          extra=ocp.args.JsonSave(dict(extra)),
        ),
        force=True,
      )
    except OSError as error:  # Orbax creates some files in this thread.
      self._saving = concurrent.futures.Future()
      self._saving.set_exception(error)
    else:
      self._latest_step = step
      self._saving = self._thread.submit(self._finish, step, begin)
    return True

  def restore(
    self,
    abstract_state: PyTree,
    step: int | None = None,
    added: Sequence[str] = (),
  ) -> tuple[PyTree, dict[str, Any]]:
    """Restores a state into given shardings, on any number of devices.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      step: step to read; None for the newest good one.
      added: fields of the state, then a named tuple, that are zeros if the
        checkpoint, of an earlier version, lacks them.

    Returns:
      The state, of the structure of `abstract_state`, and `extra`.

    Raises:
      FileNotFoundError: if there is no such step.
      CheckpointError: if the step, or with None every step, is damaged.
      CheckpointError: also if a leaf is missing, unexpected, or of another
        shape or dtype than in the checkpoint. The message names the leaves.
    """
    if step is None:
      self._settle()
      if self._manager is None:
        self._open()
      else:
        # Not a new one: what each begins by, to remove temporary directories,
        # may still go on in the old one.
        self._set_aside_in_all()
        self._manager.reload()
        self._latest_step = self._manager.latest_step()
      step = saved_steps.latest_step(self._directory)
    step = saved_steps.require_step(self._directory, step)
    path = self._directory / str(step)
    saved = contents.abstract_state(path)
    wanted, lacking = abstract_state, {}
    for field in added:
      if field not in saved:
        wanted = wanted if lacking else abstract_state._asdict()
        lacking[field] = wanted.pop(field)
    restore.require_same_leaves(path, saved, wanted)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(wanted),
          extra=ocp.args.JsonRestore(),
        ),
      )
    # Without a manifest, small files that only this needs may be damaged. There
    # is no limit to the kinds of errors that they cause in Orbax.
    except Exception as error:
      if manifest.exists(path):
        raise
      raise saved_steps.CheckpointError(
        f'{path} has no manifest, and cannot be restored '
        f'({" ".join(str(error).split())[:200]}): move it away.'
      ) from error
    state = restored['state']
    if lacking:
      logging.info(
        '%s is of an earlier version, whose state had no %s: %s with zeros.',
        path,
        ' and no '.join(lacking),
        'they begin' if len(lacking) > 1 else 'it begins',
      )
      zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
        lacking,
      )
      state = type(abstract_state)(**state, **zeros)
    return state, restored['extra']

  def latest_step(self) -> int | None:
    """The newest step saved or being saved, None if there is none."""
    return self._latest_step

  def drain(self) -> None:
    """Waits until the save in flight has succeeded or failed.

    Unlike `wait`, it needs no other process, raises no error, and may be called
    from any thread.
    """
    saving = self._saving
    if saving:
      concurrent.futures.wait([saving])

  def wait(self) -> None:
    """Waits until every save is committed and has its manifest.

    Raises:
      CheckpointError: if the last save failed.
    """
    self._settle(last=True)

  def close(self) -> None:
    """Waits as `wait` does, and frees the threads."""
    try:
      self.wait()
    finally:
      self._close_manager()
      self._thread.shutdown()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, exc_type, *_) -> None:
    """Closes; after an error, waits without the other processes."""
    if exc_type is None:
      self.close()
    else:
      self.drain()

  def _open(self) -> None:
    """Makes a new manager.

    Raises:
      CheckpointError: see `__init__`.
      OSError: the bucket does not answer, or refuses. There is no manager then.
    """
    self._close_manager()
    self._set_aside_in_all()
    try:
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(**self._options),
        item_handlers={
          'state': ocp.StandardCheckpointHandler(),
          'extra': ocp.JsonCheckpointHandler(),
        },
      )
    except OSError as error:
      if not files.is_local(self._directory):
        raise
      raise CheckpointError(
        f'{self._directory} cannot be opened for checkpoints: {error}.'
      ) from error
    self._latest_step = self._manager.latest_step()

  def _close_manager(self) -> None:
    # After a failed save it has to be closed again and again: each of its parts
    # first raises the error once.
    if self._manager:
      closings = (self._thread.submit(self._manager.close) for _ in range(5))
      any(closing.exception() is None for closing in closings)
      self._manager = None

  def _set_aside_in_all(self) -> None:
    """See `_set_aside`; raises an error in all processes or in none."""
    failure = None
    try:
      self._set_aside()
    except (CheckpointError, OSError) as error:
      failure = error
    if distributed.any_of(failure is not None):
      raise failure or CheckpointError(
        f'{self._directory} cannot be opened: see the log of the other '
        'processes.'
      )

  def _set_aside(self) -> None:
    """Renames directories of steps newer than the newest good step."""
    try:
      if jax.process_index() == 0:
        saved_steps.set_uncommitted_aside(self._directory)
        saved_steps.newest_good_step(self._directory, set_aside=True)
    finally:
      multihost_utils.sync_global_devices(f'{self._directory} is verified')
    saved_steps.latest_step(
      self._directory
    )  # Raises where process 0 has raised.

  def _finish(self, step: int, begin: float) -> None:
    """Waits for the commit and adds the manifest; runs in a thread.

    Args:
      step: that is being saved.
      begin: `time.monotonic()` when the save began, for the log.
    """
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      path = self._directory / str(step)
      if lacking := contents.hollow(path):
        raise FileNotFoundError(f'{path}: {lacking}')
      manifest.write(path)
      logging.info(
        'Saved step %d in %.1fs: %s',
        step,
        time.monotonic() - begin,
        self._given_directory / str(step),
      )
      self._remove_oldest()

  def _remove_oldest(self) -> None:
    if self._max_to_keep is None:
      return
    try:
      saved_steps.remove_oldest(self._directory, self._max_to_keep)
    except OSError as error:
      reason = error.strerror or ' '.join(str(error).split())
      logging.warning(
        '%s: older checkpoints could not be removed (%s). The next save tries '
        'it again.',
        self._given_directory,
        reason,
      )

  def _settle(self, last: bool = False) -> None:
    """Waits for the save in flight, and logs the error if it failed.

    Raises:
      CheckpointError: it failed, and `last` is true or `save_failures` saves
        have failed in a row.
    """
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
    try:
      self._open()  # It removes what the failed save has written.
    except OSError as unanswered:
      logging.error('%s: %s', self._directory, unanswered)
    if last or self._failures >= self._save_failures:
      raise CheckpointError(
        f'{message}. Older checkpoints are intact: repair or free the disk, '
        'and the same command continues from them.'
      ) from error
