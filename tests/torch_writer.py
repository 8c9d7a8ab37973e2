"""Writes `.pth` files as `torch.save` does, hostile ones as well."""

import io
import zipfile

from mdm_jax.interop import torch_checkpoint


def named(module, name, *args):
  """A pickled call of a function by its name, which need not exist."""
  return torch_checkpoint._Named(module, name, args)


def tensor(key, size, *, offset=0, shape=None, strides=(1,), kind='Float'):
  """A tensor, a view of the storage `key` of `size` numbers."""
  return torch_checkpoint._pickled_tensor(
    torch_checkpoint._Storage(key, f'{kind}Storage', size),
    offset,
    (size,) if shape is None else shape,
    strides,
  )


def write(path, obj, data, *, compression=zipfile.ZIP_STORED):
  """Writes an object, and the bytes of its storages by key."""
  pickled = io.BytesIO()
  torch_checkpoint._Pickler(pickled, 2).dump(obj)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('model/data.pkl', pickled.getvalue())
    for key, value in data.items():
      archive.writestr(f'model/data/{key}', value)
  return path
