"""Files that are written whole or not at all, and read with care.

Disks fail, people edit, and programs are killed: what is read back may be
anything. The functions here tell in bounded time and memory, with one error,
`UnreadableFile`, that a file is not what it should be.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import glob
import io
import json
import math
import os
import pathlib
import re
import stat
import tempfile
import types
from typing import Any
import uuid

from absl import logging
from etils import epath

from mdm_jax.runtime import buckets

_LARGEST = 2**26  # Bytes of a file that is read at once.
_LARGEST_LINES = 2**30  # Bytes of a file of lines.
_LONGEST_LINE = 2**20  # Bytes.
_DEEPEST = 64  # Dicts and lists inside each other. Python's own limit is 1000.
_KINDS = {
  stat.S_IFDIR: 'a directory',
  stat.S_IFIFO: 'a named pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}


_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
buckets.register()  # For epath, wherever it is used.


class UnreadableFile(ValueError):
  """A file is missing, is no file, or does not hold what it should.

  Attributes:
    path: of the file.
    reason: what is wrong, as in 'is empty'.
  """

  def __init__(self, path: epath.PathLike, reason: str):
    """The message is the path and the reason."""
    super().__init__(f'{path} {reason}')
    self.path, self.reason = path, reason

  def __reduce__(self):
    """Pickles the arguments, for worker processes."""
    return type(self), (os.fspath(self.path), self.reason)


def require_file(path: epath.PathLike) -> tuple[int, int]:
  """Size in bytes of a file, and a number that changes when it is changed.

  Opening a named pipe would wait for a writer, for ever.

  Raises:
    UnreadableFile: there is no file, or it is a directory, a pipe, a device.
  """
  with naming_errors(path):
    if not is_local(path):
      info = buckets.file_system(path).info(os.fspath(path))
      if info['type'] == 'directory':
        raise UnreadableFile(path, 'is a directory, not a file')
      return info['size'], version(info)
    # epath has whole seconds only, and fails if its owner has no name here, as
    # in containers, and on disks that several machines share.
    found = os.stat(path)
  if not stat.S_ISREG(found.st_mode):
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), 'something else')
    raise UnreadableFile(path, f'is {kind}, not a file')
  return found.st_size, found.st_mtime_ns


def list_bucket(directory: str) -> dict[str, tuple[int, int]]:
  """The files of a directory in a bucket, each with what `require_file` tells.

  One request tells of a thousand. A directory that is not there has no files.

  Args:
    directory: as 'gs://name/path'.

  Raises:
    UnreadableFile: it cannot be listed.
  """
  scheme = buckets.scheme(directory)
  with naming_errors(directory):
    try:
      found = buckets.file_system(directory).ls(directory, detail=True)
    except FileNotFoundError:
      return {}
  return {
    f'{scheme}://{info["name"]}': (info['size'], version(info))
    for info in found
    if info['type'] == 'file'
  }


def modified(path: epath.PathLike) -> float:
  """When a file was written, in seconds since 1970; 0 if a bucket tells none.

  Raises:
    UnreadableFile: it cannot be told.
  """
  with naming_errors(path):
    if is_local(path):
      return os.stat(path).st_mtime
    return epath.Path(path).stat().mtime


def version(info: Mapping[str, Any]) -> int:
  """A number of each content of an object, from what fsspec tells of it."""
  if generation := info.get('generation'):  # Google's
    return int(generation)
  changed = info.get('LastModified') or info.get('mtime')
  return int(changed.timestamp() * 1e9) if changed else 0


def is_there(path: epath.PathLike) -> bool:
  """Whether there is anything of a name, be it a link that leads nowhere."""
  return os.path.lexists(path) if is_local(path) else epath.Path(path).exists()


def is_local(path: epath.PathLike) -> bool:
  """Whether a path is on a file system, not in a bucket."""
  return buckets.scheme(path) is None


def absolute(path: epath.PathLike) -> epath.Path:
  """The path as it is from any directory; epath's own takes no buckets."""
  path = epath.Path(path)
  return path.absolute() if is_local(path) else path


