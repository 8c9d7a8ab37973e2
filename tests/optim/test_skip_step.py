"""Which steps are skipped, by their and earlier losses and gradient norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.optim import skip_step

NAN, INF = float('nan'), float('inf')


def judge(values, **changes):
  """[(loss, gradient norm)] -> whether each is accepted, and the last state."""
  spec = skip_step.SkipRule(
    **{'spike_factor': 10.0, 'window': 4, 'max_skipped': 3} | changes
  )
  step = jax.jit(lambda state, pair: skip_step.judge(spec, state, *pair))
  state, verdicts = skip_step.new_state(), []
  for pair in values:
    good, state = step(state, jnp.float32(pair))
    verdicts.append(bool(good))
  return verdicts, state


@pytest.mark.parametrize(
  'bad',
  [
    (NAN, 2.0),
    (1.0, NAN),
    (INF, 2.0),
    (1.0, INF),
    (-INF, 2.0),
    (12.6, 2.0),
    (1.0, 25.1),
  ],
)
def test_skipped_steps_change_only_counts(bad):
  verdicts, state = judge([(1.0, 2.0)] * 4 + [bad, bad, (2.0, 4.0), bad])
  assert verdicts == [True] * 4 + [False, False, True, False]
  # The plain mean of four steps, then an exponential one, of accepted steps.
  np.testing.assert_allclose(state.mean, [1.25, 2.5], rtol=1e-6)
  assert (int(state.accepted), int(state.skipped), int(state.in_a_row)) == (
    5,
    3,
    1,
  )


def test_no_spike_before_the_window_is_full():
  verdicts, state = judge([(1.0, 1.0), (NAN, 1.0), (1.0, 1.0), (50.0, 1.0)])
  assert verdicts == [True, False, True, True]
  np.testing.assert_allclose(state.mean, [52 / 3, 1], rtol=1e-6)


def test_factor_0_accepts_spikes():
  values = [(1.0, 1.0)] * 5 + [(1e9, 1e9), (NAN, 1.0)]
  assert judge(values, spike_factor=0)[0] == [True] * 6 + [False]


@pytest.mark.parametrize(
  'name, value',
  [
    ('spike_factor', 1.0),
    ('spike_factor', -3.0),
    ('spike_factor', NAN),
    ('window', 0),
    ('max_skipped', 0),
  ],
)
def test_bad_value_is_named(name, value):
  with pytest.raises(ValueError, match=f'{name}={value}'):
    judge([], **{name: value})
