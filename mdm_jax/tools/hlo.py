"""Counts the bytes that an optimised XLA program sends between devices."""

import collections
import re

_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
# Patterns for the text of optimised HLO.
_ITEM_BITS = re.compile(r'^[a-z]+?(\d+)')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$'
)
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(r'(?:calls|body|condition|to_apply)=%?([\w.\-]+)')
_BRANCHES = re.compile(
  r'(?:true|false)_computation=%?([\w.\-]+)'
  r'|branch_computations=\{([^}]*)\}'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def _shape_bytes(name: str, dimensions: str) -> int:
  bits = _ITEM_BITS.match(name)
  size = int(bits[1]) // 8 if bits else 1  # pred is a byte.
  for dimension in filter(None, dimensions.split(',')):
    size *= int(dimension)
  return size


def collective_bytes(text: str, turns: int = 1) -> dict[str, int]:
  """Bytes that one device receives, by the kind of collective operation.

  An operation counts with the size of its result, but a reduce-scatter, whose
  result is only one shard, with the size of its operands. Operations in a loop
  are multiplied by the loop's number of iterations.

  Args:
    text: an optimised program, from `Compiled.as_text()`.
    turns: number of iterations of a loop for which the compiler states none.
  """
  computations, entry, lines = {}, None, []
  for line in text.split('\n'):
    if found := _COMPUTATION.match(line):
      lines = computations[found[2]] = []
      if found[1]:
        entry = found[2]
    else:
      lines.append(line)
  known = {}

  def total(name: str) -> collections.Counter:
    if name not in known:
      known[name] = _total(computations.get(name, ()), total, turns)
    return known[name]

  return dict(total(entry))


def _total(lines, total, turns) -> collections.Counter:
  counted, shapes = collections.Counter(), {}
  for line in lines:
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    result, kind, rest = found.groups()
    name = line.split('=')[0].replace('ROOT', '').strip().lstrip('%')
    shapes[name] = result
    started = kind.removesuffix('-start')
    if started in _COLLECTIVES:
      counted[started] += _moved(started, kind, result, rest, shapes)
    elif not kind.endswith(('-done', '-update')):
      times = 1
      if kind == 'while':
        trips = _TRIPS.search(line)
        times = int(trips[1]) if trips else turns
      called = _CALLED.findall(line)
      for pair in _BRANCHES.findall(line):
        called += re.findall(r'[\w.\-]+', ' '.join(pair))
      for other in called:
        for key, value in total(other).items():
          counted[key] += times * value
  return counted


def _moved(kind, written, result, rest, shapes) -> int:
  if kind == 'reduce-scatter':
    operands = re.findall(r'%?([\w.\-]+)', rest.split(')')[0])
    return sum(
      _shape_bytes(*shape)
      for operand in operands
      for shape in _SHAPE.findall(shapes.get(operand, ''))
    )
  found = _SHAPE.findall(result)
  # The result of an asynchronous start is a tuple of the operands and the
  # results; that of a permutation also has two u32 scalars.
  if written.endswith('-start') and kind != 'all-reduce':
    found = [shape for shape in found if shape[0] != 'u32' or shape[1]]
    found = found[len(found) // 2 :]
  return sum(_shape_bytes(*shape) for shape in found)
