"""Clips that are longer than a network's, sampled in parts.

Each part begins with the last half of the one before (the replacement method of
Ho et al., arXiv 2204.03458, section 3.1).
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClipParts:
  """The parts of a clip.

  Attributes:
    frames: of each level of a part, coarse to fine; 1 of images.
    total: of the finest level of the clip; at most as many as a part has, for
      one part.
  """

  frames: Sequence[int]
  total: int

  @property
  def count(self) -> int:
    """The number of parts."""
    missing = self.total - self.frames[-1]
    if missing <= 0:
      return 1
    return 1 + math.ceil(missing / (self.frames[-1] - self.overlap))

  @property
  def overlap(self) -> int:
    """Frames of the finest level with which the next part begins.

    About half of them, and a whole number of each coarser level's frames, where
    there are several of those.
    """
    finest = self.frames[-1]
    spacings = [finest // count for count in self.frames]
    spacing = max(x for x in spacings if x <= finest // 2)
    return finest // 2 // spacing * spacing

  @property
  def known(self) -> list[int]:
    """Frames of each level with which the next part begins."""
    return [
      max(1, self.overlap * count // self.frames[-1]) for count in self.frames
    ]

  def join(self, parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Joins parts to whole clips.

    Args:
      parts: of each part the levels, [B, T_r, H_r, H_r, 3], coarse to fine.

    Returns:
      The levels of the whole clips. A level of fewer frames has every k-th one
      of the finest, and a level of images the first alone.
    """
    joined = []
    for level, known, count in zip(zip(*parts), self.known, self.frames):
      whole = level[0]
      if whole.ndim == 5:
        whole = np.concatenate(
          [whole, *(part[:, known:] for part in level[1:])], axis=1
        )
        spacing = self.frames[-1] // count
        whole = whole[:, : math.ceil(self.total / spacing)]
      joined.append(whole)
    return joined
