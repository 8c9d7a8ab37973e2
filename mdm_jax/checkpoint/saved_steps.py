"""Finds the checkpoints of a stage that are committed and undamaged.

If a step is damaged, an older one is used. A committed step has no manifest if
the process died before writing it, or if an earlier version saved the step. It
is used only if no other step is good.
"""

from collections.abc import Mapping
import json

from absl import logging
from etils import epath, epy
import jax
from jax.experimental import multihost_utils

from mdm_jax.checkpoint import manifest
from mdm_jax.runtime import files

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

_FINISHED = 'finished.json'


class CheckpointError(ValueError):
  """No checkpoint can be trusted, or none can be saved."""


def latest_step(directory: epath.PathLike) -> int | None:
  """The newest committed step in a directory that may be in use, or None.

  Reads names only, so that the step may be damaged; `require_step` verifies it.

  Raises:
    CheckpointError: there are only damaged checkpoints.
  """
  directory = epath.Path(directory)
  step = max(_committed_steps(directory), default=None)
  if step is None:
    _require_none_damaged(directory)
  return step


def require_step(directory: epath.PathLike, step: int | None = None) -> int:
  """Returns a step after verifying that it is committed and undamaged.

  Args:
    directory: checkpoint directory of one stage.
    step: step to read; None for the newest good one.

  Raises:
    FileNotFoundError: if there is no such step.
    CheckpointError: if the step, or with None every step, is damaged.
  """
  directory = epath.Path(directory)
  committed = sorted(_committed_steps(directory))
  if step is None:
    step = newest_good_step(directory)
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
  """All undamaged steps in ascending order; logs the others."""
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
    directory: checkpoint directory of the stage.
    step: the last step of the stage, committed: call `Checkpoints.wait` before.

  Raises:
    FileNotFoundError: if the step is not committed.
  """
  directory = epath.Path(directory)
  if step not in _committed_steps(directory):
    raise FileNotFoundError(f'{directory} has no checkpoint {step}.')
  if jax.process_index() == 0:
    files.write_json(directory / _FINISHED, {'step': step})
  multihost_utils.sync_global_devices(f'{directory} is finished')


def finished_step(directory: epath.PathLike) -> int | None:
  """The last step of a complete stage, None if it is not complete.

  A stage whose last checkpoint is damaged is not complete, if it can continue
  from an older one.

  Raises:
    CheckpointError: there are checkpoints, but none is good.
  """
  directory = epath.Path(directory)
  path = directory / _FINISHED
  if not path.exists():
    return None
  step = json.loads(path.read_text())['step']
  newest = newest_good_step(directory)
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


def set_uncommitted_aside(directory: epath.Path) -> None:
  """Renames step directories that were never committed. Process 0 calls it."""
  newest = max(_committed_steps(directory), default=-1)
  for step, committed in _step_directories(directory).items():
    path = directory / str(step)
    if not committed:
      logging.warning('%s is not committed.', path)
      # An interrupted save leaves some files; an interrupted deletion may leave
      # none, but only old steps are deleted. So a new and empty one is damaged.
      emptied = step > newest and not any(path.iterdir())
      _rename(path, 'corrupt' if emptied else 'uncommitted')


def newest_good_step(
  directory: epath.Path, set_aside: bool = False
) -> int | None:
  """The newest undamaged step, None if there was never any step.

  Args:
    directory: checkpoint directory of one stage.
    set_aside: whether to rename newer steps, which are damaged or have no
      manifest.

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
      '%s has no manifest, and no other step is good: it is used unverified.',
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
  """Raises CheckpointError if there are damaged checkpoints."""
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
      ': restore one from a backup, or remove the directory to start the '
      'stage again.'
    )


def _rename(path: epath.Path, suffix: str) -> None:
  target = path.with_name(f'{path.name}.{suffix}')
  if suffix == 'uncommitted' and target.exists():
    target.rmtree()
  while target.exists():
    target = target.with_name(f'{target.name}+')
  path.rename(target)
  logging.warning('%s is now %s.', path, target.name)


def _step_directories(directory: epath.Path) -> dict[int, bool]:
  """Steps, and whether each was committed."""
  # Orbax counts any directory with a number for a name as a step. Only a
  # committed one has a commit timestamp.
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
