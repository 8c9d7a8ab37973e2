"""The demo's page, in Gradio: inputs, live previews and a gallery."""

from collections.abc import Iterator
import time
import types

import gradio as gr
import jax
from starlette.middleware import Middleware

from mdm_jax.diffusion import samplers
from mdm_jax.serving import html
from mdm_jax.serving.access import OnlyThePage, is_loopback
from mdm_jax.serving.queue import MAX_GUIDANCE, Job, Request, SampleQueue

_FRAME = 0.1  # seconds between two previews
_NUM_EXAMPLES = 5
_HIDDEN = {'api_visibility': 'private', 'show_progress': 'hidden'}


def launch(page, host: str, port: int, users: list[tuple[str, str]] | None):
  """Serves a page in another thread, see `gradio.Blocks.launch`.

  Args:
    page: from `make_page`.
    host: address to listen at.
    port: TCP port to listen at.
    users: pairs of a name and a password; None for no login.

  Raises:
    OSError: the port is in use.
  """
  return page.launch(
    server_name=host,
    server_port=port,
    auth=users,
    quiet=True,
    prevent_thread_lock=True,
    state_session_capacity=20,
    css=html.CSS,
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
    app_kwargs={
      'middleware': [
        Middleware(OnlyThePage, is_local=is_loopback(host) and not users)
      ]
    },
  )


def make_page(queue: SampleQueue) -> gr.Blocks:
  """Makes the page, which submits requests to a queue."""
  with gr.Blocks(title='mdm_jax', analytics_enabled=False) as page:
    about = gr.HTML(html.about(queue, 'Loading'))
    with gr.Row():
      with gr.Column(scale=2, min_width=320):
        inputs = _add_inputs(queue)
      with gr.Column(scale=5):
        outputs = _add_outputs()
    _connect(page, queue, about, inputs, outputs)
  return page.queue(api_open=False, max_size=64)


def _add_inputs(queue: SampleQueue) -> types.SimpleNamespace:
  """Adds the controls of a request to the page."""
  default = queue.default_request
  prompt = gr.Textbox(
    label='Prompt', lines=1, max_lines=4, autofocus=True, elem_id='prompt'
  )
  if examples := queue.examples(_NUM_EXAMPLES):
    gr.Examples(examples, prompt, label='For example', api_visibility='private')
  with gr.Row():
    generate = gr.Button(
      'Generate', variant='primary', min_width=90, elem_id='generate'
    )
    cancel = gr.Button(
      'Cancel', interactive=False, min_width=90, elem_id='cancel'
    )
  negative_prompt = gr.Textbox(
    label='Negative prompt',
    lines=1,
    max_lines=4,
    elem_id='negative_prompt',
    placeholder='content that guidance leads away from',
  )
  guidance = gr.Slider(
    0,
    MAX_GUIDANCE,
    default.guidance,
    step=0.1,
    label='Guidance (1 is none)',
    elem_id='guidance',
  )
  with gr.Row():
    steps, num_images, seed = (
      gr.Number(value, label=label, precision=0, min_width=70, elem_id=name)
      for value, label, name in (
        (default.steps, 'Steps', 'steps'),
        (default.num_images, 'Images', 'num_images'),
        (default.seed, 'First seed', 'seed'),
      )
    )
  random = gr.Button('Random seed', size='sm', elem_id='random')
  with gr.Row():
    sampler, threshold = (
      gr.Dropdown(
        list(names), value=value, label=label, min_width=90, elem_id=name
      )
      for names, value, label, name in (
        (samplers.SAMPLERS, default.sampler, 'Sampler', 'sampler'),
        (samplers.THRESHOLDS, default.threshold, 'Threshold', 'threshold'),
      )
    )
  # In the order of the fields of `Request`.
  request = [prompt, negative_prompt, guidance, steps, sampler, threshold, seed]
  return types.SimpleNamespace(
    prompt=prompt,
    negative_prompt=negative_prompt,
    generate=generate,
    cancel=cancel,
    random=random,
    seed=seed,
    request=[*request, num_images],
  )


def _add_outputs() -> types.SimpleNamespace:
  """Adds status, preview and gallery to the page."""
  return types.SimpleNamespace(
    status=gr.HTML(
      html.line('No images have been generated yet.'), elem_id='status'
    ),
    preview=gr.HTML(elem_id='preview'),
    gallery=gr.HTML(elem_id='gallery'),
    cards=gr.State([]),
  )


def _connect(page, queue: SampleQueue, about, inputs, outputs) -> None:
  """Connects the controls of the page with the queue."""
  jobs: dict[str, Job] = {}  # pending jobs by browser session
  buttons = [inputs.generate, inputs.cancel]

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
    )
    yield from _generate(
      queue, jobs, inputs, outputs, request, cards, browser.session_hash
    )

  def cancel(browser: gr.Request):
    if job := jobs.get(browser.session_hash):
      job.cancel()

  def show_readiness() -> Iterator[str]:
    if not queue.ready.is_set():
      yield html.about(queue, 'Warming up')
      queue.ready.wait()
    yield html.about(queue, 'Ready')

  gr.on(
    [
      inputs.generate.click,
      inputs.prompt.submit,
      inputs.negative_prompt.submit,
    ],
    generate,
    [*inputs.request, outputs.cards],
    [outputs.status, outputs.preview, outputs.gallery, outputs.cards, *buttons],
    # `SampleQueue` limits the requests, not Gradio's queue.
    concurrency_limit=None,
    trigger_mode='once',
    **_HIDDEN,
  ).then(
    lambda: (gr.update(interactive=True), gr.update(interactive=False)),
    None,
    buttons,
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


def _generate(
  queue: SampleQueue,
  jobs: dict[str, Job],
  inputs: types.SimpleNamespace,
  outputs: types.SimpleNamespace,
  request: Request,
  cards: list[str],
  browser: str,
) -> Iterator[dict]:
  """Samples a request, and yields what changes on the page.

  Args:
    queue: the queue that samples.
    jobs: receives the job by `browser`, for the cancel button.
    inputs, outputs: components of the page.
    request: the user's request.
    cards: HTML of the cards in the gallery, newest first.
    browser: identifies the browser's session.
  """
  try:
    job = queue.submit(request)
  except ValueError as error:
    yield {outputs.status: html.error(str(error))}
    return
  jobs[browser] = job
  begin = time.monotonic()
  buttons = {
    inputs.generate: gr.update(interactive=False),
    inputs.cancel: gr.update(interactive=True),
  }
  try:
    for progress in queue.watch(job):
      yield buttons | {
        outputs.status: html.progress_line(queue, request, progress),
        outputs.preview: html.card(request, progress.images),
      }
      time.sleep(_FRAME)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).partition('\n')[0]
    yield {
      outputs.preview: '',
      outputs.status: html.error(
        f'The device failed. Try fewer images. {reason}'
      ),
    }
    return
  finally:
    jobs.pop(browser, None)
  if progress.step < request.steps:  # Cancelled.
    text = f'Cancelled after step {progress.step} of {request.steps}.'
    yield {outputs.preview: '', outputs.status: html.line(text)}
    return
  cards = html.newest_cards(
    [html.card(request, progress.images, queue), *cards]
  )
  seconds = time.monotonic() - begin
  yield {
    outputs.preview: '',
    outputs.cards: cards,
    outputs.gallery: ''.join(cards),
    outputs.status: html.line(
      f'{html.count_images(request.num_images)} in {seconds:.1f} s. '
      + queue.note(request)
    ),
  }
