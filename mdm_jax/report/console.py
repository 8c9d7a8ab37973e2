"""Console output: log filtering, tables, durations and parameter counts."""

import collections
from collections.abc import Mapping, Sequence
import logging as python_logging
import math
import pathlib
import sys
from typing import Any

from absl import flags, logging
from etils import epy
import jax

from mdm_jax.runtime.command import LineFormatter

with epy.lazy_imports():  # 0.3 s, which no --help should pay.
  from clu import parameter_overview


def duration(seconds: float) -> str:
  """Formats seconds in at most two units: 9s, 4m12s, 1h05m, 2d03h."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days}d{hours:02}h'
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


def setup_logging() -> None:
  """Shows this package's log lines, and of its libraries only warnings.

  Tracebacks that libraries log are hidden: Orbax logs a hundred for each failed
  save, and some forty lines for each good one. It also raises the error, which
  this package logs in one line.
  """
  package = str(pathlib.Path(__file__).parents[1])

  def is_ours_or_a_warning(record: python_logging.LogRecord) -> bool:
    return (
      record.levelno >= python_logging.WARNING
      and not record.exc_info
      # `runtime.environment` says it with the remedy.
      and 'may be present on this machine' not in record.getMessage()
      or record.pathname.startswith(package)
    )

  # Commands have done the first three, notebooks have not. Without flags absl
  # warns about the first line.
  logging.use_absl_handler()
  logging.get_absl_handler().setFormatter(LineFormatter())
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(is_ours_or_a_warning)

  # When a save fails, TensorStore reports each write that ends after Orbax has
  # closed its event loop: a thousand tracebacks from TensorStore's threads.
  report = sys.unraisablehook

  def report_others(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = report_others


def num_parameters(params: Mapping[str, Any]) -> int:
  """Number of parameters in nested dicts of arrays or `ShapeDtypeStruct`s."""
  return int(parameter_overview.count_parameters(params))


def parameter_table(params: Mapping[str, Any]) -> str:
  """A table of the number of parameters of each block.

  Args:
    params: nested dicts of arrays or `jax.ShapeDtypeStruct`. There is a row for
      each path of two keys; deeper leaves are summed.
  """
  counts = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path[:2], simple=True, separator='/')
    counts[name] += math.prod(leaf.shape)
  return table(list(counts.items()), ['block', 'parameters'])


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
  """Formats an aligned plain-text table.

  Args:
    rows: cells; None shows as '-', a float in four significant digits.
    headers: one for each column. Columns of numbers are aligned right.

  Returns:
    Lines without a trailing newline.
  """

  def cell(value: Any) -> str:
    if value is None:
      return '-'
    if isinstance(value, float):
      return f'{value:.4g}'
    return f'{value:,}' if isinstance(value, int) else str(value)

  lines = [list(headers), *([cell(value) for value in row] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines.insert(1, ['-' * width for width in widths])
  is_text = [
    any(isinstance(value, str) for value in column) for column in zip(*rows)
  ] or [True] * len(widths)
  return '\n'.join(
    '  '.join(
      text.ljust(width) if left else text.rjust(width)
      for text, width, left in zip(line, widths, is_text)
    ).rstrip()
    for line in lines
  )
