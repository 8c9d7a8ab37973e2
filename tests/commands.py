"""Starts the project's commands, most of them in forks that start fast."""

import array
import atexit
import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Of a test that calls `alive`, `all_end` or `children`.
lists_processes = pytest.mark.skipif(
  not pathlib.Path('/proc/self/stat').exists(),
  reason='reads /proc, which Linux has',
)


def start(module: str, *arguments, real: bool = False, env=None, **options):
  """Starts `python -m module` with arguments, in ROOT.

  Args:
    module: such as 'mdm_jax.main'.
    arguments: of the command.
    real: a process of its own from its first instruction on, instead of a fork
      of one that has imported all that is slow.
    env: variables beside those of this process.
    options: stdin, stdout and stderr, as of `subprocess.Popen`.

  Returns:
    A `subprocess.Popen`, or what behaves as one. It leads a session, so that
    `alive` finds whatever it has started.
  """
  variables = os.environ | {key: str(x) for key, x in (env or {}).items()}
  arguments = [str(argument) for argument in arguments]
  if real or not hasattr(os, 'pidfd_open'):
    return subprocess.Popen(
      [sys.executable, '-m', module, *arguments],
      cwd=ROOT,
      env=variables,
      start_new_session=True,
      text=True,
      **options,
    )
  # Huge pages take another start of the interpreter.
  variables.setdefault('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=0')
  request = {
    'module': module,
    'arguments': arguments,
    'cwd': str(ROOT),
    'env': variables,
  }
  return Fork(request, **options)


def on_devices(count: int = 1) -> dict[str, str]:
  """The variable that gives a command as many devices, for `env`.

  Programs for fewer devices compile faster.
  """
  # Of two that are equal XLA takes the last.
  flag = f'--xla_force_host_platform_device_count={count}'
  return {'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}'}


def run(
  module: str, *arguments, timeout: float = 600, **options
) -> subprocess.CompletedProcess:
  """Runs it to its end, and returns what it writes as text."""
  with (
    tempfile.TemporaryFile('w+') as stdout,
    tempfile.TemporaryFile('w+') as stderr,
  ):
    process = start(
      module,
      *arguments,
      stdin=subprocess.DEVNULL,
      stdout=stdout,
      stderr=stderr,
      **options,
    )
    try:
      process.wait(timeout)
    finally:
      process.kill()
    for file in (stdout, stderr):
      file.seek(0)
    return subprocess.CompletedProcess(
      process.args, process.returncode, stdout.read(), stderr.read()
    )


class Fork:
  """A process that the server has forked, with what tests use of a `Popen`."""

  def __init__(self, request: dict, stdin=None, stdout=None, stderr=None):
    self.args = [request['module'], *request['arguments']]
    self.returncode, self.stdout = None, None
    with contextlib.ExitStack() as stack:
      null = stack.enter_context(open(os.devnull, 'r+b'))
      files = [0 if stdin is None else null.fileno()]
      if stdout == subprocess.PIPE:
        reader, writer = os.pipe()
        self.stdout = open(reader)
        stack.callback(os.close, writer)
        files.append(writer)
      else:
        files.append(1 if stdout is None else stdout.fileno())
      if stderr == subprocess.STDOUT:
        files.append(files[1])
      else:
        files.append(2 if stderr is None else stderr.fileno())
      # Tells the process's id, and later its exit code.
      self._answers, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
      stack.enter_context(theirs)
      _server()(json.dumps(request).encode(), [*files, theirs.fileno()])
    self.pid = int(self._answers.recv(99))

  def wait(self, timeout: float | None = None) -> int:
    """Its exit code, or minus the signal that has ended it."""
    if self.returncode is None:
      self._answers.settimeout(timeout)
      try:
        # Nothing comes if the server was killed.
        self.returncode = int(self._answers.recv(99) or -signal.SIGKILL)
      except (BlockingIOError, TimeoutError):
        raise subprocess.TimeoutExpired(self.args, timeout) from None
      self._answers.close()
    return self.returncode

  def poll(self) -> int | None:
    """Its exit code; None while it runs."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      return self.wait(0)

  def communicate(self, timeout: float | None = None) -> tuple[str, None]:
    """All that it writes to its pipe."""
    too_long = threading.Timer(timeout or threading.TIMEOUT_MAX, self.kill)
    too_long.start()
    output = self.stdout.read()
    too_long.cancel()
    self.wait(timeout)
    return output, None

  def send_signal(self, number: int) -> None:
    """Nothing happens if it has ended."""
    if self.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self.pid, number)

  def terminate(self) -> None:
    """Sends SIGTERM."""
    self.send_signal(signal.SIGTERM)

  def kill(self) -> None:
    """Sends SIGKILL."""
    self.send_signal(signal.SIGKILL)


@functools.cache
def _server():
  """(request, files) -> sends them to the server, which it starts."""
  ours, theirs = socket.socketpair()
  with theirs:
    server = subprocess.Popen(
      [sys.executable, '-m', 'tests.fork_server', str(theirs.fileno())],
      cwd=ROOT,
      stdin=subprocess.DEVNULL,
      pass_fds=[theirs.fileno()],
      start_new_session=True,
    )
  atexit.register(server.wait)
  atexit.register(ours.close)
  lock = threading.Lock()

  def send(request, fds):
    with lock:
      ours.sendmsg(
        [struct.pack('!I', len(request))],
        [
          (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds)),
        ],
      )
      ours.sendall(request)

  return send


def alive(pid: int) -> list[int]:
  """The processes of the session that a process leads or has led."""
  return [other for other, fields in _processes() if int(fields[3]) == pid]


def children(pid: int, word: str = '') -> list[int]:
  """A process's children whose command line has this word."""
  return [
    other
    for other, fields in _processes()
    if int(fields[1]) == pid and word in _command_line(other)
  ]


def all_end(pid: int, seconds: float = 60) -> bool:
  """Whether soon no process is left of the session that a process has led."""
  end = time.monotonic() + seconds
  while alive(pid) and time.monotonic() < end:
    time.sleep(0.05)
  return not alive(pid)


def _processes():
  """(pid, fields of /proc/PID/stat after its name) of all but zombies."""
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      fields = (path / 'stat').read_text().rpartition(')')[2].split()
    except OSError:  # It has just ended.
      continue
    if fields[0] != 'Z':
      yield int(path.name), fields


def _command_line(pid: int) -> str:
  try:
    return pathlib.Path(f'/proc/{pid}/cmdline').read_text()
  except OSError:
    return ''
