"""A coarsest level that denoises codes of an autoencoder instead of images."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from mdm_jax.builders.check import check
from mdm_jax.builders.model import keep_stage
from mdm_jax.builders.prompts import encode_prompts
from mdm_jax.builders.stage import make_stage
from mdm_jax.diffusion import process, pyramid, samplers
from mdm_jax.diffusion.loss import level_loss
from mdm_jax.runtime import sharding
from mdm_jax.steps.objective import batch_losses, sample_noise
from mdm_jax.steps.sample import make_sample_fn, make_sample_steps
from tests import meshes, toy

PROMPTS = ['a red ring', 'a cross', '', 'two green circles'] * 2


def make_config():
  """An autoencoder of 16 px, its codes of 8 x 8, and 16 px around them."""
  config = common.get_config()
  config.autoencoder.resolution = 16
  config.model.levels = [
    common.level(8, downsample='encoder'),
    common.level(16),
  ]
  config.stages = [
    common.stage('ae', 0, kind='autoencoder', mixed_ratio=(1.0,)),
    common.stage('latent', 1),
    common.stage('16', 2),
  ]
  config = toy.shrink(common.smoke(config))
  for stage in config.stages:
    stage.update(steps=3, batch_size=8, shift_power=1.0)
  config.sampler.update(num_steps=3, guidance=2.0, threshold='clip')
  config.checkpoint_every = 1
  config.eval.update(num_prompts=8, loss_every=0)
  return config


@pytest.fixture(scope='module')
def config():
  return make_config()


@pytest.fixture(scope='module')
def stage(config):
  """The last one, of codes and pixels."""
  return make_stage(config, 2)


@pytest.fixture(scope='module')
def params(stage):
  """Random parameters of it, and of the autoencoder."""
  rng = np.random.default_rng(0)
  params = stage.init() | stage.earlier_params(lambda each: each.init())
  return jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params
  )


@pytest.fixture(scope='module')
def batch(stage):
  (batch,) = stage.make_dataset('train', num_batches=1)
  names = ('image', 'text', 'scale')
  return {name: jnp.asarray(batch[name]) for name in names}


@pytest.mark.parametrize(
  ('index', 'names'), [(0, ['ae']), (1, ['ae', 'latent']), (2, ['ae', '16'])]
)
def test_a_stage_is_kept_with_the_autoencoder_alone(config, index, names):
  kept = copy.deepcopy(config)
  keep_stage(kept, index)
  assert [each.name for each in kept.stages] == names


def test_work_of_a_batch_includes_its_encoding(config):
  text = jnp.ones((8, 32), jnp.int32)
  wide = copy.deepcopy(config)
  wide.autoencoder.channels = (64,)
  narrow, wide = (make_stage(x, 1) for x in (config, wide))
  more = wide.forward_flops({}, text) - narrow.forward_flops({}, text)
  # The encoder is about half of the autoencoder.
  both = [
    make_stage(x.config, 0).forward_flops({}, text) for x in (narrow, wide)
  ]
  assert 0.3 < more / (both[1] - both[0]) < 0.7


def losses_of(stage, params, batch):
  rng = jax.random.key(3)
  t, eps = sample_noise(stage.objective, stage.model.level_shapes, batch, rng)
  return batch_losses(stage.model, stage.objective, params, batch, t, eps)


def test_the_level_has_the_shape_of_codes_and_the_data_that_of_images(
  stage, batch
):
  assert stage.model.level_shapes == ((8, 8, 2), (16, 16, 3))
  assert stage.model.image_shapes == ((16, 16, 3), (16, 16, 3))
  assert stage.level_names == ('latent_8', '16')
  assert batch['image'].shape == (8, 16, 16, 3)
  latent = make_stage(stage.config, 1)
  assert latent.resolutions == (16,)
  (alone,) = latent.make_dataset('train', num_batches=1)
  np.testing.assert_array_equal(alone['image'], batch['image'])


def test_loss_is_of_codes_and_pixels(stage, params, batch):
  """Against the losses put together by hand."""
  _, found = jax.jit(lambda: losses_of(stage, params, batch))()
  model, objective = stage.model, stage.objective

  @jax.jit
  def by_hand(params, batch):
    rng = jax.random.key(3)
    t, eps = sample_noise(objective, model.level_shapes, batch, rng)
    image = pyramid.to_float(batch['image'])
    x0 = model.autoencoder.encode(params, image), image
    at = [objective.schedule.at(level, t + 1) for level in range(2)]
    x_t = tuple(map(process.add_noise, x0, eps, at))
    cond = model.encode(params, batch['text'], batch['scale'])
    predictions = model.denoise(params, x_t, t, cond)
    return [
      level_loss(*of_level, parameterization='v', loss_space='eps')
      for of_level in zip(predictions, x_t, x0, eps, at, strict=True)
    ]

  for losses, expected in zip(
    found['losses'], by_hand(params, batch), strict=True
  ):
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_the_autoencoder_is_not_trained(stage, params, batch):
  grads = jax.jit(
    jax.grad(lambda params: losses_of(stage, params, batch)[0].mean())
  )(params)
  assert not any(x.any() for x in jax.tree.leaves(grads['autoencoder']))
  assert any(x.any() for x in jax.tree.leaves(grads['unet']))
  assert 'autoencoder' not in stage.param_shapes()


def test_meshes_equal_one_device(config, stage, params, batch):
  meshes.check_all_axes(
    lambda *given: losses_of(stage, *given)[0],
    params,
    batch,
    config.sharding_rules,
  )


@pytest.fixture(scope='module')
def sampler(config, stage, params):
  """A sampler, its parameters on a mesh, their shardings, and the prompts."""
  mesh = sharding.make_mesh(config.mesh)
  placed = sharding.place(
    params, sharding.tree_shardings(params, mesh, config.sharding_rules)
  )
  shardings = jax.tree.map(lambda x: x.sharding, placed)
  text = encode_prompts(config, PROMPTS)
  return stage.make_sampler(mesh), placed, shardings, text


@pytest.fixture(scope='module')
def samples(config, sampler):
  made, placed, shardings, text = sampler
  (empty,) = encode_prompts(config, [''])
  return make_sample_fn(made, empty, 8, shardings)(placed, text, range(8))


def test_samples_are_decoded(config, stage, params, sampler, samples):
  """Against the loop over codes, which are neither thresholded nor clipped."""
  made, _, _, text = sampler
  spec = dataclasses.replace(made.spec, guidance=1.0)
  made = dataclasses.replace(made, spec=spec)
  seeds = np.arange(8, dtype=np.uint32)

  @jax.jit
  def by_hand(params):
    prepared = made.prepare(params, text, text, seeds)
    codes, images = samplers.sample(
      lambda x_t, t: stage.model.denoise(params, x_t, t, prepared.cond),
      made.start(prepared, 0),
      stage.objective.schedule,
      jax.random.key(0),
      num_steps=spec.num_steps,
      sampler=spec.name,
      threshold='clip',
      num_codes=1,
    )
    return codes, images, stage.model.autoencoder.decode(params, codes)

  codes, images, decoded = by_hand(params)
  assert np.abs(codes).max() > 1.5 and np.abs(images).max() <= 1
  found = jax.jit(made.sample)(params, text, text, seeds)
  for image, expected in zip(found, (decoded, images), strict=True):
    expected = np.asarray(pyramid.to_uint8(expected))
    difference = np.subtract(image, expected, dtype=int)
    assert np.abs(difference).max() <= 1 and np.ptp(expected) > 20
  assert [x.shape for x in samples] == [(8, 16, 16, 3)] * 2


def test_steps_end_in_the_samples(config, sampler, samples):
  made, placed, shardings, text = sampler
  (empty,) = encode_prompts(config, [''])
  steps = list(
    make_sample_steps(made, shardings)(
      placed,
      text,
      np.broadcast_to(empty, text.shape),
      range(8),
      made.spec.num_steps,
      made.spec.guidance,
    )
  )
  for found, expected in zip(steps[-1], samples, strict=True):
    difference = np.subtract(found, expected, dtype=int)
    assert np.abs(difference).max() <= 1


def test_resumed_equals_uninterrupted(tmp_path):
  """From the autoencoder to codes, to codes inside of pixels."""
  config = make_config()
  toy.run(config, tmp_path / 'whole')
  toy.stage_anew(tmp_path / 'whole', tmp_path / 'parts', config, 2)
  toy.stop_at(1, config, tmp_path / 'parts', '16')
  toy.run(config, tmp_path / 'parts')
  assert toy.digest(tmp_path / 'whole', config, 2) == (
    toy.digest(tmp_path / 'parts', config, 2)
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'model.levels[1].downsample': 'encoder'},
      r"levels\[1\].downsample='encoder': only level 0",
    ),
    ({'stages': 1}, 'no stage trains the encoder; give stages'),
    ({'model.levels[0].resolution': 4}, 'codes of images of 16 px are 8 x 8'),
    ({'model.cascade': True}, 'model.cascade=True: use one of them'),
    (
      {'autoencoder.resolution': 32, 'autoencoder.patch_size': 4},
      r'levels\[1\].resolution=16: give a multiple of autoencoder.resolution',
    ),
  ],
)
def test_bad_input(changes, message):
  config = make_config().unlock()
  for key, value in changes.items():
    if key == 'stages':
      config.stages = config.stages[value:]
    else:
      config.update_from_flattened_dict({key: value})
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with pytest.raises(ValueError, match=message):
    check(config, mesh)
