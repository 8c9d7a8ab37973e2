"""The model card of the demo: what a model knows, and prompts to try.

For somebody who is shown the model, and has seen neither its configuration nor
its data.
"""

from collections.abc import Mapping
import dataclasses
import os

from absl import logging
import jax
from ml_collections import ConfigDict

from mdm_jax.builders.config import AUTOENCODER
from mdm_jax.builders.model import resolutions
from mdm_jax.builders.prompts import (
  chance_accuracy,
  is_moving,
  known_words,
  make_prompts,
)
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data import shapes
from mdm_jax.inference.session import Model
from mdm_jax.inference.validation import read_metrics
from mdm_jax.runtime import files

_NUM_CAPTIONS = 8  # example prompts of a data set of images
_LONGEST = 90  # characters of one, which has to fit a button
_NUM_NAMES = 200  # most classes that are listed

# Prompts by what they show, as the captions of the data set are written.
SHAPES_EXAMPLES = {
  'One object, anywhere': (
    'a large yellow star in the centre, on navy',
    'a small pink ring at the bottom right, on white',
  ),
  'Patterns': (
    'a large striped orange circle on the left, on black',
    'a large checked red square, teal background',
    'a large dotted blue cross, on beige',
  ),
  'Two objects': (
    'a small red cross to the left of a large cyan circle, on black',
    'a small green triangle above a large pink square, on grey',
  ),
  # See `shapes.HELD_OUT`.
  'Combinations that were left out of its training data': (
    'a large red circle on a white background',
    'a large striped green star at the top, on white',
  ),
}


@dataclasses.dataclass(frozen=True)
class ModelCard:
  """What the page says about a model.

  Attributes:
    summary: what it makes, in a sentence.
    facts: values by name.
    words: what prompts can be made of, by kind.
    note: about what it was not trained on; '' for nothing.
    examples: prompts to try, by what they show.
  """

  summary: str
  facts: Mapping[str, str]
  words: Mapping[str, tuple[str, ...]]
  note: str
  examples: Mapping[str, tuple[str, ...]]


def make_model_card(model: Model) -> ModelCard:
  """Describes a model by its run, without sampling."""
  config = model.stage.config
  is_shapes, has_classes = (
    config.data.name == 'shapes',
    config.text.encoder == 'label',
  )
  words, note = {}, ''
  if has_classes:
    summary = 'It makes images of one class at a time: a prompt is its name.'
    names = _class_names(config)
    words = {'Classes': names[:_NUM_NAMES]}
    if len(names) > _NUM_NAMES:
      note = f'These are {_NUM_NAMES} of its {len(names):,} classes.'
    examples = {'Classes': names[:_NUM_CAPTIONS]}
  elif is_shapes:
    summary = (
      'It draws one or two coloured shapes on a plain background. Say which '
      'shape, colour, pattern, size and place; what you leave out, it chooses.'
    )
    words, note = _shapes_words(), _HELD_OUT_NOTE
    examples = SHAPES_EXAMPLES
  else:
    summary = (
      'It makes images like those it was trained on. Describe one as their '
      'captions do.'
    )
    words, note = _known_words(config)
    captions = _captions(config)
    examples = {'Captions of its data set': captions} if captions else {}
  if len(model.stage.resolutions) > 1:
    summary += f' Every image is made at {_sides(model)} pixels at once.'
  return ModelCard(summary, _facts(model), words, note, examples)


_HELD_OUT_NOTE = (
  'In training, every colour of a shape was missing on one of the backgrounds: '
  'there was no red circle on white, for example. Images of such combinations '
  'show what the model has understood, and not only remembered.'
)


def _shapes_words() -> dict[str, tuple[str, ...]]:
  return {
    'Shapes': shapes.SHAPES,
    'Colours': tuple(shapes.COLORS),
    'Patterns': shapes.PATTERNS,
    'Sizes': tuple(shapes.SIZES),
    'Places': shapes.PLACES,
    'Two objects': tuple(shapes.INVERSE),
    'Backgrounds': tuple(shapes.BACKGROUNDS),
  }


