r"""Compares recipes at equal training compute.

  python -m mdm_jax.tools.compare_models \
      --recipe=mdm=configs/shapes_64.py \
      --recipe=single=configs/shapes_64.py:single \
      --budgets=0.25,0.5,1 --seeds=0,1,2 --metrics=frechet,prompt_accuracy \
      --output=comparisons/baselines --plot=comparisons/baselines.svg

Budget 1 is the compute of the first recipe, the reference, as it is written.
For each recipe, budget and seed a run is trained and evaluated, with the steps
of all its stages scaled by a common factor to cost the budget, and with as many
sampling steps as cost as much as the reference's.

The results are in OUTPUT/table.md, comparison.json and results.jsonl. The same
command again continues an interrupted comparison.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import sys
from typing import Any

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from mdm_jax.builders import equal_compute, ranges, recipes, sweep_grid
from mdm_jax.runtime import (
  command,
  cpu,
  directory_lock,
  files,
  flag_types,
  value_types,
)
from mdm_jax.tools import sweep

_COSTS = 'costs.json'
# What the table shows of metrics that have several values, or another name.
_SHOWN = {
  'prompt_accuracy': ['accuracy_all'],
  'precision_recall': ['precision', 'recall'],
  'clip': ['clip_score'],
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe to compare.

  Attributes:
    name: by which results call it.
    argument: of --config.
    given: keys that --set changes, and their values.
    config: with these values.
  """

  name: str
  argument: str
  given: Mapping[str, Any]
  config: ConfigDict

  def words(self, changes: Mapping[str, Any]) -> list[str]:
    """The flags of its config, with further changes."""
    return [
      f'--config={self.argument}',
      *(f'--config.{key}={x}' for key, x in (self.given | changes).items()),
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a recipe is trained with a budget.

  Attributes:
    recipe: to train.
    budget: share of the compute of the reference.
    steps: of each stage, by name.
    changes: keys of the config, and their values.
  """

  recipe: Recipe
  budget: float
  steps: Mapping[str, int]
  changes: Mapping[str, Any]


def main(_: list[str]) -> None:
  """Trains and evaluates what is compared, and prints a table."""
  from mdm_jax.report import console, plots
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  values = flags.FLAGS
  try:
    compared = load_recipes(values.recipe, values.set or ())
    if len(compared) < 2:
      raise ValueError('nothing to compare: give a second --recipe.')
    budgets = sorted(set(values.budgets))
    if values.plot:
      plots.check_installed()
    value_types.check_outputs(values.output)
    with directory_lock.holding(values.output):
      comparison = _compare(compared, budgets, values)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(comparison)
  print(f'Results are in {values.output}/table.md and comparison.json.')
  sweep.end(comparison.results)


def load_recipes(
  texts: Sequence[str], overrides: Sequence[str]
) -> list[Recipe]:
  """The recipes of the flags, the reference first.

  Args:
    texts: `NAME=RECIPE` each.
    overrides: `KEY=VALUE` each, for all recipes.

  Raises:
    ValueError: a recipe or a key is wrong, or a name is given twice.
  """
  found = {}
  for text in texts:
    name, _, argument = text.partition('=')
    if name in found:
      raise ValueError(f'--recipe={text}: {name} is given twice.')
    try:
      config, given = recipes.load(argument), {}
      for override in overrides:
        key, _, value = override.partition('=')
        parsed = recipes.override(config, key, value)
        given[sweep_grid.from_the_start(config, key)] = parsed
    except ValueError as error:
      raise ValueError(f'--recipe={text}: {error}') from None
    found[name] = Recipe(name, argument, given, config)
  return list(found.values())


def make_plans(
  compared: Sequence[Recipe],
  costs: Mapping[str, Mapping[str, Any]],
  budgets: Sequence[float],
  equal: str,
) -> list[Plan]:
  """Steps of each recipe with each budget.

  Args:
    compared: the recipes, the reference first.
    costs: of each recipe, by name, see `recipe_costs`.
    budgets: shares of the compute of the reference.
    equal: 'flops' or 'seconds', of training.

  Raises:
    ValueError: a recipe cannot meet a budget.
  """
  reference, *_ = compared
  whole = equal_compute.total_cost(
    written_steps(reference.config), costs[reference.name][equal]
  )
  plans = []
  for recipe, budget in itertools.product(compared, budgets):
    config, cost = recipe.config, costs[recipe.name]
    try:
      steps = equal_compute.scale_steps(
        written_steps(config), cost[equal], budget * whole
      )
    except ValueError as error:
      raise ValueError(
        f'--recipe={recipe.name}, budget {budget:g}: {error}'
      ) from None
    changes = equal_compute.scaled_keys(config, steps)
    changes['sampler.num_steps'] = equal_compute.scale_sampler(
      reference.config.sampler.num_steps,
      costs[reference.name]['sampling_flops'],
      cost['sampling_flops'],
    )
    plans.append(Plan(recipe, budget, steps, changes))
  return plans


def written_steps(config: ConfigDict) -> dict[str, int]:
  """Steps of each stage as a recipe is written, by name."""
  return {stage.name: stage.steps for stage in config.stages}


def make_comparison(
  results: Any,
  plans: Sequence[Plan],
  costs: Mapping[str, Mapping[str, Any]],
  settings: Mapping[str, Any],
):
  """The `Comparison` of plans, for the results of their runs.

  Args:
    results: of the directory.
    plans: from `make_plans`.
    costs: of each recipe, by name.
    settings: further ones for comparison.json.
  """
  from mdm_jax.report import comparison

  def sampler_cost(plan):
    steps = plan.changes['sampler.num_steps']
    return steps * costs[plan.recipe.name]['sampling_flops']

  rows = [
    comparison.Row(
      recipe=plan.recipe.name,
      budget=plan.budget,
      parameters=costs[plan.recipe.name]['parameters'],
      steps=plan.steps,
      flops=equal_compute.total_cost(
        plan.steps, costs[plan.recipe.name]['flops']
      ),
      sampler_steps=plan.changes['sampler.num_steps'],
      sampler_ratio=sampler_cost(plan) / sampler_cost(plans[0]),
    )
    for plan in plans
  ]
  about = {
    plan.recipe.name: {
      'recipe': plan.recipe.argument,
      'steps': written_steps(plan.recipe.config),
      **costs[plan.recipe.name],
    }
    for plan in plans
  }
  return comparison.Comparison(
    results, rows, {**settings, 'metrics': results.metrics, 'recipes': about}
  )


def train(
  plans: Sequence[Plan],
  seeds: Sequence[int],
  comparison: Any,
  evaluated: Mapping[str, str],
  groups: Sequence[Mapping[str, str]] = ({},),
  plot: str | None = None,
) -> None:
  """Trains and evaluates the runs that are not finished, and writes results.

  Args:
    plans: from `make_plans`.
    seeds: of the runs of each plan.
    comparison: from `make_comparison`.
    evaluated: flags of mdm_jax.evaluate.
    groups: see `run_commands.Jobs`.
    plot: file for a plot, or None.

  Raises:
    ValueError: see `sweep_training.train_runs`.
  """
  from mdm_jax.tools import sweep_training

  by_run = {(plan.recipe.name, plan.budget): plan for plan in plans}

  def find(changes):
    """The plan of a run, and what the run changes."""
    if changes.keys() != {sweep_training.RECIPE, 'budget', 'seed'}:
      raise ValueError(
        f'--output={comparison.results.directory} is a sweep: give another '
        'directory.'
      )
    plan = by_run.get((changes[sweep_training.RECIPE], changes['budget']))
    return plan, plan and plan.changes | {'seed': changes['seed']}

  def make_config(changes):
    plan, changed = find(changes)
    return plan and sweep_grid.changed(plan.recipe.config, changed)

  def make_commands(workdir, changes):
    plan, changed = find(changes)
    words = plan.recipe.words(changed)
    return sweep_training.commands(workdir, words, evaluated)

  sweep_training.train_runs(
    comparison.results,
    [
      {'recipe': plan.recipe.name, 'budget': plan.budget, 'seed': seed}
      # Small budgets first: they soon show whether all recipes learn.
      for seed in seeds
      for plan in sorted(plans, key=lambda plan: plan.budget)
    ],
    make_commands,
    make_config,
    write=lambda: comparison.write(plot),
    groups=groups,
    evaluated=evaluated,
  )


def _compare(
  compared: Sequence[Recipe],
  budgets: Sequence[float],
  values: flags.FlagValues,
):
  """Counts, plans, checks and trains; returns the `Comparison`."""
  from mdm_jax.report import evaluations, sweep_results
  from mdm_jax.tools import run_commands, sweep_training

  evaluations.require_order(values.metrics[0], '--metrics')
  output = epath.Path(values.output)
  options, evaluated = sweep.evaluation_options(values)
  for recipe in compared:
    try:
      sweep_training.check_config(recipe.config, options)
    except (ValueError, FileNotFoundError) as error:
      raise ValueError(f'--recipe={recipe.name}: {error}') from None
  metrics = _shown(values.metrics, compared)
  results = sweep_results.read(output, metrics, lambda key: None, [_COSTS])
  groups = run_commands.device_groups(values.devices_per_run)
  costs = count_costs(compared, output, values.equal, groups[0])
  plans = make_plans(compared, costs, budgets, values.equal)
  seeds = values.seeds or [compared[0].config.seed]
  for plan, seed in itertools.product(plans, seeds):
    changes = plan.changes | {'seed': seed}
    try:
      changed = sweep_grid.changed(plan.recipe.config, changes)
      sweep_training.check_config(changed, options)
    except ValueError as error:
      name = plan.recipe.name
      raise ValueError(
        f'--recipe={name}, budget {plan.budget:g}: {error}'
      ) from None
  settings = {'equal': values.equal, 'evaluated': evaluated}
  comparison = make_comparison(results, plans, costs, settings)
  train(plans, seeds, comparison, evaluated, groups, values.plot)
  return comparison


def _shown(metrics: Sequence[str], compared: Sequence[Recipe]) -> list[str]:
  """The names of what the table shows.

  Raises:
    ValueError: the recipes do not have the same held-out loss.
  """
  from mdm_jax.builders.check import metric_names

  losses = [metric_names(recipe.config)[0][-1] for recipe in compared]
  if 'loss' in metrics and len(set(losses)) > 1:
    raise ValueError(
      f'--metrics=loss: the finest levels of the recipes differ: '
      f'{", ".join(losses)}.'
    )
  shown = {'loss': losses[:1], **_SHOWN}
  return [each for name in metrics for each in shown.get(name, [name])]


def count_costs(
  compared: Sequence[Recipe],
  output: epath.Path,
  equal: str,
  group: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
  """Costs of the recipes, which are kept in `costs.json`.

  Args:
    compared: the recipes.
    output: directory of the file.
    equal: 'seconds', to time steps as well, or 'flops'.
    group: devices to time steps on, see `run_commands.device_groups`.

  Returns:
    By recipe what `recipe_costs.count` returns, 'seconds' of a step by stage if
    they are asked for or known, and 'config', a hash.
  """
  from mdm_jax.tools import recipe_costs

  path = output / _COSTS
  known = recipe_costs.read(path)
  for recipe in compared:
    found = known.get(recipe.name, {})
    key = recipe_costs.digest(recipe.config)
    if found.get('config') != key:
      logging.info('%s: counting the FLOPs of a step.', recipe.name)
      found = {'config': key, **recipe_costs.count(recipe.config)}
    if equal == 'seconds' and 'seconds' not in found:
      logging.info('%s: timing steps.', recipe.name)
      found['seconds'] = recipe_costs.measure_seconds(
        recipe.name, recipe.words({}), recipe.config, group
      )
    known[recipe.name] = found
    files.write_json(path, known)
  return {recipe.name: known[recipe.name] for recipe in compared}


def _define_flags() -> None:
  """Only where this is the command: others have flags of these names."""
  flag_types.define_repeated(
    'recipe',
    None,
    value_types.Text('NAME=RECIPE', r'[\w.+-]+=.+'),
    'Name of a recipe in the results, and the recipe, as for --config of '
    'mdm_jax.main: mdm=configs/shapes_64.py. The first is the reference.',
    required=True,
  )
  flag_types.define(
    'budgets',
    [1.0],
    value_types.List(value_types.Number(float, 0, 1000, above=True)),
    'Training compute, as shares of that of the reference as it is written. A '
    'run is trained for each.',
  )
  flag_types.define(
    'equal',
    'flops',
    value_types.Choice(('flops', 'seconds')),
    'What of all trainings is equal: FLOPs, counted before compilation, or '
    'seconds, from a few steps timed on this machine.',
  )
  flag_types.define(
    'seeds',
    None,
    value_types.List(ranges.KEYS['seed']),
    'Train each recipe and budget with these seeds; the table has means and '
    'standard errors. Default: that of the reference.',
  )
  flag_types.define_repeated(
    'set',
    None,
    value_types.Text('KEY=VALUE, with a key of the config', r'[^=]+=.*'),
    'Changes a key of all recipes, as --config.KEY=VALUE does.',
  )
  flag_types.define(
    'output',
    None,
    value_types.NEW_RUN,
    'Directory of the results, and of the working directories of the runs.',
    required=True,
  )
  flag_types.define(
    'plot',
    None,
    value_types.Path('file', output=True, suffixes=('.svg', '.png')),
    'File for a plot, .svg or .png: the first metric against the FLOPs and the '
    'seconds of training.',
  )
  sweep.define_shared_flags('Of the evaluation after each training')
  flags.mark_flag_as_required('metrics')


if __name__ == '__main__':
  cpu.use_huge_pages()
  _define_flags()
  command.run(main)
