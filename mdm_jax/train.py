"""Trains every stage in order, resumes by itself, shows what was learned."""

import collections
import contextlib
import json
import pathlib
import re
import time

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax import (
  build,
  checkpoint,
  checks,
  inputs,
  interrupt,
  ledger,
  metrics,
  processes,
  replicas,
  sharding,
  stages,
  trained,
  watchdog,
)
from mdm_jax import guard as guards
from mdm_jax import step as steps
from mdm_jax.data import pipeline
from mdm_jax.data.pipeline import DataError
from mdm_jax.eval import grid
from mdm_jax.kept import Kept
from mdm_jax.state import Params

# Fewer records do not tell the share of bad ones.
_MIN_RECORDS = 1000
# Keys that may differ when a run is continued: none changes what is learned,
# but for the guard's, without which a run that it has stopped could not go on.
_MAY_CHANGE = (
  'mesh.',
  'sharding_rules',
  'data.num_workers',
  'data.num_threads',
  'data.prefetch',
  'data.max_bad_fraction',
  'data.may_change',
  'log_every',
  'sample_every',
  'checkpoint_every',
  'checkpoints_to_keep',
  'averages.snapshot_every',
  'save_failures',
  'replicas_every',
  'text.class_names',
  'sampler.',
  'eval.',
  'guard.',
  'watchdog.',
  'stages.accumulate:',
  'model.levels.remat',
  'model.levels.lanes',
)
# Which of the watchdog's limits a bucket of the ledger is under.
_PHASES = {'compile': 'start_up', 'data': 'step', 'sample': 'evaluate'}


def setup(config: ConfigDict, workdir: str) -> tuple[Mesh, Params]:
  """Everything that can be wrong and known before anything is compiled.

  Returns:
    The mesh to train on, and the parameters that training leaves alone.

  Raises:
    ValueError, FileNotFoundError: one line that names the thing and the
      remedy.
  """
  new = json.loads(config.to_json())
  if (pathlib.Path(workdir) / 'config.json').exists():
    _require_same_config(workdir, new)
  mesh = sharding.make_mesh(config.mesh)
  checks.check(config, mesh)
  resolution = config.model.levels[-1].resolution
  inputs.make_source(config, 'train', resolution)
  inputs.make_source(config, inputs.held_out_split(config), resolution)
  frozen = build.load_frozen(config, mesh)
  if jax.process_index() == 0:
    checkpoint.write_config(workdir, new)
  return mesh, frozen


def train(
  config: ConfigDict,
  workdir: str,
  mesh: Mesh,
  frozen: Params,
  began: float | None = None,
) -> bool:
  """Trains the stages that are not finished, then evaluates the last.

  A Ctrl-C or SIGTERM between steps saves and returns; one that comes while
  nothing is trained ends the process by `interrupt.EXIT_CODE`.

  Args:
    config: as `setup` has checked it.
    workdir: receives checkpoints, samples, metrics and the evaluation.
    mesh: as `setup` returned it.
    frozen: likewise.
    began: `time.monotonic()` when the process began; None for now.

  Returns:
    False if it was stopped early, with everything saved.

  Raises:
    Diverged: too many steps in a row were left out.
    DataError: the data set has changed, too many of its records are bad, or a
      data worker has died.
    CheckpointError: no checkpoint is good, or none can be saved.
    ReplicasDiffer: a device's copy of the state is not that of the others.
  """
  start = time.monotonic()
  directories = [
    build.stage_directory(workdir, config, index)
    for index in range(len(config.stages))
  ]
  finished = True
  dog = watchdog.Watchdog(config.watchdog, interrupt.leave)
  writer = metrics.MetricWriter(workdir)
  times = ledger.Ledger(
    workdir, began, lambda bucket: dog.watch(_PHASES.get(bucket, bucket))
  )
  stop = interrupt.Interrupt(
    lambda: (times.flush(), writer.flush()),
    processes.Peers() if jax.process_count() > 1 else None,
  )
  with (
    contextlib.closing(dog),
    contextlib.closing(stop),
    contextlib.closing(times),
    contextlib.closing(writer),
  ):
    first = stages.next_stage(directories)
    for index in range(first, len(config.stages)):
      last = None
      if index and checkpoint.latest_step(directories[index]) is None:
        last = checkpoint.restore_item(directories[index - 1], None, 'ema')
      with Kept(config, workdir, index) as kept:
        finished = train_stage(
          config, index, workdir, mesh, frozen, writer, last, stop, times, kept
        )
      if not finished:
        break
      stop.let_go()
    else:
      if first == len(config.stages):
        logging.info('All stages are finished already.')
      with times.time('evaluate'):
        values = trained.evaluate(config, workdir, mesh, frozen)
        # Some may be told to stop while others are at the end already.
        stop.let_go(processes.any_of(stop.requested))
      writer.scalars(
        config.stages[-1].steps, values, stage=config.stages[-1].name
      )
    times.flush()
    if jax.process_index() == 0:
      _report_times(workdir, writer)
  if not finished:
    logging.info('Stopped. The same command continues from here.')
    return False
  logging.info('Finished in %s.', metrics.duration(time.monotonic() - start))
  prompt = inputs.make_prompts(config, 1).captions[0]
  logging.info(
    'Next:\n  python -m mdm_jax.sample --workdir=%s --prompt="%s"\n'
    '  tensorboard --logdir=%s',
    workdir,
    prompt,
    workdir,
  )
  return True


