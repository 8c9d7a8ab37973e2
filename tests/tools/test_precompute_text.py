"""Features that are computed once are those of the encoder, or are refused."""

import io
import json
import pathlib
import pickle
import shutil

from etils import epath
import numpy as np
from PIL import Image
import pytest

from configs import common
from mdm_jax.builders.check import check
from mdm_jax.builders.config import stage_directory
from mdm_jax.builders.data import make_source
from mdm_jax.builders.prompts import encode_prompts
from mdm_jax.builders.stage import make_stage
from mdm_jax.builders.text import empty_text, make_tokenizer
from mdm_jax.checkpoint import restore
from mdm_jax.data import pipeline, precomputed, tar_index
from mdm_jax.data.images import BadRecord, DataError, ExcludedRecord
from mdm_jax.data.transforms import Transform
from mdm_jax.inference import references
from mdm_jax.inference.session import open_run
from mdm_jax.runtime import sharding
from mdm_jax.tools import precompute_text, prepare_data
from tests import toy
from tests.tools.test_prepare_data import write_tar

# 8 to about 50 tokens.
CAPTIONS = ['a red ring ' * (2 * i % 14) + f'number {i}' for i in range(20)]
MAX_LENGTH = 40


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Twenty captioned images, two of them for validation."""
  path = tmp_path_factory.mktemp('data')
  files = {}
  for i, caption in enumerate(CAPTIONS):
    image = io.BytesIO()
    Image.new('RGB', (16, 16), (9 * i, 50, 90)).save(image, 'PNG')
    files[f'{i:02}.png'] = image.getvalue()
    files[f'{i:02}.txt'] = caption.encode()
  write_tar(path / 'some.tar', files)
  prepare_data.prepare(
    f'{path}/*.tar',
    str(path / 'set'),
    prepare_data.Options(validation_fraction=0.2),
  )
  return path / 'set'


def make_config(data, t5):
  config = common.get_config()
  config.model.levels = [common.level(8)]
  config.stages = [common.stage('8', 1)]
  config = toy.shrink(common.smoke(config))
  config.data.update(name='captioned_images', path=str(data))
  config.text.update(
    encoder='t5',
    path=str(t5),
    tokenizer_rules='release',
    max_length=MAX_LENGTH,
    padding='longest',
  )
  config.model.text.masked_attention = False
  config.stages[0].update(steps=2, batch_size=8)
  config.eval.update(num_prompts=8, batch_size=8)
  return config.lock()


@pytest.fixture(scope='module', autouse=True)
def small_files():
  """Several files of a split, whose last batch is not full."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(precompute_text, 'SHARD_SIZE', 6)
    yield


@pytest.fixture(scope='module')
def made(prepared, t5_directory, tmp_path_factory):
  """The config of a data set that has its features."""
  data = tmp_path_factory.mktemp('made') / 'set'
  shutil.copytree(prepared, data)
  config = make_config(data, t5_directory.path)
  precompute_text.precompute(config, batch_size=8)
  config.text.encoder = 'precomputed'
  return config


@pytest.fixture
def copied(made, tmp_path):
  """One that a test may spoil."""
  config = made.copy_and_resolve_references()
  config.data.path = str(tmp_path / 'set')
  shutil.copytree(made.data.path, config.data.path)
  return config


def contents(config):
  directory = precomputed.text_directory(config.data.path)
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def records(config, split='train'):
  source = pickle.loads(pickle.dumps(make_source(config, split, 8)))
  return [source[i] for i in range(len(source))]


def mesh_of(config):
  return sharding.make_mesh(config.mesh)


