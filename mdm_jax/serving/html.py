"""HTML of the demo's page: status lines, and cards with images."""

import base64
import dataclasses
import html
import io
import json

import numpy as np
from PIL import Image

from mdm_jax import mixed_batch
from mdm_jax.report import grid
from mdm_jax.runtime.printable import printable
from mdm_jax.serving import film
from mdm_jax.serving.model_card import ModelCard
from mdm_jax.serving.queue import Job, Progress, Request, SampleQueue

_MAX_PREVIEW = 256  # px; larger levels are averaged down in previews
_LOSSLESS = 32  # px up to which frames are PNG, as each pixel is seen
_FEW = 4  # most images of a request that are shown larger
_MAX_GALLERY = 2**24  # most characters of HTML in the gallery


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
    others = (
      '1 request' if progress.ahead == 1 else f'{progress.ahead} requests'
    )
    return line(f'Waiting: {others} before yours.')
  if progress.state == 'loading':
    return line(f'Loading the weights: {request.weights} …')
  if progress.state == 'waiting' and not queue.ready.is_set():
    return line('Warming up: compiling …')
  if not progress.step:
    return line(
      'Starting. The first request with another checkpoint, sampler, threshold '
      'or number of images, or with guidance 1, takes some seconds longer.'
    )
  return (
    line(f'Step {progress.step} of {request.steps}')
    + '<div class="mdm-bar"><div style="width: '
    f'{100 * progress.step / request.steps:.0f}%"></div></div>'
  )


def model_card(card: ModelCard) -> str:
  """What a model knows: its words and facts, in two tables."""
  words = ''.join(
    f'<tr><th>{escape(kind)}</th><td class="mdm-words">'
    + ' '.join(f'<span>{escape(word)}</span>' for word in some)
    + '</td></tr>'
    for kind, some in card.words.items()
  )
  facts = ''.join(
    f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>'
    for name, value in card.facts.items()
  )
  note = f'<p class="mdm-small">{escape(card.note)}</p>' if card.note else ''
  return f'<table class="mdm-facts">{words}</table>{note}' + (
    f'<table class="mdm-facts">{facts}</table>'
  )


def gallery(cards: list[str]) -> str:
  """The cards, newest first, with a download of all if there are several."""
  button = ''
  if len(cards) > 1:
    button = _download('Download everything (ZIP)')
  return f'<div>{button}{"".join(cards)}</div>'


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


def preview(request: Request, images: tuple[np.ndarray, ...]) -> str:
  """A card with the images of a request that is being sampled.

  Args:
    request: the request.
    images: uint8 [N, H_r, H_r, 3], or clips, coarse to fine; empty before there
      are any.
  """
  if not images:
    return ''
  samples = [
    _figure(
      [
        _png(level[i])
        for level in (film.shrink(x, _MAX_PREVIEW) for x in images)
      ],
      [level.shape[-2] for level in images],
      f'seed {request.seed + i}',
    )
    for i in range(request.num_images)
  ]
  return _card(request, request.weights, ''.join(samples))


def finished(queue: SampleQueue, job: Job) -> str:
  """A card with the images of a finished job, all levels side by side.

  Each image has its PNG files and the command that samples it again; below is
  what the sampler saw and predicted at its steps.
  """
  request = job.request
  samples, commands = [], []
  for i in range(request.num_images):
    seed = request.seed + i
    commands.append(queue.command(request, i))
    sides = [level.shape[-2] for level in job.images]
    names = mixed_batch.image_level_names([x.shape[1:] for x in job.images])
    sources = [_png(level[i]) for level in job.images]
    links = ''.join(
      f'<a download="seed_{seed}_{name}.png" href="{source}">{side} px PNG</a>'
      for name, side, source in zip(names, sides, sources)
    )
    below = (
      f'seed {seed} &nbsp; {links}<details><summary>command</summary>'
      f'<code>{escape(commands[-1])}</code></details>'
    )
    samples.append(_figure(sources, sides, below))
  settings = dataclasses.asdict(request) | {
    'model': job.model,
    'commands': commands,
  }
  # Weights that were read later than they were listed may be of a later step.
  weights = 'stage {stage}, {weights}, step {step:,}'.format(**job.model)
  return _card(
    request,
    weights,
    ''.join(samples),
    below=_film(job),
    button=_download('Download (ZIP)'),
    data=f' data-settings="{html.escape(json.dumps(settings))}"',
  )


