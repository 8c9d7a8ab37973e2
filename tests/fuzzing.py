"""Runs a reader on thousands of damaged inputs, within limits.

A fuzzer of a reader is a test:

  @pytest.mark.parametrize('count', fuzzing.COUNTS)
  def test_any_header_is_read_or_refused(count):
    fuzzing.check(read, make, count, refuses=BadRecord)

where `make(rng)` returns the input of a case, a function of `rng` alone.
"""

from collections.abc import Callable
import gc
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import time
import traceback
from typing import Any

import numpy as np
import pytest

# Cases in the suite, and in a soak.
COUNTS = [500, pytest.param(20_000, marks=pytest.mark.soak)]
_PAGE = resource.getpagesize()
# A process that is silent for so many seconds waits for a lock that another
# thread of this one held when it was forked, or for ever: that shows when it is
# started again.
_SILENCE, _STARTS = 120.0, 3
# Values that lengths, offsets and counts break at.
_ODD_BYTES = (0, 1, 2, 127, 128, 254, 255)
_ODD_JSON = (
  None,
  True,
  0,
  -1,
  1,
  2**31,
  2**63,
  2**64,
  10**400,
  1.5,
  float('nan'),
  float('inf'),
  '',
  '5',
  'x' * 10_000,
  '../x',
  [],
  {},
)


def damage(data: bytes, rng: np.random.Generator) -> bytes:
  """Changes, inserts, removes or repeats a few parts of a file."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4, 8))):
    at = int(rng.integers(len(data) + 1))
    length = int(rng.choice((1, 1, 2, 4, 8, 64)))
    kind = rng.integers(6)
    if kind == 0:
      data[at : at + length] = rng.bytes(min(length, len(data) - at))
    elif kind == 1:
      odd = bytes([rng.choice(_ODD_BYTES)])
      data[at : at + length] = odd * min(length, len(data) - at)
    elif kind == 2:
      data[at:at] = rng.bytes(length)
    elif kind == 3:
      del data[at : at + length]
    elif kind == 4:
      data[at:at] = data[at : at + length]
    elif at < len(data):
      data[at] ^= 1 << int(rng.integers(8))
  return bytes(
    data[: int(rng.integers(len(data) + 1))] if rng.random() < 0.05 else data
  )


def damage_json(value: Any, rng: np.random.Generator) -> str:
  """JSON with some of its parts replaced, nested without end, or damaged."""
  text = json.dumps(_odd_parts(value, rng))
  if rng.random() < 0.1:
    deep = int(rng.choice((10, 1000, 100_000)))
    text = text.replace('1', '[' * deep + ']' * deep, 1)
  if rng.random() < 0.1:
    text = damage(text.encode(), rng).decode('latin-1')
  return text


def _odd_parts(value: Any, rng: np.random.Generator) -> Any:
  if rng.random() < 0.1:
    return _odd_value(rng)
  if isinstance(value, dict):
    # Now and then a part is missing, and another has its name.
    names = [name if rng.random() < 0.97 else 'a' for name in value]
    return {
      name: _odd_parts(part, rng) for name, part in zip(names, value.values())
    }
  if isinstance(value, list):
    return [_odd_parts(part, rng) for part in value]
  return value


def _odd_value(rng: np.random.Generator, depth: int = 0) -> Any:
  kind = rng.integers(6 if depth < 3 else 4)
  if kind < 4:
    return _ODD_JSON[rng.integers(len(_ODD_JSON))]
  parts = [_odd_value(rng, depth + 1) for _ in range(rng.integers(4))]
  return parts if kind == 4 else dict(zip('abc', parts))


def check(
  read: Callable[[Any], Any],
  make: Callable[[np.random.Generator], Any],
  count: int,
  *,
  refuses: type[BaseException] | tuple[type[BaseException], ...],
  seconds: float = 1.0,
  megabytes: int = 256,
  seed: int = 0,
) -> None:
  """Fails if a case raises another error, ends the process, or costs too much.

  The cases run in a forked process, so that a crash, a hang and a want of
  memory are results as well. `fuzzing.case(make, seed, i)` makes case i again.

  Args:
    read: the reader. What it returns does not matter.
    make: makes the input of a case.
    count: number of cases.
    refuses: errors that the reader may raise.
    seconds: processor time that a case may take, `make` not counted.
    megabytes: memory that the cases may take, beside what the process has.
    seed: of all cases.
  """
  for _ in range(_STARTS):
    last, problem, exitcode = _follow(
      (read, make, count, refuses, seconds, megabytes, seed)
    )
    if exitcode is not None:
      break
  where = f'case {last} of seed {seed}'
  if problem is not None:
    pytest.fail(f'{where}: {problem}')
  if exitcode is None:
    pytest.fail(f'{where} waits for ever.')
  if exitcode == -signal.SIGPROF:
    pytest.fail(f'{where} took more than {seconds} s.')
  if exitcode:
    pytest.fail(f'{where} ended the process: {exitcode}.')
  assert last == count - 1


def _follow(arguments: tuple) -> tuple[int, str | None, int | None]:
  """Runs the cases in a process.

  Returns:
    The last case that was begun, or -1; what escaped from it; and the exit code
    of the process, or None if it was silent for too long and has been killed.
  """
  context = multiprocessing.get_context('fork')
  reader, writer = context.Pipe(duplex=False)
  process = context.Process(target=_run, args=(*arguments, writer))
  process.start()
  writer.close()
  last, problem, is_silent = -1, None, False
  try:
    while problem is None and not is_silent:
      if reader.poll(_SILENCE):
        last, problem = reader.recv()
      else:
        is_silent = True
        process.kill()
  except EOFError:
    pass
  process.join()
  return last, problem, None if is_silent else process.exitcode


def case(make: Callable, seed: int, index: int) -> Any:
  """The input of one case of `check`."""
  return make(np.random.default_rng((seed, index)))


def _run(read, make, count, refuses, seconds, megabytes, seed, writer) -> None:
  # Collections would go through all that the tests before have left, which is
  # no cost of the reader's.
  gc.freeze()
  # Python's SIGPROF handler would wait for a loop in C to end.
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  limit = pages * _PAGE + megabytes * 2**20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  for index in range(count):
    value = case(make, seed, index)
    writer.send((index, None))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
      read(value)
    except refuses:
      pass
    except BaseException:  # Whatever it is, it escaped.
      signal.setitimer(signal.ITIMER_PROF, 0)
      writer.send((index, traceback.format_exc(limit=-4)))
      time.sleep(0.1)
      os._exit(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
  os._exit(0)
