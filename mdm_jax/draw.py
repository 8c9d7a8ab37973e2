"""From prompts to pictures."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mdm_jax import sharding
from mdm_jax.diffusion import guidance, pyramid, samplers
from mdm_jax.diffusion.schedule import Schedule
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


def make_sample_step(
    model: Matryoshka, schedule: Schedule, spec: SamplerSpec, mesh: Mesh, *,
    parameterization: str,
) -> Callable[..., tuple[jax.Array, ...]]:
  """Sampling of one batch, pure and not yet jitted.

  Args:
    model: the network.
    schedule: its noise schedule.
    spec: the sampler.
    mesh: the devices, among which images and their rows are divided.
    parameterization: what the network predicts.

  Returns:
    (params, text [B, ...], negative [B, ...], seeds [B]) -> uint8 images,
    coarse to fine. Guidance leads away from `negative`, which is the empty
    caption in training. An image's noise depends on its own seed alone, not
    on its batch.
  """
  # Nothing is asked at each step where all are guided.
  low, high = spec.guidance_interval
  interval = None if (low, high) == (0, 1) else (
      low * schedule.num_steps, high * schedule.num_steps)

  def sample_step(params, text, negative, seeds):
    denoise_fn = guidance.guided_denoise_fn(
        lambda x_t, t, cond: model.denoise(params, x_t, t, cond),
        model.encode(params, text), model.encode(params, negative),
        spec.guidance, spec.guidance_rescale, interval)
    keys = jax.vmap(jax.random.key)(seeds)

    @jax.vmap
    def noise_of(key):
      one = samplers.start_noise(key, model.resolutions, 1)
      return tuple(level[0] for level in one)

    def noise_fn(index):
      noise = noise_of(jax.vmap(jax.random.fold_in, (0, None))(keys, index))
      # Nothing else in the program says where rows lie.
      return jax.lax.with_sharding_constraint(
          noise, sharding.batch_sharding(mesh, 4))

    images = samplers.sample(
        denoise_fn, noise_fn(spec.num_steps), schedule, keys[0],
        num_steps=spec.num_steps, sampler=spec.name, eta=spec.eta,
        parameterization=parameterization, threshold=spec.threshold,
        noise_fn=noise_fn)
    return tuple(pyramid.to_uint8(level) for level in images)
  return sample_step


def jit_sample_step(sample_step: Callable, mesh: Mesh,
                    param_shardings: Any) -> Callable:
  """Spreads a sample step's batch over the mesh; every device has the images.
  """
  # Those of a batch, whatever its rank.
  batch = sharding.batch_sharding(mesh, 1)
  return jax.jit(
      sample_step, in_shardings=(param_shardings, batch, batch, batch),
      out_shardings=sharding.replicated(mesh),
      compiler_options=sharding.compiler_options(mesh))


def make_draw(
    sample_step: Callable, negative: np.ndarray, batch_size: int, mesh: Mesh,
    param_shardings: Any,
) -> DrawFn:
  """Jits a sample step for batches of one size, spread over the mesh.

  Args:
    sample_step: as `make_sample_step` makes it.
    negative: what guidance leads away from: one text.
    batch_size: pictures drawn at once; the last batch is filled up.
    mesh: the devices.
    param_shardings: where the parameters lie.
  """
  jitted = jit_sample_step(sample_step, mesh, param_shardings)
  local = batch_size // jax.process_count()

  def draw(params, text, seeds):
    drawn = []
    for start in range(0, len(text), batch_size):
      first = start + jax.process_index() * local
      rows = np.arange(first, first + local) % len(text)
      inputs = sharding.shard_batch({
          'text': text[rows],
          'negative': np.broadcast_to(
              negative, (local, *negative.shape)).astype(text.dtype),
          'seeds': np.asarray(seeds, np.uint32)[rows]}, mesh)
      images = jitted(
          params, inputs['text'], inputs['negative'], inputs['seeds'])
      kept = len(text) - start
      drawn.append([np.asarray(level)[:kept] for level in images])
    return tuple(np.concatenate(level) for level in zip(*drawn))
  return draw
