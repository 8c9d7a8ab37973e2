"""Ctrl-C and SIGTERM: a run ends soon, and the same command continues it."""

from collections.abc import Callable
import multiprocessing
import os
import signal
import sys
import threading

from absl import logging

# EX_TEMPFAIL of sysexits.h. 0 is for a run that is finished.
EXIT_CODE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_on_signals() -> None:
  """Makes Ctrl-C and SIGTERM leave by `EXIT_CODE`, until an `Interrupt`."""
  for number in SIGNALS:
    signal.signal(number, lambda number, frame: sys.exit(EXIT_CODE))


class Interrupt:
  """Lets the first Ctrl-C or SIGTERM end the process soon.

  At once, where there is nothing to save; a thread sees to it, since Python
  runs its signal handlers in the main thread, which may be compiling for
  minutes. Between `hold` and `let_go` the signal only sets `requested`. A
  second signal ends the process at once in any case: what is saved is
  committed or not there.
  """

  def __init__(self, finish: Callable[[], None], signals=SIGNALS):
    """Handles signals until `close`. Call it in the main thread.

    Args:
      finish: called before the process leaves, in another thread.
      signals: that are handled; none where something else stops the run.
    """
    self.requested = False
    self._finish = finish
    self._wait = None
    self._held = False
    self._lock = threading.Lock()
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    # C code writes there whatever the main thread does.
    self._wakeup = signal.set_wakeup_fd(self._writer)
    self._handlers = {
        number: signal.signal(number, lambda number, frame: None)
        for number in signals}
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def hold(self) -> None:
    """From now on a signal sets `requested`: look at it after each step."""
    with self._lock:
      self._held = True
      leaving = self.requested
    if leaving:
      threading.Event().wait()

  def let_go(self, wait: Callable[[], None] | None = None) -> None:
    """From now on a signal ends the process, also one that has come.

    Args:
      wait: called before the process leaves: waits for what is being saved.
    """
    with self._lock:
      self._held, self._wait = False, wait
      requested = self.requested
    if requested:
      self._leave()

  def close(self) -> None:
    """Leaves signals to who handled them before."""
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    os.write(self._writer, b'\0')
    self._thread.join()
    os.close(self._writer)
    os.close(self._reader)

  def _watch(self) -> None:
    while os.read(self._reader, 1) != b'\0':
      if self.requested:
        os._exit(EXIT_CODE)
      with self._lock:
        self.requested, held = True, self._held
      logging.info('Stopping %s; a second signal stops at once.',
                   'after this step' if held else 'now')
      if not held:
        threading.Thread(target=self._leave, daemon=True).start()

  def _leave(self) -> None:
    try:
      if self._wait:
        self._wait()
      self._finish()
    finally:
      # They would outlive this process, which goes without goodbye.
      for child in multiprocessing.active_children():
        child.terminate()
      os._exit(EXIT_CODE)
