"""The grid of a sweep: combinations of values of keys, and their names."""

from collections.abc import Callable, Mapping, Sequence
import copy
import itertools
import re
from typing import Any
import zlib

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from mdm_jax.builders import ranges, recipes

_LONGEST = 120  # characters of a run's name

# Values by key.
Changes = Mapping[str, Any]


def combinations(
  grid: Sequence[str], parse: Callable[[str, str], tuple[str, Any]]
) -> list[dict[str, Any]]:
  """All combinations of the values of some keys; the last key varies first.

  Args:
    grid: `KEY=VALUE,VALUE,…` for each key. Commas inside of brackets separate
      no values.
    parse: (key, text) -> the key as it is called everywhere, and a value.

  Returns:
    The values by key, for each combination.

  Raises:
    ValueError: a text is no such thing, it has a key or a value twice, or
      `parse` raises one.
  """
  values = {}
  for text in grid:
    key, _, joined = text.partition('=')
    key, texts = key.strip(), _split(joined)
    if not key or not all(texts):
      raise ValueError(
        f'--grid={text}: give KEY=VALUE,VALUE, at least one value.'
      )
    names, parsed = zip(*(parse(key, each) for each in texts))
    if names[0] in values:
      raise ValueError(f'--grid={text}: {key} is given twice: join its values.')
    for i, value in enumerate(parsed):
      if value in parsed[:i]:
        raise ValueError(f'--grid={text}: {texts[i]} is given twice.')
    values[names[0]] = parsed
  return [
    dict(zip(values, each)) for each in itertools.product(*values.values())
  ]


def parse(config: ConfigDict, key: str, text: str) -> tuple[str, Any]:
  """A key, with its index from the start, and the value that a text means.

  Raises:
    ValueError: there is no such key, or the value is wrong.
  """
  try:
    value = recipes.override(copy.deepcopy(config), key, text)
  except ValueError as error:
    raise ValueError(f'--grid: {error}') from None
  return from_the_start(config, key), value


def from_the_start(config: ConfigDict, key: str) -> str:
  """The key with an index from the start: stages[1] for stages[-1] of two."""

  def replace(found):
    count = len(ranges.find(config, found[1]))
    return f'{found[1]}[{count + int(found[2])}]'

  return re.sub(r'^(stages|model\.levels)\[(-\d+)\]', replace, key)


def changed(config: ConfigDict, changes: Changes) -> ConfigDict:
  """A copy of a config with other values."""
  copied = copy.deepcopy(config)  # Other copies share the stages and levels.
  for key, value in changes.items():
    config_path.set_value(key, copied, value)
  return copied


def run_name(changes: Changes) -> str:
  """A name for a directory that says which values a run has.

  Such as `stages0.learning_rate=0.003,seed=1`. Runs of other values may have
  the same name, if these differ in characters that no directory should have.
  """
  name = ','.join(
    f'{re.sub(r"[][]", "", key)}={_word(value)}'
    for key, value in changes.items()
  )
  if len(name) > _LONGEST:
    digest = zlib.crc32(name.encode())
    name = f'{name[:_LONGEST]}-{digest:08x}'
  return name


def _split(text: str) -> list[str]:
  """Splits at the commas that are in no brackets."""
  parts, depth = [''], 0
  for character in text:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth:
      parts.append('')
    else:
      parts[-1] += character
  return [part.strip() for part in parts]


def _word(value: Any) -> str:
  if value is None:
    return 'none'
  return re.sub(r'[^\w.+-]+', '_', str(value)).strip('_.') or 'empty'
