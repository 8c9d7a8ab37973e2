"""Batches and prompts of a configuration."""

import shutil

import numpy as np
import pytest
import safetensors.numpy

from mdm_jax.builders.data import (
  batch_keys,
  current_name,
  data_fingerprint,
  held_out_split,
  loss_names,
  make_dataset,
  make_source,
  measured_index,
)
from mdm_jax.builders.prompts import encode_prompts, make_prompts
from mdm_jax.builders.text import empty_text
from mdm_jax.data import images, moving_shapes, pipeline, shapes, tar_index
from mdm_jax.data.text import CAPTIONS_MODEL
from mdm_jax.tools import prepare_data
from tests.tools.test_prepare_data import good_files, write_tar


@pytest.fixture
def config(make_config, flowers):
  """Configuration of a run on three classes of flowers."""
  config = make_config()
  config.data.update(
    name='tfds:flowers', path=str(flowers), validation_split='test'
  )
  config.text.update(encoder='label', num_classes=3)
  return config


def test_other_splits_of_a_tfds_data_set_are_refused(config):
  with pytest.raises(ValueError, match="splits train and validation.*'test'"):
    make_source(config, 'test', 8)


@pytest.mark.parametrize('encoder', ['t5', 'precomputed'])
def test_t5_may_move_but_not_change(
  make_config, t5_directory, tmp_path, encoder
):
  config = make_config()
  config.text.update(encoder=encoder, path=str(t5_directory.path))
  before = data_fingerprint(config)
  config.text.path = str(shutil.copytree(t5_directory.path, tmp_path / 't5'))
  assert data_fingerprint(config) == before
  file = tmp_path / 't5' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors['shared.weight'] = tensors['shared.weight'] + 1
  safetensors.numpy.save_file(tensors, file)
  changed = data_fingerprint(config)
  assert changed.pop('text_encoder') != before.pop('text_encoder')
  assert changed == before


def one_batch(config, resolutions, batch_sizes, split='train'):
  (batch,) = make_dataset(
    config,
    split,
    [(side, side, 3) for side in resolutions],
    batch_sizes,
    process_index=0,
    process_count=1,
    num_batches=1,
  )
  return batch


def test_files_are_not_measured_in_their_order(config, make_config):
  """The first of them may all be of one folder."""
  order = [measured_index(config, row, 1000) for row in range(1000)]
  assert sorted(order) == [*range(1000)]
  assert 300 < np.mean(order[:50]) < 700
  config.seed += 1  # Runs of other seeds compare.
  assert [measured_index(config, row, 1000) for row in range(50)] == order[:50]
  drawn = make_config()
  assert [measured_index(drawn, row, 5) for row in range(7)] == [
    *(0, 1, 2, 3, 4),
    *(0, 1),
  ]


def test_batches_of_a_tfds_data_set(config):
  values = one_batch(config, (16,), (7,))
  assert values['image'].shape == (7, 16, 16, 3)
  # Record i shows level i, and is of class i % 3.
  order = [measured_index(config, row, 7) for row in range(7)]
  assert values['image'][:, 8, 8, 0].tolist() == order
  assert values['text'].tolist() == [[2 + i % 3] for i in order]
  assert values['text'].dtype == np.int32
  assert not values['bad'].any()


def test_images_are_trained_on_beside_clips(make_config):
  config = make_config()
  config.data.update(name='moving_shapes', image_set='shapes', size=1000)
  config.text.tokenizer = str(CAPTIONS_MODEL)  # Each set has another default.
  shapes_of_levels, sizes = [(8, 8, 3), (4, 16, 16, 3)], (6, 4)

  def batch_of(split, sizes, shapes=shapes_of_levels, **options):
    dataset = make_dataset(
      config, split, shapes, sizes, process_index=0, process_count=1, **options
    )
    return next(iter(dataset))

  # Rows 2 and 5 are images; clips are those of a run without images.
  batch = batch_of('train', sizes)
  config.data.update(image_set='')
  np.testing.assert_array_equal(
    batch['image'], batch_of('train', (4, 4))['image']
  )
  config.data.update(name='shapes')
  expected = batch_of('train', (2,), [(8, 8, 3)])
  np.testing.assert_array_equal(batch['image_8'], expected['image'])
  np.testing.assert_array_equal(batch['text'][2::3], expected['text'])
  keys = batch_keys(config, [(8, 8, 3)], (2,), 0)
  config.data.update(name='moving_shapes', image_set='shapes')
  assert batch_keys(config, shapes_of_levels, sizes, 0)[2::3] == keys
  # What is measured are first frames of the clips.
  measured = batch_of('held_out', sizes, num_batches=1)
  config.data.update(image_set='')
  same = batch_of('held_out', sizes, num_batches=1)
  np.testing.assert_array_equal(measured['image_8'], same['image_8'])


def test_only_training_depends_on_the_images_beside_clips(make_config):
  config = make_config()
  config.data.update(name='moving_shapes')
  measured = data_fingerprint(config, training=False)
  assert data_fingerprint(config) == measured
  # Missing, and so never opened.
  config.data.update(image_set='tars', image_path='/missing')
  assert data_fingerprint(config, training=False) == measured
  with pytest.raises(FileNotFoundError):
    data_fingerprint(config)
  config.data.update(image_set='shapes', image_path='')
  versions = data_fingerprint(config)
  assert versions.pop('image_drawing') == shapes.VERSION
  assert versions == measured
  assert versions['drawing'] == moving_shapes.VERSION


def test_a_record_without_label_is_replaced(config):
  split = held_out_split(config)
  values = one_batch(config, (16,), (3,), split)
  assert values['text'].tolist() == [[4], [4], [4]]
  order = [measured_index(config, row, 3) for row in range(3)]
  assert values['bad'].tolist() == [index == 2 for index in order]


