r"""Compares values of configuration keys: trains a run of each, or evaluates.

  python -m mdm_jax.tools.sweep --config=configs/shapes_64.py \
      --grid='stages[0].learning_rate=0.01,0.02' --seeds=0,1,2 \
      --metric=accuracy_all --output=sweeps/learning_rate

Of a finished run, it compares guidance, samplers, steps, and, if averages were
tracked, post-hoc EMAs (sigma_rel=none,0.05,0.1):

  python -m mdm_jax.tools.sweep --workdir=runs/shapes_64 \
      --grid=sampler.guidance=1,2,4 --grid=sampler.num_steps=10,20 \
      --metric=accuracy_all --output=sweeps/guidance

The results are in OUTPUT/table.md and OUTPUT/results.jsonl, best first. The
same command again continues an interrupted sweep; a larger grid adds runs.
"""

import sys
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags

from mdm_jax.builders import ranges, recipes, sweep_grid
from mdm_jax.runtime import (
  command,
  cpu,
  directory_lock,
  flag_types,
  preemption,
  value_types,
)

# Of mdm_jax.evaluate.
OPTIONS = [name for name in ranges.EVALUATION if name != 'output']


def main(_: list[str]) -> None:
  """Trains or evaluates all combinations, and prints a table."""
  from mdm_jax.report import console, plots
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  values = flags.FLAGS
  try:
    _check_flags(values)
    if values.plot:
      plots.check_installed()
    value_types.check_outputs(values.output)
    with directory_lock.holding(values.output):
      if values.config is None:
        results = _evaluate_by_flags(values)
      else:
        results = _train_by_flags(values)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(results)
  print(f'Results are in {values.output}/table.md and results.jsonl.')
  end(results)


def _check_flags(values: flags.FlagValues) -> None:
  """Raises ValueError for flags that do not go together."""
  from mdm_jax.report import evaluations

  if (values.config is None) == (values.workdir is None):
    raise ValueError(
      'give either --config, to train, or the --workdir of a finished run.'
    )
  trains = values.workdir is None
  for name in ('stage',) if trains else ('seeds', 'devices_per_run'):
    if values[name].value is not None:
      raise ValueError(
        f'--{name} needs {"--workdir" if trains else "--config"}.'
      )
  given = _evaluation_flags(values)
  if trains and given and not values.metrics:
    raise ValueError(f'--{[*given][0]} needs --metrics.')
  if not (values.grid or values.seeds):
    raise ValueError('nothing to compare: give --grid=KEY=VALUE,VALUE.')
  evaluations.require_order(values.metric[0], '--metric')


def _evaluation_flags(values: flags.FlagValues) -> dict[str, Any]:
  """The flags of mdm_jax.evaluate that are given."""
  return {
    name: values[name].value
    for name in (*OPTIONS, 'batch_size')
    if values[name].value is not None
  }


def evaluation_options(values: flags.FlagValues, **defaults: Any):
  """Options of the flags of mdm_jax.evaluate that are given.

  Args:
    values: of the flags.
    **defaults: options of those that are not.

  Returns:
    The `evaluation.Options`, None if there are none; and the given flags as
    they are written on a command line, by name.
  """
  from mdm_jax.inference import evaluation

  given = _evaluation_flags(values)
  texts = {
    name: ','.join(value) if isinstance(value, list) else str(value)
    for name, value in given.items()
  }
  options = defaults | given
  options.pop('batch_size', None)  # Of the session, not of the evaluation.
  return evaluation.make_options(options) if options else None, texts


def end(results) -> None:
  """Ends the process with the exit code of runs that are not finished."""
  from mdm_jax.report import sweep_results

  runs = results.runs.values()
  failed = [run for run in runs if run.status == sweep_results.FAILED]
  if failed:
    sys.exit(
      f'error: {len(failed)} of {len(runs)} runs failed, {failed[0].run}: '
      f'{failed[0].note} The same command tries them again.'
    )
  if any(run.status == sweep_results.STOPPED for run in runs):
    sys.exit(preemption.EXIT_CODE)


