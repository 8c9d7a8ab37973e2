"""Access control of the demo: passwords, local addresses, allowed paths."""

import ipaddress
import urllib.parse

from mdm_jax.data.lines import read_lines

_MIN_PASSWORD = 8  # characters
_MAX_BODY = 2**20  # bytes in the body of an HTTP request
# Paths that Gradio's own page requests.
_PATHS = {
  '/',
  '/config',
  '/theme.css',
  '/favicon.ico',
  '/manifest.json',
  '/login',
  '/logout',
  '/gradio_api/app_id',
  '/gradio_api/cancel',
  '/gradio_api/queue/data',
  '/gradio_api/queue/join',
  '/gradio_api/startup-events',
}
_FOLDERS = ('/assets/', '/static/', '/gradio_api/heartbeat/')


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


class OnlyThePage:
  """ASGI middleware that serves only the paths which the page requests.

  It blocks Gradio's other features: uploads, reading files and addresses that a
  browser names, and the API. If the page is for this machine alone, without a
  password, it also blocks requests that other web sites send through the user's
  browser.
  """

  def __init__(self, app, is_local: bool):
    """Wraps an ASGI application.

    Args:
      app: the application.
      is_local: whether the page is for this machine alone.
    """
    self._app, self._is_local = app, is_local

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
      return
    headers = {
      name: value.decode('latin-1') for name, value in scope['headers']
    }
    path = scope['path']
    # Hosts of the page that sends the request, if the browser gives it, and of
    # the address at which the browser found this server.
    names = [
      urllib.parse.urlsplit(address).hostname or ''
      for address in (
        headers.get(b'origin', '//localhost'),
        f'//{headers.get(b"host", "")}',
      )
    ]
    length = headers.get(b'content-length', '')
    has_body = scope.get('method') == 'POST'
    if scope['type'] != 'http' or not (
      path in _PATHS or path.startswith(_FOLDERS)
    ):
      status = 404
    elif self._is_local and not all(map(is_loopback, names)):
      status = 403
    elif has_body and not (length.isdecimal() and int(length) <= _MAX_BODY):
      status = 413
    else:
      # Gradio would look for files that the query of a page names.
      query = scope['query_string'] if path.startswith('/gradio_api/') else b''
      await self._app(scope | {'query_string': query}, receive, send)
      return
    await send(
      {
        'type': 'http.response.start',
        'status': status,
        'headers': [(b'content-length', b'0')],
      }
    )
    await send({'type': 'http.response.body', 'body': b''})
