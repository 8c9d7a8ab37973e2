"""Tars are read as a stream in any order, or in place through an index."""

import json
import pickle

import numpy as np
import pytest

from mdm_jax.data import pipeline, tar_index, tars
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import BadRecord, Transform
from tests.tools.test_prepare_data import (
  bomb,
  good_files,
  image_file,
  write_tar,
)


def read(path):
  rejects = []
  records = list(tars.read_records(path, rejects))
  return records, [(bad.key, bad.reason) for bad in rejects]


def test_parts_may_be_anywhere(tmp_path):
  files = good_files(4)
  apart = sorted(files, key=lambda name: name.rpartition('.')[::-1])
  assert apart[3].endswith('jpg') and apart[4].endswith('txt')
  write_tar(tmp_path / 's.tar', {name: files[name] for name in apart})
  write_tar(tmp_path / 't.tar', files)
  for stem in 's', 't':
    records, rejects = read(tmp_path / f'{stem}.tar')
    assert rejects == []
    assert sorted(records) == [
      (f'{stem}/00{i}', files[f'00{i}.jpg'], [f'picture {i}']) for i in range(4)
    ]


def test_neighbours_need_no_memory(tmp_path, monkeypatch):
  files = good_files(20)
  limit = 3 * len(files['000.jpg'])
  monkeypatch.setattr(tars, '_MAX_PENDING', limit)
  write_tar(tmp_path / 's.tar', files)
  assert len(read(tmp_path / 's.tar')[0]) == 20
  apart = sorted(files, key=lambda name: name.rpartition('.')[::-1])
  write_tar(tmp_path / 's.tar', {name: files[name] for name in apart})
  records, rejects = read(tmp_path / 's.tar')
  assert len(records) < 3
  assert ('s/000', 'parts too far apart') in rejects


def test_hostile_members(tmp_path, monkeypatch):
  monkeypatch.setattr(tars, '_MAX_CAPTION', 50_000)
  nested = b'{"caption":' + b'[' * 40_000 + b']' * 4
  write_tar(
    tmp_path / 's.tar',
    {
      'big.jpg': image_file(),
      'big.txt': b'x' * 100_000,
      'nested.jpg': image_file(),
      'nested.json': nested,
      '../../etc/passwd.jpg': image_file(),
      '../../etc/passwd.txt': b'words',
      'good.jpg': image_file(),
      'good.txt': b'words',
    },
  )
  records, rejects = read(tmp_path / 's.tar')
  assert [key for key, _, _ in records] == ['s/../../etc/passwd', 's/good']
  assert rejects == [
    ('s/big', 'file too large'),
    ('s/nested', 'unreadable caption'),
  ]
  assert [path.name for path in tmp_path.iterdir()] == ['s.tar']

  monkeypatch.setattr(tars, '_MAX_MEMBERS', 6)
  records, rejects = read(tmp_path / 's.tar')
  assert [key for key, _, _ in records] == ['s/../../etc/passwd']
  assert rejects[-1] == (f'{tmp_path}/s.tar', 'damaged tar')


def test_a_name_used_twice_counts_once(tmp_path):
  files = {
    'a.jpg': image_file(),
    'a.txt': b'first',
    'b.jpg': image_file(),
    'b.txt': b'words',
    './a.txt': b'second',
    './a.jpg': image_file(),
    'b.json': b'{"caption": "other"}',
  }
  write_tar(tmp_path / 's.tar', files)
  records, rejects = read(tmp_path / 's.tar')
  assert [(key, caption) for key, _, caption in records] == [
    ('s/a', ['first']),
    ('s/b', ['words']),
  ]
  assert rejects == [('s/a', 'name used twice')] * 2


@pytest.fixture
def index(tmp_path):
  """30 records in three tars."""
  for i in range(3):
    write_tar(
      tmp_path / f'{i}.tar',
      good_files(10)
      | {
        'x.txt': b'no image',
        'j.jpg': image_file(color=(i, 2, 3)),
        'j.json': json.dumps({'caption': f'json {i}'}).encode(),
      },
    )
  paths = tars.find([f'{tmp_path}/*.tar'])
  counts = tar_index.write_index(paths, f'{tmp_path}/index', 0.2)
  assert sum(counts.values()) == 33
  return str(tmp_path / 'index')


