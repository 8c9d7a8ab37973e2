"""Prompts to sample: encodes captions, and takes captions of the data set."""

from collections.abc import Sequence
import difflib
import functools
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders.data import (
  DRAWN,
  held_out_split,
  make_source,
  measured_index,
)
from mdm_jax.builders.model import finest_resolution, frames
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data import moving_shapes, pipeline, shapes
from mdm_jax.data.text import words_of
from mdm_jax.eval import motion, prompt_accuracy
from mdm_jax.eval.prompt_accuracy import Found, Vocabulary

_SHOWN_WORDS = 5  # unknown words that are named
_MANY_WORDS = 100  # of more known words only those near to unknown ones are
_CHANCE = 4000  # scenes from which the level of chance is computed


class Prompts(NamedTuple):
  """Prompts to sample.

  Attributes:
    captions: N captions.
    text: the captions as the text encoder reads them: tokens [N, L] or features
      [N, L, D].
    statements: attributes that each caption names, by which its image is
      scored; None if images of this data set cannot be scored.
  """

  captions: list[str]
  text: np.ndarray
  statements: list[dict] | None


def encode_prompts(config: ConfigDict, captions: list[str]) -> np.ndarray:
  """Encodes captions as int32 tokens; logs a warning if any is truncated.

  Args:
    config: configuration of the run.
    captions: N captions; for class-conditional models N class labels.

  Returns:
    int32 [N, L].

  Raises:
    ValueError: a class label does not exist.
  """
  tokenizer = make_tokenizer(config)
  if config.text.encoder != 'label':
    cut = [
      (caption, excess)
      for caption in captions
      if (excess := tokenizer.excess(caption))
    ]
    if cut:
      logging.warning(
        '%d of %d prompts are cut, such as "%.60s": %s.',
        len(cut),
        len(captions),
        *cut[0],
      )
  return np.stack(list(map(tokenizer.encode, captions)))


def known_words(config: ConfigDict) -> frozenset[str]:
  """The words of all captions that the text encoder was trained on.

  Empty where they are not known: of T5, of class labels, and where the shipped
  tokenizer, which was trained on captions of shapes, reads others.
  """
  is_own = config.text.tokenizer or config.data.name in DRAWN
  if config.text.encoder != 'learned' or not is_own:
    return frozenset()
  return make_tokenizer(config).known_words or frozenset()


def unknown_words(config: ConfigDict, prompts: Sequence[str]) -> str:
  """Says which words of prompts the tokenizer's training never saw.

  They are encoded as pieces of other words or as bytes, which have no meaning
  for a text encoder that is trained on these captions alone.

  Args:
    config: configuration of the run.
    prompts: any texts.

  Returns:
    A sentence without a full stop, with the words that are known; '' if there
    is nothing to say.
  """
  known = known_words(config)
  words = dict.fromkeys(word for text in prompts for word in words_of(text))
  found = [word for word in words if known and word not in known]
  if not found:
    return ''
  shown = ', '.join(f'"{word:.30}"' for word in found[:_SHOWN_WORDS])
  more = len(found) - _SHOWN_WORDS
  if more > 0:
    shown += f' and {more:,} more'
  known = sorted(known)
  text = f'words that training never saw: {shown}; '
  if len(known) <= _MANY_WORDS:
    return text + f'it knows {", ".join(known)}'
  text += f'it knows {len(known):,} words'
  near = {
    near: None
    for word in found[:_SHOWN_WORDS]
    for near in difflib.get_close_matches(
      word[:30], [each for each in known if each[0] == word[0]]
    )
  }
  return text + (f', of which {", ".join(near)} are near' if near else '')


