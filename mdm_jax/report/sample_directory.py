"""A directory of samples that an interrupted command can continue."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import numpy as np

from mdm_jax.data import images
from mdm_jax.report import gallery, grid
from mdm_jax.runtime import files

_SHARD = 1000  # samples in a subdirectory; fewer samples need none
_IN_GRID = 64  # most samples in grid.png
_IN_GALLERY = 1000  # most samples in index.html
_LINES = 'samples.jsonl'


def finest_images(
  directory: str | os.PathLike,
) -> list[pathlib.Path] | None:
  """The image of the finest level of each complete sample, in their order.

  Returns:
    The files, or None if the directory has no `samples.jsonl`.

  Raises:
    FileNotFoundError: a file that `samples.jsonl` lists is missing.
    ValueError: `samples.jsonl` is damaged.
  """
  path = pathlib.Path(directory) / _LINES
  if not path.exists():
    return None
  found = {}
  # What follows the last line's end was cut off when a process was killed.
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
    try:
      record = json.loads(line)
      level = max(filter(str.isdigit, record['files']), key=int)
      found[int(record['index'])] = path.parent / record['files'][level]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
      raise ValueError(
        f'{path}: line {number} is damaged: run the command that sampled them '
        'again.'
      ) from error
  paths = [found[index] for index in sorted(found)]
  missing = [str(image) for image in paths if not os.path.exists(image)]
  if missing:
    raise FileNotFoundError(
      f'{missing[0]}, which {_LINES} lists, is missing, and {len(missing) - 1} '
      'more: run the command that sampled them again.'
    )
  return paths


class SampleDirectory:
  """PNG files of every level of each sample, and the settings of each sample.

  `samples.jsonl` has a line for each sample whose files are complete,
  `grid.png` shows the first samples on one page, and `index.html` more of them.
  Existing samples with the same record are reused, all others are replaced.
  """

  def __init__(
    self, directory: str | os.PathLike, records: Sequence[Mapping[str, Any]]
  ):
    """Finds the existing samples.

    Args:
      directory: directory of the samples, created if it does not exist.
      records: for each sample, its 'prompt', its 'seed' and all other settings
        that it depends on, of JSON's types.
    """
    self.directory = pathlib.Path(directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    # To compare with records from disk, where tuples have become lists.
    self._records = json.loads(json.dumps(records))
    self._files = {}  # names by level, by the index of complete samples
    path = self.directory / _LINES
    for record in files.read_json_lines(path):
      self._find(record)
    if path.is_dir():
      files.set_aside(path)
    self._write_lines()
    self._lines = path.open('a', encoding='utf-8')

  @property
  def missing(self) -> list[int]:
    """Indices of the samples to generate."""
    return [i for i in range(len(self._records)) if i not in self._files]

  def add(
    self,
    index: int,
    levels: Sequence[np.ndarray],
    path: Sequence[Sequence[np.ndarray]] | None = None,
  ) -> None:
    """Writes a sample.

    Args:
      index: index of the sample's record.
      levels: images of the levels, uint8 [H_r, H_r, 3], coarse to fine.
      path: the levels at each sampling step, to write an animation; None for
        no animation.
    """
    many = len(self._records) > _SHARD
    stem = f'{index:06d}' if many else f'{index:04d}'
    if many:
      stem = f'{index // _SHARD:03d}/{stem}'
    names = {str(len(level)): f'{stem}_{len(level)}.png' for level in levels}
    for level, name in zip(levels, names.values()):
      grid.save_png(self.directory / name, level)
    if path:
      names['path'] = f'{stem}.webp'
      grid.save_animation(
        self.directory / names['path'],
        [grid.side_by_side(step) for step in path],
      )
    self._files[index] = names
    self._lines.write(self._line(index))
    self._lines.flush()

  def finish(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `grid.png` and `index.html`, once no sample is missing.

    Args:
      tables: tables of names and values to show below the samples, by heading.
    """
    self._lines.close()
    self._write_lines()
    first = range(min(_IN_GRID, len(self._records)))
    read = [self._read(self._files[i]) for i in first]
    grid.save_png(
      self.directory / 'grid.png',
      grid.grid(
        [np.stack(level) for level in zip(*read)],
        [self._records[i]['prompt'] for i in first],
      ),
    )
    shown = min(len(self._records), _IN_GALLERY)
    title = f'{len(self._records)} samples'
    if shown < len(self._records):
      title += f', the first {shown} of which are shown'
    gallery.save(
      self.directory / 'index.html',
      title,
      tables,
      map(self._entry, range(shown)),
    )

  def _find(self, record: dict[str, Any]) -> None:
    """Counts a sample as complete, if its record and its files are there."""
    index, names = record.pop('index', None), record.pop('files', None)
    if (
      files.is_count(index)
      and index < len(self._records)
      and record == self._records[index]
      and isinstance(names, dict)
      and self._are_there(names, index < _IN_GALLERY)
    ):
      self._files[index] = names

  def _are_there(self, names: dict[str, Any], shown: bool) -> bool:
    """Whether a sample has its files; if it is shown, its images are read."""
    sizes = [int(key) for key in names if key.isdecimal()]
    try:
      for name in names.values():
        files.require_file(self.directory / name)
      read = self._read(names) if shown else ()
    except (ValueError, TypeError, OSError):
      return False
    return bool(sizes) and all(
      image.shape == (size, size, 3) for image, size in zip(read, sizes)
    )

  def _line(self, index: int) -> str:
    return (
      json.dumps(
        {'index': index, **self._records[index], 'files': self._files[index]},
        ensure_ascii=False,
      )
      + '\n'
    )

  def _write_lines(self) -> None:
    files.write_text(
      self.directory / _LINES,
      ''.join(map(self._line, sorted(self._files))),
    )

  def _read(self, names: Mapping[str, str]) -> tuple[np.ndarray, ...]:
    paths = [self.directory / name for name in _images(names)]
    return tuple(
      np.asarray(images.load_image(path.read_bytes(), key=str(path))[0])
      for path in paths
    )

  def _entry(self, index: int) -> gallery.Entry:
    record = self._records[index]
    return gallery.Entry(
      record['prompt'],
      self._read(self._files[index]),
      tuple(_images(self._files[index])),
      {'seed': record['seed']},
      self._files[index].get('path'),
    )


def _images(names: Mapping[str, str]) -> list[str]:
  """The images of a sample's levels, among the names of its files."""
  return [name for key, name in names.items() if key.isdecimal()]
