"""Who holds a lock of a directory, in words and for other processes.

What disks and buckets share; see `directory_lock`.
"""

import os
import pathlib
import socket
import time
from typing import Any

from etils import epath

NAME = '.lock'
# Seconds between two signs of life of a holder, which writes its file again.
BEAT = 20.0
# Seconds without one, after which a holder on another machine counts as dead:
# an NFS server may keep the lock of a machine that has vanished, a bucket does.
SILENCE = 150.0
POLL = 1.0  # seconds between two attempts meanwhile


class NotWritable(ValueError):
  """The directory cannot be written to."""


class InUse(NotWritable):
  """Another process writes to the directory."""


def this_process() -> dict[str, Any]:
  """What a holder writes of itself. JSON."""
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    'machine': machine(),
    'namespace': _namespace(),
    'started': _started(os.getpid()),
  }


def message(path: epath.PathLike, holder: dict[str, Any]) -> str:
  """Says that a lock of this path is held, and what to do."""
  return (
    f'{what(path)} is in use: {who(holder)} writes to it. Wait until that '
    'has ended, or write to another place.'
  )


def what(path: epath.PathLike) -> epath.Path:
  """What a lock of this path is of."""
  path = epath.Path(path)
  return path.parent / path.name.removeprefix('.').rpartition(NAME)[0]


def who(holder: dict[str, Any]) -> str:
  """The holder in words."""
  if not holder:
    return 'another process'
  return 'process {pid} on {host}, since {since},'.format_map(
    {'pid': '?', 'host': '?', 'since': '?'} | holder
  )


def machine() -> str:
  """Tells running machines apart; containers of one machine are the same."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return socket.gethostname()


def is_of_this_machine(holder: dict[str, Any]) -> bool:
  """Whether this process would see that of the holder."""
  return holder.get('machine') == machine() and (
    holder.get('namespace') == _namespace() is not None
  )


def has_ended(holder: dict[str, Any]) -> bool:
  """Whether the holder was a process of this machine that has ended."""
  return is_of_this_machine(holder) and holder.get('started') != _started(
    holder.get('pid')
  )


def _namespace() -> str | None:
  """Which processes have the same numbers; None if that is not known."""
  try:
    return os.readlink('/proc/self/ns/pid')
  except OSError:
    return None


def _started(pid: Any) -> str | None:
  """When a process started; None if there is none, or it has ended."""
  try:
    text = pathlib.Path('/proc', str(int(pid)), 'stat').read_text()
  except (OSError, ValueError, TypeError):
    return None
  # After the name, in which there may be anything: the state first.
  fields = text.rpartition(')')[2].split()
  return None if fields[0] in 'ZX' else fields[19]
