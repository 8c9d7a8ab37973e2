"""The demo's page, in Gradio: inputs, live previews and a gallery."""

from collections.abc import Callable, Iterator
import contextlib
import json
import time
import types
from typing import Any

import gradio as gr
import jax
from starlette.requests import HTTPConnection

from mdm_jax.diffusion import samplers
from mdm_jax.serving import access, assets, html
from mdm_jax.serving.model_card import ModelCard
from mdm_jax.serving.queue import (
  MAX_GUIDANCE,
  Job,
  Request,
  SampleQueue,
  WeightsUnavailable,
)

_FRAME = 0.1  # seconds between two previews
_MAX_BACKLOG = 8  # messages that wait for a slow browser
_LEVELS = ['All levels', 'Finest level only']
_HIDDEN = {'api_visibility': 'private', 'show_progress': 'hidden'}


def launch(
  page,
  listeners: access.Listeners,
  host: str,
  port: int,
  users: list[tuple[str, str]] | None,
):
  """Serves a page in another thread, see `gradio.Blocks.launch`.

  Args:
    page: from `make_page`.
    listeners: of `make_page`.
    host: address to listen at.
    port: TCP port to listen at.
    users: pairs of a name and a password; None for no login.

  Raises:
    OSError: the port is in use.
  """

  @contextlib.asynccontextmanager
  async def guarded(app):
    # Around Gradio's own middleware, which fails on malformed headers. The
    # server accepts connections after this.
    app.middleware_stack = access.OnlyThePage(
      app.middleware_stack,
      _describe(app, page),
      listeners,
      is_local=access.is_loopback(host) and not users,
    )
    yield

  return page.launch(
    server_name=host,
    server_port=port,
    auth=users,
    quiet=True,
    prevent_thread_lock=True,
    state_session_capacity=20,
    css=assets.CSS,
    head=assets.SCRIPT,
    # System fonts: font servers would learn of every user.
    theme=gr.themes.Default(
      font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']
    ),
    # Given, so that Gradio's environment variables change none of them.
    share=False,
    allowed_paths=[],
    enable_monitoring=False,
    ssr_mode=False,
    mcp_server=False,
    pwa=False,
    run_history=False,
    footer_links=[],
    app_kwargs={'lifespan': guarded},
  )


def _describe(app, page: gr.Blocks) -> access.Page:
  """What the middleware has to know of Gradio's application and the page."""
  queue = page._queue

  def has_entered(scope) -> bool:
    if not app.auth:
      return True
    # `launch` asks for it once, without a password.
    if scope['path'].endswith('/startup-events'):
      return not app.startup_events_triggered
    cookies = HTTPConnection(scope).cookies
    names = (
      f'access-token-{kind}{app.cookie_id}' for kind in ('', 'unsecure-')
    )
    return any(cookies.get(name) in app.tokens for name in names)

  async def forget(session: str) -> None:
    await queue.clean_events(session_hash=session)
    queue.pending_messages_per_session.pop(session, None)
    queue.pending_event_ids_session.pop(session, None)

  return access.Page(
    {
      index: [_check_of(component) for component in function.inputs]
      for index, function in page.fns.items()
      if function.fn
    },
    lambda session: session in queue.pending_messages_per_session,
    has_entered,
    forget,
  )


def _check_of(component) -> Callable[[Any], bool]:
  """Whether a value that a browser sends is one of a component."""
  match component:
    case gr.Textbox():
      return lambda value: isinstance(value, str)
    case gr.Dropdown():
      known = [value for _, value in component.choices]
      return lambda value: isinstance(value, str) and value in known
    case gr.Number():
      return lambda value: value is None or _is_number(value, -(2**53), 2**53)
    case gr.Slider():
      least, most = component.minimum, component.maximum
      return lambda value: _is_number(value, least, most)
    case gr.Dataset():
      count = len(component.samples)
      return lambda value: type(value) is int and 0 <= value < count
    case gr.State():
      return lambda value: value is None  # It is kept here.
  raise TypeError(f'no check of {component}')


def _is_number(value: Any, least: float, most: float) -> bool:
  return type(value) in (int, float) and least <= value <= most


def make_page(
  queue: SampleQueue, listeners: access.Listeners, card: ModelCard
) -> gr.Blocks:
  """Makes the page, which submits requests to a queue.

  A request is dropped when the browser that sent it has left `listeners`.
  """
  with gr.Blocks(title='mdm_jax', analytics_enabled=False) as page:
    about = gr.HTML(html.about(queue, 'Loading'))
    gr.HTML(html.line(card.summary))
    with gr.Accordion('What the model knows', open=False, elem_id='card'):
      gr.HTML(html.model_card(card))
    # `assets.CSS` orders these three, by the width of the screen.
    with gr.Row(elem_id='main'):
      with gr.Column(elem_id='ask'):
        inputs = _add_prompt(card)
      with gr.Column(elem_id='results'):
        outputs = _add_outputs()
      with gr.Column(elem_id='settings'):
        inputs = types.SimpleNamespace(**vars(inputs), **_add_settings(queue))
    _connect(page, queue, listeners, about, inputs, outputs)
  return page.queue(api_open=False, max_size=64)


