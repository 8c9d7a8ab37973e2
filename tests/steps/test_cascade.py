"""A cascade: levels that are models of their own, sampled in turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from mdm_jax.builders.check import check
from mdm_jax.builders.model import keep_stage
from mdm_jax.builders.prompts import encode_prompts
from mdm_jax.builders.stage import make_stage
from mdm_jax.checkpoint.saved_steps import CheckpointError
from mdm_jax.diffusion import process, pyramid
from mdm_jax.diffusion.loss import level_loss
from mdm_jax.inference.weights import restore_earlier
from mdm_jax.runtime import sharding
from mdm_jax.steps.objective import (
  batch_losses,
  sample_noise,
  with_augmentation,
)
from mdm_jax.steps.sample import make_sample_fn, make_sample_steps
from mdm_jax.tools import recipe_costs
from tests import meshes, toy

PROMPTS = ['a red ring', 'a cross', '', 'two green circles'] * 2


def make_config(levels=3):
  """Models of 8, 16 and 32 px."""
  config = common.get_config()
  config.model.levels = [common.level(8 * 2**i) for i in range(levels)]
  config.stages = [common.stage(str(8 * 2**i), i + 1) for i in range(levels)]
  config = common.cascade(common.smoke(config))
  config.text.num_layers = 0
  for level in config.model.levels:
    level.update(channels=(8,), num_blocks=(0,), attention_layers=(0,))
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
  """The second one, which is given images of 8 px."""
  return make_stage(config, 1)


@pytest.fixture(scope='module')
def params(config, random_params):
  """Random parameters of a stage by its index, with those of earlier ones."""

  def make(index):
    stage = make_stage(config, index)

    def params_of(each):
      return random_params(each.model, config.text.max_length)

    return params_of(stage) | stage.earlier_params(params_of)

  return make


@pytest.fixture(scope='module')
def batch(stage):
  (batch,) = stage.make_dataset('train', num_batches=1)
  names = ('image', 'text', 'scale')
  return {name: jnp.asarray(batch[name]) for name in names}


def losses_of(stage, params, batch):
  rng = jax.random.key(3)
  shapes = stage.model.level_shapes
  t, eps = sample_noise(stage.objective, shapes, batch, rng)
  batch = with_augmentation(stage.model, stage.objective, batch, rng)
  return batch_losses(stage.model, stage.objective, params, batch, t, eps)


def test_a_stage_trains_its_level_alone(config, stage):
  assert stage.resolutions == (16,)
  assert stage.level_names == ('16',)
  assert stage.coarser.resolutions == (8,) and stage.coarser.coarser is None
  trained = stage.model.shapes(config.text.max_length)
  assert trained['unet'].keys() == {'text', 'level_0'}
  assert 'middle' in trained['unet']['level_0']


def test_a_level_has_the_noise_that_it_has_in_a_nest(config, stage):
  nest = config.copy_and_resolve_references()
  nest.model.cascade = False
  for i, each in enumerate(nest.stages):
    each.update(loss_weights=(1.0,) * (i + 1), mixed_ratio=(0.0,) * i + (1.0,))
  expected = make_stage(nest, 1).objective.schedule.gammas
  found = stage.objective.schedule.gammas
  np.testing.assert_array_equal(found, expected[1:])
  # The SNR of 8 px is twice that of 16 px.
  coarse, fine = expected[:, 500] / (1 - expected[:, 500])
  assert coarse / fine == pytest.approx(2, rel=1e-4)
  given = stage.objective.augmentation.schedule.gammas
  np.testing.assert_array_equal(given, expected[:1])


def test_loss_is_of_the_level_given_the_noised_coarser_images(
  stage, params, batch
):
  """Against the loss put together by hand."""
  params = params(1)
  found, _ = jax.jit(lambda: losses_of(stage, params, batch))()
  rng = jax.random.key(3)
  objective, model = stage.objective, stage.model
  t, (eps,) = sample_noise(objective, model.level_shapes, batch, rng)
  added = with_augmentation(model, objective, batch, rng)
  image = pyramid.to_float(batch['image'])
  coarse = image.reshape(-1, 8, 2, 8, 2, 3).mean((2, 4))
  noising = objective.augmentation.schedule.at(0, added['coarse_t'])
  coarse = noising.signal * coarse + noising.noise * added['coarse_eps']
  at = objective.schedule.at(0, t + 1)
  x_t = process.add_noise(image, eps, at)
  cond = model.encode(params, batch['text'], batch['scale'])
  cond = cond._replace(coarse=coarse, coarse_t=added['coarse_t'])
  (prediction,) = model.denoise(params, (x_t,), t, cond)
  expected = level_loss(
    prediction, x_t, image, eps, at, parameterization='v', loss_space='eps'
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # What a network that is told something else predicts is something else.
  for changed in (
    cond._replace(coarse=coarse + 0.1),
    cond._replace(coarse_t=added['coarse_t'] + 100),
  ):
    (other,) = model.denoise(params, (x_t,), t, changed)
    assert np.abs(other - prediction).max() > 1e-3


def test_noise_of_coarser_images_is_of_its_own(stage, batch):
  """Not that of the times or of the level, and up to the strongest."""
  rng = jax.random.key(3)
  objective, model = stage.objective, stage.model
  many = {'scale': jnp.zeros(2000)}
  added = with_augmentation(model, objective, many, rng)
  t, (eps,) = sample_noise(objective, model.level_shapes, many, rng)
  strongest = round(0.5 * objective.schedule.num_steps)
  assert added['coarse_t'].min() == 0
  assert strongest - 3 < added['coarse_t'].max() <= strongest
  for first, second in (
    (added['coarse_t'], t),
    (added['coarse_eps'].reshape(-1), eps[:, :8, :8].reshape(-1)),
    (added['coarse_eps'].reshape(-1), eps.reshape(-1)[: 2000 * 192]),
  ):
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08


def test_meshes_equal_one_device(config, stage, params, batch):
  params = {key: params(1)[key] for key in ('unet', 'text_encoder')}
  meshes.check_all_axes(
    lambda *given: losses_of(stage, *given)[0],
    params,
    batch,
    config.sharding_rules,
  )


@pytest.fixture(scope='module')
def sampled(config, params):
  """Samples of each stage, by its index."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  text = encode_prompts(config, PROMPTS)

  @functools.cache
  def sample(index, **changes):
    placed = sharding.place(
      params(index),
      sharding.tree_shardings(params(index), mesh, config.sharding_rules),
    )
    sample_fn = make_sample_fn(
      make_stage(config, index).make_sampler(mesh, **changes),
      encode_prompts(config, [''])[0],
      8,
      jax.tree.map(lambda x: x.sharding, placed),
    )
    return sample_fn(placed, text, range(8))

  return sample


