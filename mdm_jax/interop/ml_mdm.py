"""Converts NestedUNet's parameters from and to Apple's PyTorch `ml-mdm`."""

from collections.abc import Iterator, Mapping
import re

from flax import traverse_util
import numpy as np

from mdm_jax.models.unet import LevelSpec

# Our names of layers -> the release's.
_BLOCK = {
  'norm_in': 'norm1',
  'conv_in': 'conv1',
  'time': 'time_layer',
  'norm_out': 'norm2',
  'conv_out': 'conv2',
  'shortcut': 'conv3',
}
_ATTENTION = {
  'norm': 'norm',
  'qkv': 'qkv',
  'norm_text': 'norm_cond',
  'text_kv': 'kv_cond',
  'proj': 'proj_out',
  'ffn_norm': 'ffn.0',
  'ffn_in': 'ffn.1',
  'ffn_out': 'ffn.3',
}
_TEXT_LAYER = {
  'norm': 'attn.norm',
  'qkv': 'attn.qkv',
  'proj': 'attn.proj_out',
  'ffn_norm': 'mlp.main.0',
  'ffn_in': 'mlp.main.1',
  'ffn_out': 'mlp.main.3',
}
_LEVEL = {
  'time_in': 'temb_layer1',
  'time_out': 'temb_layer2',
  'scale_in': 'cond_layers.scale.0',
  'scale_out': 'cond_layers.scale.1',
}
# Tensors by which a network is found in a checkpoint: its finest level has
# them, and every coarser one after 'inner_unet.'.
NAMES = ('conv_in.weight', 'conv_in.bias', 'temb_layer1.weight')
_LEAF = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


def _module_name(path: tuple[str, ...], levels: tuple[LevelSpec, ...]) -> str:
  """Maps the path of one of our modules to the release's dotted name."""
  if path[0] == 'text':
    prefix = 'inner_unet.' * (len(levels) - 1)
    if len(path) == 2:
      return prefix + path[1]
    layer = path[1].removeprefix('layer_')
    return f'{prefix}lm_head.{layer}.{_TEXT_LAYER[path[2]]}'
  r = int(path[0].removeprefix('level_'))
  spec = levels[r]
  prefix = 'inner_unet.' * (len(levels) - 1 - r)
  if len(path) == 2:
    return prefix + _LEVEL.get(path[1], path[1])
  if path[1] == 'middle':
    where = 'attn.0' if path[2] == 'attention' else 'resnets.0'
    index = 1 if path[2] == 'block_1' else 0
    names = _ATTENTION if path[2] == 'attention' else _BLOCK
    return f'{prefix}mid_blocks.{index}.{where}.{names[path[3]]}'
  way, i = re.fullmatch(r'(down|up)_(\d+)', path[1]).groups()
  # The release counts the way up from the coarsest resolution.
  index = int(i) if way == 'down' else len(spec.channels) - 1 - int(i)
  prefix += f'{way}_blocks.{index}.'
  if path[2] in ('downsample', 'upsample'):
    return prefix + 'resample'
  kind, *numbers = path[2].split('_')
  if kind == 'block':
    return f'{prefix}resnets.{numbers[0]}.{_BLOCK[path[3]]}'
  layer = int(numbers[0]) * spec.attention_layers[int(i)] + int(numbers[1])
  return f'{prefix}attn.{layer}.{_ATTENTION[path[3]]}'


def release_names(
  params: Mapping,
  levels: tuple[LevelSpec, ...],
) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
  """Yields our path, the release's name and its shape, for each parameter.

  Args:
    params: NestedUNet's parameters, or their shapes (anything with `.shape`).
    levels: the network's levels, coarse to fine.

  Raises:
    ValueError: a level has what ml-mdm does not have.
  """
  _check(levels)
  for path, leaf in traverse_util.flatten_dict(params).items():
    name = f'{_module_name(path[:-1], levels)}.{_LEAF[path[-1]]}'
    shape = leaf.shape
    if len(shape) == 4:  # HWIO -> OIHW
      shape = (shape[3], shape[2], shape[0], shape[1])
    elif len(shape) == 2:  # in x out -> out x in
      shape = shape[::-1]
      # Linear layers on images are 1x1 convolutions in the release.
      if path[0] != 'text' and re.search(
        r'\.(conv3|qkv|proj_out|ffn\.\d)\.', name
      ):
        shape += (1, 1)
    yield path, name, shape


