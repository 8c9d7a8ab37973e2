"""Handles preemption: signals become stop requests, or an exit."""

from collections.abc import Callable
import os
import signal
import threading
import time
from typing import Protocol

from absl import logging

from mdm_jax.child_process import STOP_SIGNALS
from mdm_jax.runtime import ending

# EX_TEMPFAIL of sysexits.h: the same command continues. 0 means finished.
EXIT_CODE = 75
# These stay ignored if they are when the process starts: nohup does that, and
# shells without job control do it to commands in the background.
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
# Sent by people, who repeat them if they cannot wait. Others come twice of
# themselves: SIGHUP from the kernel and the shell, SIGXCPU every second.
_INSISTENT = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
# Seconds in which signals are one request: `timeout` sends SIGTERM twice.
_SAME = 0.5
# Bytes that wake the waiting thread, beside the numbers of signals.
_CLOSE, _PEER = b'\0', b'\xff'
_POLL = 0.2  # seconds between two reads of the other processes' status


def handle_signals(
  handler: Callable | signal.Handlers,
) -> dict[int, Callable | signal.Handlers]:
  """Sets the handler of all stop signals that are not to stay ignored.

  Returns:
    The former handlers, by signal.
  """
  return {
    number: signal.signal(number, handler)
    for number in STOP_SIGNALS
    if number not in _MAY_BE_IGNORED
    or signal.getsignal(number) != signal.SIG_IGN
  }


def ignore_signals() -> None:
  """Ignores further signals while the process exits: schedulers repeat them."""
  handle_signals(signal.SIG_IGN)


class Peers(Protocol):
  """The other processes of a run: the interface of `distributed.Peers`."""

  def ask_to_stop(self) -> None:
    """Tells all that this process has received a stop request."""

  def are_asked_to_stop(self) -> bool:
    """Whether any process has received a stop request."""

  def begin_to_leave(self) -> None:
    """Tells all that this process takes no further step."""

  def are_leaving(self) -> bool:
    """Whether any process takes no further step."""

  def have_failed(self) -> bool:
    """Whether any process ends with an error."""

  def leave_together(self) -> None:
    """Waits, for a limited time, until all processes are ready to exit."""


class StopHandler:
  """Turns signals into stop requests, all those of `STOP_SIGNALS` alike.

  In a preemptible section, such as compiling or sampling, a request ends the
  process at once: work since the last checkpoint is repeated later. A thread
  does that, since Python runs its signal handlers in the main thread, which may
  be compiling for minutes. From `defer` to `allow` a request only sets
  `requested`, and the training loop saves and returns. SIGINT, SIGQUIT or
  SIGTERM a second time, later than half a second after the first, ends the
  process at once. That is safe, since a checkpoint is either committed or
  ignored.

  A signal to one of several processes stops all of them, and so does an error.
  After an error the exit code of all is 1: schedulers that start a stopped run
  again would otherwise do so without end.

  Attributes:
    requested: whether this or another process has received a stop request.
  """

  def __init__(
    self,
    finish: Callable[[], None],
    peers: Peers | None = None,
    begin_to_save: Callable[[], None] = lambda: None,
    code: int = EXIT_CODE,
  ):
    """Handles signals until `close`. Call it in the main thread.

    Args:
      finish: called in another thread before the process exits.
      peers: the other processes; None for a single process.
      begin_to_save: called before waiting for pending saves.
      code: exit code of the process after a stop request.
    """
    self.requested = False
    self._finish = finish
    self._begin_to_save = begin_to_save
    self._code = code
    self._peers = peers
    self._wait = lambda: None
    self._deferred = False
    self._lock = threading.Lock()
    self._end = threading.Lock()
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    # Python's C signal handler writes there even while the main thread is busy.
    self._wakeup = signal.set_wakeup_fd(self._writer)
    self._handlers = handle_signals(lambda number, frame: None)
    self._closed = threading.Event()
    self._threads = [threading.Thread(target=self._watch, daemon=True)]
    if peers:
      self._threads.append(threading.Thread(target=self._listen, daemon=True))
    for thread in self._threads:
      thread.start()

  def defer(self, wait: Callable[[], None] | None = None) -> None:
    """Ends a preemptible section: requests now only set `requested`.

    Args:
      wait: waits for pending saves; called before the process exits, also
        in later preemptible sections. None leaves the last one in place.
    """
    with self._lock:
      self._deferred, self._wait = True, wait or self._wait
      leaving = self.requested
    if leaving:
      threading.Event().wait()  # Another thread is ending the process.

  def allow(self, requested: bool = False) -> None:
    """Begins a preemptible section, or exits if a stop was requested.

    Args:
      requested: whether another process has received a stop request.
    """
    with self._lock:
      self._deferred = False
      self.requested |= requested
      stopping = self.requested
    if stopping:
      self._leave()

  def close(self) -> None:
    """Restores the former signal handlers."""
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    self._closed.set()
    os.write(self._writer, _CLOSE)
    for thread in self._threads:
      thread.join()
    os.close(self._writer)
    os.close(self._reader)
    if self.requested and not self._deferred:
      threading.Event().wait()  # Another thread is ending the process.

  def _watch(self) -> None:
    first = {}  # times of the first signals, by number
    while (byte := os.read(self._reader, 1)) != _CLOSE:
      number = byte[0]
      if byte != _PEER:
        if number not in STOP_SIGNALS:  # Of another handler.
          continue
        age = time.monotonic() - first.setdefault(number, time.monotonic())
        if number in _INSISTENT and age > _SAME:
          ending.leave(self._code)
      # Schedulers signal all processes of a job, one after the other.
      if self.requested:
        continue
      with self._lock:
        self.requested, deferred = True, self._deferred
      # Another thread, as a terminal that takes no output would hold up this.
      threading.Thread(
        target=_say,
        args=('after this step' if deferred else 'now',),
        daemon=True,
      ).start()
      if not deferred:
        threading.Thread(target=self._leave, daemon=True).start()

  def _listen(self) -> None:
    told = False
    while not self._closed.wait(_POLL):
      if self.requested and not told:
        self._peers.ask_to_stop()
        told = True
      # A failure stays known after the process is gone.
      failed = self._peers.have_failed()
      if failed or self._peers.are_leaving():
        self.requested = True
        if failed:
          self._code = 1
          logging.error('Another process ended with an error: see its log.')
        self._leave()
      if not self.requested and self._peers.are_asked_to_stop():
        os.write(self._writer, _PEER)

  def _leave(self) -> None:
    self._end.acquire()  # Never released: only one thread ends the process.
    try:
      if self._peers:
        self._peers.begin_to_leave()
      self._begin_to_save()
      self._wait()
      ending.begin(self._code)
      self._finish()
    finally:
      ending.begin(self._code)
      if self._peers:
        self._peers.leave_together()
      ending.leave(self._code)


def _say(when: str) -> None:
  # A line of this file: of libraries' threads only warnings are shown.
  logging.info('Stopping %s; the same signal again stops at once.', when)
