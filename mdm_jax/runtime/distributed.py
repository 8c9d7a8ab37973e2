"""Runs of several processes: how they join, agree on a flag, and end."""

from collections.abc import Callable, Iterator
import contextlib
import queue
import socket
import sys
import threading
import time
import traceback
from typing import Any

from absl import logging
import jax

# JAX has no public function that detects the cluster's settings, or that tells
# the process's index without starting the devices.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
import numpy as np

from mdm_jax.runtime import directory_lock, ending, preemption, rendezvous

_GRACE = 10.0  # seconds beyond the heartbeat for JAX to name a dead process
# Status that each process publishes to the others.
_STOP = 'stop'  # it received a stop request
_LEAVING = 'leaving'  # it takes no further step
_READY = 'ready'  # it is leaving, and its work is done
_DONE = 'done'  # its work is done, as all processes agreed to end
_GONE = 'gone'  # it exits now
_KEY = 'mdm_jax/status'
_FAILURES = 'mdm_jax/failures'
_POLL = 0.2  # seconds between two reads of the others' status
_ANSWER = 1.0  # seconds after which the coordinator counts as hanging
# Seconds to wait for other processes that are leaving, with `_FAREWELL` less
# than `ending.LIMIT`.
_PATIENCE = 7.0
_FAREWELL = 1.0  # seconds from a process's 'gone' to its exit


def join(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  arrival: float,
  heartbeat: int,
) -> None:
  """Joins the other processes of a run. Call it before JAX is used.

  If one of them dies later, JAX ends the others with an error message. If one
  ends in another way, it waits until all are about to end.

  Args:
    coordinator: 'host:port' of process 0. `coordinator`, `num_processes` and
      `process_id` may be None where JAX detects them (Cloud TPU, GKE, Slurm,
      Open MPI).
    num_processes: number of processes.
    process_id: index of this process, from 0.
    arrival: seconds to wait for the other processes to start.
    heartbeat: seconds after which a silent process counts as dead.

  Raises:
    ValueError: the processes cannot be found, some did not start in time, or
      the other hosts could not reach this one.
  """
  try:
    coordinator, num_processes, process_id, _ = (
      ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, num_processes, process_id, None, None, arrival
      )
    )
    if None in (coordinator, num_processes, process_id):
      raise ValueError('no cluster tells their addresses')
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'process {process_id} is none of 0 to {num_processes - 1}'
      )
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdigit()):
      raise ValueError(f'{coordinator} is not HOST:PORT')
  # JAX and the clusters' clients raise any of these.
  except (ValueError, RuntimeError, OSError) as error:
    raise ValueError(
      'The other processes cannot be joined ('
      f'{str(error).splitlines()[0]}): give --coordinator=HOST:PORT, '
      '--num_processes=N and --process_id=0 to N-1.'
    ) from error
  _check_own_name()
  rendezvous.meet(
    host.strip('[]'), int(port), num_processes, process_id, arrival
  )
  # JAX's SIGTERM handler would replace `preemption.StopHandler`.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    initialization_timeout=int(arrival) + 1,
    heartbeat_timeout_seconds=heartbeat,
  )
  ending.say_farewell(_end_together)


def _check_own_name() -> None:
  """Checks that this host's name resolves to an address of this host.

  JAX's CPU back end listens for the other processes there, by Gloo, which fails
  with an assertion in C++. Also where accelerators train: JAX starts the CPU
  back end too, unless JAX_PLATFORMS leaves it out.

  Raises:
    ValueError: the name does not.
  """
  platforms = jax.config.jax_platforms
  if platforms and 'cpu' not in platforms.split(','):
    return
  if jax.config.jax_cpu_collectives_implementation != 'gloo':
    return
  name = socket.gethostname()
  try:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
      with socket.socket(family, kind, protocol) as own:
        try:
          own.bind(address)
          return
        except OSError as error:
          reason = f'{address[0]}: {error.strerror}'
  except (OSError, UnicodeError) as error:
    reason = getattr(error, 'strerror', None) or error
  raise ValueError(
    f'The name of this host, {name}, resolves to no address of it ({reason}): '
    f'add the line "ADDRESS {name}" to /etc/hosts, with an address at which '
    'the other hosts reach this one.'
  )


