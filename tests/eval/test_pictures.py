"""A directory of pictures: what is there stays, what is not is drawn."""

import base64
import io
import json
import re

import numpy as np
from PIL import Image
import pytest

from mdm_jax.eval.pictures import Pictures

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


@pytest.fixture
def stopped(tmp_path):
  """A directory whose process was killed while it wrote the fourth line."""
  pictures = Pictures(tmp_path, RECORDS)
  assert pictures.missing == [0, 1, 2, 3, 4]
  for i in (0, 2, 1):
    pictures.add(i, levels(i), [levels(10), levels(i)] if i == 2 else None)
  with (tmp_path / 'samples.jsonl').open('a') as file:
    file.write('{"index": 3, "promp')
  return tmp_path


def test_goes_on_where_it_was_stopped(stopped):
  pictures = Pictures(stopped, RECORDS)
  assert pictures.missing == [3, 4]
  for i in (3, 4):
    pictures.add(i, levels(i))
  pictures.finish({})
  found = lines(stopped)
  assert [line['index'] for line in found] == [0, 1, 2, 3, 4]
  for i, line in enumerate(found):
    assert line.items() >= RECORDS[i].items()
    for size, name in list(line['files'].items())[:2]:
      np.testing.assert_array_equal(
        read(stopped / name), levels(i)[size == '8']
      )
  assert Pictures(stopped, RECORDS).missing == []
  assert list(found[2]['files']) == ['4', '8', 'path']
  with Image.open(stopped / found[2]['files']['path']) as animation:
    assert (animation.n_frames, animation.size) == (2, (16, 8))
  assert read(stopped / 'grid.png').std() > 10


def test_what_does_not_follow_from_its_record_is_drawn_anew(stopped):
  (stopped / '0001_8.png').unlink()
  other = [RECORDS[0] | {'seed': 7}, *RECORDS[1:3]]
  assert Pictures(stopped, other).missing == [0, 1]
  # What is left out is forgotten, so that nothing stands for what it is not.
  assert [line['index'] for line in lines(stopped)] == [2]


def test_thousands_lie_in_shards(tmp_path):
  pictures = Pictures(tmp_path, [RECORDS[0]] * 1001)
  pictures.add(999, levels(0))
  pictures.add(1000, levels(0))
  assert [line['files']['8'] for line in lines(tmp_path)] == [
    '000/000999_8.png',
    '001/001000_8.png',
  ]


def test_the_page_shows_what_there_is(stopped):
  records = RECORDS[:3]
  Pictures(stopped, records).finish({'Sampler': {'steps': '5 & 6'}})
  page = (stopped / 'index.html').read_text()
  assert page.count('<figure>') == 3
  assert '&lt;b&gt;1&lt;/b&gt; круг' in page
  assert '<b>1' not in page
  assert '<td>5 &amp; 6</td>' in page
  # It needs no other file, but links to the pictures.
  shown = re.findall(
    r'href="(\S+)"><img src="data:image/webp;base64,(\S+)"', page
  )
  assert [name for name, _ in shown] == [
    f'000{i}_{size}.png' for i in range(3) for size in (4, 8)
  ]
  thumbnail = read(io.BytesIO(base64.b64decode(shown[3][1])))
  np.testing.assert_array_equal(thumbnail, levels(1)[1])
  assert not re.search(r'(src|href)="(https?:)?//', page)
