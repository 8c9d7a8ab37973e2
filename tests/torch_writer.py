"""Writes `.pth` files as `torch.save` does, hostile ones as well."""

import io
import pickle
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


def write(path, obj, data, *, compression=zipfile.ZIP_STORED, protocol=2):
  """Writes an object, and the bytes of its storages by key."""
  pickled = io.BytesIO()
  torch_checkpoint._Pickler(pickled, protocol).dump(obj)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('model/data.pkl', pickled.getvalue())
    for key, value in data.items():
      archive.writestr(f'model/data/{key}', value)
  return path


def write_old(path, obj, arrays):
  """Writes an object and its storages by key, as PyTorch did before 1.6."""
  pickled = io.BytesIO()
  torch_checkpoint._Pickler(pickled, 2).dump(obj)
  arrays = {
    key: array
    for key, array in arrays.items()
    if pickle.dumps(key, 2)[2:-3] in pickled.getvalue()  # It is used.
  }
  machine = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}}
  with open(path, 'wb') as file:
    pickle.dump(torch_checkpoint._MAGIC, file, 2)
    pickle.dump(1001, file, 2)
    pickle.dump(machine, file, 2)
    file.write(pickled.getvalue())
    pickle.dump(list(arrays), file, 2)
    for array in arrays.values():
      file.write(len(array).to_bytes(8, 'little') + array.tobytes())
  return path
