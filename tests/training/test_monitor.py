"""What is read back from the steps: means that leave skipped steps out."""

import types

import jax.numpy as jnp
import numpy as np

from mdm_jax.training.monitor import Monitor


def metrics(loss, in_a_row=0):
  return {
    'loss': jnp.float32(loss),
    'level_losses': jnp.array([loss, 2 * loss]),
    'noise_sums': jnp.array([[loss, 0.0]]),
    'noise_counts': jnp.array([[2.0, 0.0]]),
    'grad_norm': jnp.float32(10 * loss),
    'update_norm': jnp.float32(0 if in_a_row else 1),
    'bad_records': jnp.int32(0),
    'stop': jnp.bool_(False),
    'save': jnp.bool_(False),
    'skipped': jnp.int32(in_a_row),
    'skipped_in_a_row': jnp.int32(in_a_row),
  }


def test_means_leave_skipped_steps_out(monkeypatch):
  monkeypatch.setattr(Monitor, '_log_skipped', lambda *args: None)
  config = types.SimpleNamespace(
    data=types.SimpleNamespace(max_bad_fraction=0.1),
    guard=types.SimpleNamespace(max_skipped=9),
  )
  monitor = Monitor(
    None, types.SimpleNamespace(config=config, batch_size=4), first_step=0
  )
  steps = [(1.0, 0), (np.nan, 1), (1e9, 2), (3.0, 0)]
  for step, (loss, in_a_row) in enumerate(steps, 1):
    monitor.add(step, metrics(loss, in_a_row))
  monitor.read(unread=0)
  means = monitor.take_means()
  assert means['loss'] == 2 and means['grad_norm'] == 20
  assert means['update_norm'] == 1
  np.testing.assert_array_equal(means['level_losses'], [2, 4])
  np.testing.assert_array_equal(means['noise_sums'], [[2, 0]])
  np.testing.assert_array_equal(means['noise_counts'], [[2, 0]])
  # The next ones are of later steps alone.
  monitor.add(5, metrics(5.0))
  monitor.read(unread=0)
  assert monitor.take_means()['loss'] == 5
  monitor.add(6, metrics(np.nan, 1))
  monitor.read(unread=0)
  means = monitor.take_means()
  assert np.isnan(means['loss']) and np.isnan(means['level_losses']).all()
  assert monitor.latest['skipped'] == 1
