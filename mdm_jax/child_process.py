"""What a child process does first: it leaves signals and the end to its parent.

Terminals and schedulers signal all processes of a job. Only the parent knows
what to save, and it still needs its children while it does.
"""

import multiprocessing
import os
import signal
import threading

# Requests to stop. Schedulers are told to send XCPU, USR1 or USR2 some time
# before a limit; all of them end a process that does not handle them.
STOP_SIGNALS = (
  signal.SIGHUP,
  signal.SIGINT,
  signal.SIGQUIT,
  signal.SIGTERM,
  signal.SIGUSR1,
  signal.SIGUSR2,
  signal.SIGXCPU,
)


def begin(seconds: float | None = None) -> None:
  """Ignores stop signals, and ends this process when its parent ends.

  Call it in the main thread of a process that `multiprocessing` has started.

  Args:
    seconds: from SIGTERM to the end of this process, for parents that end
      their children by it; None ignores it as the others.
  """

  def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

  def end_later(number, frame):
    timer = threading.Timer(seconds, os._exit, [128 + number])
    timer.daemon = True
    timer.start()

  # A parent that is killed cannot end its children itself.
  threading.Thread(target=end_with_parent, daemon=True).start()
  for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  if seconds is not None:
    signal.signal(signal.SIGTERM, end_later)
