"""Inputs of prepare_data: what they are, or one line that tells why not."""

import re

import pytest

from mdm_jax.data import folders, inputs, parquet
from mdm_jax.data.inputs import TarPart
from tests.data.test_folders import JPEG, write
from tests.tools.test_prepare_data import good_files, write_tar


def test_what_img2dataset_writes_beside_tars_is_left_alone(tmp_path):
  for i in range(2):
    write_tar(tmp_path / f'0000{i}.tar', good_files(1))
    write(tmp_path, {f'0000{i}.parquet': 'no Parquet'})
    write(tmp_path, {f'0000{i}_stats.json': '{}', 'README.md': 'words'})
  tars = [TarPart(f'{tmp_path}/0000{i}.tar') for i in range(2)]
  assert inputs.find([str(tmp_path)]) == tars
  assert inputs.find([f'{tmp_path}/*.tar']) == tars
  assert inputs.find([f'{tmp_path}/0*']) == tars
  # The same for its folders of images.
  files = {'00000/0.jpg': JPEG, '00000/0.txt': 'a', '00000.parquet': ''}
  write(tmp_path / 'files', files)
  (part,) = inputs.find([f'{tmp_path}/files'])
  assert part.entries == (
    folders.Entry('files/00000/0', '00000/0.jpg', '00000/0.txt'),
  )


def test_files_have_splits(tmp_path):
  names = ('train-00000-of-00001', 'validation-00000-of-00001', 'trainer')
  for name in names:
    write_tar(tmp_path / f'{name}.tar', good_files(1))
  assert [
    (part.path.rpartition('/')[2], part.split)
    for part in inputs.find([str(tmp_path)])
  ] == [
    (f'{name}.tar', split)
    for name, split in (
      (names[0], 'train'),
      (names[2], 'train'),
      (names[1], 'validation'),
    )
  ]
  # A glob says which files are meant, not what for.
  assert {part.split for part in inputs.find([f'{tmp_path}/*.tar'])} == {None}
  write_tar(tmp_path / 'test.tar', good_files(1))
  part = inputs.find([str(tmp_path)])[0]
  assert (part.path, part.split) == (f'{tmp_path}/test.tar', 'test')
  rejects = []
  assert list(inputs.read(part, rejects)) == []
  assert [bad.reason for bad in rejects] == ['file of the test split']


def test_folders_and_files_are_joined(tmp_path):
  write(tmp_path / 'photos', {'a.jpg': JPEG, 'a.txt': 'a'})
  write(tmp_path, {'b.parquet': ''})
  write_tar(tmp_path / 'c.tar', good_files(1))
  parts = inputs.find([f'{tmp_path}/*'])
  assert [type(part) for part in parts] == [
    folders.FolderPart,
    parquet.ParquetPart,
    TarPart,
  ]
  assert inputs.count(parts) == {'tars': 1, 'folders': 1, 'Parquet files': 1}
  assert inputs.unit(parts) == ' input'
  assert inputs.unit(parts[:1]) == ' image folder part'
  assert inputs.unit(parts[2:]) == ' tar'


def test_a_large_folder_has_several_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, '_ENTRIES', 3)
  write(tmp_path / 'f', {f'{i}.txt': 'a' for i in range(8)})
  write(tmp_path / 'f', {f'{i}.jpg': JPEG for i in range(7)})
  parts = inputs.find([f'{tmp_path}/f'])
  assert [len(part.entries) for part in parts] == [3, 3, 2]
  assert inputs.count(parts) == {'folders': 1}
  before = [part.identity() for part in parts]
  assert len({*before}) == 3
  assert before == [p.identity() for p in inputs.find([f'{tmp_path}/f'])]
  (tmp_path / 'f' / '7.jpg').write_bytes(JPEG)
  after = [part.identity() for part in inputs.find([f'{tmp_path}/f'])]
  assert before[:2] == after[:2] and before[2] != after[2]


@pytest.mark.parametrize(
  'names, given, problem',
  [
    ((), 'f', 'f holds no files: give a folder with images and their captions'),
    (
      ('a.mp4', 'b.mp4', 'c.zip', 'd'),
      'f',
      'f holds 2 .mp4, 1 .zip, 1 without a suffix: give a folder with images',
    ),
    (
      ('a.jpg', 'b.jpg'),
      'f',
      'f holds no image with a caption (image without caption: 2; the first '
      'is f/a). A caption is a file beside its image, a.jpg and a.txt, or a',
    ),
    (
      ('a.jpg', 'words.csv'),
      'f',
      'first is f/a). If words.csv is a table of captions, name it: --input=',
    ),
    (
      ('a.jpg', 'a.txt', 'x.tar', 'x.parquet'),
      'f',
      'f holds 1 tar, 1 image: choose by a glob in quotes, such as --input=',
    ),
    (
      ('a.jpg', 'a.txt', 'x.parquet'),
      'f',
      'f holds 1 Parquet file, 1 image: choose',
    ),
    (
      ('a.jpg', 'a.txt', 'b.jpg'),
      'f/*',
      'f/* matches 2 images, 1 .txt: name the folder instead, --input=',
    ),
    (('a.jpg', 'a.txt'), 'g', 'g does not exist.'),
    (
      ('a.jpg', 'x/metadata.csv', 'x/metadata.jsonl'),
      'f',
      'f has x/metadata.csv and x/metadata.jsonl: remove one, or name',
    ),
    (('a.tar', 'sub/a.tar'), 'f', 'would give their records the same keys'),
  ],
)
def test_what_is_not_clear_is_one_line(tmp_path, names, given, problem):
  (tmp_path / 'f').mkdir()
  write(tmp_path / 'f', {name: 'a' for name in names})
  with pytest.raises(ValueError, match=re.escape(problem)) as error:
    inputs.find([f'{tmp_path}/{given}'])
  assert '\n' not in str(error.value)


def test_an_input_is_given_once(tmp_path):
  write(tmp_path / 'f', {'a.jpg': JPEG, 'a.txt': 'a'})
  write(tmp_path / 'g/f', {'a.jpg': JPEG, 'a.txt': 'a'})
  with pytest.raises(ValueError, match='f is given twice'):
    inputs.find([f'{tmp_path}/f', f'{tmp_path}/f'])
  with pytest.raises(ValueError, match='g/f would give .* same keys: rename'):
    inputs.find([f'{tmp_path}/f', f'{tmp_path}/g/f'])


def test_captions_beside_images_have_no_columns(tmp_path):
  (tmp_path / 'tars').mkdir()
  write_tar(tmp_path / 'tars' / 'a.tar', good_files(1))
  write(tmp_path / 'images', {'a.jpg': JPEG, 'a.txt': 'a'})
  for name in ('tars', 'images'):
    with pytest.raises(ValueError, match='caption_column=x: there are no col'):
      inputs.find([f'{tmp_path}/{name}'], 'x')
  # Some have.
  write(
    tmp_path / 'table', {'a.jpg': JPEG, 'metadata.csv': 'file_name,x\na.jpg,a'}
  )
  assert len(inputs.find([f'{tmp_path}/table', f'{tmp_path}/tars'], 'x')) == 2
