"""Trains every stage in order, resumes by itself, reports what was learned."""

from collections.abc import Iterator
import dataclasses
import json
import threading
import time

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.check import check
from mdm_jax.builders.config import (
  has_config,
  require_same_config,
  stage_directory,
  write_config,
)
from mdm_jax.builders.data import (
  data_fingerprint,
  held_out_split,
  make_image_source,
  make_source,
)
from mdm_jax.builders.model import finest_resolution
from mdm_jax.builders.prompts import make_prompts
from mdm_jax.builders.stage import make_stages
from mdm_jax.builders.text import empty_text, load_frozen
from mdm_jax.checkpoint import saved_steps
from mdm_jax.data import pipeline
from mdm_jax.inference import validation
from mdm_jax.inference.weights import restore_earlier
from mdm_jax.report import console, goodput, trackers
from mdm_jax.report.progress import Progress
from mdm_jax.runtime import distributed, peaks, sharding, value_types
from mdm_jax.runtime.printable import command_line, quoted
from mdm_jax.steps.objective import Batch
from mdm_jax.steps.state import Params, TrainState
from mdm_jax.steps.train import jit_train_step
from mdm_jax.training import expected, grow
from mdm_jax.training.hooks import make_hooks
from mdm_jax.training.initial_state import make_initial_state
from mdm_jax.training.monitor import Monitor
from mdm_jax.training.run import Run, running
from mdm_jax.training.stage_checkpoints import StageCheckpoints
from mdm_jax.training.summary import log_summary

# In the working directory.
_DIRECTORIES = (
  'averages',
  'best',
  'checkpoints',
  'eval',
  'samples',
  'tensorboard',
)


def setup(config: ConfigDict, workdir: str) -> tuple[Mesh, Params]:
  """Checks the config, opens the data, loads frozen weights, writes the config.

  Returns:
    The mesh to train on, and the frozen parameters.

  Raises:
    ValueError, FileNotFoundError: one line that names the thing and the
      remedy.
  """
  value_types.check_outputs(workdir, *_DIRECTORIES)
  new = json.loads(config.to_json())
  if begun := has_config(workdir):
    # An import sets the dtype of sampling; training has that of its recipe.
    imported = _is_imported(config, workdir)
    require_same_config(workdir, new, ('dtype',) if imported else ())
  mesh = sharding.make_mesh(config.mesh)
  check(config, mesh, begun=begun)
  axes = {axis for _, axes in config.sharding_rules for axis in axes}
  if any(mesh.shape[axis] > 1 for axis in axes - {None}):
    for stage in make_stages(config):
      stage.state_shapes(mesh)  # Raises if the mesh does not divide them.
  trackers.check(config.trackers)
  resolution = finest_resolution(config)
  # Raises if the data cannot be opened.
  make_source(config, 'train', resolution)
  make_source(config, held_out_split(config), resolution)
  make_image_source(config, resolution)
  frozen = load_frozen(config, mesh)
  if jax.process_index() == 0:
    write_config(workdir, new)
  return mesh, frozen


def _is_imported(config: ConfigDict, workdir: str) -> bool:
  """Whether a run has imported weights and has not been trained yet."""
  steps = {
    saved_steps.latest_step(stage_directory(workdir, config, index))
    for index in range(len(config.stages))
  }
  return 0 in steps and steps <= {0, None}


