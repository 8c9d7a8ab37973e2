"""Inception v3, whose features define the Frechet Inception Distance.

TensorFlow's graph of 2015-12-05 (Szegedy et al., arXiv 1512.00567; Heusel et
al., arXiv 1706.08500) with the weights `pt_inception-2015-12-05`, as
pytorch-fid runs it. It differs from torchvision's network: average pools
exclude padding, and the last block has a max pool.
"""

from collections.abc import Mapping

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.eval import torch_weights

NUM_FEATURES = 2048
RESOLUTION = 299
RESIZE = (
  'pytorch-fid: bilinear to 299 px without antialiasing, from uint8 / 255'
)
_NUM_CLASSES = 1008  # torchvision's network has 1000
_EPSILON = 1e-3
_FAMILY = 'give pt_inception-2015-12-05-6726825d.pth'


def preprocess(images: jax.Array) -> jax.Array:
  """Resizes and scales images as pytorch-fid does.

  Bilinear interpolation of floats, without antialiasing, with half-pixel
  centres.

  Args:
    images: uint8 `[B, H, W, 3]`.

  Returns:
    float32 `[B, 299, 299, 3]` in [-1, 1].
  """
  x = images.astype(jnp.float32) / 255
  shape = (len(x), RESOLUTION, RESOLUTION, 3)
  return 2 * jax.image.resize(x, shape, 'linear', antialias=False) - 1


