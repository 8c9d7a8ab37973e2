"""Ends a process that hangs, because it lost a device, a disk or a process."""

from collections.abc import Mapping
import faulthandler
import math
import sys
import threading
import time

from absl import logging

from mdm_jax.runtime import ending

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

  def __init__(self, limits: Mapping[str, float]):
    """Starts the thread; there is no limit before the first `watch`.

    Args:
      limits: time limit of each phase in seconds, 0 for none.
    """
    self._limits = limits
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
    """Ends the thread; from then on there is no limit but that of `ending`."""
    self._closed.set()
    self._thread.join()

  def _run(self) -> None:
    # An ending has a limit of its own, and uses the same timer.
    while not (self._closed.wait(_POLL) or ending.has_begun()):
      left = self._deadline - time.monotonic()
      if left < 0:
        self._bite()
      elif left < math.inf:
        faulthandler.dump_traceback_later(
          left + _GRACE, exit=True, file=sys.__stderr__
        )
      else:
        faulthandler.cancel_dump_traceback_later()
    if not ending.has_begun():
      faulthandler.cancel_dump_traceback_later()

  def _bite(self) -> None:
    phase = self._phase
    # Before it logs, since whatever hangs may hold up the log too.
    ending.begin(EXIT_CODE)
    logging.error(
      'watchdog: %s has not ended in %g s, watchdog.%s; the stacks follow. '
      'The same command continues from the last checkpoint.',
      phase,
      self._limits[phase],
      phase,
    )
    faulthandler.dump_traceback(file=sys.__stderr__)
    ending.leave(EXIT_CODE)
