"""Ends a process that hangs: a device, a disk or another process is lost."""

from collections.abc import Callable, Mapping
import faulthandler
import math
import sys
import threading
import time

from absl import logging

# EX_SOFTWARE of sysexits.h.
EXIT_CODE = 70
_POLL = 0.5
# After which a thread that needs no interpreter ends the process, if this one
# was kept from it.
_GRACE = 10.0


class Watchdog:
  """Watches that each phase of a run ends in time.

  If one does not, the stacks of all threads go to standard error and the
  process leaves, by `EXIT_CODE`, or by 1 if the interpreter itself is stuck.
  """

  def __init__(self, limits: Mapping[str, float], leave: Callable[[int], None]):
    """Starts to watch the time until `watch` is first called, for nothing.

    Args:
      limits: seconds of each phase, 0 for no limit.
      leave: ends the process by an exit code.
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
    """A phase begins; the one before has ended."""
    limit = self._limits[phase] or math.inf
    self._phase, self._deadline = phase, time.monotonic() + limit

  def close(self) -> None:
    """Watches no more."""
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