@contextlib.contextmanager
def naming_errors(path: epath.PathLike) -> Iterator[None]:
  """Turns an OSError raised inside into an `UnreadableFile`.

  Raises:
    OSError: a bucket does not answer, or refuses. What is in it may be as good
      as ever, so nobody should make it anew.
  """
  try:
    yield
  except OSError as error:
    reason = error.strerror or ' '.join(str(error).split()) or 'unknown error'
    if not is_local(path) and not isinstance(error, _NO_FILE):
      number = error.errno or errno.EIO
      raise OSError(number, reason, os.fspath(path)) from error
    raise UnreadableFile(path, f'cannot be read ({reason})') from error


def read_bytes(path: epath.PathLike) -> bytes:
  """Reads a file of 64 MiB at most.

  Raises:
    UnreadableFile: it cannot be read, or is larger.
  """
  require_file(path)
  with naming_errors(path), epath.Path(path).open('rb') as file:
    data = file.read(_LARGEST + 1)
  if len(data) > _LARGEST:
    raise UnreadableFile(path, f'is larger than {_LARGEST >> 20} MiB')
  return data


def read_json(
  path: epath.PathLike,
  is_valid: Callable[[Any], bool] = lambda value: isinstance(value, dict),
) -> Any:
  """Reads a JSON file.

  Args:
    path: of the file.
    is_valid: whether a value of JSON's types, at most 64 deep, is one that the
      file should hold.

  Raises:
    UnreadableFile: it cannot be read, is empty or no JSON, or is not valid.
  """
  data = read_bytes(path)
  if not data.strip():
    raise UnreadableFile(path, 'is empty')
  try:
    return _parse(data, is_valid)
  except ValueError as error:
    raise UnreadableFile(path, str(error)) from None


def read_json_lines(
  path: epath.PathLike,
  is_valid: Callable[[Any], bool] = lambda value: isinstance(value, dict),
) -> list[Any]:
  """Reads what can be read of a file with a JSON value on each line.

  Other lines are skipped, and their number is logged: a killed process may
  have cut off the last one. A file that cannot be read at all is logged too,
  and is as one without lines; so is a missing one, which is not logged.

  Args:
    path: of the file. What `runtime.appending` has put beside it is read too,
      as its end.
    is_valid: see `read_json`, of the value of a line.
  """
  values: list[Any] = []
  try:
    with naming_errors(path):
      found = parts(path)
  except UnreadableFile as error:
    logging.warning('%s: it is not used.', error)
    return values
  for part in found:
    _read_json_lines(part, is_valid, values)
  return values


def _read_json_lines(
  path: epath.Path, is_valid: Callable[[Any], bool], values: list[Any]
) -> None:
  odd = 0
  try:
    size, _ = require_file(path)
    if size > _LARGEST_LINES:
      raise UnreadableFile(path, f'is larger than {_LARGEST_LINES >> 30} GiB')
    with naming_errors(path), path.open('rb') as opened:
      # Files in buckets have a `readline` without a limit.
      file, whole = io.BufferedReader(opened), True
      while line := file.readline(_LONGEST_LINE):
        # The rest of a line that was too long is no line of its own.
        begins, whole = whole, line.endswith(b'\n')
        if not begins or not line.strip():
          continue
        try:
          values.append(_parse(line, is_valid))
        except ValueError:
          odd += 1
  except UnreadableFile as error:
    logging.warning('%s: it is not used.', error)
  if odd:
    logging.warning('%s: %d lines cannot be read; skipped.', path, odd)


def parts(path: epath.PathLike) -> list[epath.Path]:
  """A file, if there is one, then what `runtime.appending` has put beside it.

  Copied to a disk, they are read as they are in the bucket.

  Raises:
    OSError: a bucket could not be listed.
  """
  path = epath.Path(path)
  stem, suffix = _stem_and_suffix(path)
  if is_local(path):
    names = os.listdir(path.parent) if path.parent.is_dir() else []
  else:
    # One request, with the beginning of the names.
    pattern = glob.escape(os.fspath(path.parent / stem)) + '*' + suffix
    found = buckets.file_system(path).glob(pattern)
    names = [name.rpartition('/')[2] for name in found]
  numbers = {name: _part_number(name, stem, suffix) for name in names}
  beside = [name for name, number in numbers.items() if number is not None]
  beside.sort(key=lambda name: (numbers[name], name))
  first = [path.name] if path.name in names else []
  return [path.parent / name for name in first + beside]


def is_part(name: str, of: str) -> bool:
  """Whether `parts` of the file `of` would list a file of this name."""
  stem_and_suffix = _stem_and_suffix(epath.Path(of))
  return name == of or _part_number(name, *stem_and_suffix) is not None


