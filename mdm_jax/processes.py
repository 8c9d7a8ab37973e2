"""Several processes that compute together: who is there, and who is not."""

import asyncio
import contextlib
import json
import time

from absl import logging
import jax

# No public function of JAX tells what the cluster says about this process.
from jax._src.clusters import ClusterEnv

_REMIND = 30.0  # seconds between two lines about who is missing
_RETRY = 0.5    # seconds between two tries to reach process 0
_GRACE = 10.0   # seconds for an answer to arrive


def join(coordinator: str | None, num_processes: int | None,
         process_id: int | None, *, arrival: float, heartbeat: int) -> None:
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
            coordinator, num_processes, process_id, None, None, arrival))
    if None in (coordinator, num_processes, process_id):
      raise ValueError('no cluster says who they are')
    if not 0 <= process_id < num_processes:
      raise ValueError(f'process {process_id} is none of 0 to '
                       f'{num_processes - 1}')
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdigit()):
      raise ValueError(f'{coordinator} is not HOST:PORT')
  # JAX and the clients of clusters have no error of their own for it.
  except (ValueError, RuntimeError, OSError) as error:
    raise ValueError(
        'The other processes cannot be joined ('
        f'{str(error).splitlines()[0]}): give --coordinator=HOST:PORT, '
        '--num_processes=N and --process_id=0 to N-1.') from error
  # JAX would wait, too, but then abort, and name none.
  meet(host.strip('[]'), int(port), num_processes, process_id, arrival)
  # Its handler of SIGTERM would take the place of ours.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      coordinator, num_processes, process_id,
      initialization_timeout=int(arrival) + 1,
      heartbeat_timeout_seconds=heartbeat)


def meet(host: str, port: int, count: int, process: int,
         seconds: float) -> None:
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
        '--arrival.')


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
    raise ValueError(f'Process 0 cannot listen ({error}): choose another '
                     'port.') from error
  begin = time.monotonic()
  while missing() and (left := begin + seconds - time.monotonic()) > 0:
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(complete.wait(), min(left, _REMIND))
      break
    if left > _REMIND:
      logging.warning(
          'Waiting, since %.0f s. Of %d processes these have not come: %s.',
          time.monotonic() - begin, count, ', '.join(map(str, missing())))
  server.close()
  result = missing()
  for writer in list(there.values()):
    with contextlib.suppress(OSError):  # It has just gone.
      writer.write(json.dumps(result).encode() + b'\n')
      writer.close()
      await writer.wait_closed()
  return result


async def _report(host: str, port: int, process: int,
                  seconds: float) -> list[int]:
  """Any other: reports to process 0, and waits for its answer."""
  begin = said = time.monotonic()
  while (now := time.monotonic()) < begin + seconds:
    # Anything else than an answer: process 0 is not there yet, or its port is
    # still another program's.
    with contextlib.suppress(OSError, ValueError, asyncio.LimitOverrunError):
      reader, writer = await asyncio.wait_for(
          asyncio.open_connection(host, port), begin + seconds - now)
      writer.write(b'%d\n' % process)
      # It may have begun to wait later than this one.
      answer = json.loads(
          await asyncio.wait_for(reader.readline(), seconds + _GRACE))
      writer.close()
      if isinstance(answer, list):  # Not its own line, sent to itself.
        return answer
    if now - said > _REMIND:
      said = now
      logging.warning('Waiting, since %.0f s, for process 0 on %s port %d.',
                      now - begin, host, port)
    await asyncio.sleep(_RETRY)
  return [0]
