"""`gs://` for fsspec, as this package needs it; imported only if it is used.

gcsfs remembers listings, and so misses what other processes write; it waits for
a stalled response for ever; and its errors are no OSErrors.
"""

import email.utils
import errno
import functools
import logging as python_logging
import os
import time
from typing import Any

from absl import logging
import aiohttp
import fsspec.asyn
import gcsfs.core
import gcsfs.retry
import google.auth.exceptions
import requests

# Who pays for requests to a bucket whose owner does not.
BILLING = 'MDM_JAX_BILLING_PROJECT'
# Seconds to connect, and without a byte of a response, before another attempt.
_SILENCE = 20
_SKEW = 300  # Seconds that two clocks may differ, as in most protocols.
_ERRORS = (
  gcsfs.retry.HttpError,
  google.auth.exceptions.GoogleAuthError,
  aiohttp.ClientError,
  OSError,  # Also those of requests. gcsfs raises some of several lines.
  ValueError,
)

# What it logs, it raises as well.
for _name in ('gcsfs', 'google.auth'):
  python_logging.getLogger(_name).setLevel(python_logging.CRITICAL)
python_logging.getLogger('fsspec').setLevel(python_logging.WARNING)


class FileSystem(gcsfs.core.GCSFileSystem):
  """Google Cloud Storage, whose failures are OSErrors of one line."""

  def __init__(self, **options: Any):
    """Takes the options of `gcsfs.GCSFileSystem`, some with other defaults."""
    defaults = {
      'use_listings_cache': False,
      'requests_timeout': aiohttp.ClientTimeout(
        sock_connect=_SILENCE, sock_read=_SILENCE
      ),
      'requester_pays': os.environ.get(BILLING) or False,
      'project': os.environ.get('GOOGLE_CLOUD_PROJECT', ''),
    }
    super().__init__(**defaults | options)

  async def _request(self, method, path, *args, **options):
    try:
      response = await super()._request(method, path, *args, **options)
    except _ERRORS as error:
      raised = as_os_error(error)
      if raised.filename is None and args:
        raised.filename = f'gs://{"/".join(map(str, args))}'
      raise raised from error
    warn_of_clock(response[1].get('Date'))
    return response

  async def _get_file_request(self, *args, **options):
    try:
      return await super()._get_file_request(*args, **options)
    except _ERRORS as error:
      raise as_os_error(error) from error

  async def _check_writable(self, path):
    """Raises OSError if this account may not create an object."""
    bucket, key, _ = self.split_path(path)
    # Permission is needed to begin an upload. Nothing is uploaded, so no object
    # appears, and nothing is to be paid for.
    await gcsfs.core.initiate_upload(self, bucket, key)

  check_writable = fsspec.asyn.sync_wrapper(_check_writable)

  # That of gcsfs takes any OSError for an answer.
  async def _isdir(self, path):
    try:
      return (await self._info(path))['type'] == 'directory'
    except (FileNotFoundError, NotADirectoryError):
      return False


def as_os_error(error: Exception) -> OSError:
  """Says what is wrong in one line, with the remedy, as `strerror`."""
  text = ' '.join(str(getattr(error, 'message', '') or error).split())
  code = getattr(error, 'code', None)
  if text == f', {code}':  # An answer without a word.
    text = f'the answer is {code}'
  if isinstance(error, FileNotFoundError):
    return FileNotFoundError(errno.ENOENT, 'No such object or bucket', text)
  if isinstance(error, FileExistsError):
    return FileExistsError(errno.EEXIST, 'The object exists', text)
  if 'reasonable timeframe' in text or 'short-lived token' in text:
    return PermissionError(
      errno.EACCES,
      "Google refuses this machine's key, as it does if the clock is wrong: "
      'set the clock (timedatectl set-ntp true)',
    )
  if 'requester pays' in text.lower():
    return PermissionError(
      errno.EACCES,
      'the one who reads this bucket pays: set '
      f'{BILLING} to the project that pays',
    )
  login = (
    'run `gcloud auth application-default login`, or give this machine a '
    'service account'
  )
  if code == 401 or isinstance(error, google.auth.exceptions.GoogleAuthError):
    return PermissionError(
      errno.EACCES, f'there are no valid Google credentials ({text}): {login}'
    )
  if text.startswith('Forbidden'):
    return PermissionError(
      errno.EACCES,
      f'no permission ({text}): give this account the role Storage Object '
      f'User on the bucket, or {login}',
    )
  if isinstance(error, requests.RequestException | aiohttp.ClientError):
    text = f'no answer from the bucket: {type(error).__name__} {text}'
  return OSError(errno.EIO, text or type(error).__name__)


@functools.cache
def _warn_once(hours: str) -> None:
  logging.warning(
    'The clock of this machine is %s of that of the bucket: set it '
    '(timedatectl set-ntp true), or credentials may be refused.',
    hours,
  )


def warn_of_clock(date: str | None) -> None:
  """Warns, once, if this machine's clock is not that of a response.

  Args:
    date: header of the response.
  """
  try:
    skew = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
  except (TypeError, ValueError):
    return
  if abs(skew) > _SKEW:
    direction = 'ahead' if skew > 0 else 'behind'
    _warn_once(f'{abs(skew) / 3600:.1f} hours {direction}')
