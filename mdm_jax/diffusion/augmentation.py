"""Conditioning augmentation: noise on the coarser images of a cascade.

A level of a cascade sees in training what no coarser model will give it: the
data itself, pooled. Noise of a random strength, which the level is told, hides
what the coarser model gets wrong (Ho et al., arXiv 2106.15282, section 4.2).
"""

import dataclasses

import jax

from mdm_jax.diffusion import process
from mdm_jax.diffusion.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Noise on the coarser images.

  Attributes:
    schedule: noise of the coarser images; its only level is theirs.
    strongest: largest noising step in training, as a share of T.
  """

  schedule: Schedule
  strongest: float

  def sample(
    self, rng: jax.Array, batch: int, resolution: int
  ) -> tuple[jax.Array, jax.Array]:
    """Samples strengths and noise for training.

    Args:
      rng: a random key.
      batch: B, the number of images.
      resolution: of the coarser images, in pixels.

    Returns:
      int32 noising steps [B], evenly from 0 (none) to the strongest, and
      float32 noise [B, resolution, resolution, 3].
    """
    step_rng, noise_rng = jax.random.split(rng)
    last = self.steps(self.strongest)
    return (
      jax.random.randint(step_rng, (batch,), 0, last + 1),
      jax.random.normal(noise_rng, (batch, resolution, resolution, 3)),
    )

  def steps(self, share: float) -> int:
    """The noising step at a share of T."""
    return round(share * self.schedule.num_steps)

  def apply(self, images: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Noises images [B, h, w, 3] up to the steps `t` [B] by the noise `eps`."""
    return process.add_noise(images, eps, self.schedule.at(0, t))
