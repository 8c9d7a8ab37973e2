"""Reading PyTorch checkpoints without PyTorch: good, damaged and hostile."""

import argparse
import copy
import os
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mdm_jax.interop import torch_checkpoint
from tests.torch_writer import named, tensor, write

VALUES = np.arange(12, dtype=np.float32)


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
      }
    },
    {
      '0': VALUES.tobytes(),
      '1': np.int64(7).tobytes(),
      '2': np.arange(4).astype(ml_dtypes.bfloat16).tobytes(),
    },
  )


def test_reads_tensors(tmp_path):
  read = torch_checkpoint.read_state_dict(good(tmp_path / 'a.pth'))
  assert list(read) == ['a', 'a.T', 'tail', 'number', 'half']
  np.testing.assert_array_equal(read['a'], VALUES.reshape(3, 4))
  np.testing.assert_array_equal(read['a.T'], VALUES.reshape(3, 4).T)
  np.testing.assert_array_equal(read['tail'], [10, 11])
  assert read['number'] == 7 and read['number'].dtype == np.int64
  assert read['half'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(read['half'], np.arange(4))
  assert not read['a'].flags.writeable


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
    {'0': VALUES.tobytes()},
  )
  read = torch_checkpoint.read_state_dict(path)
  np.testing.assert_array_equal(read['a'], VALUES)
  assert not marker.exists()


@pytest.mark.parametrize(
  'bad, message',
  [
    (tensor('0', 12, strides=(2,)), 'a reaches beyond its 12 numbers'),
    (tensor('0', 12, offset=1), 'a reaches beyond'),
    (tensor('0', 12, shape=(10**9,), strides=(0,)), 'a reaches beyond'),
    (tensor('0', 12, offset=11, shape=(2,), strides=(-1,)), 'a is malformed'),
    (tensor('0', 12, shape=(3, 4)), 'a is malformed'),
    (tensor('0', 12, shape=('x',)), 'a is malformed'),
    (tensor('0', 10**12), 'a has 48 bytes'),
    (tensor('9', 12), 'data/9'),
    (tensor('0', 12, kind='Complex'), 'unknown storage'),
    (named('os', 'system', 'true'), 'a is no tensor'),
    (1, 'a is no tensor'),
  ],
)
def test_malformed_tensors_are_named(tmp_path, bad, message):
  path = write(tmp_path / 'a.pth', {'a': bad}, {'0': VALUES.tobytes()})
  with pytest.raises(ValueError, match='a.pth is no usable .*' + message):
    torch_checkpoint.read_state_dict(path)


@pytest.mark.parametrize('keep', [0, 10, 0.5, 0.99])
def test_half_a_file_is_named(tmp_path, keep):
  path = good(tmp_path / 'a.pth')
  content = path.read_bytes()
  path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
  with pytest.raises(ValueError, match='a.pth is no usable PyTorch checkp'):
    torch_checkpoint.read_state_dict(path)


def test_changed_bytes_are_found(tmp_path):
  path = good(tmp_path / 'a.pth')
  content = bytearray(path.read_bytes())
  content[content.index(VALUES.tobytes()) + 5] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match='Bad CRC-32'):
    torch_checkpoint.read_state_dict(path)


def test_zip_bombs_are_refused(tmp_path):
  path = write(
    tmp_path / 'a.pth',
    {'a': tensor('0', 10**7)},
    {'0': bytes(4 * 10**7)},
    compression=zipfile.ZIP_DEFLATED,
  )
  assert os.path.getsize(path) < 10**5
  with pytest.raises(ValueError, match='is compressed'):
    torch_checkpoint.read_state_dict(path)
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
    torch_checkpoint.read_state_dict(path)


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'\x80\x02K\x01.',
    b'\x80\x02]',
    b'\x80\x02\x8a\xffx',
    b'garbage',
    b'\x80\x04\x96' + (2**50).to_bytes(8, 'little') + b'x',
  ],
)
def test_bad_pickles_are_named(tmp_path, content):
  path = tmp_path / 'a.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/data.pkl', content)
  with pytest.raises(ValueError, match='a.pth is no usable'):
    torch_checkpoint.read_state_dict(path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='a.pth does not exist: give'):
    torch_checkpoint.read_state_dict(tmp_path / 'a.pth')


def test_reads_what_it_writes(tmp_path):
  tensors = {'a': VALUES.reshape(3, 4).T, 'b': np.float32(3.5).reshape(())}
  torch_checkpoint.write_state_dict(tmp_path / 'a.pth', tensors)
  read = torch_checkpoint.read_state_dict(tmp_path / 'a.pth')
  assert read.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(read[name], value, strict=True)
