"""What flags and keys may be: numbers in a range, names, texts, paths.

Each kind checks a value and says in words what to give instead. Flags and keys
of the configuration share them, so that a mistake reads the same in both.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import difflib
import numbers
import os
import re
import stat
from typing import Any

from mdm_jax.runtime import buckets

# No file system has longer names; temporary files add a suffix to theirs.
_LONGEST_NAME, _LONGEST_OUTPUT = 255, 230
_LONGEST_PATH = 3800  # of 4096 bytes; the rest is for what lies below


@dataclasses.dataclass(frozen=True)
class Number:
  """A number in a range.

  Attributes:
    type: int or float; an int is a float as well, True is neither.
    low, high: limits. NaN and infinities are in no range.
    above, below: whether the lower, the upper limit itself is excluded.
    also: other values.
  """

  type: type
  low: float
  high: float
  above: bool = False
  below: bool = False
  also: tuple[float, ...] = ()

  def __str__(self):
    kind = 'an integer' if self.type is int else 'a number'
    low = f'{"above" if self.above else "from"} {_format(self.low)}'
    if self.above:
      high = 'and below' if self.below else 'and up to'
    else:
      high = 'to below' if self.below else 'to'
    also = ''.join(f', or {_format(value)}' for value in self.also)
    return f'{kind} {low} {high} {_format(self.high)}{also}'

  def parse(self, text: str) -> float:
    """The number that a text is.

    Raises:
      ValueError: it is none, or not in the range.
    """
    try:
      value = self.type(text)
    except ValueError:
      raise ValueError(f'give {self}.') from None
    return self.check(value)

  def check(self, value: Any) -> float:
    """Returns the value; numbers of NumPy become those of Python.

    Raises:
      ValueError: it is no number, or not in the range.
    """
    if type(value) not in (bool, int, float):
      if isinstance(value, numbers.Integral):
        value = int(value)
      elif isinstance(value, numbers.Real):
        value = float(value)
    is_number = isinstance(value, (int, self.type))
    is_number &= not isinstance(value, bool)
    if is_number and value in self.also:
      return value
    if (
      not is_number
      or not self.low <= value <= self.high
      or (self.above and value == self.low)
      or (self.below and value == self.high)
    ):
      raise ValueError(f'give {self}.')
    return value


# Sample i has seed + i. JAX's random numbers have seeds of 32 bits.
SEED = Number(int, 0, 2**32 - 1)


def check_seeds(name: str, seed: int, count: int) -> None:
  """Checks that `count` seeds from this one on differ from those below it.

  Raises:
    ValueError: one is larger than the largest.
  """
  if seed + count - 1 > SEED.high:
    raise ValueError(
      f'{name}={seed} with {count:,} samples: sample i has seed + i, so give '
      f'an integer from 0 to {max(0, 2**32 - count):,}.'
    )


@dataclasses.dataclass(frozen=True)
class Boolean:
  """True or False."""

  def __str__(self):
    return 'True or False'

  def check(self, value: Any) -> bool:
    """Returns the value; raises ValueError if it is another."""
    if type(value) is not bool:
      raise ValueError(f'give {self}.')
    return value


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some names.

  Attributes:
    names: that can be chosen; 'tfds:NAME' stands for any with this beginning.
  """

  names: tuple[str, ...]

  def __str__(self):
    return f'one of {", ".join(self.names)}'

  def check(self, value: Any) -> str:
    """Returns the value; raises ValueError if it is no such name."""
    _check_text(value, f'use {self}.')
    for name in self.names:
      stem = name.removesuffix('NAME')
      is_any = stem != name and value.startswith(stem)
      if value == name or is_any and value[len(stem) :].strip():
        return value
    near = difflib.get_close_matches(value, self.names, 1)
    meant = f' Did you mean {near[0]}?' if near else ''
    raise ValueError(f'use {self}.{meant}')

  parse = check


@dataclasses.dataclass(frozen=True)
class Text:
  """A text.

  Attributes:
    wanted: what it is, in words.
    pattern: regular expression that all of it matches.
    longest: bytes in UTF-8.
  """

  wanted: str = 'a text'
  pattern: str = r'(?s:.*)'
  longest: int = 100_000

  def __str__(self):
    return self.wanted

  def check(self, value: Any) -> str:
    """Returns the value; raises ValueError if it is no such text."""
    _check_text(value, f'give {self}.')
    if len(value.encode()) > self.longest:
      raise ValueError(f'give {self}, of at most {self.longest:,} bytes.')
    if not re.fullmatch(self.pattern, value):
      raise ValueError(f'give {self}.')
    return value

  parse = check


# Part of the names of files.
NAME = Text(
  'a name without slashes, control characters and spaces at its ends',
  r'[^\s/.\x00-\x1f\x7f-\x9f](?:[^/\x00-\x1f\x7f-\x9f]*[^\s/\x00-\x1f\x7f-\x9f])?',
  longest=100,
)
ADDRESS = Text(
  'HOST:PORT, with a port from 1 to 65535',
  r'\S+:0*(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|'
  '655[0-2][0-9]|6553[0-5])',
  longest=300,
)
PART = Text('k/n, such as 0/4, with k from 0 to n - 1', r'\d{1,6}/\d{1,6}')


