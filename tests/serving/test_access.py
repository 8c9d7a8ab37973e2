"""The demo's guard, around an application that records what it receives."""

import asyncio
import functools
import json

import pytest

from mdm_jax.serving import access
from tests import fuzzing

HOST = (b'host', b'127.0.0.1:7860')
JOIN = {'session_hash': 'abc', 'fn_index': 1, 'data': ['a', 3]}
CANCEL = {'session_hash': 'abc', 'fn_index': 1, 'event_id': 'e1'}
JOIN_PATH = '/gradio_api/queue/join'
DATA_PATH = '/gradio_api/queue/data'


class Recorder:
  """An ASGI application behind the guard."""

  def __init__(self, *, is_local=True, has_entered=True):
    self.passed, self.forgotten = [], []
    self.listeners = access.Listeners()
    self.during = lambda: None

    async def forget(session):
      self.forgotten.append(session)

    page = access.Page(
      {
        0: [],
        1: [
          lambda value: isinstance(value, str),
          lambda value: type(value) is int,
        ],
      },
      lambda session: session == 'abc',
      lambda scope: has_entered,
      forget,
    )
    self._guard = access.OnlyThePage(self._app, page, self.listeners, is_local)

  async def _app(self, scope, receive, send):
    body = (await receive()).get('body') if scope['method'] == 'POST' else None
    self.passed.append((scope, body))
    self.during()
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})
    await send({'type': 'http.response.body', 'body': b''})

  def ask(self, path, *headers, method='GET', body=None, query=b'', host=HOST):
    """The status of a request."""
    if body is not None:
      method = 'POST'
      body = body if isinstance(body, bytes) else json.dumps(body).encode()
      if b'content-length' not in dict(headers):
        headers += ((b'content-length', b'%d' % len(body)),)
    scope = {
      'type': 'http',
      'method': method,
      'path': path,
      'headers': [*([host] if host else []), *headers],
      'query_string': query,
    }
    messages, sent = [{'type': 'http.request', 'body': body or b''}], []

    async def receive():
      return messages.pop() if messages else {'type': 'http.disconnect'}

    async def send(message):
      sent.append(message)

    asyncio.run(self._guard(scope, receive, send))
    return sent[0]['status']


@pytest.mark.parametrize(
  'status, host',
  [
    (200, b'localhost'),
    (200, b'127.0.0.1:7860'),
    (200, b'[::1]:7860'),
    (403, b'example.com'),
    (403, b'xn--a'),
    (400, b''),
    (400, b'['),
    (400, b'[::1'),
    (400, b'[::::]'),
    (400, b'[1]'),
    (400, b'127.0.0.999'),
    (400, b'a..b'),
    (400, b'a b'),
    (400, b'localhost:99999'),
    (400, b'localhost:x'),
    (400, b'localhost@example.com'),
    (400, b'localhost/..'),
    (400, 'localhöst'.encode()),
    (400, b'localhost\0'),
    (400, b'a' * 10**6 + b'!'),
  ],
)
def test_hosts(status, host):
  recorder = Recorder()
  assert recorder.ask('/', host=(b'host', host)) == status
  assert recorder.ask('/', (b'origin', b'http://' + host)) == status
  forwarded = recorder.ask('/', (b'x-forwarded-host', host))
  assert forwarded == (400 if status == 400 else 200)


def test_headers():
  recorder = Recorder()
  assert recorder.ask('/', host=None) == 400
  assert recorder.ask('/', HOST) == 400  # Two of them.
  assert recorder.ask('/', (b'Host', b'localhost')) == 400
  for origin in (b'', b'localhost', b'://localhost', b'7://localhost', b'\xff'):
    assert recorder.ask('/', (b'origin', origin)) == 400
  assert recorder.ask('/', (b'origin', b'null')) == 403
  assert Recorder(is_local=False).ask('/', (b'origin', b'null')) == 200
  assert not recorder.passed
  assert (
    recorder.ask(
      '/',
      (b'cookie', b'a=1'),
      (b'cookie', b'b=2'),
      (b'user-agent', b'\xff\xfe'),
      (b'x-gradio-server', b'http://evil'),
      (b'range', b'bytes=x'),
    )
    == 200
  )
  ((scope, _),) = recorder.passed
  assert scope['headers'] == [HOST, (b'cookie', b'a=1; b=2')]


