"""Reads and writes PyTorch checkpoints, without PyTorch or code in the file.

A `.pth` file is a zip of one pickle and the raw bytes of each tensor. A pickle
can make its reader call any function by name. Here only the names that tensors
are made of have a meaning; all others become placeholders that do nothing.
"""

from collections.abc import Mapping
import io
import math
import os
import pickle
from typing import NamedTuple
import zipfile

import ml_dtypes
import numpy as np

_MAX_PICKLE = 64 * 2**20  # bytes; released models have pickles of 0.1 MB
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
}


class _Kind(NamedTuple):
  """A storage's type. Unlike a dtype, it has no state that a file could set."""

  name: str


class _Storage(NamedTuple):
  """A member of the zip whose bytes tensors are views of."""

  key: str
  dtype: np.dtype
  size: int  # elements


class _Tensor(NamedTuple):
  """A view of a storage; lengths and strides in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Inert:
  """Placeholder for an unknown name in a file; ignores all operations."""

  def __new__(cls, *args, **kwargs):
    return object.__new__(cls)

  def __init__(self, *args, **kwargs):
    pass

  def __call__(self, *args, **kwargs):
    return _Inert()

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def append(self, item):
    pass

  def extend(self, items):
    pass


class _Dict(dict):
  """An OrderedDict without its attributes."""

  def __setstate__(self, state):
    pass


def _rebuild_tensor(storage, offset, shape, strides, *unused) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *unused) -> _Tensor:
  return tensor


_KNOWN = {
  ('collections', 'OrderedDict'): _Dict,
  ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
  ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
  **{('torch', name): _Kind(name) for name in _DTYPES},
}


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


# The Python implementation, since a file can make C's allocate a huge memo.
class _Unpickler(pickle._Unpickler):
  def find_class(self, module, name):
    return _KNOWN.get((module, name), _Inert)

  def persistent_load(self, pid):
    tag, kind, key, _, size = pid
    if tag != 'storage' or not isinstance(kind, _Kind):
      raise pickle.UnpicklingError(f'unknown storage {pid[:2]}')
    return _Storage(str(key), np.dtype(_DTYPES[kind.name]), int(size))


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the tensors of a checkpoint, or of its entry 'state_dict'.

  Args:
    path: path of a file that `torch.save` wrote (PyTorch 1.6 or newer).

  Returns:
    Read-only arrays by name.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: the file is damaged, malformed or no checkpoint. No code of the
      file has been run.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      return _read(archive, os.path.getsize(path))
  except FileNotFoundError:
    raise FileNotFoundError(
      f'{path} does not exist: give a .pth file.'
    ) from None
  # A hostile pickle can raise nearly anything.
  except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    raise ValueError(
      f'{path} is no usable PyTorch checkpoint ({reason}): download it '
      'again, or save it with torch.save.'
    ) from error


def _read(archive: zipfile.ZipFile, file_size: int) -> dict[str, np.ndarray]:
  ##### Check the zip: no member may be larger than the file.
  members = {}
  for info in archive.infolist():
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f'{info.filename} is compressed')
    members[info.filename] = info
  if sum(info.file_size for info in members.values()) > file_size:
    raise ValueError('its members are larger than the file')
  pickles = [name for name in members if name.endswith('/data.pkl')]
  if len(pickles) != 1:
    raise ValueError('it holds no data.pkl')
  root = pickles[0].removesuffix('data.pkl')
  if members[pickles[0]].file_size > _MAX_PICKLE:
    raise ValueError(f'its pickle is larger than {_MAX_PICKLE} bytes')
  if f'{root}byteorder' in members and (
    archive.read(f'{root}byteorder') != b'little'
  ):
    raise ValueError('it was written on a big-endian machine')

  ##### Unpickle the names and views of the tensors.
  loaded = _Unpickler(
    io.BytesIO(archive.read(pickles[0])), encoding='utf-8'
  ).load()
  if isinstance(loaded, dict) and 'state_dict' in loaded:
    loaded = loaded['state_dict']
  if not isinstance(loaded, dict) or not loaded:
    raise ValueError('it holds no state dict')

  ##### Read the tensors.
  storages, tensors = {}, {}
  for name, tensor in loaded.items():
    if not isinstance(tensor, _Tensor):
      raise ValueError(f'{name} is no tensor')
    _check(name, tensor)
    storage = tensor.storage
    if storage not in storages:
      data = archive.read(f'{root}data/{storage.key}')  # Verifies its CRC.
      if len(data) != storage.size * storage.dtype.itemsize:
        raise ValueError(f'{name} has {len(data)} bytes')
      storages[storage] = np.frombuffer(data, storage.dtype)
    tensors[str(name)] = np.lib.stride_tricks.as_strided(
      storages[storage][tensor.offset :],
      tensor.shape,
      [stride * storage.dtype.itemsize for stride in tensor.strides],
      writeable=False,
    )
  return tensors


def _check(name: str, tensor: _Tensor) -> None:
  """Raises ValueError if a view leaves its storage or repeats its elements."""
  storage, offset, shape, strides = tensor
  numbers = (offset, *shape, *strides)
  if (
    not isinstance(storage, _Storage)
    or len(shape) != len(strides)
    or any(not isinstance(number, int) or number < 0 for number in numbers)
  ):
    raise ValueError(f'{name} is malformed')
  count = math.prod(shape)
  last = offset + sum(
    (size - 1) * stride for size, stride in zip(shape, strides)
  )
  if count and (count > storage.size or last >= storage.size):
    raise ValueError(f'{name} reaches beyond its {storage.size} numbers')


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
