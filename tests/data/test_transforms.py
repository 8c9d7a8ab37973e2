"""Image files of every kind -> upright RGB squares."""

import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest

from mdm_jax.data import transforms
from mdm_jax.data.transforms import BadRecord, Transform, decode_image


class Lengths:
  """A tokenizer: the length of the caption, twice."""

  def encode(self, caption):
    return np.full(2, len(caption), np.int32)


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
  reduced, size = transforms.load_image(data, 64)
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
  reduced, size = transforms.load_image(data, 32)
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
    (png_that_claims(20_000, 15_000), 'too many pixels', '300000000'),
    (png_that_claims(14_000, 10_000), 'too many pixels', '14000 x 10000'),
    *(
      (encode(ramp(200, 200), f)[:-200], 'damaged image', '')
      for f in ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
    ),
  ],
)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
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


def test_transform_of_a_file():
  record = {'image': encode(ramp(40, 30)), 'caption': 'a cat', 'key': 'k'}
  transform = pickle.loads(pickle.dumps(Transform(Lengths(), 8)))
  example = transform(record, np.random.default_rng(0))
  assert sorted(example) == ['image', 'scale', 'text']
  assert example['image'].shape == (8, 8, 3)
  assert example['text'].tolist() == [5, 5]
  assert example['text'].dtype == np.int32
  assert example['scale'] == 30 and example['scale'].dtype == np.float32


def test_an_image_goes_under_its_name_at_its_resolution(monkeypatch):
  record = {'image': encode(ramp(40, 30)), 'caption': 'a cat', 'key': 'k'}
  decoded = []
  decode = transforms.decode_image

  def decode_image(data, resolution, *args):
    decoded.append(resolution)
    return decode(data, resolution, *args)

  monkeypatch.setattr(transforms, 'decode_image', decode_image)
  coarse = Transform(Lengths(), 4, image_name='image_4')
  example = coarse(record, np.random.default_rng(0))
  assert decoded == [4]
  assert example['image_4'].shape == (4, 4, 3) and 'image' not in example
  assert example['scale'] == 30


def test_transform_of_an_array():
  image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
  record = {'image': image, 'caption': '', 'key': 'k'}
  transform = Transform(Lengths(), 4)
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(transform(record, rng)['image'], image)
  assert transform(record, rng)['scale'] == 4
  assert transform(record | {'size': 300}, rng)['scale'] == 300
  with pytest.raises(ValueError, match=r'k: .*\(4, 4, 3\).*resolution is 8'):
    Transform(Lengths(), 8)(record, rng)


def test_flip_mirrors_half_of_the_images_and_is_off_by_default():
  image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
  record = {'image': image, 'caption': '', 'key': 'k'}
  flipped = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    found = Transform(Lengths(), 4, flip=True)(record, rng)['image']
    if (found != image).any():
      np.testing.assert_array_equal(found, image[:, ::-1])
      flipped += 1
    rng = np.random.default_rng(seed)
    assert (Transform(Lengths(), 4)(record, rng)['image'] == image).all()
  assert 75 < flipped < 125


@pytest.mark.parametrize('size', [(300, 100), (100, 300)])
def test_a_random_crop_lies_anywhere_along_the_longer_side(size):
  record = {'image': encode(ramp(*size)), 'caption': 'a cat', 'key': 'k'}
  along = int(size[0] > size[1])  # Of the array: rows run along the height.
  channel = 1 - along

  def middle(seed, **options):
    example = Transform(Lengths(), 20, **options)(
      record, np.random.default_rng(seed)
    )
    return example['image'][10, 10].astype(int)

  centre = middle(0)[channel]
  assert abs(centre - 130) < 3  # Half of a pixel right of the middle.
  found = [middle(seed, random_crop=True) for seed in range(40)]
  values = [pixel[channel] for pixel in found]
  # The middle of a third of the ramp is from 1/6 to 5/6 of it.
  assert 38 < min(values) < 75 and 185 < max(values) < 222
  assert abs(np.mean(values) - 130) < 25
  # The shorter side is never cropped.
  assert np.ptp([pixel[1 - channel] for pixel in found]) <= 3
  np.testing.assert_array_equal(found[3], middle(3, random_crop=True))
