"""Separates what an image file shows from what it says about it.

Pillow reads EXIF, colour profiles, texts and thumbnails along with an image. If
they are damaged it refuses the image, and if they are large it may compute for
minutes. So a file is reduced to the parts that its pixels depend on before
Pillow sees it. Of the metadata only EXIF's orientation tag is read, here.
"""

from collections.abc import Iterator
import io
import re
import struct
from typing import NamedTuple
import zlib

# Parts (segments, chunks, blocks) of a file that are looked at, at most. A PNG
# of 30 million pixels has some ten thousand.
_MAX_PARTS = 100_000
# Scans of a JPEG, each of which may take as long as the image. Encoders write
# up to 20.
_MAX_SCANS = 100

# A marker of a JPEG. In the data of a scan, 0xff is followed by zero or is a
# restart marker.
_MARKER = re.compile(rb'\xff([^\x00\xff\xd0-\xd7])')
_APP0, _APP1, _APP14, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_METADATA = (*range(_APP0, 0xF0), _COMMENT)
_SCAN, _END = 0xDA, 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8, _END)
_FRAMES = tuple(x for x in range(0xC0, 0xD0) if x not in (0xC4, 0xC8, 0xCC))
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)

_PNG = b'\x89PNG\r\n\x1a\n'
# Parts of a WebP that hold an image, the last ones of what its pixels need.
_WEBP_IMAGES = (b'VP8 ', b'VP8L', b'ANMF')
_WEBP_PARTS = (b'VP8X', b'ANIM', b'ALPH', *_WEBP_IMAGES)

# ImageMagick stores EXIF so: hexadecimal digits after three lines. EXIF has at
# most 64 kB in a JPEG.
_RAW_EXIF, _MAX_RAW = b'Raw profile type exif\0', 2**18

_EXIF = b'Exif\0\0'
_EXIF_HEADS = re.compile(rb'(?:Exif\0\0)*')  # some programs write it twice
_ORIENTATION = 0x0112
# TIFF's numeric types, in the notation of struct; two numbers are a fraction.
_TYPES = {
  1: 'B',
  3: 'H',
  4: 'L',
  5: 'LL',
  6: 'b',
  7: 'B',
  8: 'h',
  9: 'l',
  10: 'll',
  11: 'f',
  12: 'd',
}


class ImageFile(NamedTuple):
  """An image file without its metadata.

  Attributes:
    format: Pillow's name of the format; empty if it is none that is known.
    file: reduced to what its pixels depend on. Damage to those parts stays. It
      is the only reference to its bytes, so closing it frees them.
    orientation: EXIF's, from 1 (upright) to 8.
    size: (width, height) in pixels of a WebP, for which Pillow allocates memory
      before it tells the size; None for other formats.
    held: bytes that a decoder holds of each pixel, at the full size, beside the
      image that it makes: the coefficients of a JPEG with several scans, three
      copies of a WebP.
  """

  format: str
  file: io.BytesIO
  orientation: int = 1
  size: tuple[int, int] | None = None
  held: float = 0.0


def strip(data: bytes) -> ImageFile:
  """Removes the metadata of a JPEG, PNG, WebP, GIF or BMP file.

  Raises:
    ValueError, LookupError: the file is damaged, or has so many parts that it
      would take too long.
  """
  if data.startswith(b'\xff\xd8\xff'):
    return _strip_jpeg(data)
  if data.startswith(_PNG):
    return _strip_png(data)
  if data.startswith((b'GIF87a', b'GIF89a')):
    return _strip_gif(data)
  if data.startswith(b'RIFF') and data[8:12] == b'WEBP':
    return _strip_webp(data)
  if data.startswith(b'BM'):
    return ImageFile(
      'BMP', io.BytesIO(data)
    )  # Pillow reads none of its metadata.
  return ImageFile('', io.BytesIO(data))


def orientation(exif: bytes) -> int:
  """The orientation that an EXIF block states: 1 to 8, or 1 if it is damaged.

  Args:
    exif: a TIFF file, with or without 'Exif' before it.
  """
  exif = exif[_EXIF_HEADS.match(exif).end() :]
  try:
    value = _read_tag(exif, {b'II': '<', b'MM': '>'}[exif[:2]])
  except (KeyError, struct.error, ZeroDivisionError):
    return 1
  return int(value) if value in range(1, 9) else 1


