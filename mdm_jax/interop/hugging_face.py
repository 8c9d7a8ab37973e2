"""Weights as Hugging Face and PyTorch lay them out, read straight into shards.

A model is a directory with `config.json` and weights, or a file of weights
alone: safetensors or what `torch.save` wrote, in one file or several. Neither
runs code of a file, and numbers are only read where they are indexed. A file in
a bucket is copied to this machine as a whole, for as long as the process lives.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
import hashlib
import json
import os
import re
import types
from typing import Any

from absl import logging
from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from mdm_jax.interop import file_types, torch_checkpoint
from mdm_jax.runtime import remote_reads

_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2,
  'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz,
  'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U64': np.uint64,
  'U32': np.uint32,
  'U16': np.uint16,
  'U8': np.uint8,
  'BOOL': np.bool_,
}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# Endings of files with weights, and the usual name; the first that is found.
_WEIGHTS = (
  ('.safetensors', 'model.safetensors'),
  ('.bin', 'pytorch_model.bin'),
  ('.pth', 'pytorch_model.pth'),
  ('.pt', 'pytorch_model.pt'),
  ('.ckpt', 'last.ckpt'),
)
# Begins of names of other files that trainers write beside the weights.
_NO_WEIGHTS = (
  'optimizer',
  'scheduler',
  'scaler',
  'training_args',
  'rng_state',
  'random_states',
  'adapter',
)
# Parts of names that PyTorch's wrappers of a module insert.
_WRAPPERS = {
  'module',  # DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed
  '_orig_mod',  # torch.compile
  '_fsdp_wrapped_module',
  '_fpw_module',
  '_checkpoint_wrapped_module',
  '_forward_module',  # Lightning Fabric
}
_MAX_NAME = 1000  # characters
_EMA = re.compile(r'(^|[._])(emas?|averaged|avg|swa|shadow)([._]|$)', re.I)
# Of what an optimizer stores for each weight, perhaps by the weight's name.
_OPTIMIZER = re.compile(
  r'(^|[._])(opt|optim|optimizers?|exp_avg|momentum)([._]|$)', re.I
)
_SCALES = ('weight_scale', 'weight_scale_inv', 'scale_weight', 'SCB')


def folder(path: epath.PathLike) -> epath.Path:
  """The directory of a model that is given as a directory or a file."""
  path = epath.Path(path)
  return path.parent if path.is_file() else path


def read_config(path: str) -> dict[str, Any]:
  """Reads the `config.json` of a directory, or beside a file.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is not JSON.
  """
  return read_json(folder(path) / 'config.json')


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON file of a model directory.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is no object in JSON.
  """
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: give a model's directory as Hugging Face lays "
      f'it out.{file_types.explain_directory(path.parent)}'
    )
  try:
    read = json.loads(path.read_bytes().decode('utf-8-sig'))
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}.') from None
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} is no JSON ({_line(error)}), but {file_types.explain(path)}'
    ) from None
  if not isinstance(read, dict):
    raise ValueError(f'{path} is JSON, but no object: download it again.')
  return read


def open_tensors(path: str) -> dict[str, Any]:
  """Opens every tensor of a model, without reading its numbers.

  Args:
    path: a file of weights, or a directory with them, local or in a bucket.

  Returns:
    Tensors by the names that they have in the files; see `select`. A tensor has
    `shape` and `dtype`, and indexing it reads the indexed part.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged or of another kind, or a tensor is not where
      the index says.
  """
  path = epath.Path(path)
  if not path.is_dir():
    return _open(path)
  index, names = _find(path)
  if index is None:
    tensors = {}
    for name in names:
      tensors |= _open(path / name)
    return tensors
  places = read_json(index).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise ValueError(f'{index} has no weight_map: download it again.')
  for name in places.values():
    # Also no path to somewhere else.
    if not isinstance(name, str) or not _is_file_name(name):
      raise ValueError(
        f'{index} has {name!r:.80} in place of the name of a file in its '
        'directory: download it again.'
      )
  files = {name: _open(path / name) for name in sorted(set(places.values()))}
  for tensor, name in places.items():
    if tensor not in files[name]:
      raise ValueError(
        f'{path / name} lacks {tensor!r:.80}, which {index.name} says it has: '
        'download both again.'
      )
  return {tensor: files[name][tensor] for tensor, name in places.items()}


