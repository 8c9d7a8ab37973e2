"""Initial parameters, made by NumPy on the host.

Means and standard deviations are those that the modules declare for Flax's own
`init`, which has nothing beyond two standard deviations. Compiling that would
take long on a CPU, and NumPy's arrays are the same on every mesh and backend.
"""

import math
from typing import Any
import zlib

import jax
import numpy as np

# Modules whose kernel starts as zero, so that their block adds nothing.
_ZERO = (
  'conv_out',
  'proj',
  'ffn_out',
  'scale_out',
  'augmentation_out',
  'in_adapter',
  'out_adapter',
)
# Parameters that start as zero in any module.
_ZERO_NAMES = ('bias', 'level_embedding', 'code_mean', 'code_log_std')


def initial_params(shapes: Any, seed: int) -> Any:
  """Initialises every parameter.

  Args:
    shapes: nested dicts of `jax.ShapeDtypeStruct`.
    seed: of the random numbers. The values of a parameter depend on the seed
      and on its path alone.

  Returns:
    Nested dicts of float32 NumPy arrays.
  """

  def initialize(path, leaf):
    module, name = path[-2].key, path[-1].key
    if name in _ZERO_NAMES or (name == 'kernel' and module in _ZERO):
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

  return jax.tree_util.tree_map_with_path(initialize, shapes)
