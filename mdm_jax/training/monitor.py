"""Reads the metrics of steps back, and stops a run that goes wrong."""

import collections
from typing import Any

from absl import logging
import jax
import numpy as np

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.data import batch_keys
from mdm_jax.data.pipeline import DataError
from mdm_jax.optim import skip_step
from mdm_jax.training.run import Run

# Metrics that are not logged as means.
_LATEST = (
  'param_norm',
  'bad_records',
  'stop',
  'save',
  'skipped',
  'skipped_in_a_row',
)
# The share of bad records is not known from fewer records.
_MIN_RECORDS = 1000


class Monitor:
  """Follows the steps of a stage, one step behind the devices.

  Attributes:
    latest: metrics of the last step that was read, in host memory.
    bad_records: unusable records so far, in this session.
    stopped: whether any process has received a stop request.
    save_requested: last step whose batch asked for a checkpoint by time, or 0.
  """

  def __init__(self, run: Run, stage: BaseStage, first_step: int):
    """Nothing has been read yet.

    Args:
      run: the training run.
      stage: the stage in training.
      first_step: steps that were taken before this session.
    """
    self._run, self._stage = run, stage
    self._first_step = first_step
    self._unread = collections.deque()
    self.latest: dict[str, Any] = {}
    self._sums, self._num_accepted = {}, 0
    self.bad_records = 0
    self.stopped = False
    self.save_requested = 0

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    """Adds the metrics of a step, which may still be computed."""
    self._unread.append((step, values))

  def is_step_pending(self) -> bool:
    """Whether the devices are still computing the newest step."""
    return bool(self._unread) and not self._unread[-1][1]['loss'].is_ready()

  def read(self, unread: int) -> None:
    """Reads all steps but the newest ones, waiting for the devices.

    Args:
      unread: how many of the newest steps to leave.

    Raises:
      Diverged: too many consecutive steps were skipped.
      DataError: too many records are bad.
    """
    while len(self._unread) > unread:
      step, values = self._unread.popleft()
      self.latest = values = jax.device_get(values)
      self._add_up(values)
      self.bad_records += int(values['bad_records'])
      self.stopped |= bool(values['stop'])
      if values['save']:
        self.save_requested = step
      self._check_bad_records(step)
      self._check_skipped(step, values)

  def take_means(self) -> dict[str, np.ndarray]:
    """Means over the steps that were read since the last call.

    Skipped steps, whose values may be NaN or infinite, are left out.

    Returns:
      float64, by name; NaN if there is no step.
    """
    sums, count = self._sums, self._num_accepted
    self._sums, self._num_accepted = {}, 0
    return {
      name: sums[name] / count
      if count
      else np.full(np.shape(self.latest[name]), np.nan)
      for name in self.latest.keys() - _LATEST
    }

  def _add_up(self, values: dict[str, Any]) -> None:
    if not values['skipped_in_a_row']:
      self._num_accepted += 1
      for name in values.keys() - _LATEST:
        self._sums[name] = self._sums.get(name, 0) + np.float64(values[name])

  def _check_bad_records(self, step: int) -> None:
    most = self._stage.config.data.max_bad_fraction
    seen = (step - self._first_step) * self._stage.batch_size
    if self.bad_records > most * max(seen, _MIN_RECORDS):
      raise DataError(
        f'{self.bad_records} of {seen} records could not be used, more than '
        f'data.max_bad_fraction={most}: see the log for their keys.'
      )

  def _check_skipped(self, step: int, values: dict[str, Any]) -> None:
    skipped, stage = int(values['skipped_in_a_row']), self._stage
    if skipped:
      self._log_skipped(step, values)
    if skipped >= stage.config.guard.max_skipped:
      raise skip_step.Diverged(
        f'{stage.title}: {skipped} consecutive steps were skipped, the last is '
        f'{step}; their records are in {self._run.workdir}/skipped.jsonl. '
        'Checkpoints are good: mend the records, raise guard.spike_factor, or '
        f'train with a lower stages[{stage.index}].learning_rate in another '
        'workdir.'
      )

  def _log_skipped(self, step: int, values: dict[str, Any]) -> None:
    if jax.process_index():
      return
    stage = self._stage
    line = {'stage': stage.name, 'step': step} | {
      name: str(float(values[name])) for name in ('loss', 'grad_norm')
    }
    keys = batch_keys(
      stage.config, stage.model.image_shapes, stage.batch_sizes, step - 1
    )
    self._run.writer.skipped(line | {'keys': keys})
    logging.warning(
      "Stage '%s' step %d was skipped: loss %s, gradient %s. Its records, in "
      'skipped.jsonl: %s%s',
      *line.values(),
      ', '.join(keys[:8]),
      ', …' if len(keys) > 8 else '',
    )
