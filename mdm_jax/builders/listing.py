"""The configuration that a run would use, as text: `--print_config`."""

import json
import re
from typing import Any

from ml_collections import ConfigDict

from mdm_jax.builders import ranges
from mdm_jax.builders.config import changes_of_run, has_config
from mdm_jax.runtime import files

_COLUMN = 40  # of the comments, where the values leave room


def listing(config: ConfigDict, recipe: ConfigDict, common: Any) -> str:
  """Lists all keys, a line for each, with those that differ marked.

  Args:
    config: the recipe, with the changes of the command line.
    recipe: the recipe alone.
    common: the module configs/common.py, which has the defaults.
  """
  in_recipe, defaults = _values(recipe), _values(_defaults(config, common))
  lines, open_sections = [], []
  for key, value in _values(config).items():
    *sections, name = key.split('.')
    for depth, section in enumerate(sections):
      if sections[: depth + 1] != open_sections[: depth + 1]:
        lines.append(f'{"  " * depth}{section}:')
    open_sections = sections
    notes = []
    if in_recipe.get(key, value) != value:
      notes.append(f'command line; recipe: {in_recipe[key]!r}')
    if key in defaults and defaults[key] != value:
      notes.append(f'default: {defaults[key]!r}')
    line = f'{"  " * len(sections)}{name}: {value!r}'
    if notes:
      line = f'{line.ljust(_COLUMN)}  # {"; ".join(notes)}'
    lines.append(line)
  return '\n'.join(lines)


def run_changes(config: ConfigDict, workdir: str) -> str:
  """Says how a configuration differs from that of a working directory's run."""
  if not has_config(workdir):
    return f'# {workdir} has no run yet: it would begin with these values.'
  try:
    changes = changes_of_run(workdir, json.loads(config.to_json()))
  except files.UnreadableFile as error:
    return f'# {error}: it would be made anew with these values.'
  except ValueError as error:
    return f'# {error}'
  if not changes:
    return f'# The run in {workdir} has these values.'
  lines = [f'# The run in {workdir} differs (its config.json -> here):'] + [
    f'#   {line}  ({"may change" if is_allowed else "refused"})'
    for line, is_allowed in changes.items()
  ]
  if not all(changes.values()):
    lines.append('# With a refused change, give another --workdir.')
  return '\n'.join(lines)


def _values(config: ConfigDict) -> dict[str, Any]:
  """Values by key, such as 'stages[0].steps', in the order of `ranges.KEYS`."""
  places = {key: i for i, key in enumerate(ranges.KEYS)}

  def place(key):
    pattern = ranges.pattern(key)
    in_list = re.match(r'(.*)\[(\d+)\]', key)
    if not in_list:
      return places[pattern], 0, 0
    first = next(i for name, i in places.items() if name.startswith(in_list[1]))
    return first, int(in_list[2]), places[pattern]

  values = {
    key: section[name] for section, name, key in ranges.leaves(config, '')
  }
  return {key: values[key] for key in sorted(values, key=place)}


def _defaults(config: ConfigDict, common: Any) -> ConfigDict:
  """What the same levels and stages are without any change."""
  defaults = common.get_config()
  defaults.model.levels = [
    common.level(level.resolution) for level in config.model.levels
  ]
  defaults.stages = [
    common.stage(stage.name, stage.num_levels) for stage in config.stages
  ]
  return defaults
