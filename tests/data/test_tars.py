"""Tars are read as a stream in any order, or in place through an index."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from mdm_jax.data import pipeline, sources, tar_index, tar_members, tars
from mdm_jax.data.images import BadRecord
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.tools import prepare_data
from tests import fuzzing
from tests.data.test_tar_members import END, header, padded
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
  parts = {
    name.replace('.', '.in.' if name.endswith('jpg') else '.out.'): data
    for name, data in files.items()
  }
  write_tar(tmp_path / 's.tar', parts)
  assert len(read(tmp_path / 's.tar')[0]) == 20
  apart = sorted(files, key=lambda name: name.rpartition('.')[::-1])
  write_tar(tmp_path / 's.tar', {name: files[name] for name in apart})
  records, rejects = read(tmp_path / 's.tar')
  assert len(records) < 3
  assert ('s/000', 'parts too far apart') in rejects


def test_hostile_members(tmp_path, monkeypatch):
  monkeypatch.setattr(tars, 'MAX_CAPTION', 50_000)
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


JPEG, TEXT = image_file(), b'words'
PAIR = {'a.jpg': JPEG, 'a.txt': TEXT}
LAST = {'z.jpg': JPEG, 'z.txt': TEXT}


def of_two_parts(*names):
  return {
    name: JPEG if name.endswith(('jpg', 'png')) else f'text of {name}'.encode()
    for name in names
  }


ODD = {
  'mac': (
    PAIR
    | {'._a.jpg': b'mac', 'd/._a.txt': b'', '.DS_Store': b'x'}
    | {'__MACOSX/a.jpg': b'mac', '__MACOSX/d/._a.txt': b'mac'},
    {'a': 'words'},
    [],
  ),
  'names with dots': (
    {'...a.jpg': JPEG, '...a.txt': TEXT, '.b/c.jpg': JPEG, '.b/c.txt': TEXT},
    {'...a': 'words', '.b/c': 'words'},
    [],
  ),
  'names': (
    {'./a.jpg': JPEG, 'a.txt': TEXT, '/b.jpg': JPEG, '/b.txt': TEXT}
    | {'../c.jpg': JPEG, '../c.txt': TEXT, 'd.é.jpg': JPEG, 'd.é.txt': TEXT}
    | {'e.jpg/f.PNG': JPEG, 'e.jpg/f.TXT': TEXT},
    dict.fromkeys(['a', '/b', '../c', 'd.é', 'e.jpg/f'], 'words'),
    [],
  ),
  'long names': (
    {'n' * 300 + '.jpg': JPEG, 'n' * 300 + '.txt': TEXT},
    {'n' * 300: 'words'},
    [],
  ),
  'empty members': (
    {'a.jpg': b'', 'a.txt': TEXT, 'b.jpg': JPEG, 'b.txt': b''} | LAST,
    {'a': 'words', 'z': 'words'},
    [('b', 'empty caption')],
  ),
  'apart': (
    {'a.txt': TEXT, 'b.jpg': JPEG} | LAST | {'a.jpg': JPEG, 'b.txt': TEXT},
    dict.fromkeys('abz', 'words'),
    [],
  ),
  'late files': (
    PAIR | LAST | {'a.json': b'{}', 'a.png': JPEG},
    {'a': 'words', 'z': 'words'},
    [('a', 'name used twice')],
  ),
  'two parts': (
    of_two_parts('a.input.jpg', 'a.outputs.txt', 'd/b.in.jpg', 'd/b.out.txt')
    | of_two_parts('c.jpg', 'c.en.txt', 'd.png', 'd.txt', 'd.seg.png'),
    {
      'a': 'text of a.outputs.txt',
      'd/b': 'text of d/b.out.txt',
      'c': 'text of c.en.txt',
      'd': 'text of d.txt',
    },
    [('d.seg', 'image without caption')],
  ),
  'two parts apart': (
    of_two_parts('a.in.jpg', 'b.in.jpg', 'a.out.txt', 'b.out.txt'),
    {'a': 'text of a.out.txt', 'b': 'text of b.out.txt'},
    [],
  ),
  # Which image belongs to which caption is not known.
  'ambiguous parts': (
    of_two_parts('a.in.jpg', 'a.mask.png', 'a.txt')
    | of_two_parts('b.in.jpg', 'b.en.txt', 'b.de.txt'),
    {},
    [
      ('a.in', 'image without caption'),
      ('a.mask', 'image without caption'),
      ('a', 'caption without image'),
      ('b.in', 'image without caption'),
      ('b.en', 'caption without image'),
      ('b.de', 'caption without image'),
    ],
  ),
  # Dots that are part of names.
  'dotted names': (
    of_two_parts('a.one.jpg', 'a.one.txt', 'a.two.jpg', 'a.two.txt')
    | of_two_parts('b.1.jpg', 'b.2.txt', 'a.three.jpg', 'a.four.txt'),
    {'a.one': 'text of a.one.txt', 'a.two': 'text of a.two.txt'},
    [
      ('b.1', 'image without caption'),
      ('b.2', 'caption without image'),
      ('a.three', 'image without caption'),
      ('a.four', 'caption without image'),
    ],
  ),
  'nothing of ours': ({'a.mp4': b'x' * 9999, 'b': b''}, {}, []),
}


def read_both(path):
  """What a stream and the index find: key -> image, caption; and rejects."""
  rejects = []
  streamed = {
    key: (image, *texts)
    for key, image, texts in tars.read_records(path, rejects)
  }
  data, in_place, index_rejects = path.read_bytes(), {}, []
  for key, *members, suffix in tars.find_records(path, index_rejects):
    image, text = (data[m.offset : m.offset + m.size] for m in members)
    try:
      in_place[key] = image, *tars.read_captions(text, suffix, key)
    except BadRecord as bad:
      index_rejects.append(bad)
  assert in_place == streamed
  listed = [[str(bad) for bad in x] for x in (rejects, index_rejects)]
  assert sorted(listed[0]) == sorted(listed[1])
  return streamed, [(bad.key, bad.reason) for bad in rejects]


@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('tar_format', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_tars(tmp_path, monkeypatch, name, tar_format):
  files, expected, rejected = ODD[name]
  monkeypatch.setattr(tarfile.TarFile, 'format', tar_format)
  write_tar(tmp_path / 's.tar', files)
  records, rejects = read_both(tmp_path / 's.tar')
  assert {key: text for key, (_, text) in records.items()} == {
    f's/{key}': text for key, text in expected.items()
  }
  assert sorted(rejects) == sorted((f's/{key}', why) for key, why in rejected)


def test_every_cut_is_named(tmp_path):
  path = tmp_path / 's.tar'
  write_tar(path, good_files(3))
  data = path.read_bytes()
  step = data.index(b'001.jpg')  # bytes of a record
  for cut in range(0, 3 * step + 1, 256):
    path.write_bytes(data[:cut])
    records, rejects = read_both(path)
    assert len(records) == sum(
      cut >= i * step + step - 512 + len(b'picture 0') for i in range(3)
    )
    reason = 'damaged tar' if cut > 511 else 'unreadable tar'
    assert rejects[-1][1] == reason or rejects[-2][1] == reason
    assert {key for key, _ in rejects} >= {str(path)}
  path.write_bytes(data[: 3 * step + 512])
  assert read_both(path)[1] == []


def test_links_and_sparse_files_are_named(tmp_path):
  path = tmp_path / 's.tar'
  with tarfile.open(path, 'w') as tar:
    for name, kind in (
      ('a.jpg', tarfile.LNKTYPE),
      ('b.jpg', tarfile.SYMTYPE),
      ('c.jpg', tarfile.FIFOTYPE),
      ('d.jpg', tarfile.DIRTYPE),
      ('d.jpg', tarfile.REGTYPE),
    ):
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, 'x.jpg'
      tar.addfile(member)
      member = tarfile.TarInfo(name.replace('jpg', 'txt'))
      member.size = len(TEXT)
      tar.addfile(member, io.BytesIO(TEXT))
    sparse = tarfile.TarInfo('e.jpg')
    sparse.pax_headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'}
    tar.addfile(sparse)
  records, rejects = read_both(path)
  assert list(records) == ['s/d']
  assert sorted(rejects) == [
    ('s/a', 'not a plain file'),
    ('s/b', 'not a plain file'),
    ('s/c', 'not a plain file'),
    ('s/d', 'name used twice'),
    ('s/e', 'not a plain file'),
  ]


def test_two_archives_in_one_file(tmp_path):
  write_tar(tmp_path / 'a.tar', PAIR)
  write_tar(tmp_path / 'b.tar', LAST | PAIR)
  both = [(tmp_path / f'{name}.tar').read_bytes() for name in 'ab']
  (tmp_path / 's.tar').write_bytes(b''.join(both))
  records, rejects = read_both(tmp_path / 's.tar')
  assert list(records) == ['s/a', 's/z']
  assert rejects == [('s/a', 'name used twice')] * 2


def test_names_that_are_not_utf8(tmp_path):
  path = tmp_path / os.fsdecode(b's\xe9.tar')
  with tarfile.open(
    path, 'w', format=tarfile.GNU_FORMAT, encoding='latin-1'
  ) as tar:
    for name, data in {
      'café.jpg': JPEG,
      'café.txt': TEXT,
      'é.jpg': b'',
    }.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  records, rejects = read_both(path)
  assert list(records) == [r's\xe9/caf\xe9']
  assert rejects == [(r's\xe9/\xe9', 'image without caption')]
  prepare_data.prepare(str(path), str(tmp_path / 'out'))
  tar_index.write_index([str(path)], str(tmp_path / 'index'), 0.0)
  for opener, name in ((sources, 'out'), (tar_index, 'index')):
    record = opener.open_source(str(tmp_path / name), 'train')[0]
    assert record['image'] == JPEG
    assert record['key'].encode().startswith(rb's\xe9')
    text = (tmp_path / name / 'rejects.jsonl').read_text()
    assert json.loads(text)['key'] == r's\xe9/\xe9'


def make_records(rng):
  """A tar of few names, damaged or not."""
  names = ['a', 'b', 'a.in', 'a.out', 'b.in', '._a', 'd/a']
  suffixes = ['jpg', 'png', 'txt', 'json']
  parts = [
    header(f'{rng.choice(names)}.{rng.choice(suffixes)}'.encode(), 3)
    + padded(b'123')
    for _ in range(rng.integers(1, 12))
  ]
  data = b''.join(parts) + END
  return fuzzing.damage(data, rng) if rng.random() < 0.5 else data


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_streams_and_indices_agree_on_any_tar(tmp_path, count):
  path = tmp_path / 's.tar'

  def compare(data):
    path.write_bytes(data)
    try:
      read_both(path)
    except tar_members.CompressedTar:
      pass

  fuzzing.check(compare, make_records, count, refuses=())


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
  tar_index.open_source(index, 'train')  # Checked already.
  tar_index._parse_and_check.cache_clear()
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


@pytest.mark.parametrize('junk', [b'', b'junk', b'\xff', b'[]', b'{"tars": 3}'])
def test_a_damaged_index_is_named(index, tmp_path, junk):
  directory = tmp_path / 'index'
  table = np.load(directory / 'train.npy')
  table['tar'][1] = 9
  np.save(directory / 'train.npy', table)
  source = tar_index.open_source(index, 'train')
  source[0]
  with pytest.raises(BadRecord, match='damaged index'):
    source[1]
  whole = (directory / 'train.npy').read_bytes()
  for damaged in (junk, whole[:-1], whole[:100]):
    (directory / 'train.npy').write_bytes(damaged)
    with pytest.raises(ValueError, match='train.npy in .* is damaged: remove'):
      tar_index.open_source(index, 'train')
  (directory / 'index.json').write_bytes(junk)
  with pytest.raises(ValueError, match='index.json is damaged: remove .*index'):
    tar_index.open_source(index, 'train')


def test_indices_of_older_versions_are_read(index, tmp_path):
  """Their tables have two bytes for the size of a caption."""
  path = tmp_path / 'index' / 'train.npy'
  source = tar_index.open_source(index, 'train')
  records = [source[i] for i in range(len(source))]
  old = np.dtype(
    [
      (name, '<u2' if name == 'caption_size' else kind)
      for name, kind in tar_index._ROW.descr
    ]
  )
  assert old.itemsize == 19
  np.save(path, np.load(path).astype(old))
  source = tar_index.open_source(index, 'train')
  assert [source[i] for i in range(len(source))] == records


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
