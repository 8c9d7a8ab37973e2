"""A directory of drawn pictures that can be continued."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from mdm_jax.eval import gallery, grid

_SHARD = 1000  # pictures of one subdirectory, if there are more
_IN_GRID = 64
_IN_GALLERY = 1000
_LINES = 'samples.jsonl'


class Pictures:
  """PNGs of every level, and who they are.

  `samples.jsonl` has a line for each picture that is completely there, `grid.
  png` the first of them on one page, `index.html` more of them. What was drawn
  before from the same record stays and is not missing; other pictures are
  replaced.
  """

  def __init__(
    self, directory: str | os.PathLike, records: Sequence[Mapping[str, Any]]
  ):
    """Looks at what is there.

    Args:
      directory: of the pictures; made if it is not there.
      records: all that a picture follows from, as JSON has it, of each
        picture; with its 'prompt' and its 'seed'.
    """
    self.directory = pathlib.Path(directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    self._records = records
    self._files = {}  # of each picture that is there, by its index
    path = self.directory / _LINES
    if path.exists():
      for line in path.read_text(encoding='utf-8').splitlines():
        self._find(line)
    self._write_lines()
    self._lines = path.open('a', encoding='utf-8')

  @property
  def missing(self) -> list[int]:
    """Indices of the pictures to draw."""
    return [i for i in range(len(self._records)) if i not in self._files]

  def add(
    self,
    index: int,
    levels: Sequence[np.ndarray],
    path: Sequence[Sequence[np.ndarray]] | None = None,
  ) -> None:
    """Writes a picture.

    Args:
      index: of its record.
      levels: uint8 [H_r, H_r, 3] each, coarse to fine.
      path: levels for each step that led there, to be animated.
    """
    many = len(self._records) > _SHARD
    stem = f'{index:06d}' if many else f'{index:04d}'
    if many:
      stem = f'{index // _SHARD:03d}/{stem}'
    files = {str(len(level)): f'{stem}_{len(level)}.png' for level in levels}
    for level, name in zip(levels, files.values()):
      grid.save_png(self.directory / name, level)
    if path:
      files['path'] = f'{stem}.webp'
      grid.save_animation(
        self.directory / files['path'],
        [grid.side_by_side(step) for step in path],
      )
    self._files[index] = files
    self._lines.write(self._line(index))
    self._lines.flush()

  def finish(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the pages, once no picture is missing.

    Args:
      tables: what is said of all pictures: headings, and names and values.
    """
    self._lines.close()
    self._write_lines()
    first = range(min(_IN_GRID, len(self._records)))
    read = [self._read(i) for i in first]
    grid.save_png(
      self.directory / 'grid.png',
      grid.grid(
        [np.stack(level) for level in zip(*read)],
        [self._records[i]['prompt'] for i in first],
      ),
    )
    shown = min(len(self._records), _IN_GALLERY)
    title = f'{len(self._records)} pictures'
    if shown < len(self._records):
      title += f', of which the first {shown} are here'
    gallery.save(
      self.directory / 'index.html',
      title,
      tables,
      map(self._entry, range(shown)),
    )

  def _find(self, line: str) -> None:
    try:
      record = json.loads(line)
    except ValueError:
      return  # The process was killed in the middle of it.
    index, files = record.pop('index', None), record.pop('files', {})
    if (
      index in range(len(self._records))
      and record == self._records[index]
      and all((self.directory / name).exists() for name in files.values())
    ):
      self._files[index] = files

  def _line(self, index: int) -> str:
    return (
      json.dumps(
        {'index': index, **self._records[index], 'files': self._files[index]},
        ensure_ascii=False,
      )
      + '\n'
    )

  def _write_lines(self) -> None:
    path = self.directory / _LINES
    temporary = path.with_suffix('.tmp')
    temporary.write_text(
      ''.join(map(self._line, sorted(self._files))), encoding='utf-8'
    )
    temporary.replace(path)

  def _names(self, index: int) -> list[str]:
    return [name for key, name in self._files[index].items() if key.isdigit()]

  def _read(self, index: int) -> tuple[np.ndarray, ...]:
    images = []
    for name in self._names(index):
      with Image.open(self.directory / name) as image:
        images.append(np.asarray(image.convert('RGB')))
    return tuple(images)

  def _entry(self, index: int) -> gallery.Entry:
    record = self._records[index]
    return gallery.Entry(
      record['prompt'],
      self._read(index),
      tuple(self._names(index)),
      {'seed': record['seed']},
    )
