r"""Text from data, as it may be shown, and commands that can be pasted.

A caption may hold anything: an escape sequence rewrites a terminal, a control
character for right-to-left text reorders what surrounds it.
"""

import re
import shlex
from typing import Any

# Control characters but newline and tab, line separators, controls of the
# direction of text, and halves of surrogate pairs, which no encoding has.
_UNPRINTABLE = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069'
  '\ud800-\udfff]'
)


def printable(text: str) -> str:
  r"""The text with escapes such as \x1b for what is no character to see.

  Newlines and tabs stay.
  """
  return _UNPRINTABLE.sub(_escaped, text)


def command_line(module: str, **values: Any) -> str:
  """A shell command that runs a module of this package.

  Args:
    module: such as 'sample'.
    values: of its flags; those that are None are left out.
  """
  words = [
    f'--{name}={quoted(value)}'
    for name, value in values.items()
    if value is not None
  ]
  return ' '.join([f'python -m mdm_jax.{module}', *words])


def quoted(value: Any) -> str:
  r"""A word of a shell command, printable: $'\x1b' of bash if it has to be."""
  text = str(value)
  if printable(text) == text and not re.search('[\n\t]', text):
    return shlex.quote(text)
  text = text.replace('\\', '\\\\').replace("'", "\\'")
  return "$'" + re.sub('[\n\t]', _escaped, printable(text)) + "'"


def _escaped(found: re.Match) -> str:
  number = ord(found[0])
  # In $'' of bash \x is a byte, of which the rest of UTF-8 takes several.
  return f'\\x{number:02x}' if number < 0x80 else f'\\u{number:04x}'
