"""Features of images on a mesh, their cache, and folders of images."""

import io
import pathlib
import subprocess

from absl import logging
import jax
import numpy as np
from PIL import Image
import pytest

from mdm_jax.builders.stage import make_stage
from mdm_jax.eval import clip, fid
from mdm_jax.inference import feature_extractors, references
from mdm_jax.interop import torch_checkpoint
from mdm_jax.report.sample_directory import SampleDirectory
from mdm_jax.runtime import sharding
from tests import fuzzing
from tests.runtime.test_files import UNREADABLE

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'eval'


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(
    {'data': 2, 'fsdp': 1, 'spatial': 1}, jax.devices()[:2]
  )


def test_inception_equals_pytorch(tmp_path, mesh, inception_weights):
  images = (
    np.random.default_rng(0)
    .integers(0, 256, (2, 4, 5, 3), np.uint8)
    .repeat(8, 1)
    .repeat(8, 2)
  )
  path = tmp_path / 'inception.pth'
  torch_checkpoint.write_state_dict(path, inception_weights)
  network = feature_extractors.Inception(path, 2, mesh)
  with np.load(DATA / 'inception.npz') as golden:
    # Features have a mean of 0.28, and differ by 0.03 between the two images.
    np.testing.assert_allclose(
      network.encode(images), golden['features'], rtol=0, atol=1e-5
    )
  np.testing.assert_allclose(
    network.encode(images[1:]), network.encode(images)[1:], atol=1e-6
  )


@pytest.mark.parametrize('frames, side', [(16, 20), (9, 6)])
def test_i3d_equals_pytorch(tmp_path, mesh, i3d_weights, frames, side):
  rng = np.random.default_rng(0)
  clips = {
    count: rng.integers(0, 256, (2, count, size, size, 3), np.uint8)
    for count, size in ((16, 20), (9, 6))
  }[frames]
  path = tmp_path / 'i3d.pt'
  torch_checkpoint.write_state_dict(path, i3d_weights)
  network = feature_extractors.I3D(path, 2, mesh)
  with np.load(DATA / 'i3d.npz') as golden:
    # Logits have a deviation of 1, and differ by 0.03 between the two clips.
    np.testing.assert_allclose(
      network.encode(clips), golden[f'logits_{frames}'], rtol=0, atol=2e-5
    )


def test_the_frames_of_clips_are_images():
  network = feature_extractors.Inception.__new__(feature_extractors.Inception)
  network.width = 3
  network._apply = lambda images: images.mean((1, 2))
  clips = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 5, 3), np.uint8)
  assert network.num_rows(clips.shape[1:]) == 4
  assert network.num_rows((5, 5, 3)) == 1
  np.testing.assert_allclose(
    network.encode(clips), clips.reshape(8, 5, 5, 3).mean((1, 2))
  )


def test_other_weights_are_named(tmp_path, mesh):
  path = tmp_path / 'resnet.pth'
  torch_checkpoint.write_state_dict(path, {'layer1.weight': np.zeros(3)})
  with pytest.raises(
    ValueError, match='resnet.pth: .* another network: fc.weight is missing'
  ):
    feature_extractors.Inception(path, 2, mesh)


def test_inception_is_a_file(tmp_path, mesh):
  with pytest.raises(ValueError, match='is a directory: give the file in it'):
    feature_extractors.Inception(tmp_path, 2, mesh)


