"""Tars that are trained on where they are, in a bucket that fails at times."""

import io
import json
import tarfile
import time
import types

from absl import flags
import aiohttp
from etils import epath
import gcsfs.retry
import numpy as np
import pytest

from mdm_jax.data import pipeline, tar_index, tars
from mdm_jax.data.images import DataError
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.runtime import buckets, files, remote_reads

_COUNT = 24  # records in a tar
_MEDIA = 'GET /download/.*tar'


def make_tar(image_file, first, count=_COUNT):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as tar:
    for i in range(first, first + count):
      for name, data in (
        (f'{i:03}.jpg', image_file(i)),
        (f'{i:03}.json', json.dumps({'caption': f'number {i}'}).encode()),
      ):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  return buffer.getvalue()


def write_tars(directory, image_file):
  """Two tars and their index, in a bucket or not."""
  for i in range(2):
    path = epath.Path(directory) / f'{i}.tar'
    if files.is_local(path):
      path.parent.mkdir(exist_ok=True)
    path.write_bytes(make_tar(image_file, i * _COUNT))
  return index_tars(directory)


def index_tars(directory):
  output = f'{directory}/index'
  tar_index.write_index(tars.find([f'{directory}/*.tar']), output, 0.0)
  return output


@pytest.fixture
def quickly(monkeypatch):
  """Retries without waiting, and an outage is soon given up."""

  async def sleep(seconds):
    del seconds

  for module in (gcsfs.retry, remote_reads):
    monkeypatch.setattr(
      module,
      'asyncio',
      types.SimpleNamespace(**vars(module.asyncio) | {'sleep': sleep}),
    )
  monkeypatch.setattr(remote_reads, '_PATIENCE', 0.3)


def batches(index, **options):
  defaults = {'batch_size': 16, 'seed': 3, 'shuffle': True, 'num_batches': 6}
  return list(
    pipeline.make_dataset(
      tar_index.open_source(index, 'train'),
      transform=Transform(Tokenizer(CAPTIONS_MODEL, 8), 16),
      **defaults | options,
    )
  )


