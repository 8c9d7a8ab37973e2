"""Data sets that are made from what is in a bucket, and written to one."""

import types

from etils import epath
import gcsfs.retry
import pytest

from mdm_jax.data import folders, sources
from mdm_jax.runtime import files, remote_reads
from mdm_jax.tools import conversion, prepare_data, tfds_writer
from mdm_jax.tools.conversion import Options, prepare
from tests.tools import test_conversion as forms
from tests.tools.test_prepare_data import (
  contents,
  fail_on,
  good_files,
  read_all,
  write_tar,
)


def upload(directory, path):
  for file in directory.rglob('*'):
    if file.is_file():
      name = file.relative_to(directory)
      (epath.Path(path) / name).write_bytes(file.read_bytes())
  return str(path)


def download(path, directory):
  directory.mkdir()
  for file in epath.Path(path).iterdir():
    (directory / file.name).write_bytes(file.read_bytes())
  return directory


def names(bucket):
  return {name.partition('/')[0] for name in bucket.files()}


@pytest.mark.parametrize(
  'make',
  [
    forms.make_folder,
    forms.make_csv,
    forms.make_json_lines,
    forms.make_tar,
    forms.make_hugging_face,
  ],
)
def test_every_form_may_be_in_a_bucket(bucket, tmp_path, make):
  make(tmp_path / 'f')
  given = upload(tmp_path / 'f', f'{bucket.path}/f')
  summary = prepare(given, f'{bucket.path}/out', Options(validation_fraction=0))
  assert summary['records'] == {'train': forms.COUNT}
  assert not summary['rejected']
  assert names(bucket) == {'f', 'out'}
  found = {
    key.rpartition('/')[2].zfill(3): (record['image'], record['caption'])
    for key, record in read_all(
      download(f'{bucket.path}/out', tmp_path / 'out')
    ).items()
  }
  assert found == forms.EXPECTED


def test_what_is_done_is_not_done_again(bucket, tmp_path, monkeypatch):
  (tmp_path / 'f').mkdir()
  for i in range(3):
    write_tar(tmp_path / 'f' / f'{i}.tar', good_files(6) | {'x.txt': b'x'})
  monkeypatch.setattr(tfds_writer, '_RECORDS_PER_SHARD', 10)
  options = Options(validation_fraction=0.3)
  prepare(str(tmp_path / 'f'), str(tmp_path / 'whole'), options)
  given = upload(tmp_path / 'f', f'{bucket.path}/f')
  output = f'{bucket.path}/out'
  with monkeypatch.context() as patch:
    patch.setattr(files, 'write_text', fail_on('000002.json'))
    with pytest.raises(KeyboardInterrupt):
      prepare(given, output, options)
  assert names(bucket) == {'f', f'out{folders.UNFINISHED}'}
  converted, convert = [], conversion._convert
  monkeypatch.setattr(
    conversion,
    '_convert',
    lambda options, job: converted.append(job[1].name) or convert(options, job),
  )
  # Killed once more, while the parts become the data set.
  with monkeypatch.context() as patch:
    patch.setattr(files, 'write_text', fail_on('summary.json'))
    with pytest.raises(KeyboardInterrupt):
      prepare(given, output, options)
  assert 'out/dataset_info.json' not in bucket.files()
  prepare(given, output, options)
  assert converted == ['000002.json']
  assert names(bucket) == {'f', 'out'}
  whole = contents(tmp_path / 'whole')
  assert contents(download(output, tmp_path / 'out')) == whole
  with pytest.raises(ValueError, match=f'--output={output} exists: remove it'):
    prepare(given, output, options)
  with pytest.raises(ValueError, match='/f exists: remove it'):
    prepare(given, given, options)
  with pytest.raises(ValueError, match='Mount it with gcsfuse'):
    sources.open_source(output, 'train')


def test_an_outage_of_the_input_makes_no_rejects(bucket, tmp_path, monkeypatch):
  async def sleep(seconds):
    del seconds

  monkeypatch.setattr(
    gcsfs.retry,
    'asyncio',
    types.SimpleNamespace(**vars(gcsfs.retry.asyncio) | {'sleep': sleep}),
  )
  for name, make in (
    ('tar', forms.make_tar),
    ('txt', forms.make_folder),
    ('parquet', forms.make_hugging_face),
    ('jsonl', forms.make_json_lines),
  ):
    make(tmp_path / name)
    given = upload(tmp_path / name, f'{bucket.path}/{name}')
    output = f'{bucket.path}/out-{name}'
    with (
      bucket.failing(f'/download/.*{name}/', status=503),
      pytest.raises(
        (remote_reads.Unavailable, OSError), match=f'(?=.*{name}/).*503'
      ),
    ):
      prepare(given, output)
    summary = prepare(given, output)
    assert not summary['rejected']
    assert sum(summary['records'].values()) == forms.COUNT


def test_what_is_no_input_is_named(bucket):
  for given, message in (
    ('gs://not-there/*.tar', 'there is no bucket not-there: create it'),
    ('gs://not-there/f', 'there is no bucket not-there: create it'),
    (f'{bucket.path}/f', 'does not exist'),
    (f'{bucket.path}/*.tar', 'matches no file'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      prepare(given, f'{bucket.path}/out')
    assert '\n' not in str(caught.value)


def test_the_next_step_is_to_mount_the_bucket():
  summary = {'tars': 1, 'records': {'train': 100}, 'rejected': {}}
  text = prepare_data.describe(summary, 'gs://name/sets/mine')
  assert 'Mount the bucket with gcsfuse' in text
  assert text.endswith('--config.data.path=/mnt/name/sets/mine')
