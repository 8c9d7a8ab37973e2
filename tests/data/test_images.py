"""Image files of every kind -> upright RGB squares, or BadRecord."""

import functools
import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
import pytest

from mdm_jax.data import images, metadata
from mdm_jax.data.images import BadRecord, decode_image
from tests import fuzzing


def ramp(width, height):
  """Red grows to the right and green downwards, from 0 to 255."""
  x = np.linspace(0, 255, width)[None, :, None]
  y = np.linspace(0, 255, height)[:, None, None]
  pixels = [x + 0 * y, y + 0 * x, 0 * x + 0 * y + 128]
  return Image.fromarray(np.concatenate(pixels, -1).round().astype(np.uint8))


def encode(image, file_format='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def exif(orientation):
  tags = Image.Exif()
  tags[0x0112] = orientation
  return tags


def chunk(kind, data):
  checksum = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + checksum


def png_that_claims(width, height):
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(bytes(1000)))
    + chunk(b'IEND', b'')
  )


def expected_ramp(resolution, width, height):
  """The centre square of the ramp, averaged exactly over each pixel."""
  centre = (np.arange(resolution) + 0.5) / resolution - 0.5
  side = min(width, height)
  x = 127.5 + 255 * centre * side / (width - 1)
  y = 127.5 + 255 * centre * side / (height - 1)
  return np.stack(np.broadcast_arrays(x[None], y[:, None], np.float64(128)), -1)


@pytest.mark.parametrize(
  'file_format, options, tolerance',
  [
    ('PNG', {}, 1),
    ('BMP', {}, 1),
    ('WEBP', {'quality': 95}, 4),
    ('JPEG', {'quality': 95}, 3),
    ('JPEG', {'quality': 95, 'progressive': True}, 3),
    ('MPO', {'quality': 95}, 3),
  ],
)
@pytest.mark.parametrize('size', [(400, 300), (150, 200)])
def test_the_centre_square_is_resized(file_format, options, tolerance, size):
  data = encode(ramp(*size), file_format, **options)
  image, shorter_side = decode_image(data, 32)
  assert image.dtype == np.uint8 and image.shape == (32, 32, 3)
  assert shorter_side == min(size)
  inside = np.s_[2:-2, 2:-2]
  expected = expected_ramp(32, *size)
  np.testing.assert_allclose(image[inside], expected[inside], atol=tolerance)


def test_a_large_jpeg_is_decoded_small_with_the_same_result():
  data = encode(ramp(1600, 1200), 'JPEG', quality=95)
  reduced, size = images.load_image(data, 64)
  assert reduced.size == (200, 150) and size == (1600, 1200)
  image, shorter_side = decode_image(data, 64)
  assert shorter_side == 1200
  full = decode_image(encode(ramp(1600, 1200)), 64)[0]
  np.testing.assert_allclose(image.astype(int), full, atol=3)


def test_shrinking_is_antialiased():
  stripes = np.zeros((256, 256), np.uint8)
  stripes[:, ::2] = 255
  image, _ = decode_image(encode(Image.fromarray(stripes)), 32)
  np.testing.assert_allclose(image[4:-4, 4:-4], 127.5, atol=3)


def test_small_images_are_enlarged_and_keep_their_scale():
  image, shorter_side = decode_image(encode(ramp(20, 10)), 32)
  assert image.shape == (32, 32, 3) and shorter_side == 10


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('file_format', ['JPEG', 'PNG'])
def test_exif_rotation_is_applied(orientation, file_format):
  stored = ramp(1000, 700)
  tags = exif(orientation)
  data = encode(stored, file_format, exif=tags)
  reduced, size = images.load_image(data, 32)
  stored.getexif()[0x0112] = orientation
  upright = ImageOps.exif_transpose(stored)
  assert size == upright.size
  assert size == ((700, 1000) if orientation >= 5 else (1000, 700))
  if file_format == 'JPEG':
    assert max(reduced.size) == 125
  image, shorter_side = decode_image(data, 32)
  assert shorter_side == 700
  expected = decode_image(encode(upright), 32)[0]
  np.testing.assert_allclose(image.astype(int), expected, atol=4)


@pytest.mark.parametrize('is_compressed', [False, True])
@pytest.mark.parametrize(
  'text, expected',
  [
    ('\nexif\n{size:8}\n{digits}\n', 6),
    ('\nexif\n{size:8}\n{digits}0\n', 1),
    ('\nexif\n{size:8}\né\n', 1),
    ('', 1),
  ],
)
def test_exif_as_imagemagick_stores_it_is_applied(
  text, expected, is_compressed
):
  block = exif(6).tobytes()
  texts = PngImagePlugin.PngInfo()
  text = text.format(size=len(block), digits=block.hex())
  texts.add_text('Raw profile type exif', text, zip=is_compressed)
  data = encode(ramp(20, 10), pnginfo=texts)
  assert metadata.strip(data).orientation == expected
  if expected == 6:
    rotated = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(images.load_image(data)[0], rotated)


