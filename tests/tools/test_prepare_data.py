"""Tars of all sorts -> a data set and an account of what was left out."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
from PIL import Image
import pytest

from mdm_jax.data import sources
from mdm_jax.data.transforms import decode_image
from mdm_jax.tools import prepare_data

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
      str(tmp_path / '*.tar'), str(tmp_path / 'out'), validation_fraction=0
  )
  assert summary['records'] == {'train': 7}
  assert summary['rejected'] == {} and summary['rejects'] == []
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
      f'{tmp_path}/*.tar', str(output), max_caption_length=20
  )
  assert summary['tars'] == 4
  assert summary['records'] == {'train': 5}
  assert sorted(read_all(output)) == [
      '1/000', '1/001', '1/fits', '3/000', '3/001',
  ]  # fmt: skip
  found = {r['key']: r['reason'] for r in summary['rejects']}
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
  assert sum(summary['rejected'].values()) == len(summary['rejects'])
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
      f'{tmp_path}/s.tar', str(tmp_path / 'out'), validation_fraction=0.25
  )
  train = read_all(tmp_path / 'out')
  validation = read_all(tmp_path / 'out', 'validation')
  assert len(train) + len(validation) == 200
  assert summary['records'] == {
      'train': len(train), 'validation': len(validation)
  }  # fmt: skip
  assert 30 < len(validation) < 70
  for key in validation:
    assert prepare_data.split_of(key, 0.25) == 'validation'
  keys = [f's/{i}' for i in range(10_000)]
  count = sum(prepare_data.split_of(k, 0.01) == 'validation' for k in keys)
  assert 70 < count < 130
  assert {prepare_data.split_of(k, 0.0) for k in keys} == {'train'}


def test_train_is_never_empty(tmp_path):
  write_tar(tmp_path / 's.tar', good_files(1))
  prepare_data.prepare(
      f'{tmp_path}/s.tar', str(tmp_path / 'out'), validation_fraction=0.999
  )
  assert sources.available_splits(str(tmp_path / 'out')) == ('train',)
  assert sorted(read_all(tmp_path / 'out')) == ['s/000']


def test_what_is_written_does_not_depend_on_the_chunks(tmp_path, monkeypatch):
  write_tar(tmp_path / 's.tar', good_files(7))
  monkeypatch.setattr(prepare_data, '_RECORDS_PER_WRITE', 3)
  monkeypatch.setattr(prepare_data, '_RECORDS_PER_SHARD', 4)
  prepare_data.prepare(
      f'{tmp_path}/s.tar', str(tmp_path / 'out'), validation_fraction=0
  )
  assert len(list((tmp_path / 'out').glob('*.array_record-*'))) == 2
  assert list(read_all(tmp_path / 'out')) == [f's/00{i}' for i in range(7)]


def test_errors_leave_nothing_behind(tmp_path):
  (tmp_path / 'bad.tar').write_bytes(b'no tar')
  write_tar(tmp_path / 'good.tar', good_files(1))
  output = tmp_path / 'out'
  with pytest.raises(prepare_data.PrepareError, match=r'none\*.tar matches no'):
    prepare_data.prepare(f'{tmp_path}/none*.tar', str(output))
  with pytest.raises(
      prepare_data.PrepareError, match="no usable record: {'unreadable tar': 1}"
  ):
    prepare_data.prepare(f'{tmp_path}/bad.tar', str(output))
  with pytest.raises(prepare_data.PrepareError, match='fraction=1.0'):
    prepare_data.prepare(f'{tmp_path}/good.tar', str(output), 1.0)
  assert sorted(os.listdir(tmp_path)) == ['bad.tar', 'good.tar']
  output.mkdir()
  (output / 'precious').write_text('mine')
  with pytest.raises(prepare_data.PrepareError, match='out exists: remove'):
    prepare_data.prepare(f'{tmp_path}/good.tar', str(output))
  assert os.listdir(output) == ['precious']


def test_a_killed_run_leaves_no_data_set_and_the_next_succeeds(
    tmp_path, monkeypatch
):
  write_tar(tmp_path / 's.tar', good_files(3))
  output = tmp_path / 'out'

  def interrupt(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(prepare_data, '_write', interrupt)
    with pytest.raises(KeyboardInterrupt):
      prepare_data.prepare(f'{tmp_path}/s.tar', str(output))
  assert not output.exists()
  prepare_data.prepare(f'{tmp_path}/s.tar', str(output))
  assert len(read_all(output)) == 3
  assert sorted(os.listdir(tmp_path)) == ['out', 's.tar']


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
      f'prepare_data: --input={tmp_path}/*.tar matches no file.'
  ]
