"""What a training run has measured, and at what cost, from `metrics.jsonl`."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath
import numpy as np

from mdm_jax.runtime import files

_PLACE = ('time', 'stage', 'step')
# What lines of progress have, and evaluations have not.
_PACE = 'seconds_per_step'
# Of what is right by chance, beside what was measured.
_CHANCE = 'chance_'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluation during training, or at its end.

  Attributes:
    stage: name of the stage.
    step: of the stage.
    flops: of all training steps until then, those of earlier stages included,
      on all devices; XLA's count of the compiled steps. None if unknown.
    seconds: that these steps have taken, with the wait for their batches, but
      without compiling, saving, sampling and evaluating.
    metrics: values by name.
  """

  stage: str
  step: int
  flops: float | None
  seconds: float
  metrics: Mapping[str, float]


def read(workdir: epath.PathLike) -> list[Evaluation]:
  """The evaluations of a training run, in order.

  Steps that a resumed run has repeated count once.

  Args:
    workdir: of the run.
  """
  paces, measured = {}, {}
  lines = files.read_json_lines(epath.Path(workdir) / 'metrics.jsonl', _is_line)
  for line in lines:
    place = line['stage'], line['step']
    numbers = {
      name: value
      for name, value in line.items()
      if name not in _PLACE
      and not name.startswith(_CHANCE)
      and files.is_number(value)
    }
    if _PACE in numbers:
      paces.setdefault(line['stage'], {})[line['step']] = numbers
    else:
      # A resumed run writes it again; the end of a run adds to it.
      before = measured.get(place, {})
      kept = {name: before[name] for name in before if name not in line}
      measured[place] = kept | numbers
  found, flops, seconds = [], 0.0, 0.0
  for stage, rows in paces.items():
    steps = sorted(rows)
    times = np.cumsum(
      np.diff([0, *steps]) * [rows[step][_PACE] for step in steps]
    )
    each = _flops_per_step(rows[steps[-1]])
    for step in sorted(step for name, step in measured if name == stage):
      found.append(
        Evaluation(
          stage,
          step,
          None if None in (flops, each) else flops + step * each,
          seconds + float(np.interp(step, [0, *steps], [0, *times])),
          measured[stage, step],
        )
      )
    flops = None if None in (flops, each) else flops + steps[-1] * each
    seconds += float(times[-1])
  return found


def _flops_per_step(numbers: Mapping[str, float]) -> float | None:
  """FLOPs of a step on all devices, which its rate was computed from."""
  if 'flops_per_second' not in numbers:
    return None
  return numbers['flops_per_second'] * numbers[_PACE]


def _is_line(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and isinstance(value.get('stage'), str)
    and files.is_count(value.get('step'))
  )
