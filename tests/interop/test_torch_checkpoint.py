"""Reading PyTorch checkpoints without PyTorch: good, damaged and hostile."""

import argparse
import collections
import copy
import io
import os
import pickle
import struct
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mdm_jax.interop import torch_checkpoint
from tests import fuzzing
from tests.torch_writer import named, tensor, write, write_old

VALUES = np.arange(12, dtype=np.float32)
DATA = {'0': VALUES.tobytes()}


def good(path):
  return write(
    path,
    {
      'state_dict': {
        'a': tensor('0', 12, shape=(3, 4), strides=(4, 1)),
        'a.T': tensor('0', 12, shape=(4, 3), strides=(1, 4)),
        'tail': tensor('0', 12, offset=10, shape=(2,)),
        'number': tensor('1', 1, shape=(), strides=(), kind='Long'),
        'half': tensor('2', 4, kind='BFloat16'),
        'none': tensor('3', 0, shape=(0, 4), strides=(4, 1)),
      }
    },
    {
      **DATA,
      '1': np.int64(7).tobytes(),
      '2': np.arange(4).astype(ml_dtypes.bfloat16).tobytes(),
      '3': b'',
    },
  )


def read(path):
  """All tensors of a file, as arrays."""
  return {
    name: np.asarray(value)
    for name, value in torch_checkpoint.open_tensors(path).items()
  }


def test_reads_tensors(tmp_path):
  found = read(good(tmp_path / 'a.pth'))
  assert list(found) == [
    f'state_dict.{name}'
    for name in ('a', 'a.T', 'tail', 'number', 'half', 'none')
  ]
  found = {name.removeprefix('state_dict.'): x for name, x in found.items()}
  np.testing.assert_array_equal(found['a'], VALUES.reshape(3, 4))
  np.testing.assert_array_equal(found['a.T'], VALUES.reshape(3, 4).T)
  np.testing.assert_array_equal(found['tail'], [10, 11])
  assert found['number'] == 7 and found['number'].dtype == np.int64
  assert found['half'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found['half'], np.arange(4))
  assert found['none'].shape == (0, 4)
  assert not found['a'].flags.writeable


def test_reads_only_what_is_indexed(tmp_path):
  path = write(
    tmp_path / 'a.pth',
    {'a': tensor('0', 12), 'b': tensor('1', 12), 'c': tensor('7', 12)},
    {**DATA, '1': bytes(48)},
  )
  tensors = torch_checkpoint.open_tensors(path)
  assert tensors['a'].shape == (12,) and tensors['a'].dtype == np.float32
  np.testing.assert_array_equal(tensors['a'][2:4], [2, 3])
  with pytest.raises(ValueError, match="a.pth: 'c' is no .*data/7"):
    tensors['c'][:1]


def test_reads_files_from_before_pytorch_1_6(tmp_path):
  saved = collections.OrderedDict(
    a=tensor('94', 12, shape=(3, 4), strides=(4, 1)),
    b=tensor('17', 2, kind='Double'),
  )
  path = write_old(
    tmp_path / 'a.pth', saved, {'94': VALUES, '17': np.array([1.0, 2.0])}
  )
  found = read(path)
  np.testing.assert_array_equal(found['a'], VALUES.reshape(3, 4))
  np.testing.assert_array_equal(found['b'], [1, 2])
  content = path.read_bytes()
  path.write_bytes(content[:-10])
  with pytest.raises(ValueError, match='a.pth: .* of its .* bytes are there'):
    read(path)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_reads_pickles_of_every_binary_protocol(tmp_path, protocol):
  beside = [None, True, 1, -1, 2**40, 2**63, 2**120, 0.5, 'ü', b'\0', (), (1,)]
  beside += [(1, 2, 3, 4), {'a': {1, 2}}, frozenset([3]), bytearray(b'a' * 300)]
  path = write(
    tmp_path / 'a.pth',
    {'epoch': beside, (1, 2): 3, 'x': beside, 'a': tensor('0', 12)},
    DATA,
    protocol=protocol,
  )
  np.testing.assert_array_equal(read(path)['a'], VALUES)


