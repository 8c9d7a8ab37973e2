"""A run whose first stage is an autoencoder, and what is refused of it."""

import json

import jax
import numpy as np
from PIL import Image
import pytest

from configs import common
import mdm_jax
from mdm_jax.builders.config import stage_directory
from mdm_jax.builders.stage import make_stage, make_stages
from mdm_jax.checkpoint import restore
from mdm_jax.diffusion import pyramid
from mdm_jax.inference import session, validation, weights
from mdm_jax.runtime import files, sharding
from mdm_jax.steps import autoencoder
from tests import meshes, toy

STEPS = 4


def make_config(num_stages=2):
  """An autoencoder of 16 px, then diffusion of 8 px, which ignores it."""
  config = common.get_config()
  config.model.levels = [common.level(8)]
  config.stages = [
    common.stage('first', 0, kind='autoencoder'),
    common.stage('8', 1),
  ][:num_stages]
  config.autoencoder.resolution = 16
  config = toy.shrink(common.smoke(config))
  for stage in config.stages:
    stage.update(steps=STEPS, batch_size=8)
  config.optimizer.ema_decay = 0.5
  config.checkpoint_every = 1
  config.eval.update(every=2, loss_every=1)
  if num_stages == 1:
    config.eval.best_metric = 'held_out_psnr'
  return config.lock()


def lines_of(workdir, stage):
  return [
    line
    for line in files.read_json_lines(workdir / 'metrics.jsonl')
    if line.get('stage') == stage
  ]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Of an uninterrupted run of both stages."""
  workdir = tmp_path_factory.mktemp('run')
  toy.run(make_config(), workdir)
  return workdir


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """Of a run of the autoencoder alone."""
  workdir = tmp_path_factory.mktemp('alone')
  toy.run(make_config(1), workdir)
  return workdir


def test_resumed_equals_uninterrupted(alone, tmp_path):
  """The stage after it is as any other, which test_loop interrupts."""
  config = make_config(1)
  toy.stop_at(2, config, tmp_path, 'first')
  toy.run(config, tmp_path)
  assert toy.digest(tmp_path, config, 0) == toy.digest(alone, config, 0)


def test_what_is_measured(workdir, alone):
  for path in (workdir, alone):
    lines = lines_of(path, 'first')
    training = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in training] == [2, 4]
    for line in training:
      assert 5 < line['psnr'] < 20
      assert 0 < line['loss'] < 1
      assert 0.5 < line['code_nll'] < 3
      assert not [name for name in line if '_noise_' in name]
    measured = [line for line in lines if 'held_out_psnr' in line]
    assert [line['step'] for line in measured][:4] == [1, 2, 3, 4]
    assert not [name for name in measured[-1] if 'accuracy' in name]
  # The stage after it is measured as ever.
  assert 'held_out_loss_8' in lines_of(workdir, '8')[-1]
  values = json.loads((alone / 'eval' / f'{STEPS}.json').read_text())
  assert values == {
    'held_out_psnr': lines_of(alone, 'first')[-1]['held_out_psnr']
  }


def test_the_grid_has_held_out_images_and_the_decoded_ones(alone):
  config = make_config(1)
  stage = make_stage(config, 0)
  mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
  params = weights.restore_weights(config, alone, mesh).params
  images, decoded = stage.make_sample_fn(mesh, params)(params, None, range(11))
  assert images.shape == decoded.shape == (11, 16, 16, 3)
  assert images.dtype == decoded.dtype == np.uint8
  (first, second) = stage.make_dataset('held_out', num_batches=2)
  np.testing.assert_array_equal(images[:8], first['image'])
  np.testing.assert_array_equal(images[8:], second['image'][:3])
  model, floats = stage.model, pyramid.to_float(images)
  expected = pyramid.to_uint8(
    model.decode(params, model.encode(params, floats))
  )
  assert np.abs(decoded.astype(int) - expected).max() <= 1
  with Image.open(alone / 'samples' / f'first_{STEPS}.png') as image:
    assert min(image.size) > 100
  # It is also what is measured.
  found = autoencoder.psnr(floats[:8], pyramid.to_float(decoded[:8])).mean()
  measured = lines_of(alone, 'first')[-1]['held_out_psnr']
  np.testing.assert_allclose(found, measured, atol=0.05)


def test_a_mesh_measures_and_shows_the_same(alone):
  config, found = make_config(1), []
  stage = make_stage(config, 0)
  for sizes in ((1, 1, 1), (2, 2, 2)):
    mesh = meshes.make_mesh(*sizes)
    params = weights.restore_weights(config, alone, mesh).params
    _, decoded = stage.make_sample_fn(mesh, params)(params, None, range(8))
    values = validation.validate(stage, mesh, params)
    found.append((decoded.astype(int), values['held_out_psnr']))
  (images, psnr), (others, other_psnr) = found
  assert np.std(images) > 1
  assert np.abs(images - others).max() <= 1
  np.testing.assert_allclose(psnr, other_psnr, rtol=1e-5)


def test_the_best_has_the_highest_psnr(alone):
  config = make_config(1)
  measured = {
    line['step']: line['held_out_psnr']
    for line in lines_of(alone, 'first')
    if 'held_out_psnr' in line
  }
  best = restore.read_extra(stage_directory(alone, config, 0, 'best'))
  assert len(set(measured.values())) == STEPS
  assert best['value'] == max(measured.values())


def test_nothing_grows_from_it(workdir):
  first, second = make_stages(make_config())
  names = [
    set(restore.restore_item(stage.directory(workdir), None, 'params'))
    for stage in (first, second)
  ]
  assert names == [{'autoencoder'}, {'unet', 'text_encoder'}]


def test_commands_refuse_it(workdir, alone):
  config = make_config()
  saved = weights.saved_weights(config, workdir)
  assert [each.stage for each in saved] == ['8']
  refused = "stage 'first' is an autoencoder, which makes no images of prompts"
  with pytest.raises(ValueError, match=f"{refused}: train '8', or"):
    mdm_jax.load(workdir, stage='first')
  with pytest.raises(ValueError, match=f'{refused}: train a run that'):
    session.read_weights(str(alone))
  assert session.read_weights(str(workdir))[1].index == 1
