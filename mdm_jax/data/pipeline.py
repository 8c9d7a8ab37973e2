"""Batches of examples in an order that depends on the seed alone.

Position p of the endless stream of examples is a pure function of (seed, p),
and global batch k holds positions k * batch_size to (k + 1) * batch_size - 1.
Processes, worker processes and threads only decide who computes a position,
so any number of them gives the same global batches, and resuming at batch k
starts there without reading anything before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import sys
import threading
from typing import Any, Protocol

from absl import logging
import grain
import numpy as np
import PIL

from mdm_jax.data.transforms import BadRecord

Record = dict[str, Any]
Example = dict[str, np.ndarray]
Transform = Callable[[Record, np.random.Generator], Example]

# Far beyond any training run, and small enough for len() of the positions.
_ENDLESS = 2**40
# More unreadable records in a row than chance explains in a usable data set.
_MAX_REPLACEMENTS = 100
_SHUFFLE_ROUNDS = 4
# index_shuffle needs no memory, but milliseconds an index in a small set: it
# permutes at least this many numbers and skips those that are too large.
_MIN_INDEX_SHUFFLE = 2**16
# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX.
_GLIBC_OPTIONS = {-3: 2**26, -1: 2**30, -8: 1}
# Separate the random streams that are drawn from one seed.
_ORDER_STREAM, _EXAMPLE_STREAM = 0, 1


class DataError(ValueError):
  """The data, or what reads them, are not fit to train on."""


class Source(Protocol):
  """Random access to records; `__getitem__` may raise `BadRecord`."""

  def __len__(self) -> int:
    """The number of records."""

  def __getitem__(self, index: int) -> Record:
    """The record, with at least `image`, `caption` and `key`."""


def package_versions() -> dict[str, str]:
  """Of the packages that decide on the order and the pixels."""
  return {'Pillow': PIL.__version__, 'grain': grain.__version__}


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
  sequence = np.random.SeedSequence((seed, _ORDER_STREAM, epoch))
  return int(sequence.generate_state(1)[0])


@functools.lru_cache(maxsize=16)
def _permutation(num_records: int, epoch_seed: int) -> np.ndarray:
  return np.random.default_rng(epoch_seed).permutation(num_records)


def record_index(
  position: int, num_records: int, seed: int, shuffle: bool
) -> int:
  """Returns the index in the source of a position of the endless stream.

  Every record is seen once an epoch, in an order that is new each epoch.
  """
  epoch, offset = divmod(position, num_records)
  if not shuffle:
    return offset
  epoch_seed = _epoch_seed(seed, epoch)
  max_index = num_records - 1
  # Grain 0.2.18 repeats one index and drops another if max_index is 4^k: it
  # takes ceil(log2(max_index)) bits, one too few.
  is_power_of_two = max_index & (max_index - 1) == 0
  if num_records < _MIN_INDEX_SHUFFLE or is_power_of_two:
    return int(_permutation(num_records, epoch_seed)[offset])
  return grain.experimental.index_shuffle(
    index=offset,
    max_index=max_index,
    seed=epoch_seed,
    rounds=_SHUFFLE_ROUNDS,
  )


@dataclasses.dataclass(frozen=True)
class _Examples:
  """Maps a position in this process's stream to an example."""

  rows: tuple[tuple[Source, Transform], ...]
  seed: int
  shuffle: bool
  batch_size: int  # global
  process_index: int
  process_count: int
  reported: set[str] = dataclasses.field(default_factory=set)

  def __call__(self, local_position: int) -> Example:
    local_batch_size = self.batch_size // self.process_count
    batch, row = divmod(local_position, local_batch_size)
    position = (
      batch * self.batch_size + self.process_index * local_batch_size + row
    )
    # By the place in the global batch, which no process or worker changes.
    source, transform = self.rows[position % self.batch_size % len(self.rows)]
    for replacement in range(_MAX_REPLACEMENTS):
      index = record_index(
        position + replacement, len(source), self.seed, self.shuffle
      )
      rng = np.random.default_rng((self.seed, _EXAMPLE_STREAM, position))
      try:
        example = transform(source[index], rng)
      except BadRecord as error:
        self._report(error)
        last_error = error
        continue
      return {**example, 'bad': np.bool_(replacement > 0)}
    raise DataError(
      f'{_MAX_REPLACEMENTS} records in a row are unusable, the last: '
      f'{last_error}. Check the data set.'
    )

  def _report(self, error: BadRecord) -> None:
    if error.key not in self.reported:
      self.reported.add(error.key)
      logging.warning('Replaced an unusable record: %s', error)


def _stack(examples: Sequence[Example]) -> Example:
  """Stacks what goes by each name, of the examples that have it."""
  names = {name: None for example in examples for name in example}
  return {
    name: np.stack([x[name] for x in examples if name in x]) for name in names
  }


