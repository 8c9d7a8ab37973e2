"""A directory of samples that an interrupted command can continue."""

import collections
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
import concurrent.futures
import json
import math
import os
import pathlib
import re
import time
from typing import Any

from etils import epath
import numpy as np

from mdm_jax import mixed_batch
from mdm_jax.data import images
from mdm_jax.report import gallery, grid
from mdm_jax.report.layouts import Layout
from mdm_jax.runtime import buckets, files
from mdm_jax.runtime.appending import AppendedObjects

_SHARD = 1000  # samples in a subdirectory; fewer samples need none
_IN_GRID = 64  # most samples in grid.png
_IN_GALLERY = 1000  # most samples in index.html
_LINES = 'samples.jsonl'
_THREADS = 16  # that upload samples to a bucket, or read them
_WAITING = 64  # most samples that wait for their upload
_FLUSH_EVERY = 3.0  # seconds between two uploads of new lines


def find_sample_directories(names: Iterable[str]) -> list[str]:
  """Where `SampleDirectory` has written, of a directory's files.

  Args:
    names: their relative paths.
  """
  paths = map(pathlib.PurePosixPath, names)
  return sorted(
    {str(path.parent) for path in paths if files.is_part(path.name, _LINES)}
  )


def finest_images(directory: str | os.PathLike) -> list[epath.Path] | None:
  """The image of the finest level of each complete sample, in their order.

  Returns:
    The files, or None if the directory has no `samples.jsonl`.

  Raises:
    FileNotFoundError: a file that `samples.jsonl` lists is missing.
    ValueError: `samples.jsonl` is damaged, or the samples are clips.
  """
  directory = epath.Path(directory)
  parts = files.parts(directory / _LINES)
  if not parts:
    return None
  found, has_clips = {}, False
  for path in parts:
    # What follows the last line's end was cut off when a process was killed.
    for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
      try:
        record = json.loads(line)
        finest = max(
          filter(mixed_batch.named_shape, record['files']),
          # Decoded images may be as large as those of the finest level.
          key=lambda name: (
            mixed_batch.named_shape(name)[-2],
            not name.startswith(mixed_batch.LATENT),
          ),
        )
        found[int(record['index'])] = str(record['files'][finest])
        has_clips |= len(mixed_batch.named_shape(finest)) == 4
      except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
          f'{path}: line {number} is damaged: run the command that sampled '
          'them again.'
        ) from error
  if has_clips:
    raise ValueError(
      f'{directory} has clips, not images: measure their frames by '
      '--workdir=RUN.'
    )
  names = [found[index] for index in sorted(found)]
  is_there = _listed(directory)
  if missing := [name for name in names if not is_there(name)]:
    raise FileNotFoundError(
      f'{directory / missing[0]}, which {_LINES} lists, is missing, and '
      f'{len(missing) - 1} more: run the command that sampled them again.'
    )
  return [directory / name for name in names]


def _listed(directory: epath.Path) -> Callable[[str], bool]:
  """Whether a directory has a file of a name, by one listing of a bucket."""
  if files.is_local(directory):
    return lambda name: os.path.exists(directory / name)
  return _list(directory).__contains__


def _list(directory: epath.Path) -> set[str]:
  """Paths of all files in a directory."""
  if files.is_local(directory):
    return {
      os.path.relpath(os.path.join(folder, name), directory)
      for folder, _, names in os.walk(directory)
      for name in names
    }
  system = buckets.file_system(directory)
  root = system._strip_protocol(os.fspath(directory))
  return {name.removeprefix(f'{root}/') for name in system.find(root)}


