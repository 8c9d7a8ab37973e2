"""A directory of samples: existing ones are reused, others are missing."""

import base64
import io
import json
import os
import re

import numpy as np
from PIL import Image
import pytest

from mdm_jax.report.sample_directory import SampleDirectory, finest_images
from tests.runtime.test_files import ODD, UNREADABLE

RECORDS = [
  {'prompt': f'<b>{i}</b> круг', 'seed': i, 'weights': [0.5, 1]}
  for i in range(5)
]


def levels(seed):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.integers(0, 256, (size, size, 3), np.uint8) for size in (4, 8)
  )


def read(path):
  with Image.open(path) as image:
    return np.asarray(image)


def lines(directory):
  return [
    json.loads(line)
    for line in (directory / 'samples.jsonl').read_text().splitlines()
  ]


def first_line(directory):
  return json.loads((directory / 'samples.jsonl').read_text().splitlines()[0])


@pytest.fixture
def stopped(tmp_path):
  """A directory whose process was killed while it wrote the fourth line."""
  samples = SampleDirectory(tmp_path, RECORDS)
  assert samples.missing == [0, 1, 2, 3, 4]
  for i in (0, 2, 1):
    samples.add(i, levels(i), [levels(10), levels(i)] if i == 2 else None)
  with (tmp_path / 'samples.jsonl').open('a') as file:
    file.write('{"index": 3, "promp')
  return tmp_path


def test_an_interrupted_directory_is_continued(stopped):
  samples = SampleDirectory(stopped, RECORDS)
  assert samples.missing == [3, 4]
  for i in (3, 4):
    samples.add(i, levels(i))
  samples.finish({})
  found = lines(stopped)
  assert [line['index'] for line in found] == [0, 1, 2, 3, 4]
  for i, line in enumerate(found):
    assert line.items() >= RECORDS[i].items()
    for size, name in list(line['files'].items())[:2]:
      np.testing.assert_array_equal(
        read(stopped / name), levels(i)[size == '8']
      )
  assert SampleDirectory(stopped, RECORDS).missing == []
  assert list(found[2]['files']) == ['4', '8', 'path']
  with Image.open(stopped / found[2]['files']['path']) as animation:
    assert (animation.n_frames, animation.size) == (2, (16, 8))
  assert read(stopped / 'grid.png').std() > 10


def test_prompts_with_other_line_separators_are_continued(tmp_path):
  records = [{'prompt': 'a\u2028b\x85c\x1dd\r', 'seed': 0}]
  SampleDirectory(tmp_path, records).add(0, levels(0))
  assert SampleDirectory(tmp_path, records).missing == []


def test_lines_that_are_no_records_are_left_out(stopped):
  with (stopped / 'samples.jsonl').open('ab') as file:
    file.write(b'\n[1]\n3\n{}\n{"index": 1, "files": [3]}\n\xff\n{"a": "\xd0')
  assert SampleDirectory(stopped, RECORDS).missing == [3, 4]
  assert [line['index'] for line in lines(stopped)] == [0, 1, 2]


def test_samples_with_another_record_are_replaced(stopped):
  (stopped / '0001_8.png').unlink()
  other = [RECORDS[0] | {'seed': 7}, *RECORDS[1:3]]
  assert SampleDirectory(stopped, other).missing == [0, 1]
  # Samples with another record or without files have no line any more.
  assert [line['index'] for line in lines(stopped)] == [2]


@pytest.mark.parametrize('case', UNREADABLE)
def test_without_readable_lines_all_samples_are_missing(
  stopped, monkeypatch, case
):
  monkeypatch.chdir(stopped)
  path = stopped / 'samples.jsonl'
  path.unlink()
  UNREADABLE[case][0](path)
  samples = SampleDirectory(stopped, RECORDS)
  assert samples.missing == [0, 1, 2, 3, 4]
  samples.add(0, levels(0))
  assert SampleDirectory(stopped, RECORDS).missing == [1, 2, 3, 4]


