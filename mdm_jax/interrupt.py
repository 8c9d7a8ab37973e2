"""Ctrl-C and SIGTERM: a run ends soon, and the same command continues it."""

from collections.abc import Callable
import multiprocessing
import os
import signal
import sys
import threading
from typing import Protocol

from absl import logging

# EX_TEMPFAIL of sysexits.h. 0 is for a run that is finished.
EXIT_CODE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Beside the signals' numbers, what wakes the thread that waits for them.
_CLOSE, _PEER = b'\0', b'\xff'
_POLL = 0.2  # Seconds between two looks at what others tell.


def exit_on_signals() -> None:
  """Makes Ctrl-C and SIGTERM leave by `EXIT_CODE`, until an `Interrupt`."""
  for number in SIGNALS:
    signal.signal(number, lambda number, frame: sys.exit(EXIT_CODE))


def ignore_signals() -> None:
  """For a process that is on its way out: whoever ends a job says so often."""
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)


def leave(code: int) -> None:
  """Ends the process at once, from any thread."""
  # They would outlive this process, which goes without goodbye.
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(code)


class Peers(Protocol):
  """The other processes of a run, see `processes.Peers`."""

  def ask_to_stop(self) -> None:
    """Tells all that this one was asked to stop."""

  def are_asked_to_stop(self) -> bool:
    """Whether any has told so."""

  def begin_to_leave(self) -> None:
    """Tells all that no further step can be taken with this one."""

  def are_leaving(self) -> bool:
    """Whether any has told so."""

  def leave_together(self) -> None:
    """Waits, not for ever, until all have left."""


class Interrupt:
  """Lets the first Ctrl-C or SIGTERM end the process soon.

  At once, where there is nothing to save; a thread sees to it, since Python
  runs its signal handlers in the main thread, which may be compiling for
  minutes. Between `hold` and `let_go` the signal only sets `requested`. A
  second signal ends the process at once in any case: what is saved is
  committed or not there.

  With several processes, a signal to one is a signal to all.
  """

  def __init__(self, finish: Callable[[], None], peers: Peers | None = None):
    """Handles signals until `close`. Call it in the main thread.

    Args:
      finish: called before the process leaves, in another thread.
      peers: the other processes; None if there are none.
    """
    self.requested = False
    self._finish = finish
    self._peers = peers
    self._wait = lambda: None
    self._held = False
    self._lock = threading.Lock()
    self._end = threading.Lock()
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    # C code writes there whatever the main thread does.
    self._wakeup = signal.set_wakeup_fd(self._writer)
    self._handlers = {
      number: signal.signal(number, lambda number, frame: None)
      for number in SIGNALS
    }
    self._closed = threading.Event()
    self._threads = [threading.Thread(target=self._watch, daemon=True)]
    if peers:
      self._threads.append(threading.Thread(target=self._listen, daemon=True))
    for thread in self._threads:
      thread.start()

  def hold(self, wait: Callable[[], None] | None = None) -> None:
    """From now on a signal sets `requested`: look at it after each step.

    Args:
      wait: called before the process leaves, later too: waits for what is
        being saved.
    """
    with self._lock:
      self._held, self._wait = True, wait or self._wait
      leaving = self.requested
    if leaving:
      threading.Event().wait()

  def let_go(self, asked: bool = False) -> None:
    """From now on a signal ends the process, also one that has come.

    Args:
      asked: as if one had come.
    """
    with self._lock:
      self._held = False
      self.requested |= asked
      requested = self.requested
    if requested:
      self._leave()

  def close(self) -> None:
    """Leaves signals to who handled them before."""
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    self._closed.set()
    os.write(self._writer, _CLOSE)
    for thread in self._threads:
      thread.join()
    os.close(self._writer)
    os.close(self._reader)
    if self.requested and not self._held:
      threading.Event().wait()  # Another thread is about to leave.

  def _watch(self) -> None:
    signalled = False
    while (byte := os.read(self._reader, 1)) != _CLOSE:
      if byte != _PEER:
        if signalled:
          os._exit(EXIT_CODE)
        signalled = True
      # Whoever ends a job signals all of its processes, one after the other.
      if self.requested:
        continue
      with self._lock:
        self.requested, held = True, self._held
      logging.info(
        'Stopping %s; a second signal stops at once.',
        'after this step' if held else 'now',
      )
      if not held:
        threading.Thread(target=self._leave, daemon=True).start()

  def _listen(self) -> None:
    told = False
    while not self._closed.wait(_POLL):
      if self.requested and not told:
        self._peers.ask_to_stop()
        told = True
      if self._peers.are_leaving():
        self.requested = True
        self._leave()
      if not self.requested and self._peers.are_asked_to_stop():
        os.write(self._writer, _PEER)

  def _leave(self) -> None:
    self._end.acquire()  # Of several threads that come here one goes on.
    try:
      if self._peers:
        self._peers.begin_to_leave()
      self._wait()
      self._finish()
    finally:
      if self._peers:
        self._peers.leave_together()
      leave(EXIT_CODE)
