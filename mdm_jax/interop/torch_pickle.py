"""Reads pickles as data: classes and calls are recorded, nothing is run.

A pickle is a program that can make its reader call any function by name. Here
a name is a `Name`, and a call of it an `Object`, whatever it is. The time and
memory that reading takes are bounded by the number of bytes read: lengths are
compared with what is left, integers are short, and keys are texts or integers,
so that nothing recurses into what a file nests.
"""

from collections.abc import Callable
import dataclasses
import struct
from typing import Any

_MAX_OPCODES = 2_000_000  # a model of 1,000 tensors has 50,000
_MAX_NAME = 1000  # bytes in the name of a module or class
_MAX_INTEGER = 32  # bytes; the states of random generators have 16


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
  """A class or function of the program that wrote the pickle."""

  module: str
  name: str


@dataclasses.dataclass(eq=False, slots=True)
class Reference:
  """What the pickle does not hold itself; of PyTorch, a storage."""

  fields: tuple


@dataclasses.dataclass(eq=False, slots=True)
class Object:
  """What calling `kind` with `args` would return.

  Attributes:
    kind: the class or function.
    args: its arguments.
    items: values by key, if it is a mapping.
    states: what the object's attributes would be set to.
  """

  kind: Name
  args: tuple
  items: dict = dataclasses.field(default_factory=dict)
  states: list = dataclasses.field(default_factory=list)


def load(data: memoryview, start: int = 0) -> tuple[Any, int, list[Reference]]:
  """Reads one pickle of protocol 2 to 5.

  Args:
    data: the bytes of a file.
    start: where the pickle begins.

  Returns:
    The object, made of None, numbers, texts, bytes, lists (sets too), tuples,
    dicts and the classes above; where the pickle ends; and all references. An
    object may hold itself. Entries of dicts with other keys than texts and
    integers are left out.

  Raises:
    ValueError: the bytes are no pickle.
  """
  reader = _Reader(data, start)
  for _ in range(_MAX_OPCODES):
    opcode = reader.number(1)
    if opcode == _STOP:
      return reader.pop(), reader.at, reader.references
    if opcode not in _OPCODES:
      raise ValueError(f'its pickle has the opcode {opcode:#04x}')
    _OPCODES[opcode](reader)
  raise ValueError(f'its pickle has more than {_MAX_OPCODES:,} opcodes')


