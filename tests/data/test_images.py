"""Image files of every kind -> upright RGB squares, or BadRecord."""

import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest

from mdm_jax.data import images
from mdm_jax.data.images import BadRecord, decode_image


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


def png_that_claims(width, height):
  def chunk(kind, data):
    checksum = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + checksum

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
