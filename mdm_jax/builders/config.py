"""A run's configuration: as JSON, on disk, and compared with another."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import re
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mdm_jax.builders import ranges
from mdm_jax.runtime import files

TRAINED_ENCODERS = ('learned', 'label')
AUTOENCODER = 'autoencoder'  # `kind` of a stage
_FILE = 'config.json'
_ABSENT = 'absent'
# Keys that change neither what is learned nor what a step costs.
_COSTLESS = (
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
  'watchdog.',
)
# Keys that say where files are, whose content is compared instead.
_PLACES = ('data.path:', 'data.image_path:', 'text.path:', 'text.tokenizer:')
# Keys that may change when a run continues. None of them changes what is
# learned, but for the guard's: a run that it has stopped could not go on
# without a change.
_MAY_CHANGE = (
  *_COSTLESS,
  *_PLACES,
  'mesh.',
  'sharding_rules',
  'sampler.',
  'eval.',
  'guard.',
  'stages.accumulate:',
  'model.levels.remat',
  'model.levels.lanes',
)
# Of those keys, the ones that the metrics of a run depend on.
_MEASURED = ('log_every:', 'sampler.', 'eval.', 'guard.')


# Each key that was added, with the value that the runs before it behaved by. []
# leads into each section of a list. New entries come last: their number is the
# version of config.json.
_ADDED = {
  'model.levels[].remat': 'none',
  'model.levels[].lanes': 1,
  'stages[].accumulate': 1,
  'averages.widths': (),
  'averages.snapshot_every': 1000,
  'guard.spike_factor': 0.0,
  'guard.window': 100,
  'guard.max_skipped': 10,
  'replicas_every': 0,
  'watchdog.start_up': 0,
  'watchdog.step': 0,
  'watchdog.save': 0,
  'watchdog.evaluate': 0,
  'eval.every': 0,
  'eval.best_metric': '',
  'checkpoint_minutes': 0.0,
  'profile_every': 0,
  'trackers': ('tensorboard',),
  'data.max_pixels': 128_000_000,
  'text.tokenizer_rules': 'sentencepiece',
  'text.padding': 'max_length',
  'diffusion.normalize_time_weights': False,
  'sampler.pixels': 'round',
  'eval.loss_every': 0,
  'data.two_objects': 0.25,
  'diffusion.noise_floor': 0.0,
  'diffusion.min_snr_gamma': 5.0,
  'diffusion.sigmoid_bias': 0.0,
  'diffusion.p2': (1.0, 1.0),
  'diffusion.time_density': 'uniform',
  'diffusion.logit_normal': (0.0, 1.0),
  'diffusion.stratified_times': False,
  'diffusion.level_times': 'shared',
  'diffusion.level_offset': 0.0,
  'sampler.level_offset': 0.0,
  'diffusion.reference_resolution': 0,
  'model.levels[].kind': 'unet',
  'model.levels[].frames': 1,
  'model.levels[].frame_attention': (),
  'stages[].max_frames': 0,
  'stages[].frame_shift_power': 0.0,
  'data.clip_start': 'random',
  'data.image_set': '',
  'data.image_path': '',
  'model.levels[].frame_attention_kind': 'divided',
  'model.cascade': False,
  'diffusion.augmentation': 0.5,
  'sampler.augmentation': 0.1,
  'model.levels[].share': 'none',
  'autoencoder.resolution': 0,
  'autoencoder.kind': 'plain',
  'autoencoder.kl_weight': 1e-6,
  'autoencoder.latent_channels': 4,
  'autoencoder.channels': (128, 256, 512, 512),
  'autoencoder.num_blocks': (2, 2, 2, 2),
  'autoencoder.num_groups': 32,
  'autoencoder.patch_size': 1,
  'stages[].kind': 'diffusion',
  'model.levels[].downsample': 'average',
  'optimizer.mu_dtype': 'float32',
}
# With these a run that lacks them may begin at any step.
_MAY_BEGIN = ('averages.widths',)
_VERSION = 'version'


def load_config(values: Mapping[str, Any]) -> ConfigDict:
  """Restores a configuration from JSON, in which tuples have become lists."""

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

  return restore(values)


def _read(path: epath.Path) -> tuple[dict[str, Any], list[str]]:
  """Reads `config.json` of this version or of an earlier one.

  Returns:
    The configuration with the keys of this version, and those among them that
    the file lacks, which are logged.

  Raises:
    UnreadableFile: it cannot be read, or is no JSON of a dict.
    ValueError: it is of a later version, or has an unknown key. The message is
      a line that names the file, the key and the remedy.
  """
  values = files.read_json(path)
  version = values.pop(_VERSION, 0)
  if not files.is_count(version):
    raise files.UnreadableFile(path, f'has no number as its {_VERSION!r}')
  if version > len(_ADDED):
    raise ValueError(
      f'{path} is of a later version of mdm_jax (its keys are version '
      f'{version}; this one knows {len(_ADDED)}): update mdm_jax.'
    )
  added = [
    key for key, value in _ADDED.items() if _add(values, key.split('.'), value)
  ]
  if added:
    logging.info(
      '%s is of an earlier version. Keys added since: %s',
      path,
      ', '.join(f'{key}={_ADDED[key]!r}' for key in added),
    )
  try:
    for _ in ranges.leaves(values, ''):
      pass
  except ranges.UnknownKey as error:
    raise ValueError(
      f'{path}: this version of mdm_jax has no key {error.key!r}: use the '
      'version that the run was trained with.'
    ) from None
  except ValueError:
    pass  # No section where one should be: it is compared or checked later.
  return values, added


def _add(section: dict[str, Any], path: Sequence[str], value: Any) -> bool:
  """Sets a key in each section that lacks it, and says whether one did.

  What should be a section and is none stays, for `ranges.check` to name.
  """
  key, *below = path
  name = key.removesuffix('[]')
  if below:
    is_list = name != key
    parts = section.get(name) if is_list else [section.setdefault(name, {})]
    # A list, as all of them are changed.
    return isinstance(parts, list) and any(
      [_add(part, below, value) for part in parts if isinstance(part, dict)]
    )
  if name in section:
    return False
  section[name] = value
  return True


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
  """Writes `config.json`, with its version. One process calls it."""
  path = epath.Path(workdir) / _FILE
  if path.is_dir():
    files.set_aside(path)
  files.write_json(path, {_VERSION: len(_ADDED), **config})


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
  """Reads `config.json`, in which tuples have become lists.

  Keys that the config of an earlier version lacks get the values that its run
  behaved by, and are logged.

  Raises:
    FileNotFoundError: the directory has none.
    UnreadableFile: it cannot be read, or is no JSON of a dict.
    ValueError: it is of a later version, or has an unknown key.
  """
  path = epath.Path(workdir) / _FILE
  if not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist: is this the directory of a training run?'
    )
  try:
    values, _ = _read(path)
  except files.UnreadableFile as error:
    raise files.UnreadableFile(
      path,
      f'{error.reason}: restore it from a backup, or run the command that '
      'trains the run once more, which makes it anew',
    ) from None
  return values


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
    ValueError: they differ in keys that decide on what is learned, which the
      message names; or see `changes_of_run`.
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
    ValueError: it is of a later version, or has an unknown key.
  """
  path = epath.Path(workdir) / _FILE
  old, added = _read(path)
  begun = [key for key in _MAY_BEGIN if key in added]
  free = (*_MAY_CHANGE, *(f'{key}:' for key in (*may_change, *begun)))
  return {
    line: re.sub(r'\[\d+\]', '', line).startswith(free)
    for line in differences(old, new)
  }


