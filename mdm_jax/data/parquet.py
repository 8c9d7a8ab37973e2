"""Captioned images in Parquet, as img2dataset and Hugging Face write them.

A row has an image file, as bytes or as {'bytes': …, 'path': …}, and a caption.
Rows are read in batches, so that the memory holds no more than a row group, and
less if a group has several pages. Reading needs pyarrow.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
from typing import Any

from mdm_jax.data import captions, tables, tars
from mdm_jax.data.images import BadRecord
from mdm_jax.data.tar_members import readable
from mdm_jax.runtime import remote_reads

# 'image' of Hugging Face; img2dataset names it as the suffix of a file.
IMAGE_COLUMNS = ('image', *tars.IMAGE_SUFFIXES)
_KEY_COLUMN = 'key'  # of img2dataset
_BATCH = 32  # rows
_BUFFER = 2**20  # bytes, that a column is read by


@dataclasses.dataclass(frozen=True)
class ParquetPart:
  """A Parquet file.

  Attributes:
    path: local or in a bucket.
    prefix: what the keys of its records begin with.
    caption_column: see `tables.caption_column`.
    split: of the records; None if it is not known.
  """

  path: str
  prefix: str
  caption_column: str = ''
  split: str | None = None

  def identity(self) -> str:
    """Tells from other parts."""
    return readable(self.path)

  def check(self) -> None:
    """Raises ValueError if the file has no images or no captions.

    A damaged file has none that can be read, which `read` tells.
    """
    arrow, parquet = _import_pyarrow()
    try:
      with _open(parquet, self.path) as file:
        names = file.schema_arrow.names
    except (OSError, ValueError, arrow.ArrowException):
      return
    try:
      _columns(names, self.caption_column)
    except ValueError as error:
      tar = f'{self.path.removesuffix(".parquet")}.tar'
      # img2dataset writes such a file beside each tar.
      remedy = f' Use {tar} instead.' if os.path.exists(tar) else ''
      raise ValueError(f'{self.path}: {error}{remedy}') from None

  def read(
    self, rejects: list[BadRecord]
  ) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yields records, see `tars.read_records`.

    A record has img2dataset's key if there is one, otherwise the number of its
    row, from 0.

    Raises:
      Unavailable: a bucket does not answer.
    """
    arrow, parquet = _import_pyarrow()
    errors = OSError, ValueError, arrow.ArrowException
    name = readable(self.path)
    try:
      with _open(parquet, self.path) as file:
        columns = _columns(file.schema_arrow.names, self.caption_column)
        seen, first = set(), 0
        for group in range(file.num_row_groups):
          try:
            yield from self._read_group(
              file, group, first, columns, seen, rejects
            )
          except errors as error:
            detail = f'row group {group}: {error}'
            rejects.append(BadRecord(name, 'damaged Parquet file', detail))
          first += file.metadata.row_group(group).num_rows
    except errors as error:
      rejects.append(BadRecord(name, 'unreadable Parquet file', str(error)))

  def _read_group(
    self,
    file,
    group: int,
    first: int,
    columns: Sequence[str],
    seen: set[str],
    rejects: list[BadRecord],
  ) -> Iterator[tuple[str, bytes, list[str]]]:
    """Yields the records of a row group, of which `first` is the first row."""
    for batch in file.iter_batches(
      _BATCH, row_groups=[group], columns=columns, use_threads=False
    ):
      for row in range(len(batch)):
        try:
          yield self._record(batch, row, first + row, columns, seen)
        except BadRecord as bad:
          rejects.append(bad)
      first += len(batch)

  def _record(
    self, batch, row: int, number: int, columns: Sequence[str], seen: set[str]
  ) -> tuple[str, bytes, list[str]]:
    """A row of a batch.

    Args:
      batch: of rows.
      row: index in the batch.
      number: of the row in the file.
      columns: of images, of captions, and perhaps of keys.
      seen: keys so far; that of the row is added.

    Raises:
      BadRecord: it cannot be used.
    """
    key = f'{self.prefix}/{number}'
    try:
      values = [batch.column(name)[row].as_py() for name in columns]
    except ValueError as error:  # such as text that is not UTF-8
      raise BadRecord(key, 'unreadable row', str(error)) from error
    if len(values) > 2 and values[2] is not None:
      key = f'{self.prefix}/{readable(str(values[2]))}'
    if key in seen:
      raise BadRecord(key, 'name used twice')
    seen.add(key)
    return key, _image(values[0], key), captions.read(values[1], key)


def _import_pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ValueError(
      'Parquet files need pyarrow: pip install pyarrow, or mdm_jax[parquet].'
    ) from None
  return pyarrow, pyarrow.parquet


@contextlib.contextmanager
def _open(parquet, path: str) -> Iterator[Any]:
  # Without pre_buffer and with a buffer, columns are not read as a whole.
  with remote_reads.open_stream(path, _BUFFER) as file:
    yield parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)


def _columns(names: Sequence[str], wanted: str) -> list[str]:
  """The columns of images, of captions, and of keys if there is one.

  Raises:
    ValueError: there is none of images or of captions, or there are several.
  """
  found = [name for name in names if name in IMAGE_COLUMNS]
  if len(found) != 1:
    *known, last = IMAGE_COLUMNS
    which = 'several' if found else 'none'
    raise ValueError(
      f'{which} of the columns ({", ".join(names[:20])}) are called '
      f'{", ".join(known)} or {last}, as the one of image files is.'
    )
  found.append(tables.caption_column(names, wanted))
  return found + [_KEY_COLUMN] * (names.count(_KEY_COLUMN) == 1)


def _image(value: Any, key: str) -> bytes:
  """The image file of a row.

  Raises:
    BadRecord: there is none.
  """
  path = None
  if isinstance(value, dict):
    path, value = value.get('path'), value.get('bytes')
  if value is None:
    detail = f'only a path, {readable(str(path))}' if path else ''
    raise BadRecord(key, 'caption without image', detail)
  if not isinstance(value, bytes):
    detail = f'{type(value).__name__} instead of bytes'
    raise BadRecord(key, 'not an image', detail)
  if len(value) > tars.MAX_FILE:
    raise BadRecord(key, 'file too large', f'{len(value)} bytes')
  return value
