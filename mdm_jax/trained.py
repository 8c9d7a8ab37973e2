"""A trained model: its averaged parameters, its pictures, its figures."""

from collections.abc import Callable, Mapping
import functools
import json
import pathlib
from typing import NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax import (
  averages,
  build,
  checkpoint,
  draw,
  inputs,
  manifest,
  metrics,
  sharding,
)
from mdm_jax import step as steps
from mdm_jax.eval import prompt_accuracy
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.state import Params

# Of the grids that training draws.
GRID_PROMPTS = 16
_EVAL_SEED = 1
_REMEDIES = {
  'checkpoints': 'train longer first',
  'best': 'set eval.every and eval.best_metric when training',
  'averages': 'set averages.widths when training',
}


class Average(NamedTuple):
  """Averaged parameters.

  Attributes:
    index: of the stage.
    step: of the stage.
    params: sharded over a mesh, or in host memory.
  """

  index: int
  step: int
  params: Params


def restore_average(
  config: ConfigDict,
  workdir: str,
  mesh: Mesh | None = None,
  *,
  width: float | None = None,
  best: bool = False,
) -> Average:
  """The averaged parameters of the newest stage that has any.

  Args:
    config: of the run.
    workdir: of the run.
    mesh: where to put them; None for host memory.
    width: sigma_rel of the average, made of the snapshots that were kept, up
      to the newest of them; see `averages`. None for the decaying average.
    best: of the step that was best by `eval.best_metric`, not the last one.

  Raises:
    FileNotFoundError: nothing (of that kind) has been saved yet.
    ValueError: both a width and the best, or a width out of range.
    CheckpointError: what there is is damaged.
  """
  if best and width is not None:
    raise ValueError(
      'The best average has the width that it was kept with: '
      'ask for one of a width, or for the best.'
    )
  kind = _kind(width, best)
  for index in reversed(range(len(config.stages))):
    directory = build.stage_directory(workdir, config, index, kind)
    if checkpoint.latest_step(directory) is not None:
      break
  else:
    raise FileNotFoundError(f'{workdir} has no {kind} yet: {_REMEDIES[kind]}.')
  if width is not None:
    step, params = _reconstruct(directory, width)
    if mesh:
      params = sharding.place(
        params, sharding.tree_shardings(params, mesh, config.sharding_rules)
      )
    return Average(index, step, params)
  step = checkpoint.require_step(directory)
  shardings = mesh and sharding.tree_shardings(
    checkpoint.abstract_item(directory, step, 'ema'),
    mesh,
    config.sharding_rules,
  )
  return Average(
    index, step, checkpoint.restore_item(directory, step, 'ema', shardings)
  )


def describe(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  average: Average,
  *,
  width: float | None = None,
  best: bool = False,
) -> dict[str, str | int | float | None]:
  """What tells the pictures and figures of an average from those of others.

  Args:
    config: of the run.
    workdir: of the run.
    average: as `restore_average` gave it.
    width: that was asked for.
    best: likewise.

  Returns:
    JSON, with the 'fingerprint' of the files that it was read from.
  """
  directory = build.stage_directory(
    workdir, config, average.index, _kind(width, best)
  )
  return {
    'stage': config.stages[average.index].name,
    'step': average.step,
    'average': 'best' if best else width or 'decaying',
    'fingerprint': manifest.fingerprint(directory / str(average.step)),
  }


def warn_if_unfinished(
  config: ConfigDict, average: Average, best: bool = False
) -> None:
  """Says how far a run is that has not come to its end.

  Args:
    config: of the run.
    average: as `restore_average` gave it.
    best: that was asked for, which need not be the last.
  """
  stage = config.stages[average.index]
  is_last = average.index + 1 == len(config.stages)
  if not is_last or (average.step < stage.steps and not best):
    logging.warning(
      "The run is not finished: this is stage %d/%d '%s' at step %d of %d.",
      average.index + 1,
      len(config.stages),
      stage.name,
      average.step,
      stage.steps,
    )


def _kind(width: float | None, best: bool) -> str:
  """Which of a stage's directories."""
  if best:
    return 'best'
  return 'checkpoints' if width is None else 'averages'


def _reconstruct(directory: pathlib.Path, width: float) -> tuple[int, Params]:
  """An average of the newest snapshot's time, its step, and any width.

  The parameters are in host memory.
  """
  averages.exponent(width)  # Before anything is read.
  snapshots = {}
  for step in checkpoint.good_steps(directory):
    extra = checkpoint.read_extra(directory, step)
    # As many updates as before, or none: steps were left out.
    if count := extra['updates']:
      snapshots |= {(name, count): step for name in extra['widths']}
  if not snapshots:
    raise checkpoint.CheckpointError(
      f'{directory} has no snapshot that is good: put back a copy of one.'
    )
  names, counts = zip(*snapshots)
  factors = averages.coefficients(
    list(map(float, names)), counts, width, max(counts)
  )
  average = None
  for step, name, factor in zip(snapshots.values(), names, factors):
    part = jax.tree.map(
      functools.partial(np.multiply, factor, dtype=np.float64),
      checkpoint.restore_item(directory, step, name),
    )
    average = jax.tree.map(np.add, average, part) if average else part
  logging.info(
    'An average of width %g after %d updates, made of %d snapshots.',
    width,
    max(counts),
    len(snapshots),
  )
  return max(snapshots.values()), jax.tree.map(np.float32, average)


