"""I3D, whose logits define the Fréchet Video Distance.

The inflated Inception v1 (Carreira and Zisserman, arXiv 1705.07750) of 400
classes of Kinetics; the distance is of its logits (Unterthiner et al., arXiv
1812.01717). The weights are those that were converted to PyTorch, a state dict
known as `rgb_imagenet.pt` and as `i3d_pretrained_400.pt`.
"""

from collections.abc import Mapping
import functools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.eval import torch_weights

NUM_FEATURES = 400
RESOLUTION = 224
MIN_FRAMES = 9  # fewer leave no two frames to average
RESIZE = 'VideoGPT: bilinear to 224 px without antialiasing, to [-1, 1]'
_EPSILON = 1e-3
_FAMILY = 'give rgb_imagenet.pt, also known as i3d_pretrained_400.pt'
# Of each block the channels of its branches: 1x1; 1x1, 3x3; 1x1, 3x3; 1x1.
_BLOCKS = {
  'Mixed_3b': (64, (96, 128), (16, 32), 32),
  'Mixed_3c': (128, (128, 192), (32, 96), 64),
  'MaxPool3d_4a_3x3': ((3, 3, 3), (2, 2, 2)),
  'Mixed_4b': (192, (96, 208), (16, 48), 64),
  'Mixed_4c': (160, (112, 224), (24, 64), 64),
  'Mixed_4d': (128, (128, 256), (24, 64), 64),
  'Mixed_4e': (112, (144, 288), (32, 64), 64),
  'Mixed_4f': (256, (160, 320), (32, 128), 128),
  'MaxPool3d_5a_2x2': ((2, 2, 2), (2, 2, 2)),
  'Mixed_5b': (256, (160, 320), (32, 128), 128),
  'Mixed_5c': (384, (192, 384), (48, 128), 128),
}
# Tensors by which the network is found in a checkpoint.
NAMES = (
  'logits.conv3d.weight',
  'logits.conv3d.bias',
  'Conv3d_1a_7x7.conv3d.weight',
  'Mixed_5c.b3b.conv3d.weight',
)


def preprocess(clips: jax.Array) -> jax.Array:
  """Resizes and scales clips, as most programs do that compute the distance.

  Bilinear interpolation of floats, without antialiasing, with half-pixel
  centres.

  Args:
    clips: uint8 `[B, T, H, W, 3]`.

  Returns:
    float32 `[B, T, 224, 224, 3]` in [-1, 1].
  """
  shape = (*clips.shape[:2], RESOLUTION, RESOLUTION, 3)
  x = clips.astype(jnp.float32)
  return 2 * jax.image.resize(x, shape, 'linear', antialias=False) / 255 - 1


class I3D(nn.Module):
  """Clips from `preprocess`, `[B, T >= 9, 224, 224, 3]` -> logits `[B, 400]`.

  Logits of longer clips are averaged over time.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _Unit(64, (7, 7, 7), 2, name='Conv3d_1a_7x7')(x)
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    x = _Unit(64, name='Conv3d_2b_1x1')(x)
    x = _Unit(192, (3, 3, 3), name='Conv3d_2c_3x3')(x)
    x = _pool(x, (1, 3, 3), (1, 2, 2))
    for name, widths in _BLOCKS.items():
      if name.startswith('Max'):
        x = _pool(x, *widths)
      else:
        x = _Mixed(widths, name=name)(x)
    x = nn.avg_pool(x, (2, 7, 7))
    x = nn.Conv(NUM_FEATURES, (1, 1, 1), name='logits')(x)
    return x.mean((1, 2, 3))


def _pool(x: jax.Array, size: tuple, strides: tuple = (1, 1, 1)) -> jax.Array:
  return nn.max_pool(x, size, strides, 'SAME')


class _Unit(nn.Module):
  """Convolution, bias and ReLU; the batch norm is folded into the first two."""

  features: int
  size: tuple[int, int, int] = (1, 1, 1)
  stride: int = 1

  @nn.compact
  def __call__(self, x):
    strides = (self.stride,) * 3
    return nn.relu(
      nn.Conv(self.features, self.size, strides, 'SAME', name='conv3d')(x)
    )


class _Mixed(nn.Module):
  """An Inception block: four branches, joined by their channels."""

  widths: tuple

  @nn.compact
  def __call__(self, x):
    first, second, third, last = self.widths
    cube = functools.partial(_Unit, size=(3, 3, 3))
    return jnp.concatenate(
      [
        _Unit(first, name='b0')(x),
        cube(second[1], name='b1b')(_Unit(second[0], name='b1a')(x)),
        cube(third[1], name='b2b')(_Unit(third[0], name='b2a')(x)),
        _Unit(last, name='b3b')(_pool(x, (3, 3, 3))),
      ],
      axis=-1,
    )


def from_state_dict(tensors: Mapping[str, np.ndarray]) -> dict:
  """Converts a PyTorch state dict to parameters of `I3D`.

  Batch norms, which are constant, are folded into their convolutions.

  Args:
    tensors: name -> tensor.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    ValueError: the weights are those of another network.
  """
  shapes = traverse_util.flatten_dict(
    jax.eval_shape(
      I3D().init,
      jax.random.key(0),
      jnp.zeros((1, MIN_FRAMES, RESOLUTION, RESOLUTION, 3)),
    )['params']
  )
  units, wanted = {}, {'logits.conv3d.bias': (NUM_FEATURES,)}
  for path, leaf in shapes.items():
    if path[-1] != 'kernel':
      continue
    if path[0] == 'logits':
      *size, channels, features = leaf.shape
      wanted['logits.conv3d.weight'] = (features, channels, *size)
    else:
      units[path[:-1]] = conv, norm = _names(path)
      wanted |= torch_weights.folded_shapes(conv, norm, leaf.shape)
  torch_weights.require_shapes(tensors, wanted, _FAMILY)

  logits = np.asarray(tensors['logits.conv3d.weight'], np.float32)
  params = {
    ('logits', 'kernel'): np.moveaxis(logits, (0, 1), (-1, -2)),
    ('logits', 'bias'): np.asarray(tensors['logits.conv3d.bias'], np.float32),
  }
  for path, (conv, norm) in units.items():
    params[*path, 'kernel'], params[*path, 'bias'] = torch_weights.folded(
      tensors, conv, norm, _EPSILON
    )
  return traverse_util.unflatten_dict(params)


def _names(path: tuple[str, ...]) -> tuple[str, str]:
  """PyTorch's names of a unit's convolution and batch norm."""
  unit = '.'.join(path[:-2])
  return f'{unit}.conv3d', f'{unit}.bn'
