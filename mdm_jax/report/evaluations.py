"""Evaluations of a run: tables to read, lines of JSON, and earlier ones."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import datetime
import json
import os
import re
from typing import Any, NamedTuple

from etils import epath

from mdm_jax.report import background, console
from mdm_jax.runtime import files
from mdm_jax.runtime.printable import printable

# Beginnings of the names of metrics that are shares, printed in percent.
_SHARES = ('accuracy_', 'precision', 'recall')
_HIGHER = (*_SHARES, 'clip_score')
# A model is good if it is near that of the data. An edge width is not among
# these, as no edge is sharper than the data's.
_NEAR_DATA = ('flicker',)
# Endings of the names of metrics of the data, which say nothing of a model.
_OF_DATA = ('_of_data', '_of_halves')
# Accuracies of the prompts with so many objects have a table of their own.
_BY_OBJECTS = re.compile(r'accuracy_(\w+?)_(\d+_objects?)')
_OF_KID = 'kid_standard_deviation'  # of subsets; in JSON alone
# Settings that say where and when, not how.
_PLACES = ('workdir', 'step', 'fingerprint', 'devices', 'jax')


class Earlier(NamedTuple):
  """An earlier evaluation of the same run.

  Attributes:
    step: of the stage.
    date: ISO, in UTC.
    metrics: values by name.
    settings: that they depend on.
  """

  step: int
  date: str
  metrics: Mapping[str, float]
  settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
  """Metrics of a model or a directory; printed, it is a table.

  So it is as the last line of a cell of a notebook.

  Attributes:
    metrics: by name; `Estimate`s, or dicts, which are tables of columns.
    settings: that they depend on. JSON.
    chance: what a model scores that ignores its prompts, by metric.
    earlier: evaluations of the same run, newest first.
  """

  metrics: dict[str, Any]
  settings: dict[str, Any]
  chance: Mapping[str, float] = dataclasses.field(default_factory=dict)
  earlier: tuple[Earlier, ...] = ()

  @property
  def values(self) -> dict[str, float]:
    """The metrics that are numbers."""
    return {
      name: value
      for name, value in self.metrics.items()
      if not isinstance(value, dict)
    }

  def to_json(self) -> dict[str, Any]:
    """The evaluation and its date as a line of a `.jsonl` file."""

    def each(name):
      return {
        key: getattr(value, name, None) for key, value in self.values.items()
      }

    def strict(value):
      if isinstance(value, dict):
        return {key: strict(each) for key, each in value.items()}
      if isinstance(value, (list, tuple)):
        return [*map(strict, value)]
      return files.json_number(value) if isinstance(value, float) else value

    return {
      'date': _now(),
      'metrics': strict(self.metrics),
      'n': each('count'),
      'standard_errors': strict(each('standard_error')),
      'chance': {
        name: value
        for name, value in self.chance.items()
        if name in self.metrics
      },
      'settings': self.settings,
    }

  def append_to(self, path: str | os.PathLike) -> None:
    """Adds a line of JSON to a file."""
    background.append_line(path, f'{json.dumps(self.to_json())}\n'.encode())

  def __str__(self) -> str:
    parts = []
    for name, columns in self.metrics.items():
      if isinstance(columns, dict):
        title = name.replace('_', ' ').capitalize()
        rows = list(zip(*columns.values()))
        parts.append(f'{title}:\n{console.table(rows, list(columns))}')
    if found := self._by_number_of_objects():
      parts.append(f'Accuracy by the number of objects in the prompt:\n{found}')
    parts.append(f'{_heading(self.settings)}:\n{self._table()}')
    return printable('\n\n'.join(parts))

  __repr__ = __str__

  def _by_number_of_objects(self) -> str:
    """A table of accuracies, each beside its chance; '' without any."""
    cells = {}
    for name in self.values:
      if match := _BY_OBJECTS.fullmatch(name):
        attribute, column = match.groups()
        cells.setdefault(column.replace('_', ' '), {})[attribute] = name
    attributes = list(
      dict.fromkeys(each for row in cells.values() for each in row)
    )
    headers, columns = ['attribute'], [attributes]
    for column, names in cells.items():
      names = [names.get(each, '') for each in attributes]
      for header, texts in (
        (column, [format_value(name, self.values.get(name)) for name in names]),
        ('chance', [self._chance(name) for name in names]),
      ):
        headers.append(header)
        columns.append(_align(header, texts))
    return console.table(list(zip(*columns)), headers) if cells else ''

  def _table(self) -> str:
    values = {
      name: value
      for name, value in self.values.items()
      if name != _OF_KID and not _BY_OBJECTS.fullmatch(name)
    }
    found = {name: self._find(name) for name in values}
    columns = {
      'metric': list(found),
      'value': [format_value(name, value) for name, value in values.items()],
      'std. error': [
        format_value(name, getattr(value, 'standard_error', None), digits=2)
        for name, value in values.items()
      ],
      'n': [getattr(value, 'count', None) for value in values.values()],
      'chance': [self._chance(name) for name in found],
      'better': [_better(name) for name in found],
      'before': [
        each and format_value(name, each.metrics[name])
        for name, each in found.items()
      ],
      'change': [
        each and _change(name, each.metrics[name], self.metrics[name])
        for name, each in found.items()
      ],
    }
    columns = {
      name: cells if name in ('metric', 'better') else _align(name, cells)
      for name, cells in columns.items()
      if any(cell is not None for cell in cells)
    }
    lines = [console.table(list(zip(*columns.values())), list(columns))]
    lines += self._summary()
    for earlier in dict.fromkeys(map(id, filter(None, found.values()))):
      names = [
        name for name, each in found.items() if each and id(each) == earlier
      ]
      lines.append(self._describe(found[names[0]], names, len(found)))
    return '\n'.join(lines)

  def _chance(self, name: str) -> str | None:
    if name not in self.chance:
      return None
    at = ' (at chance)' if self._is_at_chance(name) else ''
    return format_value(name, self.chance[name]) + at

  def _is_at_chance(self, name: str) -> bool:
    """Whether a value is not above chance by two standard errors."""
    value = self.metrics[name]
    error = getattr(value, 'standard_error', None) or 0
    return value <= self.chance[name] + 2 * error

  def _summary(self) -> Iterator[str]:
    at = [
      name
      for name in self.chance
      if name in self.metrics and not _BY_OBJECTS.fullmatch(name)
    ]
    if at := [name for name in at if self._is_at_chance(name)]:
      yield (
        f'at chance: {", ".join(at)}; by these, images of other prompts would '
        'do as well'
      )

  def _find(self, name: str) -> Earlier | None:
    """The newest earlier evaluation that has a metric, of the same stage.

    Of another stage if there is none of the same one.
    """
    found = [each for each in self.earlier if name in each.metrics]
    stage = self.settings.get('stage')
    same = [each for each in found if each.settings.get('stage') == stage]
    return next(iter(same or found), None)

  def _describe(self, earlier: Earlier, names: list[str], count: int) -> str:
    """Says of when an earlier evaluation is, and what was different."""
    whose = '' if len(names) == count else f' ({", ".join(names)})'
    line = f'before{whose}: step {earlier.step:,}'
    if earlier.date:
      line += f', {_shown(earlier.date)}'
    changes = dict.fromkeys(
      ' '.join(f'{change:.100}'.split())
      for name in names
      for change in _differences(
        _relevant(name, earlier.settings), _relevant(name, self.settings)
      )
    )
    if changes:
      line += f'; with other settings: {", ".join([*changes][:6])}'
      line += ', …' if len(changes) > 6 else ''
    return line


def one_line(values: Mapping[str, float], chance: Mapping[str, float]) -> str:
  """Metrics as a part of a log line; each accuracy is beside its chance."""
  return ', '.join(
    f'{name} {value:.4g}'
    + (f' (chance {chance[name]:.2g})' if name in chance else '')
    for name, value in values.items()
    if not _BY_OBJECTS.fullmatch(name)
  )


def find_earlier(
  directory: str | os.PathLike,
  training: Mapping[str, Any],
  current_name: Callable[[str], str] = str,
) -> tuple[Earlier, ...]:
  """The evaluations of a run, newest first.

  Args:
    directory: `eval` of the run.
    training: settings of the metrics that training has written to
      `<step>.json`.
    current_name: of a metric that older versions have called otherwise.
  """
  found = []
  for path in epath.Path(directory).glob('*.json*'):
    if path.suffix == '.jsonl':
      found += filter(None, map(_read, files.read_json_lines(path)))
    elif path.stem.isdecimal():
      try:
        metrics = _numbers(files.read_json(path))
        changed = files.modified(path)  # 0 in s3://.
      except files.UnreadableFile:  # Training warns of it.
        continue
      date = _date(changed) if changed else ''
      found.append(Earlier(int(path.stem), date, metrics, training))
  # Of two of one second the later line.
  found.sort(key=lambda each: each.date)
  return tuple(
    each._replace(
      metrics={
        current_name(name): value for name, value in each.metrics.items()
      }
    )
    for each in reversed(found)
  )


def _read(line: dict[str, Any]) -> Earlier | None:
  """An evaluation of a line; None if the line is of something else."""
  metrics, settings = line.get('metrics'), line.get('settings')
  if not isinstance(metrics, dict) or not isinstance(settings, dict):
    return None
  step, date = settings.get('step'), line.get('date', '')  # Once, none.
  if not files.is_count(step) or not isinstance(date, str):
    return None
  return Earlier(step, date[:40], _numbers(metrics), settings)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: value for name, value in values.items() if files.is_number(value)
  }


def _relevant(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that a metric depends on."""
  kept = {key: value for key, value in settings.items() if key not in _PLACES}
  if '_loss_' in name or name.endswith('_psnr'):
    keys = ('stage', 'weights', 'loss')
  elif name.startswith('accuracy_'):
    keys = ('stage', 'weights', 'num_samples', 'seed', 'prompts', 'sampler')
  else:
    keys = kept.keys() - {'loss'}
  return {key: value for key, value in kept.items() if key in keys}