class SampleDirectory:
  """PNG files of every level of each sample, and the settings of each sample.

  `samples.jsonl` has a line for each sample whose files are complete,
  `grid.png` shows the first samples on one page, and `index.html` more of them.
  Existing samples with the same record are reused, all others are replaced.

  In a bucket, a few threads upload the files; what was sampled in the last
  seconds before a process is killed is sampled again.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    records: Sequence[Mapping[str, Any]],
    layout: Layout | None = None,
    needed: Collection[str] = (),
  ):
    """Finds the existing samples.

    Args:
      directory: directory of the samples, created if it does not exist.
      records: for each sample, its 'prompt', its 'seed' and all other settings
        that it depends on, of JSON's types.
      layout: where another program looks for the samples. Then the finest level
        alone is written, no `grid.png`, which would be taken for a sample, and
        earlier samples that are not among the records are removed.
      needed: of 'path', an animation, and 'mp4', those without which a sample
        is missing.

    Raises:
      ValueError: the directory has samples of another layout, or images of
        somebody else in the places of samples.
    """
    self.directory = epath.Path(directory)
    self._layout = layout
    about = {'layout': layout.name} if layout else {}
    # To compare with records from disk, where tuples have become lists.
    self._records = [
      {**json.loads(json.dumps(record)), **about} for record in records
    ]
    self._files = {}  # names by level, by the index of complete samples
    self._needed = frozenset(needed)
    self._path = self.directory / _LINES
    found = files.read_json_lines(self._path)
    if any(line.get('layout') != about.get('layout') for line in found):
      raise ValueError(
        f'{directory} has samples of another --layout: give another --output.'
      )
    is_local = files.is_local(directory)
    if is_local:
      self.directory.mkdir(parents=True, exist_ok=True)
    self._is_there = _listed(self.directory)
    self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    for record in found:
      self._find(record, is_local)
    if layout:
      self._remove_others(layout.pattern)
    if is_local and self._path.is_dir():
      files.set_aside(self._path)
    self._write_lines()
    if is_local:
      self._lines = self._path.open('a', encoding='utf-8')
    else:
      self._lines = _Uploads(self._path, self._pool)

  @property
  def missing(self) -> list[int]:
    """Indices of the samples to generate."""
    return [i for i in range(len(self._records)) if i not in self._files]

  def add(
    self,
    index: int,
    levels: Sequence[np.ndarray],
    path: Sequence[Sequence[np.ndarray]] | None = None,
    mp4: bool = False,
  ) -> None:
    """Writes a sample.

    Args:
      index: index of the sample's record.
      levels: images of the levels, uint8 [H_r, H_r, 3], or clips, which become
        animated PNG files; coarse to fine.
      path: the levels at each sampling step, to write an animation; None for
        no animation.
      mp4: also write the finest level, a clip, as an MP4 file.
    """
    names = self._names(
      index, mixed_batch.image_level_names([x.shape for x in levels])
    )
    parts = [
      (grid.save_png, self.directory / name, level)
      for name, level in zip(names.values(), levels[-len(names) :])
    ]
    if path:
      names['path'] = f'{self._stem(index)}.webp'
      frames = [grid.side_by_side(step) for step in path]
      parts.append(
        (grid.save_animation, self.directory / names['path'], frames)
      )
    if mp4:
      names['mp4'] = f'{self._stem(index)}.mp4'
      parts.append((grid.save_mp4, self.directory / names['mp4'], levels[-1]))
    if self._layout:
      parts += [
        (files.write_text, self.directory / name, text)
        for name, text in self._layout.texts(index).items()
      ]
    self._files[index] = names
    line = self._line(index)
    if isinstance(self._lines, _Uploads):
      self._lines.add(parts, line)
      return
    for save, *arguments in parts:
      save(*arguments)
    self._lines.write(line)
    self._lines.flush()

  def finish(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `grid.png` and `index.html`, once no sample is missing.

    Args:
      tables: tables of names and values to show below the samples, by heading.
    """
    self._lines.close()
    self._write_lines()
    if not self._layout:
      first = range(min(_IN_GRID, len(self._records)))
      grid.save_png(
        self.directory / 'grid.png',
        grid.grid(
          [np.stack(level) for level in zip(*self._read_all(first))],
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
      map(self._entry, range(shown), self._read_all(range(shown))),
    )
    self._pool.shutdown()

  def _names(self, index: int, levels: Sequence[str]) -> dict[str, str]:
    """The files of a sample, by `mixed_batch.image_level_names`."""
    if self._layout:
      return {levels[-1]: self._layout.image(index)}
    return {level: f'{self._stem(index)}_{level}.png' for level in levels}

  def _stem(self, index: int) -> str:
    if len(self._records) > _SHARD:
      return f'{index // _SHARD:03d}/{index:06d}'
    return f'{index:04d}'

  def _find(self, record: dict[str, Any], is_local: bool) -> None:
    """Counts a sample as complete, if its record and its files are there."""
    index, names = record.get('index'), record.get('files')
    about = {
      key: record[key] for key in record if key not in ('index', 'files')
    }
    if (
      files.is_count(index)
      and index < len(self._records)
      and about == self._records[index]
      and isinstance(names, dict)
      and self._needed <= names.keys()
      and self._are_there(index, names, is_local)
    ):
      self._files[index] = names

  def _are_there(
    self, index: int, names: dict[str, Any], is_local: bool
  ) -> bool:
    """Whether a sample has its files; if it is shown, its images are read.

    In a bucket there are no halves of files, so that none is read.
    """
    levels = _levels(names)
    if self._layout:
      if len(levels) != 1 or names != self._names(index, levels):
        return False
      if not all(map(self._is_there, self._layout.texts(index))):
        return False
    try:
      if not is_local:
        return bool(levels) and all(map(self._is_there, names.values()))
      for name in names.values():
        files.require_file(self.directory / name)
      read = self._read(names) if index < _IN_GALLERY else ()
    except (ValueError, TypeError, OSError):
      return False
    return bool(levels) and all(
      image.shape == mixed_batch.named_shape(level)
      for image, level in zip(read, levels)
    )

  def _remove_others(self, pattern: str) -> None:
    """Removes images of a layout that are no samples of these records.

    Programs that score a directory take whatever it holds, also what a process
    had not finished when it was killed.
    """
    kept = {name for names in self._files.values() for name in names.values()}
    others = [
      name
      for name in sorted(_list(self.directory) - kept)
      if re.fullmatch(rf'(?:{pattern})(?:\.tmp)?', name)
    ]
    if others and not files.parts(self._path):
      raise ValueError(
        f'{self.directory / others[0]} was not sampled by this command, which '
        'would replace it: give another --output.'
      )
    for name in others:
      (self.directory / name).unlink(missing_ok=True)

  def _line(self, index: int) -> str:
    return (
      json.dumps(
        {'index': index, **self._records[index], 'files': self._files[index]},
        ensure_ascii=False,
      )
      + '\n'
    )

  def _write_lines(self) -> None:
    """Replaces `samples.jsonl`, and what was appended to it in a bucket."""
    files.write_text(self._path, ''.join(map(self._line, sorted(self._files))))
    for part in files.parts(self._path):
      if part != self._path:
        part.unlink(missing_ok=True)

  def _read_all(
    self, indices: Iterable[int]
  ) -> Iterator[tuple[np.ndarray, ...]]:
    """The images of some samples; few are in memory at a time."""
    waiting = collections.deque()
    for index in indices:
      waiting.append(self._pool.submit(self._read, self._files[index]))
      if len(waiting) > _THREADS:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()

  def _read(self, names: Mapping[str, str]) -> tuple[np.ndarray, ...]:
    read = []
    for level in _levels(names):
      path = self.directory / names[level]
      shape = mixed_batch.named_shape(level)
      if len(shape) == 4:
        # Long clips have more pixels than an image may have.
        pixels = math.prod(shape[:-1])
        read.append(images.load_frames(path.read_bytes(), str(path), pixels))
      else:
        image, _ = images.load_image(path.read_bytes(), key=str(path))
        read.append(np.asarray(image))
    return tuple(read)

  def _entry(self, index: int, levels: tuple[np.ndarray, ...]) -> gallery.Entry:
    record = self._records[index]
    return gallery.Entry(
      record['prompt'],
      levels,
      tuple(map(self._files[index].get, _levels(self._files[index]))),
      {'seed': record['seed']},
      self._files[index].get('path'),
    )


class _Uploads:
  """Uploads files to a bucket in threads, and then the line of each sample."""

  def __init__(
    self, path: epath.Path, pool: concurrent.futures.ThreadPoolExecutor
  ):
    self._pool, self._lines = pool, AppendedObjects(path)
    self._waiting = collections.deque()
    self._flushed = time.monotonic()

  def add(self, parts: Sequence[tuple], line: str) -> None:
    """Uploads the files of a sample.

    Args:
      parts: for each file a function that writes it, and its arguments.
      line: of `samples.jsonl`.

    Raises:
      OSError: an upload failed, of this or an earlier sample. An error of
        another kind comes from s3:// and az://, see `buckets.errors`.
    """
    self._waiting.append(([self._pool.submit(*part) for part in parts], line))
    self._settle(_WAITING)
    if time.monotonic() - self._flushed > _FLUSH_EVERY:
      self._lines.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Waits for all uploads; raises as `add` does."""
    self._settle(0)
    self._lines.flush()

  def _settle(self, most: int) -> None:
    """Takes the lines of samples that are complete; waits if too many are not.

    Args:
      most: samples that may go on waiting.
    """
    while self._waiting:
      uploads, line = self._waiting[0]
      is_done = all(upload.done() for upload in uploads)
      if not is_done and len(self._waiting) <= most:
        break
      for upload in uploads:
        upload.result()
      self._lines.append(line.encode())
      self._waiting.popleft()


def _levels(names: Mapping[str, str]) -> list[str]:
  """The names of a sample's levels, among the keys of its files."""
  return [key for key in names if mixed_batch.named_shape(key)]
