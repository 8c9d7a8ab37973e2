"""Layers that a level takes from the next coarser one instead of its own.

A level's coarsest features have the resolution of the next coarser level's
finest ones. A level with `share` other than 'none' uses there the weights of
the coarser level, on the way down and on the way up: its n-th layer of a
signature is the coarser level's n-th layer of that signature, and layers
without a counterpart stay its own. A signature is

- of a residual block, the widths of its inputs and of its output, and
  `num_groups`;
- of an attention layer, its width, `num_heads`, `num_groups` and
  `attention_ffn`;
- of a layer of attention between frames, its width, `num_heads` and
  `frame_attention_kind`.

With 'all' also the embeddings of the time and of the micro-condition are those
of the coarser level, and those of `conv_in`, `position`, `norm_out` and
`conv_out` that are of the same shapes. A learned vector, `level_embedding`,
tells the levels apart.

The coarser level owns the shared weights, which are stored once, under its
names. `Matryoshka` applies the network to parameters that have them in both
places, so that gradients add up.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from flax import traverse_util

from mdm_jax.models.unet import LevelSpec


def with_shared(params: Any, levels: Sequence[LevelSpec]) -> Any:
  """Puts shared layers where each level looks for its own.

  Args:
    params: of a `NestedUNet`, without the layers that levels share.
    levels: its levels, coarse to fine.

  Returns:
    Parameters as if nothing were shared; the same arrays stand twice.

  Raises:
    ValueError: see `shared_layers`.
  """
  if not (shared := _shared(levels)):
    return params
  flat = traverse_util.flatten_dict(params, sep='/')
  # Coarse to fine, as a level may share what the next coarser one shares.
  for path, owner in shared.items():
    flat |= {path + name: flat[owner + name] for name in _below(flat, owner)}
  return traverse_util.unflatten_dict(flat, sep='/')


def without_shared(params: Any, levels: Sequence[LevelSpec]) -> Any:
  """Undoes `with_shared`: the parameters that the levels own."""
  if not (shared := _shared(levels)):
    return params
  flat = traverse_util.flatten_dict(params, sep='/')
  for path, owner in reversed(shared.items()):
    for name in _below(flat, owner):
      del flat[path + name]
  return traverse_util.unflatten_dict(flat, sep='/')


def _below(flat: dict[str, Any], path: str) -> list[str]:
  """What follows a module's path in the names of its parameters."""
  return [
    name.removeprefix(path) for name in flat if name.startswith(f'{path}/')
  ]


def _shared(levels: Sequence[LevelSpec]) -> dict[str, str]:
  """Paths of shared layers, coarse to fine, and those of their owners."""
  return {
    f'level_{r}/{path}': f'level_{r - 1}/{owner}'
    for r, spec in enumerate(levels)
    for path, owner in shared_layers(spec, levels[r - 1] if r else None).items()
  }


def shared_layers(outer: LevelSpec, inner: LevelSpec | None) -> dict[str, str]:
  """The layers that a level takes from the next coarser one.

  Args:
    outer: the level.
    inner: the next coarser level; None for the coarsest.

  Returns:
    Path of the coarser level's layer, by that of the level's layer, such as
    {'down_2/block_1': 'down_0/block_0'}.

  Raises:
    ValueError: `share` is not 'none', and there is nothing to share.
  """
  share = f'share={outer.share!r}'
  if outer.share == 'none':
    return {}
  if inner is None:
    raise ValueError(
      f"{share}: the coarsest level has none to share with; use 'none'."
    )
  if inner.kind != 'unet':
    raise ValueError(
      f"{share}: the next coarser level is of kind='transformer', which has "
      "no layers of a UNet; use 'none'."
    )
  last, found = len(outer.channels) - 1, {}
  for way in ('down', 'up'):
    free = defaultdict(list)
    for name, signature in _layers(inner, way, 0):
      free[signature].append(f'{way}_0/{name}')
    for name, signature in _layers(outer, way, last):
      if free[signature]:
        found[f'{way}_{last}/{name}'] = free[signature].pop(0)
  if outer.share == 'all':
    return found | {name: name for name in _at_the_ends(outer, inner)}
  if not found:
    raise ValueError(
      f'{share}: no layer of channels={outer.channels} has the widths, '
      f'num_groups and num_heads of one of the next coarser level, channels='
      f'{inner.channels}, at the resolution where they meet; make its last two '
      f"channels {inner.channels[0]}, or use 'none'."
    )
  return found


def _at_the_ends(outer: LevelSpec, inner: LevelSpec) -> Iterator[str]:
  """Modules outside of the resolutions that have the same shapes."""
  yield from ('time_in', 'time_out', 'scale_in', 'scale_out')
  if outer.channels[0] != inner.channels[0]:
    return
  if (outer.patch_size, outer.image_channels) == (
    inner.patch_size,
    inner.image_channels,
  ):
    yield from ('conv_in', 'conv_out')
  if outer.position_waves == inner.position_waves != 0:
    yield 'position'
  if outer.num_groups == inner.num_groups:
    yield 'norm_out'


def _layers(
  spec: LevelSpec, way: str, index: int
) -> Iterator[tuple[str, tuple]]:
  """Name and signature of each layer of a resolution, 'down' or 'up'."""
  width = spec.channels[index]
  attention = 'attention', width, spec.num_heads, spec.num_groups
  frames = 'frames', width, spec.num_heads, spec.frame_attention_kind
  for j, inputs in enumerate(_inputs(spec, way, index)):
    yield f'block_{j}', ('block', inputs, width, spec.num_groups)
    for k in range(spec.attention_layers[index]):
      yield f'attention_{j}_{k}', (*attention, spec.attention_ffn)
    for k in range(spec.frame_layers(index)):
      yield f'frame_attention_{j}_{k}', frames


def _inputs(spec: LevelSpec, way: str, index: int) -> list[tuple[int, ...]]:
  """Widths of the inputs of the residual blocks of a resolution.

  On the way up of the coarsest resolution they are those of an outer level: the
  middle of the innermost one may have widened what comes.
  """
  h = spec.channels[0]
  for width, count in zip(spec.channels[:index], spec.num_blocks):
    h = width if count else h
  width, count = spec.channels[index], spec.num_blocks[index]
  if way == 'down':
    return [(h,), *[(width,)] * (count - 1)][:count]
  is_last = index == len(spec.channels) - 1
  below = spec.down_channels if is_last else spec.channels[index + 1]
  return list(zip([below, *[width] * count], [*[width] * count, h]))
