"""What is downloaded instead of weights is named, with what to do."""

import bz2
import gzip
import io
import lzma
import os
import tarfile

import numpy as np
import pytest

from mdm_jax.interop import file_types, hugging_face
from tests import fuzzing


def tar() -> bytes:
  held = io.BytesIO()
  with tarfile.open(fileobj=held, mode='w') as archive:
    archive.addfile(tarfile.TarInfo('pickle'))
  return held.getvalue()


def npz() -> bytes:
  held = io.BytesIO()
  np.savez(held, a=np.zeros(3))
  return held.getvalue()


POINTER = (
  b'version https://git-lfs.github.com/spec/v1\n'
  b'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393'
  b'\nsize 12345\n'
)
WRONG = {
  'empty': (b'', 'is empty: download it again'),
  'LFS': (POINTER, 'is a pointer of Git LFS .*: run .git lfs pull.'),
  'HTML': (b'\n <!DOCTYPE html><html>', 'is a web page .*: download it again'),
  'XML': (b'<?xml version="1.0"?><Error>', 'is a web page'),
  'HTML after a BOM': (b'\xef\xbb\xbf<html>', 'is a web page'),
  'error': (b'Entry not found', "is text that begins with 'Entry not found'"),
  'error in JSON': (b'{"error": "Gated"}', 'is text that begins with'),
  'text that is cut in a letter': ('ä'.encode() * 999, 'is text that begins'),
  'gzip': (gzip.compress(b'x'), 'is compressed by gzip: unpack it first'),
  'bzip2': (bz2.compress(b'x'), 'is compressed by bzip2'),
  'xz': (lzma.compress(b'x'), 'is compressed by xz'),
  'tar': (tar(), 'is a tar archive: unpack it first'),
  'npz': (npz(), "is a zip without one data.pkl, but with 'a.npy'"),
  'empty zip': (b'PK\5\6' + bytes(18), 'is an empty zip'),
  'HDF5': (b'\x89HDF\r\n\x1a\n' + bytes(9), 'is HDF5, .* give the model as'),
  'GGUF': (b'GGUF\3\0\0\0', 'is GGUF, a format of llama.cpp'),
  'msgpack': (b'\x82\xa6params\x80', 'is msgpack, a format of Flax'),
  'large msgpack': (b'\xde\x00\x20\xd9\x21abc', 'is msgpack'),
  'ONNX': (b'\x08\x07\x12\x07pytorch\x1a', 'is ONNX'),
  'TensorFlow Lite': (b'\x1c\0\0\0TFL3\0', 'is TensorFlow Lite'),
  'NumPy': (b'\x93NUMPY\1\0', 'is a NumPy array'),
  'zeros': (bytes(1000), 'is zeros at its beginning, as an unfinished'),
  'PNG': (b'\x89PNG\r\n\x1a\n', 'is an image: download it again'),
  'pickle': (b'\x80\x04}\x94.', 'it is a pickle, but not of torch.save'),
  'short': (b'\xff\xfe\xfd', 'is 3 bytes long'),
  'unknown': (b'\xff' * 100, 'is of a kind that is not known here: give'),
}


@pytest.mark.parametrize('kind', WRONG)
@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_wrong_files_are_named(tmp_path, kind, name):
  content, message = WRONG[kind]
  (tmp_path / name).write_bytes(content)
  for path in (tmp_path, tmp_path / name):
    with pytest.raises(ValueError, match=f'{name} .*{message}') as error:
      hugging_face.open_tensors(path)
    assert '\n' not in str(error.value)


def test_what_is_no_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='x does not exist: download it'):
    hugging_face.open_tensors(tmp_path / 'x')
  (tmp_path / 'model.safetensors').mkdir()
  with pytest.raises(ValueError, match='safetensors is a directory: give the'):
    hugging_face.open_tensors(tmp_path)
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(ValueError, match='pipe is no regular file'):
    hugging_face.open_tensors(tmp_path / 'pipe')


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_beginning_is_explained(tmp_path, count):
  path, begins = tmp_path / 'x', [content for content, _ in WRONG.values()]

  def make(rng):
    path.write_bytes(fuzzing.damage(begins[rng.integers(len(begins))], rng))
    return path

  def explain(path):
    text = file_types.explain(path)
    assert text.startswith('is ') and '\n' not in text and len(text) < 300

  fuzzing.check(explain, make, count, refuses=())
