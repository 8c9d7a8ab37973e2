"""The members of a tar, read once from beginning to end, or found in place.

Reads ustar, GNU and PAX headers. Python's tarfile is not used, as it trusts
the headers of a tar: it loops for ever on a negative size, reads long names of
any size into memory, and takes a damaged header for the end of the archive.
Here every header moves forward in the file, and sizes are limited before
anything is read. Streams (prepare_data) and offsets (index_tars) come from
this one reader, so they cannot disagree about a tar.
"""

import bz2
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import io
import lzma
import re
from typing import Any, BinaryIO
import zlib

from etils import epath

from mdm_jax.runtime import remote_reads

_BLOCK = 512
_CHUNK = 2**20
# Bytes of one long name or PAX header.
_MAX_METADATA = 2**20
# Longer than any file name of an operating system, with its directories.
_MAX_NAME = 4096
_MAX_POSITION = 2**41  # what the table of tar_index can hold
# At the end of an archive. tar itself fills its last record, at most 1 MiB;
# more are left where a download was not finished.
_MAX_ZEROS = 2**22
# A compressed tar may have this many bytes, and this many more for each byte of
# its file. Images hardly compress; this is for bombs.
_MAX_UNPACKED, _MAX_RATIO = 2**30, 200
_MAX_XZ_MEMORY = 2**28
_PLAIN = (b'0', b'\0', b'7')
_DIRECTORY = b'5'
# Types of members that have no contents, whatever their size says.
_EMPTY = (b'1', b'2', b'3', b'4', b'5', b'6')
_KINDS = {
  b'1': 'hard link',
  b'2': 'symbolic link',
  b'3': 'device',
  b'4': 'device',
  _DIRECTORY: 'directory',
  b'6': 'FIFO',
  b'D': 'directory',
  b'S': 'sparse file',
}
_PAX_RECORD = re.compile(rb'(\d{1,9}) ([^=]+)=')
# Control characters and line separators, which would break a line in two.
_CONTROL = re.compile('[\0-\x1f\x7f-\x9f\u2028\u2029]')
_MAGIC_SIZE = 6
_INPUT_SIZE = 2**16
_DECODER_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class DamagedTar(ValueError):
  """A tar that cannot be read further."""


class CompressedTar(ValueError):
  """A tar whose contents cannot be read in place."""


@dataclasses.dataclass(frozen=True)
class Member:
  """A member of a tar.

  Attributes:
    name: printable text, see `readable`.
    offset: of the contents in the (uncompressed) tar, in bytes.
    size: of the contents in bytes.
    kind: empty for a file whose contents are stored as they are; otherwise
      what it is, such as 'hard link'.
  """

  name: str
  offset: int
  size: int
  kind: str = ''


def readable(name: str | bytes) -> str:
  r"""A name as text that can be printed in one line and encoded.

  Bytes that are not UTF-8, control characters and line separators become
  escapes such as `\xe9`.
  """
  if isinstance(name, str):  # Python decodes paths with surrogates.
    name = name.encode('utf-8', 'surrogateescape')
  text = name.decode('utf-8', 'backslashreplace')
  return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


@contextlib.contextmanager
def open_tar(
  path: epath.PathLike, in_place: bool = False
) -> Iterator['TarReader']:
  """Opens a tar.

  Args:
    path: of the tar, local or in a bucket, compressed or not.
    in_place: whether contents are skipped by seeking; not if compressed.

  Raises:
    CompressedTar: if `in_place`.
    OSError: the file cannot be opened.
    Unavailable: a bucket does not answer, also later.
  """
  with remote_reads.open_stream(path) as file:
    yield TarReader(file, in_place)


