"""Results of a sweep: lines of JSON, a table and a plot, best first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

from etils import epath

from mdm_jax.eval import estimate
from mdm_jax.report import console, evaluations, plots
from mdm_jax.runtime import files
from mdm_jax.runtime.printable import printable

_FILE = 'results.jsonl'
FINISHED, FAILED, STOPPED, TO_DO = 'finished', 'failed', 'stopped', 'to do'
_SEED = 'seed'  # runs that differ in it alone are one row of the table
_SHOWN = 160  # characters of a note in the table


@dataclasses.dataclass
class Result:
  """A run of a sweep.

  Attributes:
    run: its name, of a directory.
    changes: values of keys that it has instead of those of the config.
    status: 'finished', 'failed', 'stopped' or 'to do'.
    note: why it has failed.
    metrics: of its end, by name.
    errors: their standard errors, where they are known.
    flops: of its training.
    seconds: of its training, or of sampling an image.
    curve: metrics during training, each with 'stage', 'step', 'flops' and
      'seconds'.
    settings: that the metrics depend on, of all evaluations of a finished run.
    evaluated: the flags by which mdm_jax.evaluate has measured a training.
  """

  run: str
  changes: dict[str, Any]
  status: str = TO_DO
  note: str = ''
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
  flops: float | None = None
  seconds: float | None = None
  curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  evaluated: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Results:
  """The results of a sweep.

  Attributes:
    directory: that they are written to.
    metrics: to show; the table is ordered by the first.
    base: (key) -> the config's value.
    runs: by name.
    evaluated: flags of mdm_jax.evaluate, without which no finished run counts;
      None if all count.
  """

  directory: epath.Path
  metrics: Sequence[str]
  base: Callable[[str], Any]
  runs: dict[str, Result]
  evaluated: Mapping[str, str] | None = None

  def find(self, changes: Mapping[str, Any]) -> Result | None:
    """The run that has these values, also if others name more keys."""
    wanted = self._effective(changes)
    return next(
      (
        each
        for each in self.runs.values()
        if self._effective(each.changes) == wanted
      ),
      None,
    )

  def add(self, name: str, changes: Mapping[str, Any], **fields: Any) -> Result:
    """Adds a run, under another name if the name is taken."""
    free, number = name, 1
    while free in self.runs:
      number += 1
      free = f'{name}-{number}'
    self.runs[free] = Result(free, dict(changes), **fields)
    return self.runs[free]

  def finished(self, group: Iterable[Result]) -> list[Result]:
    """Those that have ended, and are measured as the others are."""
    return [
      run
      for run in group
      if run.status == FINISHED and self._is_measured_alike(run)
    ]

  def mean(self, group: Iterable[Result], name: str) -> float | None:
    """A metric's mean over the finished runs of a row, with its error."""
    done = [run for run in self.finished(group) if name in run.metrics]
    if not done:
      return None
    if len(done) > 1:
      return estimate.mean([run.metrics[name] for run in done])
    (run,) = done
    return estimate.Estimate(run.metrics[name], None, run.errors.get(name))

  def note(self, group: Iterable[Result]) -> str | None:
    """Why a run of a row is not in its means, or a metric is not measured."""
    group, parts = list(group), []
    done = self.finished(group)
    if run := next((run for run in group if run not in done), None):
      parts.append(self._why_not(run))
    for name in self.metrics:
      if count := sum(name not in run.metrics for run in done):
        parts.append(f'no {name} in {count} of {len(done)}')
    return '; '.join(parts) or None

  def _why_not(self, run: Result) -> str:
    """Why a run is not in the means."""
    if run.status != FINISHED:
      return f'{run.status}: {run.note}' if run.note else run.status
    others = [
      f'with --{name}={value}'
      for name, value in run.evaluated.items()
      if self.evaluated.get(name) != value
    ] + [
      f'without --{name}'
      for name in self.evaluated
      if name not in run.evaluated
    ]
    return f'not averaged: evaluated {" and ".join(others)}'

  def _is_measured_alike(self, run: Result) -> bool:
    return self.evaluated in (None, run.evaluated)

  def write(self, plot: str | None = None) -> None:
    """Writes the results so far.

    Args:
      plot: a file for a plot, `.svg` or `.png`.
    """
    rows, headers = self._table()
    files.write_text(self.directory / 'table.md', markdown(rows, headers))
    self.write_runs()
    if plot:
      self._plot(plot)

  def write_runs(self) -> None:
    """Writes a line of JSON for each run, the best rows first."""
    ordered = [run for group in self._groups() for run in group]
    files.write_text(
      self.directory / _FILE,
      ''.join(f'{json.dumps(dataclasses.asdict(run))}\n' for run in ordered),
    )

  def __str__(self) -> str:
    return plain(*self._table())

  def _effective(self, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
      key: value for key, value in changes.items() if value != self.base(key)
    }

  def _keys(self) -> list[str]:
    """The keys that any run changes, without the seed."""
    found = {key: None for run in self.runs.values() for key in run.changes}
    return [key for key in found if key != _SEED]

  def _values(self, run: Result) -> list[Any]:
    return [run.changes.get(key, self.base(key)) for key in self._keys()]

  def _groups(self) -> list[list[Result]]:
    """Runs that differ in their seed alone, best first."""
    groups = {}
    for run in self.runs.values():
      groups.setdefault(repr(self._values(run)), []).append(run)
    first = self.metrics[0]
    sign = -1 if evaluations.higher_is_better(first) else 1

    def place(group):
      value = self.mean(group, first)
      return math.inf if value is None else sign * value

    return sorted(groups.values(), key=place)

  def _table(self) -> tuple[list[list[Any]], list[str]]:
    """Rows and headers, without the columns that have nothing to say."""
    columns = {key: [] for key in self._keys()}

    def add(header, cell):
      columns.setdefault(header, []).append(cell)

    groups = self._groups()
    several = any(
      len(group) > 1 or not self.finished(group) for group in groups
    )
    for group in groups:
      for key, value in zip(self._keys(), self._values(group[0])):
        add(key, _text(value))
      for name in self.metrics:
        value = self.mean(group, name)
        error = getattr(value, 'standard_error', None)
        add(name, evaluations.format_value(name, value))
        # Headers are distinct here, and equal in the table.
        add((name,), evaluations.format_value(name, error, digits=2))
      done = self.finished(group)
      add('runs', f'{len(done)} of {len(group)}' if several else None)
      flops = average(run.flops for run in done)
      add('FLOPs', None if flops is None else f'{flops:.3g}')
      seconds = average(run.seconds for run in done)
      header = 's/image' if group[0].settings else 'time'
      add(header, None if seconds is None else duration(seconds))
      add('note', self.note(group))
    kept = {
      header: cells
      for header, cells in columns.items()
      if header in self.metrics or any(cell is not None for cell in cells)
    }
    headers = [
      'std. error' if isinstance(header, tuple) else header for header in kept
    ]
    return list(map(list, zip(*kept.values()))), headers

  def _plot(self, path: str) -> None:
    """Metric against training FLOPs and seconds, or against swept numbers."""
    if any(run.curve for run in self.runs.values()):
      panels = [('flops', 'training FLOPs'), ('seconds', 'training seconds')]
      lines = self._curves()
    else:
      panels = [(key, key) for key in self._keys() if self._is_number(key)]
      lines = None
    if not panels:
      return
    name = self.metrics[0]
    factor = 100 if evaluations.is_share(name) else 1
    with plots.panels(path, len(panels)) as axes:
      for axis, (key, label) in zip(axes, panels):
        shown = self._lines(key) if lines is None else lines
        for title, color, points in shown:
          points = [
            (point[key], factor * point[name])
            for point in points
            if point.get(key) is not None
          ]
          if points:
            axis.plot(
              *zip(*points),
              marker='o',
              markersize=3,
              color=color,
              label=title,
            )
        axis.set(xlabel=label, ylabel=f'{name}, %' if factor > 1 else name)
        axis.grid(alpha=0.3)
      # Curves have the same titles in both panels.
      for axis in axes if lines is None else axes[:1]:
        axis.legend(fontsize='small')

  def _is_number(self, key: str) -> bool:
    return any(
      files.is_number(run.changes.get(key)) for run in self.runs.values()
    )

  def _curves(self) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Title, colour and points of each run; the title of one of a row alone."""
    found = []
    for i, group in enumerate(self._groups()):
      title = _title(self._keys(), self._values(group[0]))
      for run in group:
        if not self._is_measured_alike(run):
          continue
        points = [point for point in run.curve if self.metrics[0] in point]
        found.append((title, f'C{i % 10}', points))
        title = '_'  # Matplotlib shows none of this name.
    return found

  def _lines(self, key: str) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Title, colour and points of each combination of the other keys."""
    others = [other for other in self._keys() if other != key]
    name, lines = self.metrics[0], {}
    for run in self.runs.values():
      values = dict(zip(self._keys(), self._values(run)))
      if files.is_number(values[key]) and name in run.metrics:
        title = _title(others, [values[other] for other in others])
        point = {key: values[key], name: run.metrics[name]}
        lines.setdefault(title, []).append(point)
    return [
      (title, f'C{i % 10}', sorted(points, key=lambda point: point[key]))
      for i, (title, points) in enumerate(sorted(lines.items()))
    ]


