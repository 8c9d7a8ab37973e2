"""The loss of a batch: samples times and noise, and applies network and loss.

Training and validation share it; the formulas are in `diffusion.loss`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import mixed_batch
from mdm_jax.diffusion import loss, process, pyramid
from mdm_jax.diffusion.augmentation import Augmentation
from mdm_jax.diffusion.schedule import Schedule
from mdm_jax.models.conditioning import Cond
from mdm_jax.models.matryoshka import Matryoshka, longest
from mdm_jax.steps.state import Params

# A batch of B examples:
#   image: uint8 [B, H, H, 3], or clips [B, T, H, H, 3].
#   text: int32 tokens [B, L], or precomputed features [B, L, D].
#   scale: float32 [B], shorter side of the original image in pixels.
# In training also bool [B] flags:
#   bad: the record was unusable and has been replaced.
#   stop: a process has received a stop request.
#   save: a checkpoint is due by time.
# What depends on the whole batch, see `with_whole`, [B] with equal values:
#   length: int32, positions that every text is padded to.
#   mean_weight: float32, the mean weight of the times.
# For a level of a cascade, see `with_augmentation`:
#   coarse_t: int32 [B], noising steps of the coarser images.
#   coarse_eps: float32 [B, h, h, 3], their noise.
# In a mixed batch `image` may hold only the examples that the finest level
# sees. Others are in image_<level>, by the finest level that sees them.
Batch = dict[str, jax.Array]
# Folded into a key, makes another one. Small numbers make those of a split.
_AUGMENTATION = 2**20


@dataclasses.dataclass(frozen=True)
class Objective:
  """The objective that a stage minimises.

  Attributes:
    schedule: noise schedule, with a row for each level.
    parameterization: prediction of the network, see `process`.
    loss_space: space in which the error is measured, see `process`.
    weights: weights of the levels' losses, coarse to fine.
    fractions: fraction of the batch that each level sees, coarse to fine.
    time_weights: [T + 1] or [levels, T + 1], weights of the times; None for
      equal weights.
    normalize_weights: whether the weights of the times are divided by their
      mean over the batch, as in the release's trainer, and over the levels, if
      each has its own.
    density: of the times.
    independent_times: whether each level has a time of its own.
    noise_floor: see `loss.level_loss`.
    augmentation: noise on the coarser images that a level of a cascade is
      given; None for a nest of levels.
  """

  schedule: Schedule
  parameterization: str
  loss_space: str
  weights: tuple[float, ...]
  fractions: tuple[float, ...]
  time_weights: np.ndarray | None = None
  normalize_weights: bool = False
  density: loss.TimeDensity = loss.TimeDensity()
  independent_times: bool = False
  noise_floor: float = 0.0
  augmentation: Augmentation | None = None


def num_repeats(objective: Objective, batch: Batch) -> int:
  """Number of times that the pattern of a mixed batch repeats in the batch."""
  return mixed_batch.num_repeats(
    mixed_batch.level_batch_sizes(len(batch['scale']), objective.fractions)
  )


def sample_noise(
  objective: Objective,
  shapes: Sequence[Sequence[int]],
  batch: Batch,
  rng: jax.Array,
) -> tuple[jax.Array, pyramid.Pyramid]:
  """Samples the times and the noise of a batch.

  Args:
    objective: the objective.
    shapes: of an example at each level, coarse to fine.
    batch: the batch.
    rng: a random key.

  Returns:
    int32 times [B], or [B, levels] if they are independent, and float32 noise
    of each level [B_r, *shapes[r]].
  """
  sizes = mixed_batch.level_batch_sizes(
    len(batch['scale']), objective.fractions
  )
  time_rng, noise_rng = jax.random.split(rng)
  is_own = objective.independent_times and len(sizes) > 1
  t = loss.sample_time(
    time_rng,
    sizes[0],
    objective.schedule.num_steps,
    objective.density,
    len(sizes) if is_own else None,
  )
  return t, process.sample_noise(
    noise_rng,
    [
      jax.ShapeDtypeStruct((size, *shape), jnp.float32)
      for size, shape in zip(sizes, shapes, strict=True)
    ],
  )


def with_whole(
  model: Matryoshka, objective: Objective, batch: Batch, t: jax.Array
) -> Batch:
  """Adds what the losses of single examples need to know of the whole batch.

  Call it before a batch is split into microbatches. What the batch has already
  is kept.

  Args:
    model: the network.
    objective: the objective.
    batch: the global batch of B examples, or a part to which it was added.
    t: int32 times, from `sample_noise`.
  """
  whole = {}
  if model.to_longest:
    whole['length'] = longest(batch['text'])
  if objective.time_weights is not None and objective.normalize_weights:
    weights = loss.weights_at(objective.time_weights, t)
    whole['mean_weight'] = jnp.full(len(t), weights.mean())
  return whole | batch


def with_augmentation(
  model: Matryoshka, objective: Objective, batch: Batch, rng: jax.Array
) -> Batch:
  """Adds the noise of the coarser images that a level of a cascade is given.

  Args:
    model: the network.
    objective: the objective.
    batch: of B examples.
    rng: a random key, that of `sample_noise`.
  """
  if objective.augmentation is None:
    return batch
  t, eps = objective.augmentation.sample(
    jax.random.fold_in(rng, _AUGMENTATION),
    len(batch['scale']),
    model.coarse_resolution,
  )
  return batch | {'coarse_t': t, 'coarse_eps': eps}


def batch_losses(
  model: Matryoshka,
  objective: Objective,
  params: Params,
  batch: Batch,
  t: jax.Array,
  eps: pyramid.Pyramid,
) -> tuple[jax.Array, dict[str, Any]]:
  """Losses of a batch at given times and noise.

  Args:
    model: the network.
    objective: the objective.
    params: all parameters of the model, trained and frozen.
    batch: images, texts and scales.
    t: int32 times, from `sample_noise`.
    eps: noise of each level, from `sample_noise`.

  Returns:
    Weighted loss of each example [B], and losses of each level, see
    `multi_resolution_loss`.
  """
  batch = with_whole(model, objective, batch, t)
  repeats = num_repeats(objective, batch)
  names = mixed_batch.image_names(model.image_shapes)
  own = {
    level: pyramid.to_float(batch[name])
    for level, name in enumerate(names)
    if name in batch
  }
  images = pyramid.make_pyramid(
    own.pop(len(names) - 1),
    model.image_shapes,
    objective.fractions,
    coarse=own,
    repeats=repeats,
  )
  cond = model.encode(
    params, batch['text'], batch['scale'], batch.get('length')
  )
  if objective.augmentation is not None:
    cond = _with_coarse(model, objective, batch, images, cond)
  images = model.to_codes(params, images)
  per_example, aux = loss.multi_resolution_loss(
    lambda x_t, t: model.denoise(params, x_t, t, cond, repeats),
    objective.schedule,
    images,
    t,
    eps,
    parameterization=objective.parameterization,
    loss_space=objective.loss_space,
    noise_floor=objective.noise_floor,
    weights=objective.weights,
    time_weights=objective.time_weights,
    repeats=repeats,
  )
  if 'mean_weight' in batch:
    per_example /= batch['mean_weight']
  return per_example, aux


def _with_coarse(
  model: Matryoshka,
  objective: Objective,
  batch: Batch,
  images: pyramid.Pyramid,
  cond: Cond,
) -> Cond:
  """Gives a level of a cascade the coarser images, noised."""
  shapes = (
    mixed_batch.example_shape(model.coarse_resolution),
    model.image_shapes[-1],
  )
  coarse, _ = pyramid.make_pyramid(images[-1], shapes, (1.0, 1.0))
  coarse = objective.augmentation.apply(
    coarse, batch['coarse_t'], batch['coarse_eps']
  )
  return cond._replace(coarse=coarse, coarse_t=batch['coarse_t'])


def losses_by_noise(
  objective: Objective,
  losses: Sequence[jax.Array],
  t: jax.Array,
  num_bands: int,
) -> tuple[jax.Array, jax.Array]:
  """Adds up losses by level and band of times.

  The bands divide the times into equal parts, least noise first.

  Args:
    objective: the objective.
    losses: of the examples that each level sees, [B_r], coarse to fine.
    t: int32 times, from `sample_noise`.
    num_bands: number of bands.

  Returns:
    Sums of the losses, and numbers of examples; both float32 [levels, bands].
  """
  repeats = mixed_batch.num_repeats(list(map(len, losses)))
  bands = t * num_bands // objective.schedule.num_steps
  seen = [
    jax.nn.one_hot(
      mixed_batch.times(bands, level, len(each), repeats), num_bands
    )
    for level, each in enumerate(losses)
  ]
  # No matrix product: on a TPU it would round the losses to bfloat16.
  sums = [(each[:, None] * band).sum(0) for each, band in zip(losses, seen)]
  return jnp.stack(sums), jnp.stack([band.sum(0) for band in seen])
