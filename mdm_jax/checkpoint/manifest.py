"""Hashes of a checkpoint's files, which show later whether any has changed.

`manifest.json` in the directory of a step maps the path of every other file to
its hashes, and says which checkpoint it is. The manifest is compared as text,
so that damage to it is found as well.

On a disk they are the 128-bit XXH3 hashes of the file's blocks: they detect
accidents, not forgery, at a tenth of the cost of SHA-256. In a bucket of
Google's they are the size and the CRC32C that it tells of each object, so that
nothing is read back. Either is understood in either place.
"""

import base64
from collections.abc import Callable, Collection, Mapping
import concurrent.futures
import errno
import functools
import hashlib
import json
import os
from typing import Any, NamedTuple

from etils import epath
import xxhash

from mdm_jax.checkpoint.identity import Identity
from mdm_jax.runtime import buckets, files

NAME = 'manifest.json'
_BLOCK = 2**24  # Bytes. Threads share the blocks of a large file.
_READ = 2**20  # Bytes of one read, few enough to be hashed from the cache.
_THREADS = min(8, os.cpu_count())


class File(NamedTuple):
  """A file of a step.

  Attributes:
    name: path in the step's directory.
    size: in bytes.
    version: changes with the content.
    crc32c: in base64, as Google's buckets tell it; None elsewhere.
  """

  name: str
  size: int
  version: int
  crc32c: str | None = None


Files = tuple[File, ...]


def exists(directory: epath.PathLike) -> bool:
  """Whether a directory has a manifest, valid or not."""
  return files.is_there(epath.Path(directory) / NAME)


def write(directory: epath.PathLike) -> None:
  """Writes the manifest of a step whose files are complete.

  Raises:
    UnreadableFile: one of the files cannot be read.
  """
  directory = epath.Path(directory)
  listed = list_files(directory)
  known = {file.name for file in listed if file.crc32c}
  hashes = _hashes(directory, listed, known)
  files.write_text(directory / NAME, _text(Identity.of(directory), hashes))


def problem(directory: epath.PathLike) -> str | None:
  """Compares a step with its manifest; reads each file once per process.

  Returns:
    The first file that is changed, missing, extra or unreadable, as in
    'state/d/1f has changed', and how many more there are; or what other
    checkpoint it is. None if it is as it was saved. Manifests of earlier
    versions do not say which checkpoint they are of, or have SHA-256 hashes.
  """
  directory = epath.Path(directory)
  try:
    text = files.read_bytes(directory / NAME)
    found = _problem(str(directory), text, list_files(directory))
  except files.UnreadableFile as error:
    return str(error).removeprefix(f'{directory}/')
  if found is None and (recorded := identity(directory)):
    return recorded.problem(directory)
  return found


def identity(directory: epath.PathLike) -> Identity | None:
  """The checkpoint that a manifest is of, None if it does not say that."""
  try:
    return Identity.from_json(files.read_json(epath.Path(directory) / NAME))
  except files.UnreadableFile:
    return None


def fingerprint(directory: epath.PathLike) -> str | None:
  """Hash of the manifest, so of all files; None if there is no manifest.

  Raises:
    UnreadableFile: the manifest cannot be read.
  """
  if not exists(directory):
    return None
  text = files.read_bytes(epath.Path(directory) / NAME)
  return xxhash.xxh3_128_hexdigest(text)


# One command asks several times about the same step.
@functools.lru_cache(maxsize=64)
def _problem(directory: str, text: bytes, listed: Files) -> str | None:
  try:
    manifest = json.loads(text)
  except (ValueError, RecursionError):
    manifest = None
  recorded, expected = None, manifest
  if isinstance(manifest, dict) and isinstance(manifest.get('files'), dict):
    recorded, expected = Identity.from_json(manifest), manifest['files']
  if not isinstance(expected, dict):
    return f'{NAME} is damaged'
  problems = [f'{name} is missing' for name in _lacking(expected, listed)]
  problems += [
    f'{name} has changed' if name in expected else f'{name} is extra'
    for name, size, *_ in listed
    if not _has_size(expected.get(name), size)
  ]
  if not problems:  # Otherwise much may have to be read to find more of them.
    known = {name for name in expected if isinstance(expected[name], dict)}
    make_hash = _hash_function(expected)
    found = _hashes(epath.Path(directory), listed, known, make_hash)
    if text == _text(recorded, found).encode():
      return None
    problems = [
      f'{name} has changed' for name in found if found[name] != expected[name]
    ]
  more = f', and {len(problems) - 1} more' if len(problems) > 1 else ''
  return (problems or [f'{NAME} is damaged'])[0] + more