class _Reader:
  """A stack machine, as pickles are written for."""

  def __init__(self, data: memoryview, start: int):
    self.data, self.at = data, start
    self.stack, self.marks, self.memo = [], [], {}
    self.references: list[Reference] = []

  def take(self, count: int) -> bytes:
    if count > len(self.data) - self.at:
      raise ValueError('its pickle ends early')
    self.at += count
    return bytes(self.data[self.at - count : self.at])

  def number(self, size: int) -> int:
    return int.from_bytes(self.take(size), 'little')

  def push(self, value: Any) -> None:
    self.stack.append(value)

  def _check(self, count: int) -> None:
    if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
      raise ValueError('its pickle is malformed')

  def pop(self) -> Any:
    self._check(1)
    return self.stack.pop()

  def top(self) -> Any:
    self._check(1)
    return self.stack[-1]

  def pop_tuple(self, count: int) -> tuple:
    self._check(count)
    values = tuple(self.stack[len(self.stack) - count :])
    del self.stack[len(self.stack) - count :]
    return values

  def pop_to_mark(self) -> list:
    if not self.marks:
      raise ValueError('its pickle is malformed')
    start = self.marks.pop()
    values = self.stack[start:]
    del self.stack[start:]
    return values

  def line(self) -> str:
    end = self.at + _MAX_NAME
    text, newline, _ = bytes(self.data[self.at : end]).partition(b'\n')
    if not newline:
      raise ValueError('its pickle has a name without an end')
    self.at += len(text) + 1
    return text.decode()

  def remember(self, index: int) -> None:
    self.memo[index] = self.top()

  def recall(self, index: int) -> None:
    if index not in self.memo:
      raise ValueError('its pickle is malformed')
    self.push(self.memo[index])

  def integer(self, size: int) -> None:
    if size > _MAX_INTEGER:
      raise ValueError(f'its pickle has an integer of {size:,} bytes')
    self.push(int.from_bytes(self.take(size), 'little', signed=True))

  def named(self, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
      raise ValueError('its pickle is malformed')
    self.push(Name(module, name))

  def call(self, kind: Any, args: Any) -> None:
    if not isinstance(args, tuple):
      raise ValueError('its pickle is malformed')
    # What a call returns can be called again; nobody needs to know what it is.
    if not isinstance(kind, Name):
      kind = Name('', '')
    self.push(Object(kind, args))

  def refer(self) -> None:
    fields = self.pop()
    if not isinstance(fields, tuple):
      raise ValueError('its pickle is malformed')
    self.references.append(Reference(fields))
    self.push(self.references[-1])

  def extend(self, values: list) -> None:
    target = self.top()
    if isinstance(target, list):
      target += values
    elif not isinstance(target, Object):
      raise ValueError('its pickle is malformed')

  def set_items(self, values: list) -> None:
    target = self.top()
    items = target.items if isinstance(target, Object) else target
    if not isinstance(items, dict) or len(values) % 2:
      raise ValueError('its pickle is malformed')
    for key, value in zip(values[::2], values[1::2]):
      # Long integers can all have the same hash.
      if isinstance(key, str) or isinstance(key, int) and abs(key) < 2**63:
        items[key] = value

  def build(self) -> None:
    state, target = self.pop(), self.top()
    if isinstance(target, Object):
      target.states.append(state)  # A copy would cost the size of the state.


def _counted(size: int, decode: Callable[[bytes], Any]) -> Callable:
  """Pushes as many bytes as a number of `size` bytes says, decoded."""
  return lambda reader: reader.push(decode(reader.take(reader.number(size))))


def _text(data: bytes) -> str:
  return data.decode('utf-8', 'surrogatepass')


def _constant(value: Any) -> Callable:
  return lambda reader: reader.push(value)


def _float(reader: _Reader) -> None:
  reader.push(struct.unpack('>d', reader.take(8))[0])


def _reduce(reader: _Reader) -> None:
  kind, args = reader.pop_tuple(2)
  reader.call(kind, args)


def _new_with_keywords(reader: _Reader) -> None:
  kind, args, _ = reader.pop_tuple(3)
  reader.call(kind, args)


def _dict(reader: _Reader) -> None:
  values = reader.pop_to_mark()
  reader.push({})
  reader.set_items(values)


_STOP = ord('.')
# By the letters of `pickletools`; text opcodes of protocol 0 are not among
# them, nor are extension codes and buffers.
_OPCODES: dict[int, Callable[[_Reader], Any]] = {
  0x80: lambda r: r.take(1),  # PROTO
  0x95: lambda r: r.take(8),  # FRAME
  ord('('): lambda r: r.marks.append(len(r.stack)),  # MARK
  ord('0'): lambda r: r.pop(),  # POP
  ord('1'): lambda r: r.pop_to_mark(),  # POP_MARK
  ord('2'): lambda r: r.push(r.top()),  # DUP
  ord('N'): _constant(None),
  0x88: _constant(True),
  0x89: _constant(False),
  ord('J'): lambda r: r.integer(4),  # BININT
  ord('K'): lambda r: r.push(r.number(1)),  # BININT1
  ord('M'): lambda r: r.push(r.number(2)),  # BININT2
  0x8A: lambda r: r.integer(r.number(1)),  # LONG1
  0x8B: lambda r: r.integer(r.number(4)),  # LONG4
  ord('G'): _float,  # BINFLOAT
  # Python 2 wrote its texts so.
  ord('T'): _counted(4, lambda data: data.decode('latin-1')),  # BINSTRING
  ord('U'): _counted(1, lambda data: data.decode('latin-1')),
  ord('B'): _counted(4, bytes),  # BINBYTES
  ord('C'): _counted(1, bytes),
  0x8E: _counted(8, bytes),
  0x96: _counted(8, bytes),  # BYTEARRAY8
  ord('X'): _counted(4, _text),  # BINUNICODE
  0x8C: _counted(1, _text),
  0x8D: _counted(8, _text),
  ord(')'): _constant(()),  # EMPTY_TUPLE
  0x85: lambda r: r.push(r.pop_tuple(1)),  # TUPLE1
  0x86: lambda r: r.push(r.pop_tuple(2)),
  0x87: lambda r: r.push(r.pop_tuple(3)),
  ord('t'): lambda r: r.push(tuple(r.pop_to_mark())),  # TUPLE
  ord(']'): lambda r: r.push([]),  # EMPTY_LIST
  ord('l'): lambda r: r.push(r.pop_to_mark()),  # LIST
  ord('a'): lambda r: r.extend([r.pop()]),  # APPEND
  ord('e'): lambda r: r.extend(r.pop_to_mark()),  # APPENDS
  0x8F: lambda r: r.push([]),  # EMPTY_SET
  0x90: lambda r: r.extend(r.pop_to_mark()),  # ADDITEMS
  0x91: lambda r: r.push(r.pop_to_mark()),  # FROZENSET
  ord('}'): lambda r: r.push({}),  # EMPTY_DICT
  ord('d'): _dict,
  ord('s'): lambda r: r.set_items(list(r.pop_tuple(2))),  # SETITEM
  ord('u'): lambda r: r.set_items(r.pop_to_mark()),  # SETITEMS
  ord('q'): lambda r: r.remember(r.number(1)),  # BINPUT
  ord('r'): lambda r: r.remember(r.number(4)),  # LONG_BINPUT
  0x94: lambda r: r.remember(len(r.memo)),  # MEMOIZE
  ord('h'): lambda r: r.recall(r.number(1)),  # BINGET
  ord('j'): lambda r: r.recall(r.number(4)),  # LONG_BINGET
  ord('c'): lambda r: r.named(r.line(), r.line()),  # GLOBAL
  0x93: lambda r: r.named(*r.pop_tuple(2)),  # STACK_GLOBAL
  ord('R'): _reduce,
  0x81: _reduce,  # NEWOBJ
  0x92: _new_with_keywords,  # NEWOBJ_EX
  ord('b'): lambda r: r.build(),
  ord('Q'): lambda r: r.refer(),  # BINPERSID
}
