"""A web page to draw with a trained model.

  python -m mdm_jax.demo --workdir=runs/shapes_64

It needs Gradio: pip install -r requirements-demo.txt
"""

import base64
from collections.abc import Iterator
import html
import importlib.util
import io
import ipaddress
import os
import pathlib
import signal
import sys
import threading
import time
import urllib.parse

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the training run.', required=True
)
_PORT = flags.DEFINE_integer(
  'port', 7860, 'Of the page.', lower_bound=1, upper_bound=65535
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'Address to listen at; any but those of this machine '
  'itself needs --password_file.',
)
_PASSWORDS = flags.DEFINE_string(
  'password_file', None, 'Has a line NAME:PASSWORD for each user.'
)
_WAITING = flags.DEFINE_integer(
  'max_waiting',
  4,
  'Orders that may wait for the one that is drawn.',
  lower_bound=0,
)

_MIN_PASSWORD = 8  # characters
_FRAME = 0.1  # Seconds between two looks at what is being drawn.
_MAX_PREVIEW = 256  # px; larger levels are averaged down while they are drawn.
_FEW = 4  # Pictures of an order; so many are shown larger.
_MAX_GALLERY = 2**24  # Characters of HTML that a gallery may have.
_MAX_BODY = 2**20  # Bytes that a browser may send at once.
_NUM_EXAMPLES = 5

# What Gradio's page itself asks for.
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

_CSS = """
.gradio-container {max-width: 1280px !important; margin: 0 auto !important}
footer {display: none !important}
.mdm-bar {height: 4px; border-radius: 2px; margin-top: 6px;
  background: var(--border-color-primary)}
.mdm-bar div {height: 100%; border-radius: 2px;
  background: var(--color-accent)}
.mdm-error {color: var(--error-text-color, #b91c1c)}
.mdm-about, .mdm-small {color: var(--body-text-color-subdued);
  font-size: var(--text-sm)}
#preview:not(:has(.mdm-card)), #gallery:not(:has(.mdm-card)) {display: none}
.mdm-card {border-top: 1px solid var(--border-color-primary);
  padding: 12px 0}
.mdm-figures {display: flex; flex-wrap: wrap; gap: 16px; margin-top: 8px}
.mdm-figures figure {margin: 0; max-width: 100%}
.mdm-levels {display: flex; gap: 3px}
.mdm-levels img {width: 128px; height: 128px; margin: 0; border-radius: 3px;
  background: var(--border-color-primary)}
.mdm-few img {width: 192px; height: 192px}
.mdm-levels img.mdm-pixels {image-rendering: pixelated}
.mdm-figures a {margin-right: 10px; text-decoration: underline}
.mdm-figures code {display: block; user-select: all; white-space: pre-wrap;
  overflow-wrap: anywhere; padding: 8px; border-radius: 4px; width: 0;
  min-width: 100%; background: var(--background-fill-secondary)}
"""


