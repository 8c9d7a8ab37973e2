"""Optimizers with warm-up and clipping by the global norm."""

from typing import Any

import jax
import optax
import optax.contrib


def learning_rate_schedule(
  peak: float, *, warmup_steps: int, decay: str, num_steps: int
) -> optax.Schedule:
  """Linear warm-up from 0, then a constant rate or a cosine decay to 0.

  Args:
    peak: learning rate after the warm-up.
    warmup_steps: steps of the warm-up.
    decay: 'constant' or 'cosine', which reaches 0 at `num_steps`.
    num_steps: steps of the stage, warm-up included.

  Raises:
    ValueError: an unknown decay.
  """
  warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
  match decay:
    case 'constant':
      rest = optax.constant_schedule(peak)
    case 'cosine':
      rest = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1))
    case _:
      raise ValueError(
        f'Unknown learning rate decay {decay!r}: use constant or cosine.'
      )
  # Shifted by one step, so that the first update does not have a rate of 0.
  return optax.join_schedules(
    [lambda step: warmup(step + 1), rest], [warmup_steps]
  )


def make_optimizer(
  learning_rate: optax.Schedule,
  *,
  name: str,
  b1: float,
  b2: float,
  epsilon: float,
  mu_dtype: str,
  weight_decay: float,
  clip_norm: float,
  adam_scale: float,
) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW or Muon.

  Args:
    learning_rate: schedule of the learning rate.
    name: 'adamw' (Loshchilov & Hutter, 2019), or 'muon' (Jordan et al.,
      2024), which orthogonalises the updates of the hidden layers' kernels
      and updates all other parameters with AdamW, both with Nesterov momentum.
      Muon is for small networks and short runs: it needs learning rates around
      0.02, and adds matrix products to every step.
    b1, b2, epsilon: AdamW's hyperparameters.
    mu_dtype: 'float32' or 'bfloat16', the type in which the first moment is
      stored; it is computed in float32. The second moment is always float32: a
      step changes it by 1 - `b2` of its size, which bfloat16 would round away.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    clip_norm: largest global norm of the gradients.
    adam_scale: with Muon, AdamW's learning rate relative to Muon's.

  Raises:
    ValueError: an unknown optimizer.
  """
  match name:
    case 'adamw':
      update = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay
      )
    case 'muon':
      update = optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        eps=epsilon,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        adam_learning_rate=lambda step: adam_scale * learning_rate(step),
        muon_weight_dimension_numbers=_hidden_kernels,
      )
    case _:
      raise ValueError(f'Unknown optimizer {name!r}: use adamw or muon.')
  if mu_dtype != 'float32':
    update = _store_first_moments(update, mu_dtype)
  return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def _store_first_moments(
  update: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
  """Stores the first moments of AdamW or Muon in another type.

  Optax's own `mu_dtype` also rounds `b1` and their product, so that 0.9 becomes
  0.898.
  """

  def cast(state, dtype):
    def cast_leaf(path, leaf):
      is_first = jax.tree_util.GetAttrKey('mu') in path
      return leaf.astype(dtype) if is_first else leaf

    return jax.tree_util.tree_map_with_path(cast_leaf, state)

  def step(updates, state, params=None):
    updates, state = update.update(updates, cast(state, 'float32'), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(
    lambda params: cast(update.init(params), dtype), step
  )


def _hidden_kernels(params: Any) -> Any:
  """Muon's view of hidden kernels as matrices [all other axes, last axis].

  Returns:
    A tree of `MuonDimensionNumbers`; None for parameters that AdamW updates.
  """

  def dimensions(path, leaf):
    keys = [key.key for key in path]
    at_the_ends = len(keys) == 4 and keys[2] in ('conv_in', 'conv_out')
    if keys[-1] != 'kernel' or at_the_ends:
      return None
    return optax.contrib.MuonDimensionNumbers(
      tuple(range(leaf.ndim - 1)), leaf.ndim - 1
    )

  return jax.tree_util.tree_map_with_path(dimensions, params)
