"""The pure training and evaluation steps."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax import averages, mixed_batch, optim, sharding
from mdm_jax import guard as guards
from mdm_jax.diffusion import loss, process, pyramid
from mdm_jax.diffusion.schedule import Schedule
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.state import Params, TrainState

# image uint8 [B, H, H, 3], text (int32 [B, L], or features [B, L, D] that
# were computed before), scale float32 [B]; to train, bad and stop bool [B],
# whether a record was replaced and whether to end here. In a mixed
# batch, image may be that of the examples that the finest level sees; the
# others' then are in image_<resolution>, by the finest level that sees them.
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised."""

  schedule: Schedule
  parameterization: str
  loss_space: str
  weights: tuple[float, ...]  # of the levels, coarse to fine
  fractions: tuple[float, ...]  # of the batch that each level sees
  time_weights: np.ndarray | None = None  # [T + 1], of the noising steps


def _repeats(objective: Objective, batch: Batch) -> int:
  """How often the pattern of a mixed batch repeats in it."""
  return mixed_batch.num_repeats(
    pyramid.level_batch_sizes(len(batch['scale']), objective.fractions)
  )


def _draw(
  objective: Objective, resolutions: Sequence[int], batch: Batch, rng: jax.Array
) -> tuple[jax.Array, pyramid.Pyramid]:
  """The times [B] and the noise of a batch."""
  sizes = pyramid.level_batch_sizes(len(batch['scale']), objective.fractions)
  time_rng, noise_rng = jax.random.split(rng)
  t = loss.draw_time(time_rng, sizes[0], objective.schedule.num_steps)
  return t, process.draw_noise(
    noise_rng,
    [
      jax.ShapeDtypeStruct((size, pixels, pixels, 3), jnp.float32)
      for size, pixels in zip(sizes, resolutions, strict=True)
    ],
  )


def _losses(
  model: Matryoshka,
  objective: Objective,
  params: Params,
  batch: Batch,
  t: jax.Array,
  eps: pyramid.Pyramid,
) -> tuple[jax.Array, jax.Array]:
  """Loss per example [B], and each level's mean loss [levels]."""
  repeats = _repeats(objective, batch)
  names = mixed_batch.image_names(model.resolutions)
  own = {
    level: pyramid.to_float(batch[name])
    for level, name in enumerate(names)
    if name in batch
  }
  images = pyramid.make_pyramid(
    own.pop(len(names) - 1),
    model.resolutions,
    objective.fractions,
    coarse=own,
    repeats=repeats,
  )
  cond = model.encode(params, batch['text'], batch['scale'])
  per_example, aux = loss.multi_resolution_loss(
    lambda x_t, t: model.denoise(params, x_t, t, cond, repeats),
    objective.schedule,
    images,
    t,
    eps,
    parameterization=objective.parameterization,
    loss_space=objective.loss_space,
    weights=objective.weights,
    time_weights=objective.time_weights,
    repeats=repeats,
  )
  return per_example, aux['level_losses']


