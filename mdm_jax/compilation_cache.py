"""What was computed before is kept on disk, what XLA has compiled above all."""

import os
import pathlib

import jax


def directory(name: str) -> pathlib.Path:
  """~/.cache/mdm_jax/<name>, or XDG_CACHE_HOME's mdm_jax/<name>."""
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home, 'mdm_jax', name)


def enable() -> None:
  """A program that was compiled before, on the same devices, is read back.

  It is kept in `directory('xla')`. JAX's own variables change that:
  JAX_COMPILATION_CACHE_DIR names another place,
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Call it before anything is
  compiled.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(directory('xla')))
