"""Class labels in the place of captions."""

import dataclasses
from typing import Any

from etils import epath
import numpy as np

from mdm_jax.data import captions
from mdm_jax.data.lines import read_entries

# Tokens: 0 is padding, as in any text; 1 is "no class"; classes follow.
_EMPTY, _FIRST = 1, 2


@dataclasses.dataclass(frozen=True)
class Labels:
  """Encodes prompts that are the number or the name of a class.

  The empty prompt '' stands for no class.

  Attributes:
    num_classes: number of classes; they are numbered from 0.
    names: the name of each class, or empty.
  """

  num_classes: int
  names: tuple[str, ...] = ()

  def __post_init__(self):
    """Raises ValueError if there is no class, or not one name for each."""
    if self.num_classes < 1:
      raise ValueError(
        f'text.num_classes={self.num_classes}: give the number of classes in '
        'the data set.'
      )
    if self.names and len(self.names) != self.num_classes:
      raise ValueError(
        f'text.class_names has {len(self.names)} names for '
        f'text.num_classes={self.num_classes}: give one name for each class, '
        'one per line.'
      )

  @property
  def vocab_size(self) -> int:
    """Number of tokens: the classes, padding and "no class"."""
    return _FIRST + self.num_classes

  def encode(self, prompt: str) -> np.ndarray:
    """Encodes a class's number such as '207', its name, or ''.

    Returns:
      One token, int32 [1].

    Raises:
      ValueError: no class has this number or name, or several classes have
        this name.
    """
    if not prompt:
      return np.array([_EMPTY], np.int32)
    if prompt.isdecimal():
      found = [int(prompt)] if int(prompt) < self.num_classes else []
    else:
      found = [i for i, name in enumerate(self.names) if name == prompt]
    if len(found) != 1:
      names = ', or a name of text.class_names' if self.names else ''
      raise ValueError(
        f'{len(found) or "no"} classes are {prompt!r}: give a number from 0 '
        f'to {self.num_classes - 1}{names}.'
      )
    return np.array([_FIRST + found[0]], np.int32)

  def fingerprint(self) -> str:
    """Identifies the meaning of the tokens, which names do not change."""
    return f'{self.num_classes} classes'

  def name(self, label: int) -> str:
    """The name of a class, or its number where there are no names."""
    return self.names[label] if self.names else str(label)


def read_names(path: str) -> tuple[str, ...]:
  """Reads class names, one per line, such as TFDS's `label.labels.txt`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not text, see `captions.clean`.
  """
  if not epath.Path(path).is_file():
    raise FileNotFoundError(
      f'text.class_names={path!r} does not exist: give a file with one name '
      'per line, or leave it empty.'
    )
  try:
    return tuple(filter(None, map(captions.clean, read_entries(path))))
  except ValueError as error:
    raise ValueError(
      f'text.class_names={path!r} is not a file of text: {error}'
    ) from error


@dataclasses.dataclass(frozen=True)
class LabelledSource:
  """A source whose records have their encoded label as 'text', int32 [1]."""

  source: Any
  labels: Labels

  def fingerprint(self) -> str:
    """The fingerprint of the wrapped source."""
    return self.source.fingerprint()

  def __len__(self) -> int:
    """The number of records."""
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record of the wrapped source, with 'text' added."""
    record = self.source[index]
    return record | {'text': self.labels.encode(str(record['label']))}
