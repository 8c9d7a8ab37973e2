"""Class numbers in the place of captions."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

# Before the classes: padding, as in any text, and no class at all.
_EMPTY, _FIRST = 1, 2


@dataclasses.dataclass(frozen=True)
class Labels:
  """Encodes prompts that are a class's number or name; '' is no class.

  Attributes:
    num_classes: how many there are, from 0 on.
    names: of all of them, or none.
  """

  num_classes: int
  names: tuple[str, ...] = ()

  def __post_init__(self):
    """Raises ValueError: no classes, or not as many as names."""
    if self.num_classes < 1:
      raise ValueError(
        f'text.num_classes={self.num_classes}: give the number of classes '
        'that the labels have.'
      )
    if self.names and len(self.names) != self.num_classes:
      raise ValueError(
        f'text.class_names has {len(self.names)} names for '
        f'text.num_classes={self.num_classes}: give one a line for each '
        'class.'
      )

  @property
  def vocab_size(self) -> int:
    """Different tokens, those before the classes included."""
    return _FIRST + self.num_classes

  def encode(self, prompt: str) -> np.ndarray:
    """'207', a class's name, or '' -> one token, int32 [1].

    Raises:
      ValueError: no class has this number or name, or several the name.
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
    """Changes with what labels mean to the network, which names do not."""
    return f'{self.num_classes} classes'

  def name(self, label: int) -> str:
    """What to call a class: its name, or else its number."""
    return self.names[label] if self.names else str(label)


def read_names(path: str) -> tuple[str, ...]:
  """The lines of a file, such as TFDS's `label.labels.txt`.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f'text.class_names={path!r} does not exist: give a file with a name '
      'a line, or leave it empty.'
    )
  lines = pathlib.Path(path).read_text().splitlines()
  return tuple(line.strip() for line in lines if line.strip())


@dataclasses.dataclass(frozen=True)
class LabelledSource:
  """A source whose records have their label, encoded, as 'text' [1]."""

  source: Any
  labels: Labels

  def fingerprint(self) -> str:
    """The source's."""
    return self.source.fingerprint()

  def __len__(self) -> int:
    """The number of records."""
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The source's record, and 'text'."""
    record = self.source[index]
    return record | {'text': self.labels.encode(str(record['label']))}