@pytest.mark.parametrize('split', ['', 'train'])
def test_losses_of_training_images_are_not_called_held_out(config, split):
  assert loss_names(config, ('8', '16')) == [
    'held_out_loss_8',
    'held_out_loss_16',
  ]
  assert current_name(config, 'held_out_loss_8') == 'held_out_loss_8'
  config.data.validation_split = split
  assert held_out_split(config) == 'train'
  assert loss_names(config, ('8', '16')) == [
    'train_split_loss_8',
    'train_split_loss_16',
  ]
  # The name that an older run has recorded.
  assert current_name(config, 'held_out_loss_16') == 'train_split_loss_16'
  assert current_name(config, 'accuracy_all') == 'accuracy_all'


def test_classes_of_shapes(config):
  config.data.name = 'shapes'
  config.text.num_classes = 6
  source = make_source(config, 'train', 8)
  for i in range(50):
    scene, _, _ = source.source.scene(i)
    first, *rest = scene.objects
    assert source[i]['text'] == [
      2
      + ['circle', 'square', 'triangle', 'star', 'ring', 'cross'].index(
        first.shape
      )
    ]
    assert all(first.x < other.x or first.y < other.y for other in rest)


def test_captions_of_a_tfds_data_set(config):
  config.text.encoder = 'learned'
  config.data.caption = 'label'
  with pytest.raises(ValueError, match="data.caption='label': flowers has no"):
    make_source(config, 'train', 8)


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'num_classes': 4},
      'text.num_classes=4, but tfds:flowers has 3 classes: '
      'set --config.text.num_classes=3',
    ),
    ({'name': 'shapes'}, 'text.num_classes=3, but shapes has 6 classes'),
    ({'label': 'kind'}, "data.label='kind': flowers has no such label, only"),
    (
      {'train_split': 'training'},
      "flowers has no split 'training', only: train, test",
    ),
  ],
)
def test_what_does_not_fit_is_named(config, changes, message):
  for key, value in changes.items():
    (config.data if key in config.data else config.text)[key] = value
  with pytest.raises(ValueError, match=message):
    make_source(config, 'train', 8)


def test_prompts_are_all_classes_and_need_no_data_set(config, tmp_path):
  config.data.path = 'nowhere'
  prompts = make_prompts(config, 6)
  assert prompts.captions == ['0', '0', '1', '1', '2', '2']
  assert prompts.text.tolist() == [[2], [2], [3], [3], [4], [4]]
  assert prompts.statements is None
  assert empty_text(config).tolist() == [1]
  (tmp_path / 'names').write_text('rose\ntulip\ndaisy\n')
  config.text.class_names = str(tmp_path / 'names')
  assert make_prompts(config, 2).captions == ['rose', 'tulip']
  assert encode_prompts(config, ['daisy', '0', '']).tolist() == [
    [4],
    [2],
    [1],
  ]


def test_more_classes_than_prompts(config):
  config.text.num_classes = 1000
  captions = make_prompts(config, 16).captions
  assert captions[:3] == ['0', '62', '125']
  assert captions[-1] == '937'


def test_a_mixed_batch_is_drawn_no_finer_than_it_is_seen(
  make_config, monkeypatch
):
  config = make_config()
  drawn = []
  draw = shapes.draw

  def count(scene, resolution):
    drawn.append(resolution)
    return draw(scene, resolution)

  monkeypatch.setattr(shapes, 'draw', count)
  # Of each four examples the finest level is 32 px for two, 16 px, and 8 px.
  batch = one_batch(config, (8, 16, 32), (8, 6, 4))
  assert sorted(drawn) == [8] * 2 + [16] * 2 + [32] * 4
  rows = {'image': [0, 1, 4, 5], 'image_16': [2, 6], 'image_8': [3, 7]}
  for name, resolution in (('image', 32), ('image_16', 16), ('image_8', 8)):
    plain = one_batch(config, (resolution,), (8,))
    np.testing.assert_array_equal(batch[name], plain['image'][rows[name]])
    np.testing.assert_array_equal(batch['text'], plain['text'])


def test_an_unmixed_batch_has_one_array_of_images(make_config):
  batch = one_batch(make_config(), (8, 16), (4, 4))
  assert sorted(batch) == ['bad', 'image', 'scale', 'text']
  assert batch['image'].shape == (4, 16, 16, 3)


def test_bad_records_are_no_prompts(make_config, tmp_path):
  files = good_files(4) | {'001.txt': b'caf\xe9'}
  write_tar(tmp_path / 's.tar', files)
  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  config = make_config()
  config.data.update(name='tars', path=f'{tmp_path}/index')
  order = [measured_index(config, row, 4) for row in range(4)]
  assert make_prompts(config, 4).captions == [
    f'picture {2 if index == 1 else index}' for index in order
  ]
  write_tar(tmp_path / 'b.tar', dict.fromkeys(['a.jpg', 'a.txt'], b'\0'))
  tar_index.write_index([f'{tmp_path}/b.tar'], f'{tmp_path}/bad', 0.0)
  config.data.path = f'{tmp_path}/bad'
  with pytest.raises(pipeline.DataError, match='100 records in a row are unus'):
    make_prompts(config, 1)


def test_the_largest_image_file_is_a_key(config):
  """Its default is that of prepare_data; flower i has 24 + i x 20 pixels."""
  default = config.data.max_pixels
  assert default == images.MAX_PIXELS == prepare_data.Options().max_pixels
  config.data.max_pixels = 27 * 20
  bad = one_batch(config, (16,), (7,))['bad'].tolist()
  order = [measured_index(config, row, 7) for row in range(7)]
  assert bad == [index > 3 for index in order]
