"""Cache directories on disk, and XLA's persistent compilation cache."""

import os
import pathlib

import jax


def directory(name: str) -> pathlib.Path:
  """Path of a cache: `$XDG_CACHE_HOME/mdm_jax/<name>`, by default in ~/.cache.

  It is not created.
  """
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home, 'mdm_jax', name)


def enable() -> None:
  """Reuses programs that were compiled before, on the same kind of devices.

  They are cached in `directory('xla')`. The environment variable
  JAX_COMPILATION_CACHE_DIR names another directory, and
  JAX_ENABLE_COMPILATION_CACHE=false disables the cache. Call it before anything
  is compiled.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(directory('xla')))