def _lacking(expected: Mapping[str, Any], listed: Files) -> list[str]:
  names = {name for name, *_ in listed}
  return [name for name in expected if name not in names]


def _has_size(hashes: Any, size: int) -> bool:
  """Whether a file of a size in bytes may be one that has these hashes."""
  if isinstance(hashes, dict):
    return hashes.get('size') == size
  return isinstance(hashes, list) and len(hashes) == _num_blocks(size)


def _num_blocks(size: int) -> int:
  """Blocks of a file; an empty file has one empty block."""
  return max(1, -(-size // _BLOCK))


def list_files(directory: epath.PathLike) -> Files:
  """All files of a step but the manifest, without opening them.

  Raises:
    UnreadableFile: one is no file, or cannot be read.
  """
  directory, found = epath.Path(directory), []
  if not files.is_local(directory):
    return tuple(
      File(name, info['size'], files.version(info), info.get('crc32c'))
      for name, info in files.objects(directory).items()
      if name != NAME
    )

  def fail(error):
    with files.naming_errors(error.filename or directory):
      raise error

  for folder, _, names in directory.walk(on_error=fail):
    for path in (folder / name for name in names):
      size, time = files.require_file(path)
      found.append(File(path.relative_to(directory).as_posix(), size, time))
  return tuple(sorted(file for file in found if file.name != NAME))


def _hash_function(expected: Mapping[str, Any]) -> Callable[..., Any]:
  """What the hashes of a manifest are of: those of the first were SHA-256."""
  is_sha256 = any(
    isinstance(digest, str) and len(digest) == 64
    for hashes in expected.values()
    for digest in hashes
  )
  return hashlib.sha256 if is_sha256 else xxhash.xxh3_128


def _hashes(
  directory: epath.Path,
  listed: Files,
  by_crc32c: Collection[str],
  make_hash: Callable[..., Any] = xxhash.xxh3_128,
) -> dict[str, Any]:
  """What a manifest says of each file.

  Args:
    directory: of the step.
    listed: its files.
    by_crc32c: names of those of which it gives size and CRC32C; of others it
      gives the hash of each block.
    make_hash: makes that hash, as those of hashlib do.
  """
  blocks = [
    (file, index * _BLOCK)
    for file in listed
    if file.name not in by_crc32c
    for index in range(_num_blocks(file.size))
  ]
  hashes = {file.name: [] for file in listed}
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(
      lambda block: _hash(directory / block[0].name, block[1], make_hash),
      blocks,
    )
    sums = {
      file.name: pool.submit(_crc32c, directory, file)
      for file in listed
      if file.name in by_crc32c
    }
    for (file, _), digest in zip(blocks, digests):
      hashes[file.name].append(digest)
    for name, size, *_ in listed:
      if name in sums:
        hashes[name] = {'crc32c': sums[name].result(), 'size': size}
  return hashes


def _hash(path: epath.Path, offset: int, make_hash: Callable[..., Any]) -> str:
  """Hash of the block that begins at an offset."""
  if not files.is_local(path):
    with files.naming_errors(path):
      block = buckets.file_system(path).cat_file(
        os.fspath(path), offset, offset + _BLOCK
      )
    return make_hash(block).hexdigest()
  found, buffer = make_hash(), memoryview(bytearray(_READ))
  with files.naming_errors(path), path.open('rb') as file:
    file.seek(offset)
    for _ in range(_BLOCK // _READ):
      found.update(buffer[: file.readinto(buffer)])
  return found.hexdigest()


def _crc32c(directory: epath.Path, file: File) -> str:
  """CRC32C of a file, in base64."""
  if file.crc32c is not None:
    return file.crc32c
  path = directory / file.name
  try:
    import google_crc32c  # A dependency of gcsfs, which nothing else needs.
  except ImportError:
    raise OSError(
      errno.ENOSYS,
      'was copied from a bucket; to verify it, pip install google-crc32c',
      os.fspath(directory),
    ) from None
  found = google_crc32c.Checksum()
  with files.naming_errors(path), path.open('rb') as opened:
    while part := opened.read(_READ):
      found.update(part)
  return base64.b64encode(found.digest()).decode()


def _text(identity: Identity | None, hashes: dict[str, Any]) -> str:
  """The content of the manifest; without an identity, that of old ones."""
  value = hashes
  if identity is not None:
    value = identity.to_json() | {'files': hashes}
  return json.dumps(value, indent=1, sort_keys=True) + '\n'