def _differences(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ''
) -> Iterator[str]:
  """Names values that differ, such as `sampler.num_steps: 20 -> 50`."""
  for key in dict.fromkeys([*old, *new]):
    first, second = (
      # As JSON, in which tuples have become lists.
      json.loads(json.dumps(each.get(key, 'absent')))
      for each in (old, new)
    )
    if isinstance(first, dict) and isinstance(second, dict):
      yield from _differences(first, second, f'{prefix}{key}.')
    elif first != second:
      yield f'{prefix}{key}: {first} -> {second}'


def _heading(settings: Mapping[str, Any]) -> str:
  """Says of what the metrics are."""
  if 'stage' not in settings:
    return 'Metrics'
  parts = []
  if loss := settings.get('loss'):
    count = loss['batches'] * loss['batch_size']
    parts.append(f'losses of {count:,} {_split(loss["split"])} images')
  if count := settings.get('num_samples'):
    split = _split(settings.get('prompts'))
    parts.append(f'{count:,} samples of {split} prompts')
  return (
    f'Metrics of stage {settings["stage"]} at step {settings["step"]:,} '
    f'({settings["weights"]}); {"; ".join(parts)}'
  )


def _split(name: str) -> str:
  # What the network has been trained on says little of other images.
  return 'TRAINING' if name == 'train' else name


