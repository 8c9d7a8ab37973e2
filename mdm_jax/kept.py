"""What a stage's training keeps on disk, in one directory of each kind.

`checkpoints/<stage>/<step>/`, the newest states; `averages/<stage>/<step>/`,
the snapshots that an average of any width is made of; and
`best/<stage>/<step>/`, the average that was best by a metric.
"""

from collections.abc import Mapping
import contextlib
import math
import pathlib

from absl import logging
import jax
from ml_collections import ConfigDict

from mdm_jax import averages, build, checkpoint, processes
from mdm_jax.state import Params, TrainState


class Kept:
  """A stage's directories while it is trained. All processes call all of it.

  Attributes:
    checkpoints: of the stage.
  """

  def __init__(
    self, config: ConfigDict, workdir: str | pathlib.Path, index: int
  ):
    """Opens what the config asks for.

    Raises:
      CheckpointError: there are some of a kind, but none is good.
    """
    self._last_step = config.stages[index].steps
    self._every = config.averages.snapshot_every
    self._metric, self._best_value = config.eval.best_metric, -math.inf
    self._open = contextlib.ExitStack()

    def directory(kind):
      return build.stage_directory(workdir, config, index, kind)

    def opened(kind, **options):
      return self._open.enter_context(
        checkpoint.Checkpoints(
          directory(kind), save_failures=config.save_failures, **options
        )
      )

    self.checkpoints = opened(
      'checkpoints',
      save_interval=config.checkpoint_every,
      max_to_keep=config.checkpoints_to_keep,
    )
    self._snapshots = self._best = None
    if config.averages.widths:
      self._snapshots = opened(
        'averages', save_interval=self._every, max_to_keep=None
      )
    if self._metric:
      self._best = opened('best', save_interval=1, max_to_keep=1)
      if self._best.latest_step() is not None:
        best = checkpoint.read_extra(directory('best'))
        if best['metric'] == self._metric:
          self._best_value = self._score(best['value'])

  def snapshot(self, step: int, state: TrainState) -> None:
    """Keeps the averages if they are due, or the stage ends.

    One that is there already stays: a run that continues makes it again.
    """
    ends = step == self._last_step
    if self._snapshots and step and (ends or step % self._every == 0):
      self._snapshots.save(
        step,
        jax.jit(averages.from_lags)(state.lags, state.params),
        {'updates': int(state.guard.accepted), 'widths': [*state.lags]},
        force=True,
      )

  def offer(self, step: int, ema: Params, values: Mapping[str, float]) -> None:
    """Keeps an average in the place of the best one, if it is better."""
    if not self._best:
      return
    if self._metric not in values:
      logging.info(
        'Step %d has no %s: it is not kept for it.', step, self._metric
      )
      return
    score = self._score(values[self._metric])
    # What a run that was stopped has kept of later steps is no worse than
    # what the same steps find again.
    again = step <= (self._best.latest_step() or 0)
    if processes.any_of(score > self._best_value and not again):
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
    """As `Checkpoints.drain`, of all."""
    for each in self._all():
      each.drain()

  def wait(self) -> None:
    """As `Checkpoints.wait`, of all."""
    for each in self._all():
      each.wait()

  def __enter__(self) -> 'Kept':
    return self

  def __exit__(self, *error) -> None:
    self._open.__exit__(*error)

  def _all(self) -> list[checkpoint.Checkpoints]:
    every = (self.checkpoints, self._snapshots, self._best)
    return [each for each in every if each]

  def _score(self, value: float) -> float:
    """The higher the better; NaN is never better."""
    return value if self._metric.startswith('accuracy_') else -value
