"""Several processes that compute together: who is there, and who is not."""

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import json
import queue
import sys
import threading
import time
import traceback
from typing import Any

from absl import logging
from etils import epy
import jax

# No public function of JAX tells what the cluster says about this process.
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
import numpy as np

from mdm_jax import interrupt

with epy.lazy_imports():  # 0.7 s, which only several processes need.
  import orbax.checkpoint as ocp

_REMIND = 30.0  # seconds between two lines about who is missing
_RETRY = 0.5  # seconds between two tries to reach process 0
_GRACE = 10.0  # seconds for an answer to arrive
# What a process tells the others: it was asked to stop; it is on its way out,
# and no step can be taken with it; it has nothing left to do; nor have any, as
# all agreed; it ends in this moment.
_STOP, _LEAVING, _READY, _DONE, _GONE = (
  'stop',
  'leaving',
  'ready',
  'done',
  'gone',
)
_KEY = 'mdm_jax/word'
_POLL = 0.2  # seconds between two looks at the words of others
_ANSWER = 1.0  # seconds in which the coordinator answers, or hangs
_PATIENCE = 8.0  # seconds to wait for others that leave too
_FAREWELL = 1.0  # seconds within which a process ends that says so


def join(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  arrival: float,
  heartbeat: int,
) -> None:
  """Makes this one of several processes that compute together.

  If one of them dies, the others end with a message. Call it before JAX is
  used.

  Args:
    coordinator: 'host:port' of process 0; None, like the next two, where the
      cluster says so (Cloud TPU, GKE, Slurm, Open MPI).
    num_processes: how many there are.
    process_id: which this is.
    arrival: seconds to wait for the others.
    heartbeat: seconds after which a silent process counts as dead.

  Raises:
    ValueError: the processes cannot be found, or some did not arrive.
  """
  try:
    coordinator, num_processes, process_id, _ = (
      ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, num_processes, process_id, None, None, arrival
      )
    )
    if None in (coordinator, num_processes, process_id):
      raise ValueError('no cluster says who they are')
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'process {process_id} is none of 0 to {num_processes - 1}'
      )
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdigit()):
      raise ValueError(f'{coordinator} is not HOST:PORT')
  # JAX and the clients of clusters have no error of their own for it.
  except (ValueError, RuntimeError, OSError) as error:
    raise ValueError(
      'The other processes cannot be joined ('
      f'{str(error).splitlines()[0]}): give --coordinator=HOST:PORT, '
      '--num_processes=N and --process_id=0 to N-1.'
    ) from error
  # JAX would wait, too, but then abort, and name none.
  meet(host.strip('[]'), int(port), num_processes, process_id, arrival)
  # Its handler of SIGTERM would take the place of ours.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    initialization_timeout=int(arrival) + 1,
    heartbeat_timeout_seconds=heartbeat,
  )


def meet(
  host: str, port: int, count: int, process: int, seconds: float
) -> None:
  """Waits until every process has come.

  Args:
    host: of process 0.
    port: there; free again when this returns.
    count: how many processes there are.
    process: which this is.
    seconds: to wait for the others. Those that are missing are logged before.

  Raises:
    ValueError: some did not come. It names them, in every process that did.
  """
  if process:
    missing = asyncio.run(_report(host, port, process, seconds))
  else:
    missing = asyncio.run(_gather(port, count, seconds))
  if missing:
    names = ', '.join(map(str, missing))
    where = f', on {host} port {port},' if missing == [0] else ''
    raise ValueError(
      f'Of {count} processes, {names}{where} did not arrive within '
      f'{seconds:g} s: see their own logs, or give more time with '
      '--arrival.'
    )


async def _gather(port: int, count: int, seconds: float) -> list[int]:
  """Process 0: collects the others, and tells each of them who is missing."""
  there, complete = {}, asyncio.Event()

  async def greet(reader, writer):
    try:
      process = int(await reader.readline())
    except ValueError:  # A stranger.
      writer.close()
      return
    there[process] = writer
    if not missing():
      complete.set()
    await reader.read()  # Until one of the two goes.
    if there.get(process) is writer:
      del there[process]
      complete.clear()

  def missing():
    return [process for process in range(1, count) if process not in there]

  try:
    server = await asyncio.start_server(greet, port=port)
  except OSError as error:
    raise ValueError(
      f'Process 0 cannot listen ({error}): choose another port.'
    ) from error
  begin = time.monotonic()
  while missing() and (left := begin + seconds - time.monotonic()) > 0:
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(complete.wait(), min(left, _REMIND))
      break
    if left > _REMIND:
      logging.warning(
        'Waiting, since %.0f s. Of %d processes these have not come: %s.',
        time.monotonic() - begin,
        count,
        ', '.join(map(str, missing())),
      )
  server.close()
  result = missing()
  for writer in list(there.values()):
    with contextlib.suppress(OSError):  # It has just gone.
      writer.write(json.dumps(result).encode() + b'\n')
      writer.close()
      await writer.wait_closed()
  return result