def train_stage(
  config: ConfigDict,
  index: int,
  workdir: str,
  mesh: Mesh,
  frozen: Params,
  writer: metrics.MetricWriter,
  last: Params | None,
  stop: interrupt.Interrupt,
  times: ledger.Ledger,
  kept: Kept,
) -> bool:
  """Trains one stage to its end.

  Args:
    config: of the run.
    index: of the stage.
    workdir: of the run.
    mesh: the devices.
    frozen: parameters that the model needs beside the trained ones.
    writer: receives the metrics.
    last: the averaged parameters of the stage before; None if there are none,
      or this stage has a checkpoint.
    stop: asks for an early end.
    times: is told what the time is spent on.
    kept: of the stage.

  Returns:
    False if it was stopped early, with everything saved.

  Raises:
    As `train` does.
  """
  ##### What is trained, on what.
  stage = config.stages[index]
  title = f"stage {index + 1}/{len(config.stages)} '{stage.name}'"
  model = build.make_model(config, stage)
  optimizer, learning_rate = build.make_optimizer(config, stage)
  seed = config.seed * len(config.stages) + index

  ##### The state, straight into its shards: restored, grown or fresh.
  def make_state(params):
    return steps.new_state(params, optimizer, config.averages.widths)

  abstract = jax.eval_shape(make_state, model.shapes(config.text.max_length))
  shardings = sharding.tree_shardings(abstract, mesh, config.sharding_rules)
  data = inputs.data_fingerprint(config)
  directory = build.stage_directory(workdir, config, index)
  if kept.checkpoints.latest_step() == 0:  # Imported: the parameters alone.
    last = checkpoint.restore_item(directory, 0, 'ema')
  if kept.checkpoints.latest_step():
    state, extra = kept.checkpoints.restore(
      jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
      )
    )
    _check_data(config, extra.get('data'), data)
    logging.info('%s: continuing from step %d.', title, int(state.step))
  else:
    params = model.init(seed, config.text.max_length)
    if last is not None:
      params = stages.grow(params, last)
    state = jax.jit(make_state, out_shardings=shardings)(
      sharding.place(params, shardings.params)
    )
    logging.info(
      '%s: %s px, %d steps of %d images.',
      title,
      '+'.join(map(str, model.resolutions)),
      stage.steps,
      stage.batch_size,
    )
    metrics.log_parameter_overview(abstract.params)

  ##### The step, compiled once.
  train_step = build.make_train_step(
    config, stage, inputs.empty_text(config), seed
  )
  first_step = int(state.step)
  times.write(stage.name, first_step, force=True)
  batches = pipeline.iterate(
    inputs.make_dataset(
      config,
      'train',
      model.resolutions,
      build.batch_sizes(stage),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      start_batch=first_step,
    )
  )

  def next_batch():
    batch = next(batches)
    # One process's wish to stop reaches all with the step that it is in.
    batch['stop'] = np.full_like(batch['bad'], stop.requested)
    return sharding.shard_batch(batch, mesh)

  with times.time('data'):
    batch = next_batch()
  begin = time.monotonic()
  with times.time('compile'):
    compiled = (
      steps.jit_train_step(train_step, state, batch, frozen)
      .lower(state, batch, frozen)
      .compile()
    )
  logging.info(
    '%s: compiled the step in %s.',
    title,
    metrics.duration(time.monotonic() - begin),
  )
  flops = metrics.flops_per_step(compiled, stage.accumulate)
  peak = metrics.peak_flops(mesh.devices.flat[0])
  draw_fn = trained.make_draw(config, index, mesh, state.ema | frozen)
  if config.eval.every:
    measure = trained.make_measure(config, index, mesh, draw_fn)
  prompts = inputs.make_prompts(config, trained.GRID_PROMPTS)
  check_replicas = replicas.make_check(abstract, shardings, mesh)

  @contextlib.contextmanager
  def let_go(bucket):
    with times.time(bucket):
      stop.let_go()
      yield
      # Others may have been told to stop, and not be through with it.
      stop.let_go(processes.any_of(stop.requested))
      stop.hold()

  def draw(step):
    with let_go('sample'):
      pictures = grid.grid(
        draw_fn(state.ema | frozen, prompts.text, range(len(prompts.text))),
        prompts.captions,
      )
      path = pathlib.Path(workdir) / 'samples' / f'{stage.name}_{step}.png'
      writer.submit(grid.save_png, path, pictures)
      writer.image(step, f'{stage.name}/samples', pictures)
      logging.info('%s: drew %s', title, path)

  def evaluate(step):
    with let_go('evaluate'):
      figures = measure(state.ema | frozen)
      logging.info(
        '%s: step %d: %s',
        title,
        step,
        ', '.join(f'{name} {value:.4g}' for name, value in figures.items()),
      )
      writer.scalars(step, figures, stage=stage.name)
      if step == stage.steps and index == len(config.stages) - 1:
        trained.write_figures(config, workdir, figures)
    with times.time('save'):
      kept.offer(step, state.ema, figures)

  ##### What the last run may not have come to.
  kept.snapshot(first_step, state)
  if 0 < first_step < stage.steps and _is_due(first_step, config.eval.every):
    evaluate(first_step)

  ##### Train.
  progress = metrics.Progress(
    title,
    first_step=first_step,
    last_step=stage.steps,
    batch_size=stage.batch_size,
  )
  bad, stopped, values, unread = 0, False, {}, collections.deque()
  stop.hold(kept.drain)
  times.write(stage.name, first_step, force=True)
  times.switch('step')
  for step in range(first_step + 1, stage.steps + 1):
    if step > first_step + 1:
      with times.time('data'):
        batch = next_batch()
        if not values['loss'].is_ready():  # Nothing had to wait for it.
          times.count_as('step')
    state, values = compiled(state, batch, frozen)
    unread.append((step, values))
    # One step ahead keeps the devices busy. XLA's collectives between a CPU's
    # cores have deadlocked with 32 steps in flight.
    ahead = step < stage.steps and not _is_due(
      step,
      config.log_every,
      config.checkpoint_every,
      config.sample_every,
      config.eval.every,
      config.averages.snapshot_every,
    )
    while len(unread) > ahead:
      at, seen = unread.popleft()
      seen = jax.device_get(seen)
      bad += int(seen['bad_records'])
      stopped |= bool(seen['stop'])
      _check_bad(config, bad, (at - first_step) * stage.batch_size)
      in_a_row = int(seen['skipped_in_a_row'])
      if in_a_row:
        _report_skipped(config, index, writer, at, seen)
      if in_a_row >= config.guard.max_skipped:
        raise guards.Diverged(
          f'{title}: {in_a_row} steps in a row were left out, the last is '
          f'{at}; their records are in {workdir}/skipped.jsonl. Checkpoints '
          'are good: mend the records, raise guard.spike_factor, or train '
          f'with a lower stages[{index}].learning_rate in another workdir.'
        )

    if step % config.log_every == 0 or step == stage.steps:
      levels = {
        str(name): float(value)
        for name, value in zip(
          model.resolutions, jax.device_get(values['level_losses'])
        )
      }
      skipped = int(values['skipped'])
      rate = float(learning_rate(step - 1 - skipped))
      rates = progress.report(
        step,
        loss=float(values['loss']),
        levels=levels,
        grad_norm=float(values['grad_norm']),
        learning_rate=rate,
      )
      numbers = {
        'loss': values['loss'],
        'grad_norm': values['grad_norm'],
        'learning_rate': rate,
        'bad_records': bad,
        'skipped_steps': skipped,
        'images_per_second': rates['images_per_second'],
        **{f'loss_{name}': value for name, value in levels.items()},
      }
      if flops:
        per_second = flops / rates['seconds_per_step']
        numbers['flops_per_second'] = per_second * mesh.size
        if peak:
          numbers['mfu'] = per_second / peak
      writer.scalars(step, numbers, stage=stage.name)

    draws = _is_due(step, config.sample_every)
    evaluates = _is_due(step, config.eval.every)
    ends = step == stage.steps
    # What they told with the step is old, but asking takes time.
    if draws or evaluates or ends or jax.process_count() == 1:
      stopped |= processes.any_of(stop.requested)
    ends |= stopped
    if config.replicas_every and (
      ends or _is_due(step, config.replicas_every, config.checkpoint_every)
    ):
      check_replicas(state)
    with progress.pause(), times.time('save'):
      saved = kept.checkpoints.save(
        step, state, {'stage': stage.name, 'data': data}, force=ends
      )
      kept.snapshot(step, state)
    times.write(stage.name, step, force=saved)
    if stopped:
      break
    if step < stage.steps:
      with progress.pause():
        if draws:
          draw(step)
        if evaluates:
          evaluate(step)

  if not stopped:
    draw(stage.steps)
    if config.eval.every:
      evaluate(stage.steps)
  times.switch('save')
  kept.wait()
  if not stopped:
    checkpoint.mark_finished(directory, stage.steps)
  times.switch('start_up')  # Of the next stage.
  return not stopped


