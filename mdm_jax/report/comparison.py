"""A comparison of recipes at equal compute: a table, JSON and a plot."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

from mdm_jax.report import evaluations, plots, sweep_results
from mdm_jax.report.sweep_results import Result, Results
from mdm_jax.runtime import files

_FILE = 'comparison.json'


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs of a recipe with a budget, which differ in their seed alone.

  Attributes:
    recipe: its name.
    budget: share of the compute of the reference as it is written.
    parameters: number of trained parameters.
    steps: of each stage, by its name.
    flops: of all these training steps.
    sampler_steps: number of sampling steps.
    sampler_ratio: FLOPs of the sampling steps over those of the reference.
  """

  recipe: str
  budget: float
  parameters: int
  steps: Mapping[str, int]
  flops: float
  sampler_steps: int
  sampler_ratio: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What is compared, and its results so far.

  Attributes:
    results: of all runs; `recipe`, `budget` and `seed` are a run's changes.
    rows: in the order of the table; those of the reference come first.
    settings: for the JSON file.
  """

  results: Results
  rows: Sequence[Row]
  settings: Mapping[str, Any]

  def write(self, plot: str | None = None) -> None:
    """Writes `table.md`, `comparison.json`, `results.jsonl` and the plot.

    Args:
      plot: a file for a plot, `.svg` or `.png`.
    """
    directory = self.results.directory
    text = sweep_results.markdown(*self._table())
    files.write_text(
      directory / 'table.md',
      '\n'.join([text, *(f'{line}\n' for line in self._sentences())]),
    )
    files.write_json(
      directory / _FILE,
      {
        **self.settings,
        'rows': [
          dataclasses.asdict(row) | self._measured(row) for row in self.rows
        ],
        'reached': self.reached(),
      },
    )
    self.results.write_runs()
    if plot:
      self._plot(plot)

  def __str__(self) -> str:
    return '\n'.join([sweep_results.plain(*self._table()), *self._sentences()])

  def reached(self) -> dict[str, dict[str, Any]]:
    """With how little training the reference is as good as each other recipe.

    Returns:
      For each other recipe that has results at budget 1: its `value` of the
      first metric there, the `flops` with which the reference reaches it, their
      `share` of the recipe's training FLOPs (both None if it is not reached),
      and `at_most`, whether less may do, as even the smallest budget is better.
    """
    name = self.results.metrics[0]
    points = {}
    for row in self.rows:
      value = self.results.mean(self._runs(row), name)
      if value is not None:
        points.setdefault(row.recipe, []).append((row, value))
    reference = self.rows[0].recipe
    curve = [(row.flops, value) for row, value in points.pop(reference, ())]
    found = {}
    for recipe, each in points.items():
      for row, value in each:
        if row.budget == 1 and curve:
          flops, at_most = flops_to_reach(
            curve, value, evaluations.higher_is_better(name)
          )
          found[recipe] = {
            'metric': name,
            'value': float(value),
            'flops': flops,
            'share': flops and flops / row.flops,
            'at_most': at_most,
          }
    return found

  def _sentences(self) -> Iterator[str]:
    reference = self.rows[0].recipe
    for recipe, found in self.reached().items():
      name = found['metric']
      value = evaluations.format_value(name, found['value'])
      aim = f'the {name} of {recipe} at budget 1, {value}'
      if found['share'] is None:
        yield f'{reference} does not reach {aim}.'
        continue
      bound = '≤ ' if found['at_most'] else ''
      end = ': its smallest budget' if found['at_most'] else ''
      yield (
        f'{reference} reaches {aim}, with {bound}{found["share"]:.1%} of its '
        f'training FLOPs{end}.'
      )

  def _runs(self, row: Row) -> list[Result]:
    return [
      run
      for run in self.results.runs.values()
      if (run.changes['recipe'], run.changes['budget'])
      == (row.recipe, row.budget)
    ]

  def _measured(self, row: Row) -> dict[str, Any]:
    """The results of a row, for the JSON file."""
    runs = self._runs(row)
    done = self.results.finished(runs)
    metrics = {}
    for name in dict.fromkeys(name for run in done for name in run.metrics):
      value = self.results.mean(done, name)
      metrics[name] = {
        'mean': float(value),
        'standard_error': value.standard_error,
        'values': {
          str(run.changes['seed']): run.metrics[name]
          for run in done
          if name in run.metrics
        },
      }
    return {
      'runs': len(runs),
      'finished': len(done),
      'seconds': sweep_results.average(run.seconds for run in done),
      'logged_flops': sweep_results.average(run.flops for run in done),
      'metrics': metrics,
    }

  def _table(self) -> tuple[list[list[Any]], list[str]]:
    """Rows and headers."""
    rows = []
    for row in self.rows:
      runs = self._runs(row)
      measured = self._measured(row)
      seconds = measured['seconds']
      rows.append(
        [
          row.recipe,
          f'{row.budget:g}',
          *(
            _with_error(name, self.results.mean(runs, name))
            for name in self.results.metrics
          ),
          f'{measured["finished"]} of {len(runs)}',
          f'{row.parameters:,}',
          f'{row.flops:.3g}',
          None if seconds is None else sweep_results.duration(seconds),
          ' + '.join(f'{count:,}' for count in row.steps.values()),
          row.sampler_steps,
          f'{row.sampler_ratio:.3f}',
          self.results.note(runs),
        ]
      )
    headers = [
      *('recipe', 'budget', *self.results.metrics, 'runs', 'parameters'),
      *('training FLOPs', 'time', 'steps', 'sampler steps', 'sampler FLOPs'),
      'note',
    ]
    if all(row[-1] is None for row in rows):
      rows, headers = [row[:-1] for row in rows], headers[:-1]
    return rows, headers

  def _plot(self, path: str) -> None:
    """The first metric against the FLOPs and the seconds of training."""
    name = self.results.metrics[0]
    factor = 100 if evaluations.is_share(name) else 1
    curves = {}
    for row in self.rows:
      runs = self._runs(row)
      value = self.results.mean(runs, name)
      if value is not None:
        error = value.standard_error or 0.0
        seconds = self._measured(row)['seconds']
        curves.setdefault(row.recipe, []).append(
          (row.flops, seconds, factor * value, factor * error)
        )
    with plots.panels(path, 2) as axes:
      for column, axis in enumerate(axes):
        for recipe, points in curves.items():
          points = sorted(
            (point[column], *point[2:])
            for point in points
            if point[column] is not None
          )
          if points:
            x, y, errors = zip(*points)
            axis.errorbar(
              x, y, errors, marker='o', markersize=3, capsize=2, label=recipe
            )
        axis.set(
          xscale='log',
          xlabel=('training FLOPs', 'training seconds')[column],
          ylabel=f'{name}, %' if factor > 1 else name,
        )
        axis.grid(alpha=0.3)
      if curves:
        axes[0].legend(fontsize='small')


def flops_to_reach(
  curve: Sequence[tuple[float, float]], value: float, higher_is_better: bool
) -> tuple[float | None, bool]:
  """FLOPs at which a curve first is as good as a value.

  Args:
    curve: FLOPs and metric of each budget, in any order. Between them the
      metric is linear in the logarithm of the FLOPs.
    value: to be reached.
    higher_is_better: whether it is.

  Returns:
    The FLOPs, None if no budget is as good; and whether they are only an upper
    bound, as the smallest budget is better already.
  """
  sign = 1 if higher_is_better else -1
  before = None
  for flops, metric in sorted(curve):
    ahead = sign * (metric - value)
    if ahead >= 0:
      if before is None:
        return flops, ahead > 0
      start, behind = before
      share = behind / (behind - ahead)
      log = (1 - share) * math.log(start) + share * math.log(flops)
      return math.exp(log), False
    before = flops, ahead
  return None, False


def _with_error(name: str, value: float | None) -> str | None:
  """'12.3 ± 0.4'."""
  error = getattr(value, 'standard_error', None)
  text = evaluations.format_value(name, value)
  if text is None or error is None:
    return text
  return f'{text} ± {evaluations.format_value(name, error, digits=2)}'
