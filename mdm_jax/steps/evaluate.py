"""The validation step: losses of a batch, by level and by noise level."""

from collections.abc import Callable
from typing import Any

import jax

from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.steps.objective import (
  Batch,
  Objective,
  batch_losses,
  losses_by_noise,
  sample_noise,
  with_augmentation,
)
from mdm_jax.steps.state import Params


def make_band_step(
  model: Matryoshka,
  objective: Objective,
  seed: int,
  num_bands: int,
) -> Callable[[Params, Batch, Any], tuple[jax.Array, ...]]:
  """Makes (params, batch, index) -> losses by level and band of times.

  See `losses_by_noise`. Times and noise depend on `seed` and the batch's index
  alone, so that all checkpoints are compared on the same noisy images.

  Args:
    model: the network.
    objective: the objective, whose time weights play no part; its `noise_floor`
      does.
    seed: seed of times and noise.
    num_bands: number of bands.

  Returns:
    A function that returns sums over the losses of examples, numbers of
    examples, and sums over the squares of the losses; all [levels, bands].
  """

  def band_step(params, batch, index):
    rng = jax.random.fold_in(jax.random.key(seed), index)
    t, eps = sample_noise(objective, model.level_shapes, batch, rng)
    batch = with_augmentation(model, objective, batch, rng)
    _, levels = batch_losses(model, objective, params, batch, t, eps)
    losses = levels['losses']
    sums, counts = losses_by_noise(objective, losses, t, num_bands)
    squares = [level**2 for level in losses]
    return sums, counts, losses_by_noise(objective, squares, t, num_bands)[0]

  return band_step
