"""Tables of captions: every row is read or named."""

import json

import pytest

from mdm_jax.data import tables
from mdm_jax.data.images import BadRecord
from tests import fuzzing


def read(path, wanted=''):
  """The good rows, and the keys, reasons and details of the bad ones."""
  good, bad = [], []
  for row in tables.read(str(path), 'k', wanted):
    if isinstance(row, BadRecord):
      bad.append((row.key, row.reason, row.detail))
    else:
      good.append(row)
  return good, bad


def test_csv(tmp_path):
  path = tmp_path / 'metadata.csv'
  path.write_bytes(
    b'\xef\xbb\xbffile_name, text,n\r\n'
    b'a.jpg,"one, ""two""\nand three",1\r\n'
    b'\r\n'
    b'b.jpg,"",2\r\n'
    b'c.jpg,without quotes, and a comma,3\r\n'
    b'd.jpg\r\n'
    b'e.jpg,"quoted" and not,5\r\n'
    b'caf\xe9.jpg,caf\xe9,6\r\n'
    b'g.jpg,5" nails,7'
  )
  good, bad = read(path)
  assert good == [
    ('k:2', 'a.jpg', b'one, "two"\nand three'),
    ('k:5', 'b.jpg', b''),
    ('k:9', 'caf\udce9.jpg', b'caf\xe9'),
    ('k:10', 'g.jpg', b'5" nails'),
  ]
  assert [row[:2] for row in bad] == [
    (f'k:{line}', 'unreadable row') for line in (6, 7, 8)
  ]
  assert bad[0][2] == (
    '4 fields, the first line has 3: a text with commas needs quotes'
  )


def test_a_quote_without_end_is_named_with_the_lines_it_costs(tmp_path):
  path = tmp_path / 'metadata.csv'
  lines = ['file_name,text', 'a.jpg,a', 'b.jpg,"b', 'c.jpg,c', 'd.jpg,d']
  path.write_text('\n'.join(lines))
  good, bad = read(path)
  assert good == [('k:2', 'a.jpg', b'a')]
  (row,) = bad
  assert row[:2] == ('k:3', 'unreadable row')
  assert row[2].startswith('lines 3 to 5: ')


def test_json_lines(tmp_path):
  path = tmp_path / 'metadata.jsonl'
  rows = [
    {'file_name': 'a.jpg', 'text': 'ä \u2028 b'},
    {'file_name': 'b.jpg', 'text': ['one', 'two']},
    {'file_name': 'c.jpg', 'label': 3},
    {'text': 'no file'},
    {'file_name': 'd.jpg', 'text': 'x' * tables._LONGEST_LINE},
    {'file_name': 'e.jpg', 'text': None},
  ]
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  lines[2:2] = ['', '[1]', '{"file_name": ', '[' * 100_000, '\udcff']
  text = '\ufeff' + '\r\n'.join(lines)
  path.write_bytes(text.encode('utf-8', 'surrogateescape'))
  good, bad = read(path)
  assert good == [
    ('k:1', 'a.jpg', 'ä \u2028 b'),
    ('k:2', 'b.jpg', ['one', 'two']),
    ('k:9', None, 'no file'),
    ('k:11', 'e.jpg', None),
  ]
  assert [row[:2] for row in bad] == [
    *((f'k:{line}', 'unreadable row') for line in (4, 5, 6, 7)),
    ('k:8', 'no caption'),
    ('k:10', 'unreadable row'),
  ]
  assert 'none of the columns (file_name, label) is called text' in bad[4][2]


@pytest.mark.parametrize(
  'columns, wanted, found',
  [
    ('file_name caption', '', 'caption'),
    ('prompt file_name', '', 'prompt'),
    ('file_name text other', 'other', 'other'),
    ('file_name text caption', '', 'text and caption may both be captions'),
    ('file_name text text', '', 'two columns are called text: rename one'),
    ('other file_name other', 'other', 'two columns are called other'),
    (
      'file_name label',
      '',
      r'none of the columns .file_name, label. is called text, caption, cap',
    ),
    (
      'file_name text',
      'tetx',
      r'caption_column=tetx is none of the columns .file_name, text.',
    ),
  ],
)
def test_the_caption_column(columns, wanted, found):
  if found in columns:
    assert tables.caption_column(columns.split(), wanted) == found
    return
  with pytest.raises(ValueError, match=found):
    tables.caption_column(columns.split(), wanted)


@pytest.mark.parametrize(
  'data, problem',
  [
    (b'', 'it is empty'),
    (b'\n\n', 'it is empty'),
    (
      b'a.jpg,a\n',
      r'none of the columns .a.jpg, a. is called file_name. The first',
    ),
    (b'file_name;text\na;b\n', r'columns .file_name;text. is called file_name'),
    (b'file_name\na\n', 'is called text, caption, captions'),
    ('file_name,text\n'.encode('utf-16'), 'UTF-16: save it as UTF-8'),
    (b'"file_name', 'line 1: unexpected end'),
  ],
)
def test_what_is_no_table_is_an_error(data, problem, tmp_path):
  path = tmp_path / 'metadata.csv'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=f'metadata.csv.*{problem}'):
    read(path)


@pytest.mark.parametrize('suffix', ['csv', 'jsonl'])
@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_table_is_read_or_refused(count, suffix, tmp_path):
  path = tmp_path / f'metadata.{suffix}'
  rows = [{'file_name': f'{i}.jpg', 'text': f'a "{i}",\nb é'} for i in range(9)]

  def make(rng):
    if suffix == 'csv':
      quoted = [row['text'].replace('"', '""') for row in rows]
      lines = [f'{i}.jpg,"{text}"' for i, text in enumerate(quoted)]
      return fuzzing.damage(
        '\r\n'.join(['file_name,text', *lines]).encode(), rng
      )
    lines = [fuzzing.damage_json(row, rng) for row in rows]
    return '\n'.join(lines).encode('utf-8', 'replace')

  def check(data):
    path.write_bytes(data)
    for row in tables.read(str(path), 'k'):
      if isinstance(row, BadRecord):
        assert row.key.startswith('k:') and row.reason
      else:
        key, name, _ = row
        assert key.startswith('k:')
        assert suffix == 'jsonl' or isinstance(name, str)

  fuzzing.check(check, make, count, refuses=ValueError)
