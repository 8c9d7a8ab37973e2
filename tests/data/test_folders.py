"""Folders of images: each image has a caption, or is named."""

import json
import os

import pytest

from mdm_jax.data import folders, images, inputs, tars
from tests import fuzzing
from tests.tools.test_prepare_data import image_file

JPEG = image_file()


def write(folder, files):
  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def read(*given, caption_column=''):
  """Key -> captions, and the keys and reasons of rejects."""
  found, rejects = {}, []
  for part in inputs.find(list(map(str, given)), caption_column):
    for key, image, texts in inputs.read(part, rejects):
      assert image == JPEG and key not in found
      found[key] = texts
  return found, [(bad.key, bad.reason) for bad in rejects]


def test_captions_beside_images(tmp_path):
  folder = tmp_path / 'my [photos]'
  write(
    folder,
    {
      'a.JPG': JPEG,
      'a.txt': ' two \n lines',
      'sub/1.5 m.png': JPEG,
      'sub/1.5 m.txt': 'sub',
      'b.gif': JPEG,
      'b.json': '{"caption": ["one", "two"]}',
      'c.bmp': JPEG,
      'c.txt': 'text',
      'c.json': '{"caption": "json"}',
      'd.jpg': JPEG,
      'e.txt': 'no image',
      'f.jpg': JPEG,
      'f.txt': b'\xff',
      'g.jpg': JPEG,
      'g.png': JPEG,
      'g.txt': 'g',
      'h.heic': b'',
      'h.txt': 'h',
      '._a.jpg': b'',
      '.cache/x.jpg': JPEG,
      '__MACOSX/a.jpg': b'',
      'notes.md': b'',
      '00000_stats.json': '{}',
    },
  )
  found, rejects = read(folder)
  assert found == {
    'my [photos]/a': ['two lines'],
    'my [photos]/b': ['one', 'two'],
    'my [photos]/c': ['text'],
    'my [photos]/g': ['g'],
    'my [photos]/sub/1.5 m': ['sub'],
  }
  assert list(found) == sorted(found)
  assert rejects == [
    ('my [photos]/d', 'image without caption'),
    ('my [photos]/e', 'caption without image'),
    ('my [photos]/f', 'unreadable caption'),
    ('my [photos]/h', 'unsupported image format'),
    ('my [photos]/g.png', 'name used twice'),
  ]


def test_all_readable_images_are_found():
  assert {f'.{x}' for x in folders.IMAGE_SUFFIXES} == {*images.SUFFIXES}


ROWS = [
  ('a.jpg', 'a'),
  ('./sub/b.jpg', 'b'),
  ('a.jpg', 'again'),
  ('sub/../a.jpg', 'around'),
  ('../outside.jpg', 'outside'),
  ('/etc/passwd', 'absolute'),
  ('missing.jpg', 'missing'),
  ('a.png', 'the same stem'),
  ('empty.jpg', '  '),
  ('', 'no name'),
  ('sub', 'a folder'),
]


@pytest.mark.parametrize('suffix', ['csv', 'jsonl'])
def test_captions_in_a_table(tmp_path, suffix):
  folder = tmp_path / 'f'
  if suffix == 'csv':
    lines = ['file_name,caption', *(f'{name},"{text}"' for name, text in ROWS)]
  else:
    lines = [json.dumps({'file_name': n, 'caption': text}) for n, text in ROWS]
  names = ('a.jpg', 'sub/b.jpg', 'a.png', 'empty.jpg', 'sub/unlisted.jpg')
  write(folder, {name: JPEG for name in names})
  # Not used where there is a table.
  write(folder, {'a.txt': 'beside', f'metadata.{suffix}': '\n'.join(lines)})
  write(tmp_path, {'outside.jpg': JPEG})
  found, rejects = read(folder)
  assert found == {
    'f/a': ['a'],
    'f/sub/b': ['b'],
    'f/a.png': ['the same stem'],
  }
  line = 3 if suffix == 'csv' else 2
  assert sorted(rejects) == sorted([
      (f'f/metadata.{suffix}:{1 + line}', 'name used twice'),
      (f'f/metadata.{suffix}:{2 + line}', 'file outside of the folder'),
      (f'f/metadata.{suffix}:{3 + line}', 'file outside of the folder'),
      (f'f/metadata.{suffix}:{4 + line}', 'file outside of the folder'),
      ('f/missing', 'caption without image'),
      ('f/empty', 'empty caption'),
      (f'f/metadata.{suffix}:{8 + line}', 'no file name'),
      ('f/sub', 'not a plain file'),
      ('f/sub/unlisted.jpg', 'image without caption'),
  ])  # fmt: skip
  # By its name, and with another column.
  path = folder / f'metadata.{suffix}'
  assert read(path) == (found, rejects)
  other = folder / f'other.{suffix}'
  path.rename(other)
  other.write_text(other.read_text().replace('caption', 'was'))
  assert read(other, caption_column='was')[0] == found


