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
  draw,
  inputs,
  interrupt,
  ledger,
  metrics,
  sharding,
  stages,
)
from mdm_jax import guard as guards
from mdm_jax import step as steps
from mdm_jax.eval import grid, prompt_accuracy
from mdm_jax.state import Params

GRID_PROMPTS = 16
_EVAL_SEED = 1
# Fewer records do not tell the share of bad ones.
_MIN_RECORDS = 1000
# Keys that may differ when a run is continued: none changes what is learned,
# but for the guard's, without which a run that it has stopped could not go on.
_MAY_CHANGE = (
    'mesh.', 'data.num_workers', 'data.num_threads', 'data.prefetch',
    'data.max_bad_fraction', 'data.may_change',
    'log_every', 'sample_every', 'checkpoint_every', 'checkpoints_to_keep',
    'save_failures', 'text.class_names', 'sampler.', 'eval.', 'guard.',
    'model.levels.remat', 'model.levels.lanes')


class DataError(ValueError):
  """The data are not what they were, or too much of them is damaged."""


def setup(config: ConfigDict, workdir: str) -> tuple[Mesh, Params]:
  """Everything that can be wrong and known before anything is compiled.

  Returns:
    The mesh to train on, and the parameters that training leaves alone.

  Raises:
    ValueError, FileNotFoundError: one line that names the thing and the
      remedy.
  """
  mesh = sharding.make_mesh(config.mesh)
  build.check(config, mesh)
  resolution = config.model.levels[-1].resolution
  inputs.make_source(config, 'train', resolution)
  inputs.make_source(config, inputs.held_out_split(config), resolution)
  new = json.loads(config.to_json())
  if (pathlib.Path(workdir) / 'config.json').exists():
    changed = [
        line for line in checkpoint.differences(
            checkpoint.read_config(workdir), new)
        if not re.sub(r'\[\d+\]', '', line).startswith(_MAY_CHANGE)]
    if changed:
      raise ValueError(
          f'{workdir} was trained with another config ('
          + '; '.join(changed[:5]) + (' …' if len(changed) > 5 else '')
          + '): give another --workdir, or the same config.')
  frozen = build.load_frozen(config, mesh)
  if jax.process_index() == 0:
    checkpoint.write_config(workdir, new)
  return mesh, frozen


