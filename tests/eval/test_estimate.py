"""Standard errors are the deviations of repeated evaluations."""

import json

import numpy as np
import pytest

from mdm_jax.eval import estimate


def test_mean():
  values = np.random.default_rng(0).normal(3, 2, 50)
  found = estimate.mean(values)
  assert found == pytest.approx(values.mean())
  assert found.count == 50
  assert found.standard_error == pytest.approx(values.std(ddof=1) / 50**0.5)
  one_each = estimate.of_groups(values, [1] * 50)
  assert one_each.standard_error == pytest.approx(found.standard_error)
  assert estimate.mean([2.0]).standard_error is None
  assert json.dumps({'a': estimate.mean([1.0, 2.0])}) == '{"a": 1.5}'


def test_share():
  found = estimate.of_share(0.25, 16)
  marks = np.array([1] * 4 + [0] * 12)
  assert found == 0.25
  assert found.standard_error == pytest.approx(marks.std(ddof=1) / 4)


def test_marks_of_an_image_depend_on_each_other():
  """Against the deviation over many evaluations of 60 images each."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(3000):
    counts = rng.integers(0, 3, 60)
    quality = rng.beta(0.5, 0.5, 60)  # Most images are all right, or all wrong.
    totals = [rng.random(n) < p for n, p in zip(counts, quality)]
    found.append(estimate.of_groups(list(map(sum, totals)), counts))
  deviation = np.std(found)
  errors = [each.standard_error for each in found]
  assert np.mean(errors) == pytest.approx(deviation, rel=0.04)
  # As if marks were independent.
  naive = [(p * (1 - p) / p.count) ** 0.5 for p in found]
  assert np.mean(naive) < 0.9 * deviation
