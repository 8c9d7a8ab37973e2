"""Waits until all processes of a run have started, and names missing ones.

JAX's own initialisation waits too, but aborts without naming any.
"""

import asyncio
import contextlib
import json
import time

from absl import logging

_REMIND = 30.0  # seconds between two log lines that name missing processes
_RETRY = 0.5  # seconds between two attempts to connect to process 0
_GRACE = 10.0  # seconds for an answer to arrive


def meet(
  host: str, port: int, count: int, process: int, seconds: float
) -> None:
  """Waits until every process has joined.

  Args:
    host: address of process 0.
    port: TCP port of process 0; free again when this returns.
    count: number of processes.
    process: index of this process, from 0.
    seconds: time to wait for the others. Missing ones are logged meanwhile.

  Raises:
    ValueError: some processes did not join, or the port is taken. Every process
      that joined raises it, and the message names the missing ones.
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
  """Process 0: waits for the others, and tells each which are missing."""
  there, complete = {}, asyncio.Event()

  async def greet(reader, writer):
    try:
      process = int(await reader.readline())
    except ValueError:  # Not one of our processes.
      writer.close()
      return
    there[process] = writer
    if not missing():
      complete.set()
    await reader.read()  # Returns when either side disconnects.
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
        'Waiting for %.0f s. Of %d processes these have not joined: %s.',
        time.monotonic() - begin,
        count,
        ', '.join(map(str, missing())),
      )
  server.close()
  result = missing()
  for writer in list(there.values()):
    with contextlib.suppress(OSError):  # It has just disconnected.
      writer.write(json.dumps(result).encode() + b'\n')
      writer.close()
      await writer.wait_closed()
  return result


async def _report(
  host: str, port: int, process: int, seconds: float
) -> list[int]:
  """Other processes: report to process 0, and wait for its answer."""
  begin = said = time.monotonic()
  while (now := time.monotonic()) < begin + seconds:
    # An error means that process 0 has not started yet, or that another
    # program still uses its port.
    with contextlib.suppress(OSError, ValueError, asyncio.LimitOverrunError):
      reader, writer = await asyncio.wait_for(
        asyncio.open_connection(host, port), begin + seconds - now
      )
      writer.write(b'%d\n' % process)
      # Process 0 may have started to wait later than this process.
      answer = json.loads(
        await asyncio.wait_for(reader.readline(), seconds + _GRACE)
      )
      writer.close()
      if isinstance(answer, list):  # A socket may connect to itself.
        return answer
    if now - said > _REMIND:
      said = now
      logging.warning(
        'Waiting for %.0f s for process 0 on %s port %d.',
        now - begin,
        host,
        port,
      )
    await asyncio.sleep(_RETRY)
  return [0]
