"""HTML of the demo's page: status lines, and cards with images."""

import base64
import html
import io

import numpy as np
from PIL import Image

from mdm_jax.runtime.printable import printable
from mdm_jax.serving.queue import Progress, Request, SampleQueue

_MAX_PREVIEW = 256  # px; larger levels are averaged down in previews
_FEW = 4  # most images of a request that are shown larger
_MAX_GALLERY = 2**24  # most characters of HTML in the gallery

CSS = """
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
.mdm-samples {display: flex; flex-wrap: wrap; gap: 16px; margin-top: 8px}
.mdm-samples figure {margin: 0; max-width: 100%}
.mdm-levels {display: flex; gap: 3px}
.mdm-levels img {width: 128px; height: 128px; margin: 0; border-radius: 3px;
  background: var(--border-color-primary)}
.mdm-few img {width: 192px; height: 192px}
.mdm-levels img.mdm-pixels {image-rendering: pixelated}
.mdm-samples a {margin-right: 10px; text-decoration: underline}
.mdm-samples code {display: block; user-select: all; white-space: pre-wrap;
  overflow-wrap: anywhere; padding: 8px; border-radius: 4px; width: 0;
  min-width: 100%; background: var(--background-fill-secondary)}
"""


def escape(text: str) -> str:
  """A text as HTML, with escapes for what is no character to see."""
  return html.escape(printable(text))


def about(queue: SampleQueue, state: str) -> str:
  """The head of the page: the state of the demo and the model."""
  return (
    f'<h1>mdm_jax</h1><div class="mdm-about" id="about">'
    f'<b>{state}</b>: {escape(queue.about)}</div>'
  )


def line(text: str, kind: str = 'line') -> str:
  """A status line; `kind` selects its CSS class."""
  return f'<div class="mdm-{kind}" role="status">{escape(text)}</div>'


def error(text: str) -> str:
  """A status line about an error."""
  return line(text, 'error')


def count_images(num_images: int) -> str:
  """A number of images in words: '1 image', '4 images'."""
  return '1 image' if num_images == 1 else f'{num_images} images'


def progress_line(
  queue: SampleQueue, request: Request, progress: Progress
) -> str:
  """A status line: the place in the queue, or the step with a progress bar."""
  if progress.ahead:
    return line(f'Waiting: {progress.ahead} requests before yours.')
  if not progress.step:
    return line(
      'Starting. The first request with another sampler, threshold or number '
      'of images takes some seconds longer.'
      if queue.ready.is_set()
      else 'Warming up: compiling …'
    )
  return (
    line(f'Step {progress.step} of {request.steps}')
    + '<div class="mdm-bar"><div style="width: '
    f'{100 * progress.step / request.steps:.0f}%"></div></div>'
  )


def newest_cards(cards: list[str]) -> list[str]:
  """The newest cards that fit into the gallery, at least one.

  Args:
    cards: HTML of the cards, newest first.
  """
  size = 0
  for i, text in enumerate(cards):
    size += len(text)
    if i and size > _MAX_GALLERY:
      return cards[:i]
  return cards


def card(
  request: Request,
  images: tuple[np.ndarray, ...],
  queue: SampleQueue | None = None,
) -> str:
  """A card with the images of a request, all levels side by side.

  Args:
    request: the request.
    images: uint8 [N, H_r, H_r, 3], coarse to fine.
    queue: adds downloads and commands to finished images; None for a preview.
  """
  if not images:
    return ''
  samples = ''.join(
    _sample(request, i, [level[i] for level in images], queue)
    for i in range(request.num_images)
  )
  settings = (
    f'{request.sampler}, {request.steps} steps, guidance '
    f'{request.guidance:g}, threshold {request.threshold}'
  )
  settings = escape(settings)
  # Right-to-left text must not reorder what is around it.
  if request.negative_prompt:
    negative = escape(request.negative_prompt)
    settings += f', negative prompt: <bdi>{negative}</bdi>'
  few = ' mdm-few' if request.num_images <= _FEW else ''
  title = f'<bdi>{escape(request.prompt)}</bdi>'
  if not request.prompt:
    title = '<i>the empty prompt</i>'
  return (
    f'<div class="mdm-card"><b>{title}</b>'
    f'<div class="mdm-small">{settings}</div>'
    f'<div class="mdm-samples{few}">{samples}</div></div>'
  )


def _sample(
  request: Request,
  i: int,
  levels: list[np.ndarray],
  queue: SampleQueue | None,
) -> str:
  """One sample with its seed and, if finished, its downloads and command."""
  seed, below = request.seed + i, ''
  names = [f'{len(level)} px' for level in levels]
  if queue:
    sources = [_png(level) for level in levels]
    links = ''.join(
      f'<a download="seed_{seed}_{len(level)}.png" href="{source}">{name}</a>'
      for name, level, source in zip(names, levels, sources)
    )
    below = (
      f'{links}<details><summary>command</summary>'
      f'<code>{escape(queue.command(request, i))}</code></details>'
    )
  else:
    sources = [_png(_preview(level)) for level in levels]
  images = ''.join(
    f'<img alt="{name}" title="{name}" src="{source}"{pixels}>'
    for name, level, source in zip(names, levels, sources)
    for pixels in [' class="mdm-pixels"' if len(level) <= 256 else '']
  )
  return (
    f'<figure><div class="mdm-levels">{images}</div><figcaption '
    f'class="mdm-small">seed {seed} &nbsp; {below}</figcaption></figure>'
  )


def _preview(image: np.ndarray) -> np.ndarray:
  """Averages a large image [H, H, 3] down to at most `_MAX_PREVIEW` pixels."""
  factor = -(-len(image) // _MAX_PREVIEW)
  side = len(image) // factor * factor
  return (
    image[:side, :side]
    .reshape(side // factor, factor, side // factor, factor, 3)
    .mean((1, 3))
    .astype('uint8')
  )


def _png(image: np.ndarray) -> str:
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()
