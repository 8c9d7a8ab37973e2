"""The demo's first-in-first-out queue of sampling requests, with previews."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import concurrent.futures
import dataclasses
import functools
import threading
from typing import Any, NamedTuple
import unicodedata

from absl import logging
import jax
import numpy as np

from mdm_jax.builders.prompts import encode_prompts, unknown_words
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data.text import Tokenizer
from mdm_jax.diffusion import samplers
from mdm_jax.inference.session import Model
from mdm_jax.inference.weights import SavedWeights
from mdm_jax.runtime import sharding
from mdm_jax.runtime.printable import command_line
from mdm_jax.serving import film
from mdm_jax.steps.sample import make_sample_steps
from mdm_jax.steps.sampler import Sampler

MAX_CHARACTERS = 1000  # most characters in a prompt
MAX_GUIDANCE = 20
# Batch sizes on each device; smaller requests are padded.
_SIZES = (1, 4, 16)
_CACHED = 4  # most settings whose programs are cached


class QueueFull(ValueError):
  """Too many requests are waiting."""


class WeightsUnavailable(RuntimeError):
  """The weights of a request cannot be loaded; one line for the user."""


@dataclasses.dataclass(frozen=True)
class Request:
  """Images that a user asks for; image i has `seed` + i.

  `weights` is one of `SampleQueue.choices`.
  """

  prompt: str
  negative_prompt: str
  guidance: float
  steps: int
  sampler: str
  threshold: str
  seed: int
  num_images: int
  weights: str


class Progress(NamedTuple):
  """Progress of a request.

  Attributes:
    ahead: number of requests before it in the queue.
    step: number of sampling steps taken; 0 while it waits or compiles.
    images: predicted x0 of that step, uint8 [num_images, H_r, H_r, 3], coarse
      to fine; empty before the first step.
    state: 'waiting', 'loading' its weights, or 'sampling', which begins with
      compiling if need be.
  """

  ahead: int
  step: int
  images: tuple[np.ndarray, ...]
  state: str


class Job:
  """A submitted request and its progress, see `SampleQueue.submit`.

  Attributes:
    request: the request.
    owner: who asked for it.
    is_wanted: whether somebody waits for it.
    cancelled: an event, set by `cancel`.
    step: number of sampling steps taken.
    images, state: see `Progress`.
    film: some of the steps taken.
    model: `Model.description` of the weights that are used.
    future: done when the job has ended.
  """

  def __init__(
    self,
    request: Request,
    owner: str = '',
    is_wanted: Callable[[], bool] = lambda: True,
  ):
    """A job that has not begun."""
    self.request, self.owner, self.is_wanted = request, owner, is_wanted
    self.cancelled = threading.Event()
    self.step, self.images, self.state = 0, (), 'waiting'
    self.film: list[film.Frame] = []
    self.model: dict[str, Any] = {}
    self.future: concurrent.futures.Future | None = None

  def cancel(self) -> None:
    """Ends the job after the current step; may be called repeatedly."""
    self.cancelled.set()
    self.future.cancel()  # Has an effect only if the job has not begun.


class SampleQueue:
  """Samples one request at a time, in a thread of its own.

  Attributes:
    about: description of the model for users.
    choices: names of the weights that a request may have; the first are
      those of `model`.
    max_images: largest number of images in a request.
    ready: an event, set once the default request has been compiled.
  """

  def __init__(
    self,
    model: Model,
    max_waiting: int = 4,
    others: Mapping[SavedWeights, Callable[[], Model]] | None = None,
    moved: Mapping[str, str | None] | None = None,
  ):
    """Compiles nothing before `warm_up` or the first request.

    Args:
      model: the model to sample with. It stays in memory.
      max_waiting: largest number of requests that may wait, besides the one
        being sampled.
      others: functions that load other weights of the same run. They are called
        in the sampling thread, and the weights that were loaded last stay in
        memory.
      moved: where files of the run are now, by the flags that say so.
    """
    self.ready = threading.Event()
    self._model, self._config = model, model.stage.config
    self._moved = moved or {}
    self._max_waiting = max_waiting
    own, others = model.weights, others or {}
    own = SavedWeights(model.stage.name, own.step, own.sigma_rel, own.best)
    self._saved = {_name(saved): saved for saved in (own, *others)}
    self._load = {_name(saved): load for saved, load in others.items()}
    self._loaded: tuple[str, Model] | None = None  # of the others
    self.choices = list(self._saved)
    # Samplers and shardings of parameters by the index of their stage.
    self._samplers: dict[int, tuple[Sampler, Any]] = {}
    shards = sharding.batch_shards(model.mesh)
    most = max(1, self._config.eval.batch_size // shards)
    # Few sizes, since compiling for a size takes longer than sampling.
    self._sizes = sorted({shards * min(size, most) for size in _SIZES})
    self.max_images = self._sizes[-1]
    self._sample_steps = functools.lru_cache(_CACHED)(self._make_sample_steps)
    self._changed = threading.Condition()
    self._jobs: list[Job] = []  # The first is being sampled.
    self._thread = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix='sampling'
    )
    self.about = _about(model, others)

  @property
  def default_request(self) -> Request:
    """A request for four images with the settings of the run's config."""
    sampler = self._config.sampler
    return Request(
      prompt='',
      negative_prompt='',
      guidance=sampler.guidance,
      steps=sampler.num_steps,
      sampler=sampler.name,
      threshold=sampler.threshold,
      seed=0,
      num_images=min(4, self.max_images),
      weights=self.choices[0],
    )

  def warm_up(self) -> None:
    """Starts to compile for the default request, in the sampling thread."""

    def compile_default():
      try:
        self._sample(Job(dataclasses.replace(self.default_request, steps=1)))
      except jax.errors.JaxRuntimeError as error:
        # Not raised, since a request for fewer images may work.
        logging.error('The default settings cannot be sampled: %s', error)
      logging.info('Ready to sample.')
      self.ready.set()

    logging.info('Warming up: compiling for the default settings.')
    self._thread.submit(compile_default)

  def check(self, request: Request) -> None:
    """Checks a request.

    Raises:
      ValueError: it cannot be sampled. The message is one line for the user.
    """
    for name, text in (
      ('prompt', request.prompt),
      ('negative prompt', request.negative_prompt),
    ):
      if len(text) > MAX_CHARACTERS:
        raise ValueError(
          f'The {name} has {len(text):,} characters: shorten it to '
          f'{MAX_CHARACTERS:,}.'
        )
      for letter in text:
        # A shell command, see `command`, cannot hold control characters.
        if unicodedata.category(letter) in ('Cc', 'Cs'):
          raise ValueError(
            f'The {name} contains the character U+{ord(letter):04X}, which '
            'is not allowed: remove it.'
          )
    for name, value, low, high in (
      ('Guidance', request.guidance, 0, MAX_GUIDANCE),
      ('Steps', request.steps, 1, self._config.diffusion.num_steps),
      ('Images', request.num_images, 1, self.max_images),
      ('Seed', request.seed, 0, 2**32 - self.max_images),
    ):
      # NaN is in no range.
      if value is None or not low <= value <= high:
        given = 'empty' if value is None else f'{value:,}'
        raise ValueError(
          f'{name}: {given}; give a number from {low:,} to {high:,}.'
        )
    for name, value, known in (
      ('sampler', request.sampler, samplers.SAMPLERS),
      ('threshold', request.threshold, samplers.THRESHOLDS),
      ('checkpoint', request.weights, self.choices),
    ):
      if value not in known:
        raise ValueError(
          f'Unknown {name} {value!r}: use one of {tuple(known)}.'
        )
    self._encode(request)  # Raises ValueError for an unknown class label.

  def note(self, request: Request) -> str:
    """Tells of a truncated prompt and of unknown words; '' for neither."""
    tokenizer = make_tokenizer(self._config)
    if not isinstance(tokenizer, Tokenizer):
      return ''
    notes = []
    if excess := tokenizer.excess(request.prompt):
      notes.append(f'The prompt was cut: it has {excess}.')
    prompts = [request.prompt, request.negative_prompt]
    if unknown := unknown_words(self._config, prompts):
      notes.append(f'The prompt has {unknown}.')
    return ' '.join(notes)

  def command(self, request: Request, i: int = 0) -> str:
    """The shell command that samples image i of a request again."""
    saved = self._saved[request.weights]
    is_last = saved.stage == self._config.stages[-1].name
    is_independent = self._config.diffusion.level_times == 'independent'
    offset = self._config.sampler.level_offset
    values = {
      'workdir': self._model.workdir,
      'prompt': request.prompt,
      'negative_prompt': request.negative_prompt,
      'guidance': request.guidance,
      'steps': request.steps,
      'sampler': request.sampler,
      'threshold': request.threshold,
      'level_offset': offset if is_independent else None,
      'seed': request.seed + i,
      'num_samples': 1,
      'stage': None if is_last else saved.stage,
      'sigma_rel': saved.sigma_rel,
      'best': saved.best or None,
      **self._moved,
    }
    if not request.negative_prompt:
      del values['negative_prompt']
    return command_line('sample', **values)

  def submit(
    self,
    request: Request,
    owner: str = '',
    is_wanted: Callable[[], bool] = lambda: True,
  ) -> Job:
    """Adds a request to the end of the queue.

    Args:
      request: the request.
      owner: who asks, see `cancel`.
      is_wanted: whether somebody still waits for the images. It is asked at
        every step of whatever is being sampled, in another thread; the job is
        cancelled once nobody does.

    Raises:
      ValueError: the request cannot be sampled; see `check`.
      QueueFull: too many requests are waiting.
    """
    self.check(request)
    job = Job(request, owner, is_wanted)
    self._drop_unwanted()
    with self._changed:
      if len(self._jobs) > self._max_waiting:
        raise QueueFull(
          f'{self._max_waiting} requests are waiting already: try '
          'again in a moment.'
        )
      self._jobs.append(job)
      job.future = self._thread.submit(self._sample, job)
    job.future.add_done_callback(lambda _: self._leave(job))
    return job

  def watch(self, job: Job) -> Iterator[Progress]:
    """Yields the progress of a job until it is done or cancelled.

    A slow consumer misses steps; closing the iterator cancels the job. The last
    progress is that of the last step, unless the job was cancelled.

    Raises:
      jax.errors.JaxRuntimeError: the device failed, out of memory for example.
      WeightsUnavailable: the weights cannot be loaded.
    """
    seen, done = None, False

    def has_changed():
      return job.future.done() or self._place(job) != seen

    try:
      while not done:
        with self._changed:
          self._changed.wait_for(has_changed)
          done, last, seen = job.future.done(), seen, self._place(job)
          images = job.images
        if seen != last:
          ahead, step, state = seen
          yield Progress(ahead, step, images, state)
      if not job.future.cancelled():
        job.future.result()
    finally:
      job.cancel()

  def cancel(self, owner: str) -> None:
    """Cancels all jobs of an owner."""
    self._cancel(lambda job: job.owner == owner)

  def close(self) -> None:
    """Cancels all requests, without waiting for a compilation."""
    self._cancel(lambda job: True)
    self._thread.shutdown(wait=False, cancel_futures=True)

  def _drop_unwanted(self) -> None:
    self._cancel(lambda job: not job.is_wanted())

  def _cancel(self, is_meant: Callable[[Job], bool]) -> None:
    with self._changed:
      jobs = list(self._jobs)
    for job in filter(is_meant, jobs):
      job.cancel()

  def _place(self, job: Job) -> tuple[int, int, str]:
    ahead = self._jobs.index(job) if job in self._jobs else 0
    return ahead, job.step, job.state

  def _change(self, job: Job, **values: Any) -> None:
    with self._changed:
      vars(job).update(values)
      self._changed.notify_all()

  def _leave(self, job: Job) -> None:
    with self._changed:
      self._jobs.remove(job)
      self._changed.notify_all()

  def _encode(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
      encode_prompts(self._config, [text])
      for text in (request.prompt, request.negative_prompt)
    )

  def _restore(self, job: Job) -> Model:
    """The model with the weights of a job, of which two are kept at most."""
    name = job.request.weights
    if name == self.choices[0]:
      return self._model
    if self._loaded is None or self._loaded[0] != name:
      self._loaded = None  # Frees its memory before there are others.
      self._change(job, state='loading')
      try:
        self._loaded = name, self._load[name]()
      except (OSError, ValueError) as error:
        logging.error('%s: %s', name, error)
        reason = str(error).partition('\n')[0]
        raise WeightsUnavailable(
          f'These weights cannot be loaded, choose others. {reason}'
        ) from error
    return self._loaded[1]

  def _make_sample_steps(self, index: int, sampler: str, threshold: str):
    base, shardings = self._samplers[index]
    return make_sample_steps(
      base.with_method(sampler, threshold),
      shardings,
      with_inputs=True,
    )

  def _sample(self, job: Job) -> None:
    self._drop_unwanted()
    if job.cancelled.is_set():
      return
    request, count = job.request, job.request.num_images
    model = self._restore(job)
    index = model.stage.index
    if index not in self._samplers:
      shardings = jax.tree.map(lambda x: x.sharding, model.params)
      self._samplers[index] = model.stage.make_sampler(model.mesh), shardings
    self._change(job, state='sampling', model=model.description)
    size = next(size for size in self._sizes if size >= count)
    text, negative = (
      np.repeat(one, size, axis=0) for one in self._encode(request)
    )
    steps = self._sample_steps(index, request.sampler, request.threshold)(
      model.params,
      text,
      negative,
      request.seed + np.arange(size),
      request.steps,
      request.guidance,
    )
    schedule = self._samplers[index][0].schedule
    times = samplers.time_steps(request.steps, schedule)
    kept = film.frame_steps(request.steps)
    for step, (x_t, images) in enumerate(steps, 1):
      # Waits for the images, so that a cancelled job starts no further step.
      images = tuple(np.asarray(level)[:count] for level in images)
      if step in kept:
        log_snr = schedule.log_snr(times[step - 1])
        x_t = tuple(np.asarray(level)[:count] for level in x_t)
        job.film.append(film.make_frame(step, log_snr, x_t, images))
      self._change(job, step=step, images=images)
      self._drop_unwanted()
      if job.cancelled.is_set():
        return


def _about(model: Model, others: Iterable[SavedWeights]) -> str:
  """Describes a model, of whose run there are other weights."""
  stage = model.stage
  sides = ' and '.join(map(str, stage.sampled_resolutions))
  about = f'{model.workdir}, {sides} px'
  if model.is_finished:
    return about
  later = {each.name for each in stage.config.stages[stage.index + 1 :]}
  state = 'Training has not ended: this is'
  if any(saved.stage in later for saved in others):  # --stage
    state = 'An earlier stage of training:'
  return (
    f'{about}. {state} {stage.title} at step {model.weights.step} of '
    f'{stage.num_steps}'
  )


def _name(saved: SavedWeights) -> str:
  return f'stage {saved.stage}, {saved.ema}, step {saved.step:,}'
