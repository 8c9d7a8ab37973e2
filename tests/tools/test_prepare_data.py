"""Tars of all sorts -> a data set and an account of what was left out."""

import dataclasses
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
from PIL import Image
import pytest

from mdm_jax.data import inputs, sources, tars
from mdm_jax.data.images import decode_image
from mdm_jax.runtime import files
from mdm_jax.tools import conversion, prepare_data, tfds_writer
from mdm_jax.tools.prepare_data import Options
from tests import commands
from tests.runtime.test_files import UNREADABLE

RED = (200, 30, 40)


def image_file(
  file_format='JPEG', mode='RGB', size=(48, 32), color=RED, **options
):
  buffer = io.BytesIO()
  image = Image.new('RGB', size, color).convert(mode)
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def bomb():
  """A small PNG that claims 300 megapixels."""

  def chunk(kind, data):
    checksum = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + checksum

  header = struct.pack('>IIBBBBB', 20_000, 15_000, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(bytes(1000)))
    + chunk(b'IEND', b'')
  )


def write_tar(path, files, mode='w'):
  with tarfile.open(path, mode) as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


def good_files(count):
  files = {}
  for i in range(count):
    files[f'{i:03}.jpg'] = image_file()
    files[f'{i:03}.txt'] = f'picture {i}'.encode()
  return files


def read_all(output, split='train'):
  source = sources.open_source(str(output), split)
  records = [source[i] for i in range(len(source))]
  return {record['key']: record for record in records}


