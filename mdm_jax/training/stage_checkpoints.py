"""What training of a stage writes to disk: states, snapshots, the best EMA.

`checkpoints/<i>_<stage>/<step>/` are the newest states; `averages/…`
are snapshots of the post-hoc EMAs; `best/…` is the EMA that was best by a
metric.
"""

from collections.abc import Mapping
import contextlib
import math
import time
from typing import Any

from absl import logging
from etils import epath
import jax

from mdm_jax.builders import data
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.checkpoint import restore
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.optim import post_hoc_ema
from mdm_jax.report import evaluations
from mdm_jax.runtime import distributed, files
from mdm_jax.steps.state import Params, TrainState


class StageCheckpoints:
  """The directories of a stage in training. All processes call all methods.

  Attributes:
    checkpoints: states of the stage.
    last_step: step of the newest state that is saved or being saved, or 0.
  """

  def __init__(self, stage: BaseStage, workdir: epath.PathLike):
    """Opens the directories that the config asks for.

    Raises:
      CheckpointError: there are checkpoints of a kind, but none is good.
    """
    config = stage.config
    self._metric = data.current_name(config, config.eval.best_metric)
    self._best_value = -math.inf
    self._open = contextlib.ExitStack()

    def opened(kind, **options):
      return self._open.enter_context(
        Checkpoints(
          stage.directory(workdir, kind),
          save_failures=config.save_failures,
          **options,
        )
      )

    self.checkpoints = opened(
      'checkpoints',
      save_interval=config.checkpoint_every,
      max_to_keep=config.checkpoints_to_keep,
    )
    self._snapshots = self._best = None
    if config.averages.widths:
      self._snapshots = opened('averages', save_interval=1, max_to_keep=None)
    if self._metric:
      self._best = opened('best', save_interval=1, max_to_keep=1)
      if self._best.latest_step() is not None:
        best = restore.read_extra(stage.directory(workdir, 'best'))
        value = best.get('value')
        metric = data.current_name(config, str(best.get('metric')))
        if metric == self._metric and files.is_number(value):
          self._best_value = self._score(value)
    self.last_step = self.checkpoints.latest_step() or 0
    self._every = config.checkpoint_every
    self._seconds = 60 * config.checkpoint_minutes or math.inf
    self._last_time = time.monotonic()

  def is_due(self, step: int) -> bool:
    """Whether a checkpoint of this step is due by `checkpoint_every`."""
    return step % self._every == 0

  def is_due_by_time(self) -> bool:
    """Whether `checkpoint_minutes` have passed, on process 0's clock."""
    age = time.monotonic() - self._last_time
    return age > self._seconds and jax.process_index() == 0

  def save(
    self, step: int, state: TrainState, extra: Mapping[str, Any], force: bool
  ) -> bool:
    """Saves the state if it is due by steps, or forced.

    Returns:
      Whether a save was begun, see `Checkpoints.save`.
    """
    saved = self.checkpoints.save(step, state, extra, force=force)
    if saved:
      self.last_step, self._last_time = step, time.monotonic()
    return saved

  def save_snapshot(self, step: int, state: TrainState) -> None:
    """Saves the post-hoc EMAs, unless this step's snapshot exists already."""
    if self._snapshots:
      self._snapshots.save(
        step,
        jax.jit(post_hoc_ema.from_lags)(state.lags, state.params),
        {'updates': int(state.guard.accepted), 'widths': [*state.lags]},
        force=True,
      )

  def save_if_best(
    self, step: int, ema: Params, values: Mapping[str, float]
  ) -> None:
    """Saves the EMA if it is better than the best so far, and replaces that.

    Args:
      step: of the stage.
      ema: its EMA.
      values: metrics of the EMA. Without `eval.best_metric` among them, as for
        a level that the stage lacks, nothing is saved.
    """
    if not self._best:
      return
    if self._metric not in values:
      return
    score = self._score(values[self._metric])
    # Steps replayed after a resume cannot beat the best that is already saved.
    replayed = step <= (self._best.latest_step() or 0)
    if distributed.any_of(score > self._best_value and not replayed):
      self._best_value = score
      self._best.save(
        step,
        {'ema': ema},
        {'metric': self._metric, 'value': values[self._metric]},
        force=True,
      )
      logging.info(
        'Step %d is the best by %s, %.4g.',
        step,
        self._metric,
        values[self._metric],
      )

  def drain(self) -> None:
    """Waits for saves in flight, see `Checkpoints.drain`."""
    for each in self._all():
      each.drain()

  def wait(self) -> None:
    """Waits until every save is committed, see `Checkpoints.wait`."""
    for each in self._all():
      each.wait()

  def __enter__(self) -> 'StageCheckpoints':
    return self

  def __exit__(self, *error) -> None:
    self._open.__exit__(*error)

  def _all(self) -> list[Checkpoints]:
    every = (self.checkpoints, self._snapshots, self._best)
    return [each for each in every if each]

  def _score(self, value: float) -> float:
    """The metric, or its negative: higher is better, and NaN never is."""
    return value if evaluations.higher_is_better(self._metric) else -value