def test_reads_parameters_subclasses_and_new_dtypes(tmp_path):
  plain = tensor('0', 12)
  size = named('torch', 'Size', (12,))
  untyped = torch_checkpoint._Storage('1', 'UntypedStorage', 4)
  path = write(
    tmp_path / 'a.pth',
    {
      'parameter': named('torch._utils', '_rebuild_parameter', plain, True, ()),
      'state': named(
        'torch._utils', '_rebuild_parameter_with_state', plain, True, (), {}
      ),
      'attributes': named(
        'torch._tensor',
        '_rebuild_from_type_v2',
        torch_checkpoint._Named('torch._utils', '_rebuild_tensor_v2'),
        torch_checkpoint._Named('torch', 'Tensor'),
        plain.args,
        {'note': 1},
      ),
      'size': named(
        'torch._utils', '_rebuild_tensor_v2', plain.args[0], 0, size, (1,)
      ),
      'float8': named(
        'torch._utils',
        '_rebuild_tensor_v3',
        untyped,
        0,
        (4,),
        (1,),
        False,
        (),
        torch_checkpoint._Named('torch', 'float8_e4m3fn'),
      ),
    },
    {**DATA, '1': np.arange(4).astype(ml_dtypes.float8_e4m3fn).tobytes()},
  )
  found = read(path)
  assert found['float8'].dtype == ml_dtypes.float8_e4m3fn
  np.testing.assert_array_equal(found.pop('float8'), np.arange(4))
  assert len(found) == 4
  for value in found.values():
    np.testing.assert_array_equal(value, VALUES)


def test_reads_a_whole_module(tmp_path):
  inner = types.SimpleNamespace(
    training=False,
    _parameters=collections.OrderedDict(weight=tensor('0', 12), bias=None),
    _buffers=collections.OrderedDict(mean=tensor('0', 12, shape=(3,))),
    _modules=collections.OrderedDict(),
  )
  outer = types.SimpleNamespace(
    _parameters=collections.OrderedDict(),
    _modules=collections.OrderedDict(conv=inner),
  )
  outer._self = outer
  found = read(write(tmp_path / 'a.pth', outer, DATA))
  assert list(found) == ['conv.weight', 'conv.mean']
  np.testing.assert_array_equal(found['conv.mean'], [0, 1, 2])


def test_other_objects_are_inert(tmp_path):
  marker = tmp_path / 'executed'
  hostile = [
    named('os', 'system', f'touch {marker}'),
    named('builtins', 'eval', f'open({str(marker)!r}, "w")'),
    named('builtins', 'getattr', torch_checkpoint._Named('os', 'path'), 'join'),
    argparse.Namespace(lr=1e-4, nested=argparse.Namespace(x=[1, 2])),
    types.SimpleNamespace(y=1),
  ]
  path = write(
    tmp_path / 'a.pth',
    {'args': hostile, 'state_dict': {'a': tensor('0', 12)}},
    DATA,
  )
  np.testing.assert_array_equal(read(path)['state_dict.a'], VALUES)
  assert not marker.exists()