def train(
  config: ConfigDict,
  workdir: str,
  mesh: Mesh,
  frozen: Params,
  began: float | None = None,
) -> bool:
  """Trains the stages that are not finished, then evaluates the last.

  After a stop request the loop finishes its step, saves and returns. In a
  preemptible section (compiling, sampling, evaluating) the process exits at
  once with `preemption.EXIT_CODE`.

  Args:
    config: checked by `setup`.
    workdir: receives checkpoints, samples, metrics and the evaluation.
    mesh: from `setup`.
    frozen: from `setup`.
    began: `time.monotonic()` at the start of the process; None for now.

  Returns:
    False if it was stopped early, with everything saved.

  Raises:
    Diverged: too many consecutive steps were skipped.
    DataError: the data set has changed, too many of its records are bad, or a
      data worker has died.
    CheckpointError: no checkpoint is good, or none can be saved.
    ReplicasDiffer: devices hold different copies of the state.
  """
  if began is None:
    began = time.monotonic()
  stages = make_stages(config)
  with running(config, workdir, mesh, frozen, began) as run:
    first = grow.next_stage([stage.directory(workdir) for stage in stages])
    log_summary(run, stages, first)
    finished = True
    for stage in stages[first:]:
      finished = train_stage(run, stage)
      run.goodput.switch('start_up')  # Until the next stage's first step.
      if not finished:
        break
      run.stop.allow()  # Between stages a stop request exits at once.
    if finished:
      _evaluate(run, stages[-1])
    run.goodput.flush()
    if jax.process_index() == 0:
      _report_goodput(run)
  if not finished:
    logging.info('Stopped. The same command continues from here.')
    return False
  logging.info('Finished in %s.', console.duration(time.monotonic() - began))
  following = f'tensorboard --logdir={quoted(workdir)}'
  if stages[-1].is_generative:
    prompt = make_prompts(config, 1).captions[0]
    line = command_line('sample', workdir=workdir, prompt=prompt)
    following = f'{line}\n  {following}'
  logging.info('Next:\n  %s', following)
  return True


def train_stage(run: Run, stage: BaseStage) -> bool:
  """Trains one stage to its end.

  Returns:
    False if it was stopped early, with everything saved.

  Raises:
    See `train`.
  """
  run = _with_earlier(run, stage)
  with StageCheckpoints(stage, run.workdir) as saved, run.saving_at_the_end():
    ##### Restore or create the state, open the data, compile the step.
    data = data_fingerprint(stage.config)
    shapes = stage.state_shapes(run.mesh)
    state = make_initial_state(run, stage, saved, shapes, data)
    first_step = int(state.step)
    run.goodput.write(stage.name, first_step, force=True)
    dataset = stage.make_dataset('train', start_batch=first_step)
    batches = _batches(run, saved, dataset)
    with run.goodput.time('data'):
      batch = next(batches)
    progress = _make_progress(run, stage, first_step, batch['text'])
    train_step, flops = _compile(run, stage, state, batch)

    ##### Set up logs, checks and reports.
    monitor = Monitor(run, stage, first_step)
    run.stop.defer(saved.drain)
    hooks = make_hooks(run, stage, saved, monitor, progress, flops, shapes)
    if 0 < first_step < stage.num_steps:
      hooks.replay(first_step, state)

    ##### Train.
    stopped = False
    run.goodput.write(stage.name, first_step, force=True)
    run.goodput.switch('step')
    progress.restart()
    for step in range(first_step + 1, stage.num_steps + 1):
      if step > first_step + 1:
        with run.goodput.time('data'):
          batch = next(batches)
          if monitor.is_step_pending():  # Loading cost no time.
            run.goodput.count_as('step')
      state, values = train_step(state, batch, run.frozen)

      ##### Read metrics back. One step in flight keeps the devices busy; with
      # 32, collectives between the cores of a CPU have deadlocked.
      last = step == stage.num_steps
      due = last or saved.is_due(step) or hooks.are_due(step)
      monitor.add(step, values)
      monitor.read(unread=0 if due else 1)

      ##### Save if a checkpoint is due, by steps or by time, or the run ends.
      ask_all = last or hooks.are_reports_due(step)
      stopped = _is_stopped(run, monitor, ask_all)
      force = last or stopped or monitor.save_requested > saved.last_step
      saving = force or saved.is_due(step)
      hooks.check(step, state, last=last, saving=saving)
      with progress.pause(), run.goodput.time('save'):
        extra = {'stage': stage.name, 'data': data}
        is_saved = saved.save(step, state, extra, force=force)
      run.goodput.write(stage.name, step, force=is_saved)
      if stopped:
        break

      ##### Report.
      if not last:
        with progress.pause():
          hooks.report(step, state)

    ##### Reports of the last step, also if a run was interrupted before them.
    if not stopped:
      hooks.report(stage.num_steps, state, last=True)
    run.goodput.switch('save')
    saved.wait()
    if not stopped:
      saved_steps.mark_finished(stage.directory(run.workdir), stage.num_steps)
    return not stopped


def _with_earlier(run: Run, stage: BaseStage) -> Run:
  """The run with the parameters of earlier stages that the stage needs."""
  earlier = restore_earlier(stage, run.workdir, run.mesh)
  return dataclasses.replace(run, frozen=run.frozen | earlier)


