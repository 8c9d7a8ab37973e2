"""Hostile `.pth` files, and what else `torch.save` may write."""

import io
import zipfile

from mdm_jax import torch_files


def named(module, name, *args):
  """A call of a name, which need not exist here."""
  return torch_files._Named(module, name, args)


def tensor(key, size, *, offset=0, shape=None, strides=(1,), kind='Float'):
  """A view of the storage `key` of `size` numbers."""
  return torch_files._pickled_tensor(
    torch_files._Storage(key, f'{kind}Storage', size),
    offset,
    (size,) if shape is None else shape,
    strides,
  )


def write(path, obj, data, *, compression=zipfile.ZIP_STORED):
  """Writes an object, and the bytes of its storages by key."""
  pickled = io.BytesIO()
  torch_files._Pickler(pickled, 2).dump(obj)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('model/data.pkl', pickled.getvalue())
    for key, value in data.items():
      archive.writestr(f'model/data/{key}', value)
  return path
