"""The reader of tars agrees with Python's on sound tars, and ends on others."""

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile

import pytest

from mdm_jax.data import tar_members
from mdm_jax.data.tar_members import DamagedTar, TarReader
from tests import fuzzing

NAMES = (
  'a.jpg',
  'naïve.txt',
  'x/' * 60 + 'y.jpg',
  'long' * 60 + '.txt',
  './here.jpg',
  '../up.jpg',
  '/root.jpg',
  'spaces in it.jpg',
  '\u202fnarrow space and 犬.jpg',
)
END = bytes(1024)


def header(name=b'a.jpg', size=0, kind=b'0', magic=b'ustar\x0000', **fields):
  """A header; `size` may be the bytes of the field."""
  block = bytearray(512)
  block[: len(name)] = name
  block[100:108] = b'0000644\0'
  size = size if isinstance(size, bytes) else b'%011o\0' % size
  block[124:136] = size.ljust(12, b'\0')
  block[156:157] = kind
  block[257:265] = magic
  for offset, value in fields.items():
    at = int(offset.removeprefix('at_'))
    block[at : at + len(value)] = value
  block[148:156] = b' ' * 8
  block[148:156] = b'%06o\0 ' % sum(block)
  return bytes(block)


def padded(data):
  return data + bytes(-len(data) % 512)


def pax(kind=b'x', **records):
  data = b''
  for key, value in records.items():
    body = b' %s=%s\n' % (key.replace('_', '.').encode(), value)
    length = len(body) + 2
    while len(b'%d' % length) + len(body) != length:
      length = len(b'%d' % length) + len(body)
    data += b'%d' % length + body
  return header(b'pax', len(data), kind) + padded(data)


def read(data, in_place=False):
  reader = TarReader(io.BytesIO(data), in_place)
  return [(m.name, m.offset, m.size, m.kind) for m in reader]


def names(data):
  return [member[0] for member in read(data)]


def make_tar(tar_format=tarfile.PAX_FORMAT, compression='', sizes=(0, 1, 700)):
  buffer = io.BytesIO()
  with tarfile.open(
    fileobj=buffer, mode=f'w:{compression}', format=tar_format
  ) as tar:
    for i, name in enumerate(NAMES):
      if tar_format == tarfile.USTAR_FORMAT and name.startswith('long'):
        continue
      member = tarfile.TarInfo(name)
      member.size = sizes[i % len(sizes)]
      tar.addfile(member, io.BytesIO(b'%d' % i * member.size))
  return buffer.getvalue()


