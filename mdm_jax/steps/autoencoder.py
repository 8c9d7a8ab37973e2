"""The loss of an autoencoder, its gradients, and how good its images are.

There is no perceptual and no adversarial term: both need networks beside it.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import mixed_batch
from mdm_jax.diffusion import pyramid
from mdm_jax.models.autoencoder import Autoencoder
from mdm_jax.steps.objective import Batch
from mdm_jax.steps.state import Params
from mdm_jax.steps.train import Gradients, mean_over_parts

# What `make_validation_step` measures.
MEASURED = ('psnr',)
_LARGEST_PSNR = 100.0  # of equal images, in dB
# Squared, less than a step of 8 bits: where an image has no error, the root has
# no finite gradient.
_SMALLEST_ERROR = 1e-5
# Of the likelihood of the codes. Adam does not see it; the global norm of the
# gradients, by which they are clipped, should not either.
_FIT_WEIGHT = 1e-3


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of images as 8 bits, but without rounding.

  Args:
    images: [B, ...] floats in [-1, 1], see `pyramid.to_float`.
    others: [B, ...], which are clipped to what 8 bits hold.

  Returns:
    [B] in dB, at most 100.
  """
  low, high = -127 / 128, 1.0
  error = (jnp.clip(others, low, high) - images) ** 2
  error = error.mean(axis=tuple(range(1, images.ndim)))
  least = (high - low) ** 2 * 10 ** (-_LARGEST_PSNR / 10)
  return -10 * jnp.log10(jnp.maximum(error, least) / (high - low) ** 2)


def code_noise(model: Autoencoder, count: int, rng: jax.Array) -> jax.Array:
  """Standard normal noise of the codes of a batch, [count, h, w, c]."""
  return jax.random.normal(rng, (count, *model.spec.code_shape))


def batch_loss(
  model: Autoencoder, params: Params, images: jax.Array, noise: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of images.

  It is the root mean squared error of an image, plus `kl_weight` times the mean
  KL divergence of a value of the codes. Without the root, the few images that
  are hard would count for more than all others.

  Mean and standard deviation of the codes' channels are fitted by maximum
  likelihood in the same descent. This adds gradients of these parameters alone,
  and nothing to the loss.

  Args:
    model: the autoencoder.
    params: its parameters.
    images: [B, H, H, 3] floats in [-1, 1].
    noise: [B, h, w, c] standard normal, only read with kind 'kl'.

  Returns:
    The loss, a scalar; and scalars by name, means over the images: 'psnr';
    'code_nll', the negative log likelihood of a code's value in nats; with kind
    'kl' also 'pixel_loss' and 'kl'.
  """
  mean, log_variance = model.moments(params, images)
  code = mean
  if log_variance is not None:
    code = mean + jnp.exp(log_variance / 2) * noise
  decoded = model.decode_raw(params, code)
  errors = jnp.square(decoded - images).mean(axis=(1, 2, 3))
  loss = jnp.sqrt(errors + _SMALLEST_ERROR).mean()
  metrics = {'psnr': psnr(images, decoded).mean()}
  if log_variance is not None:
    kl = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean() / 2
    metrics |= {'pixel_loss': loss, 'kl': kl}
    loss += model.spec.kl_weight * kl
  centre, log_std = model.statistics(params)
  errors = (jax.lax.stop_gradient(mean) - centre) * jnp.exp(-log_std)
  nll = (log_std + (errors**2 + np.log(2 * np.pi)) / 2).mean()
  metrics['code_nll'] = nll
  # The sum of the two could fall below 0, and hide how good the images are.
  fit = _FIT_WEIGHT * nll
  return loss + fit - jax.lax.stop_gradient(fit), metrics


def make_gradients(model: Autoencoder, accumulate: int = 1) -> Gradients:
  """Makes the function of gradients that `steps.train.make_step` takes.

  Args:
    model: the autoencoder.
    accumulate: number of microbatches; divides the batch.
  """

  def gradients(params, frozen, batch, rng):
    del frozen
    images = pyramid.to_float(batch['image'])
    noise = code_noise(model, len(images), rng)
    differentiate = jax.value_and_grad(
      functools.partial(batch_loss, model), has_aux=True
    )
    if accumulate == 1:
      return differentiate(params, images, noise)
    return mean_over_parts(
      functools.partial(differentiate, params),
      mixed_batch.split((images, noise), accumulate, len(images)),
    )

  return gradients


def make_validation_step(
  model: Autoencoder,
) -> Callable[[Params, Batch, Any], tuple[jax.Array, ...]]:
  """Makes (params, batch, index) -> sums over images, as `make_band_step`.

  Returns:
    A function that returns sums over the `MEASURED` values of images, numbers
    of images, and sums over the squares of these values; all [measured, 1].
  """

  def validation_step(params, batch, index):
    del index
    images = pyramid.to_float(batch['image'])
    decoded = model.decode(params, model.encode(params, images))
    values = psnr(images, decoded)[None, :, None]
    return values.sum(1), jnp.ones_like(values).sum(1), (values**2).sum(1)

  return validation_step


def reconstruct(
  model: Autoencoder, params: Params, images: jax.Array, pixels: str
) -> tuple[jax.Array, jax.Array]:
  """uint8 images [B, H, H, 3], and what is decoded of their codes.

  Args:
    model: the autoencoder.
    params: its parameters.
    images: uint8 [B, H, H, 3].
    pixels: how floats become uint8, see `pyramid.to_uint8`.
  """
  code = model.encode(params, pyramid.to_float(images))
  return images, pyramid.to_uint8(model.decode(params, code), pixels)