def main(argv: list[str]) -> None:
  """Restores, serves the page, compiles meanwhile."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Gradio tells nobody that it is used. It reads this as it is imported.
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  try:
    users = _read_passwords(_PASSWORDS.value) if _PASSWORDS.value else None
    if not users and not _is_loopback(_HOST.value):
      raise ValueError(
        f'--host={_HOST.value} is open to others: give --password_file=FILE '
        'with a line NAME:PASSWORD for each user, or keep 127.0.0.1.'
      )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  if importlib.util.find_spec('gradio') is None:
    sys.exit(
      'error: the demo needs Gradio: pip install -r requirements-demo.txt'
    )
  # Slow to import, and not needed for --help.
  from mdm_jax import (
    build,
    checkpoint,
    checks,
    compilation_cache,
    interrupt,
    live,
    metrics,
    sharding,
    trained,
  )

  metrics.setup_logging()
  compilation_cache.enable()
  try:
    config = build.reading_prompts(
      build.load_config(checkpoint.read_config(_WORKDIR.value))
    )
    # Whatever it was trained on, here there may be other devices.
    config.mesh.update(data=-1, fsdp=1, spatial=1)
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.batch_shards(mesh)
    config.eval.batch_size = max(1, config.eval.batch_size // shards) * shards
    checks.check(config, mesh)
    index, step, params = trained.restore_average(config, _WORKDIR.value, mesh)
    params |= build.load_frozen(config, mesh)
    studio = live.Studio(
      config, index, step, params, mesh, _WORKDIR.value, _WAITING.value
    )
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  page = make_page(studio)
  stop = threading.Event()
  for number in interrupt.SIGNALS:
    signal.signal(number, lambda number, frame: stop.set())
  try:
    _, address, _ = launch(page, _HOST.value, _PORT.value, users)
  except OSError:
    sys.exit(
      f'error: {_HOST.value}:{_PORT.value} is taken, or not of this '
      'machine: give another --port or --host.'
    )
  logging.info('The page is at %s; Ctrl-C ends it.', address)
  studio.warm_up()
  stop.wait()
  studio.close()
  interrupt.leave(0)  # What is being compiled is not waited for.


def _is_loopback(host: str) -> bool:
  try:
    return host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _read_passwords(path: str) -> list[tuple[str, str]]:
  users = []
  for line in pathlib.Path(path).read_text().splitlines():
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
  """An ASGI middleware: what the page itself asks for, nothing else of Gradio.

  Gradio also takes uploads, reads files and addresses that a browser names,
  and offers all as an API. And where the page is for this machine alone, and
  asks for no password, no web site may reach it through a browser.
  """

  def __init__(self, app, is_local: bool):
    """Wraps an application."""
    self._app, self._is_local = app, is_local

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
      return
    headers = {
      name: value.decode('latin-1') for name, value in scope['headers']
    }
    path = scope['path']
    # Whose page asks, where a browser tells, and what this is called there.
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
    elif self._is_local and not all(map(_is_loopback, names)):
      status = 403
    elif has_body and not (length.isdecimal() and int(length) <= _MAX_BODY):
      status = 413
    else:
      # The page is always the same; Gradio would look for a file of its name.
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


def launch(page, host: str, port: int, users: list[tuple[str, str]] | None):
  """Serves a page, in another thread; see `gradio.Blocks.launch`.

  Raises:
    OSError: the port is taken.
  """
  import gradio as gr
  from starlette.middleware import Middleware

  return page.launch(
    server_name=host,
    server_port=port,
    auth=users,
    quiet=True,
    prevent_thread_lock=True,
    state_session_capacity=20,
    css=_CSS,
    # Others' fonts would tell others.
    theme=gr.themes.Default(
      font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']
    ),
    # Gradio's environment variables change none of these.
    share=False,
    allowed_paths=[],
    enable_monitoring=False,
    ssr_mode=False,
    mcp_server=False,
    pwa=False,
    run_history=False,
    footer_links=[],
    app_kwargs={
      'middleware': [
        Middleware(OnlyThePage, is_local=_is_loopback(host) and not users)
      ]
    },
  )


def make_page(studio):
  """The page that orders from a studio, a `gradio.Blocks`."""
  import gradio as gr
  import jax

  from mdm_jax import live
  from mdm_jax.diffusion import samplers

  usual = studio.usual
  jobs: dict[str, live.Job] = {}  # of the browsers that wait for one

  def draw(
    prompt,
    negative_prompt,
    guidance,
    steps,
    sampler,
    threshold,
    seed,
    num_pictures,
    cards,
    request: gr.Request,
  ):
    # A line break in a prompt is a space, as in captions.
    order = live.Order(
      ' '.join(prompt.split()),
      ' '.join(negative_prompt.split()),
      guidance,
      steps,
      sampler,
      threshold,
      seed,
      num_pictures,
    )
    try:
      job = studio.submit(order)
    except ValueError as error:
      yield {status: _error(str(error))}
      return
    jobs[request.session_hash] = job
    begin = time.monotonic()
    buttons = {
      draw_button: gr.update(interactive=False),
      cancel_button: gr.update(interactive=True),
    }
    try:
      for progress in studio.watch(job):
        yield buttons | {
          status: _progress(studio, order, progress),
          preview: _card(order, progress.pictures),
        }
        time.sleep(_FRAME)
    except jax.errors.JaxRuntimeError as error:
      yield {
        preview: '',
        status: _error(
          'The device failed, try fewer pictures: '
          + str(error).partition('\n')[0]
        ),
      }
      return
    finally:
      jobs.pop(request.session_hash, None)
    if progress.step < order.steps:  # Cancelled.
      yield {
        preview: '',
        status: _line(
          f'Cancelled after step {progress.step} of {order.steps}.'
        ),
      }
      return
    cards = _kept([_card(order, progress.pictures, studio), *cards])
    yield {
      preview: '',
      state: cards,
      gallery: ''.join(cards),
      status: _line(
        f'{_count(order.num_pictures)} in '
        f'{time.monotonic() - begin:.1f} s. ' + studio.note(order)
      ),
    }

  def cancel(request: gr.Request):
    if job := jobs.get(request.session_hash):
      job.cancel()

  def show_readiness() -> Iterator[str]:
    if not studio.ready.is_set():
      yield _about(studio, 'Warming up')
      studio.ready.wait()
    yield _about(studio, 'Ready')

  hidden = {'api_visibility': 'private', 'show_progress': 'hidden'}
  with gr.Blocks(title='mdm_jax', analytics_enabled=False) as page:
    about = gr.HTML(_about(studio, 'Loading'))
    with gr.Row():
      with gr.Column(scale=2, min_width=320):
        prompt = gr.Textbox(
          label='Prompt', lines=1, max_lines=4, autofocus=True, elem_id='prompt'
        )
        if examples := studio.examples(_NUM_EXAMPLES):
          gr.Examples(
            examples, prompt, label='For example', api_visibility='private'
          )
        with gr.Row():
          draw_button = gr.Button(
            'Draw', variant='primary', min_width=90, elem_id='draw'
          )
          cancel_button = gr.Button(
            'Cancel', interactive=False, min_width=90, elem_id='cancel'
          )
        negative_prompt = gr.Textbox(
          label='Negative prompt',
          lines=1,
          max_lines=4,
          elem_id='negative_prompt',
          placeholder='what guidance leads away from',
        )
        guidance = gr.Slider(
          0,
          live.MAX_GUIDANCE,
          usual.guidance,
          step=0.1,
          label='Guidance (1 is none)',
          elem_id='guidance',
        )
        with gr.Row():
          steps, num_pictures, seed = (
            gr.Number(
              value, label=label, precision=0, min_width=70, elem_id=name
            )
            for value, label, name in (
              (usual.steps, 'Steps', 'steps'),
              (usual.num_pictures, 'Pictures', 'num_pictures'),
              (usual.seed, 'First seed', 'seed'),
            )
          )
        random = gr.Button('Random seed', size='sm', elem_id='random')
        with gr.Row():
          sampler = gr.Dropdown(
            list(samplers.SAMPLERS),
            value=usual.sampler,
            label='Sampler',
            min_width=90,
            elem_id='sampler',
          )
          threshold = gr.Dropdown(
            list(samplers.THRESHOLDS),
            value=usual.threshold,
            label='Thresholding',
            min_width=90,
            elem_id='threshold',
          )
      with gr.Column(scale=5):
        status = gr.HTML(_line('Nothing has been drawn yet.'), elem_id='status')
        preview = gr.HTML(elem_id='preview')
        gallery = gr.HTML(elem_id='gallery')
    state = gr.State([])

    gr.on(
      [draw_button.click, prompt.submit, negative_prompt.submit],
      draw,
      [
        prompt,
        negative_prompt,
        guidance,
        steps,
        sampler,
        threshold,
        seed,
        num_pictures,
        state,
      ],
      [status, preview, gallery, state, draw_button, cancel_button],
      # The studio has a line, and says where one stands in it.
      concurrency_limit=None,
      trigger_mode='once',
      **hidden,
    ).then(
      lambda: (gr.update(interactive=True), gr.update(interactive=False)),
      None,
      [draw_button, cancel_button],
      **hidden,
    )
    cancel_button.click(cancel, concurrency_limit=None, **hidden)
    random.click(
      None,
      None,
      seed,
      api_visibility='private',
      js='() => Math.floor(Math.random() * 1000000)',
    )
    page.load(show_readiness, None, about, concurrency_limit=None, **hidden)
    page.unload(cancel)
  return page.queue(api_open=False, max_size=64)


def _about(studio, state: str) -> str:
  return (
    f'<h1>mdm_jax</h1><div class="mdm-about" id="about">'
    f'<b>{state}</b>: {html.escape(studio.about)}</div>'
  )


def _line(text: str, kind: str = 'line') -> str:
  return f'<div class="mdm-{kind}" role="status">{html.escape(text)}</div>'


def _error(text: str) -> str:
  return _line(text, 'error')


def _count(num_pictures: int) -> str:
  return '1 picture' if num_pictures == 1 else f'{num_pictures} pictures'


def _progress(studio, order, progress) -> str:
  if progress.ahead:
    return _line(f'Waiting: {progress.ahead} before you.')
  if not progress.step:
    return _line(
      'Starting. The first pictures by a sampler, a thresholding or in a '
      'number take some seconds longer.'
      if studio.ready.is_set()
      else 'Warming up: compiling …'
    )
  return (
    _line(f'Step {progress.step} of {order.steps}')
    + '<div class="mdm-bar"><div style="width: '
    f'{100 * progress.step / order.steps:.0f}%"></div></div>'
  )


def _kept(cards: list[str]) -> list[str]:
  """The newest, as many as a gallery holds; at least one."""
  size = 0
  for i, card in enumerate(cards):
    size += len(card)
    if i and size > _MAX_GALLERY:
      return cards[:i]
  return cards


def _card(order, pictures, studio=None) -> str:
  """Pictures with all levels side by side, as HTML.

  Args:
    order: what was asked for.
    pictures: uint8 [N, H_r, H_r, 3], coarse to fine.
    studio: knows the commands; None while they are being drawn.
  """
  if not pictures:
    return ''
  figures = []
  for i in range(order.num_pictures):
    seed, below = order.seed + i, ''
    tiles = [(f'{level.shape[1]} px', level[i]) for level in pictures]
    if studio:
      sources = [_png(tile) for _, tile in tiles]
      below = ''.join(
        f'<a download="seed_{seed}_{level.shape[1]}.png" href="{source}">'
        f'{name}</a>'
        for (name, _), level, source in zip(tiles, pictures, sources)
      )
      below = (
        f'{below}<details><summary>command</summary>'
        f'<code>{html.escape(studio.command(order, i))}</code></details>'
      )
    else:
      sources = [_png(_preview(tile)) for _, tile in tiles]
    images = ''.join(
      f'<img alt="{name}" title="{name}" src="{source}"{pixels}>'
      for (name, tile), source in zip(tiles, sources)
      for pixels in [' class="mdm-pixels"' if len(tile) <= 256 else '']
    )
    figures.append(
      f'<figure><div class="mdm-levels">{images}</div><figcaption '
      f'class="mdm-small">seed {seed} &nbsp; {below}</figcaption></figure>'
    )
  settings = (
    f'{order.sampler}, {order.steps} steps, guidance '
    f'{order.guidance:g}, thresholding {order.threshold}'
  )
  if order.negative_prompt:
    settings += f', away from: {order.negative_prompt}'
  few = ' mdm-few' if order.num_pictures <= _FEW else ''
  title = html.escape(order.prompt) or '<i>the empty prompt</i>'
  return (
    f'<div class="mdm-card"><b>{title}</b>'
    f'<div class="mdm-small">{html.escape(settings)}</div>'
    f'<div class="mdm-figures{few}">{"".join(figures)}</div></div>'
  )


def _preview(image):
  """Averaged down if it is large, [H, H, 3]."""
  factor = -(-len(image) // _MAX_PREVIEW)
  side = len(image) // factor * factor
  return (
    image[:side, :side]
    .reshape(side // factor, factor, side // factor, factor, 3)
    .mean((1, 3))
    .astype('uint8')
  )


def _png(image) -> str:
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


if __name__ == '__main__':
  app.run(main)