def _read_tag(exif: bytes, order: str) -> float:
  """The first number of the orientation tag, whatever its type; 0 if none."""
  (start,) = struct.unpack_from(f'{order}L', exif, 4)
  (count,) = struct.unpack_from(f'{order}H', exif, start)
  for entry in range(start + 2, start + 2 + 12 * count, 12):
    tag, kind, length = struct.unpack_from(f'{order}HHL', exif, entry)
    if tag == _ORIENTATION and length:
      numbers, where = order + _TYPES[kind], entry + 8
      if struct.calcsize(numbers) * length > 4:
        (where,) = struct.unpack_from(f'{order}L', exif, where)
      number, *divisor = struct.unpack_from(numbers, exif, where)
      return number / divisor[0] if divisor else number
  return 0


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields marker, start and end of a JPEG's segments, without scans' data."""
  position = 2
  for _ in range(_MAX_PARTS):
    if not (match := _MARKER.search(data, position)):
      return
    marker, position = match[1][0], match.end()
    start = position - 2
    if marker not in _WITHOUT_LENGTH:
      position += max(int.from_bytes(data[position : position + 2], 'big'), 2)
    yield marker, start, position
  raise ValueError(f'over {_MAX_PARTS} segments')


def _strip_jpeg(data: bytes) -> ImageFile:
  kept, exif, frame, scans = [data[:2]], [], None, 0
  for marker, start, end in _segments(data):
    payload = data[start + 4 : end]
    if marker == _SCAN:
      if not scans:
        kept.append(data[start:])
      # A sequential frame is decoded in one pass if its first scan has all
      # components.
      if not scans and frame and frame[0] in _SEQUENTIAL:
        if frame[1][5:6] == payload[:1]:
          break
      scans += 1
      if scans > _MAX_SCANS:
        raise ValueError(f'over {_MAX_SCANS} scans')
    elif scans:
      if marker == _END:
        break
    elif marker not in _METADATA or _decides_colors(marker, payload):
      kept.append(data[start:end])
      if marker in _FRAMES:
        frame = marker, payload
    elif marker == _APP1 and payload.startswith(_EXIF):
      exif.append(payload[len(_EXIF) :])
  return ImageFile(
    'JPEG',
    io.BytesIO(b''.join(kept)),
    orientation(b''.join(exif)),
    held=_coefficient_bytes(frame) if scans else 0.0,
  )


def _coefficient_bytes(frame: tuple[int, bytes] | None) -> float:
  """Bytes of the coefficients of each pixel, by a JPEG's frame header."""
  factors = frame[1][7::3] if frame else b''
  widths, heights = [x >> 4 for x in factors], [x & 15 for x in factors]
  samples = sum(x * y for x, y in zip(widths, heights))
  largest = max(widths, default=0) * max(heights, default=0)
  return 2 * samples / largest if largest else 0.0


def _decides_colors(marker: int, payload: bytes) -> bool:
  """Whether an application's segment tells libjpeg what the components are."""
  if marker == _APP0:
    return len(payload) >= 14 and payload.startswith(b'JFIF\0')
  return (
    marker == _APP14 and len(payload) >= 12 and payload.startswith(b'Adobe')
  )


def _strip_png(data: bytes) -> ImageFile:
  kept, seen, position = [_PNG], set(), len(_PNG)
  exif, raw_exif = b'', None
  for _ in range(_MAX_PARTS):
    if position + 8 > len(data):
      break
    length, kind = struct.unpack_from('>L4s', data, position)
    start, position = position, position + 12 + length
    if kind == b'IDAT':
      kept.append(data[start:position])
    elif kind == b'eXIf':
      exif = exif or data[start + 8 : position - 4]
    elif kind in (b'tEXt', b'zTXt'):
      text = data[start + 8 : position - 4]
      if raw_exif is None and text.startswith(_RAW_EXIF):
        raw_exif = _parse_raw_exif(kind, text.removeprefix(_RAW_EXIF))
    elif kind == b'IEND':
      kept.append(data[start:position])
      break
    elif kind in seen or b'IDAT' in seen:
      pass  # It comes too late.
    elif kind in (b'IHDR', b'PLTE'):
      kept.append(data[start:position])
    elif kind == b'tRNS':
      kept.append(_transparency(data[start + 4 : position], data[25:26]))
    seen.add(kind)
  else:
    # Behind the image, more chunks do not matter.
    if data[start + 4 : start + 8] == b'IDAT' or b'IDAT' not in seen:
      raise ValueError(f'over {_MAX_PARTS} chunks')
  return ImageFile(
    'PNG',
    io.BytesIO(b''.join(kept)),
    orientation(exif or raw_exif or b''),
  )