def make_prompts(
  config: ConfigDict, count: int, rows: Sequence[int] | None = None
) -> Prompts:
  """Takes captions of the held-out split as prompts.

  Class-conditional models get class labels, spread evenly over the classes.

  Args:
    config: configuration of the run.
    count: number of prompts.
    rows: indices of the prompts to return, below `count`. Captions repeat if
      the data set has fewer. With None, all prompts are returned; a data set of
      images then gives no caption twice, so maybe fewer than `count`.
  """
  if config.text.encoder == 'label':
    labels = make_tokenizer(config)
    chosen = [
      i * labels.num_classes // count
      for i in (range(count) if rows is None else rows)
    ]
    return Prompts(
      [labels.name(label) for label in chosen],
      encode_prompts(config, map(str, chosen)),
      None,
    )
  split = held_out_split(config)
  if config.data.name in DRAWN:
    source = make_source(config, split, finest_resolution(config))
    scenes = [
      source.scene(i % len(source))
      for i in (range(count) if rows is None else rows)
    ]
    captions = [scene[1] for scene in scenes]
    return Prompts(
      captions, encode_prompts(config, captions), [scene[2] for scene in scenes]
    )
  source = make_source(config, split, 0)
  if rows is None:
    rows = range(min(count, len(source)))
  rows = [measured_index(config, row, len(source)) for row in rows]
  records = list(pipeline.usable_records(source, rows))
  captions = [record['caption'] for record in records]
  if config.text.encoder == 'precomputed':
    return Prompts(
      captions, np.stack([record['text'] for record in records]), None
    )
  return Prompts(captions, encode_prompts(config, captions), None)


def can_score_prompts(config: ConfigDict) -> bool:
  """Whether images can be scored by the attributes that their prompts name."""
  return config.data.name in DRAWN and config.text.encoder != 'label'


def is_moving(config: ConfigDict, stage: ConfigDict) -> bool:
  """Whether samples of a stage are clips whose prompts say what objects do."""
  return config.data.name == 'moving_shapes' and frames(config, stage)[-1] > 1


def make_vocabulary() -> Vocabulary:
  """The colours, shapes and sizes that the words of captions stand for.

  Images of shapes are scored by it.
  """
  return Vocabulary(
    colors=shapes.COLORS,
    backgrounds=shapes.BACKGROUNDS,
    silhouettes=shapes.silhouettes(),
    patterns=shapes.pattern_tiles(),
    period=shapes.PERIOD,
    sizes={name: float(np.mean(radii)) for name, radii in shapes.SIZES.items()},
  )


@functools.cache
def chance_accuracy(
  name: str = 'shapes', moving: bool = False
) -> dict[str, float]:
  """Accuracies of perfect images of other prompts: the level of chance.

  A model that draws shapes well but ignores its prompts scores as much. It is
  more than one over the number of words for attributes of which some values are
  more frequent, such as one object instead of two, and since found objects are
  assigned to stated ones such that most marks are right.

  Args:
    name: of the data set, one of `DRAWN`.
    moving: of clips of 'moving_shapes', and not of their images.

  Returns:
    By the names of `prompt_accuracy.NAMES` and `by_number_of_objects`, and with
    `moving` of `MOTION_ATTRIBUTES`, from 0 to 1.
  """
  source = shapes.ShapesSource(0, 'held_out', _CHANCE, 8)
  if name == 'moving_shapes':
    source = moving_shapes.MovingShapesSource(0, 'held_out', _CHANCE, 8, 2)
  scenes = [source.scene(i) for i in range(len(source))]
  statements = [stated for *_, stated in [*scenes[1:], scenes[0]]]
  if not moving:
    statements = list(map(motion.without_motion, statements))
  marks = [
    prompt_accuracy.compare(*_contents(scene), stated)
    for (scene, *_), stated in zip(scenes, statements)
  ]
  accuracy = prompt_accuracy.mean_marks(marks)
  accuracy |= prompt_accuracy.by_number_of_objects(marks, statements)
  return {name: float(value) for name, value in accuracy.items()}


def _contents(
  scene: shapes.Scene | moving_shapes.MovingScene,
) -> tuple[str, Sequence]:
  """The background and the objects of a scene, as an analysis finds them."""
  if isinstance(scene, shapes.Scene):
    return scene.background, scene.objects
  objects = [
    Found(
      **{name: getattr(item, name) for name in ('shape', 'color', 'pattern')},
      **{name: getattr(item, name) for name in ('size', 'x', 'y', 'radius')},
      **moves.stated,
    )
    for item, moves in zip(scene.scene.objects, scene.motions)
  ]
  return scene.scene.background, objects