def has_config_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
  """Whether two runs have the same metrics, but for chance and their machines.

  Args:
    old: what `read_config` returned for a run, maybe of an earlier version.
    new: configuration of another one, as JSON.
  """
  old = json.loads(json.dumps(old))
  for key, value in _ADDED.items():
    _add(old, key.split('.'), value)
  free = tuple(
    key for key in _MAY_CHANGE if not f'{key}:'.startswith(_MEASURED)
  )
  return all(
    re.sub(r'\[\d+\]', '', line).startswith(free)
    for line in differences(old, new)
  )


def costs_and_learning(config: Mapping[str, Any]) -> dict[str, str]:
  """The keys that change what is learned, or what it costs.

  Args:
    config: configuration, as JSON.

  Returns:
    Paths, such as `stages[1].steps`, and the `repr` of their values.
  """
  return {
    path: value
    for path, value in _leaves(config, '').items()
    if not re.sub(r'\[\d+\]', '', path).startswith(_COSTLESS)
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


def sampler_settings(config: ConfigDict) -> dict[str, Any]:
  """The sampler's keys, to be recorded beside what was sampled.

  Keys that came later are recorded only where they matter, so that what was
  recorded before can be compared.
  """
  settings = config.sampler.to_dict()
  if not settings['level_offset']:
    del settings['level_offset']
  if not config.model.cascade:
    del settings['augmentation']
  if settings['name'] != 'ddim':  # No other sampler reads it.
    del settings['eta']
  return settings


def stage_directory(
  workdir: epath.PathLike,
  config: ConfigDict,
  index: int,
  kind: str = 'checkpoints',
) -> epath.Path:
  """Directory of a stage's 'checkpoints', 'averages' (snapshots) or 'best'."""
  name = f'{index}_{config.stages[index].name}'
  return epath.Path(workdir) / kind / name
