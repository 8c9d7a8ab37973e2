"""What is inside of a step's directory, whether or not it has a manifest.

Orbax writes `state`, a tree of arrays, and `extra`, a JSON file, each into a
directory of its own. Arrays are read by TensorStore, on which Orbax is based.
"""

import errno
import functools
from typing import Any

from etils import epath, epy
import jax

from mdm_jax.checkpoint import manifest
from mdm_jax.checkpoint.identity import Identity
from mdm_jax.runtime import buckets, files

with epy.lazy_imports():  # 0.7 s, which no command's --help should pay.
  import orbax.checkpoint as ocp
  import tensorstore

PyTree = Any
# What is raised if files are missing or damaged.
READ_ERRORS = (OSError, ValueError, KeyError, RuntimeError)
_STATE, _EXTRA = 'state/_METADATA', 'extra/metadata'
_STEP, _SHAPES = '_CHECKPOINT_METADATA', 'state/array_metadatas/'
# Names of data files are hashes. All others are short, and are read whole.
_DATA = '/d/'
_SHORT = 2**26  # Bytes.
_CACHE = 2**27  # Bytes.
_TEMPORARY = '.orbax-checkpoint-tmp'
# How the errors of TensorStore begin that say nothing of what is stored.
_NO_ANSWER = (
  'ABORTED',  # After all attempts.
  'DEADLINE_EXCEEDED',
  'PERMISSION_DENIED',
  'RESOURCE_EXHAUSTED',
  'UNAUTHENTICATED',
  'UNAVAILABLE',
)


def is_committed(directory: epath.PathLike) -> bool:
  """Whether Orbax has committed a step, as far as its directory tells.

  One that cannot tell is damaged, and so counts as committed.
  """
  path = epath.Path(directory) / _STEP
  try:
    return files.read_json(path).get('commit_timestamp_nsecs') is not None
  except files.UnreadableFile:
    return files.is_there(path)


def is_interrupted(directory: epath.PathLike) -> bool:
  """Whether a step of a bucket is what a save has left that was interrupted.

  On a disk Orbax gives such a step another name, and removes it.
  """
  path = epath.Path(directory) / _STEP
  try:
    return files.read_json(path)['commit_timestamp_nsecs'] is None
  except (files.UnreadableFile, KeyError):
    return False


def remove(directory: epath.PathLike) -> None:
  """Removes a step.

  On a disk it first gets the name of a temporary directory of Orbax's, which
  the next start removes if this is interrupted. In a bucket it counts as what
  it was, interrupted or committed, until all else is gone: what is left after
  an interruption is removed as the step would be.

  Raises:
    OSError: it cannot be removed.
  """
  directory = epath.Path(directory)
  if files.is_local(directory):
    removed = directory.with_name(f'{directory.name}{_TEMPORARY}')
    directory.rename(removed).rmtree()
    return
  system, names = buckets.file_system(directory), files.objects(directory)
  for part in (
    [x for x in names if x != _STEP],
    [x for x in names if x == _STEP],
  ):
    if part:
      system.rm([f'{directory}/{name}' for name in part])


def fields(directory: epath.PathLike) -> list[str]:
  """Names of the top-level fields of the state of a step, sorted.

  Raises:
    READ_ERRORS: they cannot be read.
  """
  leaves = files.read_json(epath.Path(directory) / _STATE)['tree_metadata']
  return sorted({leaf['key_metadata'][0]['key'] for leaf in leaves.values()})


def abstract_state(directory: epath.PathLike, key: str | None = None) -> PyTree:
  """Shapes and dtypes of the state of a step, or of one of its fields alone.

  Returns:
    Nested dicts of `jax.ShapeDtypeStruct`; a tuple of the state is a dict of
    its indices, as text.

  Raises:
    READ_ERRORS: it cannot be read.
  """
  return jax.tree.map(
    lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype),
    _open_state(directory, key),
  )


def read_field(directory: epath.PathLike, key: str) -> PyTree:
  """Reads a top-level field of the state of a step to the host.

  Orbax could read it as well. But it waits for other processes, which may have
  failed, and after an error its threads write tracebacks to the console.

  Returns:
    Nested dicts of NumPy arrays, see `abstract_state`.

  Raises:
    READ_ERRORS: it cannot be read.
  """
  field = _open_state(directory, key)[key]
  reads = jax.tree.map(lambda array: array.read(), field)
  return jax.tree.map(lambda read: read.result(), reads)


