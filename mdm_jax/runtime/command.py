"""Runs a command, from its flags to its end: the same way for all commands."""

from collections.abc import Callable, Sequence
import errno
import logging as python_logging
import os
import select
import sys
from typing import Any, NoReturn, TextIO

from absl import app, logging

from mdm_jax.runtime import (
  buckets,
  directory_lock,
  ending,
  flag_types,
  preemption,
)
from mdm_jax.runtime.printable import printable

# A disk that takes no more, not a mistake in the program.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_SMALL = 1024  # MiB of /dev/shm; Docker's and Kubernetes' default is 64.
# JAX's RuntimeError that begins so says which devices are missing, and what to
# do: JAX_PLATFORMS asks for them, say.
_NO_DEVICES = 'Unable to initialize backend'
# That of Python's tempfile, where all file systems are read-only.
_NO_TEMPORARY = 'No usable temporary directory'


def run(
  main: Callable[[list[str]], Any],
  parse: Callable[[Sequence[str]], list[str]] = flag_types.parse_flags,
) -> NoReturn:
  """Parses the flags, runs `main`, and then ends the process soon.

  A stop request ends it with `preemption.EXIT_CODE`, at once where `main` has
  no `StopHandler` of its own.

  An error that ends it is printed in one line, as is what the file system
  refuses. In that line and in all log lines what is no character to see is
  escaped, and so is what the locale cannot write: captions, paths and errors of
  libraries may hold anything.

  Args:
    main: of the command, called with the name of the program.
    parse: parser of the flags, which ends the process if one is wrong.
  """
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  logging.get_absl_handler().setFormatter(LineFormatter())
  # Python's process that removes shared memory after an ending that leaves it
  # behind, as all do here, warns that it has to.
  sys.warnoptions.append('ignore:resource_tracker:UserWarning')

  def run_main(argv):
    # Not before: absl looks for handlers that log to standard error.
    sys.stderr = _Stderr(sys.stderr)
    return main(argv)

  stop = preemption.StopHandler(lambda: None)
  code, message = 0, ''
  try:
    app.run(run_main, flags_parser=parse)
  except SystemExit as exited:
    code = exited.code or 0
    if not isinstance(code, int):
      code, message = 1, str(code)
  except directory_lock.NotWritable as error:
    code, message = 1, f'error: {error}'
  # The only place that catches everything: whatever has happened, the process
  # ends now, and the threads of libraries have no say in it.
  except BaseException as error:
    code = 1
    if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
      pass  # The reader of a pipe, such as `head`, has read enough.
    elif isinstance(error, OSError) and error.errno in _DISK:
      message = f'error: {error}. What is finished is kept.'
      if error.errno == errno.ENOSPC and not error.filename:
        message += _shared_memory()
    elif _is_of_bucket(error):
      reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
      message = f'error: {reason}. What is finished is kept.'
    # The environment's fault if a file is named, otherwise maybe ours.
    elif isinstance(error, OSError) and error.filename is not None:
      message = f'error: {error.filename}: {error.strerror}.'
    elif isinstance(error, OSError) and _NO_TEMPORARY in str(error):
      message = f'error: {error.strerror}'
    elif isinstance(error, RuntimeError) and str(error).startswith(_NO_DEVICES):
      message = 'error: ' + ' '.join(str(error).split())
    else:
      sys.excepthook(*sys.exc_info())
  if _NO_TEMPORARY in message:
    message += ': set TMPDIR to one that is writable.'
  ending.begin(code)
  stop.close()
  # Schedulers repeat signals.
  preemption.ignore_signals()
  ending.finish(code, printable(message))


def _shared_memory() -> str:
  """A remedy where it may be the memory of data workers that takes no more."""
  try:
    size = os.statvfs('/dev/shm')
  except OSError:
    return ''
  size = size.f_blocks * size.f_frsize / 2**20
  if size > _SMALL:
    return ''
  return (
    f' Data workers share /dev/shm, which has only {size:,.0f} MiB: a '
    'container needs more (docker run --shm-size=8g).'
  )


def _is_of_bucket(error: BaseException) -> bool:
  """Whether a bucket has refused something, or its package failed."""
  if isinstance(error, PermissionError):  # On a disk it names a file.
    return error.filename is None
  is_other = isinstance(error, Exception) and not isinstance(error, OSError)
  return is_other and isinstance(error, buckets.errors())


def _is_unread(stream: TextIO) -> bool:
  """Whether a stream is a pipe that its reader has closed."""
  poll = select.poll()
  poll.register(stream, 0)  # Errors are always reported.
  return bool(poll.poll(0))


class LineFormatter(python_logging.Formatter):
  """Log lines such as '20:52:06 WARNING text': control characters are escaped.

  What is neither a warning nor an error has no word before its text.
  """

  def __init__(self):
    super().__init__('%(asctime)s %(severity)s%(message)s', '%H:%M:%S')

  def format(self, record: python_logging.LogRecord) -> str:
    is_bad = record.levelno >= python_logging.WARNING
    record.severity = f'{record.levelname} ' if is_bad else ''
    return printable(super().format(record))


class _Stderr:
  """Standard error that may vanish, with its terminal or on a full disk.

  What cannot be written is lost, and ends nothing: a progress bar or a log line
  is no reason to lose a checkpoint.
  """

  def __init__(self, stream):
    self._stream = stream

  def write(self, text: str) -> int:
    try:
      return self._stream.write(text)
    except OSError:
      return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError:
      pass

  def __getattr__(self, name):
    return getattr(self._stream, name)