def require_metrics(metrics: Sequence[str], names: Sequence[str]) -> None:
  """Raises ValueError if one of --metric is not in the names that there are."""
  for metric in metrics:
    if metric not in names:
      raise ValueError(
        f'--metric={metric}: there are {", ".join(dict.fromkeys(names))}.'
      )


def read(
  directory: epath.Path,
  metrics: Sequence[str],
  base: Callable[[str], Any],
  others: Sequence[str] = (),
) -> Results:
  """Reads what `Results.write` has written; nothing in a new directory.

  Args:
    directory, metrics, base: see `Results`.
    others: names of files that a directory without results may have.

  Raises:
    ValueError: the directory holds something else.
  """
  path = directory / _FILE
  fields = {field.name for field in dataclasses.fields(Result)}
  lines = files.read_json_lines(
    path, lambda line: isinstance(line, dict) and line.keys() == fields
  )
  if not lines and directory.exists():
    # A lock is there while another process writes.
    names = {each.name for each in directory.iterdir()} - {*others}
    names = sorted(name for name in names if name[:1] != '.')
    if names:
      raise ValueError(
        f'--output={directory} holds something else, such as '
        f'{names[0]}: give a new directory, or that of a sweep.'
      )
  runs = {line['run']: Result(**_with_tuples(line)) for line in lines}
  return Results(directory, list(dict.fromkeys(metrics)), base, runs)


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
  """A table in Markdown; None shows as '-'."""
  return (
    '\n'.join(
      f'| {" | ".join(_cell(cell) for cell in row)} |'
      for row in (headers, ['---'] * len(headers), *rows)
    )
    + '\n'
  )


def plain(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
  """The same table for the console."""
  return printable(
    console.table([list(map(_cell, row)) for row in rows], headers)
  )


def _with_tuples(value: Any, key: str = '') -> Any:
  """JSON in which the lists of values of keys are tuples again."""
  if isinstance(value, dict):
    return {name: _with_tuples(each, name) for name, each in value.items()}
  if isinstance(value, list):
    found = map(_with_tuples, value)
    return list(found) if key == 'curve' else tuple(found)
  return value


def average(values: Iterable[float | None]) -> float | None:
  """The mean of those that are known; None if none is."""
  values = [value for value in values if value is not None]
  return sum(values) / len(values) if values else None


def duration(seconds: float) -> str:
  """A time as text; below a minute with three digits."""
  return console.duration(seconds) if seconds >= 60 else f'{seconds:.3g}s'


def _cell(cell: Any) -> str:
  text = '-' if cell is None else ' '.join(str(cell).split())
  return printable(text[:_SHOWN]).replace('|', '/')


def _title(keys: Sequence[str], values: Sequence[Any]) -> str:
  return ', '.join(f'{key}={_text(value)}' for key, value in zip(keys, values))


def _text(value: Any) -> str:
  return 'none' if value is None else str(value)