class Inception(nn.Module):
  """Images from `preprocess`, `[B, 299, 299, 3]` -> features `[B, 2048]`."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _conv(32, (3, 3), 'Conv2d_1a_3x3', stride=2, padding='VALID')(x)
    x = _conv(32, (3, 3), 'Conv2d_2a_3x3', padding='VALID')(x)
    x = _conv(64, (3, 3), 'Conv2d_2b_3x3')(x)
    x = _shrink(x)
    x = _conv(80, (1, 1), 'Conv2d_3b_1x1')(x)
    x = _conv(192, (3, 3), 'Conv2d_4a_3x3', padding='VALID')(x)
    x = _shrink(x)
    x = _Block35(32, name='Mixed_5b')(x)
    x = _Block35(64, name='Mixed_5c')(x)
    x = _Block35(64, name='Mixed_5d')(x)
    x = _To17(name='Mixed_6a')(x)
    x = _Block17(128, name='Mixed_6b')(x)
    x = _Block17(160, name='Mixed_6c')(x)
    x = _Block17(160, name='Mixed_6d')(x)
    x = _Block17(192, name='Mixed_6e')(x)
    x = _To8(name='Mixed_7a')(x)
    x = _Block8(_average, name='Mixed_7b')(x)
    x = _Block8(_maximum, name='Mixed_7c')(x)
    return x.mean((1, 2))


class _Convolution(nn.Module):
  """Convolution, bias and ReLU; the batch norm is folded into the first two."""

  features: int
  size: tuple[int, int]
  stride: int = 1
  padding: str = 'SAME'  # symmetric, because all sizes are odd

  @nn.compact
  def __call__(self, x):
    return nn.relu(
      nn.Conv(
        self.features,
        self.size,
        (self.stride, self.stride),
        self.padding,
        name='conv',
      )(x)
    )


def _conv(features, size, name, **options) -> _Convolution:
  return _Convolution(features, size, name=name, **options)


def _chain(x, *convolutions):
  for convolution in convolutions:
    x = convolution(x)
  return x


def _join(*branches):
  return jnp.concatenate(branches, axis=-1)


def _shrink(x):
  return nn.max_pool(x, (3, 3), (2, 2))


def _average(x):
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _maximum(x):
  return nn.max_pool(x, (3, 3), padding='SAME')


class _Block35(nn.Module):
  pool_features: int

  @nn.compact
  def __call__(self, x):
    return _join(
      _conv(64, (1, 1), 'branch1x1')(x),
      _chain(
        x, _conv(48, (1, 1), 'branch5x5_1'), _conv(64, (5, 5), 'branch5x5_2')
      ),
      _chain(
        x,
        _conv(64, (1, 1), 'branch3x3dbl_1'),
        _conv(96, (3, 3), 'branch3x3dbl_2'),
        _conv(96, (3, 3), 'branch3x3dbl_3'),
      ),
      _conv(self.pool_features, (1, 1), 'branch_pool')(_average(x)),
    )


class _To17(nn.Module):
  @nn.compact
  def __call__(self, x):
    return _join(
      _conv(384, (3, 3), 'branch3x3', stride=2, padding='VALID')(x),
      _chain(
        x,
        _conv(64, (1, 1), 'branch3x3dbl_1'),
        _conv(96, (3, 3), 'branch3x3dbl_2'),
        _conv(96, (3, 3), 'branch3x3dbl_3', stride=2, padding='VALID'),
      ),
      _shrink(x),
    )


class _Block17(nn.Module):
  width: int  # channels between the 1x7 and 7x1 convolutions

  @nn.compact
  def __call__(self, x):
    width, row, column = self.width, (1, 7), (7, 1)
    return _join(
      _conv(192, (1, 1), 'branch1x1')(x),
      _chain(
        x,
        _conv(width, (1, 1), 'branch7x7_1'),
        _conv(width, row, 'branch7x7_2'),
        _conv(192, column, 'branch7x7_3'),
      ),
      _chain(
        x,
        _conv(width, (1, 1), 'branch7x7dbl_1'),
        _conv(width, column, 'branch7x7dbl_2'),
        _conv(width, row, 'branch7x7dbl_3'),
        _conv(width, column, 'branch7x7dbl_4'),
        _conv(192, row, 'branch7x7dbl_5'),
      ),
      _conv(192, (1, 1), 'branch_pool')(_average(x)),
    )


class _To8(nn.Module):
  @nn.compact
  def __call__(self, x):
    return _join(
      _chain(
        x,
        _conv(192, (1, 1), 'branch3x3_1'),
        _conv(320, (3, 3), 'branch3x3_2', stride=2, padding='VALID'),
      ),
      _chain(
        x,
        _conv(192, (1, 1), 'branch7x7x3_1'),
        _conv(192, (1, 7), 'branch7x7x3_2'),
        _conv(192, (7, 1), 'branch7x7x3_3'),
        _conv(192, (3, 3), 'branch7x7x3_4', stride=2, padding='VALID'),
      ),
      _shrink(x),
    )


class _Block8(nn.Module):
  pool: object  # a function [B, H, W, C] -> [B, H, W, C]

  @nn.compact
  def __call__(self, x):
    row, column = (1, 3), (3, 1)
    branch3x3 = _conv(384, (1, 1), 'branch3x3_1')(x)
    branch3x3dbl = _chain(
      x,
      _conv(448, (1, 1), 'branch3x3dbl_1'),
      _conv(384, (3, 3), 'branch3x3dbl_2'),
    )
    return _join(
      _conv(320, (1, 1), 'branch1x1')(x),
      _conv(384, row, 'branch3x3_2a')(branch3x3),
      _conv(384, column, 'branch3x3_2b')(branch3x3),
      _conv(384, row, 'branch3x3dbl_3a')(branch3x3dbl),
      _conv(384, column, 'branch3x3dbl_3b')(branch3x3dbl),
      _conv(192, (1, 1), 'branch_pool')(self.pool(x)),
    )


# Tensors by which the network is found in a checkpoint.
NAMES = (
  'fc.weight',
  'fc.bias',
  'Conv2d_1a_3x3.conv.weight',
  'Mixed_7c.branch_pool.conv.weight',
)


def from_state_dict(tensors: Mapping[str, np.ndarray]) -> dict:
  """Converts pytorch-fid's weights to parameters of `Inception`.

  Batch norms, which are constant, are folded into their convolutions.

  Args:
    tensors: name -> tensor, from `pt_inception-2015-12-05-6726825d.pth`.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    ValueError: tensors are missing, unexpected or of other shapes, because the
      weights are those of another network. The message names them.
  """
  shapes = traverse_util.flatten_dict(
    jax.eval_shape(
      Inception().init,
      jax.random.key(0),
      jnp.zeros((1, RESOLUTION, RESOLUTION, 3)),
    )['params']
  )
  kernels = {
    '.'.join(path[:-2]): leaf.shape
    for path, leaf in shapes.items()
    if path[-1] == 'kernel'
  }
  # The classifier is not used, but its shape identifies the network.
  wanted = {
    'fc.weight': (_NUM_CLASSES, NUM_FEATURES),
    'fc.bias': (_NUM_CLASSES,),
  }
  for name, shape in kernels.items():
    wanted |= torch_weights.folded_shapes(f'{name}.conv', f'{name}.bn', shape)
  torch_weights.require_shapes(tensors, wanted, _FAMILY)

  params = {}
  for name in kernels:
    path = (*name.split('.'), 'conv')
    params[*path, 'kernel'], params[*path, 'bias'] = torch_weights.folded(
      tensors, f'{name}.conv', f'{name}.bn', _EPSILON
    )
  return traverse_util.unflatten_dict(params)
