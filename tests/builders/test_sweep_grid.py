"""Grids of values, as `--grid` has them."""

import functools

import pytest

from mdm_jax.builders import sweep_grid


@pytest.fixture
def combinations(make_config):
  config = make_config()
  parse = functools.partial(sweep_grid.parse, config)
  return lambda *grid: sweep_grid.combinations(grid, parse)


def test_values_are_those_of_the_configs_own_flags(combinations, make_config):
  found = combinations(
    'stages[-1].learning_rate=1e-3, 2',
    'sampler.guidance_interval=(0,1),(0.2,0.8)',
    'data.flip=true',
    'dtype=bfloat16',
  )
  last = f'stages[{len(make_config().stages) - 1}].learning_rate'
  shared = {'data.flip': True, 'dtype': 'bfloat16'}
  interval = 'sampler.guidance_interval'
  assert found == [
    {last: 1e-3, interval: (0, 1), **shared},
    {last: 1e-3, interval: (0.2, 0.8), **shared},
    {last: 2.0, interval: (0, 1), **shared},
    {last: 2.0, interval: (0.2, 0.8), **shared},
  ]
  base = make_config()
  config = sweep_grid.changed(base, found[1] | {last: 0.5})
  assert config.stages[-1].learning_rate == 0.5
  assert base.to_json() == make_config().to_json()
  assert config.sampler.guidance_interval == (0.2, 0.8)
  assert config.data.flip is True and config.dtype == 'bfloat16'


@pytest.mark.parametrize(
  'grid, message',
  (
    (['stages[0].learning_rte=1'], 'did you mean stages[0].learning_rate?'),
    (['stages[7].steps=1'], 'stages[7].steps=1: no such key'),
    (['stages[0].steps=1,a'], 'stages[0].steps=a: give an integer from 1 to'),
    (['stages[0].steps=1.5'], 'stages[0].steps=1.5: give an integer from 1'),
    (['stages[0].steps=0'], 'stages[0].steps=0: give an integer from 1 to'),
    (['sampler.guidance_interval=(0,1,2)'], 'give a tuple of 2 elements'),
    (['stages[0]=1'], 'stages[0]: change one of its keys instead'),
    (['sampler.name=best'], "sampler.name='best': use one of ddim, ddpm"),
    (['seed'], '--grid=seed: give KEY=VALUE,VALUE'),
    (['seed='], '--grid=seed=: give KEY=VALUE,VALUE'),
    (['seed=1,'], '--grid=seed=1,: give KEY=VALUE,VALUE'),
    (['seed=1,2,01'], '01 is given twice'),
    (['seed=1', 'dtype=float32', 'seed=2'], 'seed is given twice'),
    (['stages[0].steps=1', 'stages[-2].steps=2'], 'steps is given twice'),
  ),
)
def test_mistakes_are_named_in_one_line(combinations, grid, message):
  with pytest.raises(ValueError) as raised:
    combinations(*grid)
  assert message in str(raised.value) and '\n' not in str(raised.value)
  assert str(raised.value).startswith('--grid')


def test_names_are_readable_and_are_those_of_directories():
  name = sweep_grid.run_name
  assert name({'stages[0].learning_rate': 0.003, 'seed': 1}) == (
    'stages0.learning_rate=0.003,seed=1'
  )
  assert name({'mesh.data': -1, 'sampler.guidance_interval': (0.0, 0.8)}) == (
    'mesh.data=-1,sampler.guidance_interval=0.0_0.8'
  )
  assert name({'data.path': 'gs://a/../b c', 'sigma_rel': None}) == (
    'data.path=gs_a_.._b_c,sigma_rel=none'
  )
  assert name({'text.path': ''}) == 'text.path=empty'
  long = [name({'data.path': 'a' * 200 + end}) for end in 'bc']
  assert len(set(long)) == 2 and all(len(each) < 140 for each in long)
