"""What happens every so many steps of training: logs, checks, reports.

A new report is one more `Hook` in `make_hooks`; the training loop stays as it
is.
"""

from collections.abc import Callable, Sequence
import dataclasses
import shutil
import tempfile

from absl import logging
from etils import epath
import jax

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.prompts import make_prompts
from mdm_jax.inference import validation
from mdm_jax.report import evaluations, grid
from mdm_jax.report.progress import Progress
from mdm_jax.runtime import files, peaks, replica_check
from mdm_jax.steps.sample import SampleFn
from mdm_jax.steps.state import TrainState
from mdm_jax.training import expected
from mdm_jax.training.monitor import Monitor
from mdm_jax.training.run import Run
from mdm_jax.training.stage_checkpoints import StageCheckpoints

_TRACED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Hook:
  """A function that is called every so many steps.

  Attributes:
    call: called as call(step, state), in all processes.
    every: steps between two calls; 0 for none.
    or_every: further steps at which it is called; 0 for none.
    at_end: also call it after the last step of the stage.
    with_saves: also call it before every save.
    replayed: call it again on resume if it was due at the resumed step, since
      the interrupted run may have ended before it.
    delay: call it this many steps after each multiple of `every`.
    saves: it saves a part of the state.
  """

  call: Callable[[int, TrainState], None]
  every: int
  or_every: int = 0
  at_end: bool = False
  with_saves: bool = False
  replayed: bool = False
  delay: int = 0
  saves: bool = False

  def is_due(
    self, step: int, *, last: bool = False, saving: bool = False
  ) -> bool:
    """Whether to call it after a step.

    Args:
      step: steps taken so far.
      last: whether that was the last one of the stage.
      saving: whether the state is about to be saved.
    """
    periods = [period for period in (self.every, self.or_every) if period]
    if not periods:
      return False
    if last and self.at_end or saving and self.with_saves:
      return True
    after = step - self.delay
    return after > 0 and any(after % period == 0 for period in periods)


@dataclasses.dataclass(frozen=True)
class Hooks:
  """The hooks of a stage, in the order in which they are called.

  Attributes:
    before_save: logs and checks.
    after_save: slow reports, skipped when the run is stopping.
  """

  before_save: Sequence[Hook]
  after_save: Sequence[Hook]

  def are_due(self, step: int) -> bool:
    """Whether any hook is due by its period alone."""
    return self.are_reports_due(step) or any(
      hook.is_due(step) for hook in self.before_save
    )

  def are_reports_due(self, step: int) -> bool:
    """Whether any hook of `after_save` is due after a step."""
    return any(hook.is_due(step) for hook in self.after_save)

  def check(
    self, step: int, state: TrainState, *, last: bool, saving: bool
  ) -> None:
    """Calls the logs and checks that are due, see `Hook.is_due`."""
    saving = saving or any(
      hook.saves and hook.is_due(step, last=last) for hook in self.after_save
    )
    for hook in self.before_save:
      if hook.is_due(step, last=last, saving=saving):
        hook.call(step, state)

  def report(self, step: int, state: TrainState, last: bool = False) -> None:
    """Calls the reports that are due."""
    for hook in self.after_save:
      if hook.is_due(step, last=last):
        hook.call(step, state)

  def replay(self, step: int, state: TrainState) -> None:
    """On resume, calls the `replayed` reports that are due at this step."""
    for hook in self.after_save:
      if hook.replayed and hook.is_due(step):
        hook.call(step, state)


