"""Images of a split of a run's data set, in the order of its records."""

from typing import NamedTuple

from absl import logging
import numpy as np

from mdm_jax.builders.data import (
  held_out_split,
  image_config,
  make_source,
)
from mdm_jax.builders.stage import Stage, make_stage
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data import pipeline
from mdm_jax.data.images import BadRecord
from mdm_jax.data.transforms import Transform


class SplitImages(NamedTuple):
  """N records.

  Attributes:
    prompts: the first caption of each, or the number of its class.
    captions: what is shown for it: its prompt, or the name of its class.
    images: uint8 [N, R, R, 3].
    keys: of the records.
  """

  prompts: list[str]
  captions: list[str]
  images: np.ndarray
  keys: list[str]


def read(
  stage: Stage, split: str | None = None, count: int | None = None
) -> SplitImages:
  """The first records of a split, at the finest resolution of the stage.

  Images that cannot be decoded are skipped.

  Args:
    stage: of the run.
    split: of the data set; None for the held-out one.
    count: most records; None for all.

  Raises:
    ValueError: there is no such split, or none of its images can be decoded.
    FileNotFoundError: a file of the data set is missing.
  """
  if split == 'train':
    stage = on_training_images(stage)
  config, resolution = stage.config, stage.resolutions[-1]
  source = make_source(config, split or held_out_split(config), resolution)
  tokenizer = make_tokenizer(config)
  transform = Transform(
    tokenizer, resolution, max_pixels=config.data.max_pixels
  )
  indices = range(len(source) if count is None else min(count, len(source)))
  found = SplitImages([], [], [], [])
  for index, record in zip(indices, pipeline.usable_records(source, indices)):
    try:
      example = transform(record, np.random.default_rng(index))
    except BadRecord as error:
      logging.warning('Skipped an unusable record: %s', error)
      continue
    if config.text.encoder == 'label':
      found.prompts.append(str(record['label']))
      found.captions.append(tokenizer.name(record['label']))
    else:
      found.prompts.append(record['caption'])
      found.captions.append(record['caption'])
    found.images.append(example[transform.image_name])
    found.keys.append(record['key'])
  if not found.images:
    raise ValueError('none of the images that were read can be decoded.')
  return found._replace(images=np.stack(found.images))


def on_training_images(stage: Stage) -> Stage:
  """The stage as if the images that it is trained on were the data set.

  Those are the ones of `data.image_set`, if a stage of images is trained on
  them beside clips.
  """
  has_clips = len(stage.model.image_shapes[-1]) == 4
  config = None if has_clips else image_config(stage.config)
  return make_stage(config, stage.index) if config else stage


def read_both(
  stage: Stage, num_training: int, count: int
) -> tuple[SplitImages, SplitImages]:
  """The first training images and held-out ones, to look for copies.

  Args:
    stage: of the run.
    num_training: most training images.
    count: most held-out ones.

  Raises:
    ValueError: the stage has clips, or the data set has no validation split.
    FileNotFoundError: a file of the data set is missing.
  """
  if len(stage.model.image_shapes[-1]) == 4:
    raise ValueError(
      f'{stage.title} has clips, not images: name a stage of images by --stage.'
    )
  if held_out_split(stage.config) == 'train':
    raise ValueError(
      'the data set has no validation split, so nothing tells whether the '
      'model copies: train with one (prepare_data or index_tars with a larger '
      '--validation_fraction, or data.validation_split of TFDS).'
    )
  return read(stage, 'train', num_training), read(stage, count=count)