def test_a_table_is_for_its_folder_and_those_below(tmp_path):
  folder = tmp_path / 'f'
  write(
    folder,
    {
      'one/metadata.csv': 'file_name,text\na.jpg,one\n',
      'one/a.jpg': JPEG,
      'two/metadata.jsonl': '{"file_name": "deep/a.jpg", "text": "two"}',
      'two/deep/a.jpg': JPEG,
      'three/a.jpg': JPEG,
      'three/a.txt': 'three',
    },
  )
  assert read(folder) == (
    {'f/one/a': ['one'], 'f/two/deep/a': ['two'], 'f/three/a': ['three']},
    [],
  )
  # An image has one caption, also if two tables list it.
  write(
    folder, {'metadata.csv': 'file_name,text\none/a.jpg,x\nthree/a.jpg,y\n'}
  )
  write(folder, {'one/metadata.csv': 'file_name,text\na.jpg,one\na.png,z\n'})
  write(folder, {'one/a.png': JPEG})
  found, rejects = read(folder)
  assert found == {
    'f/one/a': ['x'],
    'f/three/a': ['y'],
    'f/one/a.png': ['z'],
    'f/two/deep/a': ['two'],
  }
  assert rejects == [('f/one/metadata.csv:2', 'name used twice')]


@pytest.mark.parametrize('kind', ['beside', 'by table above', 'by tables'])
def test_splits_of_an_imagefolder(tmp_path, kind):
  folder, names = tmp_path / 'f', ('train/a', 'val/b', 'test/c', 'other/d')
  write(folder, {f'{name}.jpg': JPEG for name in names})
  if kind == 'beside':
    write(folder, {f'{name}.txt': name for name in names})
  elif kind == 'by table above':
    rows = [f'{name}.jpg,{name}\n' for name in names]
    write(folder, {'metadata.csv': 'file_name,text\n' + ''.join(rows)})
  else:
    for name in names:
      table, base = os.path.split(name)
      data = f'file_name,text\n{base}.jpg,{name}\n'
      write(folder, {f'{table}/metadata.csv': data})

  def splits():
    rejects = []
    found = {
      key: part.split
      for part in inputs.find([str(folder)])
      for key, _, _ in inputs.read(part, rejects)
    }
    return found, [(bad.key, bad.reason) for bad in rejects]

  train = {'f/train/a': 'train', 'f/other/d': 'train'}
  assert splits() == (
    train | {'f/val/b': 'validation'},
    [('f/test/c', 'image of the test split')],
  )
  if kind == 'beside':
    # Without a validation split the test split is held out.
    (folder / 'val/b.jpg').unlink()
    (folder / 'val/b.txt').unlink()
    assert splits() == (train | {'f/test/c': 'validation'}, [])
    (folder / 'test').rename(folder / 'trains')
    assert {*splits()[0].values()} == {None}


def test_links_are_followed_and_pipes_are_not_opened(tmp_path):
  write(tmp_path, {'blobs/1': JPEG, 'blobs/2': 'a caption'})
  folder = tmp_path / 'f'
  folder.mkdir()
  for name, target in (
    ('a.jpg', '../blobs/1'),
    ('a.txt', '../blobs/2'),
    ('b.jpg', '../blobs/none'),
    ('circle', '.'),
  ):
    (folder / name).symlink_to(target)
  write(folder, {'b.txt': 'b', 'c.txt': 'c'})
  os.mkfifo(folder / 'c.jpg')
  assert read(folder) == (
    {'f/a': ['a caption']},
    [('f/b', 'caption without image'), ('f/c', 'not a plain file')],
  )


def test_large_files_and_unreadable_ones_are_named(tmp_path, monkeypatch):
  folder = tmp_path / 'f'
  write(folder, {'a.jpg': JPEG, 'a.txt': 'a', 'b.jpg': JPEG, 'b.txt': 'b' * 99})
  monkeypatch.setattr(tars, 'MAX_CAPTION', 98)
  assert read(folder) == ({'f/a': ['a']}, [('f/b', 'file too large')])
  monkeypatch.setattr(tars, 'MAX_FILE', len(JPEG) - 1)
  assert read(folder)[1] == [
    ('f/a', 'file too large'),
    ('f/b', 'file too large'),
  ]
  monkeypatch.undo()
  (part,) = inputs.find([str(folder)])
  (folder / 'a.txt').unlink()
  (folder / 'a.txt').symlink_to('a.txt')  # ELOOP
  rejects = []
  assert [key for key, _, _ in part.read(rejects)] == ['f/b']
  assert [bad.reason for bad in rejects] == ['unreadable file']


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_file_name_stays_in_the_folder(count, tmp_path):
  write(tmp_path / 'f', {'a.jpg': JPEG, 'b/c.jpg': JPEG})
  table = tmp_path / 'f' / 'metadata.jsonl'
  pieces = ('..', '/', '.', 'a.jpg', 'b', '\\', '\0', '\ud800', ' ', 'é' * 300)

  def make(rng):
    names = [
      ''.join(rng.choice(pieces, rng.integers(1, 6)).tolist()) for _ in range(9)
    ]
    rows = [{'file_name': name, 'text': 'a'} for name in [*names, 'b/c.jpg']]
    return '\n'.join(fuzzing.damage_json(row, rng) for row in rows)

  def check(text):
    table.write_bytes(text.encode('utf-8', 'replace'))
    for part in inputs.find([str(tmp_path / 'f')]):
      for entry in part.entries:
        if isinstance(entry, folders.Entry):
          assert '..' not in entry.image.split('/')
          assert not os.path.isabs(entry.image)
      for key, _, _ in part.read([]):
        key.encode()

  fuzzing.check(check, make, count, refuses=ValueError)
