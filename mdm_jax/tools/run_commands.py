"""Runs commands beside each other, each on its own devices of this machine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

from mdm_jax.data import lines
from mdm_jax.runtime import preemption

# Platform and number of chips: TPUs of two cores count once. In a process of
# its own, since the devices would otherwise be those of this one.
_COUNT = """
import jax
found = jax.local_devices()
chips = {tuple(getattr(each, 'coords', [each.id])) for each in found}
print('devices', found[0].platform, len(chips))
"""
# How libtpu arranges so many chips.
_TPU_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1', 8: '2,4,1'}


class Ended(NamedTuple):
  """A job that has ended: one or several commands, one after the other.

  Attributes:
    name: of the job.
    code: exit code of the last command that has begun; minus the signal that
      has ended it. `preemption.EXIT_CODE` if a stop came before the next one.
    line: the last line that was written.
  """

  name: str
  code: int
  line: str


def device_groups(size: int | None) -> list[dict[str, str]]:
  """Divides the accelerators of this machine among commands.

  Args:
    size: devices of each command; None for one group, of all devices.

  Returns:
    For each group the environment variables by which JAX sees it alone. On a
    CPU there is one group, of all devices.

  Raises:
    ValueError: there are fewer devices, or libtpu does not divide them so.
  """
  if size is None:
    return [{}]
  result = subprocess.run(
    [sys.executable, '-c', _COUNT], capture_output=True, text=True
  )
  _, _, line = result.stdout.rpartition('devices ')
  if result.returncode or not line:
    *_, line = lines.split_lines(result.stderr) or ['no error']
    raise ValueError(f'--devices_per_run: JAX finds no devices: {line}')
  platform, count = line.split()
  if platform == 'cpu':
    return [{}]
  groups = int(count) // size
  if not groups:
    raise ValueError(f'--devices_per_run={size}: there are only {count}.')
  variable = 'CUDA_VISIBLE_DEVICES'
  bounds = {}
  if platform == 'tpu':
    variable = 'TPU_VISIBLE_CHIPS'
    if size not in _TPU_BOUNDS:
      raise ValueError(
        f'--devices_per_run={size}: give one of {[*_TPU_BOUNDS]} TPU chips.'
      )
    bounds = {
      'TPU_CHIPS_PER_PROCESS_BOUNDS': _TPU_BOUNDS[size],
      'TPU_PROCESS_BOUNDS': '1,1,1',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
  # Those that this process may use, where the variable is set already.
  visible = [*filter(None, os.environ.get(variable, '').split(','))]
  visible = visible or [str(i) for i in range(int(count))]
  return [
    {variable: ','.join(visible[i * size : (i + 1) * size]), **bounds}
    for i in range(groups)
  ]


class Jobs:
  """Commands in subprocesses, which a stop request reaches."""

  def __init__(
    self,
    jobs: Iterable[tuple[str, Sequence[Sequence[str]]]],
    groups: Sequence[Mapping[str, str]],
  ):
    """Nothing is started yet.

    Args:
      jobs: pairs of a name and commands, each a list of words; a command that
        fails is the last one of its job.
      groups: environment variables; so many jobs run at the same time.
    """
    self._jobs = list(jobs)
    self._groups = groups
    self._ended = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._running, self._is_stopped = set(), False

  def run(self) -> Iterator[Ended]:
    """Runs all, and yields each that has ended; after `stop` none begins.

    What they write goes to standard error.
    """
    for group in self._groups:
      threading.Thread(target=self._work, args=(group,), daemon=True).start()
    for _ in self._groups:
      while ended := self._ended.get():
        yield ended

  def stop(self) -> None:
    """Asks the commands that run to stop. From any thread."""
    with self._lock:
      self._is_stopped = True
      for process in self._running:
        process.send_signal(signal.SIGTERM)

  def _work(self, group: Mapping[str, str]) -> None:
    try:
      while job := self._next():
        name, commands = job
        for words in commands:
          code, line = self._run(name, words, group)
          if code:
            break
        self._ended.put(Ended(name, code, line))
    finally:
      self._ended.put(None)

  def _next(self) -> tuple[str, Sequence[Sequence[str]]] | None:
    with self._lock:
      if self._is_stopped or not self._jobs:
        return None
      return self._jobs.pop(0)

  def _run(
    self, name: str, words: Sequence[str], group: Mapping[str, str]
  ) -> tuple[int, str]:
    """Runs a command to its end; returns its exit code and its last line."""
    with self._lock:
      if self._is_stopped:
        return preemption.EXIT_CODE, ''
      try:
        process = subprocess.Popen(
          words,
          env=os.environ | group,
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
          errors='replace',
        )
      except OSError as error:  # Too many processes, or too little memory.
        return os.EX_OSERR, f'error: it cannot be started: {error}'
      self._running.add(process)
    line = self._forward(name, process)
    code = process.wait()
    with self._lock:
      self._running.remove(process)
    return code, line

  def _forward(self, name: str, process: subprocess.Popen) -> str:
    """Writes what a command writes; returns the last line."""
    prefix = f'[{name}] ' if len(self._groups) > 1 else ''
    last = ''
    for line in process.stdout:
      sys.stderr.write(prefix + line)
      last = line.strip() or last
    return last
