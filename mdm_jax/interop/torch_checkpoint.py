"""Reads and writes PyTorch checkpoints, without PyTorch or code in the file.

A `.pth` file is a zip of one pickle and the raw bytes of each tensor; before
PyTorch 1.6 it was several pickles, and the bytes after them. Pickles are read
as data, see `torch_pickle`. Numbers are read when a tensor is indexed.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import io
import math
import os
import pickle
import struct
from typing import Any, NamedTuple
import zipfile
import zlib

import ml_dtypes
import numpy as np

from mdm_jax.interop import file_types, torch_pickle
from mdm_jax.interop.torch_pickle import Name, Object, Reference
from mdm_jax.runtime import remote_reads

_MAX_PICKLE = 64 * 2**20  # bytes; released models have pickles of 0.1 MB
_MAX_ZIP_DIRECTORY = 8 * 2**20  # bytes; a model of 1,000 tensors has 0.1 MB
_MAX_DEPTH = 64  # of dicts and modules in each other
_MAX_DIMENSIONS = 8
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of files before PyTorch 1.6
_DTYPES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
  'ComplexFloatStorage': np.complex64,
  'ComplexDoubleStorage': np.complex128,
  'QInt8Storage': np.int8,
  'QUInt8Storage': np.uint8,
  'QInt32Storage': np.int32,
  'UntypedStorage': np.uint8,
}
# Dtypes whose storages are untyped.
_NEW_DTYPES = {
  'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
  'float8_e5m2': ml_dtypes.float8_e5m2,
  'float8_e4m3fnuz': ml_dtypes.float8_e4m3fnuz,
  'float8_e5m2fnuz': ml_dtypes.float8_e5m2fnuz,
  'uint16': np.uint16,
  'uint32': np.uint32,
  'uint64': np.uint64,
}
_TENSORS = ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3')
_PARAMETERS = ('_rebuild_parameter', '_rebuild_parameter_with_state')
_SUBCLASSES = ('_rebuild_from_type', '_rebuild_from_type_v2')
_DICTS = ('OrderedDict', 'defaultdict', 'dict')
# Entries of a pickled module whose own entries have names of the module.
_MODULE_PARTS = ('_parameters', '_buffers', '_modules')


class _Storage(NamedTuple):
  """Bytes in the file that tensors are views of."""

  key: str
  dtype: str  # the name of PyTorch's class
  size: int  # elements


class Tensor:
  """A tensor in a file, whose numbers are read when it is indexed.

  Attributes:
    shape: its shape.
    dtype: its dtype.
  """

  def __init__(
    self, where: str, view: '_View', read: Callable[['_Storage'], np.ndarray]
  ):
    """A tensor.

    Args:
      where: the file and the tensor's name, for errors.
      view: what it is a view of.
      read: returns the bytes of a storage, uint8; raises ValueError.
    """
    self.shape, self.dtype = view.shape, view.dtype
    self._where, self._view, self._read = where, view, read

  def __getitem__(self, index: Any) -> np.ndarray:
    """A part of the tensor, read-only.

    Raises:
      ValueError: its bytes are damaged or not in the file.
    """
    return self.__array__()[index]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """The whole tensor for NumPy, read-only unless it is converted."""
    try:
      array = self._open()
    except ValueError as error:
      raise _unusable(self._where, error) from error
    return array if dtype is None else array.astype(dtype)

  def _open(self) -> np.ndarray:
    storage, dtype, offset, shape, strides = self._view
    num_bytes = storage.size * np.dtype(_DTYPES[storage.dtype]).itemsize
    size = num_bytes // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    # Strides of 0 would repeat a few numbers without end.
    if count and (count > size or last >= size):
      raise ValueError(f'it reaches beyond its {size} numbers')
    data = self._read(storage)
    if len(data) != num_bytes:
      raise ValueError(f'{len(data)} of its {num_bytes} bytes are there')
    if not count:
      return np.zeros(shape, dtype)
    # The stride of a single element means nothing, and may be any number.
    strides = [
      stride * dtype.itemsize if n > 1 else 0
      for n, stride in zip(shape, strides)
    ]
    return np.ndarray(shape, dtype, data, offset * dtype.itemsize, strides)


class _View(NamedTuple):
  """What a tensor is a view of; offset and strides in elements."""

  storage: _Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Named:
  """Pickled as the name of a function, or as a call of it with `args`."""

  def __init__(self, module: str, name: str, args: tuple | None = None):
    self.module, self.name, self.args = module, name, args


class _Pickler(pickle._Pickler):
  """Writes `_Named` and `_Storage` as `torch.save` does.

  The `dtype` of a `_Storage` is the name of PyTorch's storage class here.
  """

  def persistent_id(self, obj):
    if isinstance(obj, _Storage):
      return ('storage', _Named('torch', obj.dtype), obj.key, 'cpu', obj.size)
    return None

  def save(self, obj, save_persistent_id=True):
    if not isinstance(obj, _Named):
      super().save(obj, save_persistent_id)
      return
    self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
    if obj.args is not None:
      super().save(obj.args)
      self.write(pickle.REDUCE)


def open_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
  """Finds every tensor of a checkpoint, without reading its numbers.

  Args:
    path: a file that `torch.save` wrote, local or in a bucket.

  Returns:
    Tensors by name. Keys of dicts in dicts, and of modules, are joined by dots:
    'state_dict.conv.weight'. What is no tensor is left out.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is damaged, malformed or no checkpoint. No code of the
      file has been run.
  """
  kind = file_types.check(path, ('zip', 'pickle'))
  # Only what is indexed is read.
  local = remote_reads.kept_copy(path)
  data = np.memmap(local, np.uint8, 'r').view(np.ndarray)
  try:
    root, size, read = (
      _open_zip(local, data) if kind == 'zip' else _open_old(data)
    )
    # No names, joined, are much longer than what they are joined from.
    views = dict(_find_views(root, 16 * size))
    if not views:
      raise ValueError('it holds no tensors')
  except ValueError as error:
    raise _unusable(path, error) from error
  return {
    name: Tensor(f'{path}: {name[:200]!r}', view, read)
    for name, view in views.items()
  }


def _unusable(where: str | os.PathLike, error: ValueError) -> ValueError:
  return ValueError(
    f'{where} is no usable PyTorch checkpoint ({error}): download it again, or '
    'save it with torch.save.'
  )


def _open_zip(
  path: str | os.PathLike, data: np.ndarray
) -> tuple[Any, int, Callable[[_Storage], np.ndarray]]:
  """Opens a file of PyTorch 1.6 or newer.

  Returns:
    What was saved, the size of its pickle in bytes, and a function that returns
    the bytes of a storage.
  """
  members = _zip_members(path, data)

  @functools.cache  # So that the CRC is computed once.
  def member(name: str) -> np.ndarray:
    if name not in members:
      raise ValueError(f'it has no {name[:200]!r}')
    info = members[name]
    # Programs of TorchScript have compressed members beside the tensors.
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise ValueError(f'{name[:200]!r} is compressed or encrypted')
    header = bytes(data[info.header_offset :][:30])
    if len(header) < 30 or header[:4] != b'PK\3\4':
      raise ValueError(f'{name[:200]!r} is not where its directory says')
    start = info.header_offset + 30 + sum(struct.unpack('<2H', header[26:]))
    found = data[start : start + info.compress_size]
    if len(found) < info.file_size or zlib.crc32(found) != info.CRC:
      raise ValueError(f'Bad CRC-32 of {name[:200]!r}')
    return found

  pickles = [name for name in members if name.endswith('/data.pkl')]
  if len(pickles) != 1:
    names = ', '.join(repr(name[:40]) for name in list(members)[:3])
    raise ValueError(f'it is a zip without one data.pkl, but with {names}')
  folder = pickles[0].removesuffix('data.pkl')
  if members[pickles[0]].file_size > _MAX_PICKLE:
    raise ValueError(f'its pickle is larger than {_MAX_PICKLE:,} bytes')
  if f'{folder}byteorder' in members and (
    member(f'{folder}byteorder').tobytes() != b'little'
  ):
    raise ValueError('it was written on a big-endian machine')
  pickled = memoryview(member(pickles[0]))
  root, *_ = torch_pickle.load(pickled)
  return root, len(pickled), lambda it: member(f'{folder}data/{it.key}')


def _zip_members(
  path: str | os.PathLike, data: np.ndarray
) -> dict[str, zipfile.ZipInfo]:
  """The members of a zip, together no larger than the file."""
  # `zipfile` makes an object of each entry of the directory at the file's end.
  tail = bytes(data[-(2**16 + 22) :])
  at = tail.rfind(b'PK\5\6')
  if at < 0 or len(tail) < at + 22:
    raise ValueError('its end is missing: it is half a file')
  size = int.from_bytes(tail[at + 12 : at + 16], 'little')
  if at >= 76 and tail[at - 20 : at - 16] == b'PK\6\7':  # zip64
    size = int.from_bytes(tail[at - 36 : at - 28], 'little')
  if size > _MAX_ZIP_DIRECTORY:
    raise ValueError(f'its directory has {size:,} bytes')
  members = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for info in archive.infolist():
        if info.filename in members:
          raise ValueError(f'it has {info.filename[:200]!r} twice')
        members[info.filename] = info
  except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
    raise ValueError(str(error)) from None
  if sum(info.compress_size for info in members.values()) > len(data):
    raise ValueError('its members are larger than the file')
  return members


def _open_old(
  data: np.ndarray,
) -> tuple[Any, int, Callable[[_Storage], np.ndarray]]:
  """Opens a file from before PyTorch 1.6; returns what `_open_zip` does.

  Four pickles (a magic number, the version, the machine, what was saved), one
  with the keys of the storages, and for each its size and its bytes.
  """
  view = memoryview(data)[:_MAX_PICKLE]
  magic, at, _ = torch_pickle.load(view)
  if magic != _MAGIC:
    raise ValueError('it is a pickle, but not of torch.save')
  _, at, _ = torch_pickle.load(view, at)
  machine, at, _ = torch_pickle.load(view, at)
  if not isinstance(machine, dict) or not machine.get('little_endian'):
    raise ValueError('it was written on a big-endian machine')
  root, at, references = torch_pickle.load(view, at)
  keys, at, _ = torch_pickle.load(view, at)
  size, places = at, {}
  itemsizes = {
    storage.key: np.dtype(_DTYPES[storage.dtype]).itemsize
    for storage in map(_as_storage, references)
    if storage
  }
  for key in keys if isinstance(keys, list) else ():
    if not isinstance(key, str) or key not in itemsizes:
      raise ValueError('its storages are not those of its tensors')
    length = int.from_bytes(bytes(data[at : at + 8]), 'little')
    end = at + 8 + length * itemsizes[key]
    places[key] = at + 8, end
    at = end

  def read(storage: _Storage) -> np.ndarray:
    start, end = places.get(storage.key, (0, 0))
    return data[start:end]

  return root, size, read


def _find_views(root: Any, budget: int) -> Iterator[tuple[str, _View]]:
  """Yields the tensors in what was saved, by name.

  Args:
    root: from `torch_pickle.load`; it may hold itself.
    budget: most characters that all names may have.

  Raises:
    ValueError: the names are longer, or a tensor is malformed.
  """
  waiting, seen = [('', 0, root)], set()
  while waiting:
    name, depth, value = waiting.pop()
    if view := _as_view(name, value):
      yield name, view
      continue
    if not isinstance(value, dict | list | tuple | Object):
      continue
    if depth > _MAX_DEPTH or id(value) in seen:
      continue
    seen.add(id(value))
    inside = []
    for key, item in _entries(value):
      # What an object holds of its class has no name of its own.
      dissolved = isinstance(value, Object) and key in _MODULE_PARTS
      inner = name if dissolved else f'{name}.{key}' if name else str(key)
      if isinstance(item, dict | list | tuple | Object):
        budget -= len(inner)
        if budget < 0:
          raise ValueError('its names are too long')
        inside.append((inner, depth + 1, item))
    waiting += reversed(inside)


def _entries(value: Any) -> Iterator[tuple[str | int, Any]]:
  """What a container holds, by key or index."""
  if isinstance(value, list | tuple):
    yield from enumerate(value)
    return
  if isinstance(value, dict):
    yield from value.items()
    return
  if value.kind.name in _DICTS:
    # Python 2 gives the items of an OrderedDict as pairs in a list.
    for pairs in value.args[-1:]:
      for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, list | tuple) and len(pair) == 2:
          if isinstance(pair[0], str):
            yield pair
  yield from value.items.items()
  for state in value.states:
    # Objects with slots have a pair of dicts.
    for part in state if isinstance(state, tuple) else (state,):
      if isinstance(part, dict):
        yield from part.items()


def _as_view(name: str, value: Any) -> _View | None:
  """The tensor that an object is, or None if it is none of a known kind.

  Quantised and sparse tensors are unknown: networks here have none.

  Raises:
    ValueError: it is malformed.
  """
  for _ in range(_MAX_DEPTH):
    if not isinstance(value, Object) or not value.args:
      return None
    function, args = value.kind.name, value.args
    if function in _TENSORS:
      break
    if function in _PARAMETERS:
      value = args[0]
    elif function in _SUBCLASSES and len(args) > 2:
      if not isinstance(args[0], Name) or not isinstance(args[2], tuple):
        return None
      value = Object(args[0], args[2])
    else:
      return None
  else:
    return None
  storage = _as_storage(args[0])
  if storage is None or len(args) < 4:
    return None
  dtype = _DTYPES[storage.dtype]
  if function == '_rebuild_tensor_v3' and len(args) > 6:
    dtype = isinstance(args[6], Name) and _NEW_DTYPES.get(args[6].name)
    if not dtype:
      return None
  shape, strides = (
    value.args[0] if isinstance(value, Object) and value.args else value
    for value in args[2:4]  # A torch.Size is a call with a tuple.
  )
  if not (
    isinstance(shape, tuple)
    and isinstance(strides, tuple)
    and len(shape) == len(strides) <= _MAX_DIMENSIONS
    and all(map(_is_size, (args[1], *shape, *strides)))
  ):
    raise ValueError(f'{name[:200]!r} is malformed')
  return _View(storage, np.dtype(dtype), args[1], shape, strides)


def _as_storage(value: Any) -> _Storage | None:
  """The storage that a reference names, or None if it is of no known kind."""
  if not isinstance(value, Reference) or len(value.fields) < 5:
    return None
  tag, kind, key, _, size, *view = value.fields
  # Before PyTorch 0.4 a storage could be a part of another.
  if tag != 'storage' or not isinstance(kind, Name) or view not in ([], [None]):
    return None
  if kind.name not in _DTYPES or not isinstance(key, str | int):
    return None
  return _Storage(str(key), kind.name, size) if _is_size(size) else None


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


def write_state_dict(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes {'state_dict': tensors} as `torch.save` does.

  Args:
    path: path of the file.
    tensors: arrays by name; they are written as float32.
  """
  with zipfile.ZipFile(path, 'w') as archive:
    views = {}
    for i, (name, value) in enumerate(tensors.items()):
      value = np.asarray(value, np.float32, order='C')
      archive.writestr(f'archive/data/{i}', value.tobytes())
      strides = tuple(stride // value.itemsize for stride in value.strides)
      views[name] = _pickled_tensor(
        _Storage(str(i), 'FloatStorage', value.size), 0, value.shape, strides
      )
    pickled = io.BytesIO()
    _Pickler(pickled, 2).dump({'state_dict': views})
    archive.writestr('archive/data.pkl', pickled.getvalue())
    archive.writestr('archive/byteorder', 'little')
    archive.writestr('archive/version', '3\n')


def _pickled_tensor(
  storage: _Storage,
  offset: int,
  shape: tuple[int, ...],
  strides: tuple[int, ...],
) -> _Named:
  no_hooks = _Named('collections', 'OrderedDict', ())
  return _Named(
    'torch._utils',
    '_rebuild_tensor_v2',
    (storage, offset, shape, strides, False, no_hooks),
  )
