"""The directory in which compiled programs are cached."""

import os

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


@pytest.fixture
def warnings(monkeypatch):
  """What is logged as a warning."""
  found = []
  monkeypatch.setattr(
    compilation_cache.logging,
    'warning',
    lambda text, *values: found.append(text % values),
  )
  return found


def test_without_a_home_nothing_is_cached(monkeypatch, warnings):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  assert compilation_cache.directory('references') is None
  (line,) = warnings
  assert 'Nothing is cached in ~/.cache/mdm_jax/references: ' in line
  assert 'no home directory' in line and 'XDG_CACHE_HOME' in line


def test_where_nothing_can_be_written_nothing_is_cached(
  monkeypatch, warnings, tmp_path
):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', f'{tmp_path}/file')
  assert compilation_cache.directory('xla') is None
  assert f'{tmp_path}/file is a file, not a directory' in warnings[0]
  before = jax.config.jax_compilation_cache_dir
  for named in (None, f'{tmp_path}/file'):
    jax.config.update('jax_compilation_cache_dir', named)
    try:
      compilation_cache.enable()
      assert jax.config.jax_compilation_cache_dir is None
    finally:
      jax.config.update('jax_compilation_cache_dir', before)
  assert len(warnings) == 3


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('XDG_CACHE_HOME', '~/cache')
  assert compilation_cache.directory('xla') == (
    tmp_path / '.cache' / 'mdm_jax' / 'xla'
  )
