"""Opens the data sets of a configuration."""

from collections.abc import Sequence
import dataclasses
import functools

from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders.text import make_tokenizer, text_fingerprint
from mdm_jax.data import (
  moving_shapes,
  pipeline,
  precomputed,
  shapes,
  sources,
  tar_index,
  tfds_source,
)
from mdm_jax.data.labels import LabelledSource
from mdm_jax.data.transforms import Transform

# Procedural sets, which are drawn at the resolution of each level, and the
# versions of what they draw.
_VERSIONS = {'shapes': shapes.VERSION, 'moving_shapes': moving_shapes.VERSION}
DRAWN = tuple(_VERSIONS)
_DATA_SETS = (*DRAWN, 'captioned_images', 'tars', 'tfds:NAME')
_TFDS = 'tfds:'
# Where the frames of a longer clip begin, see `images.decode_clip`.
_CLIP_STARTS = {'first': 0.0, 'centre': 0.5, 'random': None}
_HELD_OUT = 'held_out_loss'
# Of the order in which files are measured. In their own, the first of them may
# all be of one folder, and so of one kind.
_MEASURED_SEED = 0


def make_source(
  config: ConfigDict, split: str, resolution: int, frames: int = 1
) -> pipeline.Source:
  """Opens a split of the data set.

  Args:
    config: configuration of the run.
    split: 'train' or 'validation'; procedural sets also have 'held_out'.
    resolution: resolution of procedural shapes in pixels; image files are
      returned in their own resolution.
    frames: of procedural clips; 1 for images.

  Raises:
    FileNotFoundError: a file of the data set is missing.
    ValueError: there is no such data set, split or feature, or the data set has
      another number of classes than the config, or of records than its text
      features.
  """
  data, text = config.data, config.text
  source = _make_records(config, split, resolution, frames)
  if text.encoder == 'label':
    num_classes = getattr(source, 'num_classes', 0)
    if not num_classes:
      raise ValueError(
        f"text.encoder='label' with data.name={data.name!r}: this data set "
        'has no labels. Use shapes or tfds:NAME.'
      )
    if num_classes != text.num_classes:
      raise ValueError(
        f'text.num_classes={text.num_classes}, but {data.name} has '
        f'{num_classes} classes: set --config.text.num_classes='
        f'{num_classes}.'
      )
    return LabelledSource(source, make_tokenizer(config))
  if text.encoder == 'precomputed':
    info = precomputed.read_info(data.path)
    precomputed.require_count(data.path, info, split, len(source))
    return precomputed.PrecomputedText(
      source,
      data.path,
      split,
      info,
      make_tokenizer(config, of_captions=True),
      _leave_out(config),
    )
  return source


def _make_records(config: ConfigDict, split: str, resolution: int, frames: int):
  data = config.data
  if data.name in DRAWN:
    if data.name == 'shapes':
      source = shapes.ShapesSource(config.seed, split, data.size, resolution)
    else:
      source = moving_shapes.MovingShapesSource(
        config.seed, split, data.size, resolution, frames
      )
    # What is measured stays comparable.
    if split == 'train':
      source = dataclasses.replace(source, two_objects=data.two_objects)
    return source
  if data.name.startswith(_TFDS):
    if split not in ('train', 'validation'):
      raise ValueError(
        f'{data.name} has the splits train and validation here, not {split!r}.'
      )
    is_label = config.text.encoder == 'label'
    text = {'label': data.label} if is_label else {'caption': data.caption}
    return tfds_source.open_by_name(
      data.name.removeprefix(_TFDS),
      data.path,
      data[f'{split}_split'],
      tfds_source.Features(data.image, **text),
    )
  if data.name not in _DATA_SETS:
    raise ValueError(f'data.name={data.name!r}: use one of {_DATA_SETS}.')
  if not data.path:
    raise ValueError(
      'data.path is empty: name the directory that prepare_data or '
      'index_tars wrote, --config.data.path=DIR.'
    )
  open_source = (tar_index if data.name == 'tars' else sources).open_source
  return open_source(data.path, split)