def test_clip_scores_equal_pytorch(clip_directory, mesh):
  """Images are wider, higher and smaller than the 24 px of the encoder."""
  rng = np.random.default_rng(0)
  images = [
    rng.integers(0, 256, (*size, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for size in ((9, 13), (16, 11), (3, 3))
  ]
  captions = clip_directory.captions[:3]
  expected = clip.scores(clip_directory.images, clip_directory.text[:3])
  assert expected.max() > 1 and expected.std() > 1
  # Fewer than its batch, which is filled up.
  network = feature_extractors.Clip(clip_directory.path, 4, mesh)
  found = [
    network.scores(image[None], [caption])
    for image, caption in zip(images, captions)
  ]
  np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-3)
  np.testing.assert_allclose(
    network.scores(np.stack([images[2]] * 2), captions[1:]),
    clip.scores(clip_directory.images[[2, 2]], clip_directory.text[1:3]),
    atol=1e-3,
  )


@pytest.mark.parametrize(
  'file, content, message',
  [
    ('config.json', '{"model_type": "t5"}', "model_type is 't5': give a CLIP"),
    (
      'config.json',
      '{"model_type": "clip"}',
      r'weights do not fit: text_model.* is \(24,\), not \(2048,\)',
    ),
    ('vocab.json', '{"a": 0}', 'not those of CLIP'),
    ('vocab.json', '{"a": "0"}', 'does not number the tokens'),
    ('vocab.json', '[]', 'vocab.json is JSON, but no object'),
    ('vocab.json', '<html>', 'vocab.json is no JSON .* is a web page'),
    (
      'config.json',
      '{"model_type": "clip", "text_config": 7}',
      'text_config is 7: give a CLIP',
    ),
    (
      'config.json',
      '{"model_type": "clip", "vision_config": {"hidden_size": "768"}}',
      "width is '768': give a CLIP",
    ),
    (
      'config.json',
      '{"model_type": "clip", "vision_config": {"num_hidden_layers": 1e9}}',
      'num_layers is 1000000000.0: give a CLIP',
    ),
    ('merges.txt', None, 'merges.txt does not exist'),
  ],
)
def test_another_model_is_named(
  clip_directory, tmp_path, mesh, file, content, message
):
  for path in clip_directory.path.iterdir():
    if path.name != file:
      (tmp_path / path.name).symlink_to(path)
    elif content:
      (tmp_path / file).write_text(content)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    feature_extractors.Clip(tmp_path, 4, mesh)


def test_cache_makes_each_sample_once(tmp_path):
  made = []

  def make():
    made.append(fid.Sample(3, 5, 2))
    made[-1].add(np.random.default_rng(len(made)).standard_normal((5, 3)))
    return made[-1]

  first = references.cached(tmp_path / 'new', {'seed': 1}, make)
  again = references.cached(tmp_path / 'new', {'seed': 1}, make)
  assert len(made) == 1
  np.testing.assert_array_equal(again.rows, first.rows)
  np.testing.assert_array_equal(
    again.statistics.scatter, first.statistics.scatter
  )
  references.cached(tmp_path / 'new', {'seed': 2}, make)
  assert len(made) == 2


def test_the_cache_is_of_the_images_that_can_be_used(
  make_config, flowers, tmp_path
):
  class Corners(feature_extractors.FeatureNetwork):
    name, width, fingerprint = 'corners', 3, {}

    def __init__(self):
      pass

    def encode(self, batch):
      return batch[:, 0, 0].astype(float)

  config = make_config()
  config.data.update(name='tfds:flowers', path=str(flowers))
  config.text.update(encoder='label', num_classes=3)
  for most, count in ((1000, 7), (27 * 20, 4)):
    config.data.max_pixels = most
    sample, settings = references.of_split(
      make_stage(config, 0), Corners(), 'train', 9, str(tmp_path / 'cache')
    )
    assert sample.statistics.count == count
    assert (settings['label'], 'caption' in settings) == ('label', False)


@pytest.fixture
def make_sample():
  """Makes the features of five images, and counts."""
  made = []

  def make():
    made.append(fid.Sample(3, 5, 2))
    made[-1].add(np.ones((5, 3)))
    return made[-1]

  make.made = made
  return make


@pytest.mark.parametrize('case', [*UNREADABLE, 'cut', 'another', 'text', 'nan'])
def test_a_damaged_cache_is_made_anew(
  make_sample, tmp_path, monkeypatch, caplog, case
):
  references.cached(tmp_path, {}, make_sample)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  path.unlink()
  monkeypatch.chdir(tmp_path)
  if case == 'cut':
    path.write_bytes(whole[:-100])
  elif case in ('text', 'nan'):
    arrays = dict(np.load(io.BytesIO(whole)))
    np.savez(
      path, **arrays | {'count': np.array({'text': b''}.get(case, np.nan))}
    )
  elif case == 'another':
    references.cached(tmp_path, {'seed': 1}, make_sample)
    next(tmp_path.iterdir()).rename(path)
    make_sample.made.pop()
  else:
    UNREADABLE[case][0](path)
  is_there = path.exists()
  for _ in range(2):
    found = references.cached(tmp_path, {}, make_sample)
    assert found.rows.tolist() == [[1.0] * 3] * 2
  assert len(make_sample.made) == 2
  assert (f'{path.name} is damaged (' in caplog.text) == is_there


def some_sample():
  sample = fid.Sample(3, 5, 2)
  sample.add(np.ones((5, 3)))
  return sample


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_cache_is_read_or_made_again(count, tmp_path, monkeypatch):
  references.cached(tmp_path, {}, some_sample)
  (path,) = tmp_path.iterdir()
  data = path.read_bytes()

  def read(damaged):
    path.write_bytes(damaged)
    found = references.cached(tmp_path, {}, some_sample)
    assert found.statistics.mean.shape == (3,)

  monkeypatch.setattr(logging, 'warning', lambda *given: None)
  fuzzing.check(read, lambda rng: fuzzing.damage(data, rng), count, refuses=())


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path):
  (tmp_path / 'file').write_text('')
  for place in (None, tmp_path / 'file', tmp_path / 'file' / 'below'):
    found = references.cached(place, {}, some_sample)
    np.testing.assert_array_equal(found.rows, some_sample().rows)