def _define_flags() -> None:
  """Only where this is the command: others have flags of these names."""
  recipes.define(
    'Recipe to train, as for mdm_jax.main; --config.KEY=VALUE changes a key of '
    'all runs.',
    required=False,
  )
  flag_types.define(
    'workdir',
    None,
    value_types.RUN,
    'Working directory of a finished run to evaluate, instead of --config.',
  )
  flag_types.define_repeated(
    'grid',
    None,
    value_types.Text('KEY=VALUE,VALUE, with a key of the config', r'[^=]+=.+'),
    'A key of the config and its values, such as '
    "'stages[0].learning_rate=0.01,0.02'. Several are combined. With "
    '--workdir: keys of sampler, and sigma_rel, of which the value none is the '
    "EMA with the optimizer's decay.",
  )
  flag_types.define(
    'seeds',
    None,
    value_types.List(ranges.KEYS['seed']),
    'Train each combination with these seeds; the table has means and standard '
    'errors. Default: that of the config.',
  )
  flag_types.define(
    'metric',
    None,
    value_types.List(value_types.Text('the name of a metric', r'\w+')),
    'Metrics for the table, joined by commas, such as accuracy_all or '
    'held_out_loss_64. The best by the first one comes first.',
    required=True,
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
    'File for a plot of the first metric, .svg or .png: against the FLOPs and '
    'the seconds of training, or, with --workdir, against each number.',
  )
  flag_types.define(
    'stage',
    None,
    ranges.KEYS['stages[].name'],
    'With --workdir: as for mdm_jax.evaluate.',
  )
  define_shared_flags(
    'Of each evaluation, or of one after each training if --metrics is given'
  )


def define_shared_flags(when: str) -> None:
  """Defines `devices_per_run`, and the flags of mdm_jax.evaluate.

  Args:
    when: begins the text of the latter for --help.
  """
  flag_types.integer(
    'devices_per_run',
    None,
    1,
    10**4,
    'Train several runs at the same time, each on so many GPUs or TPU chips of '
    'this machine. Default: one run at a time, on all devices.',
  )
  flag_types.define(
    'batch_size', None, ranges.KEYS['eval.batch_size'], 'Images at once.'
  )
  for name in OPTIONS:
    text = f'{when}: {ranges.EVALUATION[name]}. See mdm_jax.evaluate --help.'
    flag_types.define(name, None, ranges.EVALUATION[name], text)


def _train_by_flags(values: flags.FlagValues):
  from mdm_jax.tools import run_commands, sweep_training

  config = values.config
  grid = list(values.grid or ())
  if values.seeds:
    grid.append(f'seed={",".join(map(str, values.seeds))}')
  points = sweep_grid.combinations(
    grid, lambda *pair: sweep_grid.parse(config, *pair)
  )
  flag = flags.FLAGS['config']
  given = {
    sweep_grid.from_the_start(config, key): value
    for key, value in config_flags.get_override_values(flag).items()
  }
  options, evaluated = evaluation_options(values)

  def make_commands(workdir, changes):
    words = [
      f'--config={config_flags.get_config_filename(flag)}',
      *(f'--config.{key}={value}' for key, value in (given | changes).items()),
    ]
    return sweep_training.commands(workdir, words, evaluated)

  sweep_training.check_points(config, points, values.metric, options)
  return sweep_training.train(
    config,
    points,
    make_commands,
    output=epath.Path(values.output),
    metrics=values.metric,
    groups=run_commands.device_groups(values.devices_per_run),
    evaluated=evaluated,
    plot=values.plot,
  )


def _evaluate_by_flags(values: flags.FlagValues):
  from mdm_jax.inference import session
  from mdm_jax.tools import sweep_evaluation

  opened = session.open_run(
    values.workdir,
    stage=values.stage,
    evaluation={'batch_size': values.batch_size},
  )
  points = sweep_grid.combinations(
    values.grid, lambda *pair: sweep_evaluation.parse(opened.config, *pair)
  )
  options, _ = evaluation_options(values, metrics=['prompt_accuracy'])
  return sweep_evaluation.evaluate(
    opened,
    points,
    options,
    output=epath.Path(values.output),
    metrics=values.metric,
    plot=values.plot,
  )


if __name__ == '__main__':
  cpu.use_huge_pages()
  _define_flags()
  command.run(main, recipes.parse_flags)
