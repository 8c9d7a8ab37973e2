"""Networks that turn images and captions into features, on all devices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import hashlib
import os
import time
import types
from typing import Any

from absl import logging
from etils import epath
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mdm_jax.data import folders, images
from mdm_jax.data.lines import read_lines
from mdm_jax.eval import clip, fid, i3d, inception
from mdm_jax.eval.clip_tokenizer import ClipTokenizer
from mdm_jax.interop import hugging_face
from mdm_jax.report import console, sample_directory
from mdm_jax.runtime import buckets, files, sharding

_LOG_SECONDS = 10.0
# As that of the networks that published numbers are of.
PRECISION = 'float32'
# Rows that an `fid.Sample` keeps for KID, precision and recall: 80 MB.
MAX_ROWS = 10_000
# Of an image of a directory. They are decoded one at a time, in up to 1 GB, so
# there is room for more than in the loaders of training.
_MAX_PIXELS = 128_000_000
_REQUESTS = 64  # files of a bucket that are requested at once


def exactly(function: Callable) -> Callable:
  """The function, traced such that devices multiply in float32.

  By default TPUs and GPUs would round what is multiplied to 8 and 10 bits.
  """

  def traced(*arguments):
    with jax.default_matmul_precision(PRECISION):
      return function(*arguments)

  return traced


def _jit(
  function: Callable, params: Any, batch_size: int, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """Jits a network for up to `batch_size` rows, which are filled up."""
  jitted = jax.jit(
    exactly(function),
    out_shardings=sharding.replicated(mesh),
    compiler_options=sharding.compiler_options(mesh),
  )

  def apply(rows):
    filled = rows[np.arange(batch_size) % len(rows)]
    batch = sharding.shard_batch({'rows': filled}, mesh)
    return np.asarray(jitted(params, batch['rows']))[: len(rows)]

  return apply


class FeatureNetwork:
  """A network whose features are compared: see `Inception` and `I3D`.

  Attributes:
    name: of the network, in settings.
    width: of the features.
    fingerprint: of its weights, as JSON.
  """

  name: str
  # Its module: `preprocess`, `from_state_dict` and what they stand for.
  _definition: types.ModuleType
  _model: nn.Module

  def __init__(self, path: str, batch_size: int, mesh: Mesh):
    """Reads the weights.

    Args:
      path: of the file of weights.
      batch_size: images or clips at once, at most; a multiple of the mesh's
        shards.
      mesh: the devices.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it is of another
        network.
    """
    if epath.Path(path).is_dir():
      raise ValueError(f'{path} is a directory: give the file in it.')
    tensors = hugging_face.open_tensors(path)
    definition, model = self._definition, self._model
    try:
      params = definition.from_state_dict(
        hugging_face.select(tensors, definition.NAMES)
      )
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    digest = hashlib.blake2b(epath.Path(path).read_bytes(), digest_size=8)
    self.width = definition.NUM_FEATURES
    self.fingerprint = {
      'weights': digest.hexdigest(),
      'resize': definition.RESIZE,
      'precision': PRECISION,
    }
    params = jax.device_put(params, sharding.replicated(mesh))
    self._apply = _jit(
      lambda params, x: model.apply(
        {'params': params}, definition.preprocess(x)
      ),
      params,
      batch_size,
      mesh,
    )

  def encode(self, batch: np.ndarray) -> np.ndarray:
    """Features float32 `[N, width]` of a batch, uint8."""
    return self._apply(batch)

  def num_rows(self, shape: Sequence[int]) -> int:
    """Features of an example of this shape."""
    return 1


class Inception(FeatureNetwork):
  """The network of the FID, of images `[B, H, W, 3]`.

  Of clips `[B, T, H, W, 3]` each frame is an image. The weights are
  pt_inception-2015-12-05-6726825d.pth.
  """

  name = 'inception'
  _definition, _model = inception, inception.Inception()

  def encode(self, batch: np.ndarray) -> np.ndarray:
    """Features `[B, 2048]` of images, `[B * T, 2048]` of clips."""
    if batch.ndim == 4:
      return self._apply(batch)
    frames = [self._apply(frame) for frame in batch.swapaxes(0, 1)]
    return np.stack(frames, 1).reshape(-1, self.width)

  def num_rows(self, shape: Sequence[int]) -> int:
    """The number of frames."""
    return shape[0] if len(shape) == 4 else 1


class I3D(FeatureNetwork):
  """The network of the FVD, of clips `[B, T, H, W, 3]`.

  The weights are rgb_imagenet.pt, also known as i3d_pretrained_400.pt.
  """

  name = 'i3d'
  _definition, _model = i3d, i3d.I3D()


class Clip:
  """Scores how well images fit captions.

  Attributes:
    fingerprint: of its weights, as JSON.
  """

  def __init__(self, directory: str, batch_size: int, mesh: Mesh):
    """Reads a directory as Hugging Face lays it out.

    Args:
      directory: with `config.json`, the weights, `vocab.json` and
        `merges.txt`; or the file of the weights among them.
      batch_size: images at once, at most; a multiple of the mesh's shards.
      mesh: the devices.

    Raises:
      FileNotFoundError, ValueError: a file is missing, damaged or of another
        model.
    """
    folder = hugging_face.folder(directory)
    try:
      self._spec = spec = clip.ClipSpec.from_hugging_face(
        hugging_face.read_config(directory)
      )
      model = clip.Clip(spec)
      shapes = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, spec.image_size, spec.image_size, 3), jnp.uint8),
        jnp.zeros((1, spec.max_length), jnp.int32),
      )['params']
      names = [*map(clip.hugging_face_name, traverse_util.flatten_dict(shapes))]
      tensors = hugging_face.select(hugging_face.open_tensors(directory), names)
      params = hugging_face.load(
        tensors,
        shapes,
        jax.tree.map(lambda _: sharding.replicated(mesh), shapes),
        clip.hugging_face_name,
      )
      vocabulary = hugging_face.read_json(folder / 'vocab.json')
      if not all(
        type(token) is int and 0 <= token < spec.vocab_size
        for token in vocabulary.values()
      ):
        raise ValueError(
          'vocab.json does not number the tokens that the network knows'
        )
      if len(vocabulary) > spec.vocab_size:
        raise ValueError(
          f'vocab.json has {len(vocabulary)} tokens, the '
          f'network knows {spec.vocab_size}'
        )
      if not (merges := folder / 'merges.txt').exists():
        raise FileNotFoundError(f'{merges} does not exist: download it too.')
      self._tokenizer = tokenizer = ClipTokenizer(
        vocabulary,
        read_lines(merges),
        spec.max_length,
      )
    except ValueError as error:
      raise ValueError(f'{directory}: {error}') from None
    self.fingerprint = {
      'weights': hugging_face.fingerprint(tensors, names),
      'image_size': spec.image_size,
      'patch_size': spec.patch_size,
      'precision': PRECISION,
    }
    self._images = _jit(
      lambda params, images: model.apply(
        {'params': params}, images, method='encode_images'
      ),
      params,
      batch_size,
      mesh,
    )
    self._text = _jit(
      lambda params, tokens: model.apply(
        {'params': params}, tokens, tokenizer.end, method='encode_text'
      ),
      params,
      batch_size,
      mesh,
    )

  def scores(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
    """Scores `[B]` of images and B captions, see `clip.scores`.

    Args:
      images: uint8 `[B, H, W, 3]`, or `[B, T, H, W, 3]`: the mean over frames.
      captions: of each.
    """
    tokens = np.stack(list(map(self._tokenizer.encode, captions)))
    text, found = self._text(tokens), []
    for frame in images.swapaxes(0, 1) if images.ndim == 5 else [images]:
      resized = [clip.resize(image, self._spec.image_size) for image in frame]
      found.append(clip.scores(self._images(np.stack(resized)), text))
    return np.mean(found, axis=0)


def log_progress(
  batches: Iterable[Any], total: int, what: str
) -> Iterator[Any]:
  """Passes batches on, and logs the progress every ten seconds.

  Args:
    batches: arrays of images, or tuples that begin with one.
    total: number of images.
    what: their name in log lines.
  """
  begin = last = time.monotonic()
  done = 0
  for batch in batches:
    yield batch
    done += len(batch[0] if isinstance(batch, tuple) else batch)
    now = time.monotonic()
    if now > last + _LOG_SECONDS or done == total:
      last = now
      logging.info(
        '%s: %d of %d, %.1f/s, %s left',
        what,
        done,
        total,
        done / (now - begin),
        console.duration((total - done) * (now - begin) / done),
      )


def collect(
  network: FeatureNetwork, batches: Iterable[np.ndarray], total: int
) -> fid.Sample:
  """All features, at most `total`, of examples that are given in batches."""
  sample = fid.Sample(network.width, total, MAX_ROWS)
  for batch in batches:
    sample.add(network.encode(batch))
  return sample


class ImageFolder:
  """The images of a directory, all of one size.

  If `mdm_jax.sample` wrote the directory, they are the finest level of each
  sample, in the order of the samples. Otherwise they are all images in it and
  in its subdirectories, ordered by path, without what systems leave there; of
  subdirectories that `mdm_jax.sample` wrote, again the finest level.
  Images are decoded as for training: upright, transparency on white.
  """

  def __init__(
    self, directory: str | os.PathLike, resolution: int | None = None
  ):
    """Finds the images, and reads the size of each.

    Args:
      directory: of the images.
      resolution: if it is given, the centre square of each image is resized to
        this many pixels a side, as in training.

    Raises:
      FileNotFoundError: there are none, or a sample is missing.
      ValueError: a file cannot be read or is no image, or without `resolution`
        an image has another size than the first.
    """
    self.resolution = resolution
    samples = sample_directory.finest_images(directory)
    self._paths = _find_images(directory) if samples is None else samples
    if not self._paths:
      raise FileNotFoundError(
        f'{directory} has no images ({", ".join(images.SUFFIXES)}).'
      )
    logging.info(
      '%s: %d images, %s.',
      directory,
      len(self),
      'with those in subdirectories'
      if samples is None
      else 'the finest level of each sample',
    )
    digest, first = hashlib.blake2b(digest_size=8), None
    for path, data in _contents(self._paths):
      content, size = _use(path, data, self._hash_and_size)
      digest.update(content)
      first = first or size
      if size != first and not resolution:
        raise ValueError(
          f'{path} has {size[0]} x {size[1]} pixels, the first image '
          f'{first[0]} x {first[1]}: give images of one size, or --resolution '
          'to crop and resize all.'
        )
    self._fingerprint = digest.hexdigest()

  def __len__(self) -> int:
    """Number of images."""
    return len(self._paths)

  def fingerprint(self) -> str:
    """Changes with the files and their order."""
    return self._fingerprint

  def batches(self, size: int) -> Iterator[np.ndarray]:
    """uint8 `[<= size, H, W, 3]`.

    Raises:
      ValueError: an image cannot be decoded.
    """
    for start in range(0, len(self), size):
      paths = self._paths[start : start + size]
      yield np.stack(
        [_use(path, data, self._decode) for path, data in _contents(paths)]
      )

  def _hash_and_size(
    self, data: bytes, key: str
  ) -> tuple[bytes, tuple[int, int]]:
    size = images.image_size(data, self.resolution, key, _MAX_PIXELS)
    return hashlib.blake2b(data).digest(), size

  def _decode(self, data: bytes, key: str) -> np.ndarray:
    if self.resolution:
      return images.decode_image(
        data, self.resolution, key, max_pixels=_MAX_PIXELS
      )[0]
    image, _ = images.load_image(data, key=key, max_pixels=_MAX_PIXELS)
    return np.asarray(image)


def _contents(
  paths: Sequence[epath.Path],
) -> Iterator[tuple[epath.Path, bytes]]:
  """The bytes of files; of those in a bucket many are requested at once.

  Raises:
    ValueError: one cannot be read.
  """
  for start in range(0, len(paths), _REQUESTS):
    some = paths[start : start + _REQUESTS]
    if files.is_local(some[0]):
      for path in some:
        try:
          yield path, path.read_bytes()
        except OSError as error:
          raise ValueError(f'{path} cannot be read: {error}.') from None
      continue
    names = list(map(os.fspath, some))
    with files.naming_errors(some[0].parent):
      found = buckets.file_system(names[0]).cat_ranges(
        names, [0] * len(names), [None] * len(names), on_error='raise'
      )
    yield from zip(some, found)


def _use(
  path: epath.Path, data: bytes, use: Callable[[bytes, str], Any]
) -> Any:
  """What `use(data, name)` returns for the bytes of an image file.

  Raises:
    ValueError: they are none.
  """
  try:
    return use(data, str(path))
  except images.BadRecord as error:
    raise ValueError(f'{error}: remove the file, or replace it.') from None


def _find_images(directory: str | os.PathLike) -> list[epath.Path]:
  folder = epath.Path(directory)
  names = [*folders.walk(folder)]
  found, of_samples = [], sample_directory.find_sample_directories(names)
  for name in of_samples:  # Of several machines.
    found += sample_directory.finest_images(folder / name) or ()
  inside = tuple(f'{name}/' for name in of_samples)
  return found + sorted(
    folder / name
    for name in names
    if (folder / name).suffix.lower() in images.SUFFIXES
    and not name.startswith(inside)
    # That of epath takes a named pipe for a file.
    and (not files.is_local(folder) or os.path.isfile(folder / name))
  )