def make_hooks(
  run: Run,
  stage: BaseStage,
  saved: StageCheckpoints,
  monitor: Monitor,
  progress: Progress,
  flops: float | None,
  shapes: TrainState,
) -> Hooks:
  """The hooks of a stage.

  Args:
    run: the training run.
    stage: the stage in training.
    saved: the checkpoints of the stage.
    monitor: has the metrics of the last step.
    progress: measures the rates.
    flops: of a step on one device, None if unknown.
    shapes: shapes and shardings of the state.
  """
  config = stage.config
  sample_fn = stage.make_sample_fn(run.mesh, shapes.ema | run.frozen)
  compare = expected.make_comparison(stage)
  log = _make_log(run, stage, monitor, progress, flops, compare)
  profiler = _Profiler(run, stage, progress)
  before_save = [
    Hook(log, config.log_every, at_end=True),
    Hook(
      _make_replica_check(run, shapes),
      config.replicas_every,
      at_end=True,
      with_saves=True,
    ),
    Hook(profiler.stop, config.profile_every, delay=_TRACED_STEPS),
  ]
  after_save = [
    Hook(
      _make_snapshot(run, saved),
      config.averages.snapshot_every if config.averages.widths else 0,
      at_end=True,
      replayed=True,
      saves=True,
    ),
    Hook(
      _make_sample_grid(run, stage, sample_fn),
      config.sample_every,
      at_end=True,
    ),
  ]
  if config.eval.every or config.eval.loss_every:
    after_save.append(
      Hook(
        _make_validation(run, stage, saved, sample_fn, compare),
        config.eval.every,
        config.eval.loss_every,
        at_end=True,
        replayed=True,
        saves=bool(config.eval.best_metric),
      )
    )
  # After the reports of the same step, which are not to be traced.
  after_save.append(Hook(profiler.start, config.profile_every))
  return Hooks(before_save, after_save)


def _make_log(
  run: Run,
  stage: BaseStage,
  monitor: Monitor,
  progress: Progress,
  flops: float | None,
  compare: expected.Compare,
) -> Callable[[int, TrainState], None]:
  """Returns a hook that logs a line of progress, and writes its numbers."""
  peak = peaks.peak_flops(run.mesh.devices.flat[0])

  def log(step, state):
    last, means = monitor.latest, monitor.take_means()
    skipped = int(last['skipped'])
    # The schedule counts accepted steps.
    learning_rate = float(stage.learning_rate(step - 1 - skipped))
    rates = progress.report(
      step,
      loss=float(means['loss']),
      parts=stage.parts_of_loss(means),
      grad_norm=float(means['grad_norm']),
      learning_rate=learning_rate,
    )
    sections = stage.training_metrics(means)
    numbers = {
      'loss': means['loss'],
      **sections['train'],
      'last_loss': last['loss'],
      'grad_norm': means['grad_norm'],
      'last_grad_norm': last['grad_norm'],
      'update_norm': means['update_norm'],
      'param_norm': last['param_norm'],
      'learning_rate': learning_rate,
      'images_seen': step * stage.batch_size,
      'bad_records': monitor.bad_records,
      'skipped_steps': skipped,
    }
    compare(step, numbers)
    speed = {
      name: rates[name] for name in ('images_per_second', 'seconds_per_step')
    }
    if flops:
      per_second = flops / rates['seconds_per_step']
      speed['flops_per_second'] = per_second * run.mesh.size
      if peak:
        speed['mfu'] = per_second / peak
    run.writer.scalars(
      step,
      sections | {'train': numbers, 'speed': speed | peaks.memory_in_use()},
      stage=stage.name,
    )

  return log


def _make_replica_check(
  run: Run, shapes: TrainState
) -> Callable[[int, TrainState], None]:
  """Returns a hook that raises `ReplicasDiffer`, before the state is saved."""
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  check = replica_check.make_check(shapes, shardings, run.mesh)
  return lambda step, state: check(state)


def _make_snapshot(
  run: Run, saved: StageCheckpoints
) -> Callable[[int, TrainState], None]:
  """Returns a hook that saves a snapshot of the post-hoc EMAs."""

  def snapshot(step, state):
    with run.goodput.time('save'):
      saved.save_snapshot(step, state)

  return snapshot


