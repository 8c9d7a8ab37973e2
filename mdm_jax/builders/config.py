"""A run's configuration: as JSON, on disk, and compared with another."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import re
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mdm_jax.runtime import files

TRAINED_ENCODERS = ('learned', 'label')
_FILE = 'config.json'
_ABSENT = 'absent'
# Keys that may change when a run continues. None of them changes what is
# learned, but for the guard's: a run that it has stopped could not go on
# without a change.
_MAY_CHANGE = (
  'mesh.',
  'sharding_rules',
  'data.num_workers',
  'data.num_threads',
  'data.prefetch',
  'data.max_bad_fraction',
  'data.may_change',
  'data.max_pixels',
  'log_every',
  'trackers',
  'sample_every',
  'checkpoint_every',
  'checkpoint_minutes',
  'checkpoints_to_keep',
  'averages.snapshot_every',
  'save_failures',
  'replicas_every',
  'profile_every',
  'text.class_names',
  'sampler.',
  'eval.',
  'guard.',
  'watchdog.',
  'stages.accumulate:',
  'model.levels.remat',
  'model.levels.lanes',
)
# Keys that were added later, with the values that older runs behaved by. A dot
# leads into a section, or into each section of a list.
_ADDED = {
  'checkpoint_minutes': 0.0,
  'profile_every': 0,
  'trackers': ('tensorboard',),
  'data.max_pixels': 128_000_000,
  'text.tokenizer_rules': 'sentencepiece',
  'text.padding': 'max_length',
  'diffusion.normalize_time_weights': False,
  'sampler.pixels': 'round',
  'eval.loss_every': 0,
}


def load_config(values: Mapping[str, Any]) -> ConfigDict:
  """Restores a configuration from JSON, in which tuples have become lists.

  Keys that an older run's configuration lacks get the values that it behaved
  by.
  """

  def restore(value):
    if isinstance(value, Mapping):
      return ConfigDict(
        {key: restore(child) for key, child in value.items()}
      ).lock()
    if isinstance(value, list):
      children = [restore(child) for child in value]
      is_sections = any(isinstance(child, ConfigDict) for child in children)
      return children if is_sections else tuple(children)
    return value

  return restore(_with_added(values))


def _with_added(values: Mapping[str, Any]) -> dict[str, Any]:
  values = dict(values)
  for path, value in _ADDED.items():
    _add(values, path.split('.'), value)
  return values


def _add(section: dict[str, Any], path: Sequence[str], value: Any) -> None:
  """Sets a key in a section that lacks it; copies the sections below.

  What should be a section and is none stays, for `ranges.check` to name.
  """
  key, *below = path
  child = section.get(key)
  if not below:
    section.setdefault(key, value)
  elif isinstance(child, list | tuple) and all(
    isinstance(part, Mapping) for part in child
  ):
    section[key] = [dict(part) for part in child]
    for part in section[key]:
      _add(part, below, value)
  elif isinstance(child, Mapping):
    section[key] = dict(child)
    _add(section[key], below, value)


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
  """Writes `config.json`. One process calls it."""
  path = epath.Path(workdir) / _FILE
  if path.is_dir():
    files.set_aside(path)
  files.write_json(path, config)


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
  """Reads `config.json`, in which tuples have become lists.

  Raises:
    FileNotFoundError: the directory has none.
    UnreadableFile: it cannot be read, or is no JSON of a dict.
  """
  path = epath.Path(workdir) / _FILE
  if not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist: is this the directory of a training run?'
    )
  try:
    return files.read_json(path)
  except files.UnreadableFile as error:
    raise files.UnreadableFile(
      path,
      f'{error.reason}: restore it from a backup, or run the command that '
      'trains the run once more, which makes it anew',
    ) from None


def has_config(workdir: epath.PathLike) -> bool:
  """Whether a run was begun in this directory."""
  return (epath.Path(workdir) / _FILE).exists()


def require_same_config(
  workdir: epath.PathLike, new: Mapping, may_change: Sequence[str] = ()
) -> None:
  """Compares a configuration with the one that a run was begun with.

  If that cannot be read, it counts as lost, and the new one takes its place.

  Args:
    workdir: of the run.
    new: configuration that is to continue it, as JSON.
    may_change: further keys that may differ.

  Raises:
    ValueError: they differ in keys that decide on what is learned. The message
      names them.
  """
  try:
    changes = changes_of_run(workdir, new, may_change)
  except files.UnreadableFile as error:
    logging.warning(
      '%s: it is made anew from --config, which could not be compared with it.',
      error,
    )
    return
  if changed := [
    line for line, is_allowed in changes.items() if not is_allowed
  ]:
    raise ValueError(
      f'{workdir} was trained with another config ('
      + '; '.join(changed[:5])
      + (' …' if len(changed) > 5 else '')
      + '): give another --workdir, or the same config.'
    )


def changes_of_run(
  workdir: epath.PathLike, new: Mapping, may_change: Sequence[str] = ()
) -> dict[str, bool]:
  """How a configuration differs from the one that a run was begun with.

  Args:
    workdir, new, may_change: as for `require_same_config`.

  Returns:
    Whether each change is allowed, by its line, see `differences`.

  Raises:
    UnreadableFile: the run's configuration cannot be read.
  """
  old = _with_added(files.read_json(epath.Path(workdir) / _FILE))
  # TFDS replaced '~' when this package did not.
  if isinstance(data := old.get('data'), dict) and 'path' in data:
    old['data'] = data | {'path': os.path.expanduser(str(data['path']))}
  free = (*_MAY_CHANGE, *(f'{key}:' for key in may_change))
  return {
    line: re.sub(r'\[\d+\]', '', line).startswith(free)
    for line in differences(old, new)
  }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Names every value that two configurations do not share.

  Args:
    old, new: nested dicts and sequences, compared as JSON, so that a tuple
      equals a list.

  Returns:
    One line for each value, such as `stages[1].steps: 100 -> 200`. A value that
    only one of them has is `absent` in the other.
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


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
  """Puts a key before the message of any ValueError raised inside."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{key}: {error}') from error


def reading_prompts(config: ConfigDict) -> ConfigDict:
  """The config of the same network, with an encoder for any prompt.

  Text features are precomputed for the captions of a data set alone; other
  prompts need the encoder itself.
  """
  config = config.copy_and_resolve_references()
  if config.text.encoder == 'precomputed':
    config.text.encoder = 't5'
  return config


def stage_directory(
  workdir: epath.PathLike,
  config: ConfigDict,
  index: int,
  kind: str = 'checkpoints',
) -> epath.Path:
  """Directory of a stage's 'checkpoints', 'averages' (snapshots) or 'best'."""
  name = f'{index}_{config.stages[index].name}'
  return epath.Path(workdir) / kind / name
