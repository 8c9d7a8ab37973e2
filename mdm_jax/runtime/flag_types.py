"""Defines flags that check themselves.

Flags are checked while they are parsed, before anything slow is imported and
anything is written. Importing it is quick.
"""

from collections.abc import Sequence
import re
import sys
from typing import Any

from absl import flags

from mdm_jax.runtime import value_types

# Flags belong to the module that calls the functions below.
flags.disclaim_key_flags()

_LONGEST = 600  # characters of an error


class _Parser(flags.ArgumentParser):
  """Parses and checks a flag of a kind of `value_types`."""

  def __init__(self, kind: Any):
    self.kind = kind
    self.syntactic_help = str(kind)

  def parse(self, argument: Any) -> Any:
    """The value of a text, checked; a default is only checked."""
    if isinstance(argument, str):
      return self.kind.parse(argument)
    return self.kind.check(argument)

  def flag_type(self) -> str:
    """The kind of the value, for --helpxml."""
    return type(self.kind).__name__.lower()


def refuse(names: Sequence[str], beside: str) -> None:
  """Raises ValueError if a flag is given that does nothing beside another."""
  for name in names:
    if flags.FLAGS[name].present:
      raise ValueError(f'--{name} does nothing with {beside}: leave it out.')


def define(
  name: str, default: Any, kind: Any, text: str, *, required: bool = False
) -> flags.FlagHolder:
  """Defines a flag.

  Args:
    name: of the flag.
    default: its value if it is not given; None for none.
    kind: of `value_types`: a `Number`, `Choice`, `Text`, `Path` or `List`.
    text: for --help.
    required: whether it must be given.
  """
  return flags.DEFINE(
    _Parser(kind),
    name,
    default,
    text,
    serializer=flags.ArgumentSerializer(),
    required=required,
  )


def define_repeated(
  name: str, default: Any, kind: Any, text: str, *, required: bool = False
) -> flags.FlagHolder:
  """Defines a flag that may be given several times, see `define`."""
  return flags.DEFINE_multi(
    _Parser(kind),
    flags.ArgumentSerializer(),
    name,
    default,
    text,
    required=required,
  )


def integer(name: str, default: int | None, low: int, high: int, text: str):
  """Defines a flag that is an integer from `low` to `high`."""
  return define(name, default, value_types.Number(int, low, high), text)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses flags; a mistake ends the process with one line."""
  try:
    return parse(argv)
  except flags.Error as error:
    sys.exit(f'error: {reason(error)}')


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags.

  Returns:
    The name of the program, which is all that is left.

  Raises:
    flags.Error: a flag is wrong, or an argument is no flag.
  """
  # --help lists the flags of the main module alone: those that commands share
  # count as its own.
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module.partition('.')[0] == 'mdm_jax':
      for flag in defined:
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
  rest = flags.FLAGS(argv)
  if len(rest) > 1:
    raise flags.Error(
      f'{rest[1]!r} is not expected: flags begin with --, and a value with '
      'spaces needs quotes.'
    )
  return rest


def reason(error: flags.Error) -> str:
  """What absl says about a flag, in one line."""
  text = ' '.join(str(error).split())
  missing = re.findall(
    r'flag --(\S+?)=None: Flag --\S+ must have a value other than None\.', text
  )
  if missing:
    verb = 'is' if len(missing) == 1 else 'are'
    return f'--{", --".join(missing)} {verb} missing: give a value.'
  text = re.sub(
    r": \('Non-boolean argument to boolean flag', .*\)$",
    ': give true or false.',
    text,
  )
  text = re.sub(r'^flag --', '--', text)
  if len(text) > _LONGEST:  # The value is long, and what is wrong comes last.
    text = f'{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}'
  return text
