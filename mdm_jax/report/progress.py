"""Progress lines of a stage: rates, losses and the remaining time."""

from collections.abc import Iterator, Mapping
import contextlib
import time

from absl import logging

from mdm_jax.report import console


class Progress:
  """Logs progress lines, and measures the rates in them.

  Attributes:
    later_steps: how many steps of this stage take as long as all later stages;
      None while that is not known.
  """

  def __init__(
    self, stage: str, first_step: int, last_step: int, batch_size: int
  ):
    """Starts the clock.

    Args:
      stage: beginning of each line, such as "stage 1/2 '32'".
      first_step: number of steps already taken.
      last_step: number of steps at the end of the stage.
      batch_size: images of a step, over all devices.
    """
    self._stage = stage
    self._last_step = last_step
    self._batch_size = batch_size
    self.later_steps: float | None = 0.0
    self._start_step = self._step = first_step
    self.restart()

  def restart(self) -> None:
    """Starts the clock again, before the first step."""
    self._start_time = self._time = time.monotonic()
    self._paused = 0.0

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Excludes the time of a `with` block (saving, sampling) from the rates."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._paused += time.monotonic() - begin

  def report(
    self,
    step: int,
    *,
    loss: float,
    parts: Mapping[str, float],
    grad_norm: float,
    learning_rate: float,
  ) -> dict[str, float]:
    """Logs a line about the steps since the last report.

    Args:
      step: number of steps taken, more than at the last report.
      loss: weighted sum of the levels' losses, a mean over these steps.
      parts: shown beside the loss by name, such as the levels' losses, coarse
        to fine, likewise.
      grad_norm: gradient norm before clipping, likewise.
      learning_rate: learning rate of the last step.

    Returns:
      'images_per_second' and 'seconds_per_step' without pauses, and
      'eta_seconds' until the end of the stage, which assumes as many pauses as
      so far. The line also has the time until the end of the last stage.
    """
    now = time.monotonic()
    seconds = (now - self._time - self._paused) / (step - self._step)
    pace = (now - self._start_time) / (step - self._start_step)
    self._step, self._time, self._paused = step, now, 0.0
    rates = {
      'images_per_second': self._batch_size / seconds,
      'seconds_per_step': seconds,
      'eta_seconds': pace * (self._last_step - step),
    }
    eta = console.duration(rates['eta_seconds'])
    if self.later_steps is None:
      eta += f', all stages ≥{eta}'
    elif self.later_steps:
      later = pace * self.later_steps
      eta += f', all stages ~{console.duration(rates["eta_seconds"] + later)}'
    each = ', '.join(f'{name}: {value:.4f}' for name, value in parts.items())
    logging.info(
      '%s  step %d/%d (%d %%)  %.1f images/s  eta %s  loss %.4f%s  grad %.2f'
      '  lr %.1e',
      self._stage,
      step,
      self._last_step,
      100 * step // self._last_step,
      rates['images_per_second'],
      eta,
      loss,
      f' ({each})' if len(parts) > 1 else '',
      grad_norm,
      learning_rate,
    )
    return rates
