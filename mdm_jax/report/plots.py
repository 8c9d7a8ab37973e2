"""Plots of results, with Matplotlib, which is not among the requirements."""

from collections.abc import Iterator
import contextlib
import importlib.util
from typing import Any

from etils import epath

from mdm_jax.runtime import files


def check_installed() -> None:
  """Raises ValueError if nothing can be plotted."""
  if not importlib.util.find_spec('matplotlib'):
    raise ValueError('--plot needs matplotlib: pip install matplotlib.')


@contextlib.contextmanager
def panels(path: epath.PathLike, count: int) -> Iterator[list[Any]]:
  """Makes a figure of panels side by side, and saves it at the end.

  Args:
    path: of the file, `.svg` or `.png`, which is replaced at once.
    count: of panels.

  Yields:
    The axes of each panel.
  """
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    1, count, figsize=(4.5 * count, 3.4), layout='constrained'
  )
  yield axes if count > 1 else [axes]
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format=epath.Path(path).suffix[1:])
  pyplot.close(figure)
