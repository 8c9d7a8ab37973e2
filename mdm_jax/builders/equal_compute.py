"""Recipes at equal compute: how many steps a budget pays for."""

from collections.abc import Mapping
import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from mdm_jax.builders import ranges

TOLERANCE = 0.01  # of a budget
# Periods that follow the length of the training, so that budgets have as many
# reports. Checkpoints are for interruptions, which do not; each stage saves at
# its end anyway.
_PERIODS = (
  'eval.every',
  'eval.loss_every',
  'sample_every',
  'averages.snapshot_every',
)


def scale_steps(
  steps: Mapping[str, int], costs: Mapping[str, float], budget: float
) -> dict[str, int]:
  """Steps of all stages, scaled by a common factor to cost a budget.

  Each stage has one of the two whole numbers next to its exact share, which
  together come closest to the budget.

  Args:
    steps: of each stage, by name.
    costs: of one step of each stage, in FLOPs or seconds.
    budget: of all stages together, in the same unit.

  Raises:
    ValueError: a stage would have less than one step, or the budget is missed
      by more than `TOLERANCE`.
  """
  factor = budget / total_cost(steps, costs)
  exact = {stage: factor * count for stage, count in steps.items()}
  for stage, count in exact.items():
    if round(count, 6) < 1:
      raise ValueError(
        f"stage '{stage}' would have {count:.2g} steps: give a larger budget."
      )
  choices = [{math.floor(x), math.ceil(x)} - {0} for x in exact.values()]

  def error(counts):
    scaled = dict(zip(steps, counts))
    # Of several that are as close, the one closest to the exact shares.
    shares = sum(abs(scaled[stage] - exact[stage]) for stage in exact)
    return abs(total_cost(scaled, costs) - budget), shares

  found = dict(zip(steps, min(itertools.product(*choices), key=error)))
  missed = abs(total_cost(found, costs) / budget - 1)
  if missed > TOLERANCE:
    stage = min(costs, key=costs.get)
    raise ValueError(
      f"a step of stage '{stage}' is {costs[stage] / budget:.1%} of it, so "
      f'that whole steps miss it by {missed:.1%}: give a larger budget.'
    )
  return found


def total_cost(steps: Mapping[str, int], costs: Mapping[str, float]) -> float:
  """The cost of the steps of all stages together."""
  return sum(count * costs[stage] for stage, count in steps.items())


def scaled_keys(config: ConfigDict, steps: Mapping[str, int]) -> dict[str, Any]:
  """The keys that give a recipe other numbers of steps, and their values.

  Warm-ups and the periods of reports are scaled with the steps. A warm-up is no
  longer than its stage.

  Args:
    config: of the recipe, which is not changed.
    steps: of each stage, by name.
  """
  found, before = {}, 0
  for i, stage in enumerate(config.stages):
    count = steps[stage.name]
    before += stage.steps
    warmup = _scaled(stage.warmup_steps, count / stage.steps)
    found[f'stages[{i}].steps'] = count
    found[f'stages[{i}].warmup_steps'] = min(warmup, count)
  factor = sum(steps.values()) / before
  for key in _PERIODS:
    found[key] = _scaled(ranges.find(config, key), factor)
  return found


def _scaled(value: int, factor: float) -> int:
  """0 stays, and nothing else becomes it."""
  return max(1, round(value * factor)) if value else 0


def scale_sampler(num_steps: int, cost: float, own_cost: float) -> int:
  """Sampling steps of a recipe for the FLOPs of the reference's.

  Args:
    num_steps: of the reference.
    cost: FLOPs of one of them for an image.
    own_cost: FLOPs of a sampling step of the recipe for an image.

  Returns:
    The number whose FLOPs come closest, at least 1.
  """
  return max(1, round(num_steps * cost / own_cost))
