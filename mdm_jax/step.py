"""The pure training and evaluation steps, and sampling from prompts."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdm_jax import optim
from mdm_jax.diffusion import guidance, loss, process, pyramid, samplers
from mdm_jax.diffusion.schedule import Schedule
from mdm_jax.models.conditioning import Cond, LearnedTextEncoder
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.state import Params, TrainState

# images uint8 [B, H, H, 3], tokens int32 [B, L], scale float32 [B].
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Model:
  """The network and its text encoder; parameters under the fields' names."""
  unet: NestedUNet
  text_encoder: LearnedTextEncoder
  resolutions: tuple[int, ...]  # coarse to fine

  def init(self, rng: jax.Array, num_tokens: int) -> Params:
    """Fresh parameters, for captions of `num_tokens`."""
    text_rng, unet_rng = jax.random.split(rng)
    tokens = jnp.ones((1, num_tokens), jnp.int32)
    (text, mask), text_params = self.text_encoder.init_with_output(
        text_rng, tokens)
    x_t = tuple(jnp.zeros((1, r, r, 3)) for r in self.resolutions)
    unet_params = self.unet.init(
        unet_rng, x_t, jnp.zeros(1), Cond(text, mask))
    return {'text_encoder': text_params['params'],
            'unet': unet_params['params']}

  def encode(self, params: Params, tokens: jax.Array,
             scale: jax.Array | None = None) -> Cond:
    """tokens [B, L] -> what the network is conditioned on."""
    text, mask = self.text_encoder.apply(
        {'params': params['text_encoder']}, tokens)
    return Cond(text, mask, scale)

  def denoise(self, params: Params, x_t: pyramid.Pyramid, t: jax.Array,
              cond: Cond) -> pyramid.Pyramid:
    """The network's prediction at every level."""
    return self.unet.apply({'params': params['unet']}, x_t, t, cond)


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised."""
  schedule: Schedule
  parameterization: str
  loss_space: str
  weights: tuple[float, ...]    # of the levels, coarse to fine
  fractions: tuple[float, ...]  # of the batch that each level sees


def _losses(model: Model, objective: Objective, params: Params,
            batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Loss per example [B], and each level's mean loss [levels]."""
  images = pyramid.make_pyramid(
      pyramid.to_float(batch['image']), model.resolutions,
      objective.fractions)
  time_rng, noise_rng = jax.random.split(rng)
  t = loss.draw_time(
      time_rng, len(images[0]), objective.schedule.num_steps)
  eps = process.draw_noise(noise_rng, images)
  cond = model.encode(params, batch['tokens'], batch['scale'])
  per_example, aux = loss.multi_resolution_loss(
      lambda x_t, t: model.denoise(params, x_t, t, cond),
      objective.schedule, images, t, eps,
      parameterization=objective.parameterization,
      loss_space=objective.loss_space, weights=objective.weights)
  return per_example, aux['level_losses']


def make_train_step(
    model: Model, objective: Objective,
    optimizer: optax.GradientTransformation, *, ema_decay: float,
    caption_dropout: float, empty_tokens: Sequence[int], seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """The training step, pure and not yet jitted.

  Args:
    model: the network.
    objective: what to minimise.
    optimizer: applied to all parameters.
    ema_decay: of the average, see `optim.update_average`.
    caption_dropout: probability of training on the empty caption.
    empty_tokens: [L] tokens of the empty caption.
    seed: of times, noise and dropout, together with the step number.

  Returns:
    (state, batch) -> (state, metrics): `loss`, `level_losses` [levels] and
    `grad_norm` before clipping.
  """
  def train_step(state, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    loss_rng, dropout_rng = jax.random.split(rng)
    dropped = jax.random.bernoulli(
        dropout_rng, caption_dropout, (len(batch['tokens']), 1))
    batch = batch | {'tokens': jnp.where(
        dropped, jnp.array(empty_tokens, jnp.int32), batch['tokens'])}

    def mean_loss(params):
      per_example, levels = _losses(
          model, objective, params, batch, loss_rng)
      return per_example.mean(), levels

    (total, levels), grads = jax.value_and_grad(
        mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optim.update_average(state.ema, params, state.step, ema_decay)
    metrics = {'loss': total, 'level_losses': levels,
               'grad_norm': optax.global_norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics
  return train_step


def make_eval_step(
    model: Model, objective: Objective, seed: int,
) -> Callable[[Params, Batch, Any], jax.Array]:
  """(params, batch, index) -> each level's mean loss [levels].

  Times and noise depend on `seed` and the batch's index alone, so that two
  checkpoints are compared on the same draws.
  """
  def eval_step(params, batch, index):
    rng = jax.random.fold_in(jax.random.key(seed), index)
    return _losses(model, objective, params, batch, rng)[1]
  return eval_step


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
  """How pictures are drawn; see `samplers.sample`."""
  name: str
  num_steps: int
  eta: float
  guidance: float
  threshold: str


def make_sample_step(
    model: Model, schedule: Schedule, spec: SamplerSpec, *,
    parameterization: str, empty_tokens: Sequence[int],
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, ...]]:
  """(params, tokens [B, L], seeds [B]) -> uint8 images, coarse to fine.

  An image depends on its own prompt and seed, not on its batch.
  """
  def sample_step(params, tokens, seeds):
    empty = jnp.broadcast_to(jnp.array(empty_tokens, jnp.int32), tokens.shape)
    denoise_fn = guidance.guided_denoise_fn(
        lambda x_t, t, cond: model.denoise(params, x_t, t, cond),
        model.encode(params, tokens), model.encode(params, empty),
        spec.guidance)
    keys = jax.vmap(jax.random.key)(seeds)

    def noise(index):
      keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
      one = jax.vmap(
          lambda key: samplers.start_noise(key, model.resolutions, 1))
      return jax.tree.map(lambda x: x[:, 0], one(keys_now))

    images = samplers.sample(
        denoise_fn, noise(spec.num_steps), schedule, keys[0],
        num_steps=spec.num_steps, sampler=spec.name, eta=spec.eta,
        parameterization=parameterization, threshold=spec.threshold,
        noise_fn=noise)
    return tuple(pyramid.to_uint8(level) for level in images)
  return sample_step
