"""Prepared data sets as random access records."""

import io
import pathlib
import pickle
import tarfile

import numpy as np
from PIL import Image
import pytest

from mdm_jax.data import pipeline, sources
from mdm_jax.data.images import BadRecord
from mdm_jax.data.transforms import Transform
from mdm_jax.tools import prepare_data
from tests import fuzzing


class Lengths:
  """A tokenizer: the length of the caption."""

  def encode(self, caption):
    return np.array([len(caption)], np.int32)


def image_file(level):
  buffer = io.BytesIO()
  Image.new('RGB', (24 + level, 20), (level, 0, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


@pytest.fixture
def data_set(tmp_path):
  """Ten records, one of them for validation."""
  with tarfile.open(tmp_path / 'some.tar', 'w') as tar:
    for i in range(10):
      for name, data in (
        (f'{i}.png', image_file(i)),
        (f'{i}.txt', f'caption ü {i}'.encode()),
      ):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  path = str(tmp_path / 'prepared')
  prepare_data.prepare(
    f'{tmp_path}/*.tar', path, prepare_data.Options(validation_fraction=0.2)
  )
  return path


def test_records_come_back_as_they_were_written(data_set):
  assert set(sources.available_splits(data_set)) == {'train', 'validation'}
  train = sources.open_source(data_set, 'train')
  validation = sources.open_source(data_set, 'validation')
  records = [s[i] for s in (train, validation) for i in range(len(s))]
  assert len(validation) > 0
  assert sorted(r['key'] for r in records) == [f'some/{i}' for i in range(10)]
  for record in records:
    i = int(record['key'].removeprefix('some/'))
    assert record['image'] == image_file(i)
    assert record['caption'] == f'caption ü {i}'


def test_a_source_goes_to_workers_by_its_path(data_set):
  source = sources.open_source(data_set, 'train')
  first = source[0]
  data = pickle.dumps(source)
  assert len(data) < 1000
  assert pickle.loads(data)[0] == first


def test_batches_of_a_prepared_data_set(data_set):
  source = sources.open_source(data_set, 'train')
  dataset = pipeline.make_dataset(
    source,
    transform=Transform(Lengths(), 16),
    batch_size=len(source),
    seed=0,
    shuffle=True,
    num_batches=1,
  )
  (batch,) = dataset
  levels = sorted(batch['image'][:, 8, 8, 0].tolist())
  keys = [source[i]['key'] for i in range(len(source))]
  assert levels == sorted(int(k.removeprefix('some/')) for k in keys)
  assert batch['text'].tolist() == [[11]] * len(source)
  assert batch['scale'].tolist() == [20.0] * len(source)


def test_a_damaged_record_is_bad_and_the_others_are_not(data_set, tmp_path):
  (path,) = (tmp_path / 'prepared').glob('*-train.array_record-00000-of-00001')
  data = bytearray(path.read_bytes())
  wanted = sources.open_source(data_set, 'train')[2]
  data[data.index(wanted['image']) + 30] ^= 1
  path.write_bytes(data)
  source = sources.open_source(data_set, 'train')
  for i in range(len(source)):
    if i == 2:
      with pytest.raises(BadRecord, match=r'\[2\]: damaged record'):
        source[i]
    else:
      assert source[i]['caption'].startswith('caption')


def test_a_folder_of_images_is_to_be_prepared(tmp_path):
  with pytest.raises(FileNotFoundError, match=f'--input={tmp_path} --output=D'):
    sources.open_source(str(tmp_path), 'train')
  missing = tmp_path / 'x'
  with pytest.raises(FileNotFoundError, match=f'IMAGES --output={missing}'):
    sources.open_source(str(missing), 'train')


def test_what_is_missing_is_named(data_set, tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.*prepare_data.*--out'):
    sources.open_source(f'{tmp_path}/nowhere', 'train')
  with pytest.raises(ValueError, match="'test', only: train, validation"):
    sources.open_source(data_set, 'test')
  (path,) = (tmp_path / 'prepared').glob('*-train.array_record-00000-of-00001')
  path.unlink()
  with pytest.raises(FileNotFoundError, match='train.array_record-00000'):
    sources.open_source(data_set, 'train')


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize('junk', [b'', b'{}', b'\xff', b'[1, 2', b'{"splits":'])
def test_a_damaged_description_is_named(data_set, name, junk):
  (pathlib.Path(data_set) / name).write_bytes(junk)
  with pytest.raises(ValueError, match='json in .*/prepared is damaged') as e:
    sources.open_source(data_set, 'train')
  assert '\n' not in str(e.value)


def example(**features):
  """Bytes of a record with any features; None leaves one out."""
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

  good = {'image': image_file(1), 'caption': b'words', 'key': b'some/1'}
  record = tf_example_pb2.Example()
  for name, value in (good | {'width': 3, 'height': 2} | features).items():
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], bytes):
      lists = {'bytes_list': tf_feature_pb2.BytesList(value=values)}
    elif values and isinstance(values[0], float):
      lists = {'float_list': tf_feature_pb2.FloatList(value=values)}
    else:
      values = [x for x in values if x is not None]
      lists = {'int64_list': tf_feature_pb2.Int64List(value=values)}
    if value is not None:
      record.features.feature[name].CopyFrom(tf_feature_pb2.Feature(**lists))
  return record.SerializeToString()


def damaged():
  return [
    (b'', 'damaged record'),
    (b'garbage', 'damaged record'),
    (b'\x0a\xff\xff\xff\xff\x7f', 'damaged record'),  # 32 GB are announced
    (example()[:-30], 'damaged record'),
    (example(image=None), 'damaged record'),
    (example(image=3), 'damaged record'),
    (example(image=0.5), 'damaged record'),
    (example(image=[]), 'damaged record'),
    (example(image=[b'a', b'b']), 'damaged record'),
    (example(caption=None), 'empty caption'),
    (example(caption=3), 'unreadable caption'),
    (example(caption=b'caf\xe9'), 'unreadable caption'),
    (example(caption=b'a\0'), 'unreadable caption'),
    (example(caption=b''), 'empty caption'),
    (example(key=None), 'damaged record'),
    (example(key=7), 'damaged record'),
    (example(width=b'wide'), 'damaged record'),
    (example(width=0), 'damaged record'),
    (example(width=-5), 'damaged record'),
    (example(height=None), 'damaged record'),
  ]


def test_records_that_are_something_else_are_bad(data_set, tmp_path):
  """Their checksums are right."""
  from array_record.python import array_record_module

  cases = damaged()
  count = len(sources.open_source(data_set, 'train'))
  (path,) = (tmp_path / 'prepared').glob('*-train.array_record-00000-of-00001')
  good = example(key=b'caf\xe9\n', caption=b'one\ntwo', height=7)
  reasons = []
  for start in range(0, len(cases), count - 1):
    records = [data for data, _ in cases[start : start + count - 1]]
    records += [good] * (count - len(records))
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for data in records:
      writer.write(data)
    writer.close()
    source = sources.open_source(data_set, 'train')
    for i in range(min(count - 1, len(cases) - start)):
      with pytest.raises(BadRecord) as info:
        source[i]
      reasons.append(info.value.reason)
      str(info.value).encode()
      assert '\n' not in str(info.value)
  assert reasons == [reason for _, reason in cases]
  # A reader of today's sets: several captions, and a key in one line.
  assert source[count - 1] == {
    'image': image_file(1),
    'caption': 'one',
    'captions': ['one', 'two'],
    'key': r'caf\xe9\n',
    'size': 3,
  }
  (batch,) = pipeline.make_dataset(
    source,
    transform=Transform(Lengths(), 16),
    batch_size=count,
    seed=0,
    shuffle=True,
    num_batches=1,
  )
  assert 0 < batch['bad'].sum() < count


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_record_is_read_or_bad(data_set, count):
  source = sources.open_source(data_set, 'train')
  source[0]

  def make(rng):
    data = example(caption=rng.choice([b'words', b'one\ntwo']))
    return fuzzing.damage(data, rng)

  def read(data):
    source.__dict__['_records'] = [data]
    record = source[0]
    (record['key'] + ''.join(record['captions'])).encode()

  fuzzing.check(read, make, count, refuses=BadRecord)
