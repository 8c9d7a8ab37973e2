"""Features of images on a mesh, their cache, and folders of images."""

import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from mdm_jax.eval import clip, fid
from mdm_jax.inference import feature_extractors, references
from mdm_jax.interop import torch_checkpoint
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


def test_other_weights_are_named(tmp_path, mesh):
  path = tmp_path / 'resnet.pth'
  torch_checkpoint.write_state_dict(path, {'layer1.weight': np.zeros(3)})
  with pytest.raises(
    ValueError, match='resnet.pth: .* another network: fc.weight is missing'
  ):
    feature_extractors.Inception(path, 2, mesh)


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


@pytest.mark.parametrize('case', [*UNREADABLE, 'cut', 'another'])
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


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_cached_file_is_read_or_refused(make_sample, tmp_path, count):
  references.cached(tmp_path, {}, make_sample)
  (path,) = tmp_path.iterdir()
  whole, harmed = path.read_bytes(), tmp_path / 'harmed.npz'

  def read(data):
    harmed.write_bytes(data)
    references._read(harmed, '{}')

  fuzzing.check(
    read,
    lambda rng: fuzzing.damage(whole, rng),
    count,
    refuses=references._DAMAGED,
  )


def write(directory, *sizes):
  for i, size in enumerate(sizes):
    Image.new('RGB', size, (i, 0, 0)).save(directory / f'{i}.png')


def test_folder(tmp_path):
  write(tmp_path, *[(6, 4)] * 5)
  Image.new('L', (6, 4), 7).save(tmp_path / '5.jpg')
  (tmp_path / 'samples.jsonl').write_text('')
  folder = feature_extractors.ImageFolder(tmp_path)
  batches = list(folder.batches(4))
  assert len(folder) == 6
  assert [batch.shape for batch in batches] == [(4, 4, 6, 3), (2, 4, 6, 3)]
  assert [batch[0, 0, 0, 0] for batch in batches] == [0, 4]
  assert list(batches[1][1, 0, 0]) == [7, 7, 7]
  before = folder.fingerprint()
  Image.new('RGB', (6, 4), (99, 0, 0)).save(tmp_path / '3.png')
  assert folder.fingerprint() != before


def test_bad_folders(tmp_path):
  with pytest.raises(FileNotFoundError, match='has no images'):
    feature_extractors.ImageFolder(tmp_path)
  write(tmp_path, (6, 4), (6, 4), (6, 5))
  with pytest.raises(ValueError, match=r'2.png has \(5, 6\) pixels, the first'):
    list(feature_extractors.ImageFolder(tmp_path).batches(2))
  (tmp_path / '1.png').write_text('no image')
  with pytest.raises(ValueError, match='1.png cannot be read'):
    list(feature_extractors.ImageFolder(tmp_path).batches(2))
