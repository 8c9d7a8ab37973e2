"""The trainings of a sweep: each is a command in a process of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import threading
from typing import Any

from absl import logging
from etils import epath
import jax
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from mdm_jax.builders import sweep_grid
from mdm_jax.builders.check import check, metric_names
from mdm_jax.builders.config import changes_of_run, has_config
from mdm_jax.inference import evaluation
from mdm_jax.report import sweep_results, training_curve
from mdm_jax.report.sweep_results import Result, Results
from mdm_jax.runtime import files, preemption, sharding
from mdm_jax.tools import run_commands

# Metrics of two settings of these are not to be compared, though a run may be
# continued with others.
_COMPARED = ('sampler.', 'eval.')
# What a comparison of recipes names its runs by, and no config has.
RECIPE = 'recipe'

# See `train_runs`.
MakeCommands = Callable[
  [epath.Path, sweep_grid.Changes], Sequence[Sequence[str]]
]


def check_points(
  config: ConfigDict,
  points: Sequence[sweep_grid.Changes],
  metrics: Sequence[str],
  options: evaluation.Options | None = None,
) -> None:
  """Checks the config of each run, but not against the devices.

  Args:
    config: that the runs change.
    points: values of keys, of each run.
    metrics: that training is to measure, or an evaluation after it.
    options: of this evaluation; None for none.

  Raises:
    ValueError, FileNotFoundError: a config is wrong, or none has such a metric.
  """
  names = []
  for point in points:
    changed = sweep_grid.changed(config, point)
    check_config(changed, options)
    names += itertools.chain(*metric_names(changed))
    if options:
      names += evaluation.value_names(changed, options)
  sweep_results.require_metrics(metrics, names)


def check_config(
  config: ConfigDict, options: evaluation.Options | None
) -> None:
  """Checks the config of a run, but not against the devices.

  Args:
    config: of the run.
    options: of the evaluation after the training; None for none.

  Raises:
    ValueError, FileNotFoundError: it is wrong.
  """
  # The accelerators are for the runs.
  jax.config.update('jax_platforms', 'cpu')
  check(config, sharding.one_cpu())
  if options:
    evaluation.check_options(config, options)


def train(
  config: ConfigDict,
  points: Sequence[sweep_grid.Changes],
  make_commands: MakeCommands,
  *,
  output: epath.Path,
  metrics: Sequence[str],
  plot: str | None = None,
  **options: Any,
) -> Results:
  """Trains a run for each combination of values, see `train_runs`.

  Args:
    config: that the runs change.
    points: values of keys, of each run.
    make_commands: see `train_runs`.
    output: directory of the runs and of the results.
    metrics: to show; the first one orders the table.
    plot: file for a plot, or None.
    **options: of `train_runs`.

  Raises:
    ValueError: see `train_runs`.
  """

  def make_config(changes):
    if RECIPE in changes:
      raise ValueError(
        f'--output={output} is a comparison of recipes: give another directory.'
      )
    return sweep_grid.changed(config, changes)

  results = sweep_results.read(
    output, metrics, lambda key: config_path.get_value(key, config)
  )
  train_runs(
    results,
    points,
    make_commands,
    make_config,
    write=lambda: results.write(plot),
    **options,
  )
  return results


def train_runs(
  results: Results,
  points: Sequence[sweep_grid.Changes],
  make_commands: MakeCommands,
  make_config: Callable[[sweep_grid.Changes], ConfigDict | None],
  *,
  write: Callable[[], None],
  groups: Sequence[Mapping[str, str]] = ({},),
  evaluated: Mapping[str, str] | None = None,
) -> None:
  """Trains the runs that are not finished, and notes what they measure.

  A stop request goes on to the runs, which save; then the process exits.

  Args:
    results: of the directory, to which the runs are added.
    points: what makes a run, its changes in the results.
    make_commands: (workdir, changes) -> the words of the command that trains a
      run, or continues it, and perhaps of one that evaluates it, and adds a
      line to `evaluation_path`. They exit with the codes of `mdm_jax.main`.
    make_config: changes -> the config of a run; None for one that is in the
      results, and is not compared now.
    write: writes the results, after each run.
    groups: environment variables of the runs that train at the same time.
    evaluated: flags of the evaluation: runs with others are evaluated again,
      or, if they are not in `points`, are in no mean.

  Raises:
    ValueError: the directory is of something else, or of another config.
  """
  _keep_begun(results, make_config)
  runs = [
    results.find(point) or results.add(sweep_grid.run_name(point), point)
    for point in points
  ]
  # Runs that are not in `points` may have been evaluated with other flags.
  results.evaluated = evaluated = dict(evaluated or {})
  waiting = {
    run.run: run
    for run in runs
    if run.status != sweep_results.FINISHED or run.evaluated != evaluated
  }
  for run in waiting.values():
    run.status, run.note = sweep_results.TO_DO, ''
  write()
  logging.info(
    '%d runs, of which %d are finished; %d at a time.',
    len(runs),
    len(runs) - len(waiting),
    len(groups),
  )
  jobs = run_commands.Jobs(
    [
      (name, make_commands(results.directory / name, run.changes))
      for name, run in waiting.items()
    ],
    groups,
  )
  with _running(jobs) as ended_jobs:
    for ended in ended_jobs:
      run = waiting[ended.name]
      run.evaluated = evaluated
      _note_end(run, ended, results)
      write()
      logging.info('%s: %s. %s', run.run, run.status, run.note)


@contextlib.contextmanager
def _running(jobs: run_commands.Jobs) -> Iterator[Iterator[run_commands.Ended]]:
  """Yields the jobs that have ended, of which an error or a stop ends the rest.

  After a stop request the process exits once they all have ended.
  """
  all_ended = threading.Event()
  stop = preemption.StopHandler(lambda: None, None, jobs.stop)
  stop.defer(all_ended.wait)
  stop.allow()
  ended = jobs.run()
  try:
    yield ended
  finally:
    jobs.stop()
    for _ in ended:  # They save meanwhile.
      pass
    all_ended.set()
    stop.close()


def commands(
  workdir: epath.Path, words: Sequence[str], evaluated: Mapping[str, str]
) -> list[list[str]]:
  """Commands that train a run, and evaluate it if there are flags for that.

  Args:
    workdir: of the run.
    words: flags of its config.
    evaluated: flags of mdm_jax.evaluate, by name.
  """
  found = [['mdm_jax.main', f'--workdir={workdir}', *words]]
  if evaluated:
    found.append(
      [
        *('mdm_jax.evaluate', f'--workdir={workdir}'),
        f'--output={evaluation_path(workdir)}',
        *(f'--{name}={value}' for name, value in evaluated.items()),
      ]
    )
  return [[sys.executable, '-m', *each] for each in found]


def evaluation_path(workdir: epath.Path) -> epath.Path:
  """The file of a run to which its evaluation in the sweep adds a line."""
  return workdir / 'eval' / 'sweep.jsonl'


def _keep_begun(
  results: Results,
  make_config: Callable[[sweep_grid.Changes], ConfigDict | None],
) -> None:
  """Forgets the runs that were not begun; others must be of these configs.

  Raises:
    ValueError: the sweep is of another config, or of a finished run.
  """
  for name, run in list(results.runs.items()):
    directory = results.directory / name
    if run.settings:
      raise ValueError(
        f'--output={results.directory} evaluates a finished run: give another '
        'directory.'
      )
    if not has_config(directory):
      del results.runs[name]
      continue
    config = make_config(run.changes)
    if config is None:
      continue
    try:
      found = changes_of_run(directory, json.loads(config.to_json()))
    except files.UnreadableFile:
      continue  # mdm_jax.main makes it anew.
    lines = [
      line
      for line, is_allowed in found.items()
      if not is_allowed or line.startswith(_COMPARED)
    ]
    if lines:
      raise ValueError(
        f'--output={results.directory} is a sweep of another config '
        f'({"; ".join(lines[:5])}{" …" if len(lines) > 5 else ""}): give '
        'another directory, or the same config.'
      )


def _note_end(run: Result, ended: run_commands.Ended, results: Results) -> None:
  """Reads what a run has measured."""
  run.status = {
    0: sweep_results.FINISHED,
    preemption.EXIT_CODE: sweep_results.STOPPED,
  }.get(ended.code, sweep_results.FAILED)
  if run.status == sweep_results.FAILED:
    run.note = ended.line.removeprefix('error: ') or 'it has written nothing.'
    if ended.code < 0:
      run.note = f'ended by {signal.Signals(-ended.code).name}.'
  directory = results.directory / run.run
  curve = training_curve.read(directory)
  if not curve:
    return
  # Metrics of the last stage, at its end if it is finished.
  *_, last = curve
  metrics, run.errors = dict(last.metrics), {}
  if run.evaluated and run.status == sweep_results.FINISHED:
    *_, line = files.read_json_lines(evaluation_path(directory))
    metrics |= {
      name: value
      for name, value in line['metrics'].items()
      if files.is_number(value)
    }
    run.errors = line['standard_errors']
  run.metrics, run.flops, run.seconds = metrics, last.flops, last.seconds
  curve[-1] = dataclasses.replace(last, metrics=metrics)
  run.curve = [
    {
      'stage': each.stage,
      'step': each.step,
      'flops': each.flops,
      'seconds': each.seconds,
    }
    # All of them: another invocation may plot another.
    | dict(each.metrics)
    for each in curve
  ]