def make_image_source(
  config: ConfigDict, resolution: int
) -> pipeline.Source | None:
  """Opens the images on which levels of one frame are trained beside clips.

  Returns:
    The training split, or None where those levels see the clips' first frames.

  Raises:
    FileNotFoundError, ValueError: see `make_source`.
  """
  images = image_config(config)
  return images and make_source(images, 'train', resolution)


def image_config(config: ConfigDict) -> ConfigDict | None:
  """The config of `data.image_set`, as if it were the data set."""
  if not config.data.image_set:
    return None
  images = config.copy_and_resolve_references()
  images.data.update(name=config.data.image_set, path=config.data.image_path)
  return images


def _leave_out(config: ConfigDict) -> bool:
  return config.text.long_captions == 'leave_out'


def held_out_split(config: ConfigDict) -> str:
  """The split to validate on: 'train' if the data set has no other one."""
  if config.data.name in DRAWN:
    return 'held_out'
  if config.data.name.startswith(_TFDS):
    splits = '', config.data.train_split
    return 'train' if config.data.validation_split in splits else 'validation'
  kind = tar_index if config.data.name == 'tars' else sources
  splits = kind.available_splits(config.data.path)
  return 'validation' if 'validation' in splits else 'train'


def measured_index(config: ConfigDict, row: int, count: int) -> int:
  """The index of the record that is measured or prompted for at a row.

  Args:
    config: configuration of the run.
    row: from 0; records repeat after `count` rows.
    count: number of records.
  """
  in_order = config.data.name in DRAWN
  return pipeline.record_index(row, count, _MEASURED_SEED, not in_order)


def _size(shape: Sequence[int]) -> tuple[int, int]:
  """Pixels a side, and frames, of an example."""
  return shape[-2], shape[0] if len(shape) == 4 else 1


def loss_names(config: ConfigDict, levels: Sequence[str]) -> list[str]:
  """Names of the losses that an evaluation measures, coarse to fine.

  They are 'held_out_loss_<level>', or 'train_split_loss_<level>' where the data
  set has no validation split.

  Args:
    config: configuration of the run.
    levels: names of the levels, see `mixed_batch.level_name`.
  """
  prefix = held_out_name(config, 'loss')
  return [f'{prefix}_{level}' for level in levels]


def held_out_name(config: ConfigDict, metric: str) -> str:
  """The name of a metric of the split that evaluations measure.

  It is 'held_out_<metric>', or 'train_split_<metric>' where the data set has no
  validation split.
  """
  is_train = held_out_split(config) == 'train'
  return f'{"train_split" if is_train else "held_out"}_{metric}'


def current_name(config: ConfigDict, metric: str) -> str:
  """The name of a metric; older runs called every loss a held-out one."""
  prefix, _, level = metric.rpartition('_')
  return loss_names(config, [level])[0] if prefix == _HELD_OUT else metric


def make_dataset(
  config: ConfigDict,
  split: str,
  shapes: Sequence[Sequence[int]],
  batch_sizes: Sequence[int],
  *,
  process_index: int,
  process_count: int,
  frame_spacing: int = 1,
  start_batch: int = 0,
  num_batches: int | None = None,
):
  """This process's part of the batches of a split, see `pipeline.make_dataset`.

  Records that are measured, and not trained on, are in the order of
  `measured_index`, whatever the seed of the run.

  An image has the resolution of the finest level that sees it, and a key in the
  batch for that level, see `mixed_batch.image_names`.

  Args:
    config: configuration of the run.
    split: as for `make_source`.
    shapes: of an example at each level, coarse to fine.
    batch_sizes: number of examples that each level sees, coarse to fine; the
      first is the size of the batch.
    process_index: index of this process.
    process_count: number of processes.
    frame_spacing: of clips in files, the finest level has every nth frame.
    start_batch: index of the first batch.
    num_batches: number of batches; None for endless training batches.
  """
  data, training = config.data, split == 'train' and num_batches is None
  of_files = not training and data.name not in DRAWN
  levels = mixed_batch.finest_levels(batch_sizes)
  sources, streams = _make_rows(config, split, shapes, levels, training)
  tokenizer = make_tokenizer(config, of_captions=True)

  def make_transform(level):
    pixels, frames = _size(shapes[level])
    return Transform(
      tokenizer,
      pixels,
      frames=frames,
      every=frame_spacing * _size(shapes[-1])[1] // frames,
      clip_start=_CLIP_STARTS[data.clip_start if training else 'centre'],
      flip=data.flip and training,
      random_crop=data.random_crop and training,
      leave_out=_leave_out(config),
      image_name=mixed_batch.image_names(shapes)[level],
      max_pixels=data.max_pixels,
    )

  rows = zip(sources, map(make_transform, levels))
  (source, transform), *further_rows = rows
  return pipeline.make_dataset(
    source,
    transform=transform,
    further_rows=further_rows,
    streams=streams,
    batch_size=batch_sizes[0],
    seed=_MEASURED_SEED if of_files else config.seed,
    shuffle=training or of_files,
    start_batch=start_batch,
    num_batches=num_batches,
    process_index=process_index,
    process_count=process_count,
    num_workers=data.num_workers if training else 0,
    # What is measured is read by as many threads instead.
    num_threads=data.num_threads
    if training
    else max(data.num_threads, data.num_workers),
    prefetch=data.prefetch,
  )