def _add_prompt(card: ModelCard) -> types.SimpleNamespace:
  """Adds the prompt, examples of one, and the buttons."""
  prompt = gr.Textbox(
    label='Prompt',
    info='What the images should show.',
    lines=1,
    max_lines=4,
    autofocus=True,
    elem_id='prompt',
  )
  if card.examples:
    with gr.Column(elem_id='examples', min_width=0):
      for title, prompts in card.examples.items():
        gr.HTML(html.line(title, 'small'))
        for text in prompts:
          gr.Button(html.printable(text), size='sm').click(
            None,
            None,
            prompt,
            api_visibility='private',
            js=f'() => {json.dumps(text)}',
          )
  with gr.Row():
    generate = gr.Button(
      'Generate', variant='primary', min_width=90, elem_id='generate'
    )
    cancel = gr.Button(
      'Cancel', interactive=False, min_width=90, elem_id='cancel'
    )
  return types.SimpleNamespace(prompt=prompt, generate=generate, cancel=cancel)


def _add_settings(queue: SampleQueue) -> dict[str, Any]:
  """Adds all other controls of a request."""
  default = queue.default_request
  with gr.Row():
    num_images = gr.Number(
      default.num_images,
      label='Images',
      info=f'How many to make, 1 to {queue.max_images}.',
      precision=0,
      min_width=120,
      elem_id='num_images',
    )
    steps = gr.Number(
      default.steps,
      label='Steps',
      info='More are slower, and often better.',
      precision=0,
      min_width=120,
      elem_id='steps',
    )
  guidance = gr.Slider(
    0,
    MAX_GUIDANCE,
    default.guidance,
    step=0.1,
    label='Guidance (CFG)',
    info='How strictly the images follow the prompt: 1 is no guidance; much '
    'of it makes them all alike and overdrawn.',
    elem_id='guidance',
  )
  seed = gr.Number(
    default.seed,
    label='First seed',
    info='Decides the noise to start from: with the same seed and settings the '
    'image is the same. Each further image has the next seed.',
    precision=0,
    elem_id='seed',
  )
  random = gr.Button('Random seed', size='sm', elem_id='random')
  negative_prompt = gr.Textbox(
    label='Negative prompt',
    info='What the images should not show: guidance leads away from it.',
    lines=1,
    max_lines=4,
    elem_id='negative_prompt',
  )
  sampler, threshold, weights = _add_choices(queue)
  return {
    'random': random,
    'seed': seed,
    'negative_prompt': negative_prompt,
    # In the order of the fields of `Request` after the prompt.
    'settings': [
      negative_prompt,
      guidance,
      steps,
      sampler,
      threshold,
      seed,
      num_images,
      weights,
    ],
  }


def _add_choices(queue: SampleQueue) -> tuple[gr.Dropdown, ...]:
  """Adds the controls that are one of some names."""
  default = queue.default_request
  weights = gr.Dropdown(
    queue.choices,
    value=queue.choices[0],
    label='Checkpoint',
    info='Which weights to use: an earlier stage of training makes smaller '
    'images; an EMA is an average of the weights over training.',
    elem_id='weights',
  )
  sampler = gr.Dropdown(
    list(samplers.SAMPLERS),
    value=default.sampler,
    label='Sampler',
    info='How the noise is removed: ddim, heun and dpm give the same image '
    'each time; ddpm and dpm_sde add fresh noise at every step.',
    elem_id='sampler',
  )
  threshold = gr.Dropdown(
    list(samplers.THRESHOLDS),
    value=default.threshold,
    label='Threshold',
    info='How predicted pixels are kept in range: cut off (clip), scaled down '
    '(dynamic), or not at all.',
    elem_id='threshold',
  )
  return sampler, threshold, weights


def _add_outputs() -> types.SimpleNamespace:
  """Adds status, preview and gallery to the page."""
  status = gr.HTML(
    html.line('No images yet: choose a prompt, and press Generate.'),
    elem_id='status',
  )
  levels = gr.Radio(
    _LEVELS,
    value=_LEVELS[0],
    show_label=False,
    container=False,
    elem_id='levels',
  )
  levels.change(
    None,
    levels,
    api_visibility='private',
    js=f"""shown => document.querySelector('#results').classList.toggle(
      'mdm-finest', shown === {json.dumps(_LEVELS[1])})""",
  )
  return types.SimpleNamespace(
    status=status,
    preview=gr.HTML(elem_id='preview'),
    gallery=gr.HTML(elem_id='gallery'),
    cards=gr.State([]),
  )


