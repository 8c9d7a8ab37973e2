"""What XLA has compiled is kept on disk, for the next start."""

import os
import pathlib

import jax


def enable() -> None:
  """A program that was compiled before, on the same devices, is read back.

  It is kept in ~/.cache/mdm_jax/xla, or XDG_CACHE_HOME's mdm_jax/xla. JAX's
  own variables change that: JAX_COMPILATION_CACHE_DIR names another place,
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Call it before anything is
  compiled.
  """
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    jax.config.update(
        'jax_compilation_cache_dir', str(pathlib.Path(home, 'mdm_jax', 'xla')))
