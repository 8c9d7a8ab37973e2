"""Hashes of a directory's files, which show later whether any has changed.

`manifest.json` in the directory maps the path of every other file to the
128-bit XXH3 hashes of its blocks. The manifest is compared as text, so that
damage to it is found as well. XXH3 detects accidents, not forgery, at a tenth
of the cost of SHA-256.
"""

import concurrent.futures
import functools
import json
import os

from etils import epath
import xxhash

from mdm_jax.runtime import files

_NAME = 'manifest.json'
_BLOCK = 2**24  # Bytes. Threads share the blocks of a large file.
_READ = 2**20  # Bytes of one read, few enough to be hashed from the cache.
_THREADS = min(8, os.cpu_count())
# Relative path, size in bytes and time of change in ns of each file, sorted.
Files = tuple[tuple[str, int, int], ...]


def exists(directory: epath.PathLike) -> bool:
  """Whether a directory has a manifest, valid or not."""
  return (epath.Path(directory) / _NAME).exists()


def write(directory: epath.PathLike) -> None:
  """Writes the manifest of a directory whose files are complete."""
  directory = epath.Path(directory)
  listed = _files(directory)
  if not listed:
    raise FileNotFoundError(f'{directory} has no files.')
  hashes = _hashes(directory, listed)
  files.write_text(directory / _NAME, _text(hashes))


def problem(directory: epath.PathLike) -> str | None:
  """Compares a directory with its manifest; reads each file once per process.

  Returns:
    The first file that is changed, missing or extra, as in 'state/d/1f has
    changed', and how many more there are. None if all files are unchanged.

  Raises:
    FileNotFoundError: if there is no manifest.
  """
  directory = epath.Path(directory)
  text = (directory / _NAME).read_bytes()
  return _problem(str(directory), text, _files(directory))


def fingerprint(directory: epath.PathLike) -> str | None:
  """Hash of the manifest, so of all files; None if there is no manifest."""
  directory = epath.Path(directory)
  if not exists(directory):
    return None
  return xxhash.xxh3_128_hexdigest((directory / _NAME).read_bytes())


# One command asks several times about the same step.
@functools.lru_cache(maxsize=64)
def _problem(directory: str, text: bytes, listed: Files) -> str | None:
  try:
    expected = json.loads(text)
  except ValueError:
    return f'{_NAME} is damaged'
  found = _hashes(epath.Path(directory), listed)
  if text == _text(found).encode():
    return None
  if not isinstance(expected, dict):
    return f'{_NAME} is damaged'
  problems = [f'{name} is missing' for name in expected if name not in found]
  problems += [
    f'{name} has changed' if name in expected else f'{name} is extra'
    for name in found
    if found[name] != expected.get(name)
  ]
  more = f', and {len(problems) - 1} more' if len(problems) > 1 else ''
  return (problems or [f'{_NAME} is damaged'])[0] + more


def _files(directory: epath.Path) -> Files:
  found = []
  for folder, _, names in directory.walk():
    for path in (epath.Path(folder) / name for name in names):
      # epath has whole seconds only. Files in buckets are never changed.
      time = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
      name = path.relative_to(directory).as_posix()
      found.append((name, path.stat().length, time))
  return tuple(sorted(file for file in found if file[0] != _NAME))


def _hashes(directory: epath.Path, listed: Files) -> dict[str, list[str]]:
  """Hash of each block of each file; an empty file has one empty block."""
  blocks = [
    (name, offset)
    for name, length, _ in listed
    for offset in range(0, max(1, length), _BLOCK)
  ]
  hashes = {name: [] for name, *_ in listed}
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(
      lambda block: _hash(directory / block[0], block[1]), blocks
    )
    for (name, _), digest in zip(blocks, digests):
      hashes[name].append(digest)
  return hashes


def _hash(path: epath.Path, offset: int) -> str:
  """Hash of the block that begins at an offset."""
  found, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ))
  with path.open('rb') as file:
    file.seek(offset)
    for _ in range(_BLOCK // _READ):
      found.update(buffer[: file.readinto(buffer)])
  return found.hexdigest()


def _text(hashes: dict[str, list[str]]) -> str:
  return json.dumps(hashes, indent=1, sort_keys=True) + '\n'
