"""How a process ends: within seconds, whatever the threads of libraries do.

Python's own way waits for all threads that are not daemons, without a limit.
After a save that failed on a full disk, those of Orbax last for minutes.
"""

from collections.abc import Callable
import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
from typing import NoReturn

# Seconds from `begin` to the end of the process; half a second more if no
# thread of Python can run, since another holds the interpreter lock.
LIMIT = 9.0

# Opened now: at the end there may be too many open files.
_NOWHERE = open(os.devnull, 'wb')
_lock = threading.Lock()
_begun = threading.Event()
_farewells = []
_last_calls = []
_LAST_CALLS = 1.0  # seconds for all of them


def begin(code: int) -> None:
  """Begins the ending: after `LIMIT` seconds the process is gone.

  All work must be done, and all saves be settled: only then an ending is short.

  Args:
    code: exit code, if the process has not ended earlier. The first call
      decides.
  """
  with _lock:
    if _begun.is_set():
      return
    _begun.set()
  timer = threading.Timer(LIMIT, os._exit, [code])
  timer.daemon = True
  with contextlib.suppress(RuntimeError):  # No further thread can be started.
    timer.start()
  # A thread in C. It writes nothing, since standard error may block it.
  with contextlib.suppress(RuntimeError):
    faulthandler.dump_traceback_later(LIMIT + 0.5, exit=True, file=_NOWHERE)


def has_begun() -> bool:
  """Whether this process ends within seconds."""
  return _begun.is_set()


def say_farewell(farewell: Callable[[int], None]) -> None:
  """Registers a function that `finish` calls with the exit code."""
  _farewells.append(farewell)


def at_the_end(call: Callable[[], None]) -> None:
  """Registers a function that `leave` calls, from any thread, for a second."""
  _last_calls.append(call)


def not_at_the_end(call: Callable[[], None]) -> None:
  """Undoes `at_the_end`."""
  _last_calls.remove(call)


def leave(code: int) -> NoReturn:
  """Ends the process at once, from any thread, without cleaning up."""
  begin(code)
  # Data workers would outlive a parent that exits like this.
  for child in multiprocessing.active_children():
    child.kill()
  if _last_calls:
    thread = threading.Thread(
      target=lambda: [call() for call in [*_last_calls]], daemon=True
    )
    with contextlib.suppress(RuntimeError):  # As in `begin`.
      thread.start()
      thread.join(_LAST_CALLS)
  os._exit(code)


def finish(code: int, message: str = '') -> NoReturn:
  """Ends the process when its main thread has nothing left to do.

  Args:
    code: exit code. It becomes 1 instead of 0 if standard output, with what a
      command has printed, cannot be written.
    message: printed to standard error before.
  """
  begin(code)
  if message:
    # A terminal that has been closed cannot be written to.
    with contextlib.suppress(OSError, ValueError):
      print(message, file=sys.stderr, flush=True)
  for farewell in _farewells:
    farewell(code)
  try:
    sys.stdout.flush()
  except (OSError, ValueError):
    code = code or 1
  leave(code)