def test_levels_are_sampled_in_turn(sampled):
  """The coarser samples are those of the stages before."""
  levels = sampled(2)
  assert [x.shape for x in levels] == [(8, r, r, 3) for r in (8, 16, 32)]
  for found, expected in zip(levels, sampled(1)):
    np.testing.assert_array_equal(found, expected)
  # What is given matters: with all noise on it, other images follow.
  clean, noisy = sampled(1), sampled(1, augmentation=1.0)
  np.testing.assert_array_equal(clean[0], noisy[0])
  assert np.abs(np.subtract(clean[1], noisy[1], dtype=int)).mean() > 1


def test_steps_end_in_the_samples(config, params, sampled):
  mesh = sharding.make_mesh(config.mesh)
  placed = sharding.place(
    params(2), sharding.tree_shardings(params(2), mesh, config.sharding_rules)
  )
  sample_steps = make_sample_steps(
    make_stage(config, 2).make_sampler(mesh),
    jax.tree.map(lambda x: x.sharding, placed),
    with_inputs=True,
  )
  (empty,) = encode_prompts(config, [''])
  steps = list(
    sample_steps(
      placed,
      encode_prompts(config, PROMPTS),
      np.broadcast_to(empty, (8, *empty.shape)),
      range(8),
      config.sampler.num_steps,
      config.sampler.guidance,
    )
  )
  assert len(steps) == config.sampler.num_steps
  for found, expected in zip(steps[-1][1], sampled(2), strict=True):
    difference = np.subtract(found, expected, dtype=int)
    assert np.abs(difference).max() <= 1
  for noisy, images in steps:
    assert [x.shape for x in noisy] == [x.shape for x in images]


