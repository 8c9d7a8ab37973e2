"""Finds the checkpoints of a stage that are committed and undamaged.

Whatever keeps a step from being read makes it a damaged step, and so does being
another checkpoint than its directory says. If a step is damaged, an older one
is used. A committed step has no manifest if the process died before writing it,
or if an earlier version saved the step. It is used only if no other step is
good, and if all of it can be read.
"""

from collections.abc import Iterator, Mapping, Sequence
import re
from typing import Any

from absl import logging
from etils import epath, epy
import jax
from jax.experimental import multihost_utils

from mdm_jax.checkpoint import contents, identity, manifest
from mdm_jax.runtime import files

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp

_FINISHED = 'finished.json'
_LOOKS = 5  # Times to look again for steps while another process removes some.


class CheckpointError(ValueError):
  """No checkpoint can be trusted, or none can be saved."""


class StepNames:
  """Names of steps for Orbax, and which there are, as this module sees it.

  Orbax's own (`ocp.path.step.NameFormat`) asks for the properties of the whole
  bucket, which an account that may write objects need not see.
  """

  def build_name(self, step: int) -> str:
    """The name of a step's directory."""
    return str(step)

  def find_all(self, directory: epath.PathLike) -> Iterator[Any]:
    """Orbax's metadata of all steps."""
    for step in sorted(_committed_steps(epath.Path(directory))):
      yield self.find_step(directory, step)

  def find_step(self, directory: epath.PathLike, step: int) -> Any:
    """Orbax's metadata of a step."""
    return ocp.path.step.Metadata(step, epath.Path(directory) / str(step))


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
  if step is None and (newest := newest_good_step(directory)) is not None:
    return newest
  committed = sorted(_committed_steps(directory))
  if step not in committed:
    raise FileNotFoundError(
      f'{directory} has no checkpoint{"" if step is None else f" {step}"}:'
      f' committed steps are {committed}.'
    )
  if problem := _problem(directory / str(step)):
    raise CheckpointError(f'{directory / str(step)} is damaged: {problem}.')
  return step


def good_steps(directory: epath.PathLike) -> list[int]:
  """All undamaged steps in ascending order; logs the others."""
  good, directory = [], epath.Path(directory)
  for step in sorted(_committed_steps(directory)):
    path = directory / str(step)
    problem = 'it has no manifest'
    if manifest.exists(path):
      problem = _problem(path)
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
    path, workdir = directory / _FINISHED, directory.parent.parent
    if path.is_dir():
      files.set_aside(path)
    files.write_json(
      path,
      {
        'step': step,
        'stage': identity.stage_of(directory),
        'run': identity.read_run(workdir),
      },
    )
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
  try:
    finished = files.read_json(path, _is_finished)
  except files.UnreadableFile as error:
    logging.warning('%s: it is made anew.', error)
    # If the stage was complete, it is found so again from its last checkpoint.
    # Only imported weights have no steps to take.
    return 0 if newest_good_step(directory) == 0 else None
  step, stage = finished['step'], identity.stage_of(directory)
  other = identity.other_run(directory.parent.parent, finished.get('run'))
  if finished.get('stage', stage) != stage:
    other = f'it is of {finished["stage"]}'
  if other:
    logging.warning('%s is not used: %s.', path, other)
    return None
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


def _is_finished(value: Any) -> bool:
  return isinstance(value, dict) and files.is_count(value.get('step'))


def remove_oldest(directory: epath.PathLike, keep: int) -> None:
  """Removes all committed steps but the newest ones. Process 0 calls it.

  Raises:
    OSError: one cannot be removed.
  """
  directory = epath.Path(directory)
  for step in sorted(_committed_steps(directory))[:-keep]:
    contents.remove(directory / str(step))


def set_uncommitted_aside(directory: epath.Path) -> None:
  """Renames step directories that were never committed. Process 0 calls it.

  In a bucket those of interrupted saves are removed, as Orbax does on a disk.
  """
  newest = max(_committed_steps(directory), default=-1)
  for step, committed in _step_directories(directory).items():
    path = directory / str(step)
    if committed:
      continue
    if not files.is_local(path) and contents.is_interrupted(path):
      logging.info('%s was not saved to its end: it is removed.', path)
      contents.remove(path)
    else:
      logging.warning('%s is not committed.', path)
      # An interrupted save leaves some files; an interrupted deletion may leave
      # none, but only old steps are deleted. So a new and empty one is damaged.
      emptied = step > newest and _is_empty(path)
      _rename(path, 'corrupt' if emptied else 'uncommitted')


