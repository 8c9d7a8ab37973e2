"""What a run trains, on what and from where, as log lines before it starts."""

from collections.abc import Sequence
import time

from absl import logging
from flax import linen as nn
from ml_collections import ConfigDict

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.data import (
  DRAWN,
  held_out_split,
  make_image_source,
  make_source,
)
from mdm_jax.builders.model import finest_resolution
from mdm_jax.builders.text import make_text_encoder, make_tokenizer
from mdm_jax.checkpoint import saved_steps
from mdm_jax.data import pipeline
from mdm_jax.data.images import BadRecord
from mdm_jax.report import console
from mdm_jax.runtime import environment
from mdm_jax.training.run import Run

_NUM_CAPTIONS = 64  # to look at


def log_summary(run: Run, stages: Sequence[BaseStage], first: int) -> None:
  """Logs a line for each thing that a reader of the log asks first.

  Args:
    run: the training run.
    stages: all stages of the run.
    first: index of the stage to train now; their number if all are finished.
  """
  config = stages[0].config
  mesh = ', '.join(f'{name} {size}' for name, size in run.mesh.shape.items())
  environment.log_start(
    mesh=mesh,
    precision=f'{config.dtype} activations, float32 parameters',
    data=_data(config),
    text=_text(config, make_text_encoder(config)),
    parameters=_parameters(run, stages),
    workdir=run.workdir,
    run=f'{time.strftime("%Y-%m-%d")}: {_resumed(run, stages, first)}',
  )
  for stage in stages[first:]:
    _warn_of_warm_up(stage)
  if stages[first:]:
    _warn_of_long_captions(config)


def _warn_of_warm_up(stage: BaseStage) -> None:
  """Warns of a warm-up after which no steps are left for the decay."""
  warm_up, steps = stage.settings.warmup_steps, stage.num_steps
  if stage.config.optimizer.decay == 'cosine' and warm_up >= steps:
    logging.warning(
      "%s: warmup_steps=%d of %d steps leave none for optimizer.decay='cosine',"
      ' and the learning rate ends at %.0f%% of its peak: give fewer, such as '
      '--config.stages[%d].warmup_steps=%d.',
      stage.title,
      warm_up,
      steps,
      100 * steps / warm_up,
      stage.index,
      steps // 10,
    )


def _warn_of_long_captions(config: ConfigDict) -> None:
  """Warns if captions of some training records are cut."""
  data, text = config.data, config.text
  if text.long_captions != 'cut' or text.encoder not in ('learned', 't5'):
    return
  resolution = finest_resolution(config)
  if data.name not in DRAWN:
    source = make_source(config, 'train', resolution)
    _warn_of_cut(config, f'data.name={data.name!r}', source)
  if data.image_set not in ('', *DRAWN):
    source = make_image_source(config, resolution)
    _warn_of_cut(config, f'data.image_set={data.image_set!r}', source)


def _warn_of_cut(
  config: ConfigDict, name: str, source: pipeline.Source
) -> None:
  count = min(len(source), _NUM_CAPTIONS)
  tokenizer = make_tokenizer(config, of_captions=True)
  excesses = []
  for k in range(count):
    try:
      record = source[k * len(source) // count]
    except BadRecord:  # Training counts them.
      continue
    captions = record.get('captions') or [record['caption']]
    excesses += filter(None, map(tokenizer.excess, captions))
  if excesses:
    logging.warning(
      'Of %d training records of %s, %d captions are cut: one has %s. Raise '
      'text.max_length, or text.long_captions=leave_out to skip such records.',
      count,
      name,
      len(excesses),
      excesses[0],
    )


def _data(config: ConfigDict) -> str:
  """The data set, and the sizes of its splits."""
  split = held_out_split(config)
  resolution = finest_resolution(config)
  count = len(make_source(config, 'train', resolution))
  path = f' in {config.data.path}' if config.data.path else ''
  if split == 'train':
    held_out = ', no validation split: held-out metrics are of training images'
  else:
    size = len(make_source(config, split, resolution))
    held_out = f', {size:,} validation records'
  found = f'{config.data.name}{path}: {count:,} training records{held_out}'
  if images := make_image_source(config, resolution):
    path = f' in {config.data.image_path}' if config.data.image_path else ''
    found += f'; {config.data.image_set}{path}: {len(images):,} images'
  return found


def _text(config: ConfigDict, encoder: nn.Module) -> str:
  """The text encoder: its kind, size and tokens."""
  text = config.text
  width = f'width {encoder.width}'
  if text.encoder == 'label':
    return f'label: {text.num_classes:,} classes, {width}'
  pieces = make_tokenizer(config).vocab_size
  tokens = f'at most {text.max_length} tokens of {pieces:,}'
  if text.encoder == 'learned':
    return f'learned encoder: {_layers(text.num_layers)}, {width}, {tokens}'
  if text.encoder == 'precomputed':
    return f'precomputed T5 features: {width}, {tokens}'
  layers = _layers(encoder.spec.num_layers)
  return f'frozen T5 in {text.path}: {layers}, {width}, {tokens}'


def _layers(count: int) -> str:
  return f'{count} layer{"" if count == 1 else "s"}'


def _parameters(run: Run, stages: Sequence[BaseStage]) -> str:
  """How many parameters each stage trains, and how many are frozen."""
  parameters = {
    f"in stage '{stage.name}'": stage.param_shapes() for stage in stages
  }
  if run.frozen:
    parameters['frozen in the text encoder'] = run.frozen
  return ', '.join(
    f'{console.num_parameters(params):,} {where}'
    for where, params in parameters.items()
  )


def _resumed(run: Run, stages: Sequence[BaseStage], first: int) -> str:
  """Where the run begins or continues."""
  if first == len(stages):
    return f'all {len(stages)} stages are finished'
  stage = stages[first]
  step = saved_steps.latest_step(stage.directory(run.workdir))
  if step:
    return f'continues {stage.title} at step {step} of {stage.num_steps}'
  if step == 0:
    return f'begins {stage.title} from imported weights'
  if first:
    return f"begins {stage.title}, stage '{stages[first - 1].name}' is finished"
  return f'begins {stage.title}'