@pytest.mark.parametrize(
  'bad, message',
  [
    (
      tensor('0', 12, strides=(2,)),
      'it reaches beyond its 12 numbers',
    ),
    (tensor('0', 12, offset=1), 'it reaches beyond'),
    (tensor('0', 12, shape=(10**9,), strides=(0,)), 'it reaches beyond'),
    (tensor('0', 1, shape=(10**12,), strides=(0,)), 'it reaches beyond'),
    (tensor('0', 12, offset=2**62, shape=(0,)), (0,)),
    (tensor('0', 12, shape=(0,) + (2**62,) * 2, strides=(0,) * 3), 'too big'),
    (tensor('0', 12, shape=(1, 12), strides=(2**62, 1)), (1, 12)),
    (tensor('0', 12, offset=11, shape=(2,), strides=(-1,)), "'a' is malformed"),
    (tensor('0', 12, shape=(3, 4)), "'a' is malformed"),
    (tensor('0', 12, shape=('x',)), "'a' is malformed"),
    (tensor('0', 12, shape=(True,)), "'a' is malformed"),
    (tensor('0', 12, shape=(1,) * 9, strides=(1,) * 9), "'a' is malformed"),
    (tensor('0', 12, shape=(2**80,)), "'a' is malformed"),
    (tensor('0', 10**12), '48 of its 4000000000000 bytes are there'),
    (tensor('0', -1), 'it holds no tensors'),
    (tensor('9', 12), 'data/9'),
    (tensor('../version', 12), 'data/../version'),
    (tensor('0', 12, kind='Complex'), 'it holds no tensors'),
    (named('torch._utils', '_rebuild_tensor_v2', 1), 'it holds no tensors'),
    (named('os', 'system', 'true'), 'it holds no tensors'),
    (1, 'it holds no tensors'),
  ],
)
def test_malformed_tensors_are_named(tmp_path, bad, message):
  path = write(tmp_path / 'a.pth', {'a': bad}, DATA)
  if isinstance(message, tuple):  # Odd, but of this shape.
    assert read(path)['a'].shape == message
    return
  with pytest.raises(ValueError, match='a.pth.* is no usable .*' + message):
    read(path)


@pytest.mark.parametrize('keep', [0, 3, 10, 0.5, 0.99])
def test_half_a_file_is_named(tmp_path, keep):
  path = good(tmp_path / 'a.pth')
  content = path.read_bytes()
  path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
  with pytest.raises(ValueError, match='a.pth is .*download it again'):
    read(path)


def test_changed_bytes_are_found(tmp_path):
  path = good(tmp_path / 'a.pth')
  content = bytearray(path.read_bytes())
  content[content.index(VALUES.tobytes()) + 5] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match='Bad CRC-32'):
    read(path)


def test_zip_bombs_are_refused(tmp_path):
  path = write(
    tmp_path / 'a.pth',
    {'a': tensor('0', 10**7)},
    {'0': bytes(4 * 10**7)},
    compression=zipfile.ZIP_DEFLATED,
  )
  assert os.path.getsize(path) < 10**5
  with pytest.raises(ValueError, match='is compressed'):
    read(path)
  # Many members of the zip share the same bytes.
  path = write(
    tmp_path / 'b.pth', {'a': tensor('0', 10**5)}, {'0': bytes(4 * 10**5)}
  )
  with zipfile.ZipFile(path, 'a') as archive:
    one = archive.getinfo('model/data/0')
    for key in range(1000):
      archive.filelist.append(copy.copy(one))
      archive.filelist[-1].filename = f'model/data/{key + 3}'
    archive._didModify = True
  with pytest.raises(ValueError, match='larger than the file'):
    read(path)
  with zipfile.ZipFile(good(tmp_path / 'c.pth'), 'a') as archive:
    with pytest.warns(UserWarning, match='Duplicate'):
      archive.writestr('model/data/0', b'')
  with pytest.raises(ValueError, match="has 'model/data/0' twice"):
    read(tmp_path / 'c.pth')


def test_a_large_directory_of_a_zip_is_refused(tmp_path):
  path = tmp_path / 'a.pth'
  end = struct.pack('<4s4H2LH', b'PK\5\6', 0, 0, 9, 9, 9 * 2**20, 4, 0)
  path.write_bytes(b'PK\3\4' + bytes(9 * 2**20) + end)
  with pytest.raises(ValueError, match='its directory has 9,437,184 bytes'):
    read(path)


def write_pickle(path, content):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/data.pkl', content)
  return path


