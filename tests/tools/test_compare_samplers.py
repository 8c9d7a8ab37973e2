"""The command that compares samplers: what it refuses, and what it keeps."""

import json
import types

import jax
import pytest

from mdm_jax.inference import session
from mdm_jax.report import console
from mdm_jax.runtime import compilation_cache, sharding
from mdm_jax.tools import compare_samplers


@pytest.fixture
def values(monkeypatch, tmp_path):
  """The values of its flags, which are not defined here."""
  values = types.SimpleNamespace(
    workdir=str(tmp_path),
    samplers=['ddim', 'dpm', 'ddim'],
    steps=[5, 5],
    num_images=8,
    classifier_images=16,
    classifier_steps=1,
    output=None,
    plot=None,
  )
  monkeypatch.setattr(compare_samplers.flags, 'FLAGS', values)
  monkeypatch.setattr(console, 'setup_logging', lambda: None)
  monkeypatch.setattr(compilation_cache, 'enable', lambda: None)
  return values


@pytest.fixture
def opened(make_config, tmp_path):
  """A run on eight devices."""
  axes = {'data': -1, 'fsdp': 1, 'spatial': 1}
  mesh = sharding.make_mesh(axes, jax.devices())
  return types.SimpleNamespace(
    config=make_config(), mesh=mesh, workdir=str(tmp_path), restore=lambda: None
  )


def test_devices_need_not_share_the_batches_of_training(opened):
  opened.config.stages[0].batch_size = 3
  compare_samplers._check(opened, [('ddim', 2)])
  with pytest.raises(ValueError, match='sampler.num_steps'):
    compare_samplers._check(opened, [('ddim', 2), ('ddim', 10**6)])


def test_clips_are_refused(opened):
  opened.config.data.name = 'moving_shapes'
  opened.config.model.levels[-1].frames = 4
  with pytest.raises(ValueError, match='has clips, and images alone are comp'):
    compare_samplers._check(opened, [('ddim', 2)])


def test_results_of_another_process_are_kept(
  values, opened, tmp_path, monkeypatch, capsys
):
  """Also those that it wrote just before this one may write."""
  one = {'sampler': 'heun', 'steps': 3}

  def open_run(workdir):
    (tmp_path / 'samplers.json').write_text(json.dumps([one]))
    return opened

  def compare(model, cases, path, known):
    assert (tmp_path / '.samplers.json.lock').exists()
    found.append((cases, known))
    return []

  found = []
  monkeypatch.setattr(session, 'open_run', open_run)
  monkeypatch.setattr(compare_samplers, '_compare', compare)
  compare_samplers.main([])
  # Each case once, though both flags have a value twice.
  assert found == [([('ddim', 5), ('dpm', 5)], [one])]
  assert capsys.readouterr().out.splitlines()[-1].startswith('chance')


@pytest.mark.parametrize('own', ['ddim', 'dpm'])
def test_results_with_another_eta_are_others(values, make_config, own):
  """Whatever the sampler of the run itself is."""
  config = make_config()
  config.sampler.update(name=own, eta=0.5)
  stage = types.SimpleNamespace(config=config)
  model = types.SimpleNamespace(stage=stage, description={'step': 3})
  rows = [
    {'sampler': name, 'steps': 5} | compare_samplers._settings(model, name)
    for name in ('ddim', 'dpm')
  ]
  earlier = {key: rows[0][key] for key in rows[0] if key != 'eta'}
  assert (rows[0]['eta'], 'eta' in rows[1]) == (0.5, False)
  for eta, expected in ((0.5, [1, 1, 0, 1]), (0.0, [0, 1, 1, 1])):
    config.sampler.eta = eta
    known = [*rows, earlier, rows[1] | {'eta': 0.25}]
    assert [compare_samplers._is_of(one, model) for one in known] == expected
