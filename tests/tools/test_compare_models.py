"""The command that compares recipes at equal compute."""

import json
import sys
import types

from etils import epath
import pytest

from mdm_jax.builders import equal_compute, recipes, sweep_grid
from mdm_jax.builders.config import write_config
from mdm_jax.report import sweep_results
from mdm_jax.tools import (
  compare_models,
  recipe_costs,
  run_commands,
  sweep_training,
)
from tests import commands, toy
from tests.tools.test_sweep import EVALUATION, STUB

# Of a training step and of a sampling step for an image.
COSTS = {
  'mdm': {
    'flops': {'8': 16.7, '16': 22.7},
    'seconds': {'8': 2.0, '16': 1.0},
    'sampling_flops': 0.387,
    'parameters': 7,
  },
  'single': {
    'flops': {'8': 28.9},
    'seconds': {'8': 1.5},
    'sampling_flops': 0.521,
    'parameters': 9,
  },
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Files of the recipes, by name."""
  directory = tmp_path_factory.mktemp('recipes')
  texts = {
    'mdm': toy.recipe(2, 400, sampler__num_steps=20),
    'single': toy.recipe(1, 700),
  }
  found = {}
  for name, text in texts.items():
    found[name] = directory / f'{name}.py'
    found[name].write_text(text)
  return found


@pytest.fixture
def compared(files):
  return compare_models.load_recipes(
    [f'{name}={path}' for name, path in files.items()],
    ['stages[-1].learning_rate=0.5', 'sharding_rules=()'],
  )


def test_overrides_are_for_all_recipes(compared):
  mdm, single = compared
  assert mdm.given == {'stages[1].learning_rate': 0.5, 'sharding_rules': ()}
  assert single.given == {'stages[0].learning_rate': 0.5, 'sharding_rules': ()}
  assert mdm.config.stages[1].learning_rate == 0.5
  assert mdm.config.stages[0].learning_rate == 1e-3
  assert single.words({'seed': 3}) == [
    f'--config={single.argument}',
    '--config.stages[0].learning_rate=0.5',
    '--config.sharding_rules=()',
    '--config.seed=3',
  ]


@pytest.mark.parametrize('equal', ('flops', 'seconds'))
def test_budgets_are_met_within_a_percent(compared, equal):
  plans = compare_models.make_plans(compared, COSTS, [0.25, 0.6, 1], equal)
  whole = 400 * sum(COSTS['mdm'][equal].values())
  assert [(plan.recipe.name, plan.budget) for plan in plans] == [
    (name, budget) for name in ('mdm', 'single') for budget in (0.25, 0.6, 1)
  ]
  for plan in plans:
    costs = COSTS[plan.recipe.name][equal]
    cost = equal_compute.total_cost(plan.steps, costs)
    assert cost / (plan.budget * whole) == pytest.approx(1, abs=0.01)
    # The sampler of 20 steps, in all budgets.
    steps = {'mdm': 20, 'single': round(20 * 0.387 / 0.521)}
    assert plan.changes['sampler.num_steps'] == steps[plan.recipe.name]
  assert plans[2].steps == {'8': 400, '16': 400}
  assert plans[0].steps == {'8': 100, '16': 100}
  results = sweep_results.read(epath.Path('none'), ['a'], lambda key: None)
  rows = compare_models.make_comparison(results, plans, COSTS, {}).rows
  assert rows[0].sampler_ratio == 1
  assert rows[5].sampler_ratio == pytest.approx(15 * 0.521 / (20 * 0.387))
  for row in rows:
    flops = COSTS[row.recipe]['flops']
    assert row.flops == pytest.approx(
      sum(count * flops[stage] for stage, count in row.steps.items())
    )


@pytest.mark.parametrize(
  'budget, message',
  (
    (
      0.002,
      "--recipe=mdm, budget 0.002: stage '8' would have 0.8 steps: give a "
      'larger budget.',
    ),
    (
      0.01,
      "--recipe=single, budget 0.01: a step of stage '8' is 18.3% of it, so "
      'that whole steps miss it by 8.3%: give a larger budget.',
    ),
  ),
)
def test_a_budget_that_cannot_be_met_is_named(compared, budget, message):
  with pytest.raises(ValueError) as error:
    compare_models.make_plans(compared, COSTS, [budget], 'flops')
  assert str(error.value) == message


def test_costs_are_counted_once(compared, tmp_path, monkeypatch):
  output, asked = epath.Path(tmp_path), []

  def count(config):
    asked.append(len(config.stages))
    costs = COSTS['mdm' if len(config.stages) == 2 else 'single']
    return {key: x for key, x in costs.items() if key != 'seconds'}

  def measure(name, words, config, group):
    asked.append(name)
    assert f'--config={dict(zip(COSTS, compared))[name].argument}' in words
    return COSTS[name]['seconds']

  monkeypatch.setattr(recipe_costs, 'count', count)
  monkeypatch.setattr(recipe_costs, 'measure_seconds', measure)
  for equal, new in (
    ('flops', [2, 1]),
    ('flops', []),
    ('seconds', ['mdm', 'single']),
    ('seconds', []),
  ):
    asked.clear()
    costs = compare_models.count_costs(compared, output, equal, {})
    assert asked == new
  assert {
    name: {key: x for key, x in each.items() if key != 'config'}
    for name, each in costs.items()
  } == COSTS
  # A recipe that has changed is counted again.
  compared[1].config.stages[0].batch_size = 16
  asked.clear()
  compare_models.count_costs(compared, output, 'flops', {})
  assert asked == [1]
  (tmp_path / 'costs.json').write_text('{')
  compare_models.count_costs(compared, output, 'flops', {})
  assert asked == [1, 2, 1]
  # The directory is still one for results.
  sweep_results.read(output, ['a'], lambda key: None, ['costs.json'])


@pytest.mark.parametrize(
  'key, value, is_known',
  (
    ('log_every', 7, True),
    ('trackers', ('tensorboard', 'wandb'), True),
    ('watchdog.step', 7, True),
    ('data.prefetch', 7, True),
    ('data.size', 7, False),
    ('stages[0].accumulate', 2, False),
    ('model.levels[0].remat', 'block', False),
    ('sampler.num_steps', 7, False),
    ('eval.batch_size', 7, False),
    ('mesh.fsdp', 2, False),
  ),
)
def test_costs_are_known_by_what_they_depend_on(compared, key, value, is_known):
  config = compared[0].config
  other = sweep_grid.changed(config, {key: value})
  assert other.to_json() != config.to_json()
  digests = {recipe_costs.digest(config), recipe_costs.digest(other)}
  assert (len(digests) == 1) == is_known


def test_flops_are_those_of_the_whole_step(make_config):
  config = make_config()
  once = recipe_costs.count(config)
  assert list(once['flops']) == ['8', '16']
  assert 0 < once['flops']['8'] < once['flops']['16']
  config.stages = config.stages[:1]
  config.stages[0].accumulate = 2
  config.model.levels[0].update(remat='block', lanes=64)
  found = recipe_costs.count(config)
  # Microbatches are the iterations of a loop, and neither recomputation nor the
  # zeros of packed levels count.
  assert found['flops'] == {'8': pytest.approx(once['flops']['8'], rel=0.05)}
  # Of the last stage.
  assert once['parameters'] > found['parameters'] > 1000


def test_guidance_counts_only_within_its_interval(make_config):
  config = make_config()
  config.stages = config.stages[:1]

  def count(**changes):
    config.sampler.update(changes)
    return recipe_costs.sampling_flops(config)

  config.sampler.update(name='ddim', num_steps=10, guidance=1.0)
  plain, guided = count(), count(guidance=2.0)
  # The network is called twice, but no encoder at each step.
  assert guided == pytest.approx(2 * plain, rel=0.05)
  config.eval.batch_size = 4  # They are of an image.
  # Of the times 909, 818, ... 90 of 1,000, those are 545, 454, 363 and 272.
  assert config.diffusion.num_steps == 1000
  share = (count(guidance_interval=(0.25, 0.55)) - plain) / (guided - plain)
  assert share == pytest.approx(0.4, rel=1e-3)


def test_the_last_step_of_heun_is_half_a_step(make_config):
  config = make_config()
  config.stages = config.stages[:1]

  def count(**changes):
    config.sampler.update(changes)
    return recipe_costs.sampling_flops(config)

  euler = count(name='ddim', num_steps=2, guidance=1.0)
  # The network is called 3 times in 2 steps, and 7 times in 4.
  assert count(name='heun') == pytest.approx(3 / 2 * euler, rel=0.05)
  assert count(num_steps=4) == pytest.approx(7 / 4 * euler, rel=0.05)


class Trainings:
  """Comparisons with stubs that train and evaluate nothing."""

  def __init__(self, compared, directory, monkeypatch):
    self.compared, self.output = compared, epath.Path(directory)
    self.fails = set()  # (recipe, budget)
    self.metric = 'fid'  # to show
    jobs = run_commands.Jobs
    monkeypatch.setattr(
      run_commands,
      'Jobs',
      lambda given, groups: jobs(
        [(name, self.stubs(*words)) for name, words in given], groups
      ),
    )

  def stubs(self, training, evaluation):
    """In place of the commands, whose words they read."""
    assert training[1:3] == ['-m', 'mdm_jax.main']
    assert evaluation[1:3] == ['-m', 'mdm_jax.evaluate']
    given = dict(word[2:].split('=', 1) for word in training[3:])
    workdir, path = given.pop('workdir'), given.pop('config')
    config = recipes.load(path)
    for key, value in given.items():
      recipes.override(config, key.removeprefix('config.'), value)
    write_config(self.output.parent / 'config', json.loads(config.to_json()))
    name = 'mdm' if len(config.stages) == 2 else 'single'
    lines = [
      {
        'stage': stage.name,
        'step': stage.steps,
        'seconds_per_step': 1,
        'flops_per_second': COSTS[name]['flops'][stage.name],
      }
      for stage in config.stages
    ]
    last = {key: lines[-1][key] for key in ('stage', 'step')}
    last['held_out_loss_8'] = 1
    steps = sum(stage.steps for stage in config.stages)
    fails = (name, steps) in self.fails
    stub = {
      'config': json.loads(
        (self.output.parent / 'config' / 'config.json').read_text()
      ),
      'lines': [*lines, last],
      'code': int(fails),
      'seconds': 0,
      'together': 0,
    }
    # The metric falls with the steps, and rises with the seed.
    value = 1000 / steps + config.seed
    result = dict(word[2:].split('=', 1) for word in evaluation[3:])
    assert result['workdir'] == workdir and result['metrics'] == 'frechet'
    return [
      [sys.executable, '-c', STUB, workdir, json.dumps(stub)],
      [sys.executable, '-c', EVALUATION, result['output'], str(value)],
    ]

  def compare(self, *budgets, seeds=(0, 1), names=('mdm', 'single')):
    compared = [each for each in self.compared if each.name in names]
    plans = compare_models.make_plans(compared, COSTS, budgets, 'flops')
    results = sweep_results.read(self.output, [self.metric], lambda key: None)
    found = compare_models.make_comparison(results, plans, COSTS, {'x': 1})
    compare_models.train(plans, seeds, found, {'metrics': 'frechet'})
    return found

  def begun(self):
    return {
      path.parent.name: len(path.read_text())
      for path in sorted(self.output.glob('*/begun'))
    }


@pytest.fixture
def trainings(compared, tmp_path, monkeypatch):
  return Trainings(compared, tmp_path / 'out', monkeypatch)


def test_runs_are_trained_evaluated_and_continued(trainings):
  trainings.fails = {('single', 273)}  # Of half the budget.
  found = trainings.compare(0.5, 1.0)
  names = [
    f'recipe={name},budget={budget},seed={seed}'
    for name in ('mdm', 'single')
    for budget in (0.5, 1.0)
    for seed in (0, 1)
  ]
  assert trainings.begun() == dict.fromkeys(names, 1)
  assert [
    run.run
    for run in found.results.runs.values()
    if run.status == sweep_results.FAILED
  ] == names[4:6]
  trainings.fails = set()
  found = trainings.compare(0.5, 1.0)
  # Those that have failed are tried again.
  assert trainings.begun() == {
    name: 2 if name in names[4:6] else 1 for name in names
  }
  lines = (trainings.output / 'table.md').read_text().splitlines()
  assert [line.split(' | ')[:3] for line in lines[2:6]] == [
    ['| mdm', '0.5', '3 ± 0.5'],
    ['| mdm', '1', '1.75 ± 0.5'],
    ['| single', '0.5', '4.163 ± 0.5'],
    ['| single', '1', '2.335 ± 0.5'],
  ]
  # From 3 to 1.75, by a factor of 2 in FLOPs.
  share = 0.5 * 2 ** ((3 - 2.335) / (3 - 1.75))
  (single,) = found.reached().values()
  assert single['share'] == pytest.approx(share, rel=1e-3)
  # What the runs have logged is what was planned.
  written = json.loads((trainings.output / 'comparison.json').read_text())
  assert [row['logged_flops'] for row in written['rows']] == pytest.approx(
    [row['flops'] for row in written['rows']]
  )
  assert written['recipes']['single']['steps'] == {'8': 700}
  config = json.loads((trainings.output / names[6] / 'config.json').read_text())
  assert config['stages'][0]['steps'] == round(400 * 39.4 / 28.9)
  assert config['sampler']['num_steps'] == 15
  assert config['stages'][0]['learning_rate'] == 0.5


def test_a_metric_that_a_run_lacks_is_noted(trainings):
  trainings.metric = 'edge_width'
  trainings.compare(1.0, seeds=[0])
  assert set(trainings.begun().values()) == {1} and len(trainings.begun()) == 2
  lines = (trainings.output / 'table.md').read_text().splitlines()
  for line in lines[2:4]:
    cells = line.split(' | ')
    assert cells[2:4] == ['-', '1 of 1']
    assert cells[-1] == 'no edge_width in 1 of 1 |'


def test_a_comparison_grows_and_keeps_what_it_has(trainings):
  trainings.compare(1.0, seeds=[0])
  found = trainings.compare(0.5, 1.0, seeds=[0], names=['mdm'])
  assert set(trainings.begun().values()) == {1}
  assert [row.recipe for row in found.rows] == ['mdm', 'mdm']
  assert len(found.results.runs) == 3  # That of 'single' is kept.
  found = trainings.compare(1.0, seeds=[0])
  assert set(trainings.begun().values()) == {1}
  single = found.rows[1]
  assert found.results.mean(found._runs(single), 'fid') is not None


def test_other_compute_is_refused(trainings, monkeypatch):
  trainings.compare(1.0, seeds=[0])
  monkeypatch.setitem(COSTS, 'single', COSTS['single'] | {'flops': {'8': 14.0}})
  with pytest.raises(ValueError, match=r'another config \(stages\[0\].steps'):
    trainings.compare(1.0, seeds=[0])


def test_sweeps_and_comparisons_are_not_mixed(trainings):
  trainings.compare(1.0, seeds=[0], names=['single'])
  _, single = trainings.compared
  with pytest.raises(ValueError, match='is a comparison of recipes'):
    sweep_training.train(
      single.config, [{'seed': 1}], None, output=trainings.output, metrics=['a']
    )
  path = trainings.output / 'results.jsonl'
  line = json.loads(path.read_text()) | {'changes': {'seed': 0}}
  path.write_text(json.dumps(line) + '\n')
  with pytest.raises(ValueError, match='is a sweep: give another'):
    trainings.compare(1.0, seeds=[0])


def compare(*arguments, code=0):
  result = commands.run(
    'mdm_jax.tools.compare_models', *arguments, env=commands.on_devices(1)
  )
  assert result.returncode == code, result.stderr
  return result


MDM, SINGLE = '--recipe=mdm=shapes_64', '--recipe=single=shapes_64:single'


@pytest.mark.parametrize(
  'flags, message',
  (
    ((MDM,), 'nothing to compare: give a second --recipe.'),
    ((MDM, MDM), '--recipe=mdm=shapes_64: mdm is given twice.'),
    ((MDM, '--recipe=b=nowhere'), '--recipe=b=nowhere: there is no shipped'),
    ((MDM, '--recipe=shapes_64'), 'give NAME=RECIPE.'),
    ((MDM, SINGLE, '--budgets=0'), '--budgets=0: give a number above 0'),
    ((MDM, SINGLE, '--set=a=1'), 'a=1: no such key (a)'),
    (
      (MDM, SINGLE, '--set=stages[1].steps=7'),
      '--recipe=single=shapes_64:single: stages[1].steps=7: no such key',
    ),
    (
      (MDM, SINGLE, '--set=text.num_heads=7'),
      '--recipe=mdm: text.num_heads=7 does not divide text.width=64',
    ),
    ((MDM, SINGLE, '--metrics=flicker'), '--metrics=flicker: more of it is'),
    ((MDM, SINGLE, '--metrics=fid'), '--metrics=fid needs --inception'),
    (
      (MDM, '--recipe=codes=shapes_64:autoencoder'),
      "--recipe=codes: stage 'autoencoder' is an autoencoder, which makes no",
    ),
    ((MDM, SINGLE, '--equal=time'), 'use one of flops, seconds'),
  ),
)
def test_a_mistake_is_one_line(flags, message, tmp_path):
  output = tmp_path / 'out'
  metrics = () if flags[-1].startswith('--metrics') else ('--metrics=frechet',)
  result = compare(*flags, *metrics, f'--output={output}', code=1)
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line
  assert not result.stdout and not output.exists()


def test_steps_are_timed(files, tmp_path, monkeypatch):
  (single,) = compare_models.load_recipes([f'a={files["single"]}'], [])
  found = recipe_costs.measure_seconds('a', single.words({}), single.config, {})
  assert found.keys() == {'8'} and 0 < found['8'] < 10
  fails = tmp_path / 'fails'
  fails.write_text('#!/bin/sh\necho "error: Unknown flag" >&2\nexit 1\n')
  fails.chmod(0o700)
  python = types.SimpleNamespace(executable=str(fails))
  monkeypatch.setattr(recipe_costs, 'sys', python)
  with pytest.raises(ValueError, match="--recipe=a, stage '8': Unknown"):
    recipe_costs.measure_seconds('a', [], single.config, {})


def test_real_runs_are_compared(tmp_path):
  for name, steps in (('mdm', 2), ('other', 3)):
    text = toy.recipe(1, steps, log_every=1)
    (tmp_path / f'{name}.py').write_text(text)
  output = tmp_path / 'out'
  flags = (
    *(f'--recipe={name}={tmp_path}/{name}.py' for name in ('mdm', 'other')),
    *('--set=optimizer.b1=0.8', '--metrics=prompt_accuracy'),
    *('--num_samples=8', f'--output={output}'),
  )
  result = compare(*flags)
  found = json.loads((output / 'comparison.json').read_text())
  assert [row['steps'] for row in found['rows']] == [{'8': 2}, {'8': 2}]
  assert [row['finished'] for row in found['rows']] == [1, 1]
  for row in found['rows']:
    assert 0 <= row['metrics']['accuracy_all']['mean'] <= 1
    # XLA counts nearly the same in what it has optimized.
    assert row['logged_flops'] == pytest.approx(row['flops'], rel=0.3)
    assert 0 < row['seconds'] < 60
  workdir = output / 'recipe=other,budget=1.0,seed=0'
  config = json.loads((workdir / 'config.json').read_text())
  assert config['stages'][0]['steps'] == 2
  assert config['optimizer']['b1'] == 0.8
  headers, *_ = result.stdout.splitlines()
  assert headers.split()[:3] == ['recipe', 'budget', 'accuracy_all']
  # Both learn the same.
  (reached,) = found['reached'].values()
  assert reached['share'] == 1 and not reached['at_most']
  # Nothing is counted, trained or evaluated again.
  again = compare(*flags)
  assert again.stdout == result.stdout
  assert 'counting' not in again.stderr and 'samples' not in again.stderr