LONG = (2**50).to_bytes(8, 'little')
BAD_PICKLES = {
  'empty': b'',
  'a number': b'\x80\x02K\x01.',
  'no end': b'\x80\x02]',
  'half a number': b'\x80\x02\x8a\xffx',
  'text': b'garbage',
  'bytearray8': b'\x80\x05\x96' + LONG + b'.',
  'bytes8': b'\x80\x04\x8e' + LONG + b'x',
  'text8': b'\x80\x04\x8d' + LONG + b'x',
  'frame': b'\x80\x04\x95' + LONG + b'.',
  'long4': b'\x80\x02\x8b'
  + (2**20).to_bytes(4, 'little')
  + bytes(2**20)
  + b'.',
  'long4, negative': b'\x80\x02\x8b\xff\xff\xff\xff.',
  'memo': b'\x80\x02Nr\xff\xff\xff\xff.',
  'memo that is missing': b'\x80\x02j\xff\xff\xff\xff.',
  'pop below the mark': b'\x80\x02N(0.',
  'no mark': b'\x80\x02u.',
  'odd items': b'\x80\x02}(Nu.',
  'items of a number': b'\x80\x02K\x01NNs.',
  'call of a number': b'\x80\x02K\x01)R.',
  'call without a tuple': b'\x80\x02c\n\nNR.',
  'state of a number': b'\x80\x02K\x01}b.',
  'name without an end': b'\x80\x02cos' + b'x' * 2000,
  'name of numbers': b'\x80\x04NN\x93.',
  'storage': b'\x80\x02NQ.',
  'extension': b'\x80\x02\x82\x01.',
  'protocol 0': b'I1\n.',
  'nested key': b'\x80\x02}' + b')' + b'\x85' * 100_000 + b'Ns.',
  'nested lists': b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
  'nested dicts': b'\x80\x02'
  + b'}K\x01' * 100_000
  + b'}'
  + b's' * 99_999
  + b'.',
  'holds itself': b'\x80\x02]q\0h\0h\0h\0ee.',
  'doubled 100 times': b'\x80\x02N' + b'q\0h\0h\0\x86' * 100 + b'.',
  'bad text': b'\x80\x02X\x01\0\0\0\xff.',
  'many marks': b'\x80\x02' + b'(' * 100_000 + b't' * 100_000 + b'.',
}


@pytest.mark.parametrize('name', BAD_PICKLES)
def test_bad_pickles_are_refused_at_no_cost(tmp_path, name):
  path = write_pickle(tmp_path / 'a.pth', BAD_PICKLES[name])

  fuzzing.check(
    lambda path: read_named(path),
    lambda rng: path,
    1,
    refuses=Refused,
    seconds=3.0,  # at load 8
    megabytes=64,
  )
  with pytest.raises(ValueError, match='a.pth is no usable .*: download') as e:
    read(path)
  assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_state_changes_no_object_of_ours(tmp_path):
  """A file gave the function that rebuilds tensors other attributes."""
  before = dict(vars(torch_checkpoint))
  function = b'ctorch._utils\n_rebuild_tensor_v2\n'
  content = b'\x80\x02' + function + b'}X\x08\0\0\0__code__K\x01sb.'
  with pytest.raises(ValueError, match='no usable'):
    read(write_pickle(tmp_path / 'a.pth', content))
  assert vars(torch_checkpoint) == before


def test_a_file_cannot_make_long_names(tmp_path):
  """Names of 1 MB, 100,000 of them, from a file of 3 MB."""
  key = b'X' + (2**20).to_bytes(4, 'little') + b'a' * 2**20
  inner = b'}(' + b''.join(
    b'J' + i.to_bytes(4, 'little') + b']' for i in range(100_000)
  )
  path = write_pickle(tmp_path / 'a.pth', b'\x80\x02}' + key + inner + b'us.')
  with pytest.raises(ValueError, match='names are too long'):
    read(path)


class Refused(Exception):
  """A ValueError in one short line."""


def read_named(path):
  try:
    read(path)
  except ValueError as error:
    assert '\n' not in str(error) and len(str(error)) < 800, error
    raise Refused from error


