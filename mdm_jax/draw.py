"""From prompts to pictures."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mdm_jax import sharding
from mdm_jax.diffusion import guidance, pyramid, samplers
from mdm_jax.diffusion.schedule import Schedule
from mdm_jax.models.matryoshka import Matryoshka

# (params, prompts, seeds) -> uint8 [N, H_r, H_r, 3], coarse to fine.
DrawFn = Callable[[Any, Sequence[str], Sequence[int]], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """How pictures are drawn; see `samplers.sample`."""
  name: str
  num_steps: int
  eta: float
  guidance: float
  threshold: str


def make_sample_step(
    model: Matryoshka, schedule: Schedule, spec: SamplerSpec, *,
    parameterization: str, empty_tokens: Sequence[int],
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, ...]]:
  """Sampling of one batch, pure and not yet jitted.

  Args:
    model: the network.
    schedule: its noise schedule.
    spec: the sampler.
    parameterization: what the network predicts.
    empty_tokens: [L] tokens of the empty caption, which guides.

  Returns:
    (params, tokens [B, L], seeds [B]) -> uint8 images, coarse to fine. An
    image's noise depends on its own seed alone, not on its batch.
  """
  def sample_step(params, tokens, seeds):
    empty = jnp.broadcast_to(jnp.array(empty_tokens, jnp.int32), tokens.shape)
    denoise_fn = guidance.guided_denoise_fn(
        lambda x_t, t, cond: model.denoise(params, x_t, t, cond),
        model.encode(params, tokens), model.encode(params, empty),
        spec.guidance)
    keys = jax.vmap(jax.random.key)(seeds)

    @jax.vmap
    def noise_of(key):
      one = samplers.start_noise(key, model.resolutions, 1)
      return tuple(level[0] for level in one)

    def noise_fn(index):
      return noise_of(jax.vmap(jax.random.fold_in, (0, None))(keys, index))

    images = samplers.sample(
        denoise_fn, noise_fn(spec.num_steps), schedule, keys[0],
        num_steps=spec.num_steps, sampler=spec.name, eta=spec.eta,
        parameterization=parameterization, threshold=spec.threshold,
        noise_fn=noise_fn)
    return tuple(pyramid.to_uint8(level) for level in images)
  return sample_step


def make_draw(
    sample_step: Callable, encode: Callable[[str], np.ndarray],
    batch_size: int, mesh: Mesh, param_shardings: Any,
) -> DrawFn:
  """Jits a sample step for batches of one size, spread over the mesh.

  Args:
    sample_step: as `make_sample_step` makes it.
    encode: caption -> int32 [L].
    batch_size: pictures drawn at once; the last batch is filled up.
    mesh: the devices.
    param_shardings: where the parameters lie.
  """
  jitted = jax.jit(
      sample_step,
      in_shardings=(param_shardings, *(
          sharding.batch_sharding(mesh, ndim) for ndim in (2, 1))),
      out_shardings=sharding.replicated(mesh))

  local = batch_size // jax.process_count()

  def draw(params, prompts, seeds):
    drawn = []
    for start in range(0, len(prompts), batch_size):
      first = start + jax.process_index() * local
      rows = np.arange(first, first + local) % len(prompts)
      inputs = sharding.shard_batch({
          'tokens': np.stack([encode(prompts[i]) for i in rows]),
          'seeds': np.asarray(seeds, np.uint32)[rows]}, mesh)
      images = jitted(params, inputs['tokens'], inputs['seeds'])
      kept = len(prompts) - start
      drawn.append([np.asarray(level)[:kept] for level in images])
    return tuple(np.concatenate(level) for level in zip(*drawn))
  return draw
