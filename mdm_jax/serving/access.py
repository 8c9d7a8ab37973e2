"""Access control of the demo: passwords, local addresses, allowed requests."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import ipaddress
import json
import re
import time
from typing import Any, NamedTuple
import urllib.parse

from mdm_jax.data.lines import read_lines

_MIN_PASSWORD = 8  # characters
_MAX_BODY = 2**20  # bytes in the body of an HTTP request
_MAX_STREAMS = 256  # connections that wait for messages
_ABSENT = 10.0  # seconds after which a browser without a connection is gone
_API = '/gradio_api/'
_JOIN, _CANCEL, _DATA = (
  f'{_API}queue/join',
  f'{_API}cancel',
  f'{_API}queue/data',
)
_HEARTBEAT = f'{_API}heartbeat/'
# Paths that Gradio's own page requests, and the method.
_PATHS = {
  '/': 'GET',
  '/config': 'GET',
  '/theme.css': 'GET',
  '/favicon.ico': 'GET',
  '/manifest.json': 'GET',
  '/login': 'POST',
  '/logout': 'GET',
  f'{_API}app_id': 'GET',
  f'{_API}startup-events': 'GET',
  _CANCEL: 'POST',
  _DATA: 'GET',
  _JOIN: 'POST',
}
_FOLDERS = ('/assets/', '/static/')
# The page that asks for a password, and what it looks like.
_BEFORE_LOGIN = ('/', '/theme.css', '/favicon.ico', '/manifest.json', '/login')
# Headers that are passed on; Gradio would believe others.
_HEADERS = (
  b'host',
  b'cookie',
  b'content-type',
  b'accept-encoding',
  b'x-forwarded-host',
  b'x-forwarded-proto',
)
_HOST = re.compile(
  r'([\w-]+(?:\.[\w-]+)*\.?|\[[\da-f:.]+\])(?::(\d{1,5}))?', re.ASCII | re.I
)
_FORM = re.compile(
  r'application/x-www-form-urlencoded(; *charset=utf-8)?'
  r'|multipart/form-data; *boundary=[\w-]{1,70}',
  re.ASCII | re.I,
)
_FILE = re.compile(r'[\w.@/-]+', re.ASCII)
_NAME = re.compile(r'[\w-]{1,64}', re.ASCII)  # of a session or an event


def is_loopback(host: str) -> bool:
  """Whether a host name or address is a loopback one of this machine."""
  try:
    return host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def read_passwords(path: str) -> list[tuple[str, str]]:
  """Reads users from a file of lines NAME:PASSWORD.

  Returns:
    Pairs of a name and a password.

  Raises:
    OSError: the file cannot be read.
    ValueError: a line is malformed, a password is too short, or the file is
      empty.
  """
  users = []
  for line in read_lines(path):
    name, colon, password = line.partition(':')
    if not (name and colon and len(password) >= _MIN_PASSWORD):
      raise ValueError(
        f'{path}, line {len(users) + 1}: write NAME:PASSWORD, with '
        f'{_MIN_PASSWORD} characters or more as the password.'
      )
    users.append((name, password))
  if not users:
    raise ValueError(f'{path} is empty: write a line NAME:PASSWORD.')
  return users


class Listeners:
  """Which browsers wait for messages now, or did a moment ago."""

  def __init__(self):
    """Nobody is there yet."""
    self._open: Counter[str] = Counter()  # connections by session
    self._left: dict[str, float] = {}  # when sessions without one were seen

  def expect(self, session: str) -> None:
    """Notes that a browser will connect soon."""
    if session not in self._open:
      self._left[session] = time.monotonic()

  def arrive(self, session: str) -> None:
    """Notes that a browser has connected."""
    self._open[session] += 1
    self._left.pop(session, None)

  def leave(self, session: str) -> None:
    """Notes that a connection has ended."""
    if self._open[session] == 1:
      # First, as another thread may ask at any time whether it is there.
      self._left[session] = time.monotonic()
      del self._open[session]
    else:
      self._open[session] -= 1

  def __len__(self) -> int:
    """Number of connections."""
    return self._open.total()

  def is_there(self, session: str) -> bool:
    """Whether a browser listens, or may still come back."""
    if session in self._open:
      return True
    return time.monotonic() < self._left.get(session, -_ABSENT) + _ABSENT

  def pop_absent(self) -> list[str]:
    """Sessions that are gone since the last call."""
    gone = [session for session in self._left if not self.is_there(session)]
    for session in gone:
      del self._left[session]
    return gone


class Page(NamedTuple):
  """What `OnlyThePage` has to know of the page.

  Attributes:
    functions: for each function that a browser may call, by its number, the
      checks of its arguments.
    is_session: whether there are messages for a session.
    has_entered: whether the browser of an ASGI scope may use the page, because
      it has logged in or needs no password.
    forget: removes what is kept for a session.
  """

  functions: Mapping[int, Sequence[Callable[[Any], bool]]]
  is_session: Callable[[str], bool]
  has_entered: Callable[[Mapping[str, Any]], bool]
  forget: Callable[[str], Any]


class _Refused(Exception):
  """A request that is answered by a status of HTTP."""

  def __init__(self, status: int):
    self.status = status


class OnlyThePage:
  """ASGI middleware that serves only the requests which the page makes.

  It blocks Gradio's other features: uploads, reading files and addresses that a
  browser names, and the API. What is malformed is refused here, as Gradio would
  fail on it. If the page is for this machine alone, without a password, it also
  blocks requests that other web sites send through the user's browser. With a
  password, it refuses everything but the login to those who have not logged in.
  """

  def __init__(
    self, app, page: Page, listeners: Listeners, is_local: bool = False
  ):
    """Wraps an ASGI application.

    Args:
      app: the application.
      page: the page that it serves.
      listeners: is told who listens.
      is_local: whether the page is for this machine alone.
    """
    self._app, self._page = app, page
    self._listeners, self._is_local = listeners, is_local

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
      return
    if scope['type'] != 'http':
      await send({'type': 'websocket.close', 'code': 1008})
      return
    try:
      headers = self._check(scope)
      session = self._session(scope)
      if scope['method'] == 'POST':
        body = await self._body(scope, receive)
        receive = _replay(body, receive)
        headers[b'content-length'] = b'%d' % len(body)
        if scope['path'] != '/login':
          headers[b'content-type'] = b'application/json'
    except _Refused as refused:
      await _answer(send, refused.status)
      return
    # Gradio would look for files that the query of a page names.
    query = (
      f'session_hash={session}'.encode() if scope['path'] == _DATA else b''
    )
    scope = scope | {'headers': [*headers.items()], 'query_string': query}
    for gone in self._listeners.pop_absent():
      await self._page.forget(gone)
    if scope['path'] == _DATA:
      await self._listen(session, scope, receive, send)
    else:
      await self._app(scope, receive, send)

  def _check(self, scope) -> dict[bytes, bytes]:
    """Checks all but session and body; returns the headers to pass on."""
    headers = {}
    for name, value in scope['headers']:
      name = name.lower()
      if name in (*_HEADERS, b'origin'):
        # Several cookies are one; several of the others contradict each other.
        if name in headers:
          if name != b'cookie':
            raise _Refused(400)
          value = headers[name] + b'; ' + value
        if not all(32 <= byte < 127 for byte in value):
          raise _Refused(400)
        headers[name] = value
    names = [_host(headers.get(b'host', b''))]
    if (origin := headers.pop(b'origin', None)) is not None:
      names.append(_origin(origin))
    if b'x-forwarded-host' in headers:
      _host(headers[b'x-forwarded-host'].split(b',')[0].strip())

    path, method = scope['path'], scope['method']
    if path.startswith(_FOLDERS):
      known = _FILE.fullmatch(path) and '..' not in path
      wanted = 'GET' if known else None
    else:
      wanted = 'GET' if path.startswith(_HEARTBEAT) else _PATHS.get(path)
    if wanted is None:
      raise _Refused(404)
    if self._is_local and not all(map(is_loopback, names)):
      raise _Refused(403)
    if method != wanted and (method, wanted) != ('HEAD', 'GET'):
      raise _Refused(405)
    if not (
      path in _BEFORE_LOGIN
      or path.startswith(_FOLDERS)
      or self._page.has_entered(scope)
    ):
      raise _Refused(401)
    return headers

  def _session(self, scope) -> str:
    """The session that a connection is for; '' if it is for none."""
    path = scope['path']
    if path.startswith(_HEARTBEAT):
      session = path.removeprefix(_HEARTBEAT)
    elif path == _DATA:
      query = urllib.parse.parse_qs(scope['query_string'].decode('latin-1'))
      session = query.get('session_hash', [''])[-1]
    else:
      return ''
    if not _NAME.fullmatch(session):
      raise _Refused(400)
    if path == _DATA and not self._page.is_session(session):
      raise _Refused(404)
    if len(self._listeners) >= _MAX_STREAMS:
      raise _Refused(429)
    return session

  async def _body(self, scope, receive) -> bytes:
    """Reads and checks the body of a POST; returns what to pass on."""
    length = dict(scope['headers']).get(b'content-length', b'')
    if not length.isdigit() or int(length[:20]) > _MAX_BODY:
      raise _Refused(413)  # Before it is sent.
    kind = dict(scope['headers']).get(b'content-type', b'').decode('latin-1')
    if scope['path'] == '/login' and not _FORM.fullmatch(kind):
      raise _Refused(415)
    body, more = b'', True
    while more:
      message = await receive()
      if message['type'] != 'http.request':
        raise _Refused(400)  # Nobody reads the answer.
      body += message.get('body', b'')
      more = message.get('more_body', False)
    if scope['path'] == '/login':
      return body
    given = _parse(body)
    if scope['path'] == _CANCEL:
      passed = ('session_hash', 'event_id', 'fn_index')
      if not _is_name(given.get('event_id')):
        raise _Refused(422)
    else:
      passed = ('session_hash', 'fn_index', 'data')
    session, index = given.get('session_hash'), given.get('fn_index')
    if not _is_name(session) or type(index) is not int:
      raise _Refused(422)
    if index not in self._page.functions:
      raise _Refused(404)
    if scope['path'] == _JOIN:
      checks, data = self._page.functions[index], given.get('data')
      if not isinstance(data, list) or len(data) != len(checks):
        raise _Refused(422)
      if not all(check(value) for check, value in zip(checks, data)):
        raise _Refused(422)
      self._listeners.expect(session)
    return json.dumps({name: given[name] for name in passed}).encode()

  async def _listen(self, session: str, scope, receive, send) -> None:
    """Sends messages to a browser, and notes when it has left."""
    gone = asyncio.Event()

    async def wait_for_end():
      while (await receive())['type'] != 'http.disconnect':
        pass
      gone.set()
      self._listeners.leave(session)

    async def disconnected():
      await gone.wait()
      return {'type': 'http.disconnect'}

    self._listeners.arrive(session)
    waiting = asyncio.create_task(wait_for_end())
    try:
      await self._app(scope, disconnected, send)
    finally:
      waiting.cancel()
      if not gone.is_set():
        self._listeners.leave(session)


def _replay(body: bytes, receive) -> Callable:
  """An ASGI `receive` that returns a body which has been read."""
  messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

  async def replayed():
    return messages.pop() if messages else await receive()

  return replayed


async def _answer(send, status: int) -> None:
  await send(
    {
      'type': 'http.response.start',
      'status': status,
      'headers': [(b'content-length', b'0')],
    }
  )
  await send({'type': 'http.response.body', 'body': b''})


def _host(value: bytes) -> str:
  """The name in a Host header, without the port."""
  found = _HOST.fullmatch(value.decode('ascii', 'replace'))
  if not found or int(found[2] or 0) >= 2**16:
    raise _Refused(400)
  name = found[1].strip('[]')
  try:
    if ':' in name or re.fullmatch(r'[\d.]+', name):
      ipaddress.ip_address(name)
  except ValueError:
    raise _Refused(400) from None
  return name


def _origin(value: bytes) -> str:
  """The name in an Origin header; '' for 'null'."""
  scheme, slashes, host = value.partition(b'://')
  if value == b'null':
    return ''
  if not slashes or not re.fullmatch(rb'[a-z][a-z0-9+.-]*', scheme):
    raise _Refused(400)
  return _host(host)


def _parse(body: bytes) -> dict[str, Any]:
  """The JSON object that a body is."""

  def refuse(constant):
    raise ValueError(f'{constant} is no JSON')

  try:
    given = json.loads(body, parse_constant=refuse)
  except (ValueError, RecursionError):
    raise _Refused(400) from None
  if not isinstance(given, dict):
    raise _Refused(422)
  return given


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and _NAME.fullmatch(value) is not None