def random_pickle(rng):
  """Opcodes in random order, with few of those that end all."""
  opcodes = [bytes([code]) for code in torch_checkpoint.torch_pickle._OPCODES]
  small = b''.join
  parts = [
    b'\x80\x02',
    b'ctorch._utils\n_rebuild_tensor_v2\n',
    b'ctorch\nFloatStorage\n',
    b'ccollections\nOrderedDict\n',
    b'X\x07\0\0\0storage',
    b'X\x01\0\0\0a',
    b'K\x0c',
    b'\x8a\x08' + b'\xff' * 7 + b'\x7f',
    *[b'(', b't', b'}', b'N', b')', b'h\0', b'q\0'] * 4,
  ]
  chosen = [
    parts[i] if rng.random() < 0.7 else opcodes[rng.integers(len(opcodes))]
    for i in rng.integers(len(parts), size=rng.integers(1, 60))
  ]
  return small(chosen) * int(rng.choice((1, 1, 1, 50))) + b'.'


def random_views(rng):
  """Tensors of any offset, shape and strides in one storage."""
  odd = [0, 1, 1, 2, 3, 4, 12, 13, -1, 2**31, 2**61, 2**62, 2**63 - 1, 2**64]

  def some(count):
    return tuple(odd[i] for i in rng.integers(len(odd), size=count))

  kinds = ('Float', 'Half', 'Byte', 'Double', 'Untyped', 'ComplexFloat')
  dimensions = [int(rng.integers(5)) for _ in range(rng.integers(1, 3))]
  return {
    str(i): tensor(
      '0',
      (12, 24, 48, 6, *some(1))[rng.integers(5)],
      offset=some(1)[0] if rng.random() < 0.5 else 0,
      shape=some(count),
      strides=some(count),
      kind=kinds[rng.integers(len(kinds))],
    )
    for i, count in enumerate(dimensions)
  }


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_view_is_read_or_refused(tmp_path, count):
  path = tmp_path / 'a.pth'

  def make(rng):
    return write(path, random_views(rng), DATA)

  def read_each(path):
    try:
      tensors = torch_checkpoint.open_tensors(path)
    except ValueError as error:
      raise Refused from error
    for value in tensors.values():
      try:
        np.array(value)
      except ValueError:
        pass

  fuzzing.check(read_each, make, count, refuses=Refused)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
@pytest.mark.parametrize('part', ['zip', 'pickle', 'opcodes', 'old'])
def test_any_file_is_read_or_refused(tmp_path, count, part):
  path = tmp_path / 'a.pth'
  content = good(path).read_bytes()
  with zipfile.ZipFile(path) as archive:
    pickled = archive.read('model/data.pkl')
  old = write_old(
    path, {'a': tensor('1', 12), 'b': {'c': tensor('1', 12)}}, {'1': VALUES}
  ).read_bytes()

  def make(rng):
    if part == 'zip':
      path.write_bytes(fuzzing.damage(content, rng))
    elif part == 'old':
      path.write_bytes(fuzzing.damage(old, rng))
    else:
      with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(
          'model/data.pkl',
          random_pickle(rng)
          if part == 'opcodes'
          else fuzzing.damage(pickled, rng),
        )
        archive.writestr('model/data/0', VALUES.tobytes())
    return path

  fuzzing.check(read_named, make, count, refuses=Refused)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='a.pth does not exist: download'):
    read(tmp_path / 'a.pth')


def test_reads_what_it_writes(tmp_path):
  tensors = {'a': VALUES.reshape(3, 4).T, 'b': np.float32(3.5).reshape(())}
  torch_checkpoint.write_state_dict(tmp_path / 'a.pth', tensors)
  found = read(tmp_path / 'a.pth')
  assert found.keys() == {f'state_dict.{name}' for name in tensors}
  for name, value in tensors.items():
    np.testing.assert_array_equal(
      found[f'state_dict.{name}'], value, strict=True
    )


def test_another_pickle_is_named(tmp_path):
  (tmp_path / 'a.pth').write_bytes(pickle.dumps({'a': 1}, 2))
  with pytest.raises(ValueError, match='a pickle, but not of torch.save'):
    read(tmp_path / 'a.pth')


def test_another_zip_is_named(tmp_path):
  held = io.BytesIO()
  np.savez(held, a=VALUES)
  (tmp_path / 'a.pth').write_bytes(held.getvalue())
  with pytest.raises(
    ValueError, match="without one data.pkl, but with 'a.npy'"
  ):
    read(tmp_path / 'a.pth')
