"""Runs the project's commands in forks of a process that has imported JAX.

A command spends seconds on imports alone, and the tests start many of them.
`tests/commands.py` starts this server and talks to it.
"""

import array
import gc
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import warnings


def _import() -> None:
  """What commands import; no backend may be started before a fork."""
  import orbax.checkpoint  # noqa: F401
  import PIL.PngImagePlugin  # noqa: F401
  import tensorboard.compat.proto.event_pb2  # noqa: F401

  from configs import common  # noqa: F401
  from mdm_jax.inference import evaluation, session  # noqa: F401
  from mdm_jax.report import sample_directory  # noqa: F401
  from mdm_jax.runtime import google_storage  # noqa: F401
  from mdm_jax.serving import queue  # noqa: F401
  from mdm_jax.training import loop  # noqa: F401


def _receive(control: socket.socket) -> tuple[dict, list[int]] | None:
  """A request, and its files: standard ones and the one to answer on."""
  size = struct.calcsize('!I')
  fds = array.array('i')
  header, ancillary, _, _ = control.recvmsg(
    size, socket.CMSG_SPACE(4 * fds.itemsize)
  )
  if not header:
    return None
  for _, _, data in ancillary:
    fds.frombytes(data)
  (length,) = struct.unpack('!I', header)
  text = b''
  while len(text) < length:
    text += control.recv(length - len(text))
  return json.loads(text), list(fds)


def serve(control: socket.socket) -> dict | None:
  """Forks for each request.

  Returns:
    In a fork, its request; in the server, None when no more can come.
  """
  selector = selectors.DefaultSelector()
  selector.register(control, selectors.EVENT_READ)
  while True:
    for key, _ in selector.select():
      if key.fileobj is not control:  # A fork has ended.
        pid, answer = key.data
        selector.unregister(key.fileobj)
        os.close(key.fileobj)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        try:
          answer.send(b'%d' % code)
        except OSError:  # Nobody waits for it any more.
          pass
        answer.close()
        continue
      received = _receive(control)
      if received is None:
        return None
      request, (*standard, answer_fd) = received
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # JAX's and Python's, of forks.
        pid = os.fork()
      if not pid:
        for other in list(selector.get_map().values()):
          if other.fileobj is not control:
            os.close(other.fileobj)
            other.data[1].close()
        selector.close()
        control.close()
        os.close(answer_fd)
        for number, fd in enumerate(standard):
          os.dup2(fd, number)
          os.close(fd)
        return request
      for fd in standard:
        os.close(fd)
      answer = socket.socket(fileno=answer_fd)
      answer.send(b'%d' % pid)
      selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, answer))


def let_every_process_write_to_the_cache() -> None:
  """JAX lets only process 0, but on CPUs each has keys of its own."""
  from jax._src import compiler, distributed

  write = compiler._cache_write

  def write_as_process_0(*given):
    state = distributed.global_state
    process, state.process_id = state.process_id, 0
    try:
      write(*given)
    finally:
      state.process_id = process

  compiler._cache_write = write_as_process_0


def make_own_deprecations_errors() -> None:
  """As pyproject.toml does in pytest."""
  for category in (
    DeprecationWarning,
    PendingDeprecationWarning,
    FutureWarning,
  ):
    warnings.filterwarnings(
      'error', category=category, module=r'(__main__|mdm_jax|configs|tests)\b'
    )
  warnings.filterwarnings(
    'ignore', 'builtin type .* has no __module__', DeprecationWarning
  )


def become(request: dict) -> None:
  """Makes this process what it would be if it had been started."""
  import jax

  # Its processes can be told from all others.
  os.setsid()
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(request['cwd'])
  before = dict(os.environ)
  os.environ.clear()
  os.environ.update(request['env'])
  # JAX has read its variables already.
  for name in before.keys() | request['env'].keys():
    value, key = request['env'].get(name), name.lower()
    if before.get(name) != value and hasattr(jax.config, key):
      if isinstance(getattr(jax.config, key), bool):
        value = value.lower() in ('1', 'true')
      jax.config.update(key, value)
  # The server's own knew what kind of file they wrote to.
  sys.stdout = open(1, 'w', closefd=False)
  sys.stderr = open(
    2, 'w', buffering=1, errors='backslashreplace', closefd=False
  )
  # What a library has logged in the server was shown by a handler of its own.
  logging.root.handlers.clear()
  make_own_deprecations_errors()
  sys.argv = [request['module'], *request['arguments']]


if __name__ == '__main__':
  _import()
  let_every_process_write_to_the_cache()
  gc.freeze()  # The forks need not look at what is imported.
  # Ctrl-C in a terminal reaches every process, and is for pytest.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if request := serve(socket.socket(fileno=int(sys.argv[1]))):
    become(request)
    # Last, so that this process ends as any that runs a module.
    runpy.run_module(request['module'], run_name='__main__', alter_sys=True)
