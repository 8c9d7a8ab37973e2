"""The --config flag: finds recipes by name, and explains mistakes in a line."""

from collections.abc import Sequence
import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
import types
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags
from ml_collections.config_flags import config_path

from mdm_jax.builders import listing, ranges
from mdm_jax.runtime import buckets, flag_types
from mdm_jax.runtime.printable import printable
from mdm_jax.runtime.value_types import Path

# The flag belongs to the module that calls `define`.
flags.disclaim_key_flags()

_KNOWN = 'configs/common.py has all keys.'
# What ConfigDict raises for a key that is not there, or a placeholder.
_MISTAKES = (
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
  config_dict.RequiredValueError,
)


def define(text: str, *, required: bool = True) -> flags.FlagHolder:
  """Defines --config.

  `--config=shapes_64` is the shipped recipe of that name, from any directory,
  `--config=path/to/mine.py` any other.

  Args:
    text: for --help.
    required: whether it must be given.
  """
  holder = config_flags.DEFINE_config_file('config', None, text)
  flags.FLAGS['config'].parser = _RecipeParser()
  if required:
    flags.mark_flag_as_required('config')
  return holder


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parser of flags for commands with a --config flag.

  A mistake in a flag, the recipe or a key ends the process with one line.
  """
  try:
    rest = flag_types.parse(argv)
    if flags.FLAGS.config is not None:
      ranges.check(flags.FLAGS.config)
    return rest
  except flags.Error as error:
    sys.exit(f'error: {_with_range(argv, flag_types.reason(error))}')
  except _MISTAKES as error:
    config = flags.FLAGS['config'].parser.loaded
    sys.exit(f'error: {_explain(argv, error, config)}')


def load(argument: str) -> ConfigDict:
  """The config of a recipe, `FILE`, `FILE:MODE`, `NAME` or `NAME:MODE`.

  Raises:
    ValueError: there is no such recipe, or something is wrong with it.
  """
  config = _RecipeParser().parse(argument)
  ranges.check(config)
  return config


def override(config: ConfigDict, key: str, text: str) -> Any:
  """Sets a key of a configuration to what `--config.KEY=TEXT` means.

  Args:
    config: is changed.
    key: such as `stages[0].learning_rate`.
    text: as on the command line.

  Returns:
    The key's new value.

  Raises:
    ValueError: there is no such key, or the value is wrong: one line that
      begins with `KEY=TEXT`.
  """
  word = f'--config.{key}={text}'
  own = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=own, sys_argv=['', word]
    )
    own(['', word])
    ranges.check(config)
    return config_path.get_value(key, config)
  except flags.Error as error:
    text = _with_range([word], flag_types.reason(error))
  except _MISTAKES as error:
    text = _explain([word], error, config)
  raise ValueError(text.removeprefix('--config.'))


def split(argument: str) -> list[str]:
  """The path or name of a --config, and its mode if it has one."""
  scheme = re.match(r'(\w+:/+)?', argument)[0]
  path, *mode = argument.removeprefix(scheme).split(':', 1)
  return [scheme + path, *mode]


def print_config(config: ConfigDict, workdir: str) -> None:
  """Prints the configuration that a run would use, to standard output.

  Args:
    config: of the flag, with the changes of the command line.
    workdir: of the run, which need not exist.
  """
  path = config_flags.get_config_filename(flags.FLAGS['config'])
  recipe = _RecipeParser().parse(path)
  # Replaces '~'. What is missing or wrong, the command line has given.
  with contextlib.suppress(ValueError):
    ranges.check(recipe)
  print(printable(f'# --config={path} --workdir={workdir}'))
  common = _load(_shipped('common'))
  print(printable(listing.listing(config, recipe, common)))
  print(printable(listing.run_changes(config, workdir)))


class _RecipeParser(flags.ArgumentParser):
  """Loads a recipe. All that can be wrong with it is a ValueError."""

  syntactic_help = 'a recipe'
  loaded = None  # the last config

  def parse(self, argument: str) -> ConfigDict:
    """The config of FILE, FILE:MODE, NAME or NAME:MODE."""
    path, *mode = split(argument)
    if re.fullmatch(r'\w+', path) and not pathlib.Path(path).is_file():
      path = _shipped(path)
    path = Path('file').check(path)
    # A recipe is the user's program: whatever it raises is a mistake in it.
    try:
      module = _load(path)
      make = getattr(module, 'get_config', None)
      if not callable(make):
        raise ValueError('it has no function get_config().')
      _check_mode(make, mode)
      config = make(*mode)
    except (Exception, SystemExit) as error:
      raise ValueError(_where(path, error)) from None
    if not isinstance(config, ConfigDict):
      raise ValueError(
        f'get_config() returns {type(config).__name__}: return a ConfigDict, '
        'as common.get_config() does.'
      )
    self.loaded = config.lock()
    return self.loaded

  def flag_type(self) -> str:
    """For --helpxml."""
    return 'recipe'


class _BucketLoader(importlib.machinery.SourceFileLoader):
  """Loads a module from a bucket."""

  def get_data(self, path: str) -> bytes:
    from mdm_jax.runtime import files  # Slow to import.

    return files.read_bytes(path)

  def path_stats(self, path: str) -> dict[str, Any]:
    raise OSError  # There is no directory of compiled code.


def _load(path: str) -> types.ModuleType:
  in_bucket = buckets.scheme(path) is not None
  make = _BucketLoader if in_bucket else importlib.machinery.SourceFileLoader
  loader = make('config_config', path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module
  loader.exec_module(module)
  return module


def _check_mode(make: Any, mode: list[str]) -> None:
  """Raises ValueError if a function does not take a mode, or needs one."""
  try:
    inspect.signature(make).bind(*mode)
  except TypeError:
    raise ValueError(
      f'it has no variants, so leave out :{mode[0]}.'
      if mode
      else 'it needs a variant: append :NAME.'
    ) from None


def _where(path: str, error: BaseException) -> str:
  """An error in a recipe, in a line that names the recipe's last line run."""
  text = ' '.join(str(error).split())
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == path
  ]
  if isinstance(error, SyntaxError) and error.filename == path:
    lines, text = [error.lineno], error.msg
  if not lines:
    if isinstance(error, ValueError):
      return text
    return f'{type(error).__name__}: {text}'
  if type(error) is ValueError and text.startswith('Unknown mode'):
    return text
  why = _wrong_key(error) or f'{type(error).__name__}: {text}'
  return f'{path}, line {lines[-1]}: {why}'


