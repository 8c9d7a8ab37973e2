"""The directory in which compiled programs are cached."""

import jax
import pytest

from mdm_jax.runtime import compilation_cache


@pytest.mark.parametrize(
  'named, found', [(None, '/cache/mdm_jax/xla'), ('/elsewhere', '/elsewhere')]
)
def test_place(monkeypatch, named, found):
  monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', named)
  try:
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == found
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