def _card(
  request: Request,
  weights: str,
  samples: str,
  below: str = '',
  button: str = '',
  data: str = '',
) -> str:
  settings = escape(
    f'{weights}; {request.sampler}, {request.steps} steps, guidance '
    f'{request.guidance:g}, threshold {request.threshold}'
  )
  # Right-to-left text must not reorder what is around it.
  if request.negative_prompt:
    negative = escape(request.negative_prompt)
    settings += f', negative prompt: <bdi>{negative}</bdi>'
  few = ' mdm-few' if request.num_images <= _FEW else ''
  title = f'<bdi>{escape(request.prompt)}</bdi>'
  if not request.prompt:
    title = '<i>the empty prompt</i>'
  return (
    f'<div class="mdm-card"{data}><b>{title}</b>'
    f'<div class="mdm-small">{settings} {button}</div>'
    f'<div class="mdm-samples{few}">{samples}</div>{below}</div>'
  )


def _download(text: str) -> str:
  return (
    f'<button class="mdm-button" onclick="mdm.download(this)">{text}</button>'
  )


def _figure(sources: list[str], sides: list[int], below: str) -> str:
  """One sample: its levels side by side, and HTML below them."""
  images = ''.join(
    f'<img alt="{side} px" title="{side} px" src="{source}"{pixels}>'
    for side, source in zip(sides, sources)
    for pixels in [' class="mdm-pixels"' if side <= 256 else '']
  )
  return (
    f'<figure><div class="mdm-levels">{images}</div><figcaption '
    f'class="mdm-small">{below}</figcaption></figure>'
  )


def _film(job: Job) -> str:
  """A slider over the sampling steps: x_t and x0 of each sample and level."""
  sides = [level.shape[-2] for level in job.images]
  labels = [
    f'Step {frame.step} of {job.request.steps}: log-SNR '
    + ', '.join(
      # In a cascade only the finest level still has noise.
      f'{value:.1f} at {side} px'
      for value, side in zip(frame.log_snr, sides[-len(frame.log_snr) :])
    )
    for frame in job.film
  ]
  figures = []
  for i in range(min(job.request.num_images, film.MAX_IMAGES)):
    seed = job.request.seed + i
    rows = ''.join(
      f'<div><div class="mdm-levels">{strips}</div>'
      f'<div class="mdm-small">{name}</div></div>'
      for name, kind in ((f'x_t of seed {seed}', 'x_t'), ('predicted x0', 'x0'))
      for strips in [
        ''.join(
          '<div class="mdm-frame" style="background-image: url('
          f'{_strip([level[i] for level in levels])})"></div>'
          for levels in zip(*(getattr(frame, kind) for frame in job.film))
        )
      ]
    )
    figures.append(f'<div class="mdm-pair">{rows}</div>')
  last = len(labels) - 1
  return (
    '<details class="mdm-film" '
    f'data-labels="{html.escape(json.dumps(labels))}"><summary>From noise to '
    'images, step by step</summary><div class="mdm-small">At each step the '
    'network is given noisy images (x_t) and predicts the clean ones (x0). The '
    'sampler goes a little way towards them, and asks again. The log-SNR says '
    'how much image there is: below 0 there is more noise.</div>'
    '<div class="mdm-controls"><button class="mdm-button" '
    'onclick="mdm.play(this)">Play</button>'
    f'<input type="range" min="0" max="{last}" value="{last}" '
    'aria-label="sampling step" oninput="mdm.frame(this)">'
    f'<output class="mdm-small">{labels[-1]}</output></div>'
    f'<div class="mdm-samples">{"".join(figures)}</div></details>'
  )


def _strip(images: list[np.ndarray]) -> str:
  """Images [S, S, 3] below each other, as a link that holds its data."""
  strip = np.concatenate(images)
  if strip.shape[1] <= _LOSSLESS:
    return _png(strip)
  file = io.BytesIO()
  Image.fromarray(strip).save(file, 'JPEG', quality=85, subsampling=0)
  data = base64.b64encode(file.getvalue()).decode()
  return f'data:image/jpeg;base64,{data}'


def _png(image: np.ndarray) -> str:
  """An image, or a clip [T, S, S, 3], as a link that holds its data."""
  data = base64.b64encode(grid.encode_png(image)).decode()
  return f'data:image/png;base64,{data}'