def _wrong_key(error: BaseException) -> str | None:
  """What is wrong with a key, if that is what a section raises an error for."""
  found = None
  for frame, _ in traceback.walk_tb(error.__traceback__):
    values = frame.f_locals
    name = values.get('key', values.get('attribute'))
    if isinstance(values.get('self'), ConfigDict) and name is not None:
      found = values['self'], name, values.get('value')
  if not found:
    return None
  section, name, value = found
  key = '.'.join(filter(None, [_place(section), str(name)]))
  if isinstance(error, KeyError | AttributeError):
    if name in section:
      return f'{key} cannot be deleted: give it another value.'
    if key in ranges.KEYS or key in _sections():
      return f'{key} is missing: start from common.get_config(); {_KNOWN}'
    return f'no such key ({key}){_or_rather(_near(key))}'
  if isinstance(error, TypeError) and f'{key}[]' in _sections():
    return ranges.wanted_list(key, value)
  if isinstance(error, TypeError) and key in ranges.KEYS:
    return f'{key}={value!r}: give {ranges.KEYS[key]}.'
  if isinstance(error, TypeError) and key in _sections():
    return f'{key}={value!r}: change one of its keys instead.'
  return None


def _place(section: ConfigDict) -> str:
  """Where a section is, such as 'model.levels[]': its keys tell."""
  sections, names = _sections(), set(section)
  return max(sections, key=lambda path: len(sections[path] & names))


