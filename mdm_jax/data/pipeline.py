"""Batches of examples in an order that depends on the seed alone.

The example at position p of the endless stream is a pure function of (seed,
p), and global batch k holds positions k * batch_size to (k + 1) * batch_size -
1. The number of processes, worker processes and threads does not change the
global batches, and resuming at batch k reads nothing before it.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import ctypes
import dataclasses
import functools
import logging as python_logging
import sys
from typing import Any, Protocol

from absl import logging
import grain
import numpy as np
import PIL

from mdm_jax import child_process
from mdm_jax.data.images import BadRecord, DataError, ExcludedRecord

Record = dict[str, Any]
Example = dict[str, np.ndarray]
Transform = Callable[[Record, np.random.Generator], Example]

# Batches; more than any training run needs, and small enough for len().
_ENDLESS = 2**40
# This many unusable records in a row mean that the data set is defective.
_MAX_REPLACEMENTS = 100
_SHUFFLE_ROUNDS = 4
# index_shuffle permutes at least this many numbers and skips those that are
# too large. In a smaller data set that takes milliseconds for each index, and
# a permutation in memory is faster.
_MIN_INDEX_SHUFFLE = 2**16
# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX.
_GLIBC_OPTIONS = {-3: 2**26, -1: 2**30, -8: 1}
# Records that a thread requests before it needs them: at 50 ms each, 640 in a
# second.
_AHEAD = 32
# Keys of the independent random streams of one seed.
_ORDER_STREAM, _EXAMPLE_STREAM = 0, 1


class Source(Protocol):
  """Random access to records; `__getitem__` may raise `BadRecord`.

  Where reading takes long, a source may have a method `request(index)`, which
  begins to read a record and returns a function that waits for it, and so is as
  `__getitem__`.
  """

  def __len__(self) -> int:
    """The number of records."""

  def __getitem__(self, index: int) -> Record:
    """The record, with at least `image`, `caption` and `key`."""


def package_versions() -> dict[str, str]:
  """Versions of the packages that decide the order and the pixels."""
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
  """The index of the record at a position of the endless stream.

  Every record occurs once per epoch. With `shuffle`, each epoch has a new
  order; otherwise every epoch has the order of the source.
  """
  epoch, offset = divmod(position, num_records)
  if not shuffle:
    return offset
  epoch_seed = _epoch_seed(seed, epoch)
  max_index = num_records - 1
  # If max_index is 4^k, Grain 0.2.18 uses ceil(log2(max_index)) bits, one too
  # few: it repeats one index and drops another.
  is_power_of_two = max_index & (max_index - 1) == 0
  if num_records < _MIN_INDEX_SHUFFLE or is_power_of_two:
    return int(_permutation(num_records, epoch_seed)[offset])
  return grain.experimental.index_shuffle(
    index=offset,
    max_index=max_index,
    seed=epoch_seed,
    rounds=_SHUFFLE_ROUNDS,
  )


def stream_position(position: int, streams: Sequence[int]) -> int:
  """How many rows before this one read the same records.

  Args:
    position: of a row in the endless stream of all rows.
    streams: of each row of the pattern the number of its records, see
      `make_dataset`.
  """
  period, row = divmod(position, len(streams))
  own = streams[row]
  return period * streams.count(own) + streams[:row].count(own)


@dataclasses.dataclass(frozen=True)
class _Batches:
  """Maps the index of a global batch to this process's part of it."""

  rows: tuple[tuple[Source, Transform], ...]
  streams: tuple[int, ...]
  seed: int
  shuffle: bool
  batch_size: int  # global
  process_index: int
  process_count: int
  # The first batch whose records are not requested before it begins. Where a
  # process has several threads, that is each: another may have begun it.
  end: int
  stride: int  # from a batch to the next one of this process
  reported: set[str] = dataclasses.field(default_factory=set)
  # The first records of batches that have not begun, by batch.
  requested: dict[int, collections.deque] = dataclasses.field(
    default_factory=dict
  )

  def __call__(self, batch: int) -> Example:
    positions, examples = self._positions(batch), []
    requested = self.requested.pop(batch, collections.deque())
    # What this process is asked for next.
    following = batch + self.stride
    further = self._positions(following) if following < self.end else ()
    coming = collections.deque()
    # A request is slow only where the records are far away.
    for done, position in enumerate(positions):
      for other in positions[done + len(requested) :][
        : _AHEAD - len(requested)
      ]:
        requested.append(self._request(other))
      room = max(_AHEAD - len(requested) - len(coming), 0)
      for other in further[len(coming) :][:room]:
        coming.append(self._request(other))
      examples.append(self._example(position, requested.popleft()))
    if coming:
      self.requested[following] = coming
    return _stack(examples)

  def _positions(self, batch: int) -> range:
    """Where this process's part of a batch is in the endless stream."""
    size = self.batch_size // self.process_count
    start = batch * self.batch_size + self.process_index * size
    return range(start, start + size)

  def _row(self, position: int) -> tuple[Source, Transform]:
    # The row in the global batch does not depend on processes and workers.
    return self.rows[position % self.batch_size % len(self.rows)]

  def _request(
    self, position: int, replacement: int = 0
  ) -> Callable[[], Record]:
    """Begins to read a record; returns a function that waits for it."""
    source, _ = self._row(position)
    position = stream_position(position, self.streams) + replacement
    index = record_index(position, len(source), self.seed, self.shuffle)
    return _request(source, index)

  def _example(self, position: int, read: Callable[[], Record]) -> Example:
    _, transform = self._row(position)
    bad = False
    for replacement in range(_MAX_REPLACEMENTS):
      rng = np.random.default_rng((self.seed, _EXAMPLE_STREAM, position))
      try:
        if replacement:
          read = self._request(position, replacement)
        example = transform(read(), rng)
      except BadRecord as error:
        if not isinstance(error, ExcludedRecord):
          bad = True
          self._report(error)
        last_error = error
        continue
      return {**example, 'bad': np.bool_(bad)}
    raise _too_many(last_error)

  def _report(self, error: BadRecord) -> None:
    if error.key not in self.reported:
      self.reported.add(error.key)
      _warn_of(error)