def tiff(order, kind, count, value, extra=b''):
  entry = struct.pack(f'{order}HHL', 0x112, kind, count) + value.ljust(4, b'\0')
  magic = {'<': b'II*\0', '>': b'MM\0*'}[order]
  head = magic + struct.pack(f'{order}LH', 8, 1)
  return head + entry + bytes(4) + extra


@pytest.mark.parametrize(
  'block, expected',
  [
    (tiff('<', 3, 1, b'\6\0'), 6),
    (tiff('>', 3, 1, b'\0\6'), 6),
    (tiff('>', 4, 1, b'\0\0\0\6'), 6),
    (tiff('<', 1, 1, b'\6'), 6),
    (tiff('<', 6, 1, b'\6'), 6),
    (tiff('<', 3, 2, b'\6\0\1\0'), 6),
    (tiff('<', 11, 1, struct.pack('<f', 6)), 6),
    (tiff('<', 5, 1, b'\x1a', struct.pack('<LL', 12, 2)), 6),
    (b'Exif\0\0' * 3 + tiff('<', 3, 1, b'\6\0'), 6),
    (tiff('<', 5, 1, b'\x1a', struct.pack('<LL', 12, 0)), 1),
    (tiff('<', 5, 1, b'\xff\xff\xff\xff'), 1),
    (tiff('<', 3, 2**31, b'\xff\xff\xff\xff'), 1),
    (tiff('<', 11, 1, struct.pack('<f', np.nan)), 1),
    (tiff('<', 3, 0, b'\6\0'), 1),
    (tiff('<', 2, 2, b'6'), 1),
    (tiff('<', 99, 1, b'\6'), 1),
    (tiff('<', 3, 1, b'\0\0'), 1),
    (tiff('<', 3, 1, b'\x09\0'), 1),
    (tiff('<', 3, 1, b'\6\0')[:17], 1),
    (b'II*\0\xff\xff\xff\xff', 1),
    (b'Exif\0\0', 1),
    (b'', 1),
  ],
)
def test_the_orientation_is_read_whatever_the_rest_says(block, expected):
  assert metadata.orientation(block) == expected
  rgb = ramp(24, 16)
  files = [encode(rgb, 'PNG')[:33] + chunk(b'eXIf', block)]
  files[0] += encode(rgb, 'PNG')[33:]
  files.append(encode(rgb, 'JPEG', exif=b'Exif\0\0' + block))
  files.append(encode(rgb, 'WEBP', exif=block))
  for data in files:
    assert images.load_image(data)[1] == (
      (16, 24) if expected > 1 else (24, 16)
    )


@pytest.mark.parametrize('mode', ['L', 'P', 'LA', '1', 'I;16', 'CMYK'])
def test_every_mode_becomes_rgb(mode):
  rgb = ramp(96, 96)
  if mode == 'I;16':
    grey = np.asarray(rgb.convert('L')).astype(np.uint16)
    data = encode(Image.fromarray(grey * 257))
  elif mode == 'CMYK':
    data = encode(rgb.convert('CMYK'), 'JPEG', quality=95)
  else:
    data = encode(rgb.convert(mode))
  coloured = mode in ('P', 'CMYK')
  expected = rgb if coloured else rgb.convert('L').convert('RGB')
  expected = np.asarray(expected.resize((8, 8), Image.Resampling.BOX))
  image, _ = decode_image(data, 8)
  tolerance = {'1': 40, 'P': 12}.get(mode, 5)
  inside = np.s_[1:-1, 1:-1]
  np.testing.assert_allclose(
    image[inside].astype(int), expected[inside], atol=tolerance
  )


@pytest.mark.parametrize('file_format', ['PNG', 'WEBP'])
def test_transparency_is_composited_on_white(file_format):
  pixels = np.zeros((16, 16, 4), np.uint8)
  pixels[:, 8:, 3] = 128
  options = {'lossless': True} if file_format == 'WEBP' else {}
  data = encode(Image.fromarray(pixels), file_format, **options)
  image, _ = decode_image(data, 16)
  assert image[:, :8].tolist() == np.full((16, 8, 3), 255).tolist()
  assert image[:, 8:].tolist() == np.full((16, 8, 3), 127).tolist()


