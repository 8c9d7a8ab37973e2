"""Counts the bytes that an optimised XLA program moves, and between devices."""

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


# What moves no bytes, or is counted where its computation is.
_FREE = (
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
  *('while', 'call', 'conditional'),
)


def collective_bytes(text: str, turns: int = 1) -> dict[str, int]:
  """Bytes that one device receives, by the kind of collective operation.

  An operation counts with the size of its result, but a reduce-scatter, whose
  result is only one shard, with the size of its operands. Operations in a loop
  are multiplied by the loop's number of iterations.

  Args:
    text: an optimised program, from `Compiled.as_text()`.
    turns: number of iterations of a loop for which the compiler states none.
  """
  return dict(_count(text, turns, _communicated, fusions=True))


def moved_bytes(text: str, turns: int = 1) -> dict[str, int]:
  """Bytes that a GPU's kernels read and write, by the kind of instruction.

  Each operand and each result counts once, as if a kernel kept what it reads
  more than once, and caches kept nothing from one kernel to the next.

  Args:
    text, turns: as for `collective_bytes`.
  """
  return dict(_count(text, turns, _at_boundary, fusions=False))


def _count(text: str, turns: int, count, fusions: bool) -> collections.Counter:
  """Adds up what `count` finds in all instructions, as often as they run.

  Args:
    text, turns: as for `collective_bytes`.
    count: called as count(kind, line, result, rest, shapes), it returns (name,
      bytes) or None. `shapes` has the results by name, of instructions so far.
    fusions: also count the instructions in fusions, each of which is a kernel.
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
      known[name] = _total(
        computations.get(name, ()), total, turns, count, fusions
      )
    return known[name]

  return total(entry)


def _total(lines, total, turns, count, fusions) -> collections.Counter:
  counted, shapes = collections.Counter(), {}
  for line in lines:
    found = _INSTRUCTION.match(line)
    if not found:
      continue
    result, kind, rest = found.groups()
    name = line.split('=')[0].replace('ROOT', '').strip().lstrip('%')
    shapes[name] = result
    if each := count(kind, line, result, rest, shapes):
      counted[each[0]] += each[1]
    if kind.endswith(('-done', '-update')):
      continue
    if kind == 'fusion' and not fusions:
      continue
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


def _communicated(kind, line, result, rest, shapes) -> tuple[str, int] | None:
  started = kind.removesuffix('-start')
  if started not in _COLLECTIVES:
    return None
  return started, _moved(started, kind, result, rest, shapes)


def _at_boundary(kind, line, result, rest, shapes) -> tuple[str, int] | None:
  if kind in _FREE or kind.endswith(('-done', '-update')):
    return None
  operands = re.findall(r'%([\w.\-]+)', rest.split('), ')[0])
  found = _SHAPE.findall(result)
  if kind == 'custom-call':
    kind = re.search(r'custom_call_target="([^"]+)"', line)[1]
    if len(found) > 1:  # A library's workspace is another result.
      found = [shape for shape in found if shape[0] != 's8']
  for operand in operands:
    found += _SHAPE.findall(shapes.get(operand, ''))
  return kind, sum(_shape_bytes(*shape) for shape in found)


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