def test_other_options_are_of_all_levels(config):
  """As the demo changes them."""
  mesh = sharding.make_mesh(config.mesh)
  sampler = make_stage(config, 2).make_sampler(mesh)
  changed = sampler.with_method('ddim', 'none')
  for level in (changed, changed.coarser, changed.coarser.coarser):
    assert (level.spec.name, level.spec.threshold) == ('ddim', 'none')
    assert level.spec.num_steps == config.sampler.num_steps
  assert sampler.coarser.spec.name == config.sampler.name


def test_sampling_flops_are_those_of_all_levels(config):
  """And a plan of a stage keeps the stages that it is sampled with."""

  def total(index, channels):
    kept = config.copy_and_resolve_references()
    kept.model.levels[0].channels = (channels,)
    keep_stage(kept, index)
    names = ['8', '16'][: index + 1]
    assert [each.name for each in kept.stages] == names
    return recipe_costs.sampling_flops(kept)

  # What the coarsest level costs more, the finest one's samples cost more.
  more = total(0, 16) - total(0, 8)
  assert more > 0.5 * total(0, 8)
  np.testing.assert_allclose(total(1, 16) - total(1, 8), more, rtol=1e-3)


def test_a_lost_stage_is_named(config, tmp_path):
  with pytest.raises(CheckpointError, match='1_16 has no checkpoint, which st'):
    restore_earlier(make_stage(config, 2), str(tmp_path))


def test_noise_of_levels_differs(config, params):
  """A level's noise does not continue that of the coarser one."""
  mesh = sharding.make_mesh(config.mesh)
  text = encode_prompts(config, PROMPTS)
  seeds = np.arange(8, dtype=np.uint32)
  noises = []
  for index in range(3):
    sampler = make_stage(config, index).make_sampler(mesh)
    coarse = np.zeros((8, 4 * 2**index, 4 * 2**index, 3), np.uint8)
    prepared = sampler.prepare(params(index), text, text, seeds, coarse=coarse)
    (noise,) = sampler.start(prepared, 0)
    noises.append(np.asarray(noise).reshape(8, -1)[:, :192].ravel())
  for i in range(3):
    assert abs(np.corrcoef(noises[i], noises[i - 1])[0, 1]) < 0.1


def test_resumed_equals_uninterrupted(tmp_path):
  """And a stage begins anew: from its seed, not from the stage before."""
  config = make_config(levels=2)
  toy.run(config, tmp_path / 'whole')
  toy.stage_anew(tmp_path / 'whole', tmp_path / 'parts', config, 1)
  toy.stop_at(1, config, tmp_path / 'parts', '16')
  toy.run(config, tmp_path / 'parts')
  assert toy.digest(tmp_path / 'whole', config, 1) == (
    toy.digest(tmp_path / 'parts', config, 1)
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'stages': [common.stage('16', 2, batch_size=8)]},
      r'stages\[0\].num_levels=2 with model.cascade=True: .* give 1',
    ),
    ({'sampler.augmentation': 0.6}, 'sampler.augmentation=0.6: give at most'),
    (
      {'diffusion.level_times': 'independent'},
      "level_times='independent' with a single level",
    ),
    (
      {'levels': {'frames': 8, 'frame_attention': (1,)}},
      'cascades are of images',
    ),
    ({'levels': {'share': 'all'}}, "share='all' with model.cascade=True"),
    ({'levels': {'resolution': 12}}, r'levels\[1\].* a multiple of the 8 px'),
    (
      {'loss_weights': (1.0, 1.0)},
      r'stages\[1\].loss_weights=.* each of its 1 levels',
    ),
  ],
)
def test_bad_input(changes, message):
  config = make_config().unlock()
  for key, value in changes.items():
    match key:
      case 'stages':
        config.stages = value
      case 'levels':
        config.model.levels[1].update(value)
        config.data.name = 'moving_shapes' if 'frames' in value else 'shapes'
      case 'loss_weights':
        config.stages[1].loss_weights = value
      case _:
        config.update_from_flattened_dict({key: value})
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with pytest.raises(ValueError, match=message):
    check(config, mesh)