def test_a_transparent_colour_of_a_palette_is_white():
  palette = Image.new('P', (8, 8), 1)
  palette.putpalette([255, 0, 0, 0, 0, 255])
  image, _ = decode_image(encode(palette, transparency=1), 8)
  assert (image == 255).all()


@pytest.mark.parametrize(
  'data, reason, detail',
  [
    (b'', 'not an image', '0 bytes'),
    (b'<html>not found</html>', 'not an image', '22 bytes'),
    (encode(ramp(64, 64), 'TIFF'), 'not an image', 'bytes'),
    (png_that_claims(20_000, 15_000), 'too many pixels', '20000 x 15000'),
    (png_that_claims(14_000, 10_000), 'too many pixels', '14000 x 10000'),
    *(
      (encode(ramp(200, 200), f)[:-200], 'damaged image', '')
      for f in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
    ),
  ],
)
def test_bad_images_are_named_with_the_reason(data, reason, detail):
  with pytest.raises(BadRecord) as raised:
    decode_image(data, 8, key='shard/7')
  assert raised.value.reason == reason
  assert detail in raised.value.detail
  assert str(raised.value).startswith(f'shard/7: {reason}')


def test_a_bad_record_survives_a_worker_process():
  bad = pickle.loads(pickle.dumps(BadRecord('k', 'reason', 'detail')))
  assert (bad.key, bad.reason, bad.detail) == ('k', 'reason', 'detail')
  assert str(bad) == 'k: reason (detail)'


@pytest.mark.parametrize(
  'color_type, colors',
  [
    *((0, bytes(size)) for size in (0, 1, 3)),
    *((2, bytes(size)) for size in (1, 5, 7, 9)),
    *((3, bytes(size)) for size in (0, 255, 257, 300)),
    (6, bytes(6)),
  ],
)
def test_transparent_colors_of_another_length_are_no_damage(color_type, colors):
  header = struct.pack('>IIBBBBB', 4, 4, 8, color_type, 0, 0, 0)
  width = {0: 1, 2: 3, 3: 1, 6: 4}[color_type] * 4
  data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
  if color_type == 3:
    data += chunk(b'PLTE', bytes([7] * 6))
  data += chunk(b'tRNS', colors)
  data += chunk(b'IDAT', zlib.compress((b'\0' + b'\1' * width) * 4))
  image, _ = images.load_image(data + chunk(b'IEND', b''))
  assert image.size == (4, 4)


def many_scans(count):
  data = encode(ramp(64, 64), 'JPEG', progressive=True)
  last = data.rindex(b'\xff\xda')
  return data[:last] + data[last:-2] * count + data[-2:]


def many_blocks(count):
  data = encode(ramp(8, 8).convert('L'), 'GIF')
  at = data.index(b',')
  return data[:at] + b'!\xfe\0' * count + data[at:]


@pytest.mark.parametrize(
  'data, detail',
  [
    (many_scans(3000), 'over 100 scans'),
    (png_that_claims(8, 8)[:33] + chunk(b'tEXt', b'') * 200_000, 'chunks'),
    (png_that_claims(8, 8)[:33] + chunk(b'IDAT', b'') * 200_000, 'chunks'),
    (encode(ramp(8, 8), 'JPEG')[:2] + b'\xff\xe5\0\2' * 200_000, 'segments'),
    (many_blocks(200_000), 'blocks'),
    (
      encode(ramp(8, 8), 'WEBP')[:12] + (b'abcd' + bytes(4)) * 200_000,
      'chunks',
    ),
  ],
  ids=['scans', 'texts', 'data', 'segments', 'blocks', 'riff'],
)
def test_a_file_of_many_parts_is_refused_at_once(data, detail):
  def read(data):
    with pytest.raises(BadRecord, match=detail):
      images.load_image(data)

  fuzzing.check(read, lambda _: data, 1, refuses=(), seconds=0.7)


@pytest.mark.parametrize(
  'data',
  [
    encode(ramp(8, 8), 'JPEG') + b'\xff\xe5\0\2' * 200_000,
    encode(ramp(8, 8), 'PNG')[:-12] + chunk(b'tEXt', b'') * 200_000,
    encode(ramp(8, 8), 'GIF') + b'!\xfe\0' * 200_000,
    encode(ramp(8, 8), 'WEBP') + bytes(2_000_000),
  ],
  ids=['segments', 'texts', 'blocks', 'riff'],
)
def test_what_follows_the_image_does_not_matter(data):
  assert images.load_image(data)[0].size == (8, 8)