class TarReader:
  """Iterates over the members of a tar.

  After each member, its contents may be read with `read`, or not.
  """

  def __init__(self, file: BinaryIO, in_place: bool = False):
    """Begins at the start of a file."""
    self._position, self._size, self._compressed = 0, None, None
    if in_place:
      if _decoder(file.read(_MAGIC_SIZE)):
        raise CompressedTar('the tar is compressed')
      self._size = file.seek(0, io.SEEK_END)
      file.seek(0)
      self._file = file
      return
    self._file = _Counted(file)
    if decoder := _decoder(self._file.begin):
      self._compressed = self._file
      self._file = io.BufferedReader(
        _Decompressed(self._compressed, decoder), _CHUNK
      )

  def read(self, size: int) -> bytes:
    """Reads contents.

    Raises:
      DamagedTar: the tar ends before, or cannot be decompressed.
    """
    end = self._position + size
    data = self._read_up_to(size)
    if len(data) < size:
      raise DamagedTar(f'the tar ends before byte {end}')
    return data

  def skip(self, size: int) -> None:
    """Skips contents; raises DamagedTar as `read`."""
    end = self._position + size
    if self._size is None:
      while self._position < end and self._read_up_to(
        min(end - self._position, _CHUNK)
      ):
        pass
    elif end <= self._size:
      self._position = self._file.seek(end)
    if self._position < end:
      raise DamagedTar(f'the tar ends before byte {end}')

  def __iter__(self) -> Iterator[Member]:
    """Yields all members, of all archives in the file.

    Raises:
      DamagedTar: the tar cannot be read further, or has no end.
    """
    always, fields = {}, {}
    while (header := self._read_header()) is not None:
      kind, size = header[156:157], _number(header[124:136])
      if kind in (b'L', b'K'):
        name = self._read_metadata(size).partition(b'\0')[0]
        fields |= {b'path': name} if kind == b'L' else {}
      elif kind in (b'x', b'X'):
        fields |= _parse_pax(self._read_metadata(size))
      elif kind == b'g':
        always |= _parse_pax(self._read_metadata(size))
      else:
        member = self._member(header, always | fields)
        end = member.offset + -(-member.size // _BLOCK) * _BLOCK
        if end > _MAX_POSITION:
          raise DamagedTar(f'a member of {member.size} bytes')
        yield member
        self.skip(end - self._position)
        fields = {}
    if fields:
      raise DamagedTar('a long name or PAX header without a member')

  def _read_header(self) -> bytes | None:
    """Reads up to the next header; returns None at the end of the file."""
    start = self._position
    while True:
      block = self._read_up_to(_BLOCK)
      num_zeros = self._position - start - len(block)
      if block.count(0) == len(block):
        if num_zeros > _MAX_ZEROS:
          raise DamagedTar(
            f'more than {_MAX_ZEROS} zeros in the place of a member'
          )
        if len(block) == _BLOCK:
          continue
        if self._position == 0:
          raise DamagedTar('the file is empty')
        if self._position == start:
          raise DamagedTar(
            'it has no end-of-archive blocks, so it may have been cut'
          )
        return None
      if len(block) == _BLOCK and _is_header(block):
        return block
      if start == num_zeros == 0:
        raise DamagedTar('not a tar')
      if num_zeros:
        raise DamagedTar('data after the end of the archive')
      where = self._position - len(block)
      raise DamagedTar(f'no header at byte {where}')

  def _read_metadata(self, size: int) -> bytes:
    if size > _MAX_METADATA:
      raise DamagedTar(f'a name or PAX header of {size} bytes')
    data = self.read(size)
    self.skip(-size % _BLOCK)
    return data

  def _member(self, header: bytes, fields: dict[bytes, bytes]) -> Member:
    kind, size = header[156:157], _number(header[124:136])
    name = header[:100].partition(b'\0')[0]
    prefix = header[345:500].partition(b'\0')[0]
    # GNU's own format has other fields in the place of the prefix.
    if prefix and header[257:263] == b'ustar\0':
      name = prefix + b'/' + name
    name = fields.get(b'GNU.sparse.name') or fields.get(b'path') or name
    if len(name) > _MAX_NAME:
      raise DamagedTar(f'a name of {len(name)} bytes')
    if fields.get(b'size'):
      size = _decimal(fields[b'size'])
    if kind in _EMPTY:
      size = 0
    if kind == b'S':
      has_more = header[482]
      while has_more:
        has_more = self.read(_BLOCK)[504]
    is_sparse = any(field.startswith(b'GNU.sparse.') for field in fields)
    what = _KINDS.get(kind, f'of type {kind!r}')
    if kind in _PLAIN:
      what = 'sparse file' if is_sparse else ''
      # How tar stored directories before it had types.
      if kind == b'\0' and name.endswith(b'/'):
        what = 'directory'
    return Member(readable(name), self._position, size, what)

  def _read_up_to(self, size: int) -> bytes:
    chunks, left = [], size
    while left:
      try:
        chunk = self._file.read(min(left, _CHUNK))
      except _DECODER_ERRORS as error:
        raise DamagedTar(f'{type(error).__name__}: {error}') from error
      if not chunk:
        break
      chunks.append(chunk)
      left -= len(chunk)
      self._position += len(chunk)
    if self._compressed and self._position > (
      _MAX_UNPACKED + _MAX_RATIO * self._compressed.count
    ):
      raise DamagedTar(
        f'more than {_MAX_RATIO} times as large as its compressed file'
      )
    return chunks[0] if len(chunks) == 1 else b''.join(chunks)


def _is_header(block: bytes) -> bool:
  """Whether the checksum of a header is right."""
  try:
    expected = _number(block[148:156])
  except DamagedTar:
    return False
  unsigned = sum(block) - sum(block[148:156]) + 8 * ord(' ')
  # Some old programs added the bytes as signed numbers.
  return expected == unsigned or expected == unsigned - 256 * sum(
    byte > 127 for byte in block[:148] + block[156:]
  )


def _number(field: bytes) -> int:
  """Reads a number of a header: octal digits, or GNU's base 256."""
  if field[0] == 0x80:
    return int.from_bytes(field[1:])
  digits = field.partition(b'\0')[0].strip(b' ')
  if digits.strip(b'01234567'):
    raise DamagedTar(f'{field!r} is not the size of a member')
  return int(digits or b'0', 8)


def _decimal(digits: bytes) -> int:
  # Longer numbers exceed any file.
  if not re.fullmatch(rb'\d{1,18}', digits):
    raise DamagedTar(f'{digits[:40]!r} is not the size of a member')
  return int(digits)


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
  """Reads records `length keyword=value` and a newline."""
  fields, position = {}, 0
  while position < len(data) and data[position]:
    found = _PAX_RECORD.match(data, position)
    end = position + int(found[1]) if found else 0
    if not found or not found.end() < end <= len(data):
      raise DamagedTar('a malformed PAX header')
    if data[end - 1 : end] != b'\n':
      raise DamagedTar('a malformed PAX header')
    fields[found[2]] = data[found.end() : end - 1]
    position = end
  return fields


class _Counted:
  """A file that counts what is read, and shows how it begins."""

  def __init__(self, file: BinaryIO):
    self._file, self.count = file, 0
    self.begin = self._unread = file.read(_MAGIC_SIZE)

  def read(self, size: int) -> bytes:
    data, self._unread = self._unread[:size], self._unread[size:]
    data = data or self._file.read(size)
    self.count += len(data)
    return data


class _Decompressed(io.RawIOBase):
  """Reads gzip, bzip2 or xz, also several files one after another."""

  def __init__(self, file: _Counted, new_decoder: Callable[[], Any]):
    self._file, self._new_decoder = file, new_decoder
    self._decoder, self._input = None, b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while True:
      if self._decoder is None:
        # There may be zeros between two compressed files, and at the end.
        self._input = self._input.lstrip(b'\0')
        if not self._input:
          self._input = self._file.read(_INPUT_SIZE)
          if not self._input:
            return 0
          continue
        self._decoder = self._new_decoder()
      # zlib has no such attribute.
      if not self._input and getattr(self._decoder, 'needs_input', True):
        self._input = self._file.read(_INPUT_SIZE)
      is_end = not self._input
      data = self._decoder.decompress(self._input, len(buffer))
      self._input = getattr(self._decoder, 'unconsumed_tail', b'')
      if self._decoder.eof:
        self._input, self._decoder = self._decoder.unused_data, None
      elif is_end and not data:
        raise EOFError('the compressed file has no end')
      if data:
        buffer[: len(data)] = data
        return len(data)


def _decoder(begin: bytes) -> Callable[[], Any] | None:
  """Makes the decoders of a compressed file, from its first bytes."""
  if begin.startswith(b'\x1f\x8b'):
    return functools.partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)
  if begin.startswith(b'BZh'):
    return bz2.BZ2Decompressor
  if begin.startswith((b'\xfd7zXZ', b'\x5d\0\0\x80')):
    return functools.partial(lzma.LZMADecompressor, memlimit=_MAX_XZ_MEMORY)
  return None
