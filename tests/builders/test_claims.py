"""The recipes of docs/claims.md are the default one with one thing changed."""

import json
import pathlib
import runpy

import jax
import pytest

from configs import shapes_64
from mdm_jax.builders.check import check
from mdm_jax.runtime import sharding

PATH = pathlib.Path(__file__).parents[2] / 'docs/results/claims.py'
get_config = runpy.run_path(str(PATH))['get_config']


def _changed(config) -> dict:
  """The values that are not the default recipe's, by key."""
  default = shapes_64.get_config()
  return _differences(
    *(json.loads(each.to_json()) for each in (default, config))
  )


def _differences(one, other, key='') -> dict:
  if isinstance(one, dict):
    items = [(f'{key}.{name}', one[name], other[name]) for name in other]
  elif isinstance(one, list) and len(one) == len(other):
    items = [(f'{key}[{i}]', *pair) for i, pair in enumerate(zip(one, other))]
  else:
    return {} if one == other else {key[1:]: other}
  found = {}
  for key, before, after in items:
    found |= _differences(before, after, key)
  return found


@pytest.mark.parametrize(
  ('mode', 'changed'),
  [
    ('', {}),
    ('coarse_quarter', {'stages[0].steps': 1300, 'stages[1].steps': 2900}),
    (
      'coarse_three_quarters',
      {'stages[0].steps': 3900, 'stages[1].steps': 1000},
    ),
    ('mixed_batch', {f'stages[1].mixed_ratio[{i}]': 0.5 for i in range(2)}),
    ('fine_weight_16', {'stages[1].loss_weights[1]': 16.0}),
    ('fine_alone', {'stages[1].loss_weights[0]': 0.0}),
    ('shift_0', {f'stages[{i}].shift_power': 0.0 for i in range(2)}),
    ('shift_1', {f'stages[{i}].shift_power': 1.0 for i in range(2)}),
  ],
)
def test_a_mode_changes_nothing_else(mode, changed):
  config = get_config(mode)
  assert _changed(config) == changed
  _check(config)


@pytest.mark.parametrize(
  ('mode', 'resolutions'),
  [
    ('single_transformer', [(64,)]),
    ('three_levels', [(16,), (16, 32), (16, 32, 64)]),
    ('three_levels_shared', [(16,), (16, 32), (16, 32, 64)]),
  ],
)
def test_levels_of_other_networks(mode, resolutions):
  config = get_config(mode)
  changed = {'model.levels', 'stages'}
  if mode.startswith('three_levels'):  # The coarsest one has 16 px.
    changed.add('diffusion.reference_resolution')
  assert _changed(config).keys() == changed
  stages = _check(config)
  assert [stage.resolutions for stage in stages] == resolutions
  share = 'all' if mode == 'three_levels_shared' else 'none'
  assert config.model.levels[-1].share == share


def test_an_unknown_mode():
  with pytest.raises(ValueError, match="Unknown mode 'four_levels'"):
    get_config('four_levels')


def _check(config):
  mesh = dict.fromkeys(sharding.AXES, 1)
  return check(config, sharding.make_mesh(mesh, jax.devices()[:1]))
