"""FLOPs that are counted before compilation."""

import jax
import jax.numpy as jnp
import pytest

from mdm_jax.runtime import peaks

_SIZE = 16
_ONCE = 2 * _SIZE**3  # of a product of matrices


def _times(count):
  """x -> x, multiplied by a matrix in a loop."""
  return lambda x: jax.lax.fori_loop(0, count, lambda _, y: y @ y, x)


def _nested(x):
  return jax.lax.scan(lambda y, _: (_times(5)(y @ y), None), x, length=3)[0]


def _branches(x):
  return jax.lax.cond(x[0, 0] > 0, jax.jit(_times(7)), lambda y: y, x)


@pytest.mark.parametrize(
  'function, products',
  (
    (lambda x: x @ x, 1),
    (lambda x: _times(5)(x) @ x, 6),
    (_nested, 3 * 6),
    (_branches, 7),
    (jax.grad(lambda x: _times(9)(x).sum()), 9 + 9 * 2),
    # Of which only the run knows the length.
    (lambda x: jax.lax.while_loop(lambda y: y.sum() > 0, _times(2), x), 2),
  ),
  ids=('product', 'loop', 'nested', 'branches', 'gradient', 'while'),
)
def test_loops_count_as_often_as_they_run(function, products):
  traced = jax.jit(function).trace(jnp.ones((_SIZE, _SIZE)))
  found = peaks.count_flops(traced)
  # Counters of loops are FLOPs too.
  assert found == pytest.approx(products * _ONCE, rel=0.02)