def test_records_in_place(index, tmp_path):
  expected = {}
  for path in tars.find([f'{tmp_path}/*.tar']):
    for key, image, texts in tars.read_records(path, []):
      expected.setdefault(tars.split_of(key, 0.2), []).append((image, texts))
  for split in ('train', 'validation'):
    source = pickle.loads(pickle.dumps(tar_index.open_source(index, split)))
    found = [
      (source[i]['image'], source[i]['captions']) for i in range(len(source))
    ]
    assert sorted(found) == sorted(expected[split])
    assert len({source[i]['key'] for i in range(len(source))}) == len(source)
    assert source._table.nbytes == 21 * len(source)
    assert isinstance(source._table, np.memmap)


def test_what_has_changed_is_named(index, tmp_path):
  source = tar_index.open_source(index, 'train')
  source[0]
  with pytest.raises(ValueError, match="no split 'test', only: train, valid"):
    tar_index.open_source(index, 'test')
  with pytest.raises(FileNotFoundError, match='no index in .*none.*index_tars'):
    tar_index.open_source(f'{tmp_path}/none', 'train')
  path = tmp_path / '1.tar'
  data = path.read_bytes()
  path.write_bytes(data[:2000])
  with pytest.raises(ValueError, match=r'1.tar has 2000 bytes, \d+ when'):
    tar_index.open_source(index, 'train')
  # While a run reads it.
  bad = []
  for i in range(len(source)):
    try:
      source[i]
    except BadRecord as error:
      bad.append(error)
  assert bad and {error.reason for error in bad} == {'unreadable tar'}
  path.unlink()
  with pytest.raises(FileNotFoundError, match='1.tar, which .* is missing'):
    tar_index.open_source(index, 'train')


def test_what_cannot_be_indexed_is_named(tmp_path):
  write_tar(tmp_path / 's.tar.gz', good_files(1), 'w:gz')
  with pytest.raises(ValueError, match='s.tar.gz cannot be indexed.*prepare_d'):
    tar_index.write_index([f'{tmp_path}/s.tar.gz'], f'{tmp_path}/index', 0.0)
  write_tar(tmp_path / 's.tar', {'a.txt': b'words'})
  with pytest.raises(ValueError, match='no record for training'):
    tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  assert not (tmp_path / 'index').exists()


def test_ten_million_records(tmp_path):
  """Opening reads no table, and the order needs no memory."""
  (tmp_path / 'index.json').write_text(
    json.dumps({'tars': [], 'splits': {'train': 10_000_000}})
  )
  table = np.lib.format.open_memmap(
    tmp_path / 'train.npy', 'w+', tar_index._ROW, (10_000_000,)
  )
  del table
  source = tar_index.open_source(str(tmp_path), 'train')
  assert len(source) == 10_000_000
  seen = [
    pipeline.record_index(p, len(source), 0, True)
    for p in range(64_000_000, 64_001_000)
  ]
  assert len(set(seen)) == 1000 and max(seen) > 9_900_000


def test_corrupt_records_are_counted_and_all_others_are_read(tmp_path):
  """An epoch of 200 records with every kind of damage, also side by side."""
  files = {}
  for i in range(200):
    files[f'{i:03}.jpg'] = image_file(color=(i, 50, 99))
    files[f'{i:03}.txt'] = b'words'
  jpeg = image_file(size=(200, 200))
  corrupt = {
    '020.jpg': jpeg[:-100],
    '021.jpg': b'<html>404</html>',
    '022.jpg': bomb(),
    '077.jpg': b'',
    '100.txt': b' \n',
    '101.txt': 'é'.encode('latin-1'),
    '150.txt': b'',
  }
  write_tar(tmp_path / 's.tar', files | corrupt)
  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  (batch,) = pipeline.make_dataset(
    tar_index.open_source(f'{tmp_path}/index', 'train'),
    transform=Transform(Tokenizer(CAPTIONS_MODEL, 8), 8),
    batch_size=200,
    seed=5,
    shuffle=True,
    num_batches=1,
  )
  assert batch['bad'].sum() == len(corrupt)
  reds = batch['image'][~batch['bad'], 4, 4, 0].astype(int)
  wanted = np.setdiff1d(np.arange(200), [int(name[:3]) for name in corrupt])
  # JPEG changes colours a little, but keeps their order.
  np.testing.assert_allclose(np.sort(reds), wanted, atol=3)
  assert len(reds) == 193


def test_an_unreadable_bucket_is_named(monkeypatch):
  def refuse(self, pattern):
    raise PermissionError('403 Forbidden')

  monkeypatch.setattr(type(tars.epath.Path('gs://private/x')), 'glob', refuse)
  with pytest.raises(
    ValueError,
    match=(r'--input=gs://private/x/\*.tar cannot be read: 403 Forbidden'),
  ):
    tars.find(['gs://private/x/*.tar'])