def test_odd_lines_are_no_samples(stopped):
  path = stopped / 'samples.jsonl'
  good = json.loads(path.read_text().splitlines()[0])
  odd = []
  for value in [
    *map(json.loads, ODD),
    [[]],
    {'4': 1},
    {'4': 'a\0b'},
    {'4': ''},
  ]:
    odd += [good | {'files': value}]
    if value not in ({}, -1):
      odd += [good | {'index': value}, good | {'prompt': value}]
  path.write_text('\n'.join(map(json.dumps, odd)))
  assert SampleDirectory(stopped, RECORDS).missing == [0, 1, 2, 3, 4]


ODD_FILES = {
  'an empty image': lambda path: path.write_bytes(b''),
  'half an image': lambda path: path.write_bytes(path.read_bytes()[:50]),
  'a smaller image': lambda path: Image.new('RGB', (3, 3)).save(path),
  'text': lambda path: path.write_text('no image'),
  'a pipe': lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize('case', ODD_FILES)
def test_samples_whose_images_cannot_be_read_are_replaced(stopped, case):
  ODD_FILES[case](stopped / first_line(stopped)['files']['8'])
  samples = SampleDirectory(stopped, RECORDS)
  assert 0 in samples.missing
  for index in samples.missing:
    samples.add(index, levels(index))
  samples.finish({})


@pytest.mark.parametrize('name', ['a' * 5000, '../../x', 'a\0b'])
@pytest.mark.parametrize('key', ['4', '\N{SUPERSCRIPT TWO}', 'path'])
def test_odd_names_of_files_are_no_samples(stopped, name, key):
  good = first_line(stopped)
  path = stopped / 'samples.jsonl'
  path.write_text(json.dumps(good | {'files': {key: name}}) + '\n')
  with pytest.raises((ValueError, FileNotFoundError)):
    finest_images(stopped)
  assert SampleDirectory(stopped, RECORDS).missing == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('value', ['x', None, [1]])
def test_odd_indices_of_samples_are_damage(stopped, value):
  good = first_line(stopped)
  (stopped / 'samples.jsonl').write_text(
    ''.join(json.dumps(x) + '\n' for x in (good, good | {'index': value}))
  )
  with pytest.raises(ValueError, match='line 2 is damaged'):
    finest_images(stopped)


def test_thousands_of_samples_are_in_subdirectories(tmp_path):
  samples = SampleDirectory(tmp_path, [RECORDS[0]] * 1001)
  samples.add(999, levels(0))
  samples.add(1000, levels(0))
  assert [line['files']['8'] for line in lines(tmp_path)] == [
    '000/000999_8.png',
    '001/001000_8.png',
  ]


def test_the_page_shows_all_samples(stopped):
  records = RECORDS[:3]
  settings = {
    'steps': '5 & 6',
    'name': 'ddim',
    'guidance_interval': [0.0, 1.0],
    'negative_prompt': '',
    'guide': {'stage': '8', 'step': 5},
  }
  SampleDirectory(stopped, records).finish({'Sampler': settings})
  page = (stopped / 'index.html').read_text()
  assert page.count('<figure>') == 3
  assert '&lt;b&gt;1&lt;/b&gt; круг' in page
  assert '<b>1' not in page
  assert re.findall('<tr><td>(.*?)</td><td>(.*?)</td></tr>', page) == [
    ('steps', '5 &amp; 6'),
    ('sampler', 'ddim'),
    ('guidance interval (fractions of T)', '0.0 to 1.0'),
    ('negative prompt', 'none'),
    ('guide', 'stage 8, step 5'),
  ]
  # The one sample with an animation shows it, from its file.
  assert re.findall(
    r'<a href="(\S+)"><img src="(\S+)" alt="sampling', page
  ) == [('0002.webp', '0002.webp')]
  # The page embeds its thumbnails, and links to the images.
  shown = re.findall(
    r'href="(\S+)"><img src="data:image/webp;base64,(\S+)"', page
  )
  assert [name for name, _ in shown] == [
    f'000{i}_{size}.png' for i in range(3) for size in (4, 8)
  ]
  thumbnail = read(io.BytesIO(base64.b64decode(shown[3][1])))
  np.testing.assert_array_equal(thumbnail, levels(1)[1])
  assert not re.search(r'(src|href)="(https?:)?//', page)