def write(directory, *sizes):
  for i, size in enumerate(sizes):
    Image.new('RGB', size, (i, 0, 0)).save(directory / f'{i}.png')


def test_folder(tmp_path):
  write(tmp_path, *[(6, 4)] * 5)
  Image.new('L', (6, 4), 7).save(tmp_path / '5.jpg')
  folder = feature_extractors.ImageFolder(tmp_path)
  batches = list(folder.batches(4))
  assert len(folder) == 6
  assert [batch.shape for batch in batches] == [(4, 4, 6, 3), (2, 4, 6, 3)]
  assert [batch[0, 0, 0, 0] for batch in batches] == [0, 4]
  assert list(batches[1][1, 0, 0]) == [7, 7, 7]
  before = folder.fingerprint()
  Image.new('RGB', (6, 4), (99, 0, 0)).save(tmp_path / '3.png')
  again = feature_extractors.ImageFolder(tmp_path)
  assert again.fingerprint() != before


def test_folders_are_read_to_the_bottom_without_what_systems_leave(
  tmp_path, caplog
):
  for name in ('b/1', 'b/10', 'a', '.ipynb_checkpoints', '__MACOSX/a'):
    (tmp_path / name).mkdir(parents=True)
  for level, name in enumerate(('c.png', 'a/z.png', 'b/1/x.png', 'b/10/x.png')):
    Image.new('RGB', (6, 4), (level, 0, 0)).save(tmp_path / name)
  for name in ('.DS_Store', 'a/._z.png', '__MACOSX/a/z.png', 'Thumbs.db'):
    (tmp_path / name).write_bytes(b'\0\5\x16\7')
  Image.new('RGB', (99, 4)).save(tmp_path / '.ipynb_checkpoints' / 'c.png')
  (tmp_path / 'folder.png').mkdir()
  (tmp_path / 'list.txt').write_text('words')
  with caplog.at_level('INFO', logger='absl'):
    folder = feature_extractors.ImageFolder(tmp_path)
  assert '4 images, with those in subdirectories' in caplog.text
  (batch,) = folder.batches(9)
  assert batch[:, 0, 0, 0].tolist() == [1, 2, 3, 0]


def test_large_images_are_used(tmp_path):
  Image.new('1', (7680, 4320)).save(tmp_path / '8k.png')
  (batch,) = feature_extractors.ImageFolder(tmp_path, 8).batches(1)
  assert batch.shape == (1, 8, 8, 3)


def test_links_to_directories_are_followed_once(tmp_path):
  for level, name in enumerate(('a/x.png', 'set/y.png', 'set/b/z.png')):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (6, 4), (level, 0, 0)).save(path)
  folder = tmp_path / 'set'
  (folder / 'a').symlink_to(tmp_path / 'a')
  (folder / 'b' / 'circle').symlink_to(folder)
  (folder / 'dangling').symlink_to(tmp_path / 'nothing')
  (batch,) = feature_extractors.ImageFolder(folder).batches(9)
  assert batch[:, 0, 0, 0].tolist() == [0, 2, 1]


def sampled(directory, count):
  records = [{'prompt': 'a', 'seed': i} for i in range(count)]
  samples = SampleDirectory(directory, records)
  for i in range(count):
    levels = [np.full((size, size, 3), i % 256, np.uint8) for size in (4, 8)]
    samples.add(i, levels, [levels, levels] if i == 1 else None)
  samples.finish({})