def test_features_are_the_encoders(made, t5_directory):
  tokenizer = make_tokenizer(made, of_captions=True)
  check(made, mesh_of(made))
  lengths = set()
  for split in ('train', 'validation'):
    for record in records(made, split):
      tokens = tokenizer.encode(record['caption'])
      expected, mask = t5_directory.encode(tokens[None])
      text = record['text'].astype(np.float32)
      assert text.shape == (MAX_LENGTH, 40)
      # Half a unit in the last of bfloat16's 8 bits.
      np.testing.assert_allclose(text, expected[0], rtol=2**-8, atol=1e-5)
      assert ((text != 0).any(-1) == mask[0]).all()
      lengths.add(int(mask.sum()))
  # Of both compiled lengths, and a caption that was cut.
  assert min(lengths) < 32 and MAX_LENGTH in lengths
  # Not the empty caption, which has a space more.
  prompts = make_tokenizer(made)
  assert prompts.count('') < tokenizer.count('')
  empty, mask = t5_directory.encode(prompts.encode('')[None])
  np.testing.assert_allclose(empty_text(made), empty[0], rtol=2**-8, atol=1e-5)


def test_only_what_is_missing_is_made(copied):
  before = contents(copied)
  directory = pathlib.Path(precomputed.text_directory(copied.data.path))
  names = sorted(name for name in before if name.startswith('train'))
  assert len(names) == 3
  (directory / names[1]).unlink()
  # What a killed run leaves.
  (directory / f'{names[1]}.tmp').write_bytes(b'half of it')
  times = {
    path.name: path.stat().st_mtime_ns
    for path in directory.glob('*.array_record')
  }
  with pytest.raises(FileNotFoundError, match=f'lacks 1 of.*{names[1]}.*again'):
    check(copied, mesh_of(copied))
  precompute_text.precompute(copied, batch_size=8)
  assert contents(copied) == before
  assert (
    times.items()
    <= {
      path.name: path.stat().st_mtime_ns
      for path in directory.glob('*.array_record')
    }.items()
  )


def test_machines_share_the_work(made, copied):
  shutil.rmtree(precomputed.text_directory(copied.data.path))
  precompute_text.precompute(copied, batch_size=8, part='1/2')
  assert 'empty.npy' not in contents(copied)
  precompute_text.precompute(copied, batch_size=8, part='0/2')
  assert contents(copied) == contents(made)


def test_a_data_set_in_a_bucket_has_the_same(
  made, prepared, bucket, monkeypatch
):
  config = made.copy_and_resolve_references()
  config.text.encoder = 't5'
  config.data.path = f'{bucket.path}/set'
  for file in prepared.iterdir():
    (epath.Path(config.data.path) / file.name).write_bytes(file.read_bytes())
  write, written = precompute_text._write_records, []

  def write_two(file, records):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(file.name)
    write(file, records)

  with monkeypatch.context() as patch:
    patch.setattr(precompute_text, '_write_records', write_two)
    with pytest.raises(KeyboardInterrupt):
      precompute_text.precompute(config, batch_size=8)
  bucket.requests.clear()
  precompute_text.precompute(config, batch_size=8)
  assert contents(config) == contents(made)
  # Each file with captions that were missing is read once.
  read = [
    x for x in bucket.requests if 'GET /download' in x and '/set/cap' in x
  ]
  assert 0 < len(read) == len(set(read))
  config.text.encoder = 'precomputed'
  with pytest.raises(ValueError, match='Mount it with gcsfuse'):
    check(config, mesh_of(config))


def example_batches(config):
  return list(
    pipeline.make_dataset(
      make_source(config, 'train', 8),
      transform=Transform(make_tokenizer(config, of_captions=True), 8),
      batch_size=8,
      seed=0,
      shuffle=True,
      num_batches=4,
    )
  )


@pytest.fixture
def of_tars(made, prepared, tmp_path, bucket):
  """The configs of an index of tars with features, on a disk, in a bucket."""
  tar = epath.Path(bucket.path) / 'some.tar'
  tar.write_bytes((prepared.parent / 'some.tar').read_bytes())
  configs = []
  for given, output in (
    (f'{prepared.parent}/some.tar', f'{tmp_path}/index'),
    (str(tar), f'{bucket.path}/index'),
  ):
    tar_index.write_index([given], output, 0.2)
    config = made.copy_and_resolve_references()
    config.data.update(name='tars', path=output)
    precompute_text.precompute(config, batch_size=8)
    configs.append(config)
  return configs


