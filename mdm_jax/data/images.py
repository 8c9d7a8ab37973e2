"""Decodes image files. No other module opens one.

The formats are JPEG, PNG, WebP, GIF (its first frame) and BMP. Whatever a
file's metadata say, its pixels are used; whatever is wrong with a file, the
only error is BadRecord.
"""

from collections.abc import Callable, Iterator
import contextlib
import io
import pathlib

import numpy as np
from PIL import Image, ImageSequence

# Otherwise Pillow imports all of its plugins when it meets the first WebP.
import PIL.WebPImagePlugin  # noqa: F401

from mdm_jax.data import metadata

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.webp')
# What 256 MB hold: decoding an image, converting it to RGB and turning it
# upright take up to 8 bytes a pixel at once, and a few MB, beside the file.
MAX_PIXELS = 30_000_000
# Pillow's own limit is one for all formats, and does not know of `draft`.
Image.MAX_IMAGE_PIXELS = None

_FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
_BYTES = 8  # of each of those pixels, of which 4 are the decoded image
# Pillow decodes run-length encoded BMPs in Python, so slowly that each pixel
# counts as this many.
_RUN_LENGTH, _RUN_LENGTH_ENCODINGS = 16, (1, 2)
# The JPEG decoder may reduce an image by 2, 4 or 8 to no less than this many
# times the needed side. The sharpness then depends on the antialiased resize,
# and not on the decoder's box filter.
_REDUCING_GAP = 2.0
_MAX_FRAMES = 1024  # of a clip
# What is between two JPEG files. Inside of one it is nowhere but in metadata:
# in those of its pixels, 0xff is followed by 0 or by the number of a restart.
_END_AND_START = b'\xff\xd9', b'\xff\xd8'
# Pixels that are converted to RGB at a time.
_STRIP = 2**18
_TRANSPOSE = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# What macOS, Windows and storage devices leave among files, beside names that
# begin with a dot.
_SYSTEM_NAMES = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'Thumbs.db')


class DataError(ValueError):
  """The data cannot be read, or is not fit for training."""


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


class ExcludedRecord(BadRecord):
  """A record without fault that a setting of the run excludes."""


def is_system_file(path: str, prefix: str = '.') -> bool:
  """Whether a system left a file among the user's own: `._a.png`, `.DS_Store`.

  Args:
    path: relative to the directory or the tar that the user named, with
      slashes.
    prefix: how the names of such files begin.
  """
  return any(
    part in _SYSTEM_NAMES or (part.startswith(prefix) and part != '..')
    for part in pathlib.PurePosixPath(path).parts
  )


def open_image(
  file: io.BytesIO, formats: tuple[str, ...] = _FORMATS
) -> Image.Image:
  """Opens an image file by Pillow, which reads its header and metadata.

  Args:
    file: the file.
    formats: that it may have. Of all that Pillow knows, some start other
      programs.
  """
  return Image.open(file, formats=formats)


@contextlib.contextmanager
def decoding(key: str) -> Iterator[None]:
  """Turns any error into `BadRecord`.

  Args:
    key: of the record.
  """
  try:
    yield
  except BadRecord:
    raise
  # Pillow has no list of the errors that damaged files raise: by now there have
  # been AttributeError, ZeroDivisionError, RecursionError and a dozen others.
  except Exception as error:
    reason = (
      'not enough memory' if isinstance(error, MemoryError) else 'damaged image'
    )
    raise BadRecord(key, reason, f'{type(error).__name__}: {error}') from error


