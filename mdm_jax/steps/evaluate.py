"""Validation steps: losses of a batch, by level and by noise level."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.steps.objective import (
  Batch,
  Objective,
  batch_losses,
  num_repeats,
  sample_noise,
)
from mdm_jax.steps.state import Params


def make_eval_step(
  model: Matryoshka,
  objective: Objective,
  seed: int,
) -> Callable[[Params, Batch, Any], jax.Array]:
  """Makes (params, batch, index) -> mean loss of each level [levels].

  Times and noise depend on `seed` and the batch's index alone, so that all
  checkpoints are compared on the same noisy images.

  Args:
    model: the network.
    objective: the objective, as in training.
    seed: seed of times and noise.
  """

  def eval_step(params, batch, index):
    rng = jax.random.fold_in(jax.random.key(seed), index)
    t, eps = sample_noise(objective, model.resolutions, batch, rng)
    return batch_losses(model, objective, params, batch, t, eps)[1]

  return eval_step


def make_band_step(
  model: Matryoshka,
  objective: Objective,
  seed: int,
  num_bands: int,
) -> Callable[[Params, Batch, Any], tuple[jax.Array, ...]]:
  """Makes (params, batch, index) -> losses by level and band of times.

  The bands divide the times into equal parts, least noise first. Times and
  noise are those of `make_eval_step`.

  Args:
    model: the network.
    objective: the objective; its weights are replaced by 1.
    seed: seed of times and noise.
    num_bands: number of bands.

  Returns:
    A function that returns sums over the losses of examples, numbers of
    examples, and sums over the squares of the losses; all [levels, bands].
  """

  def band_step(params, batch, index):
    rng = jax.random.fold_in(jax.random.key(seed), index)
    t, eps = sample_noise(objective, model.resolutions, batch, rng)

    def level_losses(weights):
      one_level = dataclasses.replace(
        objective, weights=weights, time_weights=None
      )
      return batch_losses(model, one_level, params, batch, t, eps)[0]

    # Only the weights differ, so the network is called once.
    losses = jax.vmap(level_losses)(jnp.eye(len(model.resolutions)))

    sizes = mixed_batch.level_batch_sizes(len(t), objective.fractions)
    seen = jnp.stack(
      [
        mixed_batch.pad(jnp.ones(size), len(t), num_repeats(objective, batch))
        for size in sizes
      ]
    )
    # Undo the weight of an example, which grows as a level sees fewer examples.
    losses *= jnp.array(sizes)[:, None] / len(t)
    bands = jax.nn.one_hot(
      t * num_bands // objective.schedule.num_steps, num_bands
    )
    return losses @ bands, seen @ bands, losses**2 @ bands

  return band_step