def _mean_over_parts(fn: Callable[..., Any], parts: tuple[Any, ...]) -> Any:
  """The mean of what `fn` makes of each part, one after the other.

  Args:
    fn: called with a part of each of `parts`.
    parts: trees of arrays [parts, ...].
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


def new_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  widths: Sequence[float] = (),
) -> TrainState:
  """A stage before its first step; the decaying average copies `params`.

  Args:
    params: of the network.
    optimizer: of the stage.
    widths: of the averages beside the one that decays, see `averages`.
  """
  return TrainState(
    jnp.int32(0),
    params,
    jax.tree.map(jnp.copy, params),
    optimizer.init(params),
    guards.new_state(),
    averages.new_lags(params, widths),
  )


def make_train_step(
  model: Matryoshka,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  guard: guards.Guard,
  ema_decay: float,
  caption_dropout: float,
  empty_text: np.ndarray,
  seed: int,
  accumulate: int = 1,
) -> Callable[
  [TrainState, Batch, Params], tuple[TrainState, dict[str, jax.Array]]
]:
  """The training step, pure and not yet jitted.

  Args:
    model: the network.
    objective: what to minimise.
    optimizer: applied to all parameters.
    guard: decides which steps leave parameters, averages and optimizer as
      they were, bit for bit.
    ema_decay: of the average, see `optim.update_average`. The state says
      which others there are.
    caption_dropout: probability of training on the empty caption.
    empty_text: the empty caption, as one of the batch's 'text'.
    seed: of times, noise and dropout, together with the step number.
    accumulate: parts of the batch, of whole patterns of a mixed one, that go
      through the network one after the other. Their gradients are summed, so
      that the step is that of the batch, to rounding, in the memory of a part
      (and of the noise, which is drawn for all).

  Returns:
    (state, batch, frozen) -> (state, metrics): `loss`, `level_losses`
    [levels], `grad_norm` before clipping, `bad_records`, the number of
    replaced ones, whether any process wants to `stop`, `skipped` steps so far
    and `skipped_in_a_row`, 0 after a good one. `frozen` holds the parameters
    that the model needs beside the state's, {} if none.
  """

  def train_step(state, batch, frozen):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    loss_rng, dropout_rng = jax.random.split(rng)
    dropped = jax.random.bernoulli(
      dropout_rng, caption_dropout, (len(batch['text']), 1)
    )
    text = batch['text']
    dropped = dropped.reshape(-1, *(1,) * (text.ndim - 1))
    batch = batch | {
      'text': jnp.where(dropped, jnp.asarray(empty_text, text.dtype), text)
    }

    t, eps = _draw(objective, model.resolutions, batch, loss_rng)

    def mean_loss(params, batch, t, eps):
      per_example, levels = _losses(
        model, objective, params | frozen, batch, t, eps
      )
      return per_example.mean(), levels

    differentiate = functools.partial(
      jax.value_and_grad(mean_loss, has_aux=True), state.params
    )
    if accumulate == 1:
      (total, levels), grads = differentiate(batch, t, eps)
    else:
      (total, levels), grads = _mean_over_parts(
        differentiate,
        mixed_batch.split(
          (batch, t, eps), accumulate, _repeats(objective, batch)
        ),
      )
    grad_norm = optax.tree.norm(grads)
    good, guard_state = guards.judge(guard, state.guard, total, grad_norm)

    def update(state):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
      return state._replace(
        params=params,
        opt_state=opt_state,
        ema=optim.update_average(state.ema, params, state.step, ema_decay),
        lags=averages.update_lags(
          state.lags, state.params, params, state.guard.accepted + 1
        ),
      )

    # A choice of each leaf, new or old, would read the old after the new is
    # there: XLA would copy parameters and moments first.
    state = jax.lax.cond(good, update, lambda state: state, state)
    metrics = {
      'loss': total,
      'level_losses': levels,
      'grad_norm': grad_norm,
      'bad_records': batch['bad'].sum(),
      'stop': batch['stop'].any(),
      'skipped': guard_state.skipped,
      'skipped_in_a_row': guard_state.in_a_row,
    }
    return state._replace(step=state.step + 1, guard=guard_state), metrics

  return train_step


def jit_train_step(
  train_step: Callable, state: TrainState, batch: Batch, frozen: Params
) -> Callable:
  """Jits a training step, which takes over the memory of its state.

  Args:
    train_step: as `make_train_step` makes it.
    state, batch, frozen: its arguments, or `jax.ShapeDtypeStruct`s with the
      shardings of what they stand for.
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


def make_eval_step(
  model: Matryoshka,
  objective: Objective,
  seed: int,
) -> Callable[[Params, Batch, Any], jax.Array]:
  """(params, batch, index) -> each level's mean loss [levels].

  Times and noise depend on `seed` and the batch's index alone, so that two
  checkpoints are compared on the same draws.
  """

  def eval_step(params, batch, index):
    rng = jax.random.fold_in(jax.random.key(seed), index)
    t, eps = _draw(objective, model.resolutions, batch, rng)
    return _losses(model, objective, params, batch, t, eps)[1]

  return eval_step


def make_band_step(
  model: Matryoshka,
  objective: Objective,
  seed: int,
  num_bands: int,
) -> Callable[[Params, Batch, Any], tuple[jax.Array, jax.Array]]:
  """(params, batch, index) -> losses of each level and band of noise.

  The bands are equal parts of the noising steps, little noise first. Times
  and noise are those of `make_eval_step`.

  Returns:
    Sums of the examples' losses, and their number; both [levels, bands].
  """

  def band_step(params, batch, index):
    rng = jax.random.fold_in(jax.random.key(seed), index)
    t, eps = _draw(objective, model.resolutions, batch, rng)

    def level_losses(weights):
      one_level = dataclasses.replace(
        objective, weights=weights, time_weights=None
      )
      return _losses(model, one_level, params, batch, t, eps)[0]

    # Only the weights differ, so the network is called once.
    losses = jax.vmap(level_losses)(jnp.eye(len(model.resolutions)))

    sizes = pyramid.level_batch_sizes(len(t), objective.fractions)
    seen = jnp.stack(
      [
        mixed_batch.pad(jnp.ones(size), len(t), _repeats(objective, batch))
        for size in sizes
      ]
    )
    # The loss of an example weighs as much as those that a level does not see.
    losses *= jnp.array(sizes)[:, None] / len(t)
    bands = jax.nn.one_hot(
      t * num_bands // objective.schedule.num_steps, num_bands
    )
    return losses @ bands, seen @ bands

  return band_step