@pytest.mark.parametrize(
  'tar_format',
  [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
)
def test_members_are_those_that_python_finds(tar_format):
  data = make_tar(tar_format)
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    expected = [(m.name, m.offset_data, m.size, '') for m in tar]
  assert len(expected) >= 8
  assert read(data) == read(data, in_place=True) == expected
  for compress in (gzip.compress, bz2.compress, lzma.compress):
    assert read(compress(data)) == expected
    # Two compressed files, one after another, are one tar.
    both = compress(data[:1000]) + compress(data[1000:]) + bytes(8)
    assert read(both) == expected
    with pytest.raises(tar_members.CompressedTar):
      read(compress(data), in_place=True)


def test_contents_are_read_or_skipped():
  data = make_tar()
  for compress in (bytes, gzip.compress):
    reader, contents = TarReader(io.BytesIO(compress(data))), []
    for i, member in enumerate(reader):
      if i % 2:
        contents.append((i, reader.read(member.size)))
    sizes = (0, 1, 700) * 3
    assert contents == [(i, b'%d' % i * sizes[i]) for i in (1, 3, 5, 7)]


def test_numbers_and_names_in_all_forms():
  big = header(b'big', b'\x80' + (5).to_bytes(11)) + padded(b'12345')
  old = header(b'old', b'       5 ', magic=bytes(8)) + padded(b'12345')
  prefix = header(b'name', at_345=b'dir')
  # GNU has times in the place of the prefix.
  gnu = header(b'gnu', magic=b'ustar  \0', at_345=b'14000000000\0')
  long = header(b'././@LongLink', 5, b'L') + padded(b'long\0') + header(b'lo')
  link = header(b'././@LongLink', 5, b'K') + padded(b'long\0') + header(b'k')
  pax_size = pax(size=b'5') + header(b'pax') + padded(b'12345')
  always = pax(b'g', comment=b'2') + header(b'after')
  data = big + old + prefix + gnu + long + link + pax_size + always + END
  assert [(m[0], m[2]) for m in read(data)] == [
    ('big', 5),
    ('old', 5),
    ('dir/name', 0),
    ('gnu', 0),
    ('long', 0),
    ('k', 0),
    ('pax', 5),
    ('after', 0),
  ]
  assert read(data) == read(data, in_place=True)


def test_names_can_be_printed_and_encoded():
  data = header(b'caf\xe9') + header(b'a\nb\x1b[31m') + header('é犬'.encode())
  data += pax(path=b'x\xff\xc2\x9b') + header() + END
  found = names(data)
  assert found == [r'caf\xe9', r'a\nb\x1b[31m', 'é犬', r'x\xff\x9b']
  for name in found:
    assert name.encode().decode() == name and '\n' not in name
  assert tar_members.readable('caf\udce9') == r'caf\xe9'


def test_what_is_no_plain_file_is_named():
  data = b''.join(header(b'x', 512, kind) for kind in (b'1', b'2', b'3', b'5'))
  data += header(b'y', 4, b'Q') + padded(b'data')
  more = bytes(504) + b'\1' + bytes(7)
  data += header(b'sparse', 4, b'S', at_482=b'\1') + more + bytes(512)
  data += padded(b'data') + pax(GNU_sparse_name=b'real') + header(b'z') + END
  assert [(m[0], m[3]) for m in read(data)] == [
    ('x', 'hard link'),
    ('x', 'symbolic link'),
    ('x', 'device'),
    ('x', 'directory'),
    ('y', "of type b'Q'"),
    ('sparse', 'sparse file'),
    ('real', 'sparse file'),
  ]


@pytest.mark.skipif(not shutil.which('tar'), reason='needs tar')
def test_sparse_files_of_gnu_tar(tmp_path):
  with (tmp_path / 'holes.txt').open('wb') as file:
    for i in range(8):
      file.seek(i * 2**20)
      file.write(b'data')
  (tmp_path / 'after.txt').write_text('after')
  for form in (
    ['--format=oldgnu'],
    ['--format=gnu'],
    ['--format=pax', '--sparse-version=0.0'],
    ['--format=pax', '--sparse-version=0.1'],
    ['--format=pax', '--sparse-version=1.0'],
  ):
    made = subprocess.run(
      ['tar', '-cS', *form, 'holes.txt', 'after.txt'],
      cwd=tmp_path,
      capture_output=True,
      check=True,
    ).stdout
    holes, after = read(made)
    assert (holes[0], holes[3]) == ('holes.txt', 'sparse file'), form
    assert (after[0], after[2:]) == ('after.txt', (5, '')), form
    assert made[after[1] : after[1] + 5] == b'after'


def test_all_archives_of_a_file_are_read():
  one, two = header(b'one') + END, header(b'two') + END
  assert names(one + two) == ['one', 'two']
  assert names(one + bytes(9216) + two + bytes(100)) == ['one', 'two']
  assert names(END) == names(bytes(10240)) == []


WHOLE = header(b'g.jpg', 3) + padded(b'123') + END


@pytest.mark.parametrize(
  'data, message, found',
  [
    (b'', 'the file is empty', 0),
    (b'no tar' * 200, 'not a tar', 0),
    (WHOLE[:300], 'not a tar', 0),
    (WHOLE[:600], 'ends before byte 1024', 1),
    (WHOLE[:1024], 'no end-of-archive blocks', 1),
    (WHOLE[:1024] + WHOLE[:100], 'no header at byte 1024', 1),
    (WHOLE[:1024] + b'x' * 512 + END, 'no header at byte 1024', 1),
    (WHOLE + b'x' * 512, 'data after the end of the archive', 1),
    (WHOLE + bytes(2**23), 'zeros in the place of a member', 1),
    (header(size=b'\xff' * 12) + END, 'not the size', 0),
    (header(size=b'-1') + END, 'not the size', 0),
    (header(size=b'1_0') + END, 'not the size', 0),
    (header(size=b'\x80' + b'\xff' * 11) + END, 'a member of 3094850', 0),
    (header(size=2**32) + END, 'ends before byte', 1),
    (pax(size=b'9' * 20) + WHOLE, 'not the size', 0),
    (pax(size=b'-512') + WHOLE, 'not the size', 0),
    (pax(path=b'') + END, 'without a member', 0),
    (header(b'L', 2, b'L') + padded(b'n\0') + END, 'without a member', 0),
    (header(b'x', 9, b'x') + padded(b'99 path=a\n') + WHOLE, 'PAX', 0),
    (header(b'x', 8, b'x') + padded(b'0 path=a') + WHOLE, 'PAX', 0),
    (header(b'L', 2**21, b'L') + bytes(2**21) + WHOLE, 'of 2097152 byt', 0),
    (header(b'L', 5000, b'L') + padded(b'n' * 5000) + WHOLE, 'of 5000 byt', 0),
    (header(kind=b'S', at_482=b'\1') + b'\1' * 512, 'ends before', 0),
  ],
)
@pytest.mark.parametrize('in_place', [False, True])
def test_damage_is_named(data, message, found, in_place):
  reader, count = TarReader(io.BytesIO(data), in_place), 0
  with pytest.raises(DamagedTar, match=message) as error:
    for _ in reader:
      count += 1
  assert count == found and '\n' not in str(error.value)


def test_a_compression_bomb_is_bounded(monkeypatch):
  monkeypatch.setattr(tar_members, '_MAX_UNPACKED', 2**20)
  big = header(b'big', 2**31) + bytes(2**24)
  for compress in (gzip.compress, bz2.compress, lzma.compress):
    with pytest.raises(DamagedTar, match='more than 200 times as large'):
      read(compress(big))


def test_the_memory_for_xz_is_bounded(monkeypatch):
  data = lzma.compress(WHOLE)
  assert names(data) == ['g.jpg']
  monkeypatch.setattr(tar_members, '_MAX_XZ_MEMORY', 2**20)
  with pytest.raises(DamagedTar, match='LZMAError: Memory usage limit'):
    read(data)


HOSTILE = (b'', b'0', b'-1', b'\xff' * 12, b'\x80' + b'\xff' * 11, b'9' * 12)


def make_damaged(rng):
  """A tar with all kinds of headers, damaged, and maybe compressed."""
  parts = [
    make_tar(int(rng.integers(3)), sizes=(0, 5))[:-1024],
    pax(size=b'5', path=b'p.jpg') + header() + padded(b'12345'),
    pax(GNU_sparse_major=b'1', GNU_sparse_map=b'0,1,2') + header(size=5),
    padded(b'12345'),
    header(b'L', 9, b'L') + padded(b'long.jpg\0') + header(),
    header(b's.jpg', 3, b'S', at_482=b'\1') + bytes(1024),
    header(b'b.jpg', b'\x80' + (5).to_bytes(11)) + padded(b'12345'),
    header(size=rng.choice(HOSTILE), kind=bytes([rng.choice(list(b'0LxgS'))])),
    pax(size=rng.choice(HOSTILE)) + header(),
    END,
  ]
  order = rng.permutation(len(parts))[: rng.integers(1, len(parts))]
  data = b''.join(parts[i] for i in order) + END
  if rng.random() < 0.7:
    data = repaired(fuzzing.damage(data, rng), rng)
  kind = rng.integers(6)
  if kind < 3:
    compress = (gzip.compress, bz2.compress, lzma.compress)[kind]
    data = compress(data)
    if rng.random() < 0.5:
      data = fuzzing.damage(data, rng)
  return data


def repaired(data, rng):
  """Gives damaged headers the right checksum, mostly."""
  data = bytearray(data)
  for at in range(0, len(data) - 511, 512):
    if data[at + 257 : at + 262] == b'ustar' and rng.random() < 0.9:
      data[at + 148 : at + 156] = b' ' * 8
      data[at + 148 : at + 156] = b'%06o\0 ' % sum(data[at : at + 512])
  return bytes(data)


@pytest.mark.parametrize('count', fuzzing.COUNTS)
@pytest.mark.parametrize('in_place', [False, True])
def test_any_tar_is_read_or_refused(count, in_place):
  def read_all(data):
    reader = TarReader(io.BytesIO(data), in_place)
    for number, member in enumerate(reader):
      assert member.size >= 0 and member.name.encode() is not None
      if number % 2 and member.size < 2**20:
        reader.read(member.size)

  fuzzing.check(
    read_all,
    make_damaged,
    count,
    refuses=(DamagedTar, tar_members.CompressedTar),
  )