def new_part(path: epath.PathLike) -> epath.Path:
  """The path of a part to come, see `parts`: `a-000003-5f3a9c.jsonl`.

  Raises:
    OSError: a bucket could not be listed.
  """
  path, found = epath.Path(path), parts(path)
  stem, suffix = _stem_and_suffix(path)
  last = _part_number(found[-1].name, stem, suffix) if found else None
  number = 0 if last is None else last + 1
  # Another process may append at the same time: no two names are the same.
  return path.parent / f'{stem}-{number:06d}-{uuid.uuid4().hex[:6]}{suffix}'


def _part_number(name: str, stem: str, suffix: str) -> int | None:
  """The number in the name of a part; None if it is none."""
  pattern = rf'{re.escape(stem)}-(\d{{6,}})-[0-9a-f]{{6}}{re.escape(suffix)}'
  found = re.fullmatch(pattern, name)
  return int(found[1]) if found else None


def _stem_and_suffix(path: epath.Path) -> tuple[str, str]:
  """Only `.jsonl` is a suffix: names of event files have dots of their own."""
  stem = path.name.removesuffix('.jsonl')
  return stem, path.name[len(stem) :]


def is_number(value: Any) -> bool:
  """Whether a JSON value is a finite number."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # A whole number of hundreds of digits.
    return False


def is_count(value: Any) -> bool:
  """Whether a JSON value is a whole number that is not negative."""
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse(data: bytes, is_valid: Callable[[Any], bool]) -> Any:
  """Decodes JSON.

  Raises:
    ValueError: says what is wrong, as `UnreadableFile.reason`.
  """
  try:
    value = json.loads(data)
  except ValueError as error:  # Also UnicodeDecodeError.
    raise ValueError(f'is no JSON ({" ".join(str(error).split())})') from None
  except RecursionError:
    raise ValueError('is nested too deep') from None
  if _is_deep(value):
    raise ValueError('is nested too deep')
  if not is_valid(value):
    raise ValueError('does not hold what it should')
  return value


def _is_deep(value: Any) -> bool:
  level = [value]
  for _ in range(_DEEPEST):
    level = [
      child
      for parent in level
      if isinstance(parent, dict | list)
      for child in (parent.values() if isinstance(parent, dict) else parent)
    ]
    if not level:
      return False
  return True


def set_aside(path: epath.PathLike, suffix: str = 'unreadable') -> None:
  """Renames what is not what it should be, so that it can be made anew.

  Objects of a bucket are moved one by one. If the process is killed meanwhile,
  the next call for the same path goes on where it was.

  Args:
    path: of a file or a directory; its new name ends in the suffix.
    suffix: without a dot. A `+` is added for each name that exists already.
  """
  path = epath.Path(path)
  target = path.with_name(f'{path.name}.{suffix}')
  local = is_local(path)
  while target.exists() and (local or not _was_begun(path, target)):
    target = target.with_name(f'{target.name}+')
  if local:
    path.rename(target)
  else:
    _move_objects(path, target)
  logging.warning('%s is now %s.', path, target.name)


def _was_begun(path: epath.Path, target: epath.Path) -> bool:
  """Whether a target may be what moving has left there: nothing differs."""
  moved = objects(target)
  return all(
    moved[name][field] == info[field]
    for name, info in objects(path).items()
    if name in moved
    for field in ('size', 'crc32c')
    if field in info
  )


def _move_objects(path: epath.Path, target: epath.Path) -> None:
  # What is at the top comes last: it tells what a directory is.
  system, names = buckets.file_system(path), [*objects(path)]
  for part in (
    [name for name in names if '/' in name],
    [name for name in names if '/' not in name],
  ):
    if part:
      system.mv(
        *(
          [f'{root}/{name}'.rstrip('/') for name in part]
          for root in (path, target)
        )
      )


def objects(directory: epath.PathLike) -> dict[str, Mapping[str, Any]]:
  """What is below a directory of a bucket, by one request or a few.

  Returns:
    fsspec's description of each object by its name in the directory, sorted.
    Only '' if the path is that of an object.

  Raises:
    OSError: there is no answer.
  """
  root = os.fspath(directory).rstrip('/')
  with naming_errors(root):
    found = buckets.file_system(root).find(root, detail=True)
  prefix = root.partition('://')[2]
  return {
    name.removeprefix(prefix).lstrip('/'): found[name] for name in sorted(found)
  }


@contextlib.contextmanager
def replacing(
  path: epath.PathLike, *, shared: bool = False
) -> Iterator[epath.Path]:
  """Replaces a file at once when its new content is complete.

  Whoever reads the path, also after the process was killed here, finds the
  old file or the new one. Directories above it are created.

  Args:
    path: of the file, local or in a bucket.
    shared: other processes may write the same file at the same time, so the
      temporary file gets a name of its own. Otherwise what a killed process
      has left behind is overwritten by the next.

  Yields:
    The path of a temporary local file, to be written to. An error inside
    removes it and leaves `path` as it was.
  """
  path = epath.Path(path)
  if not is_local(path):
    # An object appears as a whole, once all of it is uploaded.
    with tempfile.TemporaryDirectory(prefix='mdm_jax_') as directory:
      temporary = epath.Path(directory) / path.name
      yield temporary
      upload(temporary, path)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  unique = f'.{uuid.uuid4().hex[:8]}' if shared else ''
  temporary = path.with_name(f'{path.name}{unique}.tmp')
  try:
    yield temporary
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  temporary.replace(path)


def upload(source: epath.PathLike, path: epath.PathLike) -> None:
  """Copies a local file into a bucket."""
  buckets.file_system(path).put_file(os.fspath(source), os.fspath(path))


def upload_directory(directory: epath.PathLike, path: epath.PathLike) -> None:
  """Copies the files below a local directory into a bucket."""
  for file in sorted(pathlib.Path(directory).rglob('*')):
    if file.is_file():
      upload(file, epath.Path(path) / file.relative_to(directory))


@contextlib.contextmanager
def local_directory(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """A directory on this machine, for what writes to no others.

  Args:
    path: of the directory, local or in a bucket.

  Yields:
    The path itself if it is local; else that of another, whose files are
    uploaded at the end, and which is then removed. An error inside leaves the
    bucket as it was.
  """
  if is_local(path):
    yield pathlib.Path(path)
    return
  with tempfile.TemporaryDirectory(prefix='mdm_jax_') as directory:
    yield pathlib.Path(directory)
    upload_directory(directory, path)


@contextlib.contextmanager
def local_copy(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """A local file with the content of a file, for what reads no others.

  Args:
    path: of the file, local or in a bucket.

  Yields:
    The path itself if it is local; else that of a copy, removed at the end.

  Raises:
    UnreadableFile: it cannot be read.
  """
  require_file(path)
  if is_local(path):
    yield pathlib.Path(path)
    return
  with tempfile.TemporaryDirectory(prefix='mdm_jax_') as directory:
    copy = pathlib.Path(directory, epath.Path(path).name)
    with naming_errors(path):
      buckets.file_system(path).get_file(os.fspath(path), str(copy))
    yield copy


def write_text(
  path: epath.PathLike, text: str, *, shared: bool = False
) -> None:
  """Writes UTF-8 text, see `replacing`."""
  with replacing(path, shared=shared) as temporary:
    temporary.write_text(text, encoding='utf-8')


def json_number(value: float) -> float | str:
  """A number, or its name if JSON has none for it: 'nan', 'inf' or '-inf'."""
  return value if math.isfinite(value) else str(float(value))


def write_json(
  path: epath.PathLike, value: Any, *, shared: bool = False
) -> None:
  """Writes indented JSON, see `replacing`."""
  write_text(path, json.dumps(value, indent=2) + '\n', shared=shared)


def require_same_settings(
  path: epath.PathLike,
  settings: dict[str, Any],
  renamed: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
  """Writes the settings with which a directory was begun, for the next time.

  Several processes may begin at the same time.

  Args:
    path: of the file, in the directory.
    settings: as JSON.
    renamed: older names, and what they are now.

  Raises:
    ValueError: the directory was begun with others. Settings that the file does
      not have were added since, and can be any.
  """
  path = epath.Path(path)
  if path.exists():
    try:
      found = read_json(path)
    except UnreadableFile as error:
      raise ValueError(f'{error}: remove {path.parent}.') from None
    found = {renamed.get(key, key): value for key, value in found.items()}
    different = [key for key in found if found[key] != settings.get(key)]
    if different:
      raise ValueError(
        f'{path.parent} was begun with other {", ".join(different)}: remove '
        'it, or give the same values again, and the same files.'
      )
  write_text(path, json.dumps(settings), shared=True)
