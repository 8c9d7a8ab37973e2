"""From prompts to pictures."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from mdm_jax import sharding
from mdm_jax.diffusion import guidance, pyramid, samplers
from mdm_jax.diffusion.process import DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.diffusion.schedule import Schedule
from mdm_jax.models.conditioning import Cond
from mdm_jax.models.matryoshka import Matryoshka

# (params, text [N, ...], seeds [N]) -> uint8 [N, H_r, H_r, 3], coarse to
# fine. A text is what the model's text encoder reads.
DrawFn = Callable[[Any, np.ndarray, Sequence[int]], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """How pictures are drawn; see `samplers.sample`."""

  name: str
  num_steps: int
  eta: float
  guidance: float
  guidance_rescale: float
  guidance_interval: tuple[float, float]  # shares of T
  threshold: str


class Request(NamedTuple):
  """What is drawn, made ready for many steps, of B pictures.

  Attributes:
    cond: of the text.
    away: what guidance leads away from: of the negative text; of the text
      itself, for a guide.
    keys: [B] random keys.
  """

  cond: Cond
  away: Cond
  keys: jax.Array


@dataclasses.dataclass(frozen=True)
class Painter:
  """Pure functions that draw with a network, not yet jitted.

  An image's noise depends on its own seed alone, not on its batch.

  Attributes:
    model: the network.
    schedule: its noise schedule.
    spec: the sampler.
    mesh: the devices, among which images and their rows are divided.
    parameterization: what the network predicts.
    guide: a worse network, of the same resolutions, that guidance leads away
      from instead of from the negative text. `params['guide']` are its
      parameters.
  """

  model: Matryoshka
  schedule: Schedule
  spec: SamplerSpec
  mesh: Mesh
  parameterization: str
  guide: Matryoshka | None = None

  def prepare(self, params, text, negative, seeds) -> Request:
    """What does not change from step to step.

    Args:
      params: the network's.
      text: [B, ...] what the text encoder reads.
      negative: [B, ...] the same, see `Request`; the empty caption is what
        training knows.
      seeds: [B] uint32.
    """

    def encode(model, params, text):
      return model.prepare(params, model.encode(params, text))

    return Request(
      encode(self.model, params, text),
      encode(self.guide, params['guide'], text)
      if self.guide
      else encode(self.model, params, negative),
      jax.vmap(jax.random.key)(seeds),
    )

  def start(self, request: Request) -> Pyramid:
    """Noise to start from: the same for any number of steps."""
    return self._noise(request, self.schedule.num_steps)

  def step(
    self,
    params,
    request: Request,
    state: tuple[Pyramid, Pyramid],
    step: tuple[jax.Array, ...],
    w: jax.Array,
  ) -> tuple[Pyramid, Pyramid]:
    """One step of all pictures.

    Args:
      params: as given to `prepare`.
      request: from there.
      state: x_t and the last step's x0, anything of its shape at first.
      step: one of those of `samplers.steps`.
      w: the guidance weight, instead of the sampler's.

    Returns:
      x_s and x0.
    """
    x_t, x0 = state
    index, r, t, s = step
    spec = self.spec
    needs_noise = samplers.draws_noise(spec.name, spec.eta)
    return samplers.sample_step(
      self._denoise_fn(params, request, w),
      x_t,
      self.schedule,
      t,
      s,
      self._noise(request, index) if needs_noise else None,
      (r, x0),
      sampler=spec.name,
      eta=spec.eta,
      threshold=spec.threshold,
      parameterization=self.parameterization,
    )

  def sample(self, params, text, negative, seeds) -> tuple[jax.Array, ...]:
    """All steps in one loop: uint8 images, coarse to fine.

    The arguments are those of `prepare`.
    """
    params = self._gather(params)
    request, spec = self.prepare(params, text, negative, seeds), self.spec
    images = samplers.sample(
      self._denoise_fn(params, request, spec.guidance),
      self.start(request),
      self.schedule,
      request.keys[0],
      num_steps=spec.num_steps,
      sampler=spec.name,
      eta=spec.eta,
      threshold=spec.threshold,
      parameterization=self.parameterization,
      noise_fn=lambda index: self._noise(request, index),
    )
    return tuple(map(pyramid.to_uint8, images))

  def _gather(self, params):
    # The networks whole on every device, once; text encoders stay as they lie.
    # XLA would else gather the features of few images, at each step.
    def gather(params):
      return params | {
        'unet': jax.lax.with_sharding_constraint(
          params['unet'], sharding.replicated(self.mesh)
        )
      }

    whole = gather(params)
    if self.guide:
      whole['guide'] = gather(params['guide'])
    return whole

  def _denoise_fn(
    self, params, request: Request, w: float | jax.Array
  ) -> DenoiseFn:
    spec, total = self.spec, self.schedule.num_steps
    low, high = spec.guidance_interval
    # Nothing is asked at each step where all are guided.
    interval = None if (low, high) == (0, 1) else (low * total, high * total)

    def denoise(x_t, t, cond):
      return self.model.denoise(params, x_t, t, cond)

    if self.guide is None:
      return guidance.guided_denoise_fn(
        denoise, request.cond, request.away, w, spec.guidance_rescale, interval
      )
    return guidance.autoguided_denoise_fn(
      lambda x_t, t: denoise(x_t, t, request.cond),
      lambda x_t, t: self.guide.denoise(params['guide'], x_t, t, request.away),
      w,
      spec.guidance_rescale,
      interval,
    )

  def _noise(self, request: Request, index: int | jax.Array) -> Pyramid:
    @jax.vmap
    def noise_of(key):
      one = samplers.start_noise(
        jax.random.fold_in(key, index), self.model.resolutions, 1
      )
      return tuple(level[0] for level in one)

    # Nothing else in the program says where rows lie.
    return jax.lax.with_sharding_constraint(
      noise_of(request.keys), sharding.batch_sharding(self.mesh, 4)
    )


def jit_sample(painter: Painter, param_shardings: Any) -> Callable:
  """`Painter.sample`, its batch spread over the mesh; all have the images."""
  # Those of a batch, whatever its rank.
  batch = sharding.batch_sharding(painter.mesh, 1)
  return jax.jit(
    painter.sample,
    in_shardings=(param_shardings, batch, batch, batch),
    out_shardings=sharding.replicated(painter.mesh),
    compiler_options=sharding.compiler_options(painter.mesh),
  )


def _place(
  mesh: Mesh, text: np.ndarray, negative: np.ndarray, seeds: Sequence[int]
) -> tuple[jax.Array, ...]:
  """One batch, or this process's part of it, on the devices."""
  placed = sharding.shard_batch(
    {
      'text': text,
      'negative': negative.astype(text.dtype),
      'seeds': np.asarray(seeds, np.uint32),
    },
    mesh,
  )
  return placed['text'], placed['negative'], placed['seeds']


