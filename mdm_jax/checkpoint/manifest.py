"""Hashes of a checkpoint's files, which show later whether any has changed.

`manifest.json` in the directory of a step maps the path of every other file to
the 128-bit XXH3 hashes of its blocks, and says which checkpoint it is. The
manifest is compared as text, so that damage to it is found as well. XXH3
detects accidents, not forgery, at a tenth of the cost of SHA-256.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import functools
import hashlib
import json
import os
from typing import Any

from etils import epath
import xxhash

from mdm_jax.checkpoint.identity import Identity
from mdm_jax.runtime import files

_NAME = 'manifest.json'
_BLOCK = 2**24  # Bytes. Threads share the blocks of a large file.
_READ = 2**20  # Bytes of one read, few enough to be hashed from the cache.
_THREADS = min(8, os.cpu_count())
# Relative path, size in bytes and time of change in ns of each file, sorted.
Files = tuple[tuple[str, int, int], ...]


def exists(directory: epath.PathLike) -> bool:
  """Whether a directory has a manifest, valid or not."""
  return files.is_there(epath.Path(directory) / _NAME)


def write(directory: epath.PathLike) -> None:
  """Writes the manifest of a step whose files are complete.

  Raises:
    UnreadableFile: one of the files cannot be read.
  """
  directory = epath.Path(directory)
  hashes = _hashes(directory, list_files(directory))
  files.write_text(directory / _NAME, _text(Identity.of(directory), hashes))


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
    text = files.read_bytes(directory / _NAME)
    found = _problem(str(directory), text, list_files(directory))
  except files.UnreadableFile as error:
    return str(error).removeprefix(f'{directory}/')
  if found is None and (recorded := identity(directory)):
    return recorded.problem(directory)
  return found


def identity(directory: epath.PathLike) -> Identity | None:
  """The checkpoint that a manifest is of, None if it does not say that."""
  try:
    return Identity.from_json(files.read_json(epath.Path(directory) / _NAME))
  except files.UnreadableFile:
    return None


def fingerprint(directory: epath.PathLike) -> str | None:
  """Hash of the manifest, so of all files; None if there is no manifest.

  Raises:
    UnreadableFile: the manifest cannot be read.
  """
  if not exists(directory):
    return None
  text = files.read_bytes(epath.Path(directory) / _NAME)
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
    return f'{_NAME} is damaged'
  problems = [f'{name} is missing' for name in _lacking(expected, listed)]
  problems += [
    f'{name} has changed' if name in expected else f'{name} is extra'
    for name, size, _ in listed
    if _num_blocks(size) != _length(expected.get(name))
  ]
  if not problems:  # Otherwise much may have to be read to find more of them.
    found = _hashes(epath.Path(directory), listed, _hash_function(expected))
    if text == _text(recorded, found).encode():
      return None
    problems = [
      f'{name} has changed' for name in found if found[name] != expected[name]
    ]
  more = f', and {len(problems) - 1} more' if len(problems) > 1 else ''
  return (problems or [f'{_NAME} is damaged'])[0] + more


def _lacking(expected: Mapping[str, Any], listed: Files) -> list[str]:
  names = {name for name, *_ in listed}
  return [name for name in expected if name not in names]


def _length(hashes: Any) -> int:
  return len(hashes) if isinstance(hashes, list) else 0


def _num_blocks(size: int) -> int:
  """Blocks of a file; an empty file has one empty block."""
  return max(1, -(-size // _BLOCK))


def list_files(directory: epath.PathLike) -> Files:
  """All files of a step but the manifest, without opening them.

  Raises:
    UnreadableFile: one is no file, or cannot be read.
  """
  directory, found = epath.Path(directory), []

  def fail(error):
    with files.naming_errors(error.filename or directory):
      raise error

  for folder, _, names in directory.walk(on_error=fail):
    for path in (folder / name for name in names):
      size, time = files.require_file(path)
      found.append((path.relative_to(directory).as_posix(), size, time))
  return tuple(sorted(file for file in found if file[0] != _NAME))


def _hash_function(expected: Mapping[str, Any]) -> Callable[[], Any]:
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
  make_hash: Callable[[], Any] = xxhash.xxh3_128,
) -> dict[str, list[str]]:
  """Hash of each block of each file."""
  blocks = [
    (name, index * _BLOCK)
    for name, size, _ in listed
    for index in range(_num_blocks(size))
  ]
  hashes = {name: [] for name, *_ in listed}
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(
      lambda block: _hash(directory / block[0], block[1], make_hash()), blocks
    )
    for (name, _), digest in zip(blocks, digests):
      hashes[name].append(digest)
  return hashes


def _hash(path: epath.Path, offset: int, found: Any) -> str:
  """Hash of the block that begins at an offset; `found` is one of nothing."""
  buffer = memoryview(bytearray(_READ))
  with files.naming_errors(path), path.open('rb') as file:
    file.seek(offset)
    for _ in range(_BLOCK // _READ):
      found.update(buffer[: file.readinto(buffer)])
  return found.hexdigest()


def _text(identity: Identity | None, hashes: dict[str, list[str]]) -> str:
  """The content of the manifest; without an identity, that of old ones."""
  value = hashes
  if identity is not None:
    value = identity.to_json() | {'files': hashes}
  return json.dumps(value, indent=1, sort_keys=True) + '\n'
