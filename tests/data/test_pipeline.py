"""The order of examples depends on the seed alone."""

import logging as python_logging
import pickle

from absl import flags, logging
import numpy as np
import pytest

from mdm_jax.data import pipeline
from mdm_jax.data.images import BadRecord, ExcludedRecord
from mdm_jax.data.shapes import ShapesSource
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform


class Numbers:
  """A source that records which indices were read."""

  def __init__(self, size):
    self.size = size
    self.read = []

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    self.read.append(index)
    return {'key': f'n{index}', 'number': index}


def to_example(record, rng):
  return {
    'number': np.int32(record['number']),
    'random': np.float32(rng.random()),
  }


def fail_on(*bad):
  def transform(record, rng):
    if record['number'] in bad:
      raise BadRecord(record['key'], 'damaged image')
    return to_example(record, rng)

  return transform


def batches(source, *, transform=to_example, **options):
  defaults = {'batch_size': 8, 'seed': 3, 'shuffle': True, 'num_batches': 6}
  return list(
    pipeline.make_dataset(source, transform=transform, **(defaults | options))
  )


def column(found, name='number'):
  return np.concatenate([batch[name] for batch in found])


def test_the_order_of_a_seed_never_changes():
  # A run that a later version resumes must continue in the same order.
  small = column(batches(Numbers(6), batch_size=6, num_batches=2))
  np.testing.assert_array_equal(small, [3, 5, 2, 4, 1, 0, 3, 4, 5, 2, 1, 0])
  large = [pipeline.record_index(p, 10**6, 3, True) for p in (0, 1, 10**6)]
  assert large == [249410, 720013, 557549]


@pytest.mark.parametrize('shuffle', [True, False])
def test_keys_of_a_batch(shuffle):
  for k, batch in enumerate(batches(Numbers(21), shuffle=shuffle)):
    assert pipeline.batch_keys(
      Numbers(21), k, batch_size=8, seed=3, shuffle=shuffle
    ) == [f'n{number}' for number in batch['number']]