def test_features_beside_tars_are_the_same(made, of_tars, bucket):
  local, remote = of_tars
  assert contents(local) == contents(remote)
  texts = [record['text'] for record in records(made)]
  bucket.requests.clear()
  for config in of_tars:
    check(config, mesh_of(config))
    np.testing.assert_array_equal(
      [record['text'] for record in records(config)], texts
    )
    np.testing.assert_array_equal(empty_text(config), empty_text(made))
  bucket.requests.clear()
  for one, other in zip(example_batches(remote), example_batches(local)):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  read = [x for x in bucket.requests if x.startswith('GET /download')]
  assert sum('.tar?' in x for x in read) == 4 * 8
  # The beginning of each of the files, and the records.
  assert sum('.features?' in x for x in read) == 3 + 4 * 8


def test_damaged_features_beside_tars_are_named(of_tars, bucket):
  local, remote = of_tars
  for config in of_tars:
    directory = precomputed.text_directory(config.data.path)
    path = directory / 'train-00001-of-00003.features'
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    bad = []
    source = make_source(config, 'train', 8)
    for i in range(len(source)):
      try:
        source[i]
      except BadRecord as error:
        bad.append((i, error.reason, error.detail))
    assert bad == [(11, 'damaged text features', 'wrong checksum')]
    path.write_bytes(data[:-9])
    with pytest.raises(BadRecord, match='features .the file ends before byte'):
      make_source(config, 'train', 8)[11]
    path.write_bytes(bytes(8) + data[8:])
    with pytest.raises(
      DataError, match='00001-of-00003.features is damaged: r'
    ):
      make_source(config, 'train', 8)[0]
    path.write_bytes(data[:20])
    with pytest.raises(DataError, match='features cannot be read: the file e'):
      make_source(config, 'train', 8)[0]
    path.unlink()
    with pytest.raises(
      FileNotFoundError, match='lacks 1 of its files, such as'
    ):
      check(config, mesh_of(config))
    precompute_text.precompute(config, batch_size=8)
    assert len(records(config)) == len(source)
  with (
    bucket.failing('features.alt', status=403, body=b'no access'),
    pytest.raises(DataError, match='features cannot be read .no permission'),
  ):
    records(remote)


def test_another_batch_size_and_dtype(made, copied):
  shutil.rmtree(precomputed.text_directory(copied.data.path))
  precompute_text.precompute(copied, batch_size=16, storage='float16')
  for one, other in zip(records(made), records(copied), strict=True):
    assert other['text'].dtype == np.float16
    np.testing.assert_allclose(
      other['text'], one['text'].astype(np.float32), rtol=2**-8, atol=1e-5
    )


def test_what_was_made_with_something_else_is_refused(
  copied, t5_directory, tmp_path
):
  copied.text.max_length = 32
  with pytest.raises(ValueError, match='max_length 40 instead of 32'):
    check(copied, mesh_of(copied))
  with pytest.raises(ValueError, match='max_length 40 instead of 32'):
    precompute_text.precompute(copied, batch_size=8)
  copied.text.max_length = MAX_LENGTH
  copied.text.tokenizer_rules = 'sentencepiece'
  with pytest.raises(ValueError, match='tokenizer [0-9a-f]+ release instead'):
    check(copied, mesh_of(copied))
  copied.text.tokenizer_rules = 'release'
  with pytest.raises(ValueError, match='bfloat16.* asked for.*float16'):
    precompute_text.precompute(copied, batch_size=8, storage='float16')

  # One number of one weight.
  other = tmp_path / 't5'
  shutil.copytree(t5_directory.path, other)
  weights = other / 'model.safetensors'
  data = bytearray(weights.read_bytes())
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  offset = header['encoder.final_layer_norm.weight']['data_offsets'][0]
  data[start + offset] ^= 1
  weights.write_bytes(data)
  copied.text.path = str(other)
  with pytest.raises(ValueError, match='encoder [0-9a-f]+ instead of') as error:
    check(copied, mesh_of(copied))
  assert 'precompute_text' in str(error.value)
  assert ', tokenizer' not in str(error.value)