def _batches(run: Run, saved: StageCheckpoints, dataset) -> Iterator[Batch]:
  """Training batches on the devices, with the flags of all processes."""
  for batch in pipeline.iterate(dataset):
    # Each process sets its own flags. The step reduces them, so that all see
    # a request of any.
    batch['stop'] = np.full_like(batch['bad'], run.stop.requested)
    batch['save'] = np.full_like(batch['bad'], saved.is_due_by_time())
    yield sharding.shard_batch(batch, run.mesh)


def _compile(
  run: Run, stage: BaseStage, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, float | None]:
  """Compiles the training step, and counts its FLOPs on one device."""
  begin = time.monotonic()
  logging.info('%s: compiling the training step.', stage.title)
  with run.goodput.time('compile'):
    arguments = state, batch, run.frozen
    train_step = stage.make_train_step(empty_text(stage.config), run.mesh)
    jitted = jit_train_step(train_step, *arguments)
    lowered = jitted.lower(*arguments)
    compiled = lowered.compile()
  logging.info(
    '%s: compiled the training step in %s.',
    stage.title,
    console.duration(time.monotonic() - begin),
  )
  return compiled, peaks.flops_per_step(
    lowered, compiled, run.mesh.size, stage.settings.accumulate
  )


def _make_progress(
  run: Run, stage: BaseStage, first_step: int, text: jax.Array
) -> Progress:
  """Progress lines of a stage, which also tell when the last stage ends.

  Later stages are estimated by the work of their steps, in FLOPs of the network
  without gradients and optimizer. A thread counts them, beside the compiler:
  large networks take a minute.

  Args:
    run: the training run.
    stage: the stage to train.
    first_step: number of steps already taken.
    text: of a batch, as the text encoder reads it.
  """
  later = make_stages(stage.config)[stage.index + 1 :]
  progress = Progress(
    stage.title, first_step, stage.num_steps, stage.batch_size
  )

  def count_steps():
    own, *flops = (
      each.forward_flops(run.frozen, text) for each in (stage, *later)
    )
    if own and all(flops):
      progress.later_steps = sum(
        each.num_steps * count / own for each, count in zip(later, flops)
      )

  if later:
    progress.later_steps = None
    threading.Thread(target=count_steps, daemon=True).start()
  return progress


def _is_stopped(run: Run, monitor: Monitor, ask_all: bool) -> bool:
  """Whether the session ends after this step, the same in all processes.

  Args:
    run: the training run.
    monitor: has read the stop flags of past batches.
    ask_all: whether to ask all processes, instead of waiting for the flags.
  """
  # The stop flag arrives a step late; asking all costs an all-gather.
  if ask_all or jax.process_count() == 1:
    return monitor.stopped | distributed.any_of(run.stop.requested)
  return monitor.stopped


def _evaluate(run: Run, stage: BaseStage) -> None:
  """Measures the last stage, and writes `eval/<step>.json`."""
  run = _with_earlier(run, stage)
  with run.goodput.time('evaluate'):
    values = validation.validate_last(stage, run.workdir, run.mesh, run.frozen)
    # A stop request may have reached only some processes: exit in all or none.
    run.stop.allow(distributed.any_of(run.stop.requested))
  accuracies = {
    name: value
    for name, value in values.items()
    if name.startswith('accuracy')  # Losses have been compared.
  }
  expected.make_comparison(stage)(stage.num_steps, accuracies)
  run.writer.scalars(
    stage.num_steps,
    {'eval': validation.with_chance(stage, values)},
    stage=stage.name,
  )


def _report_goodput(run: Run) -> None:
  sessions, seconds = goodput.totals(run.workdir)
  total = sum(seconds.values())
  if not total:  # The file could not be written, or not be read.
    return
  # A bucket is named 'step', as is the number that every line has.
  named = {f'{name}_seconds': value for name, value in seconds.items()}
  run.writer.scalars(sessions, {'goodput': named}, stage='goodput')
  logging.info(
    'Time spent, in %d session%s:\n%s',
    sessions,
    '' if sessions == 1 else 's',
    console.table(
      [
        [
          name.replace('_', ' '),
          console.duration(value),
          f'{value / total:.1%}',
        ]
        for name, value in (seconds | {'all': total}).items()
      ],
      ['spent on', 'time', 'share'],
    ),
  )
