"""Which checkpoint a directory is: its run, its stage and its step.

A run gets an identifier when it is begun, in `run.json` of its working
directory. It stays the same when the directory is copied or moved. Manifests
record it with the stage and the step, so that a checkpoint of another run, or
one under another's name, is not taken for what its directory says.
"""

import contextlib
import json
import re
from typing import Any, NamedTuple
import uuid

from absl import logging
from etils import epath
import xxhash

from mdm_jax.runtime import files

_FILE = 'run.json'


class Identity(NamedTuple):
  """What a checkpoint is.

  Attributes:
    run: identifier of the run, None if it is not known.
    stage: kind and stage, as in 'checkpoints/0_64'.
    step: of the stage.
  """

  run: str | None
  stage: str
  step: int

  @classmethod
  def of(cls, directory: epath.PathLike) -> 'Identity':
    """The identity that the place of a step's directory says."""
    path = files.absolute(directory)
    return cls(read_run(_workdir(path)), stage_of(path.parent), int(path.name))

  @classmethod
  def from_json(cls, values: Any) -> 'Identity | None':
    """Reads what `to_json` gives; None if it is not there or was changed."""
    if not isinstance(values, dict):
      return None
    found = cls(values.get('run'), values.get('stage'), values.get('step'))
    return found if values.items() >= found.to_json().items() else None

  def to_json(self) -> dict[str, Any]:
    """The fields, and their hash, so that damage makes no other identity."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(self).encode())
    return {**self._asdict(), 'hash': digest}

  def problem(self, directory: epath.PathLike) -> str | None:
    """What speaks against a step's directory being this checkpoint."""
    place = Identity.of(directory)
    if self[1:] != place[1:]:
      return f'it was saved as step {self.step} of {self.stage}'
    return other_run(_workdir(files.absolute(directory)), self.run)


def stage_of(directory: epath.PathLike) -> str:
  """Kind and stage of a stage's directory, as in 'checkpoints/0_64'."""
  return '/'.join(files.absolute(directory).parts[-2:])


def other_run(workdir: epath.PathLike, run: Any) -> str | None:
  """Says that something is of another run than that of a working directory."""
  own = read_run(workdir)
  if run is None or own is None or run == own:
    return None
  return (
    f'it is of another run, {run}, not {own} (to continue from it all the '
    f'same, remove {epath.Path(workdir) / _FILE})'
  )


def read_run(workdir: epath.PathLike) -> str | None:
  """Identifier of a run; None if it has none, or it cannot be read."""
  try:
    return files.read_json(epath.Path(workdir) / _FILE, _is_run)['run']
  except files.UnreadableFile:
    return None


def begin_run(workdir: epath.PathLike) -> None:
  """Gives a run an identifier, unless it has one. Process 0 calls it.

  If there are checkpoints already, it is that of the newest one: then the file
  was lost, or checkpoints were copied in order to continue from them.
  """
  path = epath.Path(workdir) / _FILE
  try:
    files.read_json(path, _is_run)
    return
  except files.UnreadableFile as error:
    if path.exists():
      logging.warning('%s: it is made anew.', error)
  if path.is_dir():
    files.set_aside(path)
  files.write_json(
    path, {'run': _run_of_newest(path.parent) or uuid.uuid4().hex}
  )


def _is_run(value: Any) -> bool:
  run = value.get('run') if isinstance(value, dict) else None
  # Any other text was never an identifier; it would refuse all checkpoints.
  return isinstance(run, str) and bool(re.fullmatch('[0-9a-f]{32}', run))


def _run_of_newest(workdir: epath.Path) -> str | None:
  """The identifier in the manifest of a run's newest checkpoint."""
  found = []
  for path in workdir.glob('checkpoints/*/*/manifest.json'):
    stage, step = path.parent.parent.name.partition('_')[0], path.parent.name
    if stage.isdecimal() and step.isdecimal():
      found.append((int(stage), int(step), path))
  for *_, path in sorted(found, reverse=True):
    with contextlib.suppress(files.UnreadableFile):
      recorded = Identity.from_json(files.read_json(path))
      if recorded and recorded.run:
        return recorded.run
  return None


def _workdir(step_directory: epath.Path) -> epath.Path:
  return step_directory.parent.parent.parent
