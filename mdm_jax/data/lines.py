r"""Lines of text files: prompts, captions, names.

A line ends at \n or \r\n, and nowhere else. `str.splitlines` also ends one at
U+2028, U+0085 and others, which a caption may hold.
"""

from etils import epath


def read_lines(path: epath.PathLike) -> list[str]:
  """The lines of a file in UTF-8, with or without a byte order mark.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no text in UTF-8.
  """
  try:
    text = epath.Path(path).read_bytes().decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = 1 + error.object[: error.start].count(b'\n')
    raise ValueError(f'{path}, line {line}: this is not in UTF-8.') from None
  return split_lines(text)


def split_lines(text: str) -> list[str]:
  r"""The lines of a text, of which the last need not end in \n."""
  lines = text.split('\n')
  if not lines[-1]:
    lines.pop()
  return [line.removesuffix('\r') for line in lines]


def read_entries(path: epath.PathLike) -> list[str]:
  """Lines without the spaces at their ends; without empty ones.

  Raises:
    See `read_lines`.
  """
  return [line.strip() for line in read_lines(path) if line.strip()]