def train(config: ConfigDict, workdir: str, mesh: Mesh,
          frozen: Params, began: float | None = None) -> bool:
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
    DataError: the data set has changed, or too many of its records are bad.
    CheckpointError: no checkpoint is good, or none can be saved.
  """
  start = time.monotonic()
  directories = [build.stage_directory(workdir, config, index)
                 for index in range(len(config.stages))]
  first = stages.next_stage(directories)
  writer = metrics.MetricWriter(workdir)
  times = ledger.Ledger(workdir, began)

  def flush():
    times.flush()
    writer.flush()
  # With several processes all must stop at one step: the checkpoint manager
  # agrees on it.
  signals = interrupt.SIGNALS if jax.process_count() == 1 else ()
  finished = True
  with (contextlib.closing(times), contextlib.closing(writer),
        contextlib.closing(interrupt.Interrupt(flush, signals)) as stop):
    for index in range(first, len(config.stages)):
      last = None
      if index and checkpoint.latest_step(directories[index]) is None:
        last = checkpoint.restore_item(directories[index - 1], None, 'ema')
      finished = train_stage(
          config, index, workdir, mesh, frozen, writer, last, stop, times)
      if not finished:
        break
    else:
      if first == len(config.stages):
        logging.info('All stages are finished already.')
      with times.time('evaluate'):
        values = evaluate(config, workdir, mesh, frozen)
      writer.scalars(config.stages[-1].steps, values,
                     stage=config.stages[-1].name)
  if jax.process_index() == 0:
    _log_times(workdir)
  if not finished:
    logging.info('Stopped. The same command continues from here.')
    return False
  logging.info('Finished in %s.', metrics.duration(time.monotonic() - start))
  prompt = inputs.make_prompts(config, 1).captions[0]
  logging.info(
      'Next:\n  python -m mdm_jax.sample --workdir=%s --prompt="%s"\n'
      '  tensorboard --logdir=%s', workdir, prompt, workdir)
  return True


def train_stage(
    config: ConfigDict, index: int, workdir: str, mesh: Mesh, frozen: Params,
    writer: metrics.MetricWriter, last: Params | None,
    stop: interrupt.Interrupt, times: ledger.Ledger,
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

  Returns:
    False if it was stopped early, with everything saved.

  Raises:
    Diverged: too many steps in a row were left out.
    DataError: the data set has changed, or too many of its records are bad.
    CheckpointError: no checkpoint is good, or none can be saved.
  """
  ##### What is trained, on what.
  stage = config.stages[index]
  title = f"stage {index + 1}/{len(config.stages)} '{stage.name}'"
  model = build.make_model(config, stage)
  optimizer, learning_rate = build.make_optimizer(config, stage)
  seed = config.seed * len(config.stages) + index

  ##### The state, straight into its shards: restored, grown or fresh.
  def make_state(params):
    return steps.new_state(params, optimizer)
  abstract = jax.eval_shape(make_state, model.shapes(config.text.max_length))
  shardings = sharding.tree_shardings(abstract, mesh, config.sharding_rules)
  data = inputs.data_fingerprint(config)
  directory = build.stage_directory(workdir, config, index)
  checkpoints = checkpoint.Checkpoints(
      directory, save_interval=config.checkpoint_every,
      max_to_keep=config.checkpoints_to_keep,
      save_failures=config.save_failures)
  if checkpoints.latest_step() == 0:  # Imported: the parameters alone.
    last = checkpoint.restore_item(directory, 0, 'ema')
  if checkpoints.latest_step():
    state, extra = checkpoints.restore(jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract, shardings))
    _check_data(config, extra.get('data'), data)
    logging.info('%s: continuing from step %d.', title, int(state.step))
  else:
    params = model.init(seed, config.text.max_length)
    if last is not None:
      params = stages.grow(params, last)
    state = jax.jit(make_state, out_shardings=shardings)(
        sharding.place(params, shardings.params))
    logging.info('%s: %s px, %d steps of %d images.', title,
                 '+'.join(map(str, model.resolutions)), stage.steps,
                 stage.batch_size)
    metrics.log_parameter_overview(abstract.params)

  ##### The step, compiled once.
  train_step = steps.make_train_step(
      model, build.make_objective(config, stage), optimizer,
      guard=build.make_guard(config), ema_decay=config.optimizer.ema_decay,
      caption_dropout=config.text.caption_dropout,
      empty_text=inputs.empty_text(config), seed=seed)
  first_step = int(state.step)
  times.write(stage.name, first_step, force=True)
  batches = iter(inputs.make_dataset(
      config, 'train', model.resolutions, build.batch_sizes(stage),
      process_index=jax.process_index(), process_count=jax.process_count(),
      start_batch=first_step))
  with times.time('data'):
    batch = sharding.shard_batch(next(batches), mesh)
  begin = time.monotonic()
  with times.time('compile'):
    compiled = steps.compile_train_step(train_step, state, batch, frozen)
  logging.info('%s: compiled the step in %s.', title,
               metrics.duration(time.monotonic() - begin))
  flops = metrics.flops_per_step(compiled)
  peak = metrics.peak_flops(mesh.devices.flat[0])
  draw_fn = make_draw(config, index, mesh, state.ema | frozen)
  prompts = inputs.make_prompts(config, GRID_PROMPTS)

  ##### Train.
  progress = metrics.Progress(
      title, first_step=first_step, last_step=stage.steps,
      batch_size=stage.batch_size)
  bad, stopped, values, unread = 0, False, {}, collections.deque()
  stop.hold()
  times.write(stage.name, first_step, force=True)
  times.switch('step')
  for step in range(first_step + 1, stage.steps + 1):
    if step > first_step + 1:
      with times.time('data'):
        batch = sharding.shard_batch(next(batches), mesh)
        if not values['loss'].is_ready():  # Nothing had to wait for it.
          times.count_as('step')
    state, values = compiled(state, batch, frozen)
    unread.append((step, values))
    # One step ahead keeps the devices busy. XLA's collectives between a CPU's
    # cores have deadlocked with 32 steps in flight.
    ahead = step < stage.steps and all(step % every for every in (
        config.log_every, config.checkpoint_every, config.sample_every))
    while len(unread) > ahead:
      at, seen = unread.popleft()
      bad += int(seen['bad_records'])
      _check_bad(config, bad, (at - first_step) * stage.batch_size)
      in_a_row = int(seen['skipped_in_a_row'])
      if in_a_row:
        _report_skipped(config, index, workdir, at, seen)
      if in_a_row >= config.guard.max_skipped:
        checkpoints.close()
        raise guards.Diverged(
            f'{title}: {in_a_row} steps in a row were left out, the last is '
            f'{at}; their records are in {workdir}/skipped.jsonl. Checkpoints '
            'are good: mend the records, raise guard.spike_factor, or train '
            f'with a lower stages[{index}].learning_rate in another workdir.')

    if step % config.log_every == 0 or step == stage.steps:
      levels = {
          str(name): float(value) for name, value in zip(
              model.resolutions, jax.device_get(values['level_losses']))}
      skipped = int(values['skipped'])
      rate = float(learning_rate(step - 1 - skipped))
      rates = progress.report(
          step, loss=float(values['loss']), levels=levels,
          grad_norm=float(values['grad_norm']), learning_rate=rate)
      numbers = {
          'loss': values['loss'], 'grad_norm': values['grad_norm'],
          'learning_rate': rate, 'bad_records': bad, 'skipped_steps': skipped,
          'images_per_second': rates['images_per_second'],
          **{f'loss_{name}': value for name, value in levels.items()}}
      if flops:
        per_second = flops / rates['seconds_per_step']
        numbers['flops_per_second'] = per_second * mesh.size
        if peak:
          numbers['mfu'] = per_second / peak
      writer.scalars(step, numbers, stage=stage.name)

    with progress.pause(), times.time('save'):
      stopped = stop.requested or checkpoints.reached_preemption(step)
      saved = checkpoints.save(step, state, {'stage': stage.name, 'data': data},
                               force=stopped or step == stage.steps)
    times.write(stage.name, step, force=saved)
    if stopped:
      break
    if step % config.sample_every == 0 or step == stage.steps:
      with progress.pause(), times.time('sample'):
        stop.let_go(wait=checkpoints.wait)
        pictures = grid.grid(
            draw_fn(state.ema | frozen, prompts.text,
                    range(len(prompts.text))), prompts.captions)
        if jax.process_index() == 0:
          path = (pathlib.Path(workdir) / 'samples'
                  / f'{stage.name}_{step}.png')
          grid.save_png(path, pictures)
          logging.info('%s: drew %s', title, path)
        writer.image(step, f'{stage.name}/samples', pictures)
        stop.hold()

  times.switch('save')
  checkpoints.wait()
  if not stopped:
    checkpoint.mark_finished(directory, stage.steps)
  checkpoints.close()
  times.switch('start_up')  # Of the next stage.
  if not stopped:
    stop.let_go()
  return not stopped