def higher_is_better(name: str) -> bool:
  """Whether the better of two models has the higher value of a metric."""
  return name.startswith(_HIGHER) or name.endswith('_psnr')


def require_order(name: str, flag: str) -> None:
  """Raises ValueError if a metric, given by a flag, cannot order models."""
  if _better(name) not in ('higher', 'lower'):
    raise ValueError(
      f'{flag}={name}: more of it is neither better nor worse, so that it '
      'cannot order models: give another metric first.'
    )


def _better(name: str) -> str:
  """Which values of a metric are better: 'higher', 'lower', 'data' or '-'."""
  if name in _NEAR_DATA:
    return 'data'
  if name.endswith(_OF_DATA):
    return '-'
  return 'higher' if higher_is_better(name) else 'lower'


def is_share(name: str) -> bool:
  """Whether a metric is a share of 1, printed in percent."""
  return name.startswith(_SHARES)


def format_value(name: str, value: float | None, digits: int = 4) -> str | None:
  """A metric's value: shares in percent, others in significant digits."""
  if value is None:
    return None
  if is_share(name):
    return f'{100 * value:.1f} %'
  return f'{value:.{digits}g}'


def _change(name: str, before: float, value: float) -> str:
  """A difference that can be seen in the values as they are printed."""
  if format_value(name, before) == format_value(name, value):
    return '0'
  if is_share(name):
    return f'{100 * (value - before):+.1f} points'
  return f'{value - before:+.2g}'


def _align(header: str, cells: list[Any]) -> list[str]:
  """Moves the cells of a column to its right edge."""
  texts = [
    f'{cell:,}' if isinstance(cell, int) else cell or '-' for cell in cells
  ]
  width = max(map(len, [header, *texts]))
  return [text.rjust(width) for text in texts]


def _now() -> str:
  return _date(datetime.datetime.now().timestamp())


def _shown(date: str) -> str:
  return f'{date[:16].replace("T", " ")} UTC'


def _date(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(
    timespec='seconds'
  )
