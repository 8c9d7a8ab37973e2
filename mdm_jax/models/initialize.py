"""Initial parameters, made on the host.

The distributions are those that the modules declare for Flax's own `init`.
Compiling that takes longer than a short run on a CPU can afford, and an
array that NumPy made is the same on every mesh and back end.
"""

import math
from typing import Any
import zlib

import jax
import numpy as np

# Modules that start as zero, so that their block or adapter changes nothing.
_ZERO = (
  'conv_out',
  'proj',
  'ffn_out',
  'scale_out',
  'in_adapter',
  'out_adapter',
)


def initial_params(shapes: Any, seed: int) -> Any:
  """Draws every parameter by its name.

  Args:
    shapes: nested dicts of `jax.ShapeDtypeStruct`.
    seed: with a parameter's path it decides the values.

  Returns:
    Nested dicts of float32 NumPy arrays.
  """

  def draw(path, leaf):
    module, name = path[-2].key, path[-1].key
    if name == 'bias' or (name == 'kernel' and module in _ZERO):
      return np.zeros(leaf.shape, np.float32)
    if name == 'scale':
      return np.ones(leaf.shape, np.float32)
    match name:
      case 'embedding':
        std = 1.0
      case 'position':
        std = 0.02
      case _:  # LeCun normal.
        std = math.prod(leaf.shape[:-1]) ** -0.5
    key = zlib.crc32(jax.tree_util.keystr(path).encode())
    rng = np.random.default_rng((seed, key))
    return np.float32(std) * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)