def test_keys_name_records_that_cannot_be_read():
  class Unreadable(Numbers):
    def __getitem__(self, index):
      if index == 2:
        raise BadRecord('n2', 'damaged')
      return super().__getitem__(index)

  assert pipeline.batch_keys(
    Unreadable(4), 0, batch_size=4, seed=0, shuffle=False
  ) == ['n0', 'n1', 'n2', 'n3']


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_share_the_same_global_batches(process_count):
  expected = batches(Numbers(21))
  parts = [
    batches(Numbers(21), process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  for k, whole in enumerate(expected):
    for name in ('number', 'random', 'bad'):
      found = np.concatenate([part[k][name] for part in parts])
      np.testing.assert_array_equal(found, whole[name])


@pytest.mark.parametrize('options', [{'num_threads': 2}, {'prefetch': 5}])
def test_threads_and_prefetch_change_nothing(options):
  expected = batches(Numbers(21))
  found = batches(Numbers(21), **options)
  for name in ('number', 'random'):
    np.testing.assert_array_equal(column(found, name), column(expected, name))


@pytest.mark.parametrize('size', [1, 5, 2**16, 2**16 + 1])
def test_each_record_once_an_epoch_in_a_new_order(size):
  epochs = [
    [pipeline.record_index(e * size + i, size, 7, True) for i in range(size)]
    for e in range(2)
  ]
  for order in epochs:
    assert sorted(order) == list(range(size))
  if size > 1:
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(size))


def test_seeds_differ():
  assert column(batches(Numbers(40))).tolist() != (
    column(batches(Numbers(40), seed=4)).tolist()
  )


def test_resuming_reads_nothing_before_and_goes_on_exactly():
  expected = batches(Numbers(21), num_batches=7)
  source = Numbers(21)
  found = batches(source, start_batch=4, num_batches=3)
  for name in ('number', 'random'):
    np.testing.assert_array_equal(
      column(found, name), column(expected[4:], name)
    )
  assert sorted(source.read) == sorted(column(expected[4:]).tolist())


def test_a_data_set_smaller_than_a_batch():
  found = batches(Numbers(3), batch_size=8, num_batches=3)
  assert [len(batch['number']) for batch in found] == [8, 8, 8]
  np.testing.assert_array_equal(np.bincount(column(found)), [8, 8, 8])


def test_without_shuffling_the_order_is_the_sources():
  found = batches(Numbers(5), batch_size=2, shuffle=False, num_batches=3)
  assert column(found).tolist() == [0, 1, 2, 3, 4, 0]


def test_without_num_batches_there_is_no_end():
  dataset = pipeline.make_dataset(
    Numbers(2), transform=to_example, batch_size=2, seed=0, shuffle=True
  )
  iterator = iter(dataset)
  for _ in range(20):
    assert sorted(next(iterator)['number'].tolist()) == [0, 1]


def test_randomness_belongs_to_the_position():
  found = column(batches(Numbers(2), num_batches=4), 'random')
  assert len(set(found.tolist())) == len(found)
  assert 0.3 < found.mean() < 0.7


class Requested(Numbers):
  """A source that is asked before it is read."""

  def __init__(self, size):
    super().__init__(size)
    self.waiting, self.most, self.total = 0, 0, 0

  def request(self, index):
    self.waiting += 1
    self.total += 1
    self.most = max(self.most, self.waiting)

    def read():
      # How many are under way while this one is waited for.
      self.read.append(self.waiting)
      self.waiting -= 1
      return super(Requested, self).__getitem__(index)

    return read


def test_requests_go_on_beyond_the_end_of_a_batch():
  source = Requested(1000)
  found = batches(source, shuffle=False, num_batches=20)
  np.testing.assert_array_equal(column(found), range(160))
  # No more than two batches are known: those of 8 records and the next.
  waiting = source.read[::2]
  assert min(waiting[:-8]) >= 8 and source.most == 16
  # Each record is asked for once.
  assert source.total == 160 and source.waiting == 0
  source = Requested(1000)
  batches(source, batch_size=100, num_batches=2)
  assert source.most == 32 and source.total == 200


def test_bad_records_are_replaced_flagged_and_logged_once(caplog):
  options = {'batch_size': 2, 'shuffle': False, 'num_batches': 5}
  with caplog.at_level(python_logging.WARNING):
    found = batches(Numbers(5), transform=fail_on(1, 2), **options)
  assert column(found).tolist() == [0, 3, 3, 3, 4, 0, 3, 3, 3, 4]
  assert column(found, 'bad').astype(int).tolist() == [
      0, 1, 1, 0, 0, 0, 1, 1, 0, 0,
  ]  # fmt: skip
  messages = [r.getMessage() for r in caplog.records]
  assert sum('n1: damaged image' in m for m in messages) == 1
  assert sum('n2: damaged image' in m for m in messages) == 1


def test_excluded_records_are_replaced_but_not_bad(caplog):
  def transform(record, rng):
    if record['number'] == 1:
      raise ExcludedRecord(record['key'], 'caption too long')
    return fail_on(3)(record, rng)

  options = {'batch_size': 2, 'shuffle': False, 'num_batches': 5}
  with caplog.at_level(python_logging.WARNING):
    found = batches(Numbers(5), transform=transform, **options)
  assert column(found).tolist() == [0, 2, 2, 4, 4] * 2
  assert column(found, 'bad').astype(int).tolist() == [0, 0, 0, 1, 0] * 2
  messages = ' '.join(r.getMessage() for r in caplog.records)
  assert 'n3: damaged image' in messages and 'n1' not in messages
  assert pickle.loads(pickle.dumps(ExcludedRecord('a', 'b'))).key == 'a'


def test_replacements_are_the_same_for_any_process_count():
  transform = fail_on(0, 3, 4, 11)
  expected = batches(Numbers(13), transform=transform)
  assert column(expected, 'bad').sum() > 0
  second = batches(
    Numbers(13), transform=transform, process_index=1, process_count=2
  )
  for whole, half in zip(expected, second):
    for name in ('number', 'random', 'bad'):
      np.testing.assert_array_equal(half[name], whole[name][4:])


def test_a_data_set_of_bad_records_is_an_error():
  with pytest.raises(ValueError, match='100 records in a row.*damaged image'):
    batches(Numbers(3), transform=fail_on(0, 1, 2))


def test_other_errors_of_a_transform_are_not_hidden():
  def transform(record, rng):
    raise ValueError('a defect of the program')

  with pytest.raises(ValueError, match='a defect of the program'):
    batches(Numbers(3), transform=transform)


@pytest.mark.parametrize(
  'size, options, message',
  [
    (0, {}, 'empty'),
    (5, {'batch_size': 0}, 'batch_size=0'),
    (5, {'batch_size': 6, 'process_count': 4}, 'batch_size=6.*4 processes'),
  ],
)
def test_errors_name_what_is_wrong(size, options, message):
  with pytest.raises(ValueError, match=message):
    batches(Numbers(size), **options)


def rows_of(name):
  def transform(record, rng):
    return {'number': np.int32(record['number']), name: np.ones(len(name))}

  return transform


@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_rows_of_a_pattern_are_stacked_by_name(process_count):
  other = Numbers(21)
  options = {
    'batch_size': 12,
    'transform': rows_of('long'),
    'further_rows': [(Numbers(21), rows_of('long')), (other, rows_of('x'))],
  }
  plain = batches(Numbers(21), batch_size=12)
  parts = [
    batches(
      Numbers(21), **options, process_index=i, process_count=process_count
    )
    for i in range(process_count)
  ]
  # The order is the same as without a pattern; every third row has no 'long'.
  for k, whole in enumerate(plain):
    number = np.concatenate([part[k]['number'] for part in parts])
    np.testing.assert_array_equal(number, whole['number'])
    for part in parts:
      assert part[k]['long'].shape == (8 // process_count, 4)
      assert part[k]['x'].shape == (4 // process_count, 1)
  assert sorted(set(other.read)) == sorted(
    {int(n) for whole in plain for n in whole['number'][2::3]}
  )


@pytest.mark.parametrize('process_count', [1, 2])
def test_rows_of_other_records_have_an_order_of_their_own(process_count):
  parts = [
    batches(
      Numbers(21),
      batch_size=12,
      transform=rows_of('a'),
      further_rows=[(Numbers(5), rows_of('bb')), (Numbers(21), rows_of('a'))],
      streams=[0, 1, 0],
      process_index=i,
      process_count=process_count,
    )
    for i in range(process_count)
  ]
  found = [
    np.concatenate([part[k]['number'] for part in parts])
    for k in range(len(parts[0]))
  ]
  assert all(part[0]['bb'].shape[0] == 4 // process_count for part in parts)
  for name, size, rows in (('own', 21, [0, 2]), ('other', 5, [1])):
    numbers = np.concatenate([x.reshape(4, 3)[:, rows].ravel() for x in found])
    expected = np.concatenate(
      [x['number'] for x in batches(Numbers(size), batch_size=4 * len(rows))]
    )
    np.testing.assert_array_equal(numbers, expected, name)
  keys = pipeline.batch_keys(
    Numbers(21),
    1,
    batch_size=12,
    seed=3,
    shuffle=True,
    further_sources=[Numbers(5), Numbers(21)],
    streams=[0, 1, 0],
  )
  assert keys == [f'n{number}' for number in found[1]]


def test_processes_hold_whole_patterns():
  with pytest.raises(ValueError, match='batch_size=12.*2 processes.*4 rows'):
    batches(
      Numbers(5),
      batch_size=12,
      process_count=2,
      further_rows=[(Numbers(5), to_example)] * 3,
    )


@pytest.mark.parametrize('mixed', [False, True])
def test_worker_processes_give_the_same_batches(mixed):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  tokenizer = Tokenizer(CAPTIONS_MODEL, 16)
  coarse = Transform(tokenizer, 8, image_name='image_8')
  options = {
    'transform': Transform(tokenizer, 16),
    'further_rows': [
      (ShapesSource(seed=0, split='train', size=10, resolution=8), coarse)
    ]
    * mixed,
    'batch_size': 4,
    'num_batches': 3,
    'start_batch': 2,
  }
  source = ShapesSource(seed=0, split='train', size=10, resolution=16)
  expected = batches(source, **options)
  found = batches(source, num_workers=2, **options)
  assert len(found) == len(expected) == 3
  for one, other in zip(expected, found):
    images = ['image', 'image_8'] if mixed else ['image']
    assert sorted(one) == ['bad', *images, 'scale', 'text']
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_usable_records_take_the_place_of_others(caplog):
  class Source(Numbers):
    def __getitem__(self, index):
      if index == 2:
        raise ExcludedRecord('n2', 'caption too long')
      if index == 5:
        raise BadRecord('n\x1b5', 'damaged image')
      return super().__getitem__(index)

  found = pipeline.usable_records(Source(8), [1, 2, 5])
  assert [record['key'] for record in found] == ['n1', 'n3', 'n6']
  (line,) = caplog.messages
  assert line == r'Replaced an unusable record: n\x1b5: damaged image'


def test_lines_of_worker_processes_are_formatted(monkeypatch, capfd):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  handler = logging.get_absl_handler().python_handler
  line = python_logging.Formatter('<%(levelname)s %(message)s>')
  monkeypatch.setattr(handler, 'formatter', line)
  options = {'transform': fail_on(2), 'num_batches': 1, 'num_workers': 1}
  batches(Numbers(8), **options)
  (found,) = [x for x in capfd.readouterr().err.splitlines() if 'n2' in x]
  assert found == '<WARNING Replaced an unusable record: n2: damaged image>'


@pytest.mark.soak
@pytest.mark.parametrize('start_batch', [0, 17, 25])  # 25: an epoch's end.
def test_hosts_workers_and_resuming_change_no_bit(start_batch):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  options = {
    'transform': Transform(Tokenizer(CAPTIONS_MODEL, 16), 16),
    'batch_size': 8,
    'num_batches': 5,
  }
  source = ShapesSource(seed=0, split='train', size=200, resolution=16)
  expected = batches(source, **(options | {'num_batches': 30}))
  expected = expected[start_batch : start_batch + 5]
  for process_count in (1, 2, 4):
    for num_workers in (0, 1, 2, 3):
      parts = [
        batches(
          source,
          start_batch=start_batch,
          process_index=i,
          process_count=process_count,
          num_workers=num_workers,
          **options,
        )
        for i in range(process_count)
      ]
      for whole, *found in zip(expected, *parts, strict=True):
        for name in whole:
          np.testing.assert_array_equal(
            np.concatenate([part[name] for part in found]), whole[name]
          )