def _warn_of(error: BadRecord) -> None:
  # Keys may hold control characters, which `repr` escapes.
  logging.warning('Replaced an unusable record: %s', repr(str(error))[1:-1])


def _stack(examples: Sequence[Example]) -> Example:
  """Stacks the arrays of each name, over the examples that have the name."""
  names = {name: None for example in examples for name in example}
  return {
    name: np.stack([x[name] for x in examples if name in x]) for name in names
  }


def _request(source: Source, index: int) -> Callable[[], Record]:
  """Begins to read a record; returns a function that waits for it."""
  if hasattr(source, 'request'):
    return source.request(index)
  return functools.partial(source.__getitem__, index)


def _request_key(source: Source, index: int) -> Callable[[], str]:
  """Begins to read a record's key; returns a function that waits for it."""
  if hasattr(source, 'key'):
    return functools.partial(source.key, index)
  read = _request(source, index)
  return lambda: read()['key']


def _requests(
  places: Iterable[tuple[Source, int]],
  request: Callable[[Source, int], Callable[[], Any]] = _request,
) -> Iterator[Callable[[], Any]]:
  """Yields a function for each record that waits for it, having asked ahead."""
  requested = collections.deque()
  for source, index in places:
    requested.append(request(source, index))
    if len(requested) == _AHEAD:
      yield requested.popleft()
  yield from requested


def usable_records(source: Source, indices: Sequence[int]) -> Iterator[Record]:
  """Yields the records at some indices, or the next ones that can be used.

  Raises:
    DataError: 100 records in a row are unusable.
  """
  found = [index % len(source) for index in indices]
  requests = _requests((source, index) for index in found)
  for index, read in zip(found, requests):
    for replacement in range(1, _MAX_REPLACEMENTS + 1):
      try:
        yield read()
        break
      except BadRecord as error:
        if not isinstance(error, ExcludedRecord):
          _warn_of(error)
        last_error = error
      read = _request(source, (index + replacement) % len(source))
    else:
      raise _too_many(last_error)


def _too_many(last_error: BadRecord) -> DataError:
  return DataError(
    f'{_MAX_REPLACEMENTS} records in a row are unusable; the last one is '
    f'{last_error}. Check the data set.'
  )


def batch_keys(
  source: Source,
  batch: int,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool,
  further_sources: Sequence[Source] = (),
  streams: Sequence[int] = (),
) -> list[str]:
  """The keys of the records of a global batch.

  Reads the records, but does not decode them; where a source knows its keys, it
  reads nothing. An unusable record is listed
  itself, and not the record that replaced it.

  Args:
    source: as in `make_dataset`.
    batch: index of the global batch.
    batch_size: as in `make_dataset`.
    seed: as in `make_dataset`.
    shuffle: as in `make_dataset`.
    further_sources: of the rows 1, 2, … of the pattern.
    streams: as in `make_dataset`.

  Returns:
    One key for each row of the batch.
  """
  rows = (source, *further_sources)
  streams = tuple(streams) or (0,) * len(rows)
  positions = range(batch * batch_size, (batch + 1) * batch_size)
  places = []
  for position in positions:
    records = rows[position % len(rows)]
    row = stream_position(position, streams)
    places.append((records, record_index(row, len(records), seed, shuffle)))
  keys = []
  for read in _requests(places, _request_key):
    try:
      keys.append(read())
    except BadRecord as error:
      keys.append(error.key)
  return keys