@pytest.mark.parametrize(
  'status, path, given',
  [
    (200, '/assets/index-1.js', {}),
    (404, '/assets/../secret', {}),
    (404, '/static/a\0b', {}),
    (404, '/assets/%2e%2e', {}),
    (404, '/gradio_api/upload', {'body': b'x'}),
    (404, '/gradio_api/file=/etc/passwd', {}),
    (404, '/queue/join', {'body': JOIN}),
    (405, '/', {'method': 'OPTIONS'}),
    (405, '/', {'method': 'PUT'}),
    (405, '/', {'body': b''}),
    (405, JOIN_PATH, {}),
    (200, '/', {'method': 'HEAD'}),
    (200, '/gradio_api/heartbeat/abc', {}),
    (400, '/gradio_api/heartbeat/', {}),
    (400, '/gradio_api/heartbeat/a/b', {}),
    (400, '/gradio_api/heartbeat/' + 'a' * 65, {}),
    (200, DATA_PATH, {'query': b'session_hash=abc'}),
    (404, DATA_PATH, {'query': b'session_hash=other'}),
    (400, DATA_PATH, {}),
    (400, DATA_PATH, {'query': b'session_hash=a%00b'}),
    (400, DATA_PATH, {'query': b'\xff&=&session_hash'}),
  ],
)
def test_paths(status, path, given):
  assert Recorder().ask(path, **given) == status


@pytest.mark.parametrize(
  'status, changes',
  [
    (200, {}),
    (200, {'fn_index': 0, 'data': []}),
    (404, {'fn_index': 99}),
    (404, {'fn_index': -1}),
    (422, {'fn_index': None}),
    (422, {'fn_index': '1'}),
    (422, {'fn_index': True}),
    (422, {'fn_index': 1.0}),
    (422, {'session_hash': None}),
    (422, {'session_hash': ''}),
    (422, {'session_hash': 'a' * 65}),
    (422, {'session_hash': ['abc']}),
    (422, {'session_hash': '../x'}),
    (422, {'data': None}),
    (422, {'data': {}}),
    (422, {'data': ['a']}),
    (422, {'data': ['a', 3, 4]}),
    (422, {'data': [3, 'a']}),
    (422, {'data': [{'path': '/etc/passwd'}, 3]}),
    (400, {'data': ['a', float('nan')]}),
  ],
)
def test_requests_to_join(status, changes):
  recorder = Recorder()
  assert recorder.ask(JOIN_PATH, body=JOIN | changes) == status
  assert len(recorder.passed) == (status == 200)


def test_only_what_the_page_sends_is_passed_on():
  recorder = Recorder()
  more = {
    'event_data': {'x': 1},
    'trigger_id': 7,
    'batched': True,
    'event_id': 1,
  }
  assert recorder.ask(JOIN_PATH, body=JOIN | more) == 200
  assert recorder.ask('/gradio_api/cancel', body=CANCEL | more) == 422
  assert recorder.ask('/gradio_api/cancel', body=CANCEL) == 200
  (join, joined), (_, cancelled) = recorder.passed
  assert json.loads(joined) == JOIN and json.loads(cancelled) == CANCEL
  assert dict(join['headers'])[b'content-type'] == b'application/json'
  assert dict(join['headers'])[b'content-length'] == b'%d' % len(joined)


@pytest.mark.parametrize(
  'status, body, length',
  [
    (400, b'', None),
    (400, b'{', None),
    (400, b'\xff', None),
    (400, b'[' * 10**5, None),
    (400, b'9' * 10**5, None),
    (422, b'[]', None),
    (422, b'7', None),
    (413, b' ' * (2**20 + 1), None),
    (413, b'', b'9' * 5000),
    (413, b'', b'-1'),
    (413, b'', '²'.encode('latin-1')),
    (413, b'', b''),
  ],
)
def test_bodies(status, body, length):
  headers = () if length is None else ((b'content-length', length),)
  for path in (JOIN_PATH, '/gradio_api/cancel'):
    assert Recorder().ask(path, *headers, body=body) == status


