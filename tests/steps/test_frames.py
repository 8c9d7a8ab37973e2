"""The loss of images and clips in one batch, on any mesh."""

import types

import jax
import numpy as np
import pytest

from configs import common
from mdm_jax import mixed_batch
from mdm_jax.builders.data import make_dataset
from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import batch_sizes, make_objective
from mdm_jax.steps.objective import batch_losses, sample_noise
from mdm_jax.steps.sampler import Sampler, SamplerSpec
from tests import meshes


@pytest.fixture(scope='module')
def config():
  """8 px images inside of clips of 8 frames of 16 px."""
  config = common.get_config().unlock()
  config.data.update(name='moving_shapes', size=1000)
  config.text.update(max_length=32, width=16, num_layers=0, num_heads=2)
  config.model.text.update(width=16, num_heads=2)
  shared = {'temporal_dim': 16, 'num_heads': 2, 'num_groups': 4}
  config.model.levels = [
    common.level(
      8, channels=(8,), num_blocks=(0,), attention_layers=(0,), **shared
    ),
    common.level(
      16,
      frames=8,
      channels=(8, 8),
      num_blocks=(0, 0),
      attention_layers=(0, 0),
      frame_attention=(0, 1),
      **shared,
    ),
  ]
  config.stages = [
    common.stage(
      '8x16', 2, batch_size=16, mixed_ratio=(1.0, 1.0), frame_shift_power=1.0
    )
  ]
  return config


@pytest.fixture(scope='module')
def batch(config):
  (stage,) = config.stages
  (batch,) = make_dataset(
    config,
    'train',
    make_model(config, stage).image_shapes,
    batch_sizes(stage),
    process_index=0,
    process_count=1,
    num_batches=1,
  )
  return batch


def test_images_and_clips_are_of_their_examples(batch):
  assert batch['image'].shape == (8, 8, 16, 16, 3)
  assert batch['image_8'].shape == (8, 8, 8, 3)
  assert len(batch['text']) == 16


@pytest.fixture(scope='module')
def measure(config, batch, random_params):
  """Sizes of a mesh -> losses [B] and gradients, on the host."""
  (stage,) = config.stages
  model, objective = make_model(config, stage), make_objective(config, stage)
  params = random_params(model, config.text.max_length)

  def losses_of(params, batch):
    shapes = model.level_shapes
    t, eps = sample_noise(objective, shapes, batch, jax.random.key(3))
    return batch_losses(model, objective, params, batch, t, eps)[0]

  given = {key: batch[key] for key in ('image', 'image_8', 'text', 'scale')}
  return lambda *sizes: meshes.measure(
    losses_of, params, given, config.sharding_rules, meshes.make_mesh(*sizes)
  )


@pytest.fixture(scope='module')
def expected(measure):
  return measure(1, 1, 1)


# Frames lie along the last axis.
@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 1, 8)])
def test_meshes_equal_one_device(measure, expected, sizes):
  meshes.check_equal(measure(*sizes), expected)


def test_more_frames_have_more_noise(config):
  """By frame_shift_power, as a larger resolution has by shift_power."""
  (stage,) = config.stages
  schedule = make_objective(config, stage).schedule
  of_images, of_clips = schedule.log_snr(np.arange(1, 1001))
  ratio = np.exp(of_images - of_clips)
  np.testing.assert_allclose(ratio, 2**1.0 * 8**1.0, rtol=1e-3)


@pytest.mark.parametrize(
  'frames, parts, expected',
  [
    # A level of images, and others of 2 and 8 frames, of which 4 are repeated.
    ((1, 2, 8), 3, ([0], [0, 4, 8, 12], range(13))),
    # Of 3 frames in 6, whole ones are repeated.
    ((3, 6), 3, (range(0, 13, 2), range(13))),
    ((5,), 4, (range(13),)),
  ],
)
def test_parts_of_a_clip_are_joined(frames, parts, expected):
  spec = SamplerSpec('dpm', 2, 0, 1, 0, (0, 1), 'clip', frames=13)
  model = types.SimpleNamespace(
    image_shapes=[mixed_batch.example_shape(2, count) for count in frames]
  )
  sampler = Sampler(model, None, spec, None, 'v')
  assert sampler.parts.count == parts
  shift, of_parts = frames[-1] - sampler.parts.overlap, []
  for part in range(parts):
    levels = []
    for count, shape in zip(frames, model.image_shapes):
      # Each frame is filled with its time in the whole clip.
      times = part * shift + np.arange(0, frames[-1], frames[-1] // count)
      clip = np.broadcast_to(times[:, None, None, None], (count, *shape[-3:]))
      levels.append(clip.reshape(1, *shape))
    of_parts.append(levels)
  found = sampler.parts.join(of_parts)
  for level, numbers in zip(found, expected, strict=True):
    times = level[0, ..., 0, 0, 0]
    np.testing.assert_array_equal(np.atleast_1d(times), numbers)