def _begin_worker(
  formatter: python_logging.Formatter, worker_index: int, worker_count: int
) -> None:
  """Prepares a worker process: it reuses memory, and only its parent ends it.

  Its log lines look like those of its parent, whose formatter it gets.

  By default glibc returns the memory of each image to the kernel, which clears
  it page by page at the next allocation: a third of the time it takes to decode
  a photograph.
  """
  child_process.begin()
  handler = python_logging.StreamHandler()
  handler.setFormatter(formatter)
  python_logging.basicConfig(handlers=[handler], force=True)
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
  streams: Sequence[int] = (),
  start_batch: int = 0,
  num_batches: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_workers: int = 0,
  num_threads: int = 1,
  prefetch: int = 2,
) -> grain.IterDataset:
  """This process's slice of every global batch, as dicts of NumPy arrays.

  A record for which the source or the transform raises `BadRecord` is logged
  once with its key, and replaced by the record at the next position. The
  boolean `'bad'` [B] marks the rows where that happened; its sum is the number
  of unusable records in the batch. For `ExcludedRecord` there is only the
  replacement.

  Args:
    source: random access records; may be smaller than a batch.
    transform: `transform(record, rng)` returns a dict of arrays. `rng` depends
      on the seed and the position alone.
    batch_size: global, over all processes.
    seed: non-negative; decides the order and every `rng`.
    shuffle: whether each epoch has a new order; otherwise all epochs have the
      order of the source.
    further_rows: sources and transforms of the rows 1, 2, … of a pattern that
      repeats along the global batch; row 0 has `source` and `transform`. An
      array that only some rows have is stacked over those rows.
    streams: for each row of the pattern a number. Rows of one number share an
      order, in which each record occurs once per epoch; their sources must hold
      the same records, and may differ in their resolution. By default all do.
    start_batch: global index of the first batch.
    num_batches: how many batches to yield; None for endless batches.
    process_index: index of this process, from 0.
    process_count: processes that share each global batch.
    num_workers: worker processes; 0 loads in threads of this process. Worker
      processes need parsed absl flags (`absl.app.run`).
    num_threads: threads of this process, or of each worker.
    prefetch: batches that this process, or each worker, loads ahead.

  Raises:
    ValueError: if the source is empty, or `batch_size` is not a multiple of
      `process_count` times the rows of the pattern.
    DataError: while iterating, if 100 records in a row are unusable.
  """
  if len(source) == 0:
    raise ValueError('The data set is empty.')
  rows = ((source, transform), *further_rows)
  if batch_size < 1 or batch_size % (process_count * len(rows)):
    raise ValueError(
      f'batch_size={batch_size} must be a positive multiple of '
      f'{process_count} processes times {len(rows)} rows of the pattern.'
    )
  if num_batches is None:
    num_batches = _ENDLESS
  # Of whole batches: single examples would be distributed over the workers,
  # and the order would depend on the number of workers.
  batches = grain.MapDataset.range(start_batch, start_batch + num_batches).map(
    _Batches(
      rows,
      tuple(streams) or (0,) * len(rows),
      seed,
      shuffle,
      batch_size,
      process_index,
      process_count,
      end=start_batch + num_batches if num_threads == 1 else 0,
      stride=max(num_workers, 1),
    )
  )
  return _load_ahead(batches, num_workers, num_threads, prefetch)


def _load_ahead(
  batches: grain.MapDataset, num_workers: int, num_threads: int, prefetch: int
) -> grain.IterDataset:
  """Loads batches in threads, of worker processes if there are any."""
  dataset = batches.to_iter_dataset(
    grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
    )
  )
  if num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=max(prefetch, 1)
      ),
      worker_init_fn=functools.partial(
        _begin_worker, logging.get_absl_handler().python_handler.formatter
      ),
    )
  return dataset


def iterate(dataset: Iterable[Example]) -> Iterator[Example]:
  """Yields the batches of a dataset.

  Raises:
    DataError: while iterating, if a worker process has died.
  """
  batches = iter(dataset)
  while True:
    try:
      batch = next(batches, None)
    except RuntimeError as error:  # Grain has no class of its own for this.
      if not str(error).startswith('Worker process'):
        raise
      raise DataError(
        f'{error} Exit code -9 may mean too little memory: lower '
        'data.num_workers or data.prefetch.'
      ) from error
    if batch is None:
      return
    yield batch