def test_features_of_another_data_set_are_refused(copied):
  directory = precomputed.text_directory(copied.data.path)
  first, second = sorted(directory.glob('train*'))[:2]
  shutil.copy(second, first)
  with pytest.raises(
    BadRecord, match='some/.*: text features of another caption .*: remove|run'
  ):
    make_source(copied, 'train', 8)[0]


def test_features_of_another_number_of_records_are_refused(copied):
  directory = precomputed.text_directory(copied.data.path)
  path = directory / 'info.json'
  info = json.loads(path.read_text())
  count = info['splits']['train']
  for splits, found in (({'train': 12}, 12), ({'validation': 3}, 0)):
    path.write_text(json.dumps(info | {'splits': splits}))
    for file in directory.glob('train-*-of-00003.array_record'):
      shutil.copy(file, str(file).replace('-of-00003', '-of-00002'))
    with pytest.raises(
      ValueError,
      match=f"/text has features of {found} captions of the split 'train', and "
      f'the data set has {count} records: remove it and run python -m',
    ):
      make_source(copied, 'train', 8)


def test_damaged_features_are_a_bad_record(copied):
  directory = precomputed.text_directory(copied.data.path)
  first = sorted(directory.glob('train*'))[0]
  data = bytearray(first.read_bytes())
  text = make_source(copied, 'train', 8)[2]['text']
  data[data.index(text[:2].tobytes()) + 3] ^= 1
  first.write_bytes(data)
  source = make_source(copied, 'train', 8)
  source[1]
  with pytest.raises(BadRecord, match='some/.*: damaged text features'):
    source[2]


def test_features_that_are_something_else_are_a_bad_record(made):
  """Their checksums are right."""
  source = make_source(made, 'train', 8)
  good, info = source._features[0], source.info
  size = info.width * precomputed.DTYPES[info.dtype].itemsize
  header, features = good[:-size], good[-size:]
  for data in (
    b'',
    good[:11],
    good[:-1],
    good + b'x',
    good[:-2],
    header + features * MAX_LENGTH,
    header + b'\xff' * size,
  ):
    source.__dict__['_features'] = [data]
    with pytest.raises(BadRecord, match='some/.*: damaged text features'):
      source[0]
  source.__dict__['_features'] = []
  with pytest.raises(BadRecord, match='some/.*: damaged text features'):
    source[0]
  source.__dict__['_features'] = [good]
  assert np.isfinite(source[0]['text']).all()


@pytest.mark.parametrize('junk', [b'', b'{}', b'[1]', b'\xff', b'{"width": 3}'])
def test_damaged_files_beside_the_features_are_named(copied, junk):
  directory = precomputed.text_directory(copied.data.path)
  (directory / 'empty.npy').write_bytes(junk)
  with pytest.raises(ValueError, match='empty.npy is damaged: remove it and'):
    precomputed.read_empty(copied.data.path)
  (directory / 'info.json').write_bytes(junk)
  with pytest.raises(ValueError, match='info.json is damaged: remove .*text'):
    precomputed.read_info(copied.data.path)


def test_a_bad_record_does_not_end_the_command():
  class Source:
    def __getitem__(self, index):
      if index == 2:
        raise BadRecord('some/2', 'damaged record')
      return {'caption': f'caption {index}'}

  assert precompute_text._captions(Source(), range(1, 4)) == [
    'caption 1',
    '',
    'caption 3',
  ]