def newest_good_step(
  directory: epath.Path, set_aside: bool = False
) -> int | None:
  """The newest undamaged step, None if there was never any step.

  Args:
    directory: checkpoint directory of one stage.
    set_aside: whether to rename newer steps, which are damaged or have no
      manifest, and older ones that Orbax cannot open. Otherwise
      another process may be removing steps.

  Raises:
    CheckpointError: there are checkpoints, but none is good.
  """
  for _ in range(_LOOKS):
    steps = _committed_steps(directory)
    newest, problems, unverified = _look_for_newest(directory, steps)
    older = [step for step in steps if newest is not None and step < newest]
    if set_aside:  # An older step is verified when it is needed.
      found = {s: contents.cannot_be_opened(directory / str(s)) for s in older}
      problems |= {step: text for step, text in found.items() if text}
    # A step that is being removed looks damaged; another may be the newest now.
    if not problems or {*steps} == {*_committed_steps(directory)}:
      break
  for step, problem in problems.items():
    logging.warning('%s is damaged: %s.', directory / str(step), problem)
  if newest in unverified:
    logging.warning(
      '%s has no manifest, and no other step is good: it is used unverified.',
      directory / str(newest),
    )
  if set_aside:
    for step in problems:
      _rename(directory / str(step), 'corrupt')
    for step in unverified:
      if newest is not None and step > newest:
        _rename(directory / str(step), 'uncommitted')
  if newest is None:
    _require_none_damaged(directory, problems)
  return newest


def _look_for_newest(
  directory: epath.Path, steps: Sequence[int]
) -> tuple[int | None, dict[int, str], list[int]]:
  """The newest good step, problems of other steps, steps without a manifest."""
  newest, problems, unverified = None, {}, []
  for step in sorted(steps, reverse=True):
    path = directory / str(step)
    if not manifest.exists(path):
      unverified.append(step)
    elif problem := _problem(path):
      problems[step] = problem
    else:
      newest = step
      break
  if newest is None:
    for step in list(unverified):
      problem = _problem(directory / str(step))
      if problem is None:
        newest = step
        break
      problems[step] = problem
      unverified.remove(step)
  return newest, problems, unverified


def _problem(path: epath.Path) -> str | None:
  """What speaks against using a committed step, None if nothing does."""
  if not manifest.exists(path):
    return contents.problem(path)
  problem = manifest.problem(path) or contents.hollow(path)
  if problem is None and manifest.identity(path) is None:
    problem = contents.other_identity(path)  # An earlier version has saved it.
  return problem


def _require_none_damaged(
  directory: epath.Path, problems: Mapping[int, str] | None = None
) -> None:
  """Raises CheckpointError if there are damaged checkpoints."""
  damaged = [f'{step}: {problem}' for step, problem in (problems or {}).items()]
  if directory.exists() and not damaged:
    damaged = [
      path.name
      for path in directory.iterdir()
      if '.corrupt' in path.name or (path.name.isdigit() and _is_empty(path))
    ]
  if damaged:
    raise CheckpointError(
      f'{directory} has checkpoints, but none is good ({"; ".join(damaged)})'
      ': restore one from a backup, or remove the directory to start the '
      'stage again.'
    )


def _is_empty(path: epath.Path) -> bool:
  """Whether there is nothing in a directory, or it is none."""
  return not path.is_dir() or not any(path.iterdir())


def _rename(path: epath.Path, suffix: str) -> None:
  target = path.with_name(f'{path.name}.{suffix}')
  try:
    # In a bucket that may be the half that was moved before an interruption.
    if suffix == 'uncommitted' and files.is_local(path) and target.exists():
      target.rmtree()
    files.set_aside(path, suffix)
  except OSError as error:
    raise CheckpointError(
      f'{path} is not to be used, and cannot be renamed ({error}): move it '
      'away.'
    ) from error


def _step_directories(directory: epath.Path) -> dict[int, bool]:
  """Steps, and whether each was committed."""
  # Orbax counts whatever has such a number for a name as a step.
  try:
    found = [*directory.iterdir()] if directory.exists() else []
  except OSError as error:
    if not files.is_local(directory):  # There is no answer now.
      raise
    raise CheckpointError(f'{directory} cannot be read ({error}).') from error
  steps = [p for p in found if re.fullmatch('0|[1-9][0-9]*', p.name)]
  if files.is_local(directory):
    whole = {path for path in steps if manifest.exists(path)}
  else:  # One request for all of them.
    whole = {path.parent for path in directory.glob(f'*/{manifest.NAME}')}
  return {
    int(path.name): path in whole or contents.is_committed(path)
    for path in steps
  }


def _committed_steps(directory: epath.Path) -> list[int]:
  steps = _step_directories(directory)
  return [step for step, committed in steps.items() if committed]