def _parse_raw_exif(kind: bytes, text: bytes) -> bytes:
  """EXIF in a text of a PNG; empty if it is damaged."""
  try:
    if kind == b'zTXt':  # A byte for the method, and what it compressed.
      text = zlib.decompressobj().decompress(text[1:], _MAX_RAW)
    return bytes.fromhex(b''.join(text.split(b'\n')[3:]).decode())
  except (zlib.error, ValueError):
    return b''


def _transparency(chunk: bytes, color_type: bytes) -> bytes:
  """A PNG's chunk of transparent colours; empty if it cannot be used.

  Args:
    chunk: type, data and checksum, as in the file.
    color_type: of the image: 0 for grey, 2 for RGB, 3 for a palette.
  """
  body, checksum = chunk[:-4], chunk[-4:]
  if checksum != struct.pack('>L', zlib.crc32(body)):
    return b''
  least, most = {b'\0': (2, 2), b'\2': (6, 6), b'\3': (1, 256)}.get(
    color_type, (1, 0)
  )
  colors = body[4:][:most]
  if len(colors) < least:
    return b''
  body = b'tRNS' + colors
  return (
    struct.pack('>L', len(colors)) + body + struct.pack('>L', zlib.crc32(body))
  )


def _strip_gif(data: bytes) -> ImageFile:
  """Keeps the screen, the palettes, the transparency and the first frame."""
  end_of_head = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
  control, position, is_extension = b'', end_of_head, False
  for _ in range(_MAX_PARTS):
    byte = data[position]
    if is_extension:  # A block and its length; an empty one is the last.
      position += 1 + byte
      is_extension = byte > 0
    elif byte == ord(','):
      kept = data[:end_of_head] + control + data[position:]
      return ImageFile('GIF', io.BytesIO(kept))
    elif byte == ord('!'):
      if data[position + 1] == 0xF9 and data[position + 2] >= 4:
        control = b'!\xf9\4' + data[position + 3 : position + 7] + b'\0'
      position, is_extension = position + 2, True
    elif byte == ord(';'):
      raise ValueError('there is no frame')
    else:  # Decoders skip it.
      position += 1
  raise ValueError(f'over {_MAX_PARTS} blocks before the first frame')


def _strip_webp(data: bytes) -> ImageFile:
  """Keeps a still image, or the first frame of an animation."""
  kept, exif, position = [], b'', 12
  size, has_image = None, False
  for _ in range(_MAX_PARTS):
    kind = data[position : position + 4]
    length = int.from_bytes(data[position + 4 : position + 8], 'little')
    start, position = position, position + 8 + length + length % 2
    payload = data[start + 8 : start + 8 + length]
    if not payload:
      if start >= len(data):
        break
    elif kind == b'EXIF':
      exif = exif or payload
    elif kind in _WEBP_PARTS and not has_image:
      size = size or _webp_size(kind, payload)
      # The last byte of a file, which only fills it up, may be missing.
      missing = b'\0' * (length % 2 if len(payload) == length else 0)
      kept.append(data[start : start + 8] + payload + missing)
      has_image = kind in _WEBP_IMAGES
  else:
    if not has_image:
      raise ValueError(f'over {_MAX_PARTS} chunks before the image')
  total = struct.pack('<L', 4 + sum(map(len, kept)))
  file = io.BytesIO(b''.join([b'RIFF', total, b'WEBP', *kept]))
  return ImageFile('WEBP', file, orientation(exif), size, held=12.0)


def _webp_size(kind: bytes, payload: bytes) -> tuple[int, int] | None:
  """(width, height) in pixels by the first part; None if it is damaged."""
  if kind == b'VP8X':
    return tuple(
      1 + int.from_bytes(payload[at : at + 3], 'little') for at in (4, 7)
    )
  if kind == b'VP8L':
    bits = int.from_bytes(payload[1:5], 'little')
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  if kind == b'VP8 ':
    return tuple(
      int.from_bytes(payload[at : at + 2], 'little') & 0x3FFF for at in (6, 8)
    )
  return None
