"""Model directories in Hugging Face's layout, read straight into shards.

A directory holds `config.json` and either `model.safetensors` or several
files that `model.safetensors.index.json` lists. Safetensors files hold numbers
only, so that reading them runs no code.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import hashlib
import json
import pathlib
from typing import Any

from flax import traverse_util
import jax
import numpy as np
import safetensors

_FILE = 'model.safetensors'
_INDEX = f'{_FILE}.index.json'


def read_config(directory: str) -> dict[str, Any]:
  """Reads `config.json`.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is not JSON.
  """
  return read_json(pathlib.Path(directory) / 'config.json')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file of a model directory.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is not JSON.
  """
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: give a model's directory as Hugging Face "
      'lays it out.'
    )
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
      f'{path} is no JSON ({error}): download it again.'
    ) from None


def open_tensors(directory: str) -> dict[str, Any]:
  """Opens every tensor of a directory, without reading its numbers.

  Returns:
    Safetensors slices by name. A slice has `get_shape()`, and indexing it reads
    the indexed part.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or a tensor is not where the index says.
  """
  directory = pathlib.Path(directory)
  index = directory / _INDEX
  if index.exists():
    places = read_json(index).get('weight_map')
    if not isinstance(places, dict):
      raise ValueError(f'{index} has no weight_map: download it again.')
  else:
    places = dict.fromkeys(_open(directory / _FILE).keys(), _FILE)
  files = {name: _open(directory / name) for name in set(places.values())}
  held = {name: set(file.keys()) for name, file in files.items()}
  for tensor, name in places.items():
    if tensor not in held[name]:
      raise ValueError(
        f'{directory / name} lacks {tensor}, which {_INDEX} says it has: '
        'download both again.'
      )
  return {
    tensor: files[name].get_slice(tensor) for tensor, name in places.items()
  }


def fingerprint(tensors: Mapping[str, Any], names: Iterable[str]) -> str:
  """Hash that identifies a model, from the shapes and first rows of tensors.

  Args:
    tensors: from `open_tensors`.
    names: names of the tensors to hash.

  Returns:
    16 hexadecimal digits.

  Raises:
    ValueError: one of the tensors is missing.
  """
  digest = hashlib.blake2b(digest_size=8)
  for name in sorted(names):
    if name not in tensors:
      raise ValueError(f'{name} is missing: download the whole model again.')
    tensor = tensors[name]
    digest.update(f'{name} {tensor.get_dtype()} {tensor.get_shape()}'.encode())
    digest.update(np.asarray(tensor[:1]).tobytes())
  return digest.hexdigest()


def read_file(path: str) -> dict[str, Any]:
  """Reads all tensors of one file into NumPy arrays.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is damaged.
  """
  file = _open(pathlib.Path(path))
  return {name: file.get_tensor(name) for name in file.keys()}


def load(
  tensors: Mapping[str, Any],
  shapes: Any,
  shardings: Any,
  name_of: Callable[[Sequence[str]], str],
) -> dict:
  """Loads parameters from opened tensors; each device reads only its shards.

  Args:
    tensors: from `open_tensors`; tensors that no leaf needs are ignored.
    shapes: nested dicts of `jax.ShapeDtypeStruct`.
    shardings: the sharding of every leaf, in the same structure.
    name_of: maps a leaf's path to its tensor's name. Leaves called 'kernel' are
      transposed in the files.

  Returns:
    Nested dicts of `jax.Array` in the dtypes of `shapes`.

  Raises:
    ValueError: tensors are missing or have other shapes. The message names
      them.
  """
  shapes = traverse_util.flatten_dict(shapes)
  shardings = traverse_util.flatten_dict(shardings)
  names = {path: name_of(path) for path in shapes}
  problems = []
  for path, leaf in shapes.items():
    wanted = leaf.shape[::-1] if path[-1] == 'kernel' else leaf.shape
    if names[path] not in tensors:
      problems.append(f'{names[path]} is missing')
    elif (found := tuple(tensors[names[path]].get_shape())) != wanted:
      problems.append(f'{names[path]} is {found}, not {wanted}')
  if problems:
    more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
    raise ValueError(
      'The weights do not fit: ' + '; '.join(problems[:5]) + more
    )

  def make(path, leaf):
    tensor = tensors[names[path]]

    def read(index):
      # Safetensors accepts no slices with None for an end.
      index = tuple(
        slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape)
      )
      part = tensor[index[::-1]].T if path[-1] == 'kernel' else tensor[index]
      return part.astype(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, shardings[path], read)

  return traverse_util.unflatten_dict(
    {path: make(path, leaf) for path, leaf in shapes.items()}
  )


def _open(path: pathlib.Path):
  if not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist: download every file of the model.'
    )
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is damaged or half downloaded ({error}): download it again.'
    ) from None
