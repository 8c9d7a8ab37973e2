"""Tables of captions: the metadata.jsonl or metadata.csv of an imagefolder.

Hugging Face's `datasets` and diffusers read folders of images with such a
table: the column `file_name` has the path of an image relative to the table,
another column its caption.
"""

from collections.abc import Iterable, Iterator
import csv
import json
from typing import Any, BinaryIO

from etils import epath

from mdm_jax.data.images import BadRecord
from mdm_jax.runtime import files

NAMES = ('metadata.jsonl', 'metadata.csv')
SUFFIXES = ('.jsonl', '.csv')
FILE_COLUMN = 'file_name'
# Columns that hold captions in data sets of diffusers and of img2dataset.
CAPTION_COLUMNS = ('text', 'caption', 'captions', 'prompt', 'description')
_LARGEST = 2**30  # bytes of a table
_LONGEST_LINE = 2**21  # bytes
_LISTED = 20  # columns that an error names

# Key of the row, the name of its image's file, and its caption: both may be
# anything that JSON can hold.
Row = tuple[str, Any, Any]


def caption_column(columns: Iterable[str], wanted: str = '') -> str:
  """Chooses the column of the captions.

  Args:
    columns: that there are.
    wanted: by --caption_column; '' for the usual one that there is.

  Raises:
    ValueError: there is no such column, or there are several.
  """
  columns = list(columns)
  shown = ', '.join(map(str, columns[:_LISTED]))
  if wanted and wanted not in columns:
    raise ValueError(
      f'--caption_column={wanted} is none of the columns ({shown}).'
    )
  known = [wanted] if wanted else CAPTION_COLUMNS
  found = [name for name in columns if name in known]
  if not found:
    *names, last = CAPTION_COLUMNS
    raise ValueError(
      f'none of the columns ({shown}) is called {", ".join(names)} or {last}: '
      'name the one of the captions by --caption_column.'
    )
  if twice := [name for name in found if found.count(name) > 1]:
    raise ValueError(f'two columns are called {twice[0]}: rename one.')
  if len(found) > 1:
    raise ValueError(
      f'the columns {" and ".join(found)} may both be captions: choose by '
      '--caption_column.'
    )
  return found[0]


def read(path: str, key: str, wanted: str = '') -> Iterator[Row | BadRecord]:
  """Reads a table, CSV if its name ends in .csv, otherwise JSON lines.

  Args:
    path: of the file, local or in a bucket, in UTF-8, with or without a byte
      order mark.
    key: what keys of its rows begin with; the number of the line follows.
    wanted: see `caption_column`.

  Yields:
    The rows, and what is none.

  Raises:
    ValueError: the file is no such table.
    OSError: it cannot be read.
  """
  if not epath.Path(path).is_file():
    raise ValueError(f'{path} is no file.')
  if files.require_file(path)[0] > _LARGEST:
    raise ValueError(
      f'{path} is larger than {_LARGEST >> 30} GiB: divide the images into '
      'folders with a table each.'
    )
  read_rows = _read_csv if path.endswith('.csv') else _read_json_lines
  with files.local_copy(path) as local, local.open('rb') as file:
    start = file.read(3)
    if start[:2] in (b'\xff\xfe', b'\xfe\xff'):
      raise ValueError(f'{path} is in UTF-16: save it as UTF-8.')
    file.seek(len(start) if start == b'\xef\xbb\xbf' else 0)
    try:
      yield from read_rows(file, key, wanted)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None


def _read_csv(
  file: BinaryIO, key: str, wanted: str
) -> Iterator[Row | BadRecord]:
  # Bytes that are not UTF-8 cost one row: they come back in its caption.
  lines = (line.decode('utf-8', 'surrogateescape') for line in _lines(file))
  reader = csv.reader(lines, strict=True)
  header = None
  while True:
    line = reader.line_num + 1
    try:
      row = next(reader)
    except StopIteration:
      break
    except csv.Error as error:
      if header is None:
        raise ValueError(f'line {line}: {error}.') from None
      where = f'lines {line} to {reader.line_num}: {error}'
      yield BadRecord(f'{key}:{line}', 'unreadable row', where)
      continue
    if not row:  # an empty line
      continue
    if header is None:
      header = [_readable(name.strip()) for name in row]
      if FILE_COLUMN not in header:
        raise ValueError(
          f'none of the columns ({", ".join(header[:_LISTED])}) is called '
          f'{FILE_COLUMN}. The first line names the columns, separated by '
          'commas.'
        )
      name_at = header.index(FILE_COLUMN)
      caption_at = header.index(caption_column(header, wanted))
    elif len(row) != len(header):
      yield BadRecord(
        f'{key}:{line}',
        'unreadable row',
        f'{len(row)} fields, the first line has {len(header)}: a text with '
        'commas needs quotes',
      )
    else:
      caption = row[caption_at].encode('utf-8', 'surrogateescape')
      yield f'{key}:{line}', row[name_at], caption
  if header is None:
    raise ValueError('it is empty.')


def _read_json_lines(
  file: BinaryIO, key: str, wanted: str
) -> Iterator[Row | BadRecord]:
  whole = True
  number = 0
  for line in _lines(file):
    # The rest of a line that was too long is no line of its own.
    begins, whole = whole, line.endswith(b'\n')
    if not begins:
      continue
    number += 1
    row_key = f'{key}:{number}'
    if not whole and len(line) == _LONGEST_LINE:
      limit = f'more than {_LONGEST_LINE} bytes'
      yield BadRecord(row_key, 'unreadable row', limit)
      continue
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError(f'{type(row).__name__} instead of an object')
    # A hostile line may be nested too deeply.
    except (ValueError, RecursionError) as error:
      detail = f'{type(error).__name__}: {error}'
      yield BadRecord(row_key, 'unreadable row', detail)
      continue
    try:
      column = caption_column(row, wanted)
    except ValueError as error:
      yield BadRecord(row_key, 'no caption', str(error))
      continue
    yield row_key, row.get(FILE_COLUMN), row[column]


def _lines(file: BinaryIO) -> Iterator[bytes]:
  """Lines with their ends; longer ones in pieces."""
  while line := file.readline(_LONGEST_LINE):
    yield line


def _readable(text: str) -> str:
  return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
