"""`AutoencoderStage`: the first stage of a run of latent diffusion."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mdm_jax.builders import data
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.models.autoencoder import Autoencoder
from mdm_jax.runtime import sharding
from mdm_jax.steps import autoencoder
from mdm_jax.steps.sample import SampleFn
from mdm_jax.steps.state import Params
from mdm_jax.steps.train import make_step


@dataclasses.dataclass(frozen=True)
class AutoencoderStage(BaseStage):
  """A stage that trains an autoencoder of images, which reads no captions.

  Attributes:
    model: the autoencoder.
  """

  model: Autoencoder

  @property
  def is_generative(self) -> bool:
    """Whether it makes images of prompts."""
    return False

  @property
  def frame_spacing(self) -> int:
    """Of clips in files it sees one frame."""
    return 1

  @property
  def measured(self) -> tuple[str, ...]:
    """Names of what `make_validation_step` measures."""
    return tuple(
      data.held_out_name(self.config, name) for name in autoencoder.MEASURED
    )

  @property
  def loss_settings(self) -> dict[str, Any]:
    """What it measures depends on, beside weights and data. JSON."""
    return {}

  def param_shapes(self) -> Params:
    """Shapes and dtypes of the trained parameters."""
    return self.model.shapes()

  def init(self) -> Params:
    """Fresh float32 parameters on the host."""
    return self.model.init(self.seed)

  def make_train_step(self, empty_text: np.ndarray, mesh: Mesh) -> Callable:
    """The training step, see `steps.train.make_step`."""
    return make_step(
      autoencoder.make_gradients(self.model, self.settings.accumulate),
      self.optimizer,
      skip_rule=self.skip_rule,
      ema_decay=self.config.optimizer.ema_decay,
      seed=self.seed,
      mesh=mesh,
    )

  def make_validation_step(self, seed: int) -> Callable:
    """PSNR of the decoded images, without any noise."""
    return autoencoder.make_validation_step(self.model)

  def parts_of_loss(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
    """PSNR in dB, and how well the codes are standardised."""
    names = ('psnr', 'code_nll', 'pixel_loss', 'kl')
    return {name: float(means[name]) for name in names if name in means}

  def training_metrics(
    self, means: Mapping[str, np.ndarray]
  ) -> dict[str, dict[str, float]]:
    """The same as numbers, see `autoencoder.batch_loss`."""
    return {'train': self.parts_of_loss(means)}

  def make_sample_fn(self, mesh: Mesh, params: Params) -> SampleFn:
    """Shows held-out images beside what is decoded of their codes.

    Args:
      mesh: the devices.
      params: parameters whose shardings it is compiled for.

    Returns:
      (params, text, seeds) -> uint8 images [N, H, H, 3], and as many decoded
      ones. They are the first N of the split, one for each seed; text is not
      read.
    """
    decode = jax.jit(
      lambda params, images: autoencoder.reconstruct(
        self.model, params, images, self.config.sampler.pixels
      ),
      in_shardings=(
        jax.tree.map(lambda x: x.sharding, params),
        sharding.batch_sharding(mesh, 4),
      ),
      out_shardings=sharding.replicated(mesh),
      compiler_options=sharding.compiler_options(mesh),
    )

    def sample_fn(params, text, seeds):
      del text
      count = len(seeds)
      batches = self.make_dataset(
        data.held_out_split(self.config),
        num_batches=math.ceil(count / self.batch_size),
      )
      pairs = [
        decode(params, sharding.shard_batch(batch, mesh)['image'])
        for batch in batches
      ]
      return tuple(
        np.concatenate([*map(np.asarray, each)])[:count] for each in zip(*pairs)
      )

    return sample_fn

  def forward_flops(self, frozen: Params, text: jax.Array) -> float | None:
    """See `BaseStage.forward_flops`."""
    shape = self.batch_size, *self.model.image_shapes[0]

    def forward(params, images):
      return self.model.decode(params, self.model.encode(params, images))

    lowered = jax.jit(forward).lower(
      self.param_shapes(), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    return (lowered.cost_analysis() or {}).get('flops')
