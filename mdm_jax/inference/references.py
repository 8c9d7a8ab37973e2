"""Cache of the features of reference images, for FID and other set metrics.

It lies in ~/.cache/mdm_jax/references, and is keyed by all that the features
depend on: the images and the weights of the network.
"""

from collections.abc import Callable, Iterator, Mapping
import hashlib
import json
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from mdm_jax.builders.data import (
  DRAWN,
  data_fingerprint,
  held_out_split,
  make_dataset,
  make_source,
)
from mdm_jax.builders.stage import Stage
from mdm_jax.eval import fid
from mdm_jax.inference.feature_extractors import (
  FeatureNetwork,
  ImageFolder,
  Inception,
  collect,
  log_progress,
)
from mdm_jax.runtime import compilation_cache, files


def of_folder(
  directory: str,
  network: Inception,
  batch_size: int,
  cache: str | None,
  resolution: int | None = None,
) -> tuple[fid.Sample, dict]:
  """Features of the images in a directory, and what they depend on (JSON).

  Args:
    directory: of the images.
    network: extracts the features.
    batch_size: images at once.
    cache: directory of cached features; None for the user's own.
    resolution: of `ImageFolder`.

  Raises:
    FileNotFoundError, ValueError: an image cannot be read.
  """
  folder = ImageFolder(directory, resolution)
  settings = {
    'files': folder.fingerprint(),
    'resolution': resolution,
    'inception': network.fingerprint,
  }
  batches = log_progress(
    folder.batches(batch_size), len(folder), 'reference images'
  )
  sample = cached(
    cache_directory(cache),
    settings,
    lambda: collect(network, batches, len(folder)),
  )
  return sample, settings | {'directory': directory}


def of_split(
  stage: Stage,
  network: FeatureNetwork,
  split: str | None,
  max_images: int,
  cache: str | None,
) -> tuple[fid.Sample, dict]:
  """Features of a split of the data set, and what they depend on (JSON).

  Args:
    stage: whose finest resolution the images have.
    network: extracts the features.
    split: of the data set; None for the held-out one.
    max_images: images or clips at most, see `builders.data.measured_index`.
    cache: directory of cached features; None for the user's own.
  """
  config, resolution = stage.config, stage.resolutions[-1]
  split = split or held_out_split(config)
  source = make_source(config, split, resolution)
  count = min(max_images, len(source))
  is_drawn = config.data.name in DRAWN
  fingerprint = data_fingerprint(config, training=False)
  fingerprint.pop('text_encoder', None)  # Images do not depend on it.
  settings = {
    'data': config.data.name,
    'split': split,
    'resolution': resolution,
    'count': count,
    network.name: network.fingerprint,
    'fingerprint': fingerprint,
    'files': f'seed {config.seed}' if is_drawn else source.fingerprint(),
    'max_pixels': config.data.max_pixels,
  }
  if not is_drawn:
    settings['order'] = 'shuffled'  # Once it was that of the files.
  elif split == 'train':
    settings['two_objects'] = config.data.two_objects
  if config.data.name.startswith('tfds:'):
    # Images without a text are bad, too.
    text = 'label' if config.text.encoder == 'label' else 'caption'
    settings |= {
      'slice': config.data[f'{split}_split'],
      'image': config.data.image,
      text: config.data[text],
    }
  shape = stage.model.image_shapes[-1]
  if len(shape) == 4:
    settings |= {'frames': shape[0], 'frame_spacing': stage.frame_spacing}
  rows = count * network.num_rows(shape)
  batches = log_progress(
    images_of_split(stage, split, count), count, 'reference images'
  )
  sample = cached(
    cache_directory(cache), settings, lambda: collect(network, batches, rows)
  )
  return sample, settings


def images_of_split(
  stage: Stage, split: str, count: int
) -> Iterator[np.ndarray]:
  """Batches of some images of the finest level, without bad ones.

  They do not depend on `text.long_captions`.

  Yields:
    uint8 [<= B, H, H, 3], or clips [<= B, T, H, H, 3].
  """
  config = stage.config.copy_and_resolve_references()
  config.text.long_captions = 'cut'
  size = config.eval.batch_size
  left = count
  for batch in make_dataset(
    config,
    split,
    stage.model.image_shapes[-1:],
    (size,),
    frame_spacing=stage.frame_spacing,
    process_index=0,
    process_count=1,
    num_batches=-(-count // size),
  ):
    images, is_bad = batch['image'][:left], batch['bad'][:left]
    left -= len(images)
    # The replacement of a bad record appears in its own place as well.
    if not is_bad.all():
      yield images[~is_bad]


def cache_directory(directory: str | None) -> epath.Path | None:
  """The directory of the cache; None if the user's own cannot be used."""
  if directory:
    return epath.Path(directory)
  return compilation_cache.directory('references')


def cached(
  directory: epath.Path | None,
  fingerprint: Mapping[str, Any],
  make: Callable[[], fid.Sample],
) -> fid.Sample:
  """Returns `make()`, or what it has returned before for the same fingerprint.

  If a file of the cache cannot be written, there is a warning.

  Args:
    directory: of the cache; None for none.
    fingerprint: all that the features depend on, as JSON.
    make: called if the cache does not have them, or cannot be read.
  """

  def is_right(arrays):
    (width,) = arrays['mean'].shape
    return (
      arrays['count'].shape == ()
      and arrays['count'].dtype.kind in 'iu'
      and arrays['scatter'].shape == (width, width)
      and arrays['rows'].shape == (len(arrays['rows']), width)
    )

  return fid.Sample.from_arrays(
    cached_arrays(
      'reference features',
      directory,
      fingerprint,
      lambda: make().to_arrays(),
      is_right,
    )
  )


def cached_arrays(
  what: str,
  directory: epath.Path | None,
  fingerprint: Mapping[str, Any],
  make: Callable[[], dict[str, np.ndarray]],
  is_right: Callable[[dict[str, np.ndarray]], bool],
) -> dict[str, np.ndarray]:
  """As `cached`, for arrays by name.

  Args:
    what: their name in log lines.
    directory: of the cache; None for none.
    fingerprint: all that they depend on, as JSON.
    make: called if the cache does not have them, or cannot be read.
    is_right: whether arrays that were read are what `make` returns.
  """
  if directory is None:
    return make()
  text = json.dumps(fingerprint, sort_keys=True)
  name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
  path = directory / f'{name}.npz'
  if path.exists():
    try:
      arrays = _read(path, text, is_right)
      logging.info('Read the %s from %s.', what, path)
      return arrays
    # Zip files and NumPy's headers break in too many ways to list.
    except Exception as error:
      reason = ' '.join(str(error).split())
      logging.warning('%s is damaged (%s): it is made anew.', path, reason)
    if path.is_dir():
      files.set_aside(path)
  arrays = make()
  try:
    with files.replacing(path, shared=True) as temporary:
      with temporary.open('wb') as file:
        np.savez(file, fingerprint=text, **arrays)
  except OSError as error:
    logging.warning('The %s are not cached: %s', what, error)
  return arrays


def _read(
  path: epath.Path, fingerprint: str, is_right: Callable[..., bool]
) -> dict[str, np.ndarray]:
  with files.local_copy(path) as copy, np.load(copy) as file:
    arrays = {name: np.asarray(value) for name, value in file.items()}
  is_same = str(arrays.pop('fingerprint')) == fingerprint
  are_numbers = all(value.dtype.kind in 'iuf' for value in arrays.values())
  if not (is_same and are_numbers and is_right(arrays)):
    raise ValueError('it has other arrays')
  return arrays