def parse_part(text: str) -> tuple[int, int]:
  """'k/n' -> k, n.

  Raises:
    ValueError: k is not below n.
  """
  match = re.fullmatch(PART.pattern, text)
  index, count = map(int, text.split('/')) if match else (0, 0)
  if index >= count:
    raise ValueError(f'--part={text}: give {PART}.')
  return index, count


@dataclasses.dataclass(frozen=True)
class Tuple:
  """A tuple of values of one kind.

  Attributes:
    element: kind of its elements.
    length: number of elements; None for any.
  """

  element: Any
  length: int | None = None

  def __str__(self):
    count = '' if self.length is None else f' of {self.length} elements'
    return f'a tuple{count}, each {self.element}'

  def check(self, value: Any) -> tuple:
    """Returns the value; raises ValueError if an element is wrong."""
    if not isinstance(value, tuple) or self.length not in (None, len(value)):
      raise ValueError(f'give {self}.')
    try:
      return tuple(map(self.element.check, value))
    except ValueError:
      raise ValueError(f'give {self}.') from None


@dataclasses.dataclass(frozen=True)
class List:
  """Values of one kind, joined by commas; not empty.

  Attributes:
    element: kind of the values.
  """

  element: Any

  def __str__(self):
    return f'a list joined by commas, each {self.element}'

  def parse(self, text: str) -> list:
    """The values that are joined in a text."""
    return [self.element.parse(part.strip()) for part in text.split(',')]

  def check(self, values: Sequence[Any]) -> list:
    """Returns the values; raises ValueError if one is wrong."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
      raise ValueError(f'give {self}.')
    return [self.element.check(value) for value in values]


@dataclasses.dataclass(frozen=True)
class Path:
  """A path as the user of a shell means it: '~' is the home directory.

  Attributes:
    kind: 'file' or 'directory'; 'text', a file or a pipe, read once; 'glob';
      'input', a directory or a glob.
    output: whether it is written to, so need not exist.
    missing: whether it need not exist.
    empty: whether it may be the empty text.
    schemes: of the buckets in which it may be, such as 'gs'; ('*',) for any
      URL, which is not looked at; none for a path on this machine.
    suffixes: one of which it ends in; none: in anything.
  """

  kind: str
  output: bool = False
  missing: bool = False
  empty: bool = False
  schemes: tuple[str, ...] = buckets.SCHEMES
  suffixes: tuple[str, ...] = ()

  def __str__(self):
    kind = {
      'text': 'text file',
      'glob': 'glob of files',
      'input': 'folder, or a glob of files',
    }.get(self.kind, self.kind)
    ends = f', ending in {" or ".join(self.suffixes)}' if self.suffixes else ''
    return f'the path of a {kind}{ends}'

  def check(self, value: Any) -> str:
    """Returns the path, with '~' replaced; in a bucket without needless '/'.

    Raises:
      ValueError: it means nothing, is of another kind, or cannot be read or
        written.
    """
    _check_text(value, f'give {self}.')
    if not value and self.empty:
      return value
    if not value.strip() or re.search('[\x00-\x1f\x7f-\x9f]', value):
      raise ValueError(f'give {self}.')
    if value != value.strip():
      raise ValueError('remove the spaces around it.')
    if '://' in value and self._is_allowed(value):
      if '*' not in self.schemes:
        value = _without_needless_slashes(value)
        self._check_in_bucket(value)
      return value
    path = _expand(value, self.schemes)
    if not path.endswith(self.suffixes or ''):
      raise ValueError(f'give {self}.')
    if self.kind not in ('glob', 'input'):
      self._check_on_disk(path)
    return path

  parse = check

  def _is_allowed(self, value: str) -> bool:
    scheme = value.partition('://')[0]
    return scheme != 'file' and bool({scheme, '*'} & set(self.schemes))

  def _check_in_bucket(self, path: str) -> None:
    """Raises ValueError if a bucket has something else there."""
    if not path.endswith(self.suffixes or ''):
      raise ValueError(f'give {self}.')
    if self.kind in ('glob', 'input'):
      buckets.file_system(path)
      return
    found = buckets.find(path)
    wanted = 'directory' if self.kind == 'directory' else 'file'
    if found is None and not (self.output or self.missing):
      raise ValueError(f'there is no such {self._noun}.')
    if found not in (None, wanted):
      raise ValueError(f'this is a {found}: give {self}.')
    if self.output:
      is_file = self.kind == 'file'
      buckets.check_writable(path if is_file else f'{path.rstrip("/")}/any')

  def _check_on_disk(self, path: str) -> None:
    """Raises ValueError if the file system has something else there."""
    try:
      mode = os.stat(path).st_mode
    except FileNotFoundError:
      mode = None
    except (OSError, ValueError) as error:
      raise ValueError(_reason(error, path)) from None
    is_directory = self.kind == 'directory'
    if mode is None:
      if self.output:
        _check_parent(path)
      elif not self.missing:
        raise ValueError(f'there is no such {self._noun}.')
    elif is_directory != stat.S_ISDIR(mode):
      raise ValueError(
        f'this is a {"file" if is_directory else "directory"}: give {self}.'
      )
    elif not is_directory and not (
      stat.S_ISREG(mode) or self.kind == 'text' and stat.S_ISFIFO(mode)
    ):
      raise ValueError(f'this is no regular file: give {self}.')
    elif self.output and not os.access(path, os.W_OK):
      raise ValueError('it cannot be written to.')
    elif not self.output and not os.access(path, os.R_OK):
      raise ValueError('it cannot be read.')
    elif self.output and not is_directory:
      _check_parent(path)  # The file is replaced by another.
    name = os.path.basename(path.rstrip('/'))
    if self.output and len(os.fsencode(name)) > _LONGEST_OUTPUT:
      raise ValueError(
        f'its name is too long: give one of {_LONGEST_OUTPUT} bytes or fewer.'
      )

  @property
  def _noun(self) -> str:
    return 'directory' if self.kind == 'directory' else 'file'


# The working directory of a run.
RUN = Path('directory', schemes=buckets.OF_RUNS)
NEW_RUN = dataclasses.replace(RUN, output=True)


def check_outputs(directory: str | os.PathLike, *names: str) -> None:
  """Checks that directories can be written to, before there is work to lose.

  Nothing is created.

  Args:
    directory: that need not exist.
    names: of directories in it.

  Raises:
    ValueError: one is a file, or cannot be written to.
  """
  for path in (directory, *(os.path.join(directory, name) for name in names)):
    try:
      Path('directory', output=True).check(os.fspath(path))
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None


def _check_text(value: Any, remedy: str) -> None:
  """Raises ValueError for what is no text, or not in UTF-8."""
  if not isinstance(value, str):
    raise ValueError(remedy)
  try:
    value.encode()
  except UnicodeEncodeError:
    raise ValueError(f'this is not in UTF-8: {remedy}') from None
  if '\0' in value:
    raise ValueError(f'this has a NUL character: {remedy}')


def _expand(value: str, schemes: tuple[str, ...]) -> str:
  """The path on this machine that a text means."""
  if found := re.match(r'([A-Za-z][\w+.-]*):/', value):
    scheme = found[1]
    if scheme == 'file':
      raise ValueError('give the path alone, without file:.')
    if schemes and not value.startswith(f'{scheme}://'):
      raise ValueError(f'write {scheme}:// with two slashes.')
    raise ValueError(
      f'give a path on this machine, or one of {"://, ".join(schemes)}://.'
      if schemes
      else 'give a path on this machine: buckets and URLs are not supported '
      'here (a bucket can be mounted).'
    )
  if found := re.search(r'\$(\w+|\{\w+\})', value):
    raise ValueError(
      f'{found[0]} has not been replaced by the shell: give its value.'
    )
  path = os.path.expanduser(value)
  if path.startswith('~'):
    user = path[1:].partition('/')[0]
    raise ValueError(
      f'there is no user {user}: write ./~ for a file of this name.'
      if user
      else 'this user has no home directory: give the whole path.'
    )
  if any(len(os.fsencode(name)) > _LONGEST_NAME for name in path.split('/')):
    raise ValueError(f'a name has more than {_LONGEST_NAME} bytes: shorten it.')
  if len(os.fsencode(os.path.abspath(path))) > _LONGEST_PATH:
    raise ValueError(f'it has more than {_LONGEST_PATH:,} bytes: shorten it.')
  return path


def _without_needless_slashes(path: str) -> str:
  """The name in a bucket that a path means to epath: `gs://a//b/` is another.

  Raises:
    ValueError: it contains '..', which is a name like any other there.
  """
  scheme, separator, rest = path.partition('://')
  names = [name for name in rest.split('/') if name not in ('', '.')]
  if '..' in names:
    raise ValueError("buckets know no '..': give the whole path.")
  return scheme + separator + '/'.join(names)


def _check_parent(path: str) -> None:
  """Raises ValueError if nothing can be created at a path."""
  parent = os.path.abspath(path)
  while True:
    parent = os.path.dirname(parent)
    if os.path.lexists(parent):
      break
  if not os.path.isdir(parent):
    raise ValueError(f'{parent} is no directory.')
  if not os.access(parent, os.W_OK | os.X_OK):
    raise ValueError(f'nothing can be written to {parent}.')


def _reason(error: Exception, path: str) -> str:
  if isinstance(error, NotADirectoryError):
    parent = os.path.abspath(path)
    while not os.path.lexists(parent):
      parent = os.path.dirname(parent)
    return f'{parent} is a file, not a directory.'
  return f'{getattr(error, "strerror", None) or error}.'


def _format(value: float) -> str:
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:g}' if value < 0.5 else repr(value)
