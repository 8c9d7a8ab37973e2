"""Every command opens a run in the same way."""

import json
import operator

import jax
import numpy as np
import pytest

from mdm_jax.builders import ranges
from mdm_jax.builders.config import write_config
from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import make_stages
from mdm_jax.diffusion import samplers
from mdm_jax.inference import session
from mdm_jax.runtime import cpu, environment
from tests import toy
from tests.steps import test_codes


@pytest.fixture(scope='module')
def run(make_config, random_params, tmp_path_factory):
  """Config, weights and workdir of a run that has ended."""
  config = make_config()
  config.mesh.update(data=2, fsdp=4)
  config.eval.batch_size = 16
  workdir = tmp_path_factory.mktemp('run')
  model = make_model(config, config.stages[1])
  params = random_params(model, config.text.max_length)
  toy.save_run(workdir, config, 1, config.stages[1].steps, params)
  return config, params, str(workdir)


def test_flags_are_those_of_the_samplers():
  assert set(ranges.SAMPLERS) == set(samplers.SAMPLERS)
  assert set(ranges.THRESHOLDS) == set(samplers.THRESHOLDS)


def test_the_log_says_where_it_runs_and_with_which_weights(run, caplog):
  *_, workdir = run
  with caplog.at_level('INFO', logger='absl'):
    session.open_run(workdir).restore()
  lines = [line for line in caplog.messages if not line.startswith('Saved')]
  assert lines == [
    f'version  {environment.versions()}',
    'devices  8 CPU devices',
    f"weights  {workdir}: stage 2/2 '16', step 20 of 20, EMA",
  ]


def test_it_runs_on_the_devices_that_are_here(run, monkeypatch):
  config, params, workdir = run
  parts = []
  monkeypatch.setattr(cpu, 'use_cores', parts.append)
  opened = session.open_run(workdir)
  assert dict(opened.mesh.shape) == {'data': 8, 'fsdp': 1, 'spatial': 1}
  assert parts == [[16, 16, 16]]
  model = opened.restore()
  assert (model.stage.index, model.weights.step) == (1, 20)
  assert model.is_finished
  assert model.description['weights'] == 'EMA'
  jax.tree.map(np.testing.assert_array_equal, model.params, params)


@pytest.mark.parametrize(
  'options, expected',
  [
    ({}, 16),
    ({'evaluation': {'batch_size': 9}}, 16),
    ({'evaluation': {'batch_size': 3}, 'spatial': 4}, 4),
    ({'evaluation': {'batch_size': None}}, 16),
  ],
)
def test_batches_are_rounded_up_to_the_devices(run, options, expected):
  *_, workdir = run
  opened = session.open_run(workdir, **options)
  assert opened.config.eval.batch_size == expected


def test_options_change_the_sampler(run):
  *_, workdir = run
  opened = session.open_run(
    workdir, sampler={'name': 'heun', 'num_steps': None}
  )
  assert opened.config.sampler.name == 'heun'
  assert opened.config.sampler.num_steps == 3
  with pytest.raises(ValueError, match='eta=2.0: give a number from 0 to 1'):
    session.open_run(workdir, sampler={'eta': 2.0})


def test_a_run_of_an_older_version_is_opened_as_it_was(run):
  config, params, workdir = run
  expected = session.open_run(workdir).config
  toy.make_older(workdir)
  opened = session.open_run(workdir)
  with expected.unlocked():
    expected.data.max_pixels = 128_000_000
    expected.eval.loss_every = 0
    expected.guard.spike_factor = 0.0
    expected.watchdog.update(start_up=0, step=0, save=0, evaluate=0)
    for level in expected.model.levels:
      level.lanes = 1
  assert opened.config == expected
  assert opened.config.text.padding == config.text.padding == 'max_length'
  jax.tree.map(np.testing.assert_array_equal, opened.restore().params, params)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_a_guide_shares_the_frozen_encoder(
  make_config, random_params, t5_directory, tmp_path, dtype
):
  for name, precision in (('own', 'float32'), ('guide', dtype)):
    config = make_config()
    config.text.update(encoder='t5', path=str(t5_directory.path))
    config.dtype = precision
    params = random_params(make_model(config, config.stages[1]), 8)
    toy.save_run(tmp_path / name, config, 1, 20, params)
  opened = session.open_run(str(tmp_path / 'own'))
  model = opened.restore()
  guide = opened.restore_guide(model, str(tmp_path / 'guide'))
  own, other = (
    jax.tree.leaves(each.params['text_encoder']) for each in (model, guide)
  )
  assert {x.dtype.name for x in other} == {dtype}
  shared = [x is y for x, y in zip(own, other, strict=True)]
  assert set(shared) == {dtype == 'float32'}


@pytest.mark.parametrize('is_same', (True, False))
def test_a_guide_of_codes_shares_the_autoencoder(tmp_path, is_same):
  config = test_codes.make_config()
  config.stages = config.stages[:2]
  autoencoder, latent = make_stages(config)
  trained = autoencoder.init()
  for name in ('own', 'guide'):
    toy.save_run(tmp_path / name, config, 0, 3, trained)
    toy.save_run(tmp_path / name, config, 1, 3, latent.init())
    if not is_same:
      trained = jax.tree.map(lambda x: x + 1, trained)
  opened = session.open_run(str(tmp_path / 'own'))
  model = opened.restore()
  if not is_same:
    with pytest.raises(ValueError, match='codes are of another autoencoder'):
      opened.restore_guide(model, str(tmp_path / 'guide'))
    return
  guide = opened.restore_guide(model, str(tmp_path / 'guide'))
  own, other = (
    jax.tree.leaves(each.params['autoencoder']) for each in (model, guide)
  )
  assert own and all(map(operator.is_, own, other))


def test_no_run(tmp_path):
  with pytest.raises(FileNotFoundError, match='directory of a training run'):
    session.open_run(str(tmp_path))


def test_a_stored_config_is_checked(make_config, tmp_path):
  values = json.loads(make_config().to_json())
  write_config(tmp_path, values | {'seed': -1})
  with pytest.raises(ValueError, match='config.json: seed=-1: give an integer'):
    session.open_run(str(tmp_path))


def test_a_stage_that_is_asked_for(make_config, tmp_path, caplog):
  config = make_config()
  names = [stage.name for stage in config.stages]
  for index, stage in enumerate(config.stages):
    params = {'x': np.float32([index])}
    toy.save_run(tmp_path, config, index, stage.steps - index, params)
  for name, warned in ((names[0], False), (names[1], True), (None, True)):
    caplog.clear()
    with caplog.at_level('WARNING', logger='absl'):
      model = session.open_run(str(tmp_path), stage=name).restore()
    assert model.description['stage'] == (name or names[1])
    assert ('The run is not finished' in caplog.text) == warned
  with pytest.raises(ValueError, match="no stage 'x': give one of '8', '16'."):
    session.open_run(str(tmp_path), stage='x').restore()