def test_forms_of_a_login():
  for kind, status in (
    (b'application/x-www-form-urlencoded', 200),
    (b'multipart/form-data; boundary=----a1', 200),
    (b'multipart/form-data', 415),
    (b'multipart/form-data; boundary=' + b'a' * 71, 415),
    (b'application/x-www-form-urlencoded; charset=nothing', 415),
    (b'text/plain', 415),
  ):
    assert (
      Recorder().ask('/login', (b'content-type', kind), body=b'a') == status
    )
  assert Recorder().ask('/login', body=b'a') == 415


def test_nothing_is_answered_before_the_login():
  recorder = Recorder(is_local=False, has_entered=False)
  for path, method in access._PATHS.items():
    public = path in ('/', '/theme.css', '/favicon.ico', '/manifest.json')
    if path == '/login':
      continue
    body = CANCEL if method == 'POST' else None
    assert recorder.ask(path, body=body) == (200 if public else 401), path
  assert recorder.ask('/gradio_api/heartbeat/abc') == 401
  assert recorder.ask('/assets/a.js') == 200


def test_websockets_are_closed():
  sent = []

  async def send(message):
    sent.append(message)

  guard = Recorder()._guard
  asyncio.run(guard({'type': 'websocket', 'path': '/'}, None, send))
  assert sent == [{'type': 'websocket.close', 'code': 1008}]


def test_listeners_are_counted_and_forgotten(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(access.time, 'monotonic', lambda: now[0])
  recorder = Recorder()
  there = functools.partial(recorder.listeners.is_there, 'abc')
  assert not there()
  recorder.ask(JOIN_PATH, body=JOIN)
  now[0] = 9.0
  assert there()  # It has a moment to connect.
  seen = []

  def wait_long():
    now[0] = 99.0
    seen.append(there())

  recorder.during = wait_long
  recorder.ask(DATA_PATH, query=b'session_hash=abc')
  assert seen == [True] and there()  # It may come back.
  recorder.during = lambda: None
  now[0] += 11
  assert not there() and not recorder.forgotten
  recorder.ask('/')
  assert recorder.forgotten == ['abc']
  for i in range(100):
    recorder.ask(JOIN_PATH, body=JOIN | {'session_hash': f's{i}'})
    now[0] += 1
  assert len(recorder.listeners._left) <= 11


def test_too_many_connections_are_refused():
  recorder = Recorder()
  for i in range(access._MAX_STREAMS):
    recorder.listeners.arrive(f's{i}')
  assert recorder.ask(DATA_PATH, query=b'session_hash=abc') == 429
  recorder.listeners.leave('s0')
  assert recorder.ask(DATA_PATH, query=b'session_hash=abc') == 200


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_request_is_passed_on_or_refused(count):
  paths = [*access._PATHS, '/assets/a.js', '/gradio_api/heartbeat/abc']

  def make(rng):
    def damaged(data):
      return fuzzing.damage(data, rng) if rng.random() < 0.3 else data

    headers = [
      (name, damaged(value))
      for name, value in (
        (b'origin', b'http://[::1]:7860'),
        (b'x-forwarded-host', b'localhost, a'),
        (b'content-type', b'multipart/form-data; boundary=a'),
        (b'content-length', b'100'),
      )
      if rng.random() < 0.5
    ]
    body = fuzzing.damage_json((JOIN, CANCEL)[rng.integers(2)], rng)
    return {
      'path': damaged(paths[rng.integers(len(paths))].encode()).decode(
        'latin-1'
      ),
      'headers': headers,
      'host': (b'host', damaged(b'127.0.0.1:7860')),
      'body': body.encode() if rng.random() < 0.7 else None,
      'query': damaged(b'session_hash=abc'),
    }

  def ask(given):
    path, headers = given.pop('path'), given.pop('headers')
    status = Recorder().ask(path, *headers, **given)
    assert status == 200 or 400 <= status < 500

  fuzzing.check(ask, make, count, refuses=())