@pytest.mark.parametrize('count', [3, 1001])
def test_samples_are_read_at_their_finest_level(tmp_path, caplog, count):
  sampled(tmp_path, count)
  assert (tmp_path / 'grid.png').exists()
  with caplog.at_level('INFO', logger='absl'):
    folder = feature_extractors.ImageFolder(tmp_path)
  assert f'{count} images, the finest level of each sample' in caplog.text
  batches = np.concatenate(list(folder.batches(400)))
  assert batches.shape == (count, 8, 8, 3)
  assert batches[:, 7, 7, 0].tolist() == [i % 256 for i in range(count)]


def test_samples_of_several_machines_are_read_at_their_finest_level(tmp_path):
  for name in ('x/b', 'x/a'):
    sampled(tmp_path / name, 3)
  Image.new('RGB', (8, 8)).save(tmp_path / 'x' / 'another.png')
  folder = feature_extractors.ImageFolder(tmp_path)
  (images,) = folder.batches(9)
  assert images[:, 7, 7, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_networks_multiply_exactly(mesh):
  """On every device, as references of one may be used on another."""
  found = []

  def network(params, x):
    found.append(jax.config.jax_default_matmul_precision)
    return x

  feature_extractors._jit(network, {}, 8, mesh)(np.zeros((3, 2), np.float32))
  assert found == ['float32']


def test_samples_that_are_missing_or_cut_off(tmp_path):
  sampled(tmp_path, 3)
  lines = tmp_path / 'samples.jsonl'
  with lines.open('a') as file:
    file.write('{"index": 3, "promp')  # Killed while writing.
  assert len(feature_extractors.ImageFolder(tmp_path)) == 3
  (tmp_path / '0001_8.png').unlink()
  with pytest.raises(FileNotFoundError, match='0001_8.png, which samples.json'):
    feature_extractors.ImageFolder(tmp_path)
  lines.write_text('{"index": 0}\n')
  with pytest.raises(ValueError, match='samples.jsonl: line 1 is damaged'):
    feature_extractors.ImageFolder(tmp_path)
  lines.write_text('')
  with pytest.raises(FileNotFoundError, match='has no images'):
    feature_extractors.ImageFolder(tmp_path)


def test_images_of_any_size_at_one_resolution(tmp_path):
  write(tmp_path, (6, 4), (40, 30), (8, 8))
  Image.new('RGBA', (9, 7), (0, 0, 0, 0)).save(tmp_path / '3.webp')
  with pytest.raises(ValueError, match=r'1.png has 40 x 30 .* --resolution'):
    feature_extractors.ImageFolder(tmp_path)
  folder = feature_extractors.ImageFolder(tmp_path, 8)
  (batch,) = folder.batches(4)
  assert batch.shape == (4, 8, 8, 3)
  assert batch[:, 0, 0, 0].tolist() == [0, 1, 2, 255]
  # A large JPEG counts as it is decoded.
  Image.new('RGB', (8000, 4000)).save(tmp_path / '4.jpg')
  folder = feature_extractors.ImageFolder(tmp_path, 8)
  assert list(folder.batches(5))[0].shape == (5, 8, 8, 3)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
showpage
"""


def test_bad_folders(tmp_path, monkeypatch):
  def start(*arguments, **_):
    raise AssertionError(f'{arguments} is started')

  monkeypatch.setattr(subprocess, 'Popen', start)
  with pytest.raises(FileNotFoundError, match='has no images'):
    feature_extractors.ImageFolder(tmp_path)
  write(tmp_path, (6, 4), (6, 4), (6, 5))
  with pytest.raises(ValueError, match=r'2.png has 6 x 5 pixels, the first'):
    feature_extractors.ImageFolder(tmp_path)
  (tmp_path / '2.png').unlink()
  data = (tmp_path / '1.png').read_bytes()
  for content, reason in [
    (EPS, 'not an image'),
    (b'no image', 'not an image'),
    (b'', 'not an image'),
    (data[:20], 'damaged image'),
    (data[:50], 'damaged image'),
  ]:
    (tmp_path / '1.png').write_bytes(content)
    for resolution in (None, 8):
      with pytest.raises(
        ValueError, match=f'1.png: {reason} .*remove the file'
      ):
        list(feature_extractors.ImageFolder(tmp_path, resolution).batches(2))
