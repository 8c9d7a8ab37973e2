"""Opens the data sets of a configuration."""

from collections.abc import Sequence
import dataclasses

from ml_collections import ConfigDict

from mdm_jax import mixed_batch
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data import (
  pipeline,
  precomputed,
  shapes,
  sources,
  tar_index,
  tfds_source,
)
from mdm_jax.data.labels import LabelledSource
from mdm_jax.data.transforms import Transform

_DATA_SETS = ('shapes', 'captioned_images', 'tars', 'tfds:NAME')
_TFDS = 'tfds:'
_HELD_OUT = 'held_out_loss'


def make_source(
  config: ConfigDict, split: str, resolution: int
) -> pipeline.Source:
  """Opens a split of the data set.

  Args:
    config: configuration of the run.
    split: 'train' or 'validation'; shapes also have 'held_out'.
    resolution: resolution of procedural shapes in pixels; image files are
      returned in their own resolution.

  Raises:
    FileNotFoundError: a file of the data set is missing.
    ValueError: there is no such data set, split or feature, or the data set has
      another number of classes than the config.
  """
  data, text = config.data, config.text
  source = _make_records(config, split, resolution)
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
    return precomputed.PrecomputedText(
      source,
      data.path,
      split,
      precomputed.read_info(data.path),
      make_tokenizer(config, of_captions=True),
      _leave_out(config),
    )
  return source


def _make_records(config: ConfigDict, split: str, resolution: int):
  data = config.data
  if data.name == 'shapes':
    source = shapes.ShapesSource(config.seed, split, data.size, resolution)
    # What is measured stays comparable.
    if split == 'train':
      source = dataclasses.replace(source, two_objects=data.two_objects)
    return source
  if data.name.startswith(_TFDS):
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


def _leave_out(config: ConfigDict) -> bool:
  return config.text.long_captions == 'leave_out'


def held_out_split(config: ConfigDict) -> str:
  """The split to validate on: 'train' if the data set has no other one."""
  if config.data.name == 'shapes':
    return 'held_out'
  if config.data.name.startswith(_TFDS):
    splits = '', config.data.train_split
    return 'train' if config.data.validation_split in splits else 'validation'
  kind = tar_index if config.data.name == 'tars' else sources
  splits = kind.available_splits(config.data.path)
  return 'validation' if 'validation' in splits else 'train'


def loss_names(config: ConfigDict, resolutions: Sequence[int]) -> list[str]:
  """Names of the losses that an evaluation measures, coarse to fine.

  They are 'held_out_loss_<px>', or 'train_split_loss_<px>' where the data set
  has no validation split.
  """
  is_train = held_out_split(config) == 'train'
  prefix = 'train_split_loss' if is_train else _HELD_OUT
  return [f'{prefix}_{pixels}' for pixels in resolutions]


def current_name(config: ConfigDict, metric: str) -> str:
  """The name of a metric; older runs called every loss a held-out one."""
  prefix, _, pixels = metric.rpartition('_')
  return loss_names(config, [pixels])[0] if prefix == _HELD_OUT else metric


def make_dataset(
  config: ConfigDict,
  split: str,
  resolutions: Sequence[int],
  batch_sizes: Sequence[int],
  *,
  process_index: int,
  process_count: int,
  start_batch: int = 0,
  num_batches: int | None = None,
):
  """This process's part of the batches of a split, see `pipeline.make_dataset`.

  An image has the resolution of the finest level that sees it, and a key in the
  batch for that level, see `mixed_batch.image_names`.

  Args:
    config: configuration of the run.
    split: as for `make_source`.
    resolutions: resolutions of the levels in pixels, coarse to fine.
    batch_sizes: number of examples that each level sees, coarse to fine; the
      first is the size of the batch.
    process_index: index of this process.
    process_count: number of processes.
    start_batch: index of the first batch.
    num_batches: number of batches; None for endless training batches.
  """
  data, training = config.data, split == 'train' and num_batches is None
  finest = make_source(config, split, resolutions[-1])
  tokenizer = make_tokenizer(config, of_captions=True)

  def row(level):
    source = finest
    if data.name == 'shapes':  # Shapes are drawn at each resolution.
      source = make_source(config, split, resolutions[level])
    return source, Transform(
      tokenizer,
      resolutions[level],
      flip=data.flip and training,
      random_crop=data.random_crop and training,
      leave_out=_leave_out(config),
      image_name=mixed_batch.image_names(resolutions)[level],
      max_pixels=data.max_pixels,
    )

  (source, transform), *further_rows = map(
    row, mixed_batch.finest_levels(batch_sizes)
  )
  return pipeline.make_dataset(
    source,
    transform=transform,
    further_rows=further_rows,
    batch_size=batch_sizes[0],
    seed=config.seed,
    shuffle=training,
    start_batch=start_batch,
    num_batches=num_batches,
    process_index=process_index,
    process_count=process_count,
    num_workers=data.num_workers if training else 0,
    num_threads=data.num_threads,
    prefetch=data.prefetch,
  )


def data_fingerprint(config: ConfigDict) -> dict[str, str]:
  """Everything but the config that the order and pixels of batches depend on.

  Returns:
    Hashes, versions of packages and the number of records, by name.
  """
  found = {
    'tokenizer': make_tokenizer(config).fingerprint(),
    **pipeline.package_versions(),
  }
  if config.data.name != 'shapes':
    source = make_source(config, 'train', 0)
    found |= {'records': str(len(source)), 'files': source.fingerprint()}
  return found


def batch_keys(
  config: ConfigDict, resolution: int, batch_size: int, batch: int
) -> list[str]:
  """Keys of the records in a training batch, of all processes together.

  Args:
    config: configuration of the run.
    resolution: as for `make_source`.
    batch_size: number of examples, over all processes.
    batch: index of the batch.
  """
  return pipeline.batch_keys(
    make_source(config, 'train', resolution),
    batch,
    batch_size=batch_size,
    seed=config.seed,
    shuffle=True,
  )
