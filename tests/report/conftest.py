"""Shared by the tests of reports."""

import sys
from unittest import mock

import pytest


@pytest.fixture
def axes(monkeypatch):
  """Without Matplotlib, which the tests do not install."""
  figure, axes = mock.MagicMock(), [mock.MagicMock(), mock.MagicMock()]
  figure.savefig = lambda path, format: path.write_text(format)
  library = mock.MagicMock()
  library.pyplot.subplots = lambda rows, count, **_: (
    figure,
    axes if count > 1 else axes[0],
  )
  monkeypatch.setitem(sys.modules, 'matplotlib', library)
  return axes