def _is_due(step: int, *periods: int) -> bool:
  """Whether one of so many steps has ended; 0 never does."""
  return any(every and step % every == 0 for every in periods)


def _report_times(workdir: str, writer: metrics.MetricWriter) -> None:
  sessions, seconds = ledger.totals(workdir)
  if not sessions:  # It could not be written.
    return
  total = sum(seconds.values())
  writer.scalars(sessions, seconds, stage='goodput')
  logging.info(
    'Time, over %d sessions:\n%s',
    sessions,
    metrics.table(
      [
        [
          name.replace('_', ' '),
          metrics.duration(value),
          f'{value / total:.1%}',
        ]
        for name, value in (seconds | {'all': total}).items()
      ],
      ['spent on', 'time', 'share'],
    ),
  )


def _require_same_config(workdir: str, new: dict) -> None:
  changed = [
    line
    for line in checkpoint.differences(checkpoint.read_config(workdir), new)
    if not re.sub(r'\[\d+\]', '', line).startswith(_MAY_CHANGE)
  ]
  if changed:
    raise ValueError(
      f'{workdir} was trained with another config ('
      + '; '.join(changed[:5])
      + (' …' if len(changed) > 5 else '')
      + '): give another --workdir, or the same config.'
    )


def _check_bad(config: ConfigDict, bad: int, seen: int) -> None:
  most = config.data.max_bad_fraction
  if bad > most * max(seen, _MIN_RECORDS):
    raise DataError(
      f'{bad} of {seen} records could not be used, more than '
      f'data.max_bad_fraction={most}: see the log for their keys.'
    )


