"""Cache directories on disk, and XLA's persistent compilation cache.

A cache saves time and is never needed: without a home directory, or where
nothing can be written, a command goes on without it.
"""

import os

from absl import logging
from etils import epath
import jax

from mdm_jax.runtime import value_types

_OUTPUT = value_types.Path('directory', output=True)


def directory(name: str) -> epath.Path | None:
  """Path of a cache: `$XDG_CACHE_HOME/mdm_jax/<name>`, by default in ~/.cache.

  It is not created. None, with a warning, if nothing can be written there.
  """
  home = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(home):  # Such are to be ignored, says the standard.
    home = '~/.cache'
  try:
    return epath.Path(_OUTPUT.check(os.path.join(home, 'mdm_jax', name)))
  except ValueError as error:
    logging.warning(
      'Nothing is cached in %s/mdm_jax/%s: %s (XDG_CACHE_HOME names another '
      'place.)',
      home,
      name,
      error,
    )
    return None


def enable() -> None:
  """Reuses programs that were compiled before, on the same kind of devices.

  They are cached in `directory('xla')`. The environment variable
  JAX_COMPILATION_CACHE_DIR names another directory, and
  JAX_ENABLE_COMPILATION_CACHE=false disables the cache. Call it before anything
  is compiled.
  """
  given = jax.config.jax_compilation_cache_dir
  if not given:
    if found := directory('xla'):
      jax.config.update('jax_compilation_cache_dir', str(found))
  else:
    try:
      _OUTPUT.check(given)
    except ValueError as error:
      logging.warning('Programs are not cached in %s: %s', given, error)
      jax.config.update('jax_compilation_cache_dir', None)
