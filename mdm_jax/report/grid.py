"""Image grids of samples with their prompts, and animations of sampling."""

from collections.abc import Sequence
import io
import math
import os

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mdm_jax.runtime import files
from mdm_jax.runtime.printable import printable

_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)
_MIN_TILE = 128  # pixels
_ANIMATION, _LAST_FRAME = 3000, 1500  # milliseconds
_CLIP_FRAME = 125  # milliseconds
_MAX_LINES = 3  # lines of a caption; longer captions end in an ellipsis


def grid(
  pyramids: Sequence[np.ndarray],
  prompts: Sequence[str],
  *,
  tile: int | None = None,
) -> np.ndarray:
  """Lays samples out on a white page that is about square.

  A cell holds one sample: its levels from coarse to fine, enlarged to one size
  by repeating pixels, with the prompt underneath. Cells run from left to right,
  then down.

  Args:
    pyramids: uint8 `[B, R, R, 3]`, or clips `[B, T, R, R, 3]`, coarse to fine.
    prompts: one for each sample.
    tile: edge of every level on the page in pixels, a multiple or a divisor of
      the level's own edge; larger levels are averaged down. The default is the
      finest level's edge, times a whole factor that makes it 128 or more.

  Returns:
    uint8 `[H, W, 3]`; with clips `[T, H, W, 3]`, T of the level of most frames.
    A level of fewer shows each of its own for longer.

  Raises:
    ValueError: if the shapes, their order or the tile do not fit.
  """
  edges = [level.shape[-2] for level in pyramids]
  for level, edge in zip(pyramids, edges):
    shape = (len(prompts), *level.shape[1:-3], edge, edge, 3)
    if level.shape != shape or level.dtype != np.uint8 or level.ndim > 5:
      raise ValueError(
        f'A level is {level.dtype}{list(level.shape)}: give uint8'
        f' [B, R, R, 3] with B = {len(prompts)}, the number of prompts.'
      )
  if edges != sorted(edges):
    raise ValueError(f'Levels have edges {edges}: give them coarse to fine.')
  if tile is None:
    tile = edges[-1] * math.ceil(_MIN_TILE / edges[-1])
  if any(tile % edge and edge % tile for edge in edges):
    raise ValueError(
      f'Levels have edges {edges}: give a tile that is a multiple or a'
      f' divisor of each, not {tile}.'
    )

  gap = max(2, tile // 64)  # between the levels of a sample
  margin = tile // 8  # between samples
  font = ImageFont.load_default(size=max(11, tile // 11))
  line_height = math.ceil(1.3 * font.size)
  width = len(edges) * (tile + gap) - gap
  captions = [_wrap(prompt, font, width) for prompt in prompts]
  height = tile + gap + line_height * max(map(len, captions))
  columns = _columns(len(prompts), width / height)
  rows = math.ceil(len(prompts) / columns)
  page = Image.new(
    'RGB',
    (
      margin + columns * (width + margin),
      margin + rows * (height + margin),
    ),
    _BACKGROUND,
  )
  draw = ImageDraw.Draw(page)
  places = [
    (
      margin + i % columns * (width + margin),
      margin + i // columns * (height + margin),
    )
    for i in range(len(captions))
  ]
  for (left, top), caption in zip(places, captions):
    for k, line in enumerate(caption):
      draw.text((left, top + tile + gap + k * line_height), line, _INK, font)

  count = max(level.shape[1] if level.ndim == 5 else 1 for level in pyramids)
  pages = [
    _paste(page, pyramids, k / count, places, tile, gap) for k in range(count)
  ]
  return np.stack(pages) if count > 1 else pages[0]


def _paste(
  page: Image.Image,
  pyramids: Sequence[np.ndarray],
  time: float,
  places: Sequence[tuple[int, int]],
  tile: int,
  gap: int,
) -> np.ndarray:
  """Puts the samples, at a time of their clips, on the page at their places."""
  for i, (left, top) in enumerate(places):
    for r, level in enumerate(pyramids):
      image = Image.fromarray(frame_at(level[i], time))
      is_larger = image.width > tile
      image = image.resize(
        (tile, tile),
        Image.Resampling.BOX if is_larger else Image.Resampling.NEAREST,
      )
      page.paste(image, (left + r * (tile + gap), top))
  return np.array(page)


def frame_at(level: np.ndarray, time: float) -> np.ndarray:
  """An image, or the frame of a clip [T, H, W, 3] at a time from 0 to 1."""
  if level.ndim == 3:
    return level
  return level[int(time * len(level) + 1e-6)]


def encode_png(image: np.ndarray) -> bytes:
  """The bytes of a PNG file of uint8 `[H, W, 3]`.

  Frames `[T, H, W, 3]` become an animated PNG file that plays for ever; viewers
  that do not know these show the first frame.
  """
  first, *rest = map(Image.fromarray, image if image.ndim == 4 else image[None])
  options = {}
  if rest:
    options = {
      'save_all': True,
      'append_images': rest,
      'duration': _CLIP_FRAME,
      'loop': 0,
      # Both mean the same here; equal frames would be joined without it.
      'blend': [k % 2 for k in range(len(image))],
    }
  file = io.BytesIO()
  first.save(file, 'PNG', **options)
  return file.getvalue()


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
  """Writes a PNG file, see `encode_png`."""
  with files.replacing(path) as temporary:
    epath.Path(temporary).write_bytes(encode_png(image))


def save_mp4(path: str | os.PathLike, clip: np.ndarray) -> None:
  """Writes a clip, uint8 [T, H, W, 3] of even H and W, as H.264; needs PyAV."""
  import av  # An extra, and slow to import.

  file = io.BytesIO()
  with av.open(file, 'w', format='mp4') as container:
    # Every player knows these pixels, and halves of their colours.
    stream = container.add_stream('libx264', 1000 // _CLIP_FRAME)
    stream.height, stream.width = clip.shape[1:3]
    stream.pix_fmt, stream.options = 'yuv420p', {'crf': '15'}
    for image in clip:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, 'rgb24')))
    container.mux(stream.encode())
  with files.replacing(path) as temporary:
    epath.Path(temporary).write_bytes(file.getvalue())


def side_by_side(levels: Sequence[np.ndarray]) -> np.ndarray:
  """Joins the levels of one sample, enlarged to the size of the finest one.

  Args:
    levels: uint8 [H_r, H_r, 3], coarse to fine; H_r divides the finest H. Of
      clips [T_r, H_r, H_r, 3] the frame in the middle is shown.

  Returns:
    uint8 [H, levels * W, 3].
  """
  levels = [frame_at(level, 0.5) for level in levels]
  edge = len(levels[-1])
  return np.concatenate(
    [
      level.repeat(edge // len(level), 0).repeat(edge // len(level), 1)
      for level in levels
    ],
    axis=1,
  )


def save_animation(
  path: str | os.PathLike, frames: Sequence[np.ndarray]
) -> None:
  """Writes uint8 [H, W, 3] frames as an endless WebP of a few seconds."""
  first, *rest = map(Image.fromarray, frames)
  durations = [max(40, _ANIMATION // len(frames))] * len(frames)
  durations[-1] += _LAST_FRAME
  with files.replacing(path) as temporary:
    first.save(
      temporary,
      format='WebP',
      save_all=True,
      append_images=rest,
      duration=durations,
      loop=0,
      quality=85,
    )


def _columns(count: int, aspect_ratio: float) -> int:
  """Columns of cells for a page near a square, with a full last row."""

  def cost(columns: int) -> float:
    rows = math.ceil(count / columns)
    empty = columns * rows - count
    return abs(math.log(aspect_ratio * columns / rows)) + empty / columns

  return min(range(1, count + 1), key=cost)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """Breaks a text into lines of at most `width` pixels."""
  lines, rest = [], printable(' '.join(text.split()))
  while rest:
    is_last = len(lines) == _MAX_LINES - 1
    line = rest[:width]  # No character is narrower than a pixel.
    while font.getlength(line) > width and len(line) > 1:
      # Break at the last space if there is one, else within the word.
      body = line.removesuffix('…')
      body = body[: body.rfind(' ')] if ' ' in body else body[:-1]
      line = f'{body}…' if is_last else body
    lines.append(line)
    if is_last:
      break
    rest = rest[len(line) :].lstrip()
  return lines
