"""Folders of images, with captions in files of the same names or in a table.

A caption is a file beside its image, `a.jpg` and `a.txt` (or the 'caption' of
`a.json`), or a row of a table that is in the same folder or above, see
`tables`. Links are followed: downloads of the Hugging Face Hub consist of them.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib
import stat
from typing import Any, NamedTuple

from mdm_jax.data import captions, images, tables, tars
from mdm_jax.data.images import BadRecord
from mdm_jax.data.tar_members import readable
from mdm_jax.runtime import buckets, files, remote_reads

IMAGE_SUFFIXES = (*tars.IMAGE_SUFFIXES, 'gif', 'bmp')
# Images that people have, and that cannot be read.
OTHER_SUFFIXES = ('avif', 'heic', 'heif', 'jxl', 'tif', 'tiff')
# What prepare_data has not finished, perhaps in the folder that it reads.
# Unfinished downloads of the Hugging Face Hub end in the same.
UNFINISHED = '.incomplete'


class Entry(NamedTuple):
  """An image with a caption.

  Attributes:
    key: of the record.
    image: file, relative to the folder.
    caption_file: relative to the folder; '' if the caption is known.
    caption: as a table has it.
  """

  key: str
  image: str
  caption_file: str = ''
  caption: Any = None


@dataclasses.dataclass(frozen=True)
class FolderPart:
  """Some images of a folder.

  Attributes:
    path: of the folder, local or in a bucket.
    entries: the images, and what has been found not to be one.
    split: of the images; None if it is not known.
  """

  path: str
  entries: tuple[Entry | BadRecord, ...]
  split: str | None = None

  def identity(self) -> str:
    """Tells from other parts, and from this one with other files."""
    digest = hashlib.blake2b(
      '\n'.join(map(repr, self.entries)).encode('utf-8', 'backslashreplace'),
      digest_size=8,
    )
    return f'{readable(self.path)} {digest.hexdigest()}'

  def read(
    self, rejects: list[BadRecord]
  ) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yields records, see `tars.read_records`."""
    for entry in self.entries:
      try:
        if isinstance(entry, BadRecord):
          raise entry
        yield self._read(entry)
      except BadRecord as bad:
        rejects.append(bad)

  def _read(self, entry: Entry) -> tuple[str, bytes, list[str]]:
    key, image, caption_file, caption = entry
    data = self._read_file(image, tars.MAX_FILE, key)
    if caption_file:
      caption = self._read_file(caption_file, tars.MAX_CAPTION, key)
      suffix = _split_name(caption_file)[1]
      return key, data, tars.read_captions(caption, suffix, key)
    return key, data, captions.read(caption, key)

  def _read_file(self, name: str, limit: int, key: str) -> bytes:
    path = os.path.join(self.path, name)
    if not files.is_local(path):
      return _read_object(path, name, limit, key)
    try:
      found = os.stat(path)
      # Opening a named pipe would wait for a writer, for ever.
      if not stat.S_ISREG(found.st_mode):
        raise BadRecord(key, 'not a plain file', readable(name))
      if found.st_size > limit:
        detail = f'{readable(name)}: {found.st_size} bytes'
        raise BadRecord(key, 'file too large', detail)
      with open(path, 'rb') as file:
        return file.read(found.st_size)
    except FileNotFoundError:
      detail = f'there is no {readable(name)}'
      raise BadRecord(key, 'caption without image', detail) from None
    except OSError as error:
      detail = f'{readable(name)}: {error.strerror}'
      raise BadRecord(key, 'unreadable file', detail) from None


def _read_object(path: str, name: str, limit: int, key: str) -> bytes:
  """Reads a file in a bucket.

  Raises:
    BadRecord: there is none, or it is larger than `limit` bytes.
    Unavailable: the bucket does not answer.
  """
  try:
    with remote_reads.raising_unavailable(path):
      system = buckets.file_system(path)
      size = system.info(path)['size']
      if size > limit:
        detail = f'{readable(name)}: {size} bytes'
        raise BadRecord(key, 'file too large', detail)
      return system.cat_file(path)
  except FileNotFoundError:
    detail = f'there is no {readable(name)}'
    raise BadRecord(key, 'caption without image', detail) from None


def is_folder(path: str) -> bool:
  """Whether it is a directory, on a disk or in a bucket.

  Raises:
    ValueError: there is no such bucket, or it refuses.
  """
  if files.is_local(path):
    return os.path.isdir(path)
  # Of other URLs it is not known.
  is_bucket = buckets.scheme(path) in buckets.SCHEMES
  return is_bucket and buckets.find(path) == 'directory'


def _walk_bucket(folder: str) -> list[str]:
  with files.naming_errors(folder):
    system = buckets.file_system(folder)
    root = system._strip_protocol(folder)
    found = system.find(root)
  names = [name.removeprefix(root).lstrip('/') for name in found]
  return sorted(
    name for name in names if name and all(map(_is_of_user, name.split('/')))
  )


def walk(folder: str | os.PathLike) -> list[str]:
  """The files of a folder and its subfolders, relative to it, with slashes.

  Links are followed. Hidden files, unfinished ones, and what systems leave
  behind, are left out; so is what cannot be read.
  """
  if not files.is_local(folder):
    return _walk_bucket(os.fspath(folder))
  seen, found = set(), []
  # Links may be circular, so each directory is read once.
  for parent, subfolders, names in os.walk(folder, followlinks=True):
    if (real := os.path.realpath(parent)) in seen:
      subfolders.clear()
      continue
    seen.add(real)
    subfolders[:] = sorted(filter(_is_of_user, subfolders))
    inside = os.path.relpath(parent, folder)
    prefix = '' if inside == os.curdir else f'{inside}/'
    found += [prefix + name for name in filter(_is_of_user, names)]
  return sorted(found)


