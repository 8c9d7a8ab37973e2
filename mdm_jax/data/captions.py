"""Captions and class names, checked where they come in.

Every source of text passes here: files in tars, text features of TFDS and of
prepared data sets, and files of class names. What comes out is UTF-8 that can
be stored, printed and tokenized, in one line.
"""

from collections.abc import Sequence
import json
import re
from typing import Any

import numpy as np

from mdm_jax.data.images import BadRecord

# C0 and C1 but NUL; those that are white space for Python are no exception.
_CONTROL = re.compile('[\x01-\x1f\x7f-\x9f]')

_MAX_LENGTH = 2**20  # as many as a file of a tar may have


def read(value: Any, key: str) -> list[str]:
  """Checks the captions of a record.

  Args:
    value: a caption, or a sequence of captions to choose from, as text or as
      UTF-8; None is an empty caption.
    key: of the record, for errors.

  Returns:
    The captions that are not empty, see `clean`; at least one.

  Raises:
    BadRecord: a caption is not text, or there is none.
  """
  values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
  try:
    captions = ['' if text is None else clean(text) for text in values]
  except ValueError as error:
    raise BadRecord(key, 'unreadable caption', str(error)) from error
  if not captions:
    raise BadRecord(key, 'no caption')
  captions = [caption for caption in captions if caption]
  if not captions:
    raise BadRecord(key, 'empty caption')
  return captions


def read_json(data: bytes, key: str) -> list[str]:
  """Reads the 'caption' of a JSON file, a text or a list of texts.

  Raises:
    BadRecord: as `read`, or the file is not a JSON object with a 'caption'.
  """
  try:
    value = json.loads(data.decode('utf-8-sig'))['caption']
  # A hostile file may be nested too deeply.
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise BadRecord(
      key, 'unreadable caption', f'{type(error).__name__}: {error}'
    ) from error
  return read(value, key)


def clean(text: str | bytes) -> str:
  """Checks a text and puts it in one line.

  A byte order mark at the beginning is removed. White space and control
  characters become single spaces; all other characters stay, also those that
  change the direction of writing.

  Raises:
    ValueError: it is not text, not UTF-8, longer than 2^20 characters, or has
      half a surrogate pair or NUL, which is a sign of UTF-16.
  """
  if isinstance(text, bytes):
    text = text.decode()
  elif not isinstance(text, str):
    raise ValueError(f'{type(text).__name__} instead of text')
  if len(text) > _MAX_LENGTH:
    raise ValueError(f'a text of {len(text)} characters')
  text.encode()  # Fails for half a surrogate pair, which JSON can hold.
  if '\0' in text:
    raise ValueError('NUL in a text: it may be UTF-16 instead of UTF-8')
  return ' '.join(_CONTROL.sub(' ', text.removeprefix('\ufeff')).split())


def join(captions: Sequence[str]) -> str:
  """Joins captions of `read` to one text, for `split`."""
  return '\n'.join(captions)


def split(text: Any) -> Any:
  """Splits what `join` made; what is not text stays as it is, for `read`."""
  return text.split(b'\n') if isinstance(text, bytes) else text
