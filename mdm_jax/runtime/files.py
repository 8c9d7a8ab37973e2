"""Files that are written whole or not at all."""

from collections.abc import Iterator
import contextlib
import json
from typing import Any
import uuid

from etils import epath


@contextlib.contextmanager
def replacing(
  path: epath.PathLike, *, shared: bool = False
) -> Iterator[epath.Path]:
  """Replaces a file at once when its new content is complete.

  Whoever reads the path, also after the process was killed here, finds the
  old file or the new one. Directories above it are created.

  Args:
    path: of the file, local or on any file system that epath knows.
    shared: other processes may write the same file at the same time, so the
      temporary file gets a name of its own. Otherwise what a killed process
      has left behind is overwritten by the next.

  Yields:
    The path of a temporary file in the same directory, to be written to. An
    error inside removes it and leaves `path` as it was.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unique = f'.{uuid.uuid4().hex[:8]}' if shared else ''
  temporary = path.with_name(f'{path.name}{unique}.tmp')
  try:
    yield temporary
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  temporary.replace(path)


def write_text(
  path: epath.PathLike, text: str, *, shared: bool = False
) -> None:
  """Writes UTF-8 text, see `replacing`."""
  with replacing(path, shared=shared) as temporary:
    temporary.write_text(text, encoding='utf-8')


def write_json(
  path: epath.PathLike, value: Any, *, shared: bool = False
) -> None:
  """Writes indented JSON, see `replacing`."""
  write_text(path, json.dumps(value, indent=2) + '\n', shared=shared)
