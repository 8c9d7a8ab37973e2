"""Turns a source's records into the arrays that the network trains on."""

import dataclasses
import io
import struct
from typing import Any, Protocol
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

# A 0.4 MB PNG can hold an image that takes gigabytes to decode.
MAX_PIXELS = 128_000_000
# Pillow checks this when it reads a header, but only warns up to twice this
# value. load_image therefore checks the size again.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
# EXIF orientations that exchange width and height.
_SIDEWAYS = (5, 6, 7, 8)
# Errors that Pillow's decoders raise for damaged files.
_DAMAGED = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  IndexError,
  KeyError,
  TypeError,
  struct.error,
  zlib.error,
)
# The warning is raised in programs that turn warnings into errors.
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# The JPEG decoder may reduce an image by 2, 4 or 8 to no less than this many
# times the needed side. The sharpness then depends on the antialiased resize,
# and not on the decoder's box filter.
_REDUCING_GAP = 2.0


class BadRecord(ValueError):
  """A record that cannot be used.

  Attributes:
    key: of the record.
    reason: a few words that are the same for all records with this problem.
    detail: more about this record, or empty.
  """

  def __init__(self, key: str, reason: str, detail: str = ''):
    """Sets the attributes."""
    # Exceptions are pickled by their args: worker processes need all of them.
    super().__init__(key, reason, detail)
    self.key = key
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    """Key, reason and detail in one line."""
    detail = f' ({self.detail})' if self.detail else ''
    return f'{self.key}: {self.reason}{detail}'


class Tokenizer(Protocol):
  """The interface that `Transform` needs from a tokenizer."""

  def encode(self, caption: str) -> np.ndarray:
    """Returns int32 tokens [L], truncated if there are more."""

  def excess(self, caption: str) -> str:
    """Says why a caption is truncated; '' if it is not."""


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):
    # 16-bit grey levels. Pillow's own conversion clips them at 255.
    levels = np.asarray(image).astype(np.int32) >> 8
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  # convert would copy an image that is in RGB already.
  image.load()
  return image if image.mode == 'RGB' else image.convert('RGB')


def load_image(
  data: bytes, shorter_side: int, key: str = 'image'
) -> tuple[Image.Image, tuple[int, int]]:
  """Decodes an image file to RGB, rotated upright by its EXIF orientation.

  Transparency is composited on white; colour profiles are ignored.

  Args:
    data: a JPEG, PNG, WebP, GIF (its first frame) or BMP file.
    shorter_side: the needed size in pixels. A much larger JPEG is decoded at
      1/2, 1/4 or 1/8 of its size, but no smaller than twice the needed size.
    key: of the record, for errors.

  Returns:
    The image, and its (width, height) in pixels at full size, upright.

  Raises:
    BadRecord: not an image, over `MAX_PIXELS`, truncated or damaged.
  """
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      width, height = image.size
      if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(
          f'{width} x {height}, the limit is {MAX_PIXELS}'
        )
      reduction = min(width, height) / (_REDUCING_GAP * shorter_side)
      if reduction > 1:
        image.draft('RGB', (int(width / reduction), int(height / reduction)))
      orientation = image.getexif().get(ExifTags.Base.Orientation)
      if orientation in _SIDEWAYS:
        width, height = height, width
      if orientation:
        ImageOps.exif_transpose(image, in_place=True)
      return _to_rgb(image), (width, height)
  except Image.UnidentifiedImageError as error:
    raise BadRecord(key, 'not an image', f'{len(data)} bytes') from error
  except _BOMB as error:
    raise BadRecord(key, 'too many pixels', str(error)) from error
  except _DAMAGED as error:
    raise BadRecord(
      key, 'damaged image', f'{type(error).__name__}: {error}'
    ) from error


def decode_image(
  data: bytes,
  resolution: int,
  key: str = 'image',
  crop: tuple[float, float] = (0.5, 0.5),
) -> tuple[np.ndarray, int]:
  """Decodes an image file, crops the largest square and resizes it.

  Args:
    data: an image file, see `load_image`.
    resolution: R, side of the result in pixels; smaller images are enlarged.
    key: of the record, for errors.
    crop: horizontal and vertical position of the square, from 0 (left, top) to
      1 (right, bottom).

  Returns:
    uint8 [R, R, 3], and the shorter side of the full image in pixels.

  Raises:
    BadRecord: as `load_image`.
  """
  image, size = load_image(data, resolution, key)
  side = min(image.size)
  left, top = ((size - side) * where for size, where in zip(image.size, crop))
  image = image.resize(
    (resolution, resolution),
    Image.Resampling.LANCZOS,
    box=(left, top, left + side, top + side),
    reducing_gap=_REDUCING_GAP,
  )
  return np.array(image), min(size)


@dataclasses.dataclass(frozen=True)
class Transform:
  """Maps a record to an example. It can be pickled, for worker processes.

  Attributes:
    tokenizer: encodes captions.
    resolution: R, side of the images in pixels.
    flip: mirrors half of the images. Off by default, because captions may
      mention left and right.
    random_crop: crops a square at random; otherwise the centre.
    leave_out: whether a caption that is too long is a bad record; otherwise it
      is truncated.
    image_name: name of the image in the example.
  """

  tokenizer: Tokenizer
  resolution: int
  flip: bool = False
  random_crop: bool = False
  leave_out: bool = False
  image_name: str = 'image'

  def __call__(
    self, record: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Makes an example.

    Args:
      record: `image` (an image file as bytes, or uint8 [R, R, 3]), `caption`
        and `key`; optionally `captions` (a list to choose from), `text` (an
        encoded caption) and `size` (shorter side of the original image in
        pixels).
      rng: decides on caption, crop and flip.

    Returns:
      The image under `image_name`, uint8 [R, R, 3]; `text`, that of the record
      or else the tokens of a caption, int32 [L]; and `scale`, float32 [], the
      record's `size` or else the shorter side of the image file in pixels.

    Raises:
      BadRecord: the file cannot be decoded, or the caption is too long (with
        `leave_out`).
      ValueError: the image is an array that is not [R, R, 3].
    """
    text = record['text'] if 'text' in record else self._tokens(record, rng)
    image = record['image']
    if isinstance(image, bytes):
      crop = tuple(rng.random(2)) if self.random_crop else (0.5, 0.5)
      image, side = decode_image(image, self.resolution, record['key'], crop)
    else:
      side = self.resolution
    if image.shape != (self.resolution, self.resolution, 3):
      raise ValueError(
        f'{record["key"]}: the image has shape {image.shape}, but the '
        f'resolution is {self.resolution}: open the source with this '
        'resolution.'
      )
    if self.flip and rng.random() < 0.5:
      image = image[:, ::-1]
    return {
      self.image_name: image,
      'text': text,
      'scale': np.float32(record.get('size', side)),
    }

  def _tokens(
    self, record: dict[str, Any], rng: np.random.Generator
  ) -> np.ndarray:
    caption = record['caption']
    if len(record.get('captions', ())) > 1:
      caption = record['captions'][rng.integers(len(record['captions']))]
    if self.leave_out and (excess := self.tokenizer.excess(caption)):
      raise BadRecord(record['key'], 'caption too long', excess)
    return self.tokenizer.encode(caption)
