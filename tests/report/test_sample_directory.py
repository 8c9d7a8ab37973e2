"""A directory of samples: existing ones are reused, others are missing."""

import base64
import io
import json
import os
import re

from etils import epath
import fsspec
import numpy as np
from PIL import Image
import pytest

from mdm_jax.report import layouts
from mdm_jax.report.sample_directory import SampleDirectory, finest_images
from mdm_jax.runtime import buckets, files
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


def test_samples_without_a_file_that_is_needed_are_missing(stopped):
  assert SampleDirectory(stopped, RECORDS, needed=['path']).missing == [
    *(0, 1, 3, 4)
  ]


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


def test_clips_are_no_images(tmp_path):
  samples = SampleDirectory(tmp_path, RECORDS[:1])
  samples.add(0, [np.zeros((2, 4, 4, 3), np.uint8)])
  samples.finish({})
  with pytest.raises(ValueError, match='has clips, not images: measure their'):
    finest_images(tmp_path)


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


METADATA = [f'{{"tag": "counting", "prompt": "p{i}"}}' for i in range(3)]
GENEVAL = layouts.geneval(2, METADATA)
# Two samples of each of three prompts.
BENCHMARK = [
  {'prompt': f'p{i // 2}', 'seed': i % 2, 'metadata': METADATA[i // 2]}
  for i in range(6)
]
# A directory on the disk or in a bucket.
PLACES = ['disk', 'bucket']


@pytest.fixture
def place(request, tmp_path):
  """A directory of one of `PLACES`."""
  if request.param == 'disk':
    return epath.Path(tmp_path) / 'samples'
  return epath.Path(request.getfixturevalue('bucket').path) / 'samples'


def names_in(directory) -> set[str]:
  """All files of a directory, as paths in it."""
  path = os.fspath(directory)
  system = fsspec.filesystem('file')
  if not files.is_local(directory):
    system = buckets.file_system(path)
  path = system._strip_protocol(path)
  return {name.removeprefix(f'{path}/') for name in system.find(path)}


def by_geneval(directory):
  """The images as its evaluate_images.py finds them, by their metadata."""
  found = {}
  for folder in directory.iterdir():
    if folder.is_dir() and folder.name.isdigit():
      metadata = json.loads((folder / 'metadata.jsonl').read_text())
      found[metadata['prompt']] = sorted(
        path.name
        for path in (folder / 'samples').iterdir()
        if re.match(r'\d+\.png', path.name)
      )
  return found


@pytest.mark.parametrize('place', PLACES, indirect=True)
def test_the_directories_of_geneval(place):
  samples = SampleDirectory(place, BENCHMARK, GENEVAL)
  for i in samples.missing:
    samples.add(i, levels(i))
  samples.finish({})
  assert by_geneval(place) == {
    f'p{i}': ['00000.png', '00001.png'] for i in range(3)
  }
  assert {name for name in names_in(place) if '/' not in name} == {
    'samples.jsonl',
    'index.html',
  }
  # All that there is twice is the same.
  assert (place / '00002' / 'metadata.jsonl').read_text() == f'{METADATA[2]}\n'
  for i, path in enumerate(finest_images(place)):
    assert path == place / f'{i // 2:05d}' / 'samples' / f'{i % 2:05d}.png'
    image = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    np.testing.assert_array_equal(image, levels(i)[1])
  assert SampleDirectory(place, BENCHMARK, GENEVAL).missing == []
  # A text that is missing is written with its samples.
  (place / '00001' / 'metadata.jsonl').unlink()
  assert SampleDirectory(place, BENCHMARK, GENEVAL).missing == [2, 3]


@pytest.mark.parametrize('place', PLACES, indirect=True)
def test_a_numbered_directory_has_the_samples_of_its_settings_alone(place):
  records = [{'prompt': f'p{i}', 'seed': 0} for i in range(5)]
  layout = layouts.numbered('flat')
  samples = SampleDirectory(place, records, layout)
  for i in (0, 1, 3):
    samples.add(i, levels(i))
  # Killed, then continued by the same command.
  samples._lines.close()
  samples = SampleDirectory(place, records, layout)
  assert samples.missing == [2, 4]
  for i in samples.missing:
    samples.add(i, levels(i))
  samples.finish({})
  images = {f'{i:05d}.png' for i in range(5)}
  assert names_in(place) == images | {'samples.jsonl', 'index.html'}

  # Other settings, fewer samples: no others remain, whatever a line says, nor
  # what a killed process has not finished.
  (place / '00007.png').write_bytes(b'')
  (place / '00007.png.tmp').write_bytes(b'')
  path = place / 'samples.jsonl'
  mine = place.parent / 'mine.png'
  mine.write_bytes(b'')
  line = {'index': 9, 'files': {'8': '../mine.png'}, 'layout': 'flat'}
  path.write_text(path.read_text() + json.dumps(line) + '\n')
  other = [records[0], {'prompt': 'p1', 'seed': 7}, records[2]]
  samples = SampleDirectory(place, other, layout)
  assert samples.missing == [1]
  assert names_in(place) - {'index.html'} == {
    *('00000.png', '00002.png', 'samples.jsonl'),
  }
  assert mine.exists()
  samples.add(1, levels(9))
  samples.finish({})
  assert [path.name for path in finest_images(place)] == sorted(images)[:3]


def test_another_layout_is_refused(stopped):
  before = names_in(stopped)
  for layout in (layouts.numbered('flat'), GENEVAL):
    with pytest.raises(ValueError, match='give another --output'):
      SampleDirectory(stopped, RECORDS, layout)
  assert names_in(stopped) == before
  numbered = epath.Path(stopped / 'numbered')
  SampleDirectory(numbered, RECORDS, layouts.numbered('flat')).add(0, levels(0))
  with pytest.raises(ValueError, match='numbered has samples of another'):
    SampleDirectory(numbered, RECORDS)


def test_images_of_somebody_else_stay(tmp_path):
  theirs = tmp_path / '00001.png'
  theirs.write_bytes(b'')
  with pytest.raises(ValueError, match='00001.png was not sampled by this'):
    SampleDirectory(tmp_path, RECORDS, layouts.numbered('flat'))
  assert names_in(tmp_path) == {'00001.png'}


def test_samples_in_a_bucket_are_continued(bucket):
  directory = epath.Path(bucket.path) / 'samples'
  samples = SampleDirectory(directory, RECORDS)
  assert samples.missing == [0, 1, 2, 3, 4]
  samples.add(0, levels(0))
  samples.add(2, levels(2), [levels(10), levels(2)])
  samples._lines.close()
  samples.add(1, levels(1))
  # Killed: the line of the last one was not uploaded yet.
  samples._pool.shutdown()
  assert len(files.parts(directory / 'samples.jsonl')) == 2
  samples = SampleDirectory(directory, RECORDS)
  assert samples.missing == [1, 3, 4]
  # What had been appended is in one file again, and counts once.
  assert len(files.parts(directory / 'samples.jsonl')) == 1
  with bucket.failing('POST .*upload', stall=0.2, times=8):
    for i in samples.missing:
      samples.add(i, levels(i))
    samples.finish({})
  assert names_in(directory) == {
    *(f'{i:04d}_{size}.png' for i in range(5) for size in (4, 8)),
    *('0002.webp', 'grid.png', 'index.html', 'samples.jsonl'),
  }
  assert [
    json.loads(line)['index']
    for line in (directory / 'samples.jsonl').read_text().splitlines()
  ] == [0, 1, 2, 3, 4]
  assert SampleDirectory(directory, RECORDS).missing == []
  # Files by one listing, not by a request for each.
  (directory / '0003_8.png').unlink()
  bucket.requests.clear()
  assert SampleDirectory(directory, RECORDS).missing == [3]
  assert sum('.png' in request for request in bucket.requests) == 0


def test_a_failed_upload_of_a_sample_is_raised(bucket):
  directory = epath.Path(bucket.path) / 'samples'
  samples = SampleDirectory(directory, RECORDS)
  samples.add(0, levels(0))
  samples._lines.close()
  with bucket.failing('POST .*upload', status=403):
    samples.add(1, levels(1))
    with pytest.raises(OSError):
      samples.finish({})
  assert SampleDirectory(directory, RECORDS).missing == [1, 2, 3, 4]
