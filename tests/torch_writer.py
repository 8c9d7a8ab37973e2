"""Writes `.pth` files as PyTorch does, without it, and hostile ones."""

from collections.abc import Mapping
import io
import os
import pickle
import zipfile

import numpy as np


class Named:
  """Pickles as a call of a name, which need not exist here."""

  def __init__(self, module, name, *args):
    self.module, self.name, self.args = module, name, args


class _Pickler(pickle._Pickler):
  """Writes what `torch.save` does."""

  def persistent_id(self, obj):
    return ('storage', *obj) if isinstance(obj, Storage) else None

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Named):
      self.write(b'c' + f'{obj.module}\n{obj.name}\n'.encode())
      if obj.args != (None,):
        super().save(obj.args)
        self.write(pickle.REDUCE)
      return
    super().save(obj, save_persistent_id)


class Storage(tuple):
  """(type, key, 'cpu', number of elements)."""


def tensor(key, size, *, offset=0, shape=None, strides=(1,), kind='Float'):
  shape = (size,) if shape is None else shape
  storage = Storage((Named('torch', f'{kind}Storage', None), key, 'cpu', size))
  return Named('torch._utils', '_rebuild_tensor_v2', storage, offset, shape,
               strides, False, Named('collections', 'OrderedDict'))


def write(path, obj, data, *, compression=zipfile.ZIP_STORED):
  buffer = io.BytesIO()
  _Pickler(buffer, 2).dump(obj)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('model/data.pkl', buffer.getvalue())
    for key, value in data.items():
      archive.writestr(f'model/data/{key}', value)
  return path


def write_state_dict(path: os.PathLike, state_dict: Mapping[str, np.ndarray],
                     **others) -> os.PathLike:
  """A checkpoint of float32 arrays, and whatever else, as Apple's code does.
  """
  tensors = {}
  for name, value in state_dict.items():
    value = np.ascontiguousarray(value)
    strides = np.array(value.strides) // value.itemsize
    tensors[name] = tensor(
        name, value.size, shape=value.shape, strides=tuple(strides.tolist()))
  return write(path, {'state_dict': tensors, **others},
               {name: value.astype(np.float32).tobytes()
                for name, value in state_dict.items()})