def _check(levels: tuple[LevelSpec, ...]) -> None:
  """Raises ValueError for levels that ml-mdm cannot have.

  Some would have the same parameters, and another output.
  """
  if any(level.kind != 'unet' for level in levels):
    raise ValueError(
      "ml-mdm has no levels of kind='transformer': its names and weights are "
      'those of UNets.'
    )
  if any(level.given_coarse for level in levels):
    raise ValueError(
      'model.cascade=True: ml-mdm has no network that is given the coarser '
      'images; its weights need model.cascade=False.'
    )
  for r, level in enumerate(levels):
    if level.share != 'none':
      raise ValueError(
        f'model.levels[{r}].share={level.share!r}: the levels of ml-mdm share '
        "no layers; its weights need share='none' in each level."
      )
    if any(level.frame_attention):
      raise ValueError(
        f'model.levels[{r}].frame_attention={level.frame_attention}: ml-mdm '
        'has no such layers; its weights need a stage of images, or ().'
      )
    for key, only in (('position_waves', 0), ('patch_size', 1)):
      if getattr(level, key) != only:
        raise ValueError(
          f'model.levels[{r}].{key}={getattr(level, key)}: ml-mdm has none; '
          f'its weights need {key}={only}.'
        )
  # Its UNet ignores the setting that its levels around another one have.
  if levels[0].normalize_input:
    raise ValueError(
      'model.levels[0].normalize_input=True: ml-mdm normalizes the input of '
      'outer levels alone; its weights need False.'
    )


def from_release(
  params: Mapping,
  levels: tuple[LevelSpec, ...],
  state_dict: Mapping[str, np.ndarray],
) -> dict:
  """Converts the release's state dict to our parameters.

  Args:
    params: NestedUNet's parameters, or their shapes.
    levels: the network's levels, coarse to fine.
    state_dict: the release's tensors by name.

  Returns:
    Float32 parameters of the structure of `params`.

  Raises:
    ValueError: a tensor is missing, unknown, of another shape or not finite,
      or see `release_names`.
  """
  flat, problems, left = {}, [], set(state_dict)
  for path, name, shape in release_names(params, levels):
    if name not in state_dict:
      problems.append(f'missing {name}')
      continue
    left.remove(name)
    with np.errstate(over='ignore'):
      value = np.asarray(state_dict[name], np.float32)
    if value.shape != shape:
      problems.append(f'{name} is {value.shape}, not {shape}')
    elif not np.isfinite(value).all():
      problems.append(f'{name} has numbers that are not finite')
    elif value.ndim == 4 and shape[2:] == (3, 3):
      flat[path] = value.transpose(2, 3, 1, 0)
    elif value.ndim >= 2:
      flat[path] = value.reshape(shape[:2]).T
    else:
      flat[path] = value
  problems += [f'unknown {name}' for name in sorted(left)]
  if problems:
    more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
    raise ValueError(
      'The weights do not fit: ' + '; '.join(problems[:5]) + more
    )
  return traverse_util.unflatten_dict(flat)


def to_release(
  params: Mapping, levels: tuple[LevelSpec, ...]
) -> dict[str, np.ndarray]:
  """Converts our parameters to the release's state dict.

  It is the inverse of `from_release`.

  Args:
    params: NestedUNet's parameters, in host memory.
    levels: the network's levels, coarse to fine.

  Returns:
    Arrays by the release's names.

  Raises:
    ValueError: see `release_names`.
  """
  flat, state_dict = traverse_util.flatten_dict(params), {}
  for path, name, shape in release_names(params, levels):
    value = np.asarray(flat[path])
    if value.ndim == 4:
      value = value.transpose(3, 2, 0, 1)
    state_dict[name] = (value.T if value.ndim == 2 else value).reshape(shape)
  return state_dict