def _make_sample_grid(
  run: Run, stage: BaseStage, sample_fn: SampleFn
) -> Callable[[int, TrainState], None]:
  """Returns a hook that samples held-out prompts to `samples/*.png`.

  Of an autoencoder they are held-out images, each beside the decoded one.
  """
  count = validation.GRID_PROMPTS
  text, captions = None, ['original, decoded'] * count
  if stage.is_generative:
    captions, text, _ = make_prompts(stage.config, count)

  def sample_grid(step, state):
    with run.preemptible('sample'):
      images = grid.grid(
        sample_fn(state.ema | run.frozen, text, range(len(captions))),
        captions,
      )
      path = epath.Path(run.workdir) / 'samples' / f'{stage.name}_{step}.png'
      run.writer.submit(grid.save_png, path, images)
      run.writer.image(step, 'samples', images, stage=stage.name)
      logging.info('%s: wrote samples to %s', stage.title, path)

  return sample_grid


def _make_validation(
  run: Run,
  stage: BaseStage,
  saved: StageCheckpoints,
  sample_fn: SampleFn,
  compare: expected.Compare,
) -> Callable[[int, TrainState], None]:
  """Returns a hook that measures the EMA, and saves it if it is the best.

  By `eval.every` it measures all, by `eval.loss_every` the held-out loss.
  """
  settings = stage.config.eval
  measure = validation.make_validation(stage, run.mesh, sample_fn)
  chance = validation.chance(stage)

  def validate(step, state):
    last = step == stage.num_steps
    full = bool(settings.every) and (step % settings.every == 0 or last)
    with run.preemptible('evaluate'):
      values = measure(state.ema | run.frozen, prompts=full)
      logging.info(
        '%s: step %d: %s',
        stage.title,
        step,
        evaluations.one_line(values, chance),
      )
      compare(step, values)
      run.writer.scalars(
        step,
        {'eval': validation.with_chance(stage, values)},
        stage=stage.name,
      )
      if stage.is_last and last and full:
        validation.write_metrics(stage, run.workdir, values)
    with run.goodput.time('save'):
      saved.save_if_best(step, state.ema, values)

  return validate


class _Profiler:
  """Traces a few steps of process 0, for TensorBoard and ui.perfetto.dev.

  A trace that cannot be written is logged, and is the last one. The profiler
  writes to disks only: a trace for a bucket is uploaded from a temporary
  directory, in the background.
  """

  def __init__(self, run: Run, stage: BaseStage, progress: Progress):
    self._directory = epath.Path(run.workdir) / 'tensorboard'
    self._writer, self._temporary = run.writer, None
    self._last_step, self._progress = stage.num_steps, progress
    self._is_enabled, self._is_tracing = jax.process_index() == 0, False

  def start(self, step: int, state: TrainState) -> None:
    # Every trace ends within its stage.
    ends_in_time = step + _TRACED_STEPS <= self._last_step
    if self._is_enabled and not self._is_tracing and ends_in_time:
      jax.block_until_ready(state)
      if not files.is_local(self._directory):
        self._temporary = tempfile.mkdtemp(prefix='mdm_jax_trace_')
      self._call(
        jax.profiler.start_trace,
        self._temporary or self._directory,
        create_perfetto_trace=True,
      )
      self._is_tracing = self._is_enabled

  def stop(self, step: int, state: TrainState) -> None:
    if self._is_tracing:
      jax.block_until_ready(state)
      self._is_tracing = False
      with self._progress.pause():
        self._call(jax.profiler.stop_trace)
      if self._is_enabled:
        if self._temporary:
          self._writer.submit(_move, self._temporary, self._directory)
        logging.info('Step %d: wrote a trace to %s.', step, self._directory)

  def _call(self, function: Callable[..., None], *args, **options) -> None:
    try:
      function(*args, **options)
    except (OSError, RuntimeError, ValueError) as error:
      self._is_enabled = False
      logging.error('The trace cannot be written, nor are others: %s', error)


def _move(directory: str, target: epath.Path) -> None:
  """Uploads the files below a directory into a bucket, and removes it."""
  try:
    files.upload_directory(directory, target)
  finally:
    shutil.rmtree(directory, ignore_errors=True)