def _sections() -> dict[str, set[str]]:
  """The names in each section, by the section's own: '' is the whole config."""
  sections = {}
  for key in ranges.KEYS:
    parts = key.split('.')
    for i, part in enumerate(parts):
      names = sections.setdefault('.'.join(parts[:i]), set())
      names.add(part.removesuffix('[]'))
  return sections


def _with_range(argv: Sequence[str], text: str) -> str:
  """An error about the value of a key, with what it may be instead."""
  for word in argv:
    name, _, value = word.partition('=')
    kind = ranges.KEYS.get(ranges.pattern(name.lstrip('-')[len('config.') :]))
    if kind and text.startswith(f'--{name.lstrip("-")}='):
      return f'{word}: give {kind}.'
  if found := re.match(
    r'(?:Type .* of field |--)config\.([^\s=]+).*'
    '(?:not supported| a ConfigDict)',
    text,
  ):
    return f'--config.{found[1]}: change one of its keys instead.'
  return text


def _explain(
  argv: Sequence[str], error: Exception, config: ConfigDict | None
) -> str:
  """Why a key could not be changed, or its value is wrong."""
  for word in argv:
    found = re.match(r'--?(?:no)?config\.([^=]+)', word)
    if not found or config is None:
      continue
    key = found[1]
    whole = re.sub(r'\[[^[]*\]$', '', key)
    if whole != key and (kind := ranges.KEYS.get(ranges.pattern(whole))):
      return f'{word}: change all of {whole}: give {kind}.'
    try:
      config_path.get_type(key, config)
    except (AttributeError, LookupError, TypeError, ValueError):
      return f'{word}: no such key ({key}){_meant(key, config)}'
  return ' '.join(str(error).split()) or repr(error)


def _meant(key: str, config: ConfigDict) -> str:
  """The end of a message about an unknown key: what was meant perhaps."""
  given = re.sub(r'\.(-?\d+)(?=\.|$)', r'[\1]', key)
  if found := re.match(r'(stages|model\.levels)(\[(-?\d+)\])?', given):
    count = len(ranges.find(config, found[1]) or ())
    if found[3] is None:
      given = given.replace(found[1], f'{found[1]}[0]', 1)
    elif not -count <= int(found[3]) < count:
      return f': {found[1]} has {count} elements, from [0]; {_KNOWN}'
  near = _near(ranges.pattern(given))
  for index in re.findall(r'\[-?\d+\]', given):
    near = near.replace('[]', index, 1)
  return _or_rather(near)


def _or_rather(near: str) -> str:
  """The end of a message about an unknown key, with the one that was meant."""
  return (f': did you mean {near}?' if near else ';') + f' {_KNOWN}'


def _near(key: str) -> str:
  """The known key that an unknown one is most like, or several; '' for none.

  Args:
    key: with [] in place of indices.
  """
  path, _, name = key.rpartition('.')
  siblings = _sections().get(path, ())
  if found := difflib.get_close_matches(name, sorted(siblings), 1, 0.7):
    return '.'.join(filter(None, [path, found[0]]))
  # A key of another section, or the name of the section is wrong.
  same = [other for other in ranges.KEYS if f'.{other}'.endswith(f'.{name}')]
  if path in _sections():
    return ' or '.join(same)
  near = difflib.get_close_matches(key, same or sorted(ranges.KEYS), 1, 0.7)
  return ''.join(near) or ' or '.join(same)


def _shipped(name: str) -> str:
  """Path of a shipped recipe."""
  spec = importlib.util.find_spec('configs')
  shipped = {
    path.stem: str(path)
    for directory in (spec.submodule_search_locations if spec else ())
    for path in sorted(pathlib.Path(directory).glob('[!_]*.py'))
  }
  if name in shipped:
    return shipped[name]
  shipped.pop('common', None)  # What all recipes begin with.
  raise ValueError(
    'there is no shipped recipe of this name; give the path of a file, or one '
    f'of {", ".join(shipped)}.'
  )