def image_size(
  data: bytes,
  shorter_side: int | None = None,
  key: str = 'image',
  max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
  """The (width, height) in pixels that `load_image` returns, by the header.

  The arguments are those of `load_image`.

  Raises:
    BadRecord: not an image, its header is damaged, or over `max_pixels`.
  """
  with decoding(key):
    return _open(metadata.strip(data), shorter_side, key, max_pixels)[1]


def load_image(
  data: bytes,
  shorter_side: int | None = None,
  key: str = 'image',
  max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, tuple[int, int]]:
  """Decodes an image file to RGB, rotated upright by its EXIF orientation.

  Transparency is composited on white; colour profiles are ignored.

  Args:
    data: a JPEG, PNG, WebP, GIF (its first frame) or BMP file.
    shorter_side: the needed size in pixels. A much larger JPEG is decoded at
      1/2, 1/4 or 1/8 of its size, but no smaller than twice the needed size.
      None: the full size.
    key: of the record, for errors.
    max_pixels: largest number of pixels after such a reduction. What takes more
      than 8 bytes a pixel to decode counts as more: a WebP twice, a JPEG with
      several scans up to 1.5 times, also if it is reduced.

  Returns:
    The image, and its (width, height) in pixels at full size, upright.

  Raises:
    BadRecord: not an image, too large, truncated or damaged.
  """
  with decoding(key):
    file = metadata.strip(data)
    image, size = _open(file, shorter_side, key, max_pixels)
    image.load()
    file.file.close()
    image = _to_rgb(image)
    if file.orientation in _TRANSPOSE:
      image = image.transpose(_TRANSPOSE[file.orientation])
    return image, size


def load_frames(
  data: bytes, key: str = 'image', max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Decodes all frames of an image file.

  Args:
    data: a PNG, WebP or GIF file.
    key: of the record, for errors.
    max_pixels: of all frames together.

  Returns:
    uint8 [T, H, W, 3].

  Raises:
    BadRecord: not an image, too large, truncated or damaged.
  """
  with decoding(key):
    image = _open_frames(data, key)
    pixels = getattr(image, 'n_frames', 1) * image.width * image.height
    if pixels > max_pixels:
      raise BadRecord(
        key, 'too many pixels', f'{pixels} of all frames, not {max_pixels}'
      )
    return np.stack(_frames(image, np.asarray, key))


def decode_clip(
  data: bytes,
  resolution: int,
  frames: int,
  every: int = 1,
  key: str = 'image',
  crop: tuple[float, float] = (0.5, 0.5),
  start: float = 0.0,
  max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, int]:
  """Decodes frames of an image file, and crops the largest square of each.

  Args:
    data: as for `load_frames`, or JPEG files, see `split_jpegs`, of which only
      those that are wanted are decoded.
    resolution: R, side of the result in pixels.
    frames: T, of the result.
    every: takes every nth frame of `every * frames`.
    key: of the record, for errors.
    crop: as for `decode_image`.
    start: where those begin, from 0, the first frame, to 1, which ends with the
      last. Of a uniform one each beginning is as likely.
    max_pixels: of one frame.

  Returns:
    uint8 [T, R, R, 3], and the shorter side of the clip in pixels.

  Raises:
    BadRecord: as `load_frames`, or there are not enough frames.
  """
  with decoding(key):

    def choose(found):
      wanted = frames * every
      if len(found) < wanted:
        raise BadRecord(key, 'too few frames', f'{len(found)}, not {wanted}')
      spare = len(found) - wanted
      first = min(int(start * (spare + 1)), spare)
      return found[first : first + wanted : every]

    if len(jpegs := split_jpegs(data)) > 1:
      decoded = [
        decode_image(file, resolution, key, crop, max_pixels)
        for file in choose(jpegs)
      ]
      found, sides = zip(*decoded)
      return np.stack(found), sides[0]
    image = _open_frames(data, key)
    _check_frame(image.size, key, max_pixels)
    found = _frames(image, lambda x: _square(x, resolution, crop), key)
    return np.stack(choose(found)), min(image.size)


def split_jpegs(data: bytes) -> list[bytes]:
  """The JPEG files of a clip that is stored as one after the other.

  That is the format of MJPEG streams. Programs for images show the first file.

  Returns:
    At least two files; a list of `data` alone if there are not as many.
  """
  end, start = _END_AND_START
  if not data.startswith(start):
    return [data]
  first, *rest = data.split(end + start)
  if not rest:
    return [data]
  *middle, last = rest
  return [first + end, *(start + each + end for each in middle), start + last]


def is_animation(data: bytes) -> bool:
  """Whether a file is an image of several frames."""
  try:
    with decoding('image'):
      return getattr(_open_frames(data, 'image'), 'n_frames', 1) > 1
  except BadRecord:
    return False


def stream_frames(
  data: bytes, key: str = 'image', max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[float, Image.Image | None]]:
  """Decodes the frames of an image file one by one.

  Args:
    data: as for `load_frames`.
    key: of the record, for errors.
    max_pixels: of one frame.

  Yields:
    The time in seconds from which a frame is shown, and the frame in RGB; and
    then the time of the end, and None.

  Raises:
    BadRecord: not an image, too large, truncated or damaged.
  """
  with decoding(key):
    image, milliseconds = _open_frames(data, key), 0
    _check_frame(image.size, key, max_pixels)
    for frame in ImageSequence.Iterator(image):
      # Of WebP the duration is known once the frame is decoded.
      rgb = _to_rgb(frame)
      # Pillow decodes the next frame into the same image.
      yield milliseconds / 1000, rgb.copy() if rgb is frame else rgb
      milliseconds += frame.info.get('duration') or 0
    yield milliseconds / 1000, None


def _check_frame(size: tuple[int, int], key: str, max_pixels: int) -> None:
  if size[0] * size[1] > max_pixels:
    raise BadRecord(key, 'too many pixels', f'{size[0]} x {size[1]}')


def _open_frames(data: bytes, key: str) -> Image.Image:
  """Opens an image file with all of its frames."""
  try:
    return open_image(io.BytesIO(data))
  except Image.UnidentifiedImageError:
    raise BadRecord(key, 'not an image', f'{len(data)} bytes') from None


def _frames(
  image: Image.Image, convert: Callable[[Image.Image], np.ndarray], key: str
) -> list[np.ndarray]:
  """The converted frames at even times, the shortest time that one is shown.

  Programs that write animations store equal frames once, shown for longer.
  """
  found, times = [], []
  for frame in ImageSequence.Iterator(image):
    found.append(convert(_to_rgb(frame)))
    times.append(frame.info.get('duration') or 0)
    if len(found) > _MAX_FRAMES:
      break
  shortest = min((time for time in times if time > 0), default=1)
  counts = [max(1, round(time / shortest)) for time in times]
  if sum(counts) > _MAX_FRAMES:
    raise BadRecord(key, 'too many frames', f'more than {_MAX_FRAMES}')
  return [x for x, count in zip(found, counts) for _ in range(count)]


def decode_image(
  data: bytes,
  resolution: int,
  key: str = 'image',
  crop: tuple[float, float] = (0.5, 0.5),
  max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, int]:
  """Decodes an image file, crops the largest square and resizes it.

  Args:
    data: an image file, see `load_image`.
    resolution: R, side of the result in pixels; smaller images are enlarged.
    key: of the record, for errors.
    crop: horizontal and vertical position of the square, from 0 (left, top) to
      1 (right, bottom).
    max_pixels: as for `load_image`.

  Returns:
    uint8 [R, R, 3], and the shorter side of the full image in pixels.

  Raises:
    BadRecord: as `load_image`.
  """
  with decoding(key):
    image, size = load_image(data, resolution, key, max_pixels)
    return _square(image, resolution, crop), min(size)


def _square(
  image: Image.Image, resolution: int, crop: tuple[float, float]
) -> np.ndarray:
  """The largest square of an image, resized: uint8 [R, R, 3]."""
  side = min(image.size)
  left, top = ((size - side) * where for size, where in zip(image.size, crop))
  image = image.resize(
    (resolution, resolution),
    Image.Resampling.LANCZOS,
    box=(left, top, left + side, top + side),
    reducing_gap=_REDUCING_GAP,
  )
  return np.array(image)


def _open(
  file: metadata.ImageFile, shorter_side: int | None, key: str, max_pixels: int
) -> tuple[Image.Image, tuple[int, int]]:
  """Opens a file, without decoding it, and checks its size.

  Returns:
    The image as it is stored, and its (width, height) at full size, upright.
  """
  if not file.format:
    raise BadRecord(key, 'not an image', f'{len(file.file.getbuffer())} bytes')
  if file.size:
    _check_count(file, file.size, file.size, key, max_pixels)
  try:
    image = open_image(file.file, (file.format,))
  except Image.UnidentifiedImageError:
    raise BadRecord(key, 'damaged image', f'its {file.format} header') from None
  size = width, height = image.size
  if shorter_side and (gap := min(size) / (_REDUCING_GAP * shorter_side)) > 1:
    image.draft('RGB', (int(width / gap), int(height / gap)))
  weight = 1
  if image.info.get('compression') in _RUN_LENGTH_ENCODINGS:
    weight = _RUN_LENGTH
  _check_count(file, size, image.size, key, max_pixels // weight)
  if file.orientation >= 5:
    size = height, width
  return image, size


def _check_count(
  file: metadata.ImageFile,
  full: tuple[int, int],
  decoded: tuple[int, int],
  key: str,
  max_pixels: int,
) -> None:
  """Raises BadRecord if decoding takes the memory of over `max_pixels`."""
  pixels = decoded[0] * decoded[1]
  held = file.held * full[0] * full[1] + _BYTES / 2 * pixels
  count = int(max(pixels, held / _BYTES))
  if count > max_pixels:
    counted = (
      f', decoded {decoded[0]} x {decoded[1]}' if decoded != full else ''
    )
    if count > pixels:
      counted += f', which takes as much memory as {count}'
    raise BadRecord(
      key,
      'too many pixels',
      f'{full[0]} x {full[1]}{counted}, the limit is {max_pixels}',
    )


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts a decoded image, which is composited on white."""
  if image.mode == 'RGB' and not image.has_transparency_data:
    return image
  # Also frames of animations that are opaque once they are put together.
  if image.mode == 'RGBA' and image.getextrema()[3] == (255, 255):
    return image.convert('RGB')
  rgb = Image.new('RGB', image.size)
  # In strips, as conversions of the whole image need several copies of it.
  rows = max(1, _STRIP // image.width)
  for top in range(0, image.height, rows):
    bottom = min(top + rows, image.height)
    strip = image.crop((0, top, image.width, bottom))
    rgb.paste(_strip_to_rgb(strip), (0, top))
  return rgb


def _strip_to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):
    # 16-bit grey levels. Pillow's own conversion clips them at 255.
    levels = np.asarray(image).astype(np.int32) >> 8
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')
