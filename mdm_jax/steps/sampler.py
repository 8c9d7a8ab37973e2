"""The sampler of a network: pure functions, not yet jitted."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mdm_jax.diffusion import guidance, pyramid, samplers
from mdm_jax.diffusion.augmentation import Augmentation
from mdm_jax.diffusion.process import DenoiseFn
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.diffusion.schedule import Schedule
from mdm_jax.models.conditioning import Cond, num_positions
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.runtime import sharding
from mdm_jax.steps.clip_parts import ClipParts

# Folded into the keys of a level of a cascade, whose noise must not be that of
# the coarser level. Beyond any step.
_FINER = 2**29


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """Options of the sampler.

  Attributes:
    name: one of `samplers.SAMPLERS`.
    num_steps: number of sampling steps.
    eta: DDIM's noise, from 0 (none) to 1.
    guidance: guidance weight; 1 is no guidance.
    guidance_rescale: see `guidance.guided_denoise_fn`.
    guidance_interval: times at which to guide, as fractions of T.
    threshold: one of `samplers.THRESHOLDS`, for the predicted x0.
    pixels: one of `pyramid.PIXELS`: how images become uint8.
    level_offset: nats of logSNR by which the schedule lets each level be ahead
      of the next finer one, beyond that of training.
    frames: of the finest level; 0 for as many as the network has. A longer clip
      is sampled in parts of so many, each of which continues the last half of
      the one before.
    augmentation: noise on the coarser image of a cascade, as a share of T.
  """

  name: str
  num_steps: int
  eta: float
  guidance: float
  guidance_rescale: float
  guidance_interval: tuple[float, float]
  threshold: str
  pixels: str = 'round'
  level_offset: float = 0.0
  frames: int = 0
  augmentation: float = 0.0


class Prepared(NamedTuple):
  """Inputs of B images that are the same at each step.

  Attributes:
    cond: conditioning on the prompt.
    away: conditioning that guidance leads away from: on the negative prompt, or
      the guide's conditioning on the prompt.
    keys: [B] random keys.
    known: the first frames, if they are those of an earlier part: float32
      [B, K_r, H_r, W_r, 3], of a level of images [B, H_r, W_r, 3].
  """

  cond: Cond
  away: Cond
  keys: jax.Array
  known: Pyramid | None = None


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Pure functions that sample images with a network, not yet jitted.

  The noise of an image depends on its own seed alone, not on its batch.

  Attributes:
    model: the network.
    schedule: noise schedule of the network.
    spec: options of the sampler.
    mesh: the devices, over which images and their rows are sharded.
    parameterization: prediction of the network, see `process`.
    guide: a worse network of the same resolutions, from which guidance leads
      away instead of from the negative prompt (autoguidance, Karras et al.,
      2024). Its parameters are `params['guide']`.
    coarser: in a cascade, the sampler of the images that this one is given. Its
      parameters are `params['coarser']`; a frozen text encoder is shared.
    augmentation: noise on these images.
  """

  model: Matryoshka
  schedule: Schedule
  spec: SamplerSpec
  mesh: Mesh
  parameterization: str
  guide: Matryoshka | None = None
  coarser: 'Sampler | None' = None
  augmentation: Augmentation | None = None

  @property
  def parts(self) -> ClipParts:
    """The parts of a clip, see `SamplerSpec.frames`."""
    return ClipParts(
      [shape[0] if len(shape) == 4 else 1 for shape in self.model.image_shapes],
      self.spec.frames,
    )

  @property
  def guided_share(self) -> float:
    """Share of the network's calls that guidance concerns, by its interval.

    In a cascade, that of the finest network.
    """
    if self._interval is None:
      return 1.0
    spec = self.spec
    times = samplers.called_times(spec.name, spec.num_steps, self.schedule)
    return float(np.mean(guidance.is_within(times, self._interval)))

  @property
  def _interval(self) -> tuple[float, float] | None:
    """The first and the last time to guide at, None for all times."""
    low, high = self.spec.guidance_interval
    total = self.schedule.num_steps
    # With None the program has no branch at each step.
    return None if (low, high) == (0, 1) else (low * total, high * total)

  @property
  def _depth(self) -> int:
    """Number of coarser levels of a cascade."""
    return 1 + self.coarser._depth if self.coarser else 0

  def with_method(self, name: str, threshold: str) -> 'Sampler':
    """The sampler with another method at all levels, see `SamplerSpec`."""
    return dataclasses.replace(
      self,
      spec=dataclasses.replace(self.spec, name=name, threshold=threshold),
      coarser=self.coarser and self.coarser.with_method(name, threshold),
    )

  def coarser_params(self, params):
    """Parameters of `coarser`, or their shardings."""
    shared = {key: params[key] for key in params if key == 'text_encoder'}
    return shared | params['coarser']

  def prepare(
    self, params, text, negative, seeds, earlier=None, part=0, coarse=None
  ) -> Prepared:
    """Encodes the prompts, once for all steps.

    Args:
      params: parameters of the model, with 'guide' if there is one.
      text: [B, ...], prompts as the text encoder reads them.
      negative: [B, ...], negative prompts, which guidance leads away from. The
        model was trained on the empty one. Without guidance, the prompts.
      seeds: uint32 [B].
      earlier: uint8 [B, T, H, W, 3], the finest level of the part to continue;
        None at the start of a clip.
      part: number of this part, counted from 0.
      coarse: uint8 [B, h, w, 3], in a cascade the images of `coarser`.
    """

    # Both passes of guidance see texts of one length, that of the longer of
    # prompt and negative prompt. An image thus does not depend on its batch.
    length = num_positions(text)
    if not self.guide:
      length = jnp.maximum(length, num_positions(negative))

    keys, known, given = jax.vmap(jax.random.key)(seeds), None, {}
    if self.coarser:
      keys = _fold(keys, _FINER + self._depth)
      given = self._noised(coarse, keys)

    # Jitted, as tracing the network for each of the two texts takes seconds.
    @functools.partial(jax.jit, static_argnums=0)
    def encode(model, params, text):
      cond = model.encode(params, text, length=length)
      return model.prepare(params, cond)._replace(**given)

    if earlier is not None:
      first = pyramid.to_float(earlier[:, -self.parts.overlap :])
      shapes = [
        (count, *shape[1:]) if len(shape) == 4 else shape
        for count, shape in zip(self.parts.known, self.model.image_shapes)
      ]
      known = pyramid.make_pyramid(first, shapes, [1.0] * len(shapes))
      known = self.model.to_codes(params, known)
      # Beyond any step, whose noise is of `fold_in(key, step)`.
      keys = _fold(keys, 2**30 + part)
    return Prepared(
      encode(self.model, params, text),
      encode(self.guide, params['guide'], text)
      if self.guide
      else encode(self.model, params, negative),
      keys,
      known,
    )

  def _noised(self, coarse: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """The coarser images of a cascade as conditioning."""
    step = self.augmentation.steps(self.spec.augmentation)
    t = jnp.full(len(coarse), step, jnp.int32)
    eps = jax.vmap(lambda key: jax.random.normal(key, coarse.shape[1:]))(
      _fold(keys, _FINER)
    )
    coarse = self.augmentation.apply(pyramid.to_float(coarse), t, eps)
    return {'coarse': coarse, 'coarse_t': t}

  def start(self, prepared: Prepared, t: int | jax.Array) -> Pyramid:
    """What sampling starts from at the noising step `t`: noise.

    It does not depend on `t`, except for the known first frames.

    Returns:
      float32 [B, H_r, H_r, 3], coarse to fine.
    """
    noise = self._noise(prepared, self.schedule.num_steps)
    if prepared.known is None:
      return noise
    return samplers.start_known(noise, prepared.known, self.schedule, t)

  def step(
    self,
    params,
    prepared: Prepared,
    state: tuple[Pyramid, Pyramid],
    step: tuple[jax.Array, ...],
    w: jax.Array,
  ) -> tuple[Pyramid, Pyramid]:
    """Takes one sampling step of all images.

    Args:
      params: as given to `prepare`.
      prepared: from `prepare`.
      state: x_t, and the x0 that the step before predicted; at the first step
        any arrays of that shape.
      step: one row of `samplers.steps`.
      w: guidance weight, used instead of the one in `spec`.

    Returns:
      x_s and the predicted x0.
    """
    x_t, x0 = state
    index, r, t, s = step
    spec = self.spec
    needs_noise = samplers.is_stochastic(spec.name, spec.eta)
    return samplers.sample_step(
      self._denoise_fn(params, prepared, w),
      x_t,
      self.schedule,
      t,
      s,
      self._noise(prepared, index) if needs_noise else None,
      (r, x0),
      sampler=spec.name,
      eta=spec.eta,
      threshold=spec.threshold,
      parameterization=self.parameterization,
      known=prepared.known,
      num_codes=self.model.num_codes,
    )

  def sample(
    self, params, text, negative, seeds, earlier=None, part=0
  ) -> tuple[jax.Array, ...]:
    """Takes all steps in one loop; the arguments are those of `prepare`.

    Returns:
      uint8 images [B, H_r, H_r, 3], coarse to fine.
    """
    params, spec = self._gather(params), self.spec
    if guidance.is_none(spec.guidance):
      negative = text
    coarse = ()
    if self.coarser:
      coarse = self.coarser.sample(
        self.coarser_params(params), text, negative, seeds
      )
    prepared = self.prepare(
      params, text, negative, seeds, earlier, part, coarse and coarse[-1]
    )
    images = samplers.sample(
      self._denoise_fn(params, prepared, spec.guidance),
      self._noise(prepared, self.schedule.num_steps),
      self.schedule,
      prepared.keys[0],
      num_steps=spec.num_steps,
      sampler=spec.name,
      eta=spec.eta,
      threshold=spec.threshold,
      parameterization=self.parameterization,
      noise_fn=lambda index: self._noise(prepared, index),
      known=prepared.known,
      num_codes=self.model.num_codes,
    )
    return *coarse, *self.to_uint8(params, images)

  def to_uint8(self, params, levels: Pyramid) -> tuple[jax.Array, ...]:
    """uint8 images of what the levels denoise, by `spec.pixels`."""
    images = self.model.to_images(params, levels)
    return tuple(pyramid.to_uint8(image, self.spec.pixels) for image in images)

  def _gather(self, params):
    # Gathers the networks on every device once; text encoders stay sharded.
    # With sharded networks XLA would gather the images' features at each step.
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
    self, params, prepared: Prepared, w: float | jax.Array
  ) -> DenoiseFn:
    spec, interval = self.spec, self._interval

    def denoise(x_t, t, cond):
      return self.model.denoise(params, x_t, t, cond)

    if self.guide is None:
      return guidance.guided_denoise_fn(
        denoise,
        prepared.cond,
        prepared.away,
        w,
        spec.guidance_rescale,
        interval,
      )
    return guidance.autoguided_denoise_fn(
      lambda x_t, t: denoise(x_t, t, prepared.cond),
      lambda x_t, t: self.guide.denoise(params['guide'], x_t, t, prepared.away),
      w,
      spec.guidance_rescale,
      interval,
    )

  def _noise(self, prepared: Prepared, index: int | jax.Array) -> Pyramid:
    @jax.vmap
    def noise_of(key):
      one = samplers.start_noise(
        jax.random.fold_in(key, index), self.model.level_shapes, 1
      )
      return tuple(level[0] for level in one)

    # The only place where the program says how the images' rows are sharded.
    return tuple(
      jax.lax.with_sharding_constraint(
        level, sharding.batch_sharding(self.mesh, level.ndim)
      )
      for level in noise_of(prepared.keys)
    )


def _fold(keys: jax.Array, data: int | jax.Array) -> jax.Array:
  """Other random keys [B], by `fold_in`."""
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
