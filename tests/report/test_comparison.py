"""Tables of recipes at equal compute, and when the reference is as good."""

import json
import math

from etils import epath
import pytest

from mdm_jax.report import comparison, sweep_results

CURVE = [(1e12, 40.0), (4e12, 20.0), (16e12, 10.0)]


@pytest.mark.parametrize(
  'value, flops, at_most',
  (
    (40.0, 1e12, False),
    (50.0, 1e12, True),
    # Half of the way in the logarithm.
    (30.0, 2e12, False),
    (15.0, 8e12, False),
    (10.0, 16e12, False),
    (9.9, None, False),
  ),
)
def test_flops_to_reach_a_value(value, flops, at_most):
  for sign in (1, -1):
    # In any order, and also where higher is better.
    curve = [(x, sign * y) for x, y in reversed(CURVE)]
    found = comparison.flops_to_reach(curve, sign * value, sign < 0)
    assert found == (flops and pytest.approx(flops), at_most)


def test_a_curve_that_falls_back_counts_where_it_first_is_as_good():
  curve = [(1.0, 10.0), (math.e, 4.0), (math.e**2, 6.0), (math.e**3, 1.0)]
  flops, _ = comparison.flops_to_reach(curve, 5.0, False)
  assert math.log(flops) == pytest.approx(5 / 6)


VALUES = {
  ('mdm', 0.25): (40.0, 44.0),
  ('mdm', 1.0): (20.0, 22.0),
  ('single', 0.25): (60.0, 62.0),
  ('single', 1.0): (31.0, 32.0),
  ('scratch', 0.25): (40.0, None),
  ('scratch', 1.0): (19.0, None),
}


@pytest.fixture
def compared(tmp_path):
  results = sweep_results.read(
    epath.Path(tmp_path), ['frechet'], lambda key: None
  )
  rows = []
  for (recipe, budget), values in VALUES.items():
    rows.append(
      comparison.Row(
        recipe=recipe,
        budget=budget,
        parameters=1_217_116,
        steps={'16': int(2600 * budget), '64': int(2000 * budget)},
        flops=4e12 * budget,
        sampler_steps=15,
        sampler_ratio=1.0104,
      )
    )
    for seed, value in enumerate(values):
      changes = {'recipe': recipe, 'budget': budget, 'seed': seed}
      run = results.add(f'{recipe}{budget}{seed}', changes)
      if value is None:
        run.status, run.note = sweep_results.FAILED, 'no.'
        continue
      run.status = sweep_results.FINISHED
      run.metrics, run.errors = {'frechet': value, 'fid': 1.0}, {}
      run.flops, run.seconds = 3.9e12 * budget, 100 * budget + seed
  return comparison.Comparison(results, rows, {'equal': 'flops'})


def test_the_table_has_a_row_for_each_recipe_and_budget(compared, tmp_path):
  compared.write()
  lines = (tmp_path / 'table.md').read_text().splitlines()
  assert lines[:1] + lines[2:5] == [
    '| recipe | budget | frechet | runs | parameters | training FLOPs | time '
    '| steps | sampler steps | sampler FLOPs | note |',
    '| mdm | 0.25 | 42 ± 2 | 2 of 2 | 1,217,116 | 1e+12 | 25.5s | 650 + 500 '
    '| 15 | 1.010 | - |',
    '| mdm | 1 | 21 ± 1 | 2 of 2 | 1,217,116 | 4e+12 | 1m40s '
    '| 2,600 + 2,000 | 15 | 1.010 | - |',
    '| single | 0.25 | 61 ± 1 | 2 of 2 | 1,217,116 | 1e+12 | 25.5s '
    '| 650 + 500 | 15 | 1.010 | - |',
  ]
  assert lines[7].endswith('| failed: no. |') and '| 1 of 2 |' in lines[7]
  sentences = [line for line in lines[8:] if line]
  assert sentences == [
    # Half of the way from 42 to 21, of a factor of 4.
    'mdm reaches the frechet of single at budget 1, 31.5, with 50.0% of its '
    'training FLOPs.',
    'mdm does not reach the frechet of scratch at budget 1, 19.',
  ]
  assert str(compared).splitlines()[-2:] == sentences