def _make_rows(
  config: ConfigDict,
  split: str,
  shapes: Sequence[Sequence[int]],
  levels: Sequence[int],
  training: bool,
) -> tuple[list[pipeline.Source], list[int]]:
  """Opens the source of each row of a batch's pattern.

  Args:
    config: configuration of the run.
    split: as for `make_source`.
    shapes: of an example at each level, coarse to fine.
    levels: the finest level of each row.
    training: whether the batches are trained on: only those have other images.

  Returns:
    The sources; and 0 for each row of the data set, 1 for each of images.
  """
  images = image_config(config) if training else None

  @functools.cache
  def open_once(of_images, size):
    return make_source(images if of_images else config, split, *size)

  sources, streams = [], []
  for level in levels:
    size = _size(shapes[level])
    of_images = images is not None and size[1] == 1
    name = (images if of_images else config).data.name
    # Procedural sets are drawn at each resolution; files have their own.
    if name not in DRAWN:
      size = _size(shapes[-1])
    sources.append(open_once(of_images, size))
    streams.append(int(of_images))
  return sources, streams


def data_fingerprint(
  config: ConfigDict, training: bool = True
) -> dict[str, str]:
  """Everything but the config that batches, and their text features, depend on.

  Args:
    config: configuration of the run.
    training: whether the batches are trained on: only those have the images of
      `data.image_set`.

  Returns:
    Hashes, versions of packages and the number of records, by name.
  """
  found = {
    'tokenizer': make_tokenizer(config).fingerprint(),
    **pipeline.package_versions(),
  }
  # The features of a data set may be those of another encoder than before.
  if config.text.encoder in ('t5', 'precomputed'):
    found['text_encoder'] = text_fingerprint(config)['encoder']
  if config.data.name in DRAWN:
    found['drawing'] = _VERSIONS[config.data.name]
  else:
    source = make_source(config, 'train', 0)
    found |= {'records': str(len(source)), 'files': source.fingerprint()}
  if not training:
    return found
  if config.data.image_set in DRAWN:
    found['image_drawing'] = _VERSIONS[config.data.image_set]
  elif config.data.image_set:
    source = make_image_source(config, 0)
    found |= {
      'image_records': str(len(source)),
      'image_files': source.fingerprint(),
    }
  return found


def batch_keys(
  config: ConfigDict,
  shapes: Sequence[Sequence[int]],
  batch_sizes: Sequence[int],
  batch: int,
) -> list[str]:
  """Keys of the records in a training batch, of all processes together.

  Args:
    config: configuration of the run.
    shapes: as for `make_dataset`.
    batch_sizes: as for `make_dataset`.
    batch: index of the batch.
  """
  levels = mixed_batch.finest_levels(batch_sizes)
  (source, *further), streams = _make_rows(
    config, 'train', shapes, levels, training=True
  )
  return pipeline.batch_keys(
    source,
    batch,
    batch_size=batch_sizes[0],
    seed=config.seed,
    shuffle=True,
    further_sources=further,
    streams=streams,
  )
