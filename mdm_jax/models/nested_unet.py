"""NestedUNet (MDM, arXiv 2310.15111, section 3.2), of any depth.

Levels may differ in the number of frames as they do in resolution. A level that
is finer in time wraps one that is coarser: its features are averaged over the
frames that one coarser frame stands for, and what comes back is repeated.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from mdm_jax import mixed_batch
from mdm_jax.models import attention, layers
from mdm_jax.models.conditioning import Cond, TextConditioning, TextSpec
from mdm_jax.models.transformer import Transformer
from mdm_jax.models.unet import LevelSpec, UNet


class NestedUNet(nn.Module):
  """Denoises every level of a pyramid at once.

  Parameters are `text`, which the levels share, and `level_0` (the coarsest,
  a complete UNet or transformer), `level_1`, ... A network contains those of
  fewer levels under the same names, so that a stage can start from the weights
  of the previous stage. Levels that share layers (`LevelSpec.share`) must be
  given them in both places, see `shared_layers`.

  Attributes:
    levels: architecture of each level, coarse to fine.
    text_spec: how text features enter the network.
    dtype: of activations and matrix products; parameters are float32.
  """

  levels: tuple[LevelSpec, ...]
  text_spec: TextSpec
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    dims = {spec.temporal_dim for spec in self.levels}
    if len(dims) > 1:
      raise ValueError(
        f'All levels share one temporal_dim; got {sorted(dims)}.'
      )
    self.text = TextConditioning(self.text_spec, dims.pop(), self.dtype)
    if any(spec.kind == 'transformer' for spec in self.levels[1:]):
      raise ValueError('Only the coarsest level can be a transformer.')
    for coarse, fine in zip(self.levels, self.levels[1:]):
      if fine.frames % coarse.frames:
        raise ValueError(
          f'A level of {coarse.frames} frames is inside of one of '
          f'{fine.frames}: each must divide the next.'
        )
    self.level = [
      Transformer(spec, self.dtype)
      if spec.kind == 'transformer'
      else UNet(spec, self.levels[r - 1].channels[0] if r else None, self.dtype)
      for r, spec in enumerate(self.levels)
    ]

  def __call__(
    self, x_t: tuple[jax.Array, ...], t: jax.Array, cond: Cond, repeats: int = 1
  ) -> tuple[jax.Array, ...]:
    """Predicts for every level.

    Args:
      x_t: noisy pyramid, coarse to fine, `x_t[r]` [B_r, H_r, W_r, 3], or for a
        level of several frames [B_r, T_r, H_r, W_r, 3]. In a mixed batch
        B_r < B_0, see `mixed_batch`.
      t: time indices, as in training: 0 is the first noisy step. [B_0], shared
        by all levels, or [B_0, levels], coarse to fine.
      cond: the conditioning of all B_0 examples.
      repeats: periods of a mixed batch, see `mixed_batch`.

    Returns:
      A pyramid of float32 predictions of the shapes of `x_t`.

    Raises:
      ValueError: if the levels differ in temporal_dim, or an outer level is a
        transformer.
    """
    text, mask, pooled = layers.once(self, 'text', lambda: self.text(cond))
    # Down, fine to coarse. `outer` are the features of the next finer level.
    outer, states = None, []
    for r, level in reversed(list(enumerate(self.level))):
      count, frames = len(x_t[r]), self.levels[r].frames
      t_r = mixed_batch.times(t, r, count, repeats)
      scale, pooled_r, *context = mixed_batch.take(
        (cond.scale, pooled, text, mask), count, repeats
      )
      x = _frames(x_t[r], frames)
      # What a level of a cascade, which is alone in its network, also takes.
      given, given_t = (), ()
      if self.levels[r].given_coarse:
        given, given_t = (cond.coarse,), (cond.coarse_t,)
      temb = level.embed(t_r, scale, pooled_r, *given_t)
      context = (attention.per_frame(temb, len(x)), *context)
      if states:
        h = _mean_of_frames(outer.x, self.levels[r + 1].frames // frames)
        h = mixed_batch.pad(_clips(h, frames), count, repeats)
        outer = outer.replace(x=_frames(h, frames))
      h, skips = level.descend(x, *context, outer, *given)
      states.append((h, skips, context))
      if level.inner_channels is not None:
        outer = level.in_adapter(h)
    # Up, coarse to fine.
    out = []
    for r, level in enumerate(self.level):
      bottom, skips, context = states.pop()
      if level.inner_channels is None:
        h = level.middle(bottom, *context)
      else:
        inner = self.levels[r - 1].frames
        x = mixed_batch.take(_clips(h.x, inner), len(x_t[r]), repeats)
        x = attention.per_frame(_frames(x, inner), len(bottom.x))
        h = level.out_adapter(h.replace(x=x), patch=bottom.patch)
        h = bottom.replace(x=bottom.x + h.x)
      h = level.ascend(h, skips, *context)
      out.append(level.out(h).reshape(x_t[r].shape))
    return tuple(out)


def _frames(x: jax.Array, frames: int) -> jax.Array:
  """Clips [B, T, ...] -> their frames [B * T, ...]; images stay as they are."""
  return x if frames == 1 else x.reshape(-1, *x.shape[2:])


def _clips(x: jax.Array, frames: int) -> jax.Array:
  """Undoes `_frames`."""
  return x if frames == 1 else x.reshape(-1, frames, *x.shape[1:])


def _mean_of_frames(x: jax.Array, count: int) -> jax.Array:
  """Averages each `count` frames: [B * T, ...] -> [B * T / count, ...]."""
  return x if count == 1 else x.reshape(-1, count, *x.shape[1:]).mean(axis=1)
