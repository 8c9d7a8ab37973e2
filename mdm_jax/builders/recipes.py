"""The --config flag: finds recipes by name, and explains mistakes in a line."""

from collections.abc import Sequence
import importlib.util
import pathlib
import re
import sys
import traceback

from absl import app, flags


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Absl's parser of flags, for commands with a --config flag.

  `--config=shapes_64` is the shipped recipe of that name, from any directory,
  `--config=path/to/mine.py` any other. Mistakes end the process with one line
  where absl would print a traceback.
  """
  argv = _with_paths(argv)
  try:
    rest = app.parse_flags_with_usage(argv)
    flags.FLAGS.config.lock()  # Raises if the file could not be read.
    return rest
  except OSError as error:
    sys.exit(f'error: {str(error).splitlines()[-1].strip()}')
  except (AttributeError, LookupError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == 'get_config' for frame in frames):
      raise  # A mistake in the recipe: the traceback says where.
    # ConfigDict wraps the name in quotes, twice.
    reason = str(error).strip('"\'')
    changes = [word for word in argv if word.startswith('--config.')]
    sys.exit(
      f'error: {" ".join(changes)}: no such key ({reason}); '
      'configs/common.py has all keys.'
    )


def _with_paths(argv: Sequence[str]) -> list[str]:
  """Replaces the name of a shipped recipe by its path."""
  words = list(argv)
  for i, word in enumerate(words):
    if found := re.fullmatch(r'(--?config=)(\w+)((?::.*)?)', word):
      flag, name, mode = found.groups()
      words[i] = f'{flag}{_path(name)}{mode}'
    elif re.fullmatch(r'--?config', word) and i + 1 < len(words):
      if found := re.fullmatch(r'(\w+)((?::.*)?)', words[i + 1]):
        words[i + 1] = f'{_path(found[1])}{found[2]}'
  return words


def _path(name: str) -> pathlib.Path:
  spec = importlib.util.find_spec('configs')
  for directory in spec.submodule_search_locations if spec else ():
    path = pathlib.Path(directory, f'{name}.py')
    if path.exists():
      return path
  sys.exit(
    f'error: --config={name}: there is no shipped recipe of this name; give '
    'the path of a file, such as configs/shapes_64.py.'
  )