def _open_state(directory: epath.PathLike, key: str | None = None) -> PyTree:
  """Opens the arrays of a state, or those of one field."""
  directory = files.absolute(directory)
  description = files.read_json(directory / _STATE)
  driver = 'zarr3' if description['use_zarr3'] else 'zarr'
  base = _key_value_store(directory / 'state')
  # What all arrays share, the index of keys, is then read once. Nothing of it
  # outlives this call, so that nothing is remembered of a step that changes.
  context = tensorstore.Context({'cache_pool': {'total_bytes_limit': _CACHE}})
  tree = {}
  for leaf in description['tree_metadata'].values():
    *outer, last = path = [part['key'] for part in leaf['key_metadata']]
    if key not in (None, path[0]):
      continue
    node = tree
    for name in outer:
      node = node.setdefault(name, {})
    node[last] = {}
    if not leaf['value_metadata']['skip_deserialize']:  # It is not empty.
      store = {'driver': 'ocdbt', 'base': base, 'path': '.'.join(path)}
      # Orbax stores zeros as well: what is missing has been removed since.
      spec = {
        'driver': driver,
        'kvstore': store,
        'fill_missing_data_reads': False,
      }
      node[last] = tensorstore.open(spec, read=True, context=context)
  return jax.tree.map(lambda opening: opening.result(), tree)


def _key_value_store(directory: epath.Path) -> dict[str, str]:
  """A directory for TensorStore, in whose URLs `%` has a meaning."""
  scheme = buckets.scheme(directory)
  if scheme is None:
    return {'driver': 'file', 'path': f'{directory}/'}
  bucket, _, path = str(directory).partition('://')[2].partition('/')
  driver = {'gs': 'gcs'}.get(scheme, scheme)
  return {'driver': driver, 'bucket': bucket, 'path': f'{path}/'}


def read_extra(directory: epath.PathLike) -> dict[str, Any]:
  """Reads the JSON values that were saved with a state.

  Raises:
    UnreadableFile: they cannot be read.
  """
  return files.read_json(epath.Path(directory) / _EXTRA)


def cannot_be_opened(directory: epath.PathLike) -> str | None:
  """Says what Orbax stumbles over when it looks for the steps that exist."""
  directory = epath.Path(directory)
  try:
    manifest.list_files(directory)
    _require_step_metadata(directory)
  except files.UnreadableFile as error:
    return str(error).removeprefix(f'{directory}/')


def _require_step_metadata(directory: epath.Path) -> None:
  path = directory / _STEP
  files.read_json(path)  # Orbax would wait for a pipe, and recurse.
  try:
    _ = ocp.path.step.Metadata(0, directory).commit_timestamp_nsecs
  except ValueError as error:
    reason = f'is not what Orbax writes: {error}'
    raise files.UnreadableFile(path, reason) from None


def hollow(directory: epath.PathLike) -> str | None:
  """Names an item that a step lacks, as in 'state/_METADATA is missing'."""
  for name in (_STATE, _EXTRA):
    if not (epath.Path(directory) / name).exists():
      return f'{name} is missing'
  return None


def problem(directory: epath.PathLike) -> str | None:
  """Looks into a step that has no manifest, by reading all of it once.

  Returns:
    What keeps the step from being restored, or what other checkpoint it is;
    None if it can be used.
  """
  directory = epath.Path(directory)
  try:
    return _problem(str(directory), manifest.list_files(directory))
  except files.UnreadableFile as error:
    return str(error).removeprefix(f'{directory}/')


def other_identity(directory: epath.PathLike) -> str | None:
  """Compares the place of a step with what its content says.

  For steps whose manifests do not say it. The state of a stage in training has
  its step, and `extra` the name of its stage.

  Returns:
    What other checkpoint it is, or why that cannot be told; None if it is none.
  """
  try:
    return _other_identity(epath.Path(directory))
  except READ_ERRORS as error:
    return _unreadable(directory, error)


def _unreadable(directory: epath.PathLike, error: Exception) -> str:
  """Says what an error while reading tells of a step.

  Raises:
    OSError: nothing, as a bucket does not answer, or refuses.
  """
  reason = ' '.join(str(error).split())[:200] or type(error).__name__
  unanswered = isinstance(error, OSError) or reason.startswith(_NO_ANSWER)
  if unanswered and not files.is_local(directory):
    raise OSError(errno.EIO, reason, str(directory)) from error
  return f'its state cannot be read: {reason}'


def _other_identity(directory: epath.Path) -> str | None:
  place = Identity.of(directory)
  stage = read_extra(directory).get('stage')
  if stage is not None and stage != place.stage.partition('_')[2]:
    return f'it was saved in stage {stage!r}'
  if 'step' not in abstract_state(directory):  # Imported weights, or an EMA.
    return None
  step = int(read_field(directory, 'step'))
  return None if step == place.step else f'it was saved as step {step}'


@functools.lru_cache(maxsize=64)
def _problem(directory: str, listed: manifest.Files) -> str | None:
  directory = epath.Path(directory)
  if lacking := hollow(directory):
    return lacking
  for name, size, *_ in listed:
    if _DATA not in name and size > _SHORT:
      return f'{name} is larger than {_SHORT >> 20} MiB'
  _require_step_metadata(directory)
  described = (name for name, *_ in listed if name.startswith(_SHAPES))
  for name in (_STATE, _EXTRA, *described):
    files.read_json(directory / name)
  # There is no limit to the kinds of errors that damaged files cause.
  try:
    for array in jax.tree.leaves(_open_state(directory)):
      array.read().result()
    return _other_identity(directory)
  except Exception as error:
    return _unreadable(directory, error)
