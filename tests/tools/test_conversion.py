"""Every form of input becomes the same data set, also after interruptions."""

import csv
import json

import pyarrow
from pyarrow import parquet
import pytest

from mdm_jax.data import inputs
from mdm_jax.runtime import files
from mdm_jax.tools import conversion, prepare_data
from mdm_jax.tools.conversion import Options, prepare
from tests import commands
from tests.data.test_folders import write
from tests.tools.test_prepare_data import (
  contents,
  fail_on,
  image_file,
  read_all,
  read_rejects,
  write_tar,
)

COUNT = 12
IMAGES = [image_file(color=(20 * i, 0, 0)) for i in range(COUNT)]
CAPTIONS = [f'picture {i}, "quoted",\nof two lines' for i in range(COUNT)]
EXPECTED = {
  f'{i:03}': (IMAGES[i], f'picture {i}, "quoted", of two lines')
  for i in range(COUNT)
}


def make_folder(folder):
  write(folder, {f'{i:03}.jpg': IMAGES[i] for i in range(COUNT)})
  write(folder, {f'{i:03}.txt': CAPTIONS[i] for i in range(COUNT)})


def make_csv(folder):
  write(folder, {f'{i:03}.jpg': IMAGES[i] for i in range(COUNT)})
  with open(folder / 'metadata.csv', 'w', newline='') as file:
    rows = [(f'{i:03}.jpg', CAPTIONS[i]) for i in range(COUNT)]
    csv.writer(file).writerows([('file_name', 'text'), *rows])


def make_json_lines(folder):
  write(folder, {f'{i:03}.jpg': IMAGES[i] for i in range(COUNT)})
  rows = [
    {'file_name': f'{i:03}.jpg', 'text': CAPTIONS[i]} for i in range(COUNT)
  ]
  write(folder, {'metadata.jsonl': '\n'.join(map(json.dumps, rows))})


def make_tar(folder):
  folder.mkdir()
  images = {f'{i:03}.jpg': IMAGES[i] for i in range(COUNT)}
  texts = {f'{i:03}.txt': CAPTIONS[i].encode() for i in range(COUNT)}
  write_tar(folder / 'f.tar', images | texts)


def make_hugging_face(folder):
  folder.mkdir()
  images = [{'bytes': image, 'path': None} for image in IMAGES]
  table = pyarrow.table({'image': images, 'text': CAPTIONS})
  parquet.write_table(table, folder / 'f.parquet', row_group_size=5)


def make_img2dataset(folder):
  folder.mkdir()
  keys = [f'{i:03}' for i in range(COUNT)]
  table = pyarrow.table({'jpg': IMAGES, 'caption': CAPTIONS, 'key': keys})
  parquet.write_table(table, folder / 'f.parquet', row_group_size=5)


@pytest.mark.parametrize(
  'make, counts',
  [
    (make_folder, {'folders': 1}),
    (make_csv, {'folders': 1}),
    (make_json_lines, {'folders': 1}),
    (make_tar, {'tars': 1}),
    (make_hugging_face, {'Parquet files': 1}),
    (make_img2dataset, {'Parquet files': 1}),
  ],
)
def test_all_forms_make_the_same(tmp_path, make, counts):
  make(tmp_path / 'f')
  options = Options(validation_fraction=0)
  summary = prepare(f'{tmp_path}/f', f'{tmp_path}/out', options)
  assert summary == counts | {'records': {'train': COUNT}, 'rejected': {}}
  found = {
    key.rpartition('/')[2].zfill(3): (record['image'], record['caption'])
    for key, record in read_all(tmp_path / 'out').items()
  }
  assert found == EXPECTED and list(found) == sorted(EXPECTED)


def make_several_parts(folder, monkeypatch):
  """A folder of three parts, one of whose images is bad."""
  monkeypatch.setattr(inputs, '_ENTRIES', 5)
  make_json_lines(folder)
  write(folder, {'007.jpg': 'no image'})
  return Options(validation_fraction=0.4)


def test_a_folder_is_continued(tmp_path, monkeypatch):
  options = make_several_parts(tmp_path / 'f', monkeypatch)
  whole, output = tmp_path / 'whole', tmp_path / 'out'
  prepare(f'{tmp_path}/f', str(whole), options)
  assert [row['key'] for row in read_rejects(whole)] == ['f/007']
  with monkeypatch.context() as patch:
    patch.setattr(files, 'write_text', fail_on('000002.json'))
    with pytest.raises(KeyboardInterrupt):
      prepare(f'{tmp_path}/f', str(output), options)
  converted, convert = [], conversion._convert
  monkeypatch.setattr(
    conversion,
    '_convert',
    lambda options, job: converted.append(job[1].name) or convert(options, job),
  )
  # Not with other files.
  (tmp_path / 'f' / '003.jpg').rename(tmp_path / '003.jpg')
  (tmp_path / 'f' / 'extra.jpg').write_bytes(b'')
  with pytest.raises(ValueError, match='begun with other input: remove it, or'):
    prepare(f'{tmp_path}/f', str(output), options)
  (tmp_path / 'f' / 'extra.jpg').unlink()
  (tmp_path / '003.jpg').rename(tmp_path / 'f' / '003.jpg')
  prepare(f'{tmp_path}/f', str(output), options)
  assert converted == ['000002.json']
  assert contents(output) == contents(whole)


