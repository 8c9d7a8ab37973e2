"""The small classifier learns, and its features separate sets of images."""

import jax
import numpy as np

from mdm_jax.eval import classifier


def test_learns_shapes_and_positions():
  rng = np.random.default_rng(0)
  rows, colors = rng.integers(2, size=(2, 256))
  images = rng.integers(0, 60, (256, 16, 16, 3), np.uint8)
  for image, row, color in zip(images, rows, colors):
    image[8 * row : 8 * row + 8, 4:12, color] += 150
  labels = {'row': rows, 'color': colors}
  network, params = classifier.train(
    images[:192],
    {name: each[:192] for name, each in labels.items()},
    num_steps=40,
  )
  features, logits = jax.jit(network.apply)({'params': params}, images[192:])
  assert features.shape == (64, classifier.FEATURES)
  for name, expected in labels.items():
    assert (logits[name].argmax(-1) == expected[192:]).mean() > 0.95
