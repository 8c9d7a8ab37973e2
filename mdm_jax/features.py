"""From pictures and captions to features, spread over the devices."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import hashlib
import json
import pathlib
import time
from typing import Any
import zipfile

from absl import logging
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from PIL import Image

from mdm_jax import hugging_face, metrics, sharding, torch_files
from mdm_jax.eval import clip, fid, inception
from mdm_jax.eval.clip_tokenizer import ClipTokenizer

_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_REPORT_EVERY = 10  # seconds
# Rows of an `fid.Sample`, for what needs features: 80 MB of Inception's.
KEPT = 10_000


def _jit(
  function: Callable, params: Any, batch_size: int, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """A network over at most so many rows, which it fills up."""
  jitted = jax.jit(
    function,
    out_shardings=sharding.replicated(mesh),
    compiler_options=sharding.compiler_options(mesh),
  )

  def apply(rows):
    filled = rows[np.arange(batch_size) % len(rows)]
    batch = sharding.shard_batch({'rows': filled}, mesh)
    return np.asarray(jitted(params, batch['rows']))[: len(rows)]

  return apply


class Inception:
  """The network of the FID: uint8 `[B, H, W, 3]` -> float32 `[B, 2048]`.

  Attributes:
    width: of the features.
    fingerprint: of its weights, as JSON.
  """

  width = inception.NUM_FEATURES

  def __init__(self, path: str, batch_size: int, mesh: Mesh):
    """Reads the weights.

    Args:
      path: of the standard's file.
      batch_size: pictures at once, at most; a multiple of the mesh's shards.
      mesh: the devices.

    Raises:
      FileNotFoundError, ValueError: no such file, or of another network.
    """
    tensors = torch_files.read_state_dict(path)
    try:
      params = inception.from_state_dict(tensors)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    digest = hashlib.blake2b(pathlib.Path(path).read_bytes(), digest_size=8)
    self.fingerprint = {
      'weights': digest.hexdigest(),
      'resize': inception.RESIZE,
    }
    params = jax.device_put(params, sharding.replicated(mesh))
    model = inception.Inception()
    self.encode = _jit(
      lambda params, images: model.apply(
        {'params': params}, inception.preprocess(images)
      ),
      params,
      batch_size,
      mesh,
    )


class Clip:
  """How well pictures fit captions.

  Attributes:
    fingerprint: of its weights, as JSON.
  """

  def __init__(self, directory: str, batch_size: int, mesh: Mesh):
    """Reads a directory as Hugging Face lays it out.

    Args:
      directory: with `config.json`, the safetensors, `vocab.json` and
        `merges.txt`.
      batch_size: pictures at once, at most; a multiple of the mesh's shards.
      mesh: the devices.

    Raises:
      FileNotFoundError, ValueError: a file is missing, damaged or of another
        model.
    """
    folder = pathlib.Path(directory)
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
      tensors = hugging_face.open_tensors(directory)
      params = hugging_face.load(
        tensors,
        shapes,
        jax.tree.map(lambda _: sharding.replicated(mesh), shapes),
        clip.hugging_face_name,
      )
      vocabulary = hugging_face.read_json(folder / 'vocab.json')
      if len(vocabulary) > spec.vocab_size:
        raise ValueError(
          f'vocab.json has {len(vocabulary)} tokens, the '
          f'network knows {spec.vocab_size}'
        )
      if not (merges := folder / 'merges.txt').exists():
        raise FileNotFoundError(f'{merges} does not exist: download it too.')
      self._tokenizer = tokenizer = ClipTokenizer(
        vocabulary,
        merges.read_text(encoding='utf-8').splitlines(),
        spec.max_length,
      )
    except ValueError as error:
      raise ValueError(f'{directory}: {error}') from None
    self.fingerprint = {
      'weights': hugging_face.fingerprint(
        tensors, map(clip.hugging_face_name, traverse_util.flatten_dict(shapes))
      ),
      'image_size': spec.image_size,
      'patch_size': spec.patch_size,
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
    """`clip.scores` of uint8 `[B, H, W, 3]` and B captions, `[B]`."""
    resized = np.stack(
      [clip.resize(image, self._spec.image_size) for image in images]
    )
    tokens = np.stack(list(map(self._tokenizer.encode, captions)))
    return clip.scores(self._images(resized), self._text(tokens))


def reported(batches: Iterable[Any], total: int, what: str) -> Iterator[Any]:
  """The same batches; logs now and then how far they are.

  Args:
    batches: of pictures, or tuples that begin with some.
    total: pictures.
    what: they are.
  """
  begin = last = time.monotonic()
  done = 0
  for batch in batches:
    yield batch
    done += len(batch[0] if isinstance(batch, tuple) else batch)
    now = time.monotonic()
    if now > last + _REPORT_EVERY or done == total:
      last = now
      logging.info(
        '%s: %d of %d, %.1f/s, %s left',
        what,
        done,
        total,
        done / (now - begin),
        metrics.duration((total - done) * (now - begin) / done),
      )


def collect(
  network: Inception, batches: Iterable[np.ndarray], total: int
) -> fid.Sample:
  """Features of at most `total` pictures, given in batches."""
  sample = fid.Sample(network.width, total, KEPT)
  for batch in batches:
    sample.add(network.encode(batch))
  return sample


def cached(
  directory: pathlib.Path,
  fingerprint: Mapping[str, Any],
  make: Callable[[], fid.Sample],
) -> fid.Sample:
  """What `make` returns, or has returned before for the same fingerprint.

  Args:
    directory: where it is kept.
    fingerprint: of all that decides on it, as JSON.
    make: called if it isn't there.

  Raises:
    ValueError: a file is damaged.
  """
  text = json.dumps(fingerprint, sort_keys=True)
  name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
  path = directory / f'{name}.npz'
  if path.exists():
    logging.info('Reading the reference from %s.', path)
    try:
      with np.load(path) as file:
        return fid.Sample.from_arrays(file)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(
        f'{path} is damaged ({error}): delete it, and it is made anew.'
      ) from None
  sample = make()
  directory.mkdir(parents=True, exist_ok=True)
  # At once, as the process may be stopped here, and another write it too.
  temporary = path.with_name(f'{name}.{time.time_ns()}.tmp')
  with temporary.open('wb') as file:
    np.savez(file, fingerprint=text, **sample.to_arrays())
  temporary.replace(path)
  return sample


class Folder:
  """The pictures in a directory, all of one size, in the order of names."""

  def __init__(self, directory: str):
    """Lists them.

    Raises:
      FileNotFoundError: there are none.
    """
    self._paths = sorted(
      path
      for path in pathlib.Path(directory).glob('*')
      if path.suffix.lower() in _SUFFIXES
    )
    if not self._paths:
      raise FileNotFoundError(
        f'{directory} has no pictures ({", ".join(_SUFFIXES)}).'
      )

  def __len__(self) -> int:
    """The number of pictures."""
    return len(self._paths)

  def fingerprint(self) -> str:
    """Changes with the files and their order."""
    digest = hashlib.blake2b(digest_size=8)
    for path in self._paths:
      digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()

  def batches(self, size: int) -> Iterator[np.ndarray]:
    """uint8 `[<= size, H, W, 3]`.

    Raises:
      ValueError: a picture cannot be read, or its size is another.
    """
    shape = None
    for start in range(0, len(self), size):
      images = []
      for path in self._paths[start : start + size]:
        try:
          with Image.open(path) as image:
            images.append(np.asarray(image.convert('RGB')))
        except (OSError, Image.DecompressionBombError) as error:
          raise ValueError(f'{path} cannot be read: {error}.') from None
        shape = shape or images[-1].shape
        if images[-1].shape != shape:
          raise ValueError(
            f'{path} has {images[-1].shape[:2]} pixels, the first picture '
            f'{shape[:2]}: give pictures of one size.'
          )
      yield np.stack(images)
