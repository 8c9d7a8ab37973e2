"""The server of `tests/commands.py` does to JAX what it says."""

import pathlib
import warnings

import jax
from jax._src import compiler, distributed
import jax.numpy as jnp
import pytest

from tests import fork_server


def test_every_process_writes_to_the_cache(monkeypatch):
  """Fails when a JAX moves what is replaced, which would cost minutes."""
  monkeypatch.setattr(distributed.global_state, 'process_id', 1)
  # Put back at the end.
  monkeypatch.setattr(compiler, '_cache_write', compiler._cache_write)

  def is_written(name: str) -> bool:
    def compiled(x):
      return x + 1

    compiled.__name__ = name
    jax.jit(compiled)(jnp.zeros(3))
    cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
    return any(cache.glob(f'jit_{name}-*'))

  assert not is_written('by_jax')
  fork_server.let_every_process_write_to_the_cache()
  assert is_written('by_the_server')


@pytest.mark.parametrize(
  'category', [DeprecationWarning, PendingDeprecationWarning, FutureWarning]
)
def test_own_deprecations_are_errors(category):
  with pytest.raises(category):
    warnings.warn('old', category, stacklevel=1)
  # In commands too.
  with warnings.catch_warnings(record=True) as caught:
    warnings.resetwarnings()
    fork_server.make_own_deprecations_errors()
    for module in ('__main__', 'mdm_jax.sample', 'configs.common'):
      with pytest.raises(category):
        warnings.warn_explicit('old', category, 'file', 1, module)
    warnings.warn_explicit('old', category, 'file', 1, 'jax.numpy')
  assert len(caught) == 1