def make_draw_batches(
  painter: Painter,
  negative: np.ndarray,
  batch_size: int,
  param_shardings: Any,
  *,
  path: bool = False,
) -> Callable[..., Iterator[list[tuple[np.ndarray, ...]]]]:
  """Jits a painter for batches of one size, spread over its mesh.

  Args:
    painter: draws.
    negative: what guidance leads away from: one text.
    batch_size: pictures drawn at once; the last batch is filled up.
    param_shardings: where the parameters lie.
    path: each batch comes with what `make_draw_steps` has of its steps, in
      order.

  Returns:
    (params, text [N, ...], seeds [N]) -> an iterator over the batches, each a
    list whose last is the pictures: uint8 [B, H_r, H_r, 3], coarse to fine.
  """
  spec, mesh = painter.spec, painter.mesh
  if path:
    draw_steps = make_draw_steps(painter, param_shardings)

    def draw_batch(params, *inputs):
      return draw_steps(params, *inputs, spec.num_steps, spec.guidance)
  else:
    jitted = jit_sample(painter, param_shardings)

    def draw_batch(params, *inputs):
      return [jitted(params, *_place(mesh, *inputs))]

  local = batch_size // jax.process_count()

  def draw_batches(params, text, seeds):
    for start in range(0, len(text), batch_size):
      first = start + jax.process_index() * local
      rows = np.arange(first, first + local) % len(text)
      kept = len(text) - start
      yield [
        tuple(np.asarray(level)[:kept] for level in images)
        for images in draw_batch(
          params,
          text[rows],
          np.broadcast_to(negative, (local, *negative.shape)),
          np.asarray(seeds)[rows],
        )
      ]

  return draw_batches


def make_draw(
  painter: Painter, negative: np.ndarray, batch_size: int, param_shardings: Any
) -> DrawFn:
  """Like `make_draw_batches`, for all pictures together."""
  draw_batches = make_draw_batches(
    painter, negative, batch_size, param_shardings
  )

  def draw(params, text, seeds):
    pictures = [batch[-1] for batch in draw_batches(params, text, seeds)]
    return tuple(map(np.concatenate, zip(*pictures)))

  return draw


def make_draw_steps(
  painter: Painter,
  param_shardings: Any,
) -> Callable[..., Iterator[tuple[jax.Array, ...]]]:
  """Jits a painter for single steps, to look on while it draws.

  Returns:
    (params, text [B, ...], negative [B, ...], seeds [B], num_steps, w) -> an
    iterator over the steps: uint8 images, coarse to fine, that the network
    expects at the end; the last are the pictures. Those of `make_draw`, but
    for rounding. Other steps and weights compile nothing new.
  """
  batch = sharding.batch_sharding(painter.mesh, 1)
  options = sharding.compiler_options(painter.mesh)
  prepare = jax.jit(
    painter.prepare,
    in_shardings=(param_shardings, batch, batch, batch),
    compiler_options=options,
  )
  start = jax.jit(painter.start, compiler_options=options)
  step = jax.jit(painter.step, donate_argnums=2, compiler_options=options)
  to_uint8 = jax.jit(
    lambda images: tuple(map(pyramid.to_uint8, images)),
    out_shardings=sharding.replicated(painter.mesh),
  )

  def draw_steps(params, text, negative, seeds, num_steps, w):
    request = prepare(params, *_place(painter.mesh, text, negative, seeds))
    # Two buffers, as both are given away.
    state = start(request), start(request)
    steps = list(zip(*samplers.steps(num_steps, painter.schedule.num_steps)))
    for one in steps:
      x_t, x0 = state = step(params, request, state, one, np.float32(w))
      yield to_uint8(x_t if one is steps[-1] else x0)

  return draw_steps
