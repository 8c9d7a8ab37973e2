"""Turns a source's records into the arrays that the network trains on."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from mdm_jax.data.images import (
  MAX_PIXELS,
  ExcludedRecord,
  decode_clip,
  decode_image,
)
from mdm_jax.mixed_batch import example_shape


class Tokenizer(Protocol):
  """The interface that `Transform` needs from a tokenizer."""

  def encode(self, caption: str) -> np.ndarray:
    """Returns int32 tokens [L], truncated if there are more."""

  def excess(self, caption: str) -> str:
    """Says why a caption is truncated; '' if it is not."""


@dataclasses.dataclass(frozen=True)
class Transform:
  """Maps a record to an example. It can be pickled, for worker processes.

  Attributes:
    tokenizer: encodes captions.
    resolution: R, side of the images in pixels.
    frames: T of clips; 1 for images, of a clip its first frame.
    every: takes every nth of `every * frames` frames, for a coarser level.
    clip_start: where those begin, from 0 to 1, see `images.decode_clip`; None
      for anywhere.
    flip: mirrors half of the images. Off by default, because captions may
      mention left and right.
    random_crop: crops a square at random; otherwise the centre.
    leave_out: whether a caption that is too long excludes its record; otherwise
      it is truncated.
    image_name: name of the image in the example.
    max_pixels: of an image file, see `images.load_image`.
  """

  tokenizer: Tokenizer
  resolution: int
  flip: bool = False
  random_crop: bool = False
  leave_out: bool = False
  image_name: str = 'image'
  frames: int = 1
  every: int = 1
  clip_start: float | None = 0.0
  max_pixels: int = MAX_PIXELS

  def __call__(
    self, record: dict[str, Any], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Makes an example.

    Args:
      record: `image` (an image file as bytes, uint8 [R, R, 3], or of a clip
        [T, R, R, 3]), `caption` and `key`; optionally `captions` (a list to
        choose from), `text` (an encoded caption) and `size` (shorter side of
        the original image in pixels).
      rng: decides on caption, crop and flip.

    Returns:
      The image or clip under `image_name`, uint8; `text`, that of the record
      or else the tokens of a caption, int32 [L]; and `scale`, float32 [], the
      record's `size` or else the shorter side of the image file in pixels.

    Raises:
      BadRecord: the file cannot be decoded.
      ExcludedRecord: the caption is too long (with `leave_out`).
      ValueError: the image is an array of another shape.
    """
    text = record['text'] if 'text' in record else self._tokens(record, rng)
    image = record['image']
    if isinstance(image, bytes):
      crop = tuple(rng.random(2)) if self.random_crop else (0.5, 0.5)
      if self.frames > 1:
        start = rng.random() if self.clip_start is None else self.clip_start
        image, side = decode_clip(
          image,
          self.resolution,
          self.frames,
          self.every,
          record['key'],
          crop,
          start,
          self.max_pixels,
        )
      else:
        image, side = decode_image(
          image, self.resolution, record['key'], crop, self.max_pixels
        )
    else:
      side = self.resolution
    if image.shape != example_shape(self.resolution, self.frames):
      raise ValueError(
        f'{record["key"]}: the image has shape {image.shape}, but the '
        f'resolution is {self.resolution}: open the source with this '
        'resolution.'
      )
    if self.flip and rng.random() < 0.5:
      image = image[..., ::-1, :]
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
      raise ExcludedRecord(record['key'], 'caption too long', excess)
    return self.tokenizer.encode(caption)
