"""Processes wait for each other, and name those that do not join."""

import concurrent.futures
import logging
import socket
import time

import jax
import pytest

from mdm_jax.runtime import distributed, rendezvous


@pytest.fixture
def port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@pytest.fixture
def meet(port, monkeypatch):
  """(count, processes that join, seconds) -> each one's error, or None."""
  monkeypatch.setattr(rendezvous, '_REMIND', 0.5)
  monkeypatch.setattr(rendezvous, '_RETRY', 0.05)

  def outcome(process, count, seconds):
    try:
      return rendezvous.meet('127.0.0.1', port, count, process, seconds)
    except ValueError as error:
      return str(error)

  def meet(count, who, seconds=60):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
      return list(
        pool.map(lambda process: outcome(process, count, seconds), who)
      )

  return meet


def test_all_join(meet, port):
  for _ in range(2):  # The second time needs the port to be free again.
    assert meet(4, [3, 1, 0, 2]) == [None] * 4
  assert meet(1, [0]) == [None]


def test_every_process_names_the_missing_ones(meet, caplog):
  with caplog.at_level(logging.WARNING):
    told = meet(5, [0, 1, 3], 2)
  assert (
    told
    == [
      'Of 5 processes, 2, 4 did not arrive within 2 s: see their own logs, or '
      'give more time with --arrival.'
    ]
    * 3
  )
  # Logged while the processes still wait.
  assert 'Of 5 processes these have not joined: 2, 4.' in caplog.text


def test_process_0_is_named(meet, port):
  assert (
    meet(3, [1, 2], 1)
    == [
      f'Of 3 processes, 0, on 127.0.0.1 port {port}, did not arrive within 1 '
      's: see their own logs, or give more time with --arrival.'
    ]
    * 2
  )


def talk(port, line):
  end = time.monotonic() + 60
  while True:
    try:
      connection = socket.create_connection(('127.0.0.1', port))
      break
    except ConnectionRefusedError:
      # Not listening yet; or no longer, on a very slow machine.
      if time.monotonic() > end:
        raise
      time.sleep(0.01)
  connection.sendall(line)
  return connection


def test_a_process_that_disconnects_is_missing(meet, port):
  def visit():
    talk(port, b'1\n').close()
    with talk(port, b'GET / HTTP/1.1\r\n\r\n') as stranger:
      assert stranger.recv(100) == b''

  with concurrent.futures.ThreadPoolExecutor() as pool:
    visitor = pool.submit(visit)
    assert 'Of 3 processes, 1 did not' in meet(3, [0, 2], 3)[0]
    visitor.result()


@pytest.mark.parametrize(
  'changes, error',
  [
    ({}, 'no cluster tells their addresses'),
    ({'process_id': 2}, 'process 2 is none of 0 to 1'),
    ({'coordinator': 'here'}, 'here is not HOST:PORT'),
  ],
)
def test_wrong_addresses_are_refused(monkeypatch, changes, error):
  given = {'coordinator': '127.0.0.1:1', 'num_processes': 2, 'process_id': 0}
  given = given | changes if changes else dict.fromkeys(given)
  with pytest.raises(ValueError, match=error) as raised:
    distributed.join(**given, arrival=1, heartbeat=1)
  assert '--coordinator=HOST:PORT' in str(raised.value)


def no_such_name(*given, **_):
  raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')


@pytest.mark.parametrize(
  'name, look_up, reason',
  [
    ('my-host', no_such_name, 'Name or service not known'),
    ('198.51.100.7', socket.getaddrinfo, '198.51.100.7: Cannot assign reques'),
    ('a' * 64 + '.b', socket.getaddrinfo, 'encod'),
  ],
)
def test_a_host_without_an_address_of_its_own(
  monkeypatch, name, look_up, reason
):
  monkeypatch.setattr(socket, 'gethostname', lambda: name)
  monkeypatch.setattr(socket, 'getaddrinfo', look_up)
  met = []
  monkeypatch.setattr(rendezvous, 'meet', lambda *given: met.append(given))
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *given, **_: None)

  def join():
    distributed.join('127.0.0.1:1', 2, 0, arrival=1, heartbeat=1)

  with pytest.raises(
    ValueError,
    match=f'{name}, resolves to .*{reason}.* add the line "ADDRESS {name}" to ',
  ):
    join()
  assert not met  # It does not wait for the others first.
  # Where the CPU is left out, JAX does not look the name up.
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', 'cuda')
  try:
    join()
  finally:
    jax.config.update('jax_platforms', before)
  assert len(met) == 1


def test_a_port_that_is_taken():
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(ValueError, match='choose another port'):
      rendezvous.meet('127.0.0.1', port, 2, 0, 1)


def test_slurm_settings_are_detected(monkeypatch):
  for name, value in {
    'SLURM_JOB_ID': '77',
    'SLURM_STEP_NODELIST': 'node[007-009],other',
    'SLURM_NTASKS': '3',
    'SLURM_PROCID': '2',
    'SLURM_LOCALID': '0',
    'JAX_COORDINATOR_PORT': '1234',
  }.items():
    monkeypatch.setenv(name, value)
  seen = []
  monkeypatch.setattr(rendezvous, 'meet', lambda *given: seen.append(given))
  monkeypatch.setattr(
    distributed.jax.distributed,
    'initialize',
    lambda *given, **_: seen.append(given),
  )
  distributed.join(None, None, None, arrival=9, heartbeat=1)
  assert seen == [('node007', 1234, 3, 2, 9), ('node007:1234', 3, 2)]


def test_too_little_memory_is_one_line():
  text = 'RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes'
  with pytest.raises(SystemExit, match='memory allocating 9 .* raise stages'):
    with distributed.naming_the_dead(100):
      raise jax.errors.JaxRuntimeError(text)