def _log_times(workdir: str) -> None:
  sessions, seconds = ledger.totals(workdir)
  total = sum(seconds.values())
  logging.info('Time, over %d sessions:\n%s', sessions, metrics.table(
      [[name.replace('_', ' '), metrics.duration(value),
        f'{value / total:.1%}']
       for name, value in (seconds | {'all': total}).items()],
      ['spent on', 'time', 'share']))


def evaluate(config: ConfigDict, workdir: str, mesh: Mesh,
             frozen: Params) -> dict[str, float]:
  """Held-out loss of each level and prompt accuracy of the last stage.

  Prints a table and writes `eval/<step>.json`, which is read back if it is
  there already.

  Returns:
    'held_out_loss_<resolution>' of each level; for shapes also
    'accuracy_<attribute>', from 0 to 1, see `prompt_accuracy`.
  """
  stage = config.stages[-1]
  path = pathlib.Path(workdir) / 'eval' / f'{stage.steps}.json'
  if path.exists():
    values = json.loads(path.read_text())
  else:
    values = _evaluate(config, workdir, mesh, frozen)
    if jax.process_index() == 0:
      path.parent.mkdir(parents=True, exist_ok=True)
      # At once, as the process may be stopped here.
      temporary = path.with_suffix('.tmp')
      temporary.write_text(json.dumps(values, indent=2) + '\n')
      temporary.replace(path)
  logging.info('Held out:\n%s', metrics.table(
      [[name.replace('_', ' '), value] for name, value in values.items()],
      ['metric', 'value']))
  return values


