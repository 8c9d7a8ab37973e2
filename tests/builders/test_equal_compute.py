"""Steps that a budget pays for."""

import itertools

import numpy as np
import pytest

from mdm_jax.builders import equal_compute


@pytest.mark.parametrize('seed', range(20))
def test_steps_are_as_close_as_brute_force_finds(seed):
  rng = np.random.default_rng(seed)
  names = [f's{i}' for i in range(rng.integers(1, 4))]
  steps = {name: int(rng.integers(150, 400)) for name in names}
  costs = {name: float(rng.uniform(1, 9)) for name in names}
  whole = sum(steps[name] * costs[name] for name in names)
  budget = float(rng.uniform(0.3, 2)) * whole
  found = equal_compute.scale_steps(steps, costs, budget)
  factor = budget / whole
  near = [
    [n for n in range(1, 900) if abs(n - factor * steps[name]) < 1]
    for name in names
  ]
  best = min(
    abs(sum(n * costs[name] for n, name in zip(each, names)) - budget)
    for each in itertools.product(*near)
  )
  cost = equal_compute.total_cost(found, costs)
  assert abs(cost - budget) == pytest.approx(best, abs=1e-9)
  assert abs(cost / budget - 1) < 0.01
  assert all(abs(found[x] - factor * steps[x]) < 1 for x in names)


def test_budget_1_is_the_recipe_as_it_is_written():
  steps, costs = {'16': 2600, '64': 2000}, {'16': 1.7e10, '64': 2.3e10 / 3}
  whole = equal_compute.total_cost(steps, costs)
  assert equal_compute.scale_steps(steps, costs, whole) == steps
  assert equal_compute.scale_steps(steps, costs, whole / 2) == {
    '16': 1300,
    '64': 1000,
  }


@pytest.mark.parametrize(
  'steps, budget, message',
  (
    (
      {'a': 3, 'b': 1},
      120,
      "stage 'b' would have 0.75 steps: give a larger budget.",
    ),
    (
      {'a': 100},
      40 * 25.4,
      "a step of stage 'a' is 3.9% of it, so that whole steps miss it by 1.6%: "
      'give a larger budget.',
    ),
  ),
)
def test_a_budget_that_whole_steps_do_not_meet_is_refused(
  steps, budget, message
):
  with pytest.raises(ValueError) as error:
    equal_compute.scale_steps(steps, dict.fromkeys(steps, 40.0), budget)
  assert str(error.value) == message


def test_warm_ups_and_reports_are_scaled_with_the_steps(make_config):
  config = make_config()
  config.stages[0].warmup_steps = 5
  config.stages[1].warmup_steps = 90  # Longer than the stage.
  config.sample_every, config.eval.loss_every = 10, 3
  found = equal_compute.scaled_keys(config, {'8': 4, '16': 6})
  assert found == {
    'stages[0].steps': 4,
    'stages[0].warmup_steps': 1,
    'stages[1].steps': 6,
    'stages[1].warmup_steps': 6,
    'eval.every': 0,
    'eval.loss_every': 1,
    'sample_every': 2,
    'averages.snapshot_every': 250,
  }
  # As it is written, but for the warm-up that was too long.
  found = equal_compute.scaled_keys(config, {'8': 20, '16': 20})
  assert found['stages[0].warmup_steps'] == 5
  assert found['stages[1].warmup_steps'] == 20
  assert found['eval.loss_every'] == 3


@pytest.mark.parametrize(
  'num_steps, cost, own_cost', ((20, 0.387, 0.521), (50, 3.0, 1.1), (3, 1, 70))
)
def test_sampling_steps_cost_as_much_as_the_references(
  num_steps, cost, own_cost
):
  found = equal_compute.scale_sampler(num_steps, cost, own_cost)
  best = min(range(1, 999), key=lambda n: abs(n * own_cost - num_steps * cost))
  assert found == best