def restore_guide(
  config: ConfigDict, index: int, workdir: str, mesh: Mesh
) -> tuple[Matryoshka, Params, dict]:
  """A worse model that guidance can lead away from.

  Args:
    config: of the run that it is to guide.
    index: of that run's stage.
    workdir: of its own run.
    mesh: the devices.

  Returns:
    The network, all its parameters, and what `describe` says of them.

  Raises:
    FileNotFoundError: nothing has been saved there yet.
    ValueError: it denoises other images, or other noise, or reads other text.
  """
  guide = build.reading_prompts(
    build.load_config(checkpoint.read_config(workdir))
  )
  average = restore_average(guide, workdir, mesh)
  guide_stage = guide.stages[average.index]

  def compared(config, stage):
    return {
      'resolutions': build.resolutions(config, stage),
      'diffusion': config.diffusion.to_dict(),
      'shift_power': stage.shift_power,
      'tokenizer': inputs.make_tokenizer(config).fingerprint(),
      'text.max_length': config.text.max_length,
    }

  if differences := checkpoint.differences(
    compared(config, config.stages[index]), compared(guide, guide_stage)
  ):
    raise ValueError(
      f'{workdir} cannot be the guide: ' + '; '.join(differences) + '.'
    )
  return (
    build.make_model(guide, guide_stage),
    average.params | build.load_frozen(guide, mesh),
    describe(guide, workdir, average),
  )


def make_draw(
  config: ConfigDict,
  index: int,
  mesh: Mesh,
  params: Params,
  negative: np.ndarray | None = None,
) -> draw.DrawFn:
  """The function that draws prompts with a stage's network.

  Args:
    config: of the run.
    index: of the stage.
    mesh: the devices.
    params: what it will be called with, or parameters of the same shardings.
    negative: a text that guidance leads away from; None for the empty one.
  """
  if negative is None:
    negative = inputs.empty_text(config)
  return draw.make_draw(
    build.make_painter(config, config.stages[index], mesh),
    negative,
    config.eval.batch_size,
    jax.tree.map(lambda x: x.sharding, params),
  )


def evaluate(
  config: ConfigDict, workdir: str, mesh: Mesh, frozen: Params
) -> dict[str, float]:
  """Held-out loss of each level and prompt accuracy of the last stage.

  Prints a table and writes `eval/<step>.json`, which is read back if it is
  there already.

  Returns:
    'held_out_loss_<resolution>' of each level; for shapes also
    'accuracy_<attribute>', from 0 to 1, see `prompt_accuracy`.
  """
  path = _figures_path(config, workdir)
  if path.exists():
    values = json.loads(path.read_text())
  else:
    index, _, params = restore_average(config, workdir, mesh)
    values = measure(config, index, params | frozen, mesh)
    write_figures(config, workdir, values)
  logging.info(
    'Held out:\n%s',
    metrics.table(
      [[name.replace('_', ' '), value] for name, value in values.items()],
      ['metric', 'value'],
    ),
  )
  return values


def write_figures(
  config: ConfigDict, workdir: str, figures: Mapping[str, float]
) -> None:
  """Writes what `evaluate` then reads back. All processes call it."""
  if jax.process_index() == 0:
    path = _figures_path(config, workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    # At once, as the process may be stopped here.
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(figures, indent=2) + '\n')
    temporary.replace(path)


def _figures_path(config: ConfigDict, workdir: str) -> pathlib.Path:
  return pathlib.Path(workdir) / 'eval' / f'{config.stages[-1].steps}.json'


def make_measure(
  config: ConfigDict,
  index: int,
  mesh: Mesh,
  draw_fn: draw.DrawFn,
) -> Callable[[Params], dict[str, float]]:
  """Held-out loss of each level and prompt accuracy, see `evaluate`.

  Args:
    config: of the run.
    index: of the stage.
    mesh: the devices.
    draw_fn: as `make_draw` makes it for the stage.

  Returns:
    A function of all parameters that the stage's network needs, on the mesh.
    It is compiled once, and reads the same data each time.
  """
  stage = config.stages[index]
  model = build.make_model(config, stage)
  split = inputs.held_out_split(config)
  if split == 'train':
    logging.warning('No validation split: evaluating on training images.')
  eval_step = jax.jit(
    steps.make_eval_step(model, build.make_objective(config, stage), _EVAL_SEED)
  )

  def measure(params):
    batches = inputs.make_dataset(
      config,
      split,
      model.resolutions,
      build.batch_sizes(stage),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_batches=config.eval.loss_batches,
    )
    losses = [
      np.asarray(eval_step(params, sharding.shard_batch(batch, mesh), i))
      for i, batch in enumerate(batches)
    ]
    values = {
      f'held_out_loss_{resolution}': float(loss)
      for resolution, loss in zip(model.resolutions, np.mean(losses, 0))
    }

    if not inputs.states_what_is_seen(config):
      return values
    prompts = inputs.make_prompts(config, config.eval.num_prompts)
    logging.info('Drawing %d held-out prompts.', len(prompts.captions))
    # Other noise than that of the grids.
    seeds = range(GRID_PROMPTS, GRID_PROMPTS + len(prompts.captions))
    pictures = draw_fn(params, prompts.text, seeds)
    accuracy = prompt_accuracy.accuracy(
      pictures[-1], prompts.statements, inputs.make_vocabulary()
    )
    return values | {
      f'accuracy_{name}': value for name, value in accuracy.items()
    }

  return measure


def measure(
  config: ConfigDict, index: int, params: Params, mesh: Mesh
) -> dict[str, float]:
  """What `make_measure` measures, of some parameters, once."""
  draw_fn = make_draw(config, index, mesh, params)
  return make_measure(config, index, mesh, draw_fn)(params)