def _known_words(config: ConfigDict) -> tuple[dict, str]:
  """The words that the text encoder knows, or a note if they are many."""
  known = sorted(known_words(config))
  if len(known) > _NUM_NAMES:
    return {}, (
      f'Its captions had {len(known):,} different words. Others mean nothing '
      'to it, and are named when a prompt has them.'
    )
  return ({'Words': tuple(known)} if known else {}), ''


def _class_names(config: ConfigDict) -> tuple[str, ...]:
  labels = make_tokenizer(config)
  return tuple(map(labels.name, range(labels.num_classes)))


def _captions(config: ConfigDict) -> tuple[str, ...]:
  """Some captions of the data set; () if it is not on this machine."""
  try:
    found = make_prompts(config, 4 * _NUM_CAPTIONS).captions
  except (OSError, ValueError, ImportError) as error:
    logging.info('No example prompts, as the data cannot be read: %s', error)
    return ()
  short = [text for text in map(_one_line, found) if 0 < len(text) <= _LONGEST]
  return tuple(dict.fromkeys(short))[:_NUM_CAPTIONS]


def _one_line(text: str) -> str:
  return ' '.join(text.split())


def _sides(model: Model) -> str:
  return ' and '.join(map(str, model.stage.sampled_resolutions))


def _facts(model: Model) -> dict[str, str]:
  stage, config = model.stage, model.stage.config
  earlier = stage.earlier_params(lambda each: each.param_shapes())
  size = sum(x.size for x in jax.tree.leaves((model.weights.params, earlier)))
  together = ', denoised together' if len(stage.resolutions) > 1 else ''
  data = {
    'shapes': 'procedural shapes, drawn while training',
    'tars': 'your own images, from tars',
    'captioned_images': 'your own images',
  }.get(config.data.name, config.data.name.removeprefix('tfds:'))
  if config.data.path:
    data += f' ({os.path.basename(config.data.path.rstrip("/"))})'
  facts = {
    'Resolution': f'{_sides(model)} pixels{together}',
    'Parameters': f'{size:,}',
    'Data': data,
    'Text': {
      'label': 'class labels',
      'learned': 'a text encoder, trained with the model',
    }.get(config.text.encoder, 'a T5 text encoder, not trained'),
    'Training': ', then '.join(
      f'{each.steps:,} steps of {each.batch_size} images at '
      f'{_resolution(config, each)} pixels'
      for each in config.stages
    ),
  }
  return facts | _accuracy(model)


def _resolution(config: ConfigDict, stage: ConfigDict) -> int:
  if stage.kind == AUTOENCODER:
    return config.autoencoder.resolution
  return resolutions(config, stage)[-1]


def _accuracy(model: Model) -> dict[str, str]:
  """The prompt accuracy at the end of training, if it has been measured."""
  if not model.stage.is_last:
    return {}  # The file is of the last stage.
  try:
    values = read_metrics(model.stage, model.workdir) or {}
  except files.UnreadableFile as error:
    logging.warning('%s', error)
    return {}
  stage = model.stage
  moving = is_moving(stage.config, stage.settings)
  chance = chance_accuracy(stage.config.data.name, moving)
  found = {
    name: f'{values[f"accuracy_{name}"]:.0%} (chance {chance[name]:.0%})'
    for name in ('all', 'shape', 'color', 'pattern', 'position', 'background')
    if f'accuracy_{name}' in values
  }
  if 'all' not in found:
    return {}
  parts = ', '.join(
    f'{name.replace("color", "colour")} {share}'
    for name, share in found.items()
    if name != 'all'
  )
  return {
    'Accuracy': f'at the end of training, {found["all"]} of images showed all '
    'that the prompt says'
    + (f': {parts}' if parts else '')
    + '; for prompts with combinations that training had left out'
  }
