"""Converts the weights of PyTorch's convolutional networks."""

from collections.abc import Mapping

import numpy as np

_FIELDS = ('weight', 'bias', 'running_mean', 'running_var')


def folded(
  tensors: Mapping[str, np.ndarray], convolution: str, norm: str, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
  """Folds a constant batch norm into the convolution before it.

  Args:
    tensors: name -> tensor.
    convolution: name of the convolution, [D, C, *size], without bias.
    norm: name of the batch norm.
    epsilon: of the batch norm.

  Returns:
    float32 kernel [*size, C, D] and bias [D].
  """
  weight, bias, mean, variance = (
    np.asarray(tensors[f'{norm}.{field}'], np.float64) for field in _FIELDS
  )
  scale = weight / np.sqrt(variance + epsilon)
  kernel = np.asarray(tensors[f'{convolution}.weight'], np.float64)
  kernel = np.moveaxis(kernel, (0, 1), (-1, -2)) * scale
  return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)


def folded_shapes(
  convolution: str, norm: str, kernel: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the tensors that `folded` reads.

  Args:
    convolution: as for `folded`.
    norm: as for `folded`.
    kernel: shape of the kernel, (*size, C, D).
  """
  *size, channels, features = kernel
  shapes = {f'{convolution}.weight': (features, channels, *size)}
  return shapes | {f'{norm}.{field}': (features,) for field in _FIELDS}


def require_shapes(
  tensors: Mapping[str, np.ndarray],
  wanted: Mapping[str, tuple[int, ...]],
  remedy: str,
) -> None:
  """Checks that the tensors are those of a network.

  The counters that PyTorch saves with each batch norm do not matter.

  Args:
    tensors: name -> tensor.
    wanted: name -> shape, of all.
    remedy: the end of the message.

  Raises:
    ValueError: tensors are missing, unexpected or of other shapes. The message
      names them.
  """
  found = {
    name: tuple(value.shape)
    for name, value in tensors.items()
    if not name.endswith('.num_batches_tracked')
  }
  problems = [
    f'{name} is {found[name]}, not {shape}'
    if name in found
    else f'{name} is missing'
    for name, shape in wanted.items()
    if found.get(name) != shape
  ]
  problems += [f'{name} is unexpected' for name in found if name not in wanted]
  if problems:
    more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
    raise ValueError(
      'These are weights of another network: '
      + '; '.join(problems[:5])
      + f'{more}: {remedy}.'
    )
