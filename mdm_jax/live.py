"""Pictures drawn one order after the other, while those who ordered look on."""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import functools
import shlex
import threading
from typing import NamedTuple
import unicodedata

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax import build, draw, inputs, sharding
from mdm_jax.data.text import Tokenizer
from mdm_jax.diffusion import samplers
from mdm_jax.state import Params

MAX_CHARACTERS = 1000  # of a prompt
# Pictures drawn at once, on each device; fewer are filled up.
_SIZES = (1, 4, 16)
MAX_GUIDANCE = 20
_SHORT = 44  # Characters of an example.
# Compiled loops: pairs of a sampler and a threshold.
_CACHED = 4


class Busy(ValueError):
  """Too many orders wait."""


@dataclasses.dataclass(frozen=True)
class Order:
  """What somebody wants drawn; picture i has `seed` + i."""

  prompt: str
  negative_prompt: str
  guidance: float
  steps: int
  sampler: str
  threshold: str
  seed: int
  num_pictures: int


class Progress(NamedTuple):
  """How far an order is.

  Attributes:
    ahead: orders before it.
    step: steps taken; 0 while it waits, and while something is compiled.
    pictures: what the network expects after that step, uint8
      [num_pictures, H_r, H_r, 3], coarse to fine; none before the first.
  """

  ahead: int
  step: int
  pictures: tuple[np.ndarray, ...]


class Job:
  """An order on its way, see `Studio.submit`."""

  def __init__(self, order: Order):
    """Nothing has been drawn yet."""
    self.order = order
    self.cancelled = threading.Event()
    self.step, self.pictures = 0, ()
    self.future: concurrent.futures.Future | None = None

  def cancel(self) -> None:
    """Ends it after the step that is being taken; may be called again."""
    self.cancelled.set()
    self.future.cancel()  # Where it has not begun.