def test_other_evaluations_are_not_averaged(compared, tmp_path):
  compared.results.evaluated = {'num_samples': '4096'}
  for run in compared.results.runs.values():
    few = run.run == 'mdm1.01'
    run.evaluated = {'num_samples': '256' if few else '4096'}
  compared.write()
  line = (tmp_path / 'table.md').read_text().splitlines()[3]
  assert line.startswith('| mdm | 1 | 20 | 1 of 2 |')
  assert line.endswith('| not averaged: evaluated with --num_samples=256 |')
  row = json.loads((tmp_path / 'comparison.json').read_text())['rows'][1]
  assert row['metrics']['frechet']['values'] == {'0': 20.0}
  assert compared.reached()['single']['share'] < 0.5


def test_all_that_is_shown_is_in_the_json(compared, tmp_path):
  compared.write()
  found = json.loads((tmp_path / 'comparison.json').read_text())
  assert found['equal'] == 'flops'
  assert found['rows'][1] == {
    'recipe': 'mdm',
    'budget': 1.0,
    'parameters': 1_217_116,
    'steps': {'16': 2600, '64': 2000},
    'flops': 4e12,
    'sampler_steps': 15,
    'sampler_ratio': 1.0104,
    'runs': 2,
    'finished': 2,
    'seconds': 100.5,
    'logged_flops': 3.9e12,
    'metrics': {
      'frechet': {
        'mean': 21.0,
        'standard_error': 1.0,
        'values': {'0': 20.0, '1': 22.0},
      },
      'fid': {
        'mean': 1.0,
        'standard_error': 0.0,
        'values': {'0': 1.0, '1': 1.0},
      },
    },
  }
  assert found['reached'] == {
    'single': {
      'metric': 'frechet',
      'value': 31.5,
      'flops': pytest.approx(2e12),
      'share': pytest.approx(0.5),
      'at_most': False,
    },
    'scratch': {
      'metric': 'frechet',
      'value': 19.0,
      'flops': None,
      'share': None,
      'at_most': False,
    },
  }
  assert len((tmp_path / 'results.jsonl').read_text().splitlines()) == 12


def test_a_smallest_budget_that_is_better_is_a_bound(compared):
  for seed in (0, 1):
    run = compared.results.runs[f'single1.0{seed}']
    run.metrics['frechet'] = 50.0
  assert (
    'mdm reaches the frechet of single at budget 1, 50, with ≤ 25.0% of its '
    'training FLOPs: its smallest budget.'
  ) in str(compared).splitlines()


def test_what_is_not_trained_yet_is_shown_as_such(compared, tmp_path):
  for run in compared.results.runs.values():
    run.status, run.metrics = sweep_results.TO_DO, {}
    run.flops = run.seconds = None
  compared.write()
  lines = (tmp_path / 'table.md').read_text().splitlines()
  assert lines[2].split(' | ')[2:4] == ['-', '0 of 2']
  assert len(lines) == 8 and compared.reached() == {}


def test_the_metric_is_plotted_against_flops_and_seconds(
  compared, axes, tmp_path
):
  compared.write(str(tmp_path / 'plot.svg'))
  assert (tmp_path / 'plot.svg').read_text() == 'svg'
  for axis, x in zip(axes, ([1e12, 4e12], [25.5, 100.5])):
    mdm, single, _ = axis.errorbar.call_args_list
    assert [*map(list, mdm.args)] == [x, [42.0, 21.0], [2.0, 1.0]]
    assert mdm.kwargs['label'] == 'mdm'
    assert list(single.args[1]) == [61.0, 31.5]