def test_long_captions_are_left_out(made):
  config = made.copy_and_resolve_references()
  config.text.long_captions = 'leave_out'
  tokenizer = make_tokenizer(config, of_captions=True)
  source = make_source(config, 'train', 8)
  plain = Transform(tokenizer, 8, leave_out=True)
  left_out = 0
  for i, cut in enumerate(records(made)):
    rng = np.random.default_rng(0)
    if tokenizer.count(cut['caption']) <= MAX_LENGTH:
      np.testing.assert_array_equal(source[i]['text'], cut['text'])
      assert plain(source.source[i], rng)['text'].dtype == np.int32
      continue
    left_out += 1
    message = r'caption too long \(\d\d tokens, the'
    with pytest.raises(ExcludedRecord, match=message):
      source[i]
    with pytest.raises(ExcludedRecord, match=message):
      plain(source.source[i], rng)
  assert left_out
  # Which images are a reference does not depend on their captions.
  for encoder in ('precomputed', 'learned'):
    config.text.encoder = encoder
    stage = make_stage(config, 0)
    (batch,) = stage.make_dataset('train', num_batches=1)
    assert not batch['bad'].any()
    assert len(np.unique(batch['image'][:, 0, 0, 0])) < 8
    images = references.images_of_split(stage, 'train', len(source))
    colors = np.concatenate([*images])[:, 0, 0, 0]
    assert len(np.unique(colors)) == len(source)


def test_what_cannot_be_precomputed_is_named(made):
  config = made.copy_and_resolve_references()
  config.text.encoder = 'learned'
  with pytest.raises(ValueError, match="'learned' is trained with the network"):
    precompute_text.precompute(config, batch_size=8)
  for part in ('2/2', '1', '0/0'):
    with pytest.raises(ValueError, match=f'part={part}: give k/n'):
      precompute_text.precompute(made, batch_size=8, part=part)
  config.text.encoder = 'precomputed'
  config.data.name = 'shapes'
  with pytest.raises(ValueError, match="data.name='shapes': only a prepared"):
    check(config, mesh_of(config))


def test_features_that_overflow_are_refused(made):
  tokenizer = make_tokenizer(made)
  with pytest.raises(ValueError, match="'a' exceed float16: use --storage=bf"):
    precompute_text.encode_captions(
      ['a'],
      tokenizer,
      lambda tokens: np.full((*tokens.shape, 4), np.inf, np.float16),
      1,
    )


def test_training_reads_them_as_it_reads_t5(made, tmp_path):
  def run(config, workdir):
    toy.run(config, workdir)
    return [
      json.loads(line)['loss']
      for line in (workdir / 'metrics.jsonl').read_text().splitlines()
      if 'loss' in json.loads(line)
    ]

  stored = run(made, tmp_path / 'stored')
  config = made.copy_and_resolve_references()
  config.text.encoder = 't5'
  assert len(stored) == 1
  np.testing.assert_allclose(stored, run(config, tmp_path / 't5'), rtol=1e-3)
  directory = stage_directory(tmp_path / 't5', config, 0)
  for key in ('params', 'ema'):  # The frozen T5 is in no checkpoint.
    assert set(restore.abstract_item(directory, None, key)) == {'unet'}
  for name in ('stored', 't5'):
    assert (tmp_path / name / 'samples' / '8_2.png').exists()
    values = json.loads((tmp_path / name / 'eval' / '2.json').read_text())
    assert np.isfinite(values['held_out_loss_8'])

  # Anything can be drawn with what was trained on them.
  session = open_run(tmp_path / 'stored', any_prompt=True)
  model = session.restore()
  sample_fn = model.stage.make_sample_fn(model.mesh, model.params)
  (images,) = sample_fn(
    model.params, encode_prompts(session.config, ['a blue cross']), [0]
  )
  assert images.shape == (1, 8, 8, 3)