def test_the_output_may_be_in_the_folder(tmp_path):
  make_folder(tmp_path / 'f')
  for part in ('0/2', '1/2', '0/1'):
    summary = prepare(
      f'{tmp_path}/f', f'{tmp_path}/f/out', Options(), part=part
    )
  assert sum(summary['records'].values()) == COUNT
  assert summary['rejected'] == {}


def test_processes_and_machines_share_a_folder(tmp_path, monkeypatch):
  options = make_several_parts(tmp_path / 'f', monkeypatch)
  for name, workers, parts in (
    ('one', 1, ['0/1']),
    ('two', 2, ['0/1']),
    ('hosts', 1, ['1/2', '0/2', '0/1']),
  ):
    for part in parts:
      prepare(f'{tmp_path}/f', f'{tmp_path}/{name}', options, workers, part)
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
  assert contents(tmp_path / 'one') == contents(tmp_path / 'hosts')


def test_the_splits_of_a_folder_are_kept(tmp_path):
  for split, numbers in (('train', range(8)), ('test', range(8, 12))):
    names = {f'{split}/{i}.jpg': IMAGES[i] for i in numbers}
    write(tmp_path / 'f', names)
    write(tmp_path / 'f', {f'{split}/{i}.txt': 'a' for i in numbers})
  options = Options(validation_fraction=0.9)
  summary = prepare(f'{tmp_path}/f', f'{tmp_path}/out', options)
  assert summary['records'] == {'train': 8, 'validation': 4}
  found = read_all(tmp_path / 'out', 'validation')
  assert sorted(found) == [f'f/test/{i}' for i in (10, 11, 8, 9)]


def test_what_an_older_version_began_is_continued(tmp_path, monkeypatch):
  make_tar(tmp_path / 'f')
  output, options = tmp_path / 'out', Options(validation_fraction=0)
  with monkeypatch.context() as patch:
    patch.setattr(files, 'write_text', fail_on('000000.json'))
    with pytest.raises(KeyboardInterrupt):
      prepare(f'{tmp_path}/f/*.tar', str(output), options)
  begun = tmp_path / 'out.incomplete' / 'options.json'
  settings = json.loads(begun.read_text())
  del settings['caption_column']
  settings['tars'] = settings.pop('input')
  assert settings['tars'] == [f'{tmp_path}/f/f.tar']
  begun.write_text(json.dumps(settings | {'tars': ['other.tar']}))
  with pytest.raises(ValueError, match='begun with other input'):
    prepare(f'{tmp_path}/f/*.tar', str(output), options)
  begun.write_text(json.dumps(settings))
  prepare(f'{tmp_path}/f/*.tar', str(output), options)
  assert len(read_all(output)) == COUNT


@pytest.mark.parametrize('make', [make_csv, make_hugging_face])
def test_the_command_says_what_comes_next(tmp_path, make):
  make(tmp_path / 'f')
  write(tmp_path / 'f', {'extra.jpg': b''} if make is make_csv else {})
  output = f'{tmp_path}/my data'
  done = commands.run(
    'mdm_jax.tools.prepare_data',
    f'--input={tmp_path}/f',
    f'--output={output}',
    '--caption_column=text',
    '--validation_fraction=0',
  )
  assert done.returncode == 0, done.stderr
  train = 'python -m mdm_jax.main --config=configs/captioned_images.py'
  path = f"--config.data.path='{output}'"
  skipped = [
    '  skipped, image without caption: 1',
    f'  (details: {output}/rejects.jsonl)',
  ]
  form = '1 folder' if make is make_csv else '1 Parquet file'
  assert done.stdout.splitlines() == [
    f'{form} -> {output}',
    '  train: 12',
    '  validation: 0 (no validation split: losses will be those of training '
    'images)',
    *(skipped if make is make_csv else []),
    'Next, train a small model that memorizes these images, to see that they '
    'are read correctly:',
    f'  {train}:memorize {path}',
    'Then train at full size:',
    f'  {train} {path}',
  ]
  unit = {make_csv: 'image folder part', make_hugging_face: 'Parquet file'}
  assert f' {unit[make]}' in done.stderr


def test_many_images_are_not_memorized():
  summary = {'tars': 2, 'records': {'train': 50, 'validation': 1}}
  text = prepare_data.describe(summary | {'rejected': {}}, 'data/mine')
  assert text.splitlines() == [
    '2 tars -> data/mine',
    '  train: 50',
    '  validation: 1',
    'Next, train:',
    '  python -m mdm_jax.main --config=configs/captioned_images.py '
    '--config.data.path=data/mine',
  ]


def test_mistakes_are_one_line(tmp_path):
  (tmp_path / 'f').mkdir()
  done = commands.run(
    'mdm_jax.tools.prepare_data',
    f'--input={tmp_path}/f',
    f'--output={tmp_path}/out',
  )
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.splitlines() == [
    f'error: --input={tmp_path}/f holds no files: give a folder with images '
    'and their captions, with tars, or with Parquet files.'
  ]