def _check_data(
  config: ConfigDict, old: dict[str, str] | None, new: dict[str, str]
) -> None:
  if changes := checkpoint.differences(old or {}, new):
    message = (
      'The data are not those of the last checkpoint ('
      + '; '.join(changes)
      + ')'
    )
    if not config.data.may_change:
      raise DataError(
        f'{message}: bring them back, or, if that is intended, set '
        '--config.data.may_change=True.'
      )
    logging.warning('%s, as data.may_change=True allows.', message)


def _report_skipped(
  config: ConfigDict,
  index: int,
  writer: metrics.MetricWriter,
  step: int,
  values: dict[str, jax.Array],
) -> None:
  if jax.process_index():
    return
  stage = config.stages[index]
  line = {'stage': stage.name, 'step': step} | {
    name: str(float(values[name])) for name in ('loss', 'grad_norm')
  }
  keys = inputs.batch_keys(
    config, build.resolutions(config, stage)[-1], stage.batch_size, step - 1
  )
  writer.skipped(line | {'keys': keys})
  logging.warning(
    "Stage '%s' step %d was left out: loss %s, gradient %s. Its records, in "
    'skipped.jsonl: %s%s',
    *line.values(),
    ', '.join(keys[:8]),
    ', …' if len(keys) > 8 else '',
  )