async def _report(
  host: str, port: int, process: int, seconds: float
) -> list[int]:
  """Any other: reports to process 0, and waits for its answer."""
  begin = said = time.monotonic()
  while (now := time.monotonic()) < begin + seconds:
    # Anything else than an answer: process 0 is not there yet, or its port is
    # still another program's.
    with contextlib.suppress(OSError, ValueError, asyncio.LimitOverrunError):
      reader, writer = await asyncio.wait_for(
        asyncio.open_connection(host, port), begin + seconds - now
      )
      writer.write(b'%d\n' % process)
      # It may have begun to wait later than this one.
      answer = json.loads(
        await asyncio.wait_for(reader.readline(), seconds + _GRACE)
      )
      writer.close()
      if isinstance(answer, list):  # Not its own line, sent to itself.
        return answer
    if now - said > _REMIND:
      said = now
      logging.warning(
        'Waiting, since %.0f s, for process 0 on %s port %d.',
        now - begin,
        host,
        port,
      )
    await asyncio.sleep(_RETRY)
  return [0]


def any_of(flag: bool) -> bool:
  """Whether it is true in any process. All call it."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


class Peers:
  """The other processes of a run, and a word of each to all.

  Words go through JAX's coordination service, so that they arrive also while
  a process compiles. Nothing here waits long for a coordinator that is gone or
  hangs: then there is nobody to tell.
  """

  def __init__(self):
    """Needs `jax.distributed.initialize`."""
    self._client = ocp.multihost.get_jax_distributed_client()
    # Not asked for later, when JAX may be about to end.
    self._index, self._count = jax.process_index(), jax.process_count()

  def ask_to_stop(self) -> None:
    """Tells all that this one was asked to stop."""
    self._tell(_STOP)

  def are_asked_to_stop(self) -> bool:
    """Whether any has told so."""
    return _STOP in self._words()

  def begin_to_leave(self) -> None:
    """Tells all that no further step can be taken with this one."""
    self._tell(_LEAVING)

  def are_leaving(self) -> bool:
    """Whether any has told so."""
    return not {_LEAVING, _READY}.isdisjoint(self._words())

  def leave_together(self, done: bool = False) -> None:
    """Waits some seconds until all have nothing left to do.

    Args:
      done: it leaves because all do, and none need hurry.
    """
    end = time.monotonic() + _PATIENCE
    self._tell(_DONE if done else _READY)
    self._wait_for({_READY, _DONE, _GONE}, end)
    self._tell(_GONE)
    if self._index == 0:
      # The end of the coordinator is a crash to those who are still there.
      self._wait_for({_GONE}, end)
      time.sleep(_FAREWELL)

  def _wait_for(self, words: set[str], end: float) -> None:
    """Until all have told one of these, or a time of `time.monotonic`."""
    while time.monotonic() < end:
      if sum(word in words for word in self._words()) == self._count:
        break
      time.sleep(_POLL)

  def _tell(self, word: str) -> None:
    key = f'{_KEY}/{self._index}'
    self._call(
      lambda: self._client.key_value_set(key, word, allow_overwrite=True)
    )

  def _words(self) -> list[str]:
    found = self._call(lambda: self._client.key_value_dir_get(_KEY))
    return [word for _, word in found or ()]

  def _call(self, function: Callable[[], Any]) -> Any:
    """What it returns; None if that takes too long, or if it fails."""
    answers = queue.SimpleQueue()

    def answer():
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        answers.put(function())

    threading.Thread(target=answer, daemon=True).start()
    with contextlib.suppress(queue.Empty):
      return answers.get(timeout=_ANSWER)


def end(code: int | str) -> None:
  """Ends this process by an exit code, of several all, each by its own.

  Args:
    code: as of `sys.exit`: a text is printed, and makes it 1.
  """
  if jax.process_count() == 1:
    sys.exit(code)
  if isinstance(code, str):
    print(code, file=sys.stderr, flush=True)
    code = 1
  # JAX would wait, minutes, for processes that cannot come any more.
  peers = Peers()
  agreed = code in (0, interrupt.EXIT_CODE)
  if not agreed:
    peers.begin_to_leave()
  peers.leave_together(done=agreed)
  interrupt.leave(code)


@contextlib.contextmanager
def ending_together(heartbeat: float) -> Iterator[None]:
  """Makes an error in one of several processes end them all.

  Otherwise the others would wait for its part of their next step, and it, on
  its way out, for them. They stop as by a signal.

  Args:
    heartbeat: seconds after which JAX names a process that has died.
  """
  try:
    yield
  finally:
    error = sys.exception()
    if error and jax.process_count() > 1:
      traceback.print_exception(error)
      if isinstance(error, jax.errors.JaxRuntimeError):
        # Most often another has died, and the step came to know it first.
        logging.error(
          'Waiting up to %g s for JAX to say whether another process has died.',
          heartbeat + _GRACE,
        )
        time.sleep(heartbeat + _GRACE)
      end(1)
