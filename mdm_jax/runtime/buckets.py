"""Paths in buckets, such as `gs://name/path`: which there are, and checks.

All of this package opens paths with `etils.epath`, which leaves buckets to
fsspec. Importing it is quick.
"""

from collections.abc import Iterator
import contextlib
import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import fsspec

# What can be a working directory or an output, and the package for it.
PACKAGES = {'gs': 'gcsfs', 's3': 's3fs', 'az': 'adlfs'}
SCHEMES = tuple(PACKAGES)
# Where runs can be. Orbax 0.12 takes s3://a/b for the local path s3:/a/b, and
# TensorStore, which it saves with, knows no az://.
OF_RUNS = ('gs',)
# Seconds that a command waits for a bucket before it has begun.
_PATIENCE = 60


@functools.cache
def register() -> None:
  """Tells fsspec, and so epath, how to open buckets."""
  import fsspec  # Slow, which no --help should pay.

  # epath would use TensorFlow, wherever it is installed.
  os.environ['EPATH_USE_TF'] = 'false'
  # TensorStore would wait for a stalled response for ever.
  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', '60')
  for name in ('gs', 'gcs'):
    fsspec.register_implementation(
      name, 'mdm_jax.runtime.google_storage.FileSystem', clobber=True
    )
  # As for Google's: other processes write as well.
  options = fsspec.config.conf.setdefault('s3', {})
  options.setdefault('use_listings_cache', False)


def scheme(path: str | os.PathLike) -> str | None:
  """The 'gs' of 'gs://name/path'; None for a path on a file system."""
  name, separator, _ = os.fspath(path).partition('://')
  return name if separator else None


def file_system(path: str | os.PathLike) -> 'fsspec.AbstractFileSystem':
  """What has the files of a bucket, as fsspec sees it.

  Raises:
    ValueError: it needs a package, or no package knows such paths.
  """
  name = scheme(path)
  package = PACKAGES.get(name)
  if package and importlib.util.find_spec(package) is None:
    raise ValueError(f'{name}:// needs a package: pip install {package}.')
  import fsspec

  register()
  try:
    return fsspec.filesystem(name)
  except ImportError as error:
    reason = ' '.join(str(error).split())
    raise ValueError(f'{name}:// needs a package: {reason}.') from None
  except ValueError:
    raise ValueError(f'{name}:// is not known.') from None


def find(path: str | os.PathLike) -> str | None:
  """What there is at a path: 'file', 'directory', or None.

  A bucket is a directory, also an empty one.

  Raises:
    ValueError: it cannot be told. The message is for the user.
  """
  files = file_system(path)
  with naming_errors():
    try:
      name = os.fspath(path).rstrip('/')
      return files.info(name, timeout=_PATIENCE)['type']
    except FileNotFoundError:
      pass
    bucket = os.fspath(path).partition('://')[2].partition('/')[0]
    if not bucket:
      raise ValueError('give the name of a bucket.')
    # Any list of what a bucket holds says that it exists.
    try:
      files.ls(bucket, timeout=_PATIENCE)
    except FileNotFoundError:
      raise ValueError(
        f'there is no bucket {bucket}: create it (gcloud storage buckets '
        f'create gs://{bucket}), or correct the name.'
        if scheme(path) == 'gs'
        else f'there is no bucket {bucket}: create it, or correct the name.'
      ) from None
  return None


def check_writable(path: str | os.PathLike) -> None:
  """Checks that an object can be created, where that can be asked.

  Nothing is created.

  Raises:
    ValueError: it cannot. The message is for the user.
  """
  ask = getattr(file_system(path), 'check_writable', None)
  if ask:
    with naming_errors():
      ask(os.fspath(path), timeout=_PATIENCE)


@contextlib.contextmanager
def naming_errors() -> Iterator[None]:
  """Turns what a bucket raises into a ValueError for the user."""
  try:
    yield
  except TimeoutError as error:
    raise ValueError(
      'the bucket does not answer: is the network up?'
    ) from error
  except errors() as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise ValueError(f'{reason}.') from error


@functools.cache
def errors() -> tuple[type[Exception], ...]:
  """OSError, and what the packages of buckets raise without it."""
  found: list[Any] = [OSError]
  if importlib.util.find_spec('botocore'):  # That of s3fs.
    import botocore.exceptions

    found.append(botocore.exceptions.BotoCoreError)
  if importlib.util.find_spec('adlfs'):
    import azure.core.exceptions

    found.append(azure.core.exceptions.AzureError)
  return tuple(found)