def read_rejects(output):
  lines = (output / 'rejects.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def sideways():
  tags = Image.Exif()
  tags[0x0112] = 6
  return tags


def test_every_usable_kind_is_kept_and_decodes(tmp_path):
  clear = Image.new('RGBA', (20, 20), (0, 0, 0, 0))
  buffer = io.BytesIO()
  clear.save(buffer, 'PNG')
  files = {
    'a.jpg': image_file(),
    'b.jpeg': image_file(mode='CMYK'),
    'c.JPG': image_file(mode='L'),
    'd.png': buffer.getvalue(),
    'e.jpg': image_file(exif=sideways()),
    'f.webp': image_file('WEBP'),
    'sub.dir/g.jpg': image_file('PNG'),  # the wrong suffix
  }
  for name in list(files):
    files[f'{name.rpartition(".")[0]}.txt'] = b'  some \n words '
  write_tar(tmp_path / 's.tar', files)
  summary = prepare_data.prepare(
    str(tmp_path / '*.tar'),
    str(tmp_path / 'out'),
    Options(validation_fraction=0),
  )
  assert summary['records'] == {'train': 7}
  assert summary['rejected'] == {} and read_rejects(tmp_path / 'out') == []
  records = read_all(tmp_path / 'out')
  keys = ['a', 'b', 'c', 'd', 'e', 'f', 'sub.dir/g']
  assert sorted(records) == [f's/{key}' for key in keys]
  for name, data in files.items():
    if not name.endswith('.txt'):
      record = records[f's/{name.rpartition(".")[0]}']
      assert record['image'] == data
      assert record['caption'] == 'some words'
      pixels, side = decode_image(record['image'], 8)
      expected = {'c': (82, 82, 82), 'd': (255, 255, 255)}.get(name[0], RED)
      np.testing.assert_allclose(
        pixels.astype(int), np.broadcast_to(expected, (8, 8, 3)), atol=4
      )
      assert side == (20 if name[0] == 'd' else 32)


def test_the_size_is_that_of_the_upright_image(tmp_path):
  import tensorflow_datasets as tfds

  files = {'a.jpg': image_file(exif=sideways()), 'a.txt': b'on its side'}
  write_tar(tmp_path / 's.tar', files)
  prepare_data.prepare(str(tmp_path / 's.tar'), str(tmp_path / 'out'))
  builder = tfds.builder_from_directory(str(tmp_path / 'out'))
  decoders = {'image': tfds.decode.SkipDecoding()}
  (record,) = builder.as_data_source('train', decoders=decoders)
  assert (record['width'], record['height']) == (32, 48)
  assert 'tensorflow' not in sys.modules


def test_every_bad_input_is_counted_and_listed(tmp_path):
  jpeg = image_file(size=(200, 200))
  words = b'some words'
  write_tar(
    tmp_path / '1.tar',
    good_files(2)
    | {'no_caption.jpg': jpeg}
    | {'no_image.txt': words}
    | {'no_image_json.json': b'{"caption": "words"}'}
    | {'truncated.jpg': jpeg[:-100], 'truncated.txt': words}
    | {'html.jpg': b'<html>404</html>', 'html.txt': words}
    | {'bomb.png': bomb(), 'bomb.txt': words}
    | {'blank.jpg': jpeg, 'blank.txt': b' \n'}
    | {'null.jpg': jpeg, 'null.json': b'{"caption": null}'}
    | {'long.jpg': jpeg, 'long.txt': b'x' * 21}
    | {'fits.jpg': jpeg, 'fits.txt': b'x' * 20}
    | {'latin.jpg': jpeg, 'latin.txt': 'é'.encode('latin-1')}
    | {'broken.jpg': jpeg, 'broken.json': b'{"caption": '},
  )
  (tmp_path / '2.tar').write_bytes(b'this is not a tar' * 100)
  write_tar(tmp_path / '3.tar', good_files(3))
  cut = (tmp_path / '3.tar').read_bytes()
  (tmp_path / '3.tar').write_bytes(cut[: cut.index(b'picture 2')])
  (tmp_path / '4.tar').write_bytes(b'')
  output = tmp_path / 'out'
  summary = prepare_data.prepare(
    f'{tmp_path}/*.tar', str(output), Options(max_caption_length=20)
  )
  assert summary['tars'] == 4
  assert summary['records'] == {'train': 5}
  assert sorted(read_all(output)) == [
      '1/000', '1/001', '1/fits', '3/000', '3/001',
  ]  # fmt: skip
  rejects = read_rejects(output)
  found = {r['key']: r['reason'] for r in rejects}
  assert found == {
    '1/no_caption': 'image without caption',
    '1/no_image': 'caption without image',
    '1/no_image_json': 'caption without image',
    '1/truncated': 'damaged image',
    '1/html': 'not an image',
    '1/bomb': 'too many pixels',
    '1/blank': 'empty caption',
    '1/null': 'empty caption',
    '1/long': 'caption too long',
    '1/latin': 'unreadable caption',
    '1/broken': 'unreadable caption',
    f'{tmp_path}/2.tar': 'unreadable tar',
    f'{tmp_path}/3.tar': 'damaged tar',
    '3/002': 'damaged tar member',
    f'{tmp_path}/4.tar': 'unreadable tar',
  }
  assert summary['rejected']['unreadable tar'] == 2
  assert sum(summary['rejected'].values()) == len(rejects) == len(found)
  assert json.loads((output / 'summary.json').read_text()) == summary


def test_a_json_caption_and_a_compressed_tar(tmp_path):
  files = {
    'a.jpg': image_file(),
    'a.json': json.dumps({'caption': 'from json', 'width': 3}).encode(),
    'b.jpg': image_file(),
    'b.json': json.dumps({'caption': 'from json'}).encode(),
    'b.txt': b'from text',
  }
  write_tar(tmp_path / 's.tar.gz', files, 'w:gz')
  prepare_data.prepare(f'{tmp_path}/s.tar.gz', str(tmp_path / 'out'))
  captions = {k: r['caption'] for k, r in read_all(tmp_path / 'out').items()}
  assert captions == {'s.tar/a': 'from json', 's.tar/b': 'from text'}


def test_validation_is_chosen_by_the_key_alone(tmp_path):
  write_tar(tmp_path / 's.tar', good_files(200))
  summary = prepare_data.prepare(
    f'{tmp_path}/s.tar',
    str(tmp_path / 'out'),
    Options(validation_fraction=0.25),
  )
  train = read_all(tmp_path / 'out')
  validation = read_all(tmp_path / 'out', 'validation')
  assert len(train) + len(validation) == 200
  assert summary['records'] == {
      'train': len(train), 'validation': len(validation)
  }  # fmt: skip
  assert 30 < len(validation) < 70
  for key in validation:
    assert tars.split_of(key, 0.25) == 'validation'
  keys = [f's/{i}' for i in range(10_000)]
  count = sum(tars.split_of(k, 0.01) == 'validation' for k in keys)
  assert 70 < count < 130
  assert {tars.split_of(k, 0.0) for k in keys} == {'train'}


def test_train_is_never_empty(tmp_path):
  write_tar(tmp_path / 's.tar', good_files(1))
  prepare_data.prepare(
    f'{tmp_path}/s.tar',
    str(tmp_path / 'out'),
    Options(validation_fraction=0.999),
  )
  assert sources.available_splits(str(tmp_path / 'out')) == ('train',)
  assert sorted(read_all(tmp_path / 'out')) == ['s/000']


def test_small_tars_share_files_and_keep_their_order(tmp_path, monkeypatch):
  for i, count in enumerate([3, 2, 4, 1]):
    write_tar(tmp_path / f'{i}.tar', good_files(count))
  monkeypatch.setattr(tfds_writer, '_RECORDS_PER_SHARD', 5)
  prepare_data.prepare(
    f'{tmp_path}/?.tar', str(tmp_path / 'out'), Options(validation_fraction=0)
  )
  assert sorted(p.name for p in (tmp_path / 'out').glob('*record*')) == [
    f'captioned_images-train.array_record-0000{i}-of-00002' for i in (0, 1)
  ]
  assert list(read_all(tmp_path / 'out')) == [
    f'{i}/00{j}' for i, count in enumerate([3, 2, 4, 1]) for j in range(count)
  ]


def test_errors_leave_nothing_behind(tmp_path):
  (tmp_path / 'bad.tar').write_bytes(b'no tar')
  write_tar(tmp_path / 'good.tar', good_files(1))
  output = tmp_path / 'out'
  with pytest.raises(ValueError, match=r'none\*.tar matches no'):
    prepare_data.prepare(f'{tmp_path}/none*.tar', str(output))
  with pytest.raises(
    ValueError, match="no usable record: {'unreadable tar': 1}.*not a tar"
  ):
    prepare_data.prepare(f'{tmp_path}/bad.tar', str(output))
  with pytest.raises(ValueError, match='fraction=1.0'):
    prepare_data.prepare(
      f'{tmp_path}/good.tar', str(output), Options(validation_fraction=1.0)
    )
  assert sorted(os.listdir(tmp_path)) == ['bad.tar', 'good.tar']
  output.mkdir()
  (output / 'precious').write_text('mine')
  with pytest.raises(ValueError, match='out exists: remove'):
    prepare_data.prepare(f'{tmp_path}/good.tar', str(output))
  assert os.listdir(output) == ['precious']


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
  for i in range(4):
    write_tar(tmp_path / f'{i}.tar', good_files(20))
  output, whole = tmp_path / 'out', tmp_path / 'whole'
  options = Options(validation_fraction=0.3)
  prepare_data.prepare(f'{tmp_path}/*.tar', str(whole), options)
  read, read_records = [], tars.read_records

  def read_until_the_third(path, rejects):
    read.append(path)
    for i, record in enumerate(read_records(path, rejects)):
      if len(read) == 3 and i == 7:
        raise KeyboardInterrupt
      yield record

  with monkeypatch.context() as patch:
    patch.setattr(tars, 'read_records', read_until_the_third)
    with pytest.raises(KeyboardInterrupt):
      prepare_data.prepare(f'{tmp_path}/*.tar', str(output), options)
    assert not output.exists()
    with pytest.raises(
      ValueError, match='begun with other min_side: remove it, or give'
    ):
      prepare_data.prepare(
        f'{tmp_path}/*.tar',
        str(output),
        dataclasses.replace(options, min_side=2),
      )
    # Killed once more, while the parts become the data set.
    patch.setattr(files, 'write_text', fail_on('summary.json'))
    with pytest.raises(KeyboardInterrupt):
      prepare_data.prepare(f'{tmp_path}/*.tar', str(output), options)
  assert not output.exists()
  prepare_data.prepare(f'{tmp_path}/*.tar', str(output), options)
  assert [path[-5:] for path in read] == [
    '0.tar',
    '1.tar',
    '2.tar',
    '2.tar',
    '3.tar',
  ]
  assert contents(output) == contents(whole)
  assert {'out', 'whole'} == {p.name for p in tmp_path.iterdir() if p.is_dir()}


def test_reports_that_cannot_be_read_are_made_anew(tmp_path, monkeypatch):
  for i in range(2):
    write_tar(tmp_path / f'{i}.tar', good_files(3))
  output, whole = tmp_path / 'out', tmp_path / 'whole'
  options = Options(validation_fraction=0.5)
  prepare_data.prepare(f'{tmp_path}/*.tar', str(whole), options)
  with monkeypatch.context() as patch:
    patch.setattr(files, 'write_text', fail_on('summary.json'))
    with pytest.raises(KeyboardInterrupt):
      prepare_data.prepare(f'{tmp_path}/*.tar', str(output), options)
  (begun,) = tmp_path.glob('*/options.json')
  report = begun.with_name('000001.json')
  good = report.read_text()
  odd = [
    good.replace('"counts": {', '"counts": {"train": "3", "x": '),
    good.replace('"rejects": []', '"rejects": [["a", "b"]]'),
    good.replace('"rejects"', '"rejected"'),
  ]
  assert good not in odd
  part = inputs.TarPart(str(tmp_path / '1.tar'))
  monkeypatch.chdir(begun.parent)
  for make in [*(make for make, _ in UNREADABLE.values()), *odd]:
    report.unlink()
    if isinstance(make, str):
      report.write_text(make)
    else:
      make(report)
    assert not conversion._is_finished(report)
    conversion._convert(options, (part, report))
    assert report.read_text() == good

  settings = begun.read_text()
  for make, reason in UNREADABLE.values():
    begun.unlink(missing_ok=True)
    make(begun)
    if begun.exists():
      with pytest.raises(ValueError, match=re.escape(reason)):
        prepare_data.prepare(f'{tmp_path}/*.tar', str(output), options)
    if begun.is_dir():
      begun.rmdir()
      begun.touch()
  begun.write_text(settings)
  prepare_data.prepare(f'{tmp_path}/*.tar', str(output), options)
  assert contents(output) == contents(whole)


def fail_on(name):
  write = files.write_text

  def write_file(path, text, **options):
    if path.name == name:
      raise KeyboardInterrupt
    write(path, text, **options)

  return write_file


def contents(output):
  """Everything, but for the order of a record's fields, which may vary."""
  files = {p.name: p.read_bytes() for p in output.iterdir()}
  return [
    sorted(files),
    files['rejects.jsonl'],
    files['summary.json'],
    *(
      list(read_all(output, split).items()) for split in ('train', 'validation')
    ),
  ]


def test_processes_and_machines_make_the_same(tmp_path):
  for i in range(4):
    write_tar(
      tmp_path / f'{i}.tar',
      good_files(5) | {'x.jpg': b'no image', 'x.txt': b'words'},
    )
  options = Options(validation_fraction=0.3)
  for name, num_workers, parts in [
    ('one', 1, ['0/1']),
    ('two', 2, ['0/1']),
    ('hosts', 1, ['1/2', '0/2', '0/1']),
  ]:
    for part in parts:
      summary = prepare_data.prepare(
        f'{tmp_path}/*.tar', str(tmp_path / name), options, num_workers, part
      )
      assert (summary is None) == (part != '0/1')
  assert summary['rejected'] == {'not an image': 4}
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
  assert contents(tmp_path / 'one') == contents(tmp_path / 'hosts')
  with pytest.raises(ValueError, match='part=2/2: give k/n'):
    prepare_data.prepare(f'{tmp_path}/*.tar', str(tmp_path / 'x'), part='2/2')


def test_filters_are_counted(tmp_path):
  sizes = {'a': (99, 200), 'b': (100, 200), 'c': (100, 201), 'd': (200, 100)}
  files = {}
  for name, size in sizes.items():
    files[f'{name}.jpg'] = image_file(size=size)
    files[f'{name}.txt'] = b'words'
  files |= {'e.png': image_file('PNG', size=(200, 120)), 'e.txt': b'words'}
  write_tar(tmp_path / 's.tar', files)
  summary = prepare_data.prepare(
    f'{tmp_path}/s.tar',
    str(tmp_path / 'out'),
    Options(
      min_side=100,
      max_aspect=2.0,
      max_pixels=200 * 120 - 1,
      validation_fraction=0,
    ),
  )
  assert sorted(read_all(tmp_path / 'out')) == ['s/b', 's/d']
  assert summary['rejected'] == {
    'image too small': 1,
    'image too elongated': 1,
    'too many pixels': 1,
  }


def test_an_image_is_used_once(tmp_path):
  for i in range(3):
    files = {}
    for j in range(4):
      files[f'{j}.png'] = image_file('PNG', color=(j, i if j < 2 else 0, 0))
      files[f'{j}.txt'] = f'caption {i} {j}'.encode()
    write_tar(tmp_path / f'{i}.tar', files)
  options = Options(validation_fraction=0.3, deduplicate=True)
  summary = prepare_data.prepare(
    f'{tmp_path}/*.tar', str(tmp_path / 'out'), options
  )
  kept = [
    *read_all(tmp_path / 'out'),
    *read_all(tmp_path / 'out', 'validation'),
  ]
  assert len(kept) == len(set(kept)) == 8 == sum(summary['records'].values())
  images = [
    record['image']
    for split in ('train', 'validation')
    for record in read_all(tmp_path / 'out', split).values()
  ]
  assert len(set(images)) == 8
  assert {f'{i}/{j}' for i in range(3) for j in range(2)} <= set(kept)
  assert summary['rejected'] == {'image used before': 4}


def test_large_images_are_reduced_and_their_size_is_kept(tmp_path):
  ramp = np.tile(np.linspace(0, 255, 400, dtype=np.uint8), (300, 1))
  buffer = io.BytesIO()
  Image.fromarray(ramp).save(buffer, 'JPEG', quality=95)
  small = image_file(size=(64, 70))
  write_tar(
    tmp_path / 's.tar',
    {
      'large.jpg': buffer.getvalue(),
      'large.txt': b'words',
      'small.jpg': small,
      'small.txt': b'words',
    },
  )
  prepare_data.prepare(
    f'{tmp_path}/s.tar',
    str(tmp_path / 'out'),
    Options(validation_fraction=0, reduce_to=75),
  )
  records = read_all(tmp_path / 'out')
  assert records['s/small']['image'] == small
  large = records['s/large']
  assert large['size'] == 300
  with Image.open(io.BytesIO(large['image'])) as image:
    assert image.size == (100, 75)
    pixels = np.asarray(image.convert('L')).astype(int)
  np.testing.assert_allclose(
    pixels, np.broadcast_to(np.linspace(0, 255, 100), (75, 100)), atol=3
  )


def test_an_image_too_long_for_jpeg_is_kept(tmp_path):
  files = good_files(3)
  files['001.jpg'] = image_file('PNG', 'L', size=(30, 90_000))
  write_tar(tmp_path / 's.tar', files)
  for reduce_to in (29, 20):
    output = tmp_path / str(reduce_to)
    summary = prepare_data.prepare(
      f'{tmp_path}/s.tar',
      str(output),
      Options(validation_fraction=0, reduce_to=reduce_to),
    )
    assert summary['records'] == {'train': 3} and summary['rejected'] == {}
    record = read_all(output)['s/001']
    assert record['size'] == 30
    with Image.open(io.BytesIO(record['image'])) as image:
      # 90,000 * 29 / 30 pixels are too many.
      assert image.size == {29: (30, 90_000), 20: (20, 60_000)}[reduce_to]


@pytest.mark.parametrize('step', ['load_image', 'resize', 'encode', 'example'])
def test_a_record_that_cannot_be_made_is_a_reject(tmp_path, monkeypatch, step):
  """Whatever fails, and with whatever error."""
  write_tar(tmp_path / 's.tar', good_files(3))
  owner, name = {
    'load_image': (conversion, 'load_image'),
    'resize': (Image.Image, 'resize'),
    'encode': (Image.Image, 'save'),
    'example': (type(tfds_writer.make_features()), 'encode_example'),
  }[step]
  whole, calls = getattr(owner, name), []

  def fail_once(*args, **options):
    calls.append(step)
    if len(calls) == 2:
      raise (ZeroDivisionError, OSError, MemoryError)[len(step) % 3]('a\nb')
    return whole(*args, **options)

  monkeypatch.setattr(owner, name, fail_once)
  summary = prepare_data.prepare(
    f'{tmp_path}/s.tar',
    str(tmp_path / 'out'),
    Options(validation_fraction=0, reduce_to=8),
  )
  assert summary['records'] == {'train': 2}
  assert summary['rejected'] == {'record cannot be made': 1}
  (reject,) = read_rejects(tmp_path / 'out')
  assert reject['detail'].endswith('Error: a')


def test_an_error_of_the_output_is_no_reject(tmp_path, monkeypatch):
  write_tar(tmp_path / 's.tar', good_files(3))

  class Broken(tfds_writer.array_record_module.ArrayRecordWriter):
    def write(self, record):
      raise RuntimeError('no space left')

  monkeypatch.setattr(
    tfds_writer.array_record_module, 'ArrayRecordWriter', Broken
  )
  with pytest.raises(RuntimeError, match='no space left'):
    prepare_data.prepare(f'{tmp_path}/s.tar', str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_keys_are_unique(tmp_path):
  (tmp_path / 'a').mkdir()
  for path in ('s.tar', 'a/s.tar'):
    write_tar(tmp_path / path, good_files(1))
  with pytest.raises(ValueError, match='s.tar would give their'):
    prepare_data.prepare(
      [f'{tmp_path}/*.tar', f'{tmp_path}/*/*.tar'], str(tmp_path / 'out')
    )


@pytest.mark.parametrize('size', ['2m', '6m'])
def test_a_full_disk_keeps_what_is_done(tmp_path, size):
  """While the parts are written, and while they become the data set."""
  noise = np.random.default_rng(0).integers(0, 256, (200, 500, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(noise).save(buffer, 'PNG')
  for i in range(4):
    files = {}
    for j in range(3):
      files |= {f'{j}.png': buffer.getvalue(), f'{j}.txt': b'words'}
    write_tar(tmp_path / f'{i}.tar', files)
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', disk]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('needs the right to mount a small file system')
  command = [
    sys.executable,
    '-m',
    'mdm_jax.tools.prepare_data',
    '--num_workers=1',
    f'--input={tmp_path}/*.tar',
    f'--output={disk}/out',
  ]
  try:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'Finished parts are kept' in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr
    assert not (disk / 'out').exists()
    finished = len(list(disk.glob('out.incomplete/00*.json')))
    assert finished == {'2m': 1, '6m': 4}[size]
    subprocess.run(['mount', '-o', 'remount,size=64m', disk], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = f'{4 - finished}/{4 - finished}' in done.stderr
    assert read == (finished < 4)
    assert len(read_all(disk / 'out')) == 12
  finally:
    subprocess.run(['umount', disk], check=True)


def test_the_command_says_one_line_and_fails(tmp_path):
  done = subprocess.run(
      [
          sys.executable, '-m', 'mdm_jax.tools.prepare_data',
          f'--input={tmp_path}/*.tar', f'--output={tmp_path}/out',
      ],
      capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.splitlines() == [
    f'error: --input={tmp_path}/*.tar matches no file.'
  ]


@commands.lists_processes
@pytest.mark.parametrize(
  'how, expected', [('SIGHUP', 75), ('SIGTERM', 75), ('SIGKILL', -9)]
)
def test_a_command_that_is_stopped_keeps_what_is_done(tmp_path, how, expected):
  """A signal to all its processes too; and no worker is left, ever."""
  write_tar(tmp_path / '0.tar', good_files(2))
  large = image_file(size=(3000, 3000))
  for i in (1, 2, 3):
    files = {f'{j}.jpg': large for j in range(300)}
    texts = {f'{j}.txt': b'a' for j in range(300)}
    write_tar(tmp_path / f'{i}.tar', files | texts)
  arguments = (
    'mdm_jax.tools.prepare_data',
    f'--input={tmp_path}/*.tar',
    f'--output={tmp_path / "out"}',
  )
  process = commands.start(*arguments, '--num_workers=2')
  while not (tmp_path / 'out.incomplete' / '000000.json').exists():
    assert process.poll() is None
    time.sleep(0.02)
  if how == 'SIGHUP':  # Meanwhile no other may write there.
    second = commands.run(*arguments)
    assert second.returncode == 1
    assert second.stderr.startswith(
      f'error: {tmp_path}/out is in use: process {process.pid} on '
    )
  if how == 'SIGKILL':
    process.kill()
  else:
    os.killpg(process.pid, signal.Signals[how])
  assert process.wait(600) == expected
  assert commands.all_end(process.pid, 5)
  assert (tmp_path / 'out.incomplete' / '000000.json').exists()
  assert not (tmp_path / 'out').exists()