class Studio:
  """Draws with a trained network, one order at a time, in its own thread."""

  def __init__(
    self,
    config: ConfigDict,
    index: int,
    step: int,
    params: Params,
    mesh: Mesh,
    workdir: str,
    max_waiting: int = 4,
  ):
    """Nothing is compiled before `warm_up` or an order.

    Args:
      config: of the run.
      index: of the stage whose network draws.
      step: of that stage, the parameters'.
      params: all that it needs, on the mesh.
      mesh: the devices.
      workdir: of the run, for commands.
      max_waiting: orders that may wait for the one being drawn.
    """
    self.ready = threading.Event()  # The usual order compiles nothing.
    self._config, self._workdir = config, workdir
    self._params, self._max_waiting = params, max_waiting
    self._painter = build.make_painter(config, config.stages[index], mesh)
    shards = sharding.batch_shards(mesh)
    most = max(1, config.eval.batch_size // shards)
    # Each is compiled for itself, which takes longer than drawing.
    self._sizes = sorted({shards * min(size, most) for size in _SIZES})
    self.max_pictures = self._sizes[-1]
    self._draw_steps = functools.lru_cache(_CACHED)(self._make_draw_steps)
    self._changed = threading.Condition()
    self._line: list[Job] = []  # The first is being drawn.
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix='studio'
    )

    stage = config.stages[index]
    sides = ' and '.join(map(str, self._painter.model.resolutions))
    self.about = f'{workdir}, {sides} px'
    if step < stage.steps or index + 1 < len(config.stages):
      self.about += (
        f'. Training has not ended: stage {index + 1}/{len(config.stages)} '
        f'{stage.name!r} at step {step} of {stage.steps} draws'
      )

  @property
  def usual(self) -> Order:
    """What the run's config says, for four pictures."""
    sampler = self._config.sampler
    return Order(
      prompt='',
      negative_prompt='',
      guidance=sampler.guidance,
      steps=sampler.num_steps,
      sampler=sampler.name,
      threshold=sampler.threshold,
      seed=0,
      num_pictures=min(4, self.max_pictures),
    )

  def examples(self, count: int) -> list[str]:
    """Prompts that the network was trained for, where none need files."""
    config = self._config
    if config.data.name != 'shapes' and config.text.encoder != 'label':
      return []
    captions = inputs.make_prompts(config, 20 * count).captions
    # A button has room for so much.
    short = [text for text in captions if len(text) <= _SHORT]
    return list(dict.fromkeys(short))[:count]

  def warm_up(self) -> None:
    """Compiles what the usual order needs, in the studio's thread."""

    def compile_usual():
      try:
        self._draw(Job(dataclasses.replace(self.usual, steps=1)))
      except jax.errors.JaxRuntimeError as error:
        # Fewer pictures may work.
        logging.error('The usual settings cannot be drawn: %s', error)
      logging.info('Ready to draw.')
      self.ready.set()

    logging.info('Warming up: compiling for the usual settings.')
    self._thread.submit(compile_usual)

  def check(self, order: Order) -> None:
    """Refuses what cannot be drawn.

    Raises:
      ValueError: one line for who ordered it.
    """
    for name, text in (
      ('prompt', order.prompt),
      ('negative prompt', order.negative_prompt),
    ):
      if len(text) > MAX_CHARACTERS:
        raise ValueError(
          f'The {name} has {len(text):,} characters: shorten it to '
          f'{MAX_CHARACTERS:,}.'
        )
      for letter in text:
        # A command could not be written with them.
        if unicodedata.category(letter) in ('Cc', 'Cs'):
          raise ValueError(
            f'The {name} contains U+{ord(letter):04X}, which is no text: '
            'leave it out.'
          )
    for name, value, low, high in (
      ('Guidance', order.guidance, 0, MAX_GUIDANCE),
      ('Steps', order.steps, 1, self._config.diffusion.num_steps),
      ('Pictures', order.num_pictures, 1, self.max_pictures),
      ('Seed', order.seed, 0, 2**32 - self.max_pictures),
    ):
      # NaN is in no range.
      if value is None or not low <= value <= high:
        given = 'empty' if value is None else f'{value:,}'
        raise ValueError(
          f'{name}: {given}; give a number from {low:,} to {high:,}.'
        )
    for name, value, known in (
      ('sampler', order.sampler, samplers.SAMPLERS),
      ('threshold', order.threshold, samplers.THRESHOLDS),
    ):
      if value not in known:
        raise ValueError(f'Unknown {name} {value!r}: use one of {known}.')
    self._encode(order)  # There may be no such class.

  def note(self, order: Order) -> str:
    """What is worth knowing about an order, a sentence or ''."""
    tokenizer = inputs.make_tokenizer(self._config)
    if not isinstance(tokenizer, Tokenizer):
      return ''
    tokens, most = tokenizer.count(order.prompt), tokenizer.max_length
    return (
      ''
      if tokens <= most
      else (
        f'The prompt has {tokens} tokens, and the network reads {most}: the '
        'rest was left out.'
      )
    )

  def command(self, order: Order, i: int = 0) -> str:
    """What draws picture i of an order again, for a shell."""
    values = {
      'workdir': self._workdir,
      'prompt': order.prompt,
      'negative_prompt': order.negative_prompt,
      'guidance': order.guidance,
      'steps': order.steps,
      'sampler': order.sampler,
      'threshold': order.threshold,
      'seed': order.seed + i,
      'num_samples': 1,
    }
    if not order.negative_prompt:
      del values['negative_prompt']
    return ' '.join(
      [
        'python -m mdm_jax.sample',
        *(
          f'--{name}={shlex.quote(str(value))}'
          for name, value in values.items()
        ),
      ]
    )

  def submit(self, order: Order) -> Job:
    """Puts an order in the line.

    Raises:
      ValueError: it cannot be drawn; see `check`.
      Busy: too many wait.
    """
    self.check(order)
    job = Job(order)
    with self._changed:
      if len(self._line) > self._max_waiting:
        raise Busy(
          f'{self._max_waiting} others are waiting already: try '
          'again in a moment.'
        )
      self._line.append(job)
      job.future = self._thread.submit(self._draw, job)
    job.future.add_done_callback(lambda _: self._leave(job))
    return job

  def watch(self, job: Job) -> Iterator[Progress]:
    """Looks on until a job is done or cancelled.

    Who looks away meanwhile misses steps, and who stops looking, by `close`,
    cancels it. The last is that of the last step, unless it was cancelled.

    Raises:
      jax.errors.JaxRuntimeError: the device failed, for want of memory say.
    """
    seen, done = None, False

    def has_changed():
      return job.future.done() or self._place(job) != seen

    try:
      while not done:
        with self._changed:
          self._changed.wait_for(has_changed)
          done, last, seen = job.future.done(), seen, self._place(job)
          pictures = job.pictures
        if seen != last:
          yield Progress(*seen, pictures)
      if not job.future.cancelled():
        job.future.result()
    finally:
      job.cancel()

  def close(self) -> None:
    """Cancels all orders; what is compiled meanwhile is not waited for."""
    with self._changed:
      jobs = list(self._line)
    for job in jobs:
      job.cancel()
    self._thread.shutdown(wait=False, cancel_futures=True)

  def _place(self, job: Job) -> tuple[int, int]:
    return self._line.index(job) if job in self._line else 0, job.step

  def _leave(self, job: Job) -> None:
    with self._changed:
      self._line.remove(job)
      self._changed.notify_all()

  def _encode(self, order: Order) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
      inputs.encode_prompts(self._config, [text])
      for text in (order.prompt, order.negative_prompt)
    )

  def _make_draw_steps(self, sampler: str, threshold: str):
    spec = dataclasses.replace(
      self._painter.spec, name=sampler, threshold=threshold
    )
    return draw.make_draw_steps(
      dataclasses.replace(self._painter, spec=spec),
      jax.tree.map(lambda x: x.sharding, self._params),
    )

  def _draw(self, job: Job) -> None:
    order, count = job.order, job.order.num_pictures
    size = next(size for size in self._sizes if size >= count)
    text, negative = (
      np.repeat(one, size, axis=0) for one in self._encode(order)
    )
    steps = self._draw_steps(order.sampler, order.threshold)(
      self._params,
      text,
      negative,
      order.seed + np.arange(size),
      order.steps,
      order.guidance,
    )
    for step, images in enumerate(steps, 1):
      # Waits for the step, so that none is taken after a cancellation.
      pictures = tuple(np.asarray(level)[:count] for level in images)
      with self._changed:
        job.step, job.pictures = step, pictures
        self._changed.notify_all()
      if job.cancelled.is_set():
        return
