"""The kind of device that a network is traced for."""

from collections.abc import Iterator
import contextlib

import jax

_planned: str | None = None


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': JAX's default back end, or that of `planning`."""
  return _planned or jax.default_backend()


@contextlib.contextmanager
def planning(name: str) -> Iterator[None]:
  """Meanwhile networks are traced for devices that this machine lacks.

  Args:
    name: as of `platform`.
  """
  global _planned
  before, _planned = _planned, name
  try:
    yield
  finally:
    _planned = before
