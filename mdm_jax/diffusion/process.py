"""The forward process of one level, and conversions between predictions.

Everything is elementwise: images [B, H, W, C], `gamma` [B, 1, 1, 1] or a
scalar, signal = sqrt(gamma), noise = sqrt(1 - gamma). The `parameterization`
says what the network predicts: 'v', 'eps' or 'x0'. (x_t, v) is (x0, eps)
rotated (Salimans & Ho, arXiv 2202.00512, appendix D), so conversions from v
are numerically stable; all others divide by the signal or by the noise.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mdm_jax.diffusion.pyramid import Pyramid

# (x_t pyramid, t [B]) -> predictions, a pyramid of the same shapes.
DenoiseFn = Callable[[Pyramid, jax.Array], Pyramid]


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


def add_noise(x0: jax.Array, eps: jax.Array, gamma: jax.Array) -> jax.Array:
  """x_t = signal x0 + noise eps (Ho et al., arXiv 2006.11239, eq. 4)."""
  return jnp.sqrt(gamma) * x0 + jnp.sqrt(1 - gamma) * eps


def target(
  x0: jax.Array, eps: jax.Array, gamma: jax.Array, parameterization: str
) -> jax.Array:
  """The training target of a network, where v = signal eps - noise x0.

  Raises:
    ValueError: if there is no such parameterization.
  """
  match parameterization:
    case 'v':
      return jnp.sqrt(gamma) * eps - jnp.sqrt(1 - gamma) * x0
    case 'eps':
      return eps
    case 'x0':
      return x0
  raise _unknown(parameterization)


def predict_x0(
  prediction: jax.Array,
  x_t: jax.Array,
  gamma: jax.Array,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to x0, the clean image.

  Raises:
    ValueError: if there is no such parameterization.
  """
  signal, noise = jnp.sqrt(gamma), jnp.sqrt(1 - gamma)
  match parameterization:
    case 'v':
      return signal * x_t - noise * prediction
    case 'eps':
      return (x_t - noise * prediction) / signal
    case 'x0':
      return prediction
  raise _unknown(parameterization)


def predict_eps(
  prediction: jax.Array,
  x_t: jax.Array,
  gamma: jax.Array,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to eps, the noise.

  Raises:
    ValueError: if there is no such parameterization.
  """
  signal, noise = jnp.sqrt(gamma), jnp.sqrt(1 - gamma)
  match parameterization:
    case 'v':
      return signal * prediction + noise * x_t
    case 'eps':
      return prediction
    case 'x0':
      return (x_t - signal * prediction) / noise
  raise _unknown(parameterization)


def predict_v(
  prediction: jax.Array,
  x_t: jax.Array,
  gamma: jax.Array,
  parameterization: str,
) -> jax.Array:
  """Converts a prediction to v.

  Raises:
    ValueError: if there is no such parameterization.
  """
  signal, noise = jnp.sqrt(gamma), jnp.sqrt(1 - gamma)
  match parameterization:
    case 'v':
      return prediction
    case 'eps':
      return (prediction - noise * x_t) / signal
    case 'x0':
      return (signal * x_t - prediction) / noise
  raise _unknown(parameterization)


def _unknown(parameterization: str) -> ValueError:
  return ValueError(
    f'Unknown parameterization {parameterization!r}: use v, eps or x0.'
  )
