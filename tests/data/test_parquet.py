"""Parquet files of img2dataset and Hugging Face."""

import sys

import pyarrow
from pyarrow import parquet as pyarrow_parquet
import pytest

from mdm_jax.data import inputs, tars
from mdm_jax.data.parquet import ParquetPart
from tests import fuzzing
from tests.tools.test_prepare_data import image_file

JPEG = image_file()


def write(path, columns, rows_of_a_group=3):
  table = pyarrow.table(columns)
  pyarrow_parquet.write_table(table, path, row_group_size=rows_of_a_group)


def read(path, caption_column=''):
  rejects = []
  part = ParquetPart(str(path), 'p', caption_column)
  found = {key: texts for key, image, texts in part.read(rejects)}
  return found, [(bad.key, bad.reason) for bad in rejects]


def test_hugging_face(tmp_path, monkeypatch):
  images = [{'bytes': JPEG, 'path': f'{i}.jpg'} for i in range(7)]
  images[1] = {'bytes': None, 'path': '/etc/passwd'}
  images[2] = None
  images[5] = {'bytes': JPEG + b'\0' * 9, 'path': None}
  texts = [['one', 'two'], ['a'], ['b'], [], None, ['c'], ['last']]
  write(tmp_path / 'a.parquet', {'image': images, 'text': texts})
  monkeypatch.setattr(tars, 'MAX_FILE', len(JPEG))
  assert read(tmp_path / 'a.parquet') == (
    {'p/0': ['one', 'two'], 'p/6': ['last']},
    [
      ('p/1', 'caption without image'),
      ('p/2', 'caption without image'),
      ('p/3', 'no caption'),
      ('p/4', 'empty caption'),
      ('p/5', 'file too large'),
    ],
  )


def test_img2dataset(tmp_path):
  columns = {
    'webp': [JPEG, None, JPEG, JPEG],
    'caption': ['a', 'b', 'c', 'd'],
    'key': ['000', '001', '000', '003'],
    'url': ['x'] * 4,
    'status': ['success', 'failed_to_download', 'success', 'success'],
  }
  write(tmp_path / 'a.parquet', columns)
  found = {'p/000': ['a'], 'p/003': ['d']}
  rejects = [
    ('p/001', 'caption without image'),
    ('p/000', 'name used twice'),
  ]
  assert read(tmp_path / 'a.parquet') == (found, rejects)
  assert read(tmp_path / 'a.parquet', 'url')[0]['p/003'] == ['x']


def test_text_that_is_no_utf8_costs_one_row(tmp_path):
  data = pyarrow.array([b'good', b'bad \xff', b'good'])
  texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, data.buffers())
  write(tmp_path / 'a.parquet', {'image': [JPEG] * 3, 'text': texts})
  assert read(tmp_path / 'a.parquet') == (
    {'p/0': ['good'], 'p/2': ['good']},
    [('p/1', 'unreadable row')],
  )


@pytest.mark.parametrize(
  'columns, caption_column, problem',
  [
    (
      {'url': ['a'], 'caption': ['b']},
      '',
      r'none of the columns .url, caption. are called image',
    ),
    (
      {'image': [b''], 'label': [1]},
      '',
      r'none of the columns .image, label. is called text',
    ),
    (
      {'image': [b''], 'text': ['a']},
      'x',
      r'caption_column=x is none of the columns .image, text.',
    ),
  ],
)
def test_missing_columns_are_told_first(
  columns, caption_column, problem, tmp_path
):
  write(tmp_path / 'a.parquet', columns)
  with pytest.raises(ValueError, match=f'a.parquet: .*{problem}'):
    inputs.find([str(tmp_path)], caption_column)


def test_columns_of_one_name_are_an_error(tmp_path):
  for name in ('image', 'text', 'key'):
    columns = [('image', [JPEG]), ('text', ['a']), ('key', ['k'])]
    columns += [column for column in columns if column[0] == name]
    names, values = zip(*columns)
    arrays = list(map(pyarrow.array, values))
    table = pyarrow.Table.from_arrays(arrays, names)
    pyarrow_parquet.write_table(table, tmp_path / f'{name}.parquet')
  for name, problem in (('image', 'several'), ('text', 'two columns')):
    with pytest.raises(ValueError, match=problem):
      inputs.find([str(tmp_path / f'{name}.parquet')])
  # The number of the row will do.
  assert read(tmp_path / 'key.parquet') == ({'p/0': ['a']}, [])


def test_damage_costs_a_row_group(tmp_path):
  path = tmp_path / 'a.parquet'
  columns = {'image': [JPEG] * 9, 'text': ['a'] * 9}
  pyarrow_parquet.write_table(
    pyarrow.table(columns), path, row_group_size=3, use_dictionary=False
  )
  found = pyarrow_parquet.read_metadata(path)
  offset = found.row_group(1).column(0).data_page_offset
  data = bytearray(path.read_bytes())
  data[offset : offset + 40] = b'\xff' * 40
  path.write_bytes(data)
  good, rejects = read(path)
  assert list(good) == [f'p/{i}' for i in (0, 1, 2, 6, 7, 8)]
  assert rejects == [(str(path), 'damaged Parquet file')]
  path.write_bytes(data[:99])
  assert read(path) == ({}, [(str(path), 'unreadable Parquet file')])
  # Found to be damaged where it is read, as tars are.
  assert inputs.find([str(path)]) == [ParquetPart(str(path), 'a')]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / 'a.parquet').touch()
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ValueError, match='pip install pyarrow') as error:
    inputs.find([str(tmp_path)])
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_file_is_read_or_rejected(count, tmp_path):
  path = tmp_path / 'a.parquet'
  images = [{'bytes': JPEG, 'path': 'a'}] * 6
  texts, keys = [f'text {i}' for i in range(6)], list('abcdef')
  write(path, {'image': images, 'text': texts, 'key': keys})
  data = path.read_bytes()
  assert len(read(path)[0]) == 6

  def check(data):
    path.write_bytes(data)
    ParquetPart(str(path), 'p').check()
    read(path)

  fuzzing.check(
    check,
    lambda rng: fuzzing.damage(data, rng),
    count,
    refuses=ValueError,
    megabytes=1024,
  )
