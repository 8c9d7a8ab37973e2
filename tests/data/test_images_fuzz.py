"""Damaged image files: an image or a bad record, in bounded time and memory."""

import functools
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image
import pytest

from mdm_jax.data import images
from mdm_jax.data.images import BadRecord, decode_image, load_image
from tests import fuzzing


def encode(image, file_format, **options):
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def chunk(kind, data):
  checksum = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + checksum


def run_length_bmp(bits):
  """A BMP of 8 x 4: two runs, pixels, a jump and a run, and a run."""
  data = b'\4\1\4\2\0\0' + b'\0\4' + b'\1\2\3\4'[: bits // 2] + b'\0\0'
  data += b'\0\2\2\0\6\3\0\0' + b'\x08\4\0\1'
  palette = bytes(range(4 * 2**bits)) if bits == 4 else bytes(range(256)) * 4
  offset = 54 + len(palette)
  header = struct.pack('<2sIHHI', b'BM', offset + len(data), 0, 0, offset)
  header += struct.pack(
    '<IiiHHIIiiII', 40, 8, 4, 1, bits, 3 - bits // 4, len(data), 0, 0, 0, 0
  )
  return header + palette + data


def exif(rng):
  """An orientation of any type between other tags, some of them impossible."""
  order = rng.choice(('<', '>'))
  entries = []
  for _ in range(rng.integers(4)):
    entries.append(
      struct.pack(
        f'{order}HHL4s',
        rng.choice((0x10F, 0x11A, 0x11B, 0x128, 0x8769, 0x8825, 0xA005, 0x111)),
        rng.integers(14),
        rng.choice((0, 1, 2, 8, 2**31)),
        rng.bytes(4),
      )
    )
  value = struct.pack(f'{order}HH', rng.integers(10), 0)
  tag = struct.pack(f'{order}HHL', 0x112, 3, 1) + value
  entries.insert(rng.integers(len(entries) + 1), tag)
  return (
    {'<': b'II*\0', '>': b'MM\0*'}[order]
    + struct.pack(f'{order}LH', 8, len(entries))
    + b''.join(entries)
    + rng.bytes(rng.integers(40))
  )


@functools.cache
def files():
  """A small file of each form, by its format."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (5, 7, 4), np.uint8).repeat(4, 0).repeat(4, 1)
  rgba = Image.fromarray(pixels)
  rgb, palette = rgba.convert('RGB'), rgba.convert('RGB').convert('P')
  deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
  other = {'save_all': True, 'append_images': [rgba.rotate(180)]}
  tags = {'exif': b'Exif\0\0' + exif(np.random.default_rng(1))}
  return {
    'JPEG': [
      encode(rgb, 'JPEG', **tags, icc_profile=b'profile', comment=b'comment'),
      encode(rgb, 'JPEG', progressive=True, xmp=b'<x>', **tags),
      encode(rgb.convert('L'), 'JPEG', restart_marker_blocks=2),
      encode(rgb.convert('CMYK'), 'JPEG', progressive=True),
      encode(rgb, 'MPO', save_all=True, append_images=[rgb.rotate(180)]),
    ],
    'PNG': [
      encode(image, 'PNG', **options)
      for image, options in [
        (rgba, tags),
        (rgb, {'transparency': (1, 2, 3), 'dpi': (72, 72)}),
        (palette, {'transparency': bytes(range(200)), 'icc_profile': b'icc'}),
        (palette, {'transparency': 7, 'bits': 8}),
        (deep, {'transparency': 5}),
        (rgba.convert('LA'), {}),
        (rgb.convert('1'), {'transparency': 0}),
        (rgba, other),
        (rgba, {**other, 'default_image': True}),
      ]
    ],
    'WEBP': [
      encode(rgba, 'WEBP', **tags, icc_profile=b'icc'),
      encode(rgba, 'WEBP', lossless=True, xmp=b'<x>'),
      encode(rgb, 'WEBP'),
      encode(rgba, 'WEBP', **other),
    ],
    'GIF': [
      encode(palette, 'GIF', comment=b'comment', transparency=3),
      encode(rgb.convert('L'), 'GIF', interlace=True),
      encode(rgba, 'GIF', **other, loop=0, disposal=2),
    ],
    'BMP': [
      *(encode(rgb.convert(mode), 'BMP') for mode in ('RGB', 'P', 'L', '1')),
      encode(rgba, 'BMP'),
      run_length_bmp(8),
      run_length_bmp(4),
    ],
  }


def with_checksums(data):
  """A PNG whose chunks have right checksums, whatever else is damaged."""
  parts, position = [data[:8]], 8
  while position + 12 <= len(data):
    (length,) = struct.unpack_from('>L', data, position)
    start, position = position, position + 12 + length
    parts.append(
      chunk(data[start + 4 : start + 8], data[start + 8 : position - 4])
    )
  return b''.join(parts)


def sample(rng):
  """A format, and a file of it."""
  name = rng.choice(list(files()))
  return name, files()[name][rng.integers(len(files()[name]))]


def text(rng, kind):
  """What a PNG's chunk of this type holds, or something else."""
  packed = zlib.compress(bytes(10 ** rng.integers(0, 7)))
  return {
    b'zTXt': b'key\0' + bytes([rng.integers(2)]) + packed,
    b'iTXt': b'XML:com.adobe.xmp\0\1\0en\0key\0' + packed,
    b'iCCP': b'name\0\0' + packed,
    b'eXIf': exif(rng),
    b'tEXt': b'exif\0' + rng.bytes(9),
  }.get(kind, b'')


def more_metadata(name, data, rng):
  """The file with a segment, chunk or block of metadata that may be damaged."""
  payload = rng.bytes(rng.choice((0, 1, 3, 12, 13, 14, 26, 33, 300)))
  if name == 'JPEG':
    marker = rng.choice((*range(0xE0, 0xED), 0xED, 0xEF, 0xFE))
    payload = (
      rng.choice(
        [
          *(b'JFIF\0', b'Exif\0\0', b'http://ns.adobe.com/xap/1.0/\0', b''),
          *(b'ICC_PROFILE\0', b'MPF\0', b'FPXR\0', b'Photoshop 3.0\0'),
        ]
      )
      + payload
    )[: 13 if marker == 0xE0 else None]
    if marker == 0xE1 and rng.random() < 0.5:
      payload = b'Exif\0\0' + exif(rng)
    segment = struct.pack('>BBH', 255, marker, len(payload) + 2) + payload
    return data[:2] + segment + data[2:]
  if name == 'PNG':
    kind = rng.choice(
      b'zTXt iTXt tEXt iCCP eXIf gAMA cHRM sRGB pHYs acTL fcTL fdAT bKGD sPLT '
      b'hIST tIME sBIT caBX abcd'.split()
    )
    added = chunk(kind, text(rng, kind) or payload)
    if rng.random() < 0.3:
      added = added[:-1] + b'?'
    at = rng.choice((33, len(data) - 12))
    return data[:at] + added + data[at:]
  if name == 'WEBP':
    kind = rng.choice([b'EXIF', b'XMP ', b'ICCP', b'abcd'])
    payload = exif(rng) if kind == b'EXIF' else payload
    size = struct.pack('<L', len(payload))
    return data + kind + size + payload + b'\0' * (len(payload) % 2)
  if name == 'GIF':
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    block = bytes([len(payload) % 256]) + payload[: len(payload) % 256]
    end = b'' if not payload[: len(payload) % 256] else b'\0'
    kind = bytes([rng.choice((0x01, 0xFE, 0xFF, 0x00))])
    return data[:at] + b'!' + kind + block + end + data[at:]
  return data


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_damaged_files_are_decoded_or_refused(count):
  def make(rng):
    name, data = sample(rng)
    for _ in range(rng.integers(3)):
      data = more_metadata(name, data, rng)
    data = fuzzing.damage(data, rng)
    is_repaired = name == 'PNG' and rng.random() < 0.7
    return with_checksums(data) if is_repaired else data

  def read(data):
    image, side = decode_image(data, 8)
    assert image.shape == (8, 8, 3) and side >= 1
    load_image(data)

  fuzzing.check(read, make, count, refuses=BadRecord, megabytes=400)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_damaged_animations_are_decoded_or_refused(count):
  def make(rng):
    name = rng.choice(['PNG', 'WEBP', 'GIF', 'JPEG'])
    data = files()[name][-1]
    if name == 'JPEG':
      data = files()[name][0] * 3  # One after the other.
    elif rng.random() < 0.5:
      data = more_metadata(name, data, rng)
    data = fuzzing.damage(data, rng)
    return with_checksums(data) if name == 'PNG' else data

  def read(data):
    clip, side = images.decode_clip(data, 8, 2)
    assert clip.shape == (2, 8, 8, 3) and side >= 1
    assert images.load_frames(data).ndim == 4

  fuzzing.check(read, make, count, refuses=BadRecord, megabytes=400)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_metadata_never_matter(count):
  """The pixels stay, but for the orientation; also if warnings are errors."""

  def make(rng):
    name, data = sample(rng)
    changed = data
    for _ in range(rng.integers(1, 5)):
      changed = more_metadata(name, changed, rng)
    return data, changed

  def read(case):
    warnings.simplefilter('error')  # This process runs nothing else.
    data, changed = case
    plain, found = (np.asarray(load_image(each)[0]) for each in case)
    assert images.image_size(changed) == found.shape[1::-1]
    turned = [plain]
    if b'Exif' in changed or b'EXIF' in changed or b'eXIf' in changed:
      turned = [
        np.rot90(plain, i)[:, ::step] for i in range(4) for step in (1, -1)
      ]
    assert any(np.array_equal(found, each) for each in turned)

  fuzzing.check(read, make, count, refuses=())