@pytest.mark.parametrize(
  'filling', [b'\xff' * 10**7, b'\0' * 10**7, (b'\xff' * 999 + b'\0') * 10**4]
)
def test_filling_between_segments_is_skipped_at_once(filling):
  data = encode(ramp(8, 8), 'JPEG')
  for at in (2, 20, len(data) - 2):
    changed = data[:at] + filling + data[at:]
    if at == 2:
      changed = b'\xff\xd8\xff\xe5\0\2' + changed[2:]

    fuzzing.check(
      images.load_image,
      functools.partial(lambda data, _: data, changed),
      1,
      refuses=(),
      seconds=1.5,
    )


def test_a_few_scans_are_not_many():
  assert images.load_image(many_scans(90))[0].size == (64, 64)


def largest(form):
  """An image file of the most pixels that count."""
  counts = {'PNG': 1, 'JPEG': 1.5, 'WEBP': 2}[form]
  side = int((images.MAX_PIXELS / counts) ** 0.5)
  mode = 'CMYK' if form == 'JPEG' else 'RGBA'
  options = {
    'PNG': {'compress_level': 1},
    'JPEG': {'progressive': True},
    'WEBP': {'lossless': True, 'method': 0},
  }[form]
  image = Image.new(mode, (side, side - 1), (1, 2, 3, 100))
  return encode(image, form, **options, exif=exif(6))


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'WEBP'])
def test_the_largest_image_takes_256_mb(form):
  data = largest(form)

  def read(data):
    image, size = images.load_image(data)
    assert image.size == size and size[0] == size[1] - 1

  # In units of 2^20 bytes.
  fuzzing.check(read, lambda _: data, 1, refuses=(), seconds=20, megabytes=244)


@pytest.mark.parametrize(
  'file_format, options, factor',
  [
    ('JPEG', {}, 1),
    ('PNG', {}, 1),
    ('BMP', {}, 1),
    ('GIF', {}, 1),
    ('JPEG', {'progressive': True}, 1),
    ('JPEG', {'progressive': True, 'subsampling': 0}, 1.25),
    ('WEBP', {}, 2),
  ],
)
def test_the_limit_counts_what_decoding_costs(file_format, options, factor):
  data = encode(ramp(200, 100), file_format, **options)
  limit = int(20_000 * factor)
  assert images.load_image(data, max_pixels=limit)[0].size == (200, 100)
  assert images.image_size(data, max_pixels=limit) == (200, 100)
  for read in (
    lambda: images.load_image(data, max_pixels=limit - 1),
    lambda: images.image_size(data, max_pixels=limit - 1),
    lambda: decode_image(data, 99, max_pixels=limit - 1),
  ):
    with pytest.raises(BadRecord, match='too many pixels .*200 x 100'):
      read()


def test_a_jpeg_counts_as_it_is_decoded():
  data = encode(Image.new('RGB', (8000, 4000)), 'JPEG')
  image, side = decode_image(data, 16, max_pixels=1000 * 500)
  assert image.shape == (16, 16, 3) and side == 4000
  with pytest.raises(BadRecord, match='8000 x 4000, decoded 4000 x 2000, the'):
    decode_image(data, 1000, max_pixels=1000 * 500)
  # Of a progressive one all coefficients are held, here three bytes a pixel.
  data = encode(Image.new('RGB', (800, 400)), 'JPEG', progressive=True)
  count = (800 * 400 * 3 + 100 * 50 * 4) // 8
  assert decode_image(data, 16, max_pixels=count)[1] == 400
  with pytest.raises(BadRecord, match=f'as much memory as {count}, the limit'):
    decode_image(data, 16, max_pixels=count - 1)


def test_every_error_but_a_stop_becomes_a_bad_record(monkeypatch):
  data = encode(ramp(8, 8))

  def fails(error):
    def resize(*_, **__):
      raise error

    monkeypatch.setattr(Image.Image, 'resize', resize)
    return lambda: decode_image(data, 4, 'the key')

  for error in (
    AttributeError('x'),
    RecursionError(),
    OverflowError(),
    DeprecationWarning('old'),
    AssertionError(),
  ):
    with pytest.raises(BadRecord, match='the key: damaged image .*Error|Warn'):
      fails(error)()
  with pytest.raises(BadRecord, match='the key: not enough memory'):
    fails(MemoryError())()
  for error in (KeyboardInterrupt, SystemExit):
    with pytest.raises(error):
      fails(error)()


@pytest.mark.parametrize(
  'path, is_left',
  [
    ('a.png', False),
    ('folder/__a.b/a.png', False),
    ('._a.png', True),
    ('.DS_Store', True),
    ('Thumbs.db', True),
    ('x/.ipynb_checkpoints/a.png', True),
    ('__MACOSX/folder/a.png', True),
  ],
)
def test_files_of_systems_are_known(path, is_left):
  assert images.is_system_file(path) == is_left
