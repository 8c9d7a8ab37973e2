"""The forward process of one level, and conversions between predictions.

Everything is elementwise: images [B, H, W, C] or clips [B, T, H, W, C], and the
`Coefficients` of x_t = signal x0 + noise eps. The `parameterization` says what
the network predicts:

  'v': signal eps - noise x0. On a variance-preserving path (x_t, v) is (x0,
    eps) rotated (Salimans & Ho, arXiv 2202.00512, appendix D). Conversions from
    it hold on such a path alone.
  'eps', 'x0': the noise, the clean image.
  'velocity': eps - x0, which is dx_t/dt on the linear path (Liu et al., arXiv
    2209.03003, eq. 1).

Conversions from v and from the velocity are numerically stable; all others
divide by the signal or by the noise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from mdm_jax.diffusion.pyramid import Pyramid

# (x_t pyramid, t [B] or [B, levels]) -> predictions, a pyramid of the same
# shapes.
DenoiseFn = Callable[[Pyramid, jax.Array], Pyramid]


class Coefficients(NamedTuple):
  """What x0 and eps are multiplied by in x_t: [B, 1, ...], or scalars."""

  signal: jax.Array
  noise: jax.Array


def sample_noise(
  rng: jax.Array, pyramid: Sequence[jax.Array | jax.ShapeDtypeStruct]
) -> Pyramid:
  """Samples standard normal noise, independent for every level.

  Args:
    rng: a random key.
    pyramid: arrays or `jax.ShapeDtypeStruct`s of the wanted shapes.

  Returns:
    float32 noise of the shapes of `pyramid`.
  """
  return tuple(
    jax.random.normal(jax.random.fold_in(rng, index), level.shape)
    for index, level in enumerate(pyramid)
  )


def add_noise(x0: jax.Array, eps: jax.Array, at: Coefficients) -> jax.Array:
  """x_t = signal x0 + noise eps (Ho et al., arXiv 2006.11239, eq. 4)."""
  return at.signal * x0 + at.noise * eps


def target(
  x0: jax.Array, eps: jax.Array, at: Coefficients, parameterization: str
) -> jax.Array:
  """The training target of a network.

  Raises:
    ValueError: if there is no such parameterization.
  """
  match parameterization:
    case 'v':
      return at.signal * eps - at.noise * x0
    case 'eps':
      return eps
    case 'x0':
      return x0
    case 'velocity':
      return eps - x0
  raise _unknown(parameterization)


def predict_x0(
  prediction: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to x0, the clean image.

  Raises:
    ValueError: if there is no such parameterization.
  """
  signal, noise = at
  match parameterization:
    case 'v':
      return signal * x_t - noise * prediction
    case 'eps':
      return (x_t - noise * prediction) / signal
    case 'x0':
      return prediction
    case 'velocity':
      return (x_t - noise * prediction) / (signal + noise)
  raise _unknown(parameterization)


def predict_eps(
  prediction: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to eps, the noise.

  Raises:
    ValueError: if there is no such parameterization.
  """
  signal, noise = at
  match parameterization:
    case 'v':
      return signal * prediction + noise * x_t
    case 'eps':
      return prediction
    case 'x0':
      return (x_t - signal * prediction) / noise
    case 'velocity':
      return (x_t + signal * prediction) / (signal + noise)
  raise _unknown(parameterization)


def predict_v(
  prediction: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to v, on a variance-preserving path.

  Raises:
    ValueError: if there is no such parameterization.
  """
  signal, noise = at
  match parameterization:
    case 'v':
      return prediction
    case 'eps':
      return (prediction - noise * x_t) / signal
    case 'x0':
      return (signal * x_t - prediction) / noise
    case 'velocity':
      return ((signal - noise) * x_t + prediction) / (signal + noise)
  raise _unknown(parameterization)


def predict_velocity(
  prediction: jax.Array,
  x_t: jax.Array,
  at: Coefficients,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to the velocity, eps - x0.

  Raises:
    ValueError: if there is no such parameterization.
  """
  if parameterization == 'velocity':
    return prediction
  x0, eps = (
    convert(prediction, x_t, at, parameterization)
    for convert in (predict_x0, predict_eps)
  )
  return eps - x0


def _unknown(parameterization: str) -> ValueError:
  return ValueError(
    f'Unknown parameterization {parameterization!r}: use v, eps, x0 or '
    'velocity.'
  )