def _evaluate(config: ConfigDict, workdir: str, mesh: Mesh,
              frozen: Params) -> dict[str, float]:
  index, params = restore_average(config, workdir, mesh)
  params |= frozen
  stage = config.stages[index]
  model = build.make_model(config, stage)

  split = inputs.held_out_split(config)
  if split == 'train':
    logging.warning('No validation split: evaluating on training images.')
  batches = inputs.make_dataset(
      config, split, model.resolutions, build.batch_sizes(stage),
      process_index=jax.process_index(), process_count=jax.process_count(),
      num_batches=config.eval.loss_batches)
  eval_step = jax.jit(steps.make_eval_step(
      model, build.make_objective(config, stage), _EVAL_SEED))
  losses = [
      np.asarray(eval_step(params, sharding.shard_batch(batch, mesh), i))
      for i, batch in enumerate(batches)]
  values = {
      f'held_out_loss_{resolution}': float(loss)
      for resolution, loss in zip(model.resolutions, np.mean(losses, 0))}

  # Pictures are marked by what their captions say.
  if config.data.name != 'shapes' or config.text.encoder == 'label':
    return values
  prompts = inputs.make_prompts(config, config.eval.num_prompts)
  logging.info('Drawing %d held-out prompts.', len(prompts.captions))
  draw_fn = make_draw(config, index, mesh, params)
  # Other noise than that of the grids.
  seeds = range(GRID_PROMPTS, GRID_PROMPTS + len(prompts.captions))
  pictures = draw_fn(params, prompts.text, seeds)
  accuracy = prompt_accuracy.accuracy(
      pictures[-1], prompts.statements, inputs.make_vocabulary())
  return values | {
      f'accuracy_{name}': value for name, value in accuracy.items()}


def restore_average(
    config: ConfigDict, workdir: str,
    mesh: Mesh | None = None) -> tuple[int, Params]:
  """The averaged parameters of the newest stage that has any.

  Returns:
    The stage's index, and the parameters: sharded over the mesh, or in host
    memory without one.

  Raises:
    FileNotFoundError: nothing has been saved yet.
  """
  for index in reversed(range(len(config.stages))):
    directory = build.stage_directory(workdir, config, index)
    if checkpoint.latest_step(directory) is not None:
      break
  else:
    raise FileNotFoundError(
        f'{workdir} has no checkpoint yet: train longer first.')
  shardings = mesh and sharding.tree_shardings(
      checkpoint.abstract_item(directory, None, 'ema'), mesh,
      config.sharding_rules)
  params = checkpoint.restore_item(directory, None, 'ema', shardings)
  return index, params


def make_draw(config: ConfigDict, index: int, mesh: Mesh, params: Params,
              negative: np.ndarray | None = None) -> draw.DrawFn:
  """The function that draws prompts with a stage's network.

  Args:
    config: of the run.
    index: of the stage.
    mesh: the devices.
    params: what it will be called with, or parameters of the same shardings.
    negative: a text that guidance leads away from; None for the empty one.
  """
  stage = config.stages[index]
  sample_step = draw.make_sample_step(
      build.make_model(config, stage),
      build.make_noise_schedule(config, stage), build.make_sampler(config),
      parameterization=config.diffusion.parameterization)
  if negative is None:
    negative = inputs.empty_text(config)
  return draw.make_draw(sample_step, negative, config.eval.batch_size, mesh,
                        jax.tree.map(lambda x: x.sharding, params))


def _check_bad(config: ConfigDict, bad: int, seen: int) -> None:
  most = config.data.max_bad_fraction
  if bad > most * max(seen, _MIN_RECORDS):
    raise DataError(
        f'{bad} of {seen} records could not be used, more than '
        f'data.max_bad_fraction={most}: see the log for their keys.')


def _check_data(config: ConfigDict, old: dict[str, str] | None,
                new: dict[str, str]) -> None:
  if changes := checkpoint.differences(old or {}, new):
    message = ('The data are not those of the last checkpoint ('
               + '; '.join(changes) + ')')
    if not config.data.may_change:
      raise DataError(
          f'{message}: bring them back, or, if that is intended, set '
          '--config.data.may_change=True.')
    logging.warning('%s, as data.may_change=True allows.', message)


def _report_skipped(config: ConfigDict, index: int, workdir: str, step: int,
                    values: dict[str, jax.Array]) -> None:
  if jax.process_index():
    return
  stage = config.stages[index]
  line = {'stage': stage.name, 'step': step} | {
      name: str(float(values[name])) for name in ('loss', 'grad_norm')}
  keys = inputs.batch_keys(
      config, build.resolutions(config, stage)[-1], stage.batch_size, step - 1)
  with (pathlib.Path(workdir) / 'skipped.jsonl').open('a') as file:
    file.write(json.dumps(line | {'keys': keys}) + '\n')
  logging.warning(
      "Stage '%s' step %d was left out: loss %s, gradient %s. Its records, in "
      'skipped.jsonl: %s%s', *line.values(), ', '.join(keys[:8]),
      ', …' if len(keys) > 8 else '')
