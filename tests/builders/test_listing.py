"""The configuration as text, with what differs from other ones."""

import json

from configs import common
from mdm_jax.builders import listing, ranges
from mdm_jax.builders.config import write_config


def parse(text: str) -> dict[str, tuple[str, str]]:
  """(value, comment) of every key, from the lines of a listing."""
  found, sections = {}, []
  for line in text.splitlines():
    depth = (len(line) - len(line.lstrip())) // 2
    name, _, rest = line.strip().partition(':')
    del sections[depth:]
    if rest:
      value, _, comment = rest.partition('  # ')
      found['.'.join([*sections, name])] = value.strip(), comment
    else:
      sections.append(name)
  return found


def test_every_key_is_listed_in_order(make_config):
  config = make_config()
  text = listing.listing(config, make_config(), common)
  found = parse(text)
  assert {ranges.pattern(key) for key in found} == set(ranges.KEYS)
  values = {
    key: section[name] for section, name, key in ranges.leaves(config, '')
  }
  assert {key: value for key, (value, _) in found.items()} == {
    key: repr(value) for key, value in values.items()
  }
  assert list(found)[:3] == ['seed', 'dtype', 'mesh.data']
  levels = [key for key in found if key.startswith('model.levels')]
  assert levels[0] == 'model.levels[0].resolution'
  assert levels[len(levels) // 2] == 'model.levels[1].resolution'
  # A section's name is given once.
  for heading in ('model:', '  levels[1]:', 'stages[0]:'):
    assert text.splitlines().count(heading) == 1


def test_what_differs_is_marked(make_config):
  config, recipe = make_config(), make_config()
  recipe.stages[1].steps = 30
  config.stages[1].steps = 40
  recipe.sampler.eta = config.sampler.eta = 0.5
  recipe.log_every, config.log_every = 10, 50  # The default again.
  found = parse(listing.listing(config, recipe, common))
  assert found['stages[1].steps'] == (
    '40',
    'command line; recipe: 30; default: 100000',
  )
  assert found['sampler.eta'] == ('0.5', 'default: 0.0')
  assert found['log_every'] == ('50', 'command line; recipe: 10')
  # The defaults are those of a level of this size.
  assert found['model.levels[1].scale_condition'] == ('16', '')
  assert found['model.levels[1].channels'] == (
    '(8, 8)',
    'default: (64, 128, 256)',
  )
  assert found['data.name'] == ("'shapes'", '')


def test_what_differs_from_a_run(make_config, tmp_path):
  config = make_config()
  begins = listing.run_changes(config, str(tmp_path))
  assert begins == (
    f'# {tmp_path} has no run yet: it would begin with these values.'
  )
  write_config(tmp_path, json.loads(config.to_json()))
  same = listing.run_changes(config, str(tmp_path))
  assert same == f'# The run in {tmp_path} has these values.'
  config.log_every = 7
  lines = listing.run_changes(config, str(tmp_path)).splitlines()
  assert lines == [
    f'# The run in {tmp_path} differs (its config.json -> here):',
    '#   log_every: 50 -> 7  (may change)',
  ]
  config.stages[0].steps = 21
  lines = listing.run_changes(config, str(tmp_path)).splitlines()
  assert [lines[1], lines[-1]] == [
    '#   stages[0].steps: 20 -> 21  (refused)',
    '# With a refused change, give another --workdir.',
  ]
  (tmp_path / 'config.json').write_text('{')
  (line,) = listing.run_changes(config, str(tmp_path)).splitlines()
  assert line.startswith(f'# {tmp_path}/config.json')
  assert line.endswith(': it would be made anew with these values.')