def assert_equal(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_those_of_a_disk(bucket, image_file, tmp_path):
  index = write_tars(bucket.path, image_file)
  expected = batches(write_tars(tmp_path / 'a', image_file))
  assert not any(batch['bad'].any() for batch in expected)
  bucket.requests.clear()
  assert_equal(batches(index), expected)
  # A record is one request, two epochs are two of each.
  media = [x for x in bucket.requests if x.startswith('GET /download')]
  assert sum('.tar?' in x for x in media) == 6 * 16
  # A run that resumes.
  assert_equal(batches(index, start_batch=4, num_batches=2), expected[4:])
  # Threads work ahead on different batches.
  bucket.requests.clear()
  assert_equal(batches(index, num_threads=3), expected)
  assert sum('.tar?alt' in request for request in bucket.requests) == 6 * 16
  # Also an index on a disk, of tars in a bucket.
  tar_index.write_index(
    tars.find([f'{bucket.path}/*.tar']), f'{tmp_path}/index', 0.0
  )
  assert_equal(batches(f'{tmp_path}/index', num_threads=3), expected)


def test_worker_processes_read_the_same(bucket, image_file):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  index = write_tars(bucket.path, image_file)
  expected = batches(index)
  bucket.requests.clear()
  assert_equal(batches(index, num_workers=2), expected)
  # Each works ahead on the batches that are its own.
  assert sum('.tar?alt' in request for request in bucket.requests) == 6 * 16
  # The workers share one copy of the table.
  assert sum('train.npy?alt' in request for request in bucket.requests) <= 1
  with (
    bucket.failing(_MEDIA, status=403, body=b'no access'),
    pytest.raises(DataError, match='tar cannot be read .no permission') as e,
  ):
    batches(index, num_workers=1)
  assert '\n' not in str(e.value)


def test_records_are_requested_ahead(bucket, image_file):
  index = write_tars(bucket.path, image_file)
  batches(index, num_batches=1)
  source = tar_index.open_source(index, 'train')
  len(source), source[0]
  with bucket.delayed(0.2):
    begin = time.monotonic()
    (batch,) = pipeline.make_dataset(
      source,
      transform=Transform(Tokenizer(CAPTIONS_MODEL, 8), 16),
      batch_size=40,
      seed=0,
      shuffle=True,
      num_batches=1,
    )
    seconds = time.monotonic() - begin
    assert len(batch['image']) == 40
    # One after the other, they would take 8 s; with 32 at once, 0.4 s.
    assert seconds < 4
    begin = time.monotonic()
    records = list(pipeline.usable_records(source, range(40)))
    keys = pipeline.batch_keys(source, 0, batch_size=40, seed=0, shuffle=False)
    assert time.monotonic() - begin < 8
  assert keys == [record['key'] for record in records]
  bucket.requests.clear()
  pipeline.batch_keys(source, 0, batch_size=40, seed=0, shuffle=False)
  assert not bucket.requests  # The index has them.
  assert keys == [source[i]['key'] for i in range(40)]


@pytest.mark.parametrize(
  'fault',
  [
    {'status': 503, 'times': 20},
    {'status': 429, 'share': 0.3},
    {'status': 502, 'times': 1},
    {'reset': 'request', 'share': 0.2},
    {'reset': 'response', 'share': 0.2},
    {'stall': 30, 'times': 2},
    # As many as the client gives up at, and more.
    {'status': 503, 'times': 150},
  ],
  ids=str,
)
def test_no_fault_that_passes_is_seen(
  bucket, image_file, quickly, monkeypatch, fault
):
  monkeypatch.setattr(remote_reads, '_PATIENCE', 60)
  # Seconds without a byte, after which a request is repeated.
  monkeypatch.setattr(
    buckets.file_system(bucket.path),
    'requests_timeout',
    aiohttp.ClientTimeout(sock_read=1 if 'stall' in fault else 20),
  )
  index = write_tars(bucket.path, image_file)
  expected = batches(index, num_batches=3)
  with bucket.failing(_MEDIA, **fault) as harm:
    begin = time.monotonic()
    assert_equal(batches(index, num_batches=3), expected)
  assert harm.hit
  assert time.monotonic() - begin < 20 or 'stall' not in fault


@pytest.mark.parametrize(
  ['fault', 'message'],
  [
    ({'status': 503}, 'tar cannot be read (for 0 minutes: '),
    ({'reset': 'request'}, 'no answer from the bucket'),
    ({'status': 401, 'body': b'who?'}, 'gcloud auth application-default login'),
    ({'status': 403, 'body': b'no access'}, 'Storage Object User'),
    (
      {'status': 400, 'body': b'Bucket is a requester pays bucket'},
      'MDM_JAX_BILLING_PROJECT',
    ),
  ],
  ids=str,
)
def test_an_outage_makes_no_bad_records(
  bucket, image_file, quickly, caplog, fault, message
):
  index = write_tars(bucket.path, image_file)
  with (
    bucket.failing(_MEDIA, **fault),
    pytest.raises(DataError) as caught,
    caplog.at_level('INFO', logger='absl'),
  ):
    batches(index)
  text = str(caught.value)
  assert message in text and '\n' not in text and text.endswith('.')
  assert text.startswith(f'{bucket.path}/')
  assert not any('unusable record' in line for line in caplog.messages)


def test_an_object_that_disappears_makes_bad_records(
  bucket, image_file, caplog
):
  """As on a disk."""
  index = write_tars(bucket.path, image_file)
  source = tar_index.open_source(index, 'train')

  def read(batch):
    return list(
      pipeline.make_dataset(
        source,
        transform=Transform(Tokenizer(CAPTIONS_MODEL, 8), 16),
        batch_size=2 * _COUNT,
        seed=3,
        shuffle=True,
        start_batch=batch,
        num_batches=1,
      )
    )

  (epath.Path(bucket.path) / '1.tar').unlink()
  with caplog.at_level('INFO', logger='absl'):
    (batch,) = read(0)
  assert batch['bad'].sum() == _COUNT
  assert sum('unreadable tar' in line for line in caplog.messages) == _COUNT
  (epath.Path(bucket.path) / '0.tar').write_bytes(make_tar(image_file, 0, 10))
  with caplog.at_level('INFO', logger='absl'):
    (batch,) = read(1)
  assert batch['bad'].sum() == 2 * _COUNT - 10
  assert 'the file ends before byte' in caplog.text
  (epath.Path(bucket.path) / '0.tar').unlink()
  with pytest.raises(DataError, match='100 records in a row .*no such object'):
    read(2)


def test_what_has_changed_since_it_was_indexed_is_named(bucket, image_file):
  index = write_tars(bucket.path, image_file)
  path = epath.Path(bucket.path) / '1.tar'
  data = path.read_bytes()
  path.write_bytes(data)  # The same content is a new generation.
  with pytest.raises(ValueError, match='1.tar has been replaced since gs:.*in'):
    tar_index.open_source(index, 'train')
  path.write_bytes(data[:-512])
  with pytest.raises(ValueError, match=r'1.tar has \d+ bytes, \d+ when gs://'):
    tar_index.open_source(index, 'train')
  path.unlink()
  with pytest.raises(FileNotFoundError, match='1.tar, which gs.* is missing'):
    tar_index.open_source(index, 'train')
  with pytest.raises(FileNotFoundError, match='no index in gs://.*index_tars'):
    tar_index.open_source(f'{bucket.path}/none', 'train')


def test_an_outage_of_the_index_is_no_damage(bucket, image_file, quickly):
  index = write_tars(bucket.path, image_file)
  for name in ('index.json', 'o?.*prefix=.*delimiter|delimiter=.*prefix'):
    with (
      bucket.failing(f'GET.*{name}', status=503),
      pytest.raises(OSError, match='503') as e,
    ):
      tar_index.open_source(index, 'train')
    assert 'damaged' not in str(e.value)


def test_indexing_reads_once_and_an_outage_makes_no_rejects(
  bucket, image_file, quickly
):
  write_tars(bucket.path, image_file)
  for name in ('index.json', 'rejects.jsonl', 'train.npy'):
    (epath.Path(bucket.path) / 'index' / name).unlink()
  with (
    bucket.failing(f'{_MEDIA}', status=503),
    pytest.raises(remote_reads.Unavailable, match='tar cannot be read'),
  ):
    index_tars(bucket.path)
  assert not any('index/' in name for name in bucket.files())
  # Killed before its last file, it is made anew.
  index_tars(bucket.path)
  (epath.Path(bucket.path) / 'index' / 'index.json').unlink()
  bucket.requests.clear()
  index = index_tars(bucket.path)
  reads = [x for x in bucket.requests if x.startswith('GET /download')]
  assert sum('.tar?' in x for x in reads) == 2  # of less than a block
  assert len(batches(index)) == 6
  with pytest.raises(ValueError, match='index exists: remove it'):
    index_tars(bucket.path)
