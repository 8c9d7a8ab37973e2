"""Recognises files by their first bytes, and says what to do with wrong ones.

What is downloaded as weights is often something else: a pointer of Git LFS, the
web page of an error, an archive, another framework's format.
"""

from collections.abc import Collection
import os

from etils import epath

from mdm_jax.runtime import files, remote_reads

_HEAD = 512  # bytes that are looked at
_AGAIN = 'download it again.'
_OTHER = (
  'give the model as safetensors, or as PyTorch saves it (pytorch_model.bin).'
)
_UNPACK = 'unpack it first.'
# (first bytes, what the file is, what to do)
_KNOWN = (
  (
    b'version https://git-lfs.github.com',
    'a pointer of Git LFS instead of the file',
    'run `git lfs pull` where it was cloned, or download the file itself.',
  ),
  (b'\x1f\x8b', 'compressed by gzip', _UNPACK),
  (b'BZh', 'compressed by bzip2', _UNPACK),
  (b'\xfd7zXZ\0', 'compressed by xz', _UNPACK),
  (b'\x28\xb5\x2f\xfd', 'compressed by zstd', _UNPACK),
  (b'\x04\x22\x4d\x18', 'compressed by LZ4', _UNPACK),
  (b'7z\xbc\xaf\x27\x1c', 'a 7z archive', _UNPACK),
  (b'Rar!\x1a\x07', 'a RAR archive', _UNPACK),
  (b'\x89HDF\r\n\x1a\n', 'HDF5, a format of TensorFlow and Keras', _OTHER),
  (b'GGUF', 'GGUF, a format of llama.cpp', _OTHER),
  (b'ggml', 'GGML, a format of llama.cpp', _OTHER),
  (b'lmgg', 'GGML, a format of llama.cpp', _OTHER),
  (b'tjgg', 'GGML, a format of llama.cpp', _OTHER),
  (b'\x93NUMPY', 'a NumPy array', _OTHER),
  (b'%PDF', 'a PDF', _AGAIN),
  (b'\x89PNG', 'an image', _AGAIN),
  (b'\xff\xd8\xff', 'an image', _AGAIN),
  (b'\x7fELF', 'a program', _AGAIN),
  (b'\0' * 64, 'zeros at its beginning, as an unfinished download', _AGAIN),
  (b'PK\5\6', 'an empty zip archive', _AGAIN),
)
# Entries of a directory, what it is, what to do.
_DIRECTORIES = (
  (
    ('_CHECKPOINT_METADATA', 'manifest.ocdbt', '_METADATA', 'ocdbt.process_0'),
    'an Orbax checkpoint of JAX',
    'export its weights with mdm_jax.tools.export_weights, if it is one of '
    'mdm_jax; otherwise as safetensors.',
  ),
  (('saved_model.pb',), 'a SavedModel of TensorFlow', _OTHER),
  (
    ('flax_model.msgpack', 'tf_model.h5', 'rust_model.ot', 'model.onnx'),
    'a model for other frameworks alone',
    _OTHER,
  ),
  (
    ('model_index.json',),
    'a whole pipeline of diffusers',
    'give the folder in it that has the model, such as text_encoder.',
  ),
  (
    ('snapshots',),
    "a directory of Hugging Face's cache",
    'give the directory in its snapshots.',
  ),
)


def check(path: str | os.PathLike, wanted: Collection[str]) -> str:
  """Returns which of the wanted kinds a file is.

  Args:
    path: the file.
    wanted: of 'safetensors', 'zip', 'pickle'.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: it is something else or cannot be read. The message says what it
      is and what to do.
  """
  kind, what, remedy = _recognise(path)
  if kind not in wanted:
    raise ValueError(f'{path} is {what}: {remedy}')
  return kind


def explain(path: str | os.PathLike) -> str:
  """What a file that cannot be read is, and what to do: 'is X: do Y.'."""
  _, what, remedy = _recognise(path)
  return f'is {what}: {remedy}'


def explain_directory(directory: str | os.PathLike) -> str:
  """What a directory is, 'It is X: do Y.', or '' if it is nothing known."""
  for names, what, remedy in _DIRECTORIES:
    if any((epath.Path(directory) / name).exists() for name in names):
      return f' It is {what}: {remedy}'
  return ''


def _recognise(path: str | os.PathLike) -> tuple[str, str, str]:
  """The kind of a file, or ''; what it is; what to do if it is not wanted."""
  if not files.is_local(path):
    path = remote_reads.kept_copy(path)
  if not os.path.exists(path):
    raise FileNotFoundError(
      f'{path} does not exist: download it, or give its path.'
    )
  if os.path.isdir(path):
    return '', 'a directory', 'give the file in it.'
  if not os.path.isfile(path):
    return '', 'no regular file', 'give a file.'
  try:
    with open(path, 'rb') as file:
      head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
  except OSError as error:
    return '', f'not readable ({error.strerror})', 'change its permissions.'
  if not head:
    return '', 'empty', _AGAIN
  for start, what, remedy in _KNOWN:
    if head.startswith(start):
      return '', what, remedy
  if head[:4] == b'PK\3\4':
    return 'zip', 'a zip archive', _OTHER
  if head[257:262] == b'ustar':
    return '', 'a tar archive', f'{_UNPACK[:-1]}; {_OTHER}'
  if head[4:8] == b'TFL3':
    return '', 'TensorFlow Lite', _OTHER
  # A safetensors file is a length, a JSON object of it, and numbers.
  if head[8:9] == b'{' and head[6:8] == b'\0\0':
    return 'safetensors', 'safetensors', _OTHER
  if head[0] == 0x80 and head[1:2] in (b'\2', b'\3', b'\4', b'\5'):
    return 'pickle', 'a pickle', _OTHER
  if _is_msgpack(head):
    return '', 'msgpack, a format of Flax', _OTHER
  # The field ir_version, then a text.
  if head[0] == 8 and head[2:3] in (b'\x12', b'\x1a', b'\x3a', b'\x42'):
    return '', 'ONNX', _OTHER
  if text := _text(head):
    if text.startswith('<'):
      return '', 'a web page (HTML or XML), as servers send for errors', _AGAIN
    return '', f'text that begins with {text[:60]!r}', _AGAIN
  if size < 9:
    return '', f'{size} bytes long', _AGAIN
  return '', 'of a kind that is not known here', _OTHER


def _is_msgpack(head: bytes) -> bool:
  """Whether it is a map, as Flax writes, whose first key is a text."""
  if 0x80 < head[0] < 0x90:
    key = head[1:2]
  elif head[0] in (0xDE, 0xDF):
    key = head[3:4] if head[0] == 0xDE else head[5:6]
  else:
    return False
  return key != b'' and (0xA0 <= key[0] < 0xC0 or key[0] in (0xD9, 0xDA))


def _text(head: bytes) -> str:
  """The text that a file begins with, or '' if it is none."""
  try:
    text = head.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    if error.start < len(head) - 3:  # Not a letter that was cut.
      return ''
    text = head[: error.start].decode('utf-8-sig')
  text = text.strip()
  return text if all(c.isprintable() or c in '\t\r\n' for c in text) else ''