def select(
  tensors: Mapping[str, Any],
  names: Iterable[str],
  aliases: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """Finds the tensors of a network among all that a file holds.

  A checkpoint may hold the network in a dict ('state_dict'), as a part of a
  larger one ('text_encoder'), twice (with its EMA, which is chosen), in
  wrappers ('module', '_orig_mod'), and beside an optimizer. The prefix under
  which most of the names are is the network's.

  Args:
    tensors: from `open_tensors`.
    names: names of the tensors that the network needs.
    aliases: second names of some of them, which are as good.

  Returns:
    The tensors under the prefix, by their names without prefix and wrappers.
    Some of `names` may be missing.

  Raises:
    ValueError: a tensor is there twice, or the weights are quantised.
  """
  names = {*names}
  found, twice = {}, {}
  for raw in tensors:
    # No network has other names, which would spoil messages and cost time.
    if not raw.isprintable() or len(raw) > _MAX_NAME:
      continue
    name = _unwrap(raw)
    if name in found:
      twice[name] = raw
    found.setdefault(name, raw)
  known = names | {*aliases.values()}
  prefix = _common_prefix(found, known)
  # What is beside a wrapper ('module.') is not of the network.
  wrapped = os.path.commonprefix(
    [found[prefix + name] for name in known if prefix + name in found]
  )
  wrapped = wrapped[: wrapped.rfind('.') + 1]
  if _unwrap(wrapped) != prefix:
    wrapped = ''
  selected = {
    name.removeprefix(prefix): tensors[raw]
    for name, raw in found.items()
    if name.startswith(prefix) and raw.startswith(wrapped)
  }
  for name, alias in aliases.items():
    if name not in selected and alias in selected:
      selected[name] = selected.pop(alias)
  for name in sorted(names & selected.keys()):
    if raw := twice.get(prefix + name):
      raise ValueError(
        f'{name} is there twice, as {found[prefix + name]!r:.80} and '
        f'{raw!r:.80}: save one of them alone.'
      )
    module = name.rpartition('.')[0]
    if not jnp.issubdtype(selected[name].dtype, jnp.floating) or any(
      f'{module}.{scale}' in selected for scale in _SCALES
    ):
      raise ValueError(
        f'{name} is quantised to {selected[name].dtype}: give the weights as '
        'they were before, in float32, bfloat16 or float16.'
      )
  return selected


def _unwrap(name: str) -> str:
  """A name without the parts that wrappers inserted."""
  return '.'.join(part for part in name.split('.') if part not in _WRAPPERS)


def _common_prefix(found: Iterable[str], known: set[str]) -> str:
  """The prefix with which most of the known names are found."""
  most_parts = max(name.count('.') + 1 for name in known)
  prefixes = Counter(
    name.removesuffix(suffix)
    for name in found
    for suffix in _suffixes(name, most_parts)
    if suffix in known
  )
  chosen = max(
    prefixes,
    key=lambda prefix: (
      prefixes[prefix],
      not _OPTIMIZER.search(prefix),
      bool(_EMA.search(prefix)),
      -len(prefix),
    ),
    default='',
  )
  others = [
    prefix
    for prefix, count in prefixes.items()
    # A network may also be a part of the one that is chosen.
    if count == prefixes[chosen] and not prefix.startswith(chosen)
  ]
  if others:
    logging.info(
      'The network is in the file as %s: the one in %r is used.',
      ', '.join(repr(prefix[:60]) for prefix in [chosen, *others][:4]),
      chosen[:60],
    )
  return chosen


def _suffixes(name: str, most: int) -> Iterable[str]:
  """The last 1 to `most` parts of a name, joined, and the whole if short."""
  at = len(name)
  for _ in range(most):
    at = name.rfind('.', 0, at)
    yield name[at + 1 :]
    if at < 0:
      return


def fingerprint(tensors: Mapping[str, Any], names: Iterable[str]) -> str:
  """Hash that identifies a model, from the shapes and first rows of tensors.

  Args:
    tensors: from `select`.
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
    dtype = _DTYPE_NAMES[np.dtype(tensor.dtype)]
    digest.update(f'{name} {dtype} {list(tensor.shape)}'.encode())
    digest.update(np.asarray(tensor[:1]).tobytes())
  return digest.hexdigest()


def load(
  tensors: Mapping[str, Any],
  shapes: Any,
  shardings: Any,
  name_of: Callable[[Sequence[str]], str],
) -> dict:
  """Loads parameters from opened tensors; each device reads only its shards.

  Args:
    tensors: from `select`; tensors that no leaf needs are ignored.
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
    elif (found := tuple(tensors[names[path]].shape)) != wanted:
      problems.append(f'{names[path]} is {found}, not {wanted}')
  if problems:
    more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
    if not any(name in tensors for name in names.values()):
      more += (
        f'. It has {", ".join(repr(name[:60]) for name in [*tensors][:3])}'
      )
    raise ValueError(
      'The weights do not fit: ' + '; '.join(problems[:5]) + more
    )

  def make(path, leaf):
    tensor = tensors[names[path]]

    def read(index):
      part = tensor[index[::-1]].T if path[-1] == 'kernel' else tensor[index]
      return part.astype(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, shardings[path], read)

  return traverse_util.unflatten_dict(
    {path: make(path, leaf) for path, leaf in shapes.items()}
  )


def _find(directory: epath.Path) -> tuple[epath.Path | None, list[str]]:
  """The index of a directory's weights, or None and the names of its files.

  Raises:
    FileNotFoundError: there are none, or a part of them is missing.
    ValueError: there are several models.
  """
  for ending, usual in _WEIGHTS:
    names = sorted(
      path.name
      for path in directory.glob(f'*{ending}')
      if not path.name.startswith(_NO_WEIGHTS)
    )
    indices = sorted(directory.glob(f'*{ending}.index*.json'))
    if (directory / f'{usual}.index.json') in indices:
      return directory / f'{usual}.index.json', []
    if usual in names:
      return None, [usual]
    if len(indices) == 1:
      return indices[0], []
    if len(names) == 1 and not indices and not _part(names[0]):
      return None, names
    if not names and not indices:
      continue
    parts = set(map(_part, names))
    if len(parts) > 1 or None in parts:
      raise ValueError(
        f'{directory} has several models: give one of {", ".join(names[:5])}.'
      )
    ((stem, count),) = parts
    if len(names) != count:
      raise FileNotFoundError(
        f'{directory} has {len(names)} of the {count} files of {stem}: '
        'download the others too.'
      )
    return None, names
  raise FileNotFoundError(
    f'{directory} has no weights: download every file of the model.'
    + file_types.explain_directory(directory)
  )


def _part(name: str) -> tuple[str, int] | None:
  """'model', 2 of 'model-00001-of-00002.bin'; None of other names."""
  found = re.fullmatch(r'(.*?)-\d{1,6}-of-(\d{1,6})\..*', name)
  return found and (found[1], int(found[2]))


def _is_file_name(name: str) -> bool:
  return (
    os.path.basename(name) == name
    and name not in ('', '.', '..')
    and name.isprintable()
    and len(name) < 256
  )


def _line(error: Exception) -> str:
  """The message of an error about a file, which may quote the file."""
  return ' '.join(str(error).split())[:200]


def _open(path: epath.Path) -> dict[str, Any]:
  if file_types.check(path, ('safetensors', 'zip', 'pickle')) != 'safetensors':
    return torch_checkpoint.open_tensors(path)
  try:
    local = remote_reads.kept_copy(path)
    # Checks that the tensors are where the header says, without gaps.
    with safetensors.safe_open(local, framework='numpy'):
      pass
    data = np.memmap(local, np.uint8, 'r')
    start = 8 + int.from_bytes(data[:8].tobytes(), 'little')
    header = json.loads(data[8:start].tobytes())
    return {
      name: _view(data, start, entry)
      for name, entry in header.items()
      if name != '__metadata__' and entry['dtype'] in _DTYPES
    }
  except (safetensors.SafetensorError, ValueError) as error:
    raise ValueError(
      f'{path} is damaged or half downloaded ({_line(error)}): download it '
      'again.'
    ) from None


def _view(data: np.ndarray, start: int, entry: Mapping[str, Any]) -> np.ndarray:
  begin, end = entry['data_offsets']
  dtype = np.dtype(_DTYPES[entry['dtype']])
  part = data[start + begin : start + end]
  return np.frombuffer(part, dtype).reshape(entry['shape'])