def any_of(flag: bool) -> bool:
  """Whether a flag is true in any process. All processes call it."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def writing_alone(workdir: str) -> Iterator[None]:
  """Locks the working directory of a run. All its processes call it.

  Raises:
    ValueError: another run writes to it, or it cannot be written to.
  """
  with contextlib.ExitStack() as stack:
    refused = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(directory_lock.holding(workdir))
      except ValueError as error:
        refused = error
    if any_of(refused is not None):
      raise refused or ValueError(
        f'process 0 cannot write to {workdir}: see its log.'
      )
    yield


class Peers:
  """The processes of a run, each of which publishes a status to all.

  The status goes through JAX's coordination service, so that it arrives even
  while a process compiles. If the coordinator is dead or hangs, calls return
  after a second as if no process had published a status.
  """

  def __init__(self):
    """Connects to the coordinator; call `join` before."""
    # Read now, since JAX may be shutting down later.
    self._client = global_state.client
    self._index = global_state.process_id
    self._count = global_state.num_processes

  def ask_to_stop(self) -> None:
    """Tells all that this process has received a stop request."""
    self._tell(_STOP)

  def are_asked_to_stop(self) -> bool:
    """Whether any process has received a stop request."""
    return _STOP in self._statuses()

  def begin_to_leave(self) -> None:
    """Tells all that this process takes no further step."""
    self._tell(_LEAVING)

  def are_leaving(self) -> bool:
    """Whether any process takes no further step."""
    return not {_LEAVING, _READY}.isdisjoint(self._statuses())

  def report_failure(self) -> None:
    """Tells all that this process takes no further step, and why."""
    self._tell('', _FAILURES)
    self.begin_to_leave()

  def have_failed(self) -> bool:
    """Whether any process ends with an error."""
    return bool(self._statuses(_FAILURES))

  def leave_together(self, done: bool = False) -> None:
    """Waits some seconds until the work of all processes is done.

    Args:
      done: whether all processes have agreed to end; if not, waiting makes the
        others leave too.
    """
    end = time.monotonic() + _PATIENCE
    self._tell(_DONE if done else _READY)
    self._wait_for({_READY, _DONE, _GONE}, end)
    self._tell(_GONE)
    if self._index == 0:
      # To processes that still run, the coordinator's exit is a crash.
      self._wait_for({_GONE}, end)
      time.sleep(_FAREWELL)

  def _wait_for(self, expected: set[str], end: float) -> None:
    """Waits until every process has one of these statuses.

    Args:
      expected: the statuses.
      end: time limit, on the clock of `time.monotonic`.
    """
    while time.monotonic() < end:
      if sum(status in expected for status in self._statuses()) == self._count:
        break
      time.sleep(_POLL)

  def _tell(self, status: str, key: str = _KEY) -> None:
    key = f'{key}/{self._index}'
    self._call(
      lambda: self._client.key_value_set(key, status, allow_overwrite=True)
    )

  def _statuses(self, key: str = _KEY) -> list[str]:
    found = self._call(lambda: self._client.key_value_dir_get(key))
    return [status for _, status in found or ()]

  def _call(self, function: Callable[[], Any]) -> Any:
    """Returns `function()`, or None if it fails or takes too long."""
    answers = queue.SimpleQueue()

    def answer():
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        answers.put(function())

    threading.Thread(target=answer, daemon=True).start()
    with contextlib.suppress(queue.Empty):
      return answers.get(timeout=_ANSWER)


def _end_together(code: int) -> None:
  """Waits until all processes are about to end. JAX's own way waits minutes."""
  peers = Peers()
  agreed = code in (0, preemption.EXIT_CODE)
  if not agreed:
    peers.report_failure()
  peers.leave_together(done=agreed)


@contextlib.contextmanager
def naming_the_dead(heartbeat: float) -> Iterator[None]:
  """Gives JAX time to say which process has died, before this one ends.

  That is the usual cause of JAX's errors where several processes train, and JAX
  notices it only after the heartbeat.

  Args:
    heartbeat: seconds after which JAX names a process that has died.

  Raises:
    SystemExit: JAX has named none; the error has been printed. Or the devices
      have too little memory.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      reason = ' '.join(str(error).split())[:300]
      sys.exit(
        f'error: the devices have too little memory ({reason}): raise '
        'stages[i].accumulate or mesh.fsdp, or set remat of the levels.'
      )
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    seconds = heartbeat + _GRACE
    logging.error(
      'Waiting up to %g s for JAX to say whether another process has died.',
      seconds,
    )
    time.sleep(seconds)
    sys.exit('error: see the traceback above; JAX names no dead process.')
