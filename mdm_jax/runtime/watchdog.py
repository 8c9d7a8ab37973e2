"""Ends a process that hangs, because it lost a device, a disk or a process."""

from collections.abc import Callable, Mapping
import faulthandler
import math
import sys
import threading
import time

from absl import logging

# EX_SOFTWARE of sysexits.h.
EXIT_CODE = 70
_POLL = 0.5  # seconds between two checks
# Seconds after the limit at which `faulthandler` ends the process, from a C
# thread: this one cannot run while another holds the interpreter lock.
_GRACE = 10.0


class Watchdog:
  """Ends the process if a phase of the run exceeds its time limit.

  It first prints the stacks of all threads to standard error. The exit code is
  `EXIT_CODE`, or 1 if another thread holds the interpreter lock.
  """

  def __init__(self, limits: Mapping[str, float], leave: Callable[[int], None]):
    """Starts the thread; there is no limit before the first `watch`.

    Args:
      limits: time limit of each phase in seconds, 0 for none.
      leave: ends the process with an exit code.
    """
    self._limits = limits
    self._leave = leave
    self._phase, self._deadline = '', math.inf
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._run, daemon=True, name='watchdog'
    )
    self._thread.start()

  def watch(self, phase: str) -> None:
    """Begins a phase, which ends the one before."""
    limit = self._limits[phase] or math.inf
    self._phase, self._deadline = phase, time.monotonic() + limit

  def close(self) -> None:
    """Ends the thread; from then on there is no limit."""
    self._closed.set()
    self._thread.join()

  def _run(self) -> None:
    while not self._closed.wait(_POLL):
      left = self._deadline - time.monotonic()
      if left < 0:
        self._bite()
      elif left < math.inf:
        faulthandler.dump_traceback_later(
          left + _GRACE, exit=True, file=sys.__stderr__
        )
      else:
        faulthandler.cancel_dump_traceback_later()
    faulthandler.cancel_dump_traceback_later()

  def _bite(self) -> None:
    phase = self._phase
    logging.error(
      'watchdog: %s has not ended in %g s, watchdog.%s; the stacks follow. '
      'The same command continues from the last checkpoint.',
      phase,
      self._limits[phase],
      phase,
    )
    faulthandler.dump_traceback(file=sys.__stderr__)
    self._leave(EXIT_CODE)
