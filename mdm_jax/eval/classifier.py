"""A small classifier, whose features are used for distances between images.

Inception is trained on photographs, and its features say little about
procedurally drawn shapes.
"""

from collections.abc import Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

_WIDTHS = (32, 64, 128, 128)
FEATURES = 64


class Classifier(nn.Module):
  """Classifies several attributes of an image from one vector of features.

  Attributes:
    classes: attribute -> number of classes.
  """

  classes: Mapping[str, int]

  @nn.compact
  def __call__(
    self, images: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classifies images.

    Args:
      images: uint8 [B, H, W, 3].

    Returns:
      Features [B, FEATURES], and for each attribute logits [B, classes].
    """
    h = images.astype(jnp.float32) / 127.5 - 1
    for width in _WIDTHS:
      h = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), 2)(h)))
    # Flattened and not averaged, because positions matter.
    features = nn.Dense(FEATURES)(h.reshape(len(h), -1))
    h = nn.relu(features)
    return features, {
      name: nn.Dense(number, name=name)(h)
      for name, number in self.classes.items()
    }


def train(
  images: np.ndarray,
  labels: Mapping[str, np.ndarray],
  *,
  num_steps: int,
  batch_size: int = 64,
  seed: int = 0,
) -> tuple[Classifier, dict]:
  """Trains a classifier on all attributes at once.

  Args:
    images: uint8 [N, H, W, 3].
    labels: attribute -> classes, int [N], from 0.
    num_steps: steps of Adam, with cosine decay of the learning rate to 0.
    batch_size: images per step, sampled with replacement.
    seed: of the parameters and the batches.

  Returns:
    The classifier and its parameters.
  """
  classifier = Classifier(
    {name: int(values.max()) + 1 for name, values in labels.items()}
  )
  init = jax.jit(classifier.init)  # Else each operation is compiled by itself.
  params = init(jax.random.key(seed), images[:1])['params']
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

  def loss(params, images, labels):
    _, logits = classifier.apply({'params': params}, images)
    return sum(
      optax.softmax_cross_entropy_with_integer_labels(
        logits[name], labels[name]
      ).mean()
      for name in labels
    )

  @jax.jit
  def step(params, state, images, labels):
    updates, state = optimizer.update(
      jax.grad(loss)(params, images, labels), state
    )
    return optax.apply_updates(params, updates), state

  state, rng = optimizer.init(params), np.random.default_rng(seed)
  for _ in range(num_steps):
    rows = rng.integers(len(images), size=batch_size)
    params, state = step(
      params,
      state,
      images[rows],
      {name: values[rows] for name, values in labels.items()},
    )
  return classifier, params