def batch_keys(
  source: Source, batch: int, *, batch_size: int, seed: int, shuffle: bool
) -> list[str]:
  """The keys of the records at the positions of a global batch.

  Reads the records, but does not decode them: one that was unusable is
  listed, and not what has replaced it.

  Args:
    source: as given to `make_dataset`, like the others.
    batch: its global index.
    batch_size: global.
    seed: non-negative.
    shuffle: a new order each epoch.
  """

  def key(position: int) -> str:
    index = record_index(position, len(source), seed, shuffle)
    try:
      return source[index]['key']
    except BadRecord as error:
      return error.key

  return [key(batch * batch_size + row) for row in range(batch_size)]


def _begin_worker(worker_index: int, worker_count: int) -> None:
  """Lets a worker keep the memory of one image for the next, and die in time.

  A process that has just begun gives large blocks back to the kernel, which
  clears them page by page when they are asked for again: a third of the time
  of decoding a photograph.
  """

  def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

  # A parent that is killed cannot end its workers.
  threading.Thread(target=end_with_parent, daemon=True).start()
  if sys.platform == 'linux' and (
    mallopt := getattr(ctypes.CDLL(None), 'mallopt', None)
  ):
    for parameter, value in _GLIBC_OPTIONS.items():
      mallopt(parameter, value)


def make_dataset(
  source: Source,
  *,
  transform: Transform,
  batch_size: int,
  seed: int,
  shuffle: bool,
  further_rows: Sequence[tuple[Source, Transform]] = (),
  start_batch: int = 0,
  num_batches: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 1,
  prefetch: int = 2,
) -> grain.IterDataset:
  """Returns this process's slice of every global batch, as NumPy dicts.

  A record for which the source or the transform raises `BadRecord` is logged
  once with its key and replaced by the record at the next position; the
  boolean `'bad'` [B] marks the rows where that happened, so that its sum is
  the number of unusable records drawn.

  Args:
    source: random access records; smaller than a batch is fine.
    transform: `transform(record, rng)` returns a dict of arrays. `rng` depends
      on the seed and the position alone.
    batch_size: global, over all processes.
    seed: non-negative; decides the order and every `rng`.
    shuffle: a new order each epoch; otherwise the source's order, over and
      over.
    further_rows: the sources and transforms of rows 1, 2, … of a pattern that
      repeats along the global batch, where row 0 has `source` and
      `transform`. The sources differ in how they show the same records. Under
      a name that some rows do not have, the others are stacked without them.
    start_batch: the global index of the first batch that is yielded.
    num_batches: how many batches to yield; None for no end.
    process_index: this process, of `process_count`.
    process_count: processes that share each global batch.
    num_workers: worker processes; 0 loads in threads of this process. Worker
      processes need parsed absl flags (`absl.app.run`).
    num_threads: threads of this process, or of each worker.
    prefetch: batches that are buffered, by this process or by each worker.

  Raises:
    ValueError: for an empty source, or a `batch_size` that is not a multiple
      of `process_count` patterns.
    DataError: while iterating, when 100 records in a row are bad.
  """
  if len(source) == 0:
    raise ValueError('The data set is empty.')
  rows = ((source, transform), *further_rows)
  if batch_size < 1 or batch_size % (process_count * len(rows)):
    raise ValueError(
      f'batch_size={batch_size} must be a positive multiple of the '
      f'{process_count} processes, times {len(rows)} rows of a pattern.'
    )
  examples = _Examples(
    rows,
    seed,
    shuffle,
    batch_size,
    process_index,
    process_count,
  )
  local_batch_size = batch_size // process_count
  if num_batches is None:
    num_batches = _ENDLESS
  dataset = (
    grain.MapDataset.range(
      start_batch * local_batch_size,
      (start_batch + num_batches) * local_batch_size,
    )
    .map(examples)
    # Batching after to_iter_dataset would deal single examples out to the
    # workers and make the order depend on how many there are.
    .batch(local_batch_size, batch_fn=_stack if further_rows else None)
    .to_iter_dataset(
      grain.ReadOptions(
        num_threads=num_threads,
        prefetch_buffer_size=max(prefetch, num_threads),
      )
    )
  )
  if num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=max(prefetch, 1)
      ),
      worker_init_fn=_begin_worker,
    )
  return dataset


def iterate(dataset: Iterable[Example]) -> Iterator[Example]:
  """The batches of a dataset.

  Raises:
    DataError: while iterating, when a worker process has died.
  """
  batches = iter(dataset)
  while True:
    try:
      batch = next(batches, None)
    except RuntimeError as error:  # Grain has no error of its own for it.
      if not str(error).startswith('Worker process'):
        raise
      raise DataError(
        f'{error} Exit code -9 may mean too little memory: lower '
        'data.num_workers or data.prefetch.'
      ) from error
    if batch is None:
      return
    yield batch