def _connect(
  page,
  queue: SampleQueue,
  listeners: access.Listeners,
  about,
  inputs,
  outputs,
) -> None:
  """Connects the controls of the page with the queue."""
  buttons = [inputs.generate, inputs.cancel]
  generate, cancel, show_readiness = _make_handlers(
    page, queue, listeners, inputs, outputs
  )

  def end():
    # Whatever became of the request, and of the connection meanwhile.
    state = 'Ready' if queue.ready.is_set() else 'Warming up'
    return (
      html.about(queue, state),
      '',
      gr.update(interactive=True),
      gr.update(interactive=False),
    )

  generated = gr.on(
    [
      inputs.generate.click,
      inputs.prompt.submit,
      inputs.negative_prompt.submit,
    ],
    generate,
    [inputs.prompt, *inputs.settings, outputs.cards],
    [outputs.status, outputs.preview, outputs.gallery, outputs.cards, *buttons],
    # `SampleQueue` limits the requests, not Gradio's queue.
    concurrency_limit=None,
    trigger_mode='once',
    **_HIDDEN,
  )
  ended = [about, outputs.preview, *buttons]
  generated.then(end, None, ended, **_HIDDEN)
  generated.failure(
    lambda: (html.error('The demo failed: its log says why.'), *end()),
    None,
    [outputs.status, *ended],
    **_HIDDEN,
  )
  inputs.cancel.click(cancel, concurrency_limit=None, **_HIDDEN)
  inputs.random.click(
    None,
    None,
    inputs.seed,
    api_visibility='private',
    js='() => Math.floor(Math.random() * 1000000)',
  )
  page.load(show_readiness, None, about, concurrency_limit=None, **_HIDDEN)
  page.unload(cancel)


def _make_handlers(
  page,
  queue: SampleQueue,
  listeners: access.Listeners,
  inputs,
  outputs,
) -> tuple[Callable, Callable, Callable]:
  """Functions that Gradio calls: generate, cancel, show readiness."""

  # Gradio passes the browser's HTTP request because of the annotation.
  def generate(
    prompt,
    negative_prompt,
    guidance,
    steps,
    sampler,
    threshold,
    seed,
    num_images,
    weights,
    cards,
    browser: gr.Request,
  ):
    request = Request(
      # Line breaks in prompts are spaces, as in captions.
      prompt=' '.join(prompt.split()),
      negative_prompt=' '.join(negative_prompt.split()),
      guidance=guidance,
      steps=steps,
      sampler=sampler,
      threshold=threshold,
      seed=seed,
      num_images=num_images,
      weights=weights,
    )
    session = browser.session_hash
    queue.cancel(session)  # The page has one request at a time.
    try:
      job = queue.submit(request, session, lambda: listeners.is_there(session))
    except ValueError as error:
      yield {outputs.status: html.error(str(error))}
      return
    messages = page._queue.pending_messages_per_session.get(session)
    yield from _generate(
      queue,
      job,
      inputs,
      outputs,
      cards,
      # What a slow browser does not fetch would be kept for it.
      lambda: messages is not None and messages.qsize() > _MAX_BACKLOG,
    )

  def cancel(browser: gr.Request):
    queue.cancel(browser.session_hash)

  def show_readiness(browser: gr.Request) -> Iterator[str]:
    if not queue.ready.is_set():
      yield html.about(queue, 'Warming up')
    while not queue.ready.wait(1):
      if not listeners.is_there(browser.session_hash):
        return
    yield html.about(queue, 'Ready')

  return generate, cancel, show_readiness


def _generate(
  queue: SampleQueue,
  job: Job,
  inputs: types.SimpleNamespace,
  outputs: types.SimpleNamespace,
  cards: list[str],
  is_behind: Callable[[], bool],
) -> Iterator[dict]:
  """Waits for a job, and yields what changes on the page.

  Args:
    queue: the queue that samples.
    job: the job of the user's request.
    inputs, outputs: components of the page.
    cards: HTML of the cards in the gallery, newest first.
    is_behind: whether the browser has not fetched many changes.
  """
  request = job.request
  begin = time.monotonic()
  buttons = {
    inputs.generate: gr.update(interactive=False),
    inputs.cancel: gr.update(interactive=True),
  }
  try:
    for progress in queue.watch(job):
      if is_behind():
        continue
      yield buttons | {
        outputs.status: html.progress_line(queue, request, progress),
        outputs.preview: html.preview(request, progress.images),
      }
      time.sleep(_FRAME)
  except WeightsUnavailable as error:
    yield {outputs.preview: '', outputs.status: html.error(str(error))}
    return
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).partition('\n')[0]
    yield {
      outputs.preview: '',
      outputs.status: html.error(
        f'The device failed. Try fewer images. {reason}'
      ),
    }
    return
  if progress.step < request.steps:  # Cancelled.
    text = 'Cancelled before the first step.'
    if progress.step:
      text = f'Cancelled after step {progress.step} of {request.steps}.'
    yield {outputs.preview: '', outputs.status: html.line(text)}
    return
  cards = html.newest_cards([html.finished(queue, job), *cards])
  seconds = time.monotonic() - begin
  yield {
    outputs.preview: '',
    outputs.cards: cards,
    outputs.gallery: html.gallery(cards),
    outputs.status: html.line(
      f'{html.count_images(request.num_images)} in {seconds:.1f} s. '
      + queue.note(request)
    ),
  }
