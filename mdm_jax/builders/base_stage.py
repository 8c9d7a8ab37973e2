"""What all stages of a run have in common, whatever they train."""

import abc
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from mdm_jax import mixed_batch
from mdm_jax.builders import data
from mdm_jax.builders.config import stage_directory
from mdm_jax.optim.skip_step import SkipRule
from mdm_jax.runtime import sharding
from mdm_jax.steps.sample import SampleFn
from mdm_jax.steps.state import Params, TrainState
from mdm_jax.steps.train import new_state


@dataclasses.dataclass(frozen=True)
class BaseStage(abc.ABC):
  """A stage of a run.

  Attributes:
    config: of the run.
    index: of the stage, from 0.
    model: what is trained; it has `image_shapes` and `resolutions`.
    optimizer: of the trained parameters.
    learning_rate: schedule by the number of accepted steps.
    skip_rule: which steps are skipped.
    batch_sizes: how many examples of a batch each level sees, coarse to fine.
  """

  config: ConfigDict
  index: int
  model: Any
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  skip_rule: SkipRule
  batch_sizes: tuple[int, ...]

  @property
  def settings(self) -> ConfigDict:
    """The stage's own section of the config."""
    return self.config.stages[self.index]

  @property
  def name(self) -> str:
    """Name of the stage."""
    return self.settings.name

  @property
  def title(self) -> str:
    """Prefix of log lines, such as "stage 1/2 '16'"."""
    return f"stage {self.index + 1}/{len(self.config.stages)} '{self.name}'"

  @property
  def is_last(self) -> bool:
    """Whether it is the last stage of the run."""
    return self.index == len(self.config.stages) - 1

  @property
  def num_steps(self) -> int:
    """Steps of the stage."""
    return self.settings.steps

  @property
  def batch_size(self) -> int:
    """Examples of a batch, over all devices."""
    return self.settings.batch_size

  @property
  @abc.abstractmethod
  def is_generative(self) -> bool:
    """Whether it makes images of prompts."""

  def require_generative(self, flag: str) -> None:
    """Raises ValueError if it makes no images of prompts.

    Args:
      flag: of the command that asks for them, such as '--step'.
    """
    if not self.is_generative:
      raise ValueError(
        f'{flag}=sample: stage {self.name!r} is an autoencoder, which makes no '
        f'images of prompts; give {flag}=train, or another --stage.'
      )

  @property
  def resolutions(self) -> tuple[int, ...]:
    """Resolutions in pixels, coarse to fine."""
    return self.model.resolutions

  @property
  @abc.abstractmethod
  def frame_spacing(self) -> int:
    """Of clips in files, the finest level has every nth frame."""

  @property
  @abc.abstractmethod
  def measured(self) -> tuple[str, ...]:
    """Names of what `make_validation_step` measures."""

  @property
  @abc.abstractmethod
  def loss_settings(self) -> dict[str, Any]:
    """What it measures depends on, beside weights and data. JSON."""

  @property
  def seed(self) -> int:
    """Seed of parameters, times, noise and caption dropout."""
    return self.config.seed * len(self.config.stages) + self.index

  def directory(
    self, workdir: epath.PathLike, kind: str = 'checkpoints'
  ) -> epath.Path:
    """See `stage_directory`."""
    return stage_directory(workdir, self.config, self.index, kind)

  @abc.abstractmethod
  def param_shapes(self) -> Params:
    """Shapes and dtypes of the trained parameters."""

  def earlier_params(
    self, params_of: Callable[['BaseStage'], Params]
  ) -> Params:
    """The parameters of earlier stages that it needs beside its own.

    Args:
      params_of: the parameters of a stage, or their shapes.
    """
    del params_of
    return {}

  @abc.abstractmethod
  def init(self) -> Params:
    """Fresh float32 parameters on the host."""

  def new_state(self, params: Params) -> TrainState:
    """The training state at step 0, from given parameters."""
    return new_state(params, self.optimizer, self.config.averages.widths)

  def state_shapes(self, mesh: Mesh) -> TrainState:
    """The training state as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: an axis of the mesh does not divide a parameter.
    """
    shapes = jax.eval_shape(self.new_state, self.param_shapes())
    return sharding.with_shardings(
      shapes,
      sharding.tree_shardings(shapes, mesh, self.config.sharding_rules),
    )

  @abc.abstractmethod
  def make_train_step(self, empty_text: np.ndarray, mesh: Mesh) -> Callable:
    """The training step, see `steps.train.make_step`.

    Args:
      empty_text: the empty caption as the text encoder reads it.
      mesh: the devices.
    """

  @abc.abstractmethod
  def make_validation_step(self, seed: int) -> Callable:
    """(params, batch, index) -> sums, numbers and sums of squares.

    All are [measured, 1], over the examples of the batch.

    Args:
      seed: of the noise.
    """

  @abc.abstractmethod
  def make_sample_fn(self, mesh: Mesh, params: Params) -> SampleFn:
    """What the sample grids of training show.

    Args:
      mesh: the devices.
      params: parameters whose shardings it is compiled for.
    """

  @abc.abstractmethod
  def parts_of_loss(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a line of progress shows beside the loss, by name.

    Args:
      means: over the last steps, of the metrics of the training step.
    """

  @abc.abstractmethod
  def training_metrics(
    self, means: Mapping[str, np.ndarray]
  ) -> dict[str, dict[str, float]]:
    """Sections of metrics of the last steps, beside the loss.

    Args:
      means: as for `parts_of_loss`.

    Returns:
      By section, of which 'train' has further ones too, and name.
    """

  @abc.abstractmethod
  def forward_flops(self, frozen: Params, text: jax.Array) -> float | None:
    """FLOPs of the network on a batch, without gradients; quick to count.

    Args:
      frozen: parameters that the model needs beside the trained ones.
      text: [N, ...], some texts as the text encoder reads them.

    Returns:
      XLA's count before it optimizes the program, over all devices; None if
      the back end has none.
    """

  def make_dataset(self, split: str, **options: Any):
    """This process's part of a split's batches, see `data.make_dataset`.

    Args:
      split: 'train', 'validation', or for shapes also 'held_out'.
      **options: `start_batch` and `num_batches`.
    """
    return data.make_dataset(
      self.config,
      split,
      self.model.image_shapes,
      self.batch_sizes,
      frame_spacing=self.frame_spacing,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      **options,
    )

  def batch_shapes(self, text: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Shapes of a global training batch.

    Args:
      text: shape of the texts of the batch.
    """
    sizes, levels = self.batch_sizes, self.model.image_shapes
    shapes = {
      'text': text,
      'scale': jax.ShapeDtypeStruct(sizes[:1], jnp.float32),
    }
    for name in ('bad', 'stop', 'save'):
      shapes[name] = jax.ShapeDtypeStruct(sizes[:1], bool)
    # Each example is stored once, for the finest level that sees it.
    for name, level, seen, finer in zip(
      mixed_batch.image_names(levels), levels, sizes, (*sizes[1:], 0)
    ):
      if seen > finer:
        shapes[name] = jax.ShapeDtypeStruct((seen - finer, *level), jnp.uint8)
    return shapes