def _is_of_user(name: str) -> bool:
  return not images.is_system_file(name) and not name.endswith(UNFINISHED)


def is_image(name: str) -> bool:
  """Whether a file has the name of an image, readable or not."""
  return _split_name(name)[1] in IMAGE_SUFFIXES + OTHER_SUFFIXES


def find(
  folder: str,
  names: Sequence[str],
  table_names: Sequence[str],
  caption_column: str = '',
) -> list[Entry | BadRecord]:
  """Pairs the images of a folder with their captions.

  Args:
    folder: path.
    names: of its files, see `walk`.
    table_names: of its tables. An image beside or below one has its caption
      there, all others have a file.
    caption_column: of the tables, see `tables.caption_column`.

  Returns:
    The images in the order of the tables, then the others by name; and rows,
    images and captions that cannot be used, as `BadRecord`.

  Raises:
    ValueError: a table is none.
  """
  prefix = key_prefix(folder)
  found, used, keys = [], set(), set()
  for name in table_names:
    found += _find_by_table(folder, name, prefix, used, keys, caption_column)
  parents = {os.path.dirname(name) for name in table_names}
  # Whether there is a table in a folder or above it.
  has_table = functools.cache(
    lambda path: (
      path in parents or bool(path) and has_table(os.path.dirname(path))
    )
  )
  beside = []
  for name in names:
    if not has_table(os.path.dirname(name)):
      beside.append(name)
    elif name not in used and is_image(name):
      key = f'{prefix}/{readable(name)}'
      found.append(BadRecord(key, 'image without caption'))
  return found + _find_by_name(beside, prefix)


def key_prefix(folder: str) -> str:
  """What the keys of a folder's records begin with: its name."""
  return readable(os.path.basename(os.path.abspath(folder)) or 'images')


def _find_by_table(
  folder: str,
  table: str,
  prefix: str,
  used: set[str],
  keys: set[str],
  caption_column: str,
) -> Iterator[Entry | BadRecord]:
  """Yields the images of a table.

  Args:
    folder: path.
    table: relative to the folder.
    prefix: of the keys.
    used: images that have a caption already; those found are added to it.
    keys: the same, without their suffixes.
    caption_column: see `find`.
  """
  path, directory = os.path.join(folder, table), os.path.dirname(table)
  for row in tables.read(path, f'{prefix}/{readable(table)}', caption_column):
    if isinstance(row, BadRecord):
      yield row
      continue
    row_key, file_name, caption = row
    try:
      inside = _inside(file_name, row_key)
      name = os.path.join(directory, inside)
      if name in used:
        raise BadRecord(row_key, 'name used twice', readable(name))
    except BadRecord as bad:
      yield bad
      continue
    used.add(name)
    stem = _split_name(name)[0]
    key = f'{prefix}/{readable(name if stem in keys else stem)}'
    keys.add(stem)
    yield Entry(key, name, caption=caption)


def _inside(file_name: Any, key: str) -> str:
  """The normal form of a path in a table.

  Raises:
    BadRecord: it is no path, or leads out of the folder.
  """
  if not isinstance(file_name, str):
    detail = f'{tables.FILE_COLUMN} is no text'
    raise BadRecord(key, 'no file name', detail)
  path = pathlib.PurePosixPath(file_name.strip())
  if not path.parts or '\0' in file_name or not _is_encodable(file_name):
    detail = f'{tables.FILE_COLUMN} is {ascii(file_name[:200])}'
    raise BadRecord(key, 'no file name', detail)
  if path.is_absolute() or '..' in path.parts:
    detail = readable(file_name[:200])
    raise BadRecord(key, 'file outside of the folder', detail)
  return str(path)


def _is_encodable(name: str) -> bool:
  try:
    os.fsencode(name)
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
    return False
  return True


def _find_by_name(names: Sequence[str], prefix: str) -> list[Entry | BadRecord]:
  """Pairs images with captions of the same name."""
  stems: dict[str, dict[str, str]] = {}
  twice = []
  for name in names:
    stem, suffix = _split_name(name)
    if suffix in (*IMAGE_SUFFIXES, *OTHER_SUFFIXES, *tars.CAPTION_SUFFIXES):
      if suffix in stems.setdefault(stem, {}):
        twice.append(name)
      else:
        stems[stem][suffix] = name
  found = []
  for stem, by_suffix in stems.items():
    key = f'{prefix}/{readable(stem)}'
    other = [suffix for suffix in OTHER_SUFFIXES if suffix in by_suffix]
    usable = [suffix for suffix in IMAGE_SUFFIXES if suffix in by_suffix]
    if other and not usable:
      detail = f'{other[0]}: convert it to JPEG or PNG'
      found.append(BadRecord(key, 'unsupported image format', detail))
      continue
    try:
      image, caption, _ = tars.choose(
        by_suffix, key, tars.Kind('image', IMAGE_SUFFIXES)
      )
      found.append(Entry(key, image, caption))
    except BadRecord as bad:
      found.append(bad)
    twice += [by_suffix[suffix] for suffix in usable[1:]]
  return found + [
    BadRecord(f'{prefix}/{readable(name)}', 'name used twice') for name in twice
  ]


def _split_name(name: str) -> tuple[str, str]:
  """'a/b.c.JPG' -> 'a/b.c', 'jpg'."""
  stem, suffix = os.path.splitext(name)
  return stem, suffix[1:].lower()
