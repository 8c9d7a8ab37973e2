"""Compares a run of a shipped recipe with what the recipe's run is known for.

`configs/expected/NAME.json` has the curves of a real run, which
`docs/results/record_expected.py` made from its `metrics.jsonl`, and its config.
A run with another config is not compared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import importlib.util
import json
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
import numpy as np

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.config import has_config_of
from mdm_jax.runtime import files
from mdm_jax.runtime.printable import printable

# What is compared, by the beginning of its name before '_', and how far it may
# be from the curve: by so many times, and accuracies by so many percentage
# points. The sum of the levels' losses says no more than they do.
BANDS = {
  'loss': 1.5,
  'held_out_loss': 1.5,
  'train_split_loss': 1.5,
  'grad_norm': 3.0,
  'accuracy': 15.0,
}
_POINTS = 40  # most of a curve

# (step, metrics by name) -> None
Compare = Callable[[int, Mapping[str, float]], None]


class Expected(NamedTuple):
  """The curves of a run.

  Attributes:
    path: of the file.
    bands: as BANDS.
    curves: by stage and metric, [steps, values].
  """

  path: epath.Path
  bands: Mapping[str, float]
  curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def make_comparison(stage: BaseStage) -> Compare:
  """Returns a function that warns of metrics far from what is expected.

  It logs one line for each metric of the stage, the first time that it is
  outside of its band. It does nothing if no file has the stage's config.
  """
  expected = find(json.loads(stage.config.to_json()))
  if not expected or stage.name not in expected.curves or jax.process_index():
    return lambda step, values: None
  curves, warned = expected.curves[stage.name], set()

  def compare(step, values):
    for name in (values.keys() & curves.keys()) - warned:
      likely = value_at(curves[name], step)
      value, band = float(values[name]), _band(name, expected.bands)
      if likely is None or band is None or _is_near(name, value, likely, band):
        continue
      warned.add(name)
      unit = 'points' if name.startswith('accuracy') else 'times'
      logging.warning(
        '%s: at step %d %s is %.3g, but %.3g in the recorded run of this '
        'recipe, %s: more than %g %s off. See "What does a healthy run look '
        'like?" in docs/monitoring.md.',
        stage.title,
        step,
        printable(name),
        value,
        likely,
        f'configs/expected/{expected.path.name}',
        band,
        unit,
      )

  return compare


def find(config: Mapping[str, Any]) -> Expected | None:
  """What is expected of a run with this config; None if nothing is known."""
  spec = importlib.util.find_spec('configs')
  for directory in spec.submodule_search_locations if spec else ():
    for path in sorted((epath.Path(directory) / 'expected').glob('*.json')):
      try:
        found = files.read_json(path, _is_valid)
        if has_config_of(found['config'], config):
          return Expected(path, found['bands'], found['curves'])
      except (files.UnreadableFile, ValueError) as error:
        logging.warning('%s: the run is not compared with it.', error)
  return None


def value_at(curve: Sequence[Sequence[float]], step: int) -> float | None:
  """The value of a curve at a step, interpolated over the step's logarithm.

  None before its first step and behind its last one.
  """
  steps, values = curve
  if not steps[0] <= step <= steps[-1]:
    return None
  return float(np.interp(np.log(step), np.log(steps), values))


def curves_of(
  lines: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, list[list[float]]]]:
  """The curves of a run.

  Args:
    lines: of its `metrics.jsonl`. Of two with the same stage and step the later
      one counts, as the run was interrupted in between.

  Returns:
    As `Expected.curves`. Each curve has at most `_POINTS` points, which are
    means over steps that are spaced evenly in their logarithm.
  """
  found: dict[str, dict[str, dict[int, float]]] = {}
  for line in lines:
    step, stage = line.get('step'), line.get('stage')
    if not files.is_count(step) or not step or not isinstance(stage, str):
      continue
    for name, value in line.items():
      if _band(name, BANDS) is not None and files.is_number(value):
        found.setdefault(stage, {}).setdefault(name, {})[step] = value
  return {
    stage: {name: _thinned(curve) for name, curve in curves.items()}
    for stage, curves in found.items()
  }


def _thinned(curve: Mapping[int, float]) -> list[list[float]]:
  steps = np.array(sorted(curve), np.float64)
  values = np.array([curve[step] for step in sorted(curve)])
  edges = np.geomspace(steps[0], steps[-1], _POINTS)
  # The first and the last point are as they are.
  group = np.searchsorted(edges * (1 - 1e-9), steps)
  group[0], group[-1] = -1, _POINTS
  means = [
    (steps[group == each].mean(), values[group == each].mean())
    for each in np.unique(group)
  ]
  return [
    [round(float(step), 1) for step, _ in means],
    [float(f'{value:.4g}') for _, value in means],
  ]


def _is_near(name: str, value: float, likely: float, band: float) -> bool:
  """Whether a value is within its band; NaN is not."""
  if name.startswith('accuracy'):
    return abs(value - likely) <= band / 100
  return likely / band <= value <= likely * band


def _band(name: str, bands: Mapping[str, float]) -> float | None:
  """The band of a metric: a level's loss has that of the loss."""
  if '_object' in name or '_noise_' in name:  # Of few prompts or examples.
    return None
  for prefix, band in bands.items():
    if name == prefix == 'grad_norm' or name.startswith(f'{prefix}_'):
      return band
  return None


def _is_valid(value: Any) -> bool:
  """Whether JSON is what `record_expected.py` writes."""

  def is_dict(value, is_item):
    return isinstance(value, dict) and all(map(is_item, value.values()))

  def is_curve(value):
    return (
      isinstance(value, list)
      and len(value) == 2
      and all(isinstance(each, list) and each for each in value)
      and len(value[0]) == len(value[1])
      and all(files.is_number(each) for row in value for each in row)
      and value[0] == sorted(value[0])
      and value[0][0] >= 1
    )

  return (
    isinstance(value, dict)
    and isinstance(value.get('config'), dict)
    and is_dict(value.get('bands'), files.is_number)
    and is_dict(value.get('curves'), lambda each: is_dict(each, is_curve))
  )
