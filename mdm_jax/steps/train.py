"""The training step: gradients, optimizer and EMAs, pure and jittable."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from mdm_jax import mixed_batch
from mdm_jax.diffusion.pyramid import Pyramid
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.optim import ema, post_hoc_ema, skip_step
from mdm_jax.runtime import sharding
from mdm_jax.steps.objective import (
  Batch,
  Objective,
  batch_losses,
  losses_by_noise,
  num_repeats,
  sample_noise,
  with_augmentation,
  with_whole,
)
from mdm_jax.steps.state import Params, TrainState

# Bands of noise by which the loss of training is logged.
NOISE_BANDS = 4

# (params, frozen, batch, rng) -> ((loss, metrics by name), gradients)
Gradients = Callable[
  [Params, Params, Batch, jax.Array],
  tuple[tuple[jax.Array, dict[str, jax.Array]], Params],
]


def new_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  sigma_rels: Sequence[float] = (),
) -> TrainState:
  """The state before the first step of a stage; its EMA copies `params`.

  Args:
    params: parameters to train.
    optimizer: optimizer of the stage.
    sigma_rels: sigma_rel of each post-hoc EMA to track, see `post_hoc_ema`.
  """
  return TrainState(
    jnp.int32(0),
    params,
    jax.tree.map(jnp.copy, params),
    optimizer.init(params),
    skip_step.new_state(),
    post_hoc_ema.new_lags(params, sigma_rels),
  )


def make_step(
  gradients: Gradients,
  optimizer: optax.GradientTransformation,
  *,
  skip_rule: skip_step.SkipRule,
  ema_decay: float,
  seed: int,
  mesh: Mesh | None = None,
) -> Callable[
  [TrainState, Batch, Params], tuple[TrainState, dict[str, jax.Array]]
]:
  """Makes the training step of any model, pure and not yet jitted.

  Args:
    gradients: the loss of a batch, metrics and gradients.
    optimizer: optimizer of all trained parameters.
    skip_rule: decides which steps are skipped. They leave parameters, EMAs and
      optimizer as they were, bit for bit.
    ema_decay: decay of the EMA, see `ema.update`.
    seed: seed of all randomness, together with the step number.
    mesh: the devices, for `sharding.gather_kernels`; None for one.

  Returns:
    (state, batch, frozen) -> (state, metrics). `frozen` holds the parameters
    that the model needs beside the trained ones, {} if none. Metrics: `loss`,
    and those of `gradients`; `grad_norm` before clipping; `update_norm`, of the
    change of the parameters, 0 if the step is skipped; `param_norm` after it;
    `bad_records`, the number of unusable records; `stop` and `save`, whether
    any process has set the flag; `skipped`, the number of skipped steps so far;
    and `skipped_in_a_row`, 0 after an accepted step. Norms are global L2 norms.
  """

  def train_step(state, batch, frozen):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    params = sharding.gather_kernels(state.params, mesh)
    (total, metrics), grads = gradients(params, frozen, batch, rng)
    grad_norm = optax.tree.norm(grads)
    good, guard = skip_step.judge(skip_rule, state.guard, total, grad_norm)
    # A `where` for each leaf would read old values after new ones are written,
    # so that XLA would have to copy parameters and moments first.
    state, update_norm = jax.lax.cond(
      good,
      lambda state: _update(state, grads, optimizer, ema_decay),
      lambda state: (state, jnp.float32(0)),
      state,
    )
    metrics |= {
      'loss': total,
      'grad_norm': grad_norm,
      'update_norm': update_norm,
      'param_norm': optax.tree.norm(state.params),
      'bad_records': batch['bad'].sum(),
      'stop': batch['stop'].any(),
      'save': batch['save'].any(),
      'skipped': guard.skipped,
      'skipped_in_a_row': guard.in_a_row,
    }
    return state._replace(step=state.step + 1, guard=guard), metrics

  return train_step


def make_train_step(
  model: Matryoshka,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  caption_dropout: float,
  empty_text: np.ndarray,
  accumulate: int = 1,
  **options: Any,
) -> Callable[
  [TrainState, Batch, Params], tuple[TrainState, dict[str, jax.Array]]
]:
  """Makes the training step of diffusion, pure and not yet jitted.

  Args:
    model: the network.
    objective: the objective to minimise.
    optimizer: optimizer of all trained parameters.
    caption_dropout: probability of training on the empty caption.
    empty_text: the empty caption, as one row of the batch's 'text'.
    accumulate: number of microbatches, which go through the network one after
      the other and hold whole patterns of a mixed batch. Their gradients are
      averaged, so that the step equals that of the whole batch up to rounding.
      It needs the activation memory of one microbatch, and the noise of all.
    **options: `skip_rule`, `ema_decay`, `seed` and `mesh` of `make_step`.

  Returns:
    See `make_step`. Its metrics are also `level_losses` [levels], and
    `noise_sums` and `noise_counts` [levels, bands], see `losses_by_noise`, of
    `NOISE_BANDS` bands.
  """

  def gradients(params, frozen, batch, rng):
    loss_rng, dropout_rng = jax.random.split(rng)
    batch = _drop_captions(batch, dropout_rng, caption_dropout, empty_text)
    t, eps = sample_noise(objective, model.level_shapes, batch, loss_rng)
    batch = with_augmentation(model, objective, batch, loss_rng)
    return _gradients(
      model, objective, accumulate, params, frozen, batch, t, eps
    )

  return make_step(gradients, optimizer, **options)


def _gradients(
  model: Matryoshka,
  objective: Objective,
  accumulate: int,
  params: Params,
  frozen: Params,
  batch: Batch,
  t: jax.Array,
  eps: Pyramid,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
  """The mean loss, also by level and noise, and its gradients.

  Returns:
    (loss scalar, metrics of `make_train_step`), and gradients in the structure
    of `params`. With microbatches all are means over these, also the sums and
    numbers of examples by noise.
  """

  def mean_loss(params, batch, t, eps):
    per_example, levels = batch_losses(
      model, objective, params | frozen, batch, t, eps
    )
    sums, counts = losses_by_noise(objective, levels['losses'], t, NOISE_BANDS)
    return per_example.mean(), {
      'level_losses': levels['level_losses'],
      'noise_sums': sums,
      'noise_counts': counts,
    }

  differentiate = functools.partial(
    jax.value_and_grad(mean_loss, has_aux=True), params
  )
  if accumulate == 1:
    return differentiate(batch, t, eps)
  repeats = num_repeats(objective, batch)
  batch = with_whole(model, objective, batch, t)
  return mean_over_parts(
    differentiate, mixed_batch.split((batch, t, eps), accumulate, repeats)
  )


def _drop_captions(
  batch: Batch, rng: jax.Array, probability: float, empty_text: np.ndarray
) -> Batch:
  """Replaces random captions by the empty one, for classifier-free guidance."""
  text = batch['text']
  dropped = jax.random.bernoulli(rng, probability, (len(text), 1))
  dropped = dropped.reshape(-1, *(1,) * (text.ndim - 1))
  return batch | {
    'text': jnp.where(dropped, jnp.asarray(empty_text, text.dtype), text)
  }


def _update(
  state: TrainState,
  grads: Params,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> tuple[TrainState, jax.Array]:
  """Applies gradients to the parameters, and updates the EMAs.

  Returns:
    The state, and the norm of the change of the parameters.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  state = state._replace(
    params=params,
    opt_state=opt_state,
    ema=ema.update(state.ema, params, state.step, ema_decay),
    lags=post_hoc_ema.update_lags(
      state.lags, state.params, params, state.guard.accepted + 1
    ),
  )
  return state, optax.tree.norm(updates)


def mean_over_parts(fn: Callable[..., Any], parts: tuple[Any, ...]) -> Any:
  """The mean of `fn(*part)` over the parts, which run one after the other.

  Args:
    fn: called with one part of each of `parts`.
    parts: trees of arrays [number of parts, ...].
  """

  def add(total, part):
    return jax.tree.map(jnp.add, total, fn(*part)), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *first)
  )
  total, _ = jax.lax.scan(add, zeros, parts)
  count = len(jax.tree.leaves(parts)[0])
  return jax.tree.map(lambda x: x / count, total)


def jit_train_step(
  train_step: Callable, state: TrainState, batch: Batch, frozen: Params
) -> Callable:
  """Jits a training step, which donates its state.

  Args:
    train_step: from `make_train_step`.
    state, batch, frozen: its arguments, or `jax.ShapeDtypeStruct`s with their
      shardings.
  """
  shardings = jax.tree.map(lambda x: x.sharding, (state, batch, frozen))
  replicated = shardings[0].step
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=shardings,
    out_shardings=(shardings[0], replicated),
    compiler_options=sharding.compiler_options(replicated.mesh),
  )
