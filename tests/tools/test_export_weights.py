"""What is exported is imported again, bit for bit."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from mdm_jax.builders.config import stage_directory, write_config
from mdm_jax.builders.model import make_model
from mdm_jax.checkpoint import restore
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.inference.session import Session
from mdm_jax.runtime import sharding
from mdm_jax.tools.export_weights import export
from mdm_jax.tools.import_ml_mdm import import_checkpoint


@pytest.fixture
def run(make_config, random_params, t5_directory, tmp_path):
  """Config, working directory and parameters of a run of one checkpoint."""
  config = make_config()
  config.text.update(encoder='t5', path=str(t5_directory.path))
  config.lock()
  model = make_model(config, config.stages[1])
  params = random_params(model, config.text.max_length)
  workdir = tmp_path / 'run'
  write_config(workdir, json.loads(config.to_json()))
  checkpoints = Checkpoints(
    stage_directory(workdir, config, 1), save_interval=1, max_to_keep=1
  )
  checkpoints.save(3, {'ema': params}, {}, force=True)
  checkpoints.close()
  return config, workdir, params


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_export_then_import_is_exact(run, tmp_path, suffix):
  config, workdir, params = run
  file = tmp_path / f'out.{suffix}'
  export(workdir, file, 'release')
  import_checkpoint(file, config, tmp_path / 'again')
  again = restore.restore_item(
    stage_directory(tmp_path / 'again', config, 1), 0, 'ema'
  )
  assert again.keys() == params.keys() == {'unet'}
  for path, value in _flat(params):
    np.testing.assert_array_equal(dict(_flat(again))[path], value, path)
  # What is imported can be sampled.
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  model = Session(tmp_path / 'again', config, mesh).restore()
  assert dict(_flat(params)).keys() < dict(_flat(model.params)).keys()
  assert model.stage.resolutions == (8, 16)


def test_our_names_are_paths(run, tmp_path):
  _, workdir, params = run
  export(workdir, tmp_path / 'new' / 'out.safetensors', 'ours')
  tensors = safetensors.numpy.load_file(tmp_path / 'new' / 'out.safetensors')
  assert tensors.keys() == dict(_flat(params)).keys()
  assert 'unet.level_1.conv_in.kernel' in tensors
  for path, value in _flat(params):
    np.testing.assert_array_equal(tensors[path], value, path)


def test_what_cannot_be_written_is_named(run, tmp_path):
  _, workdir, _ = run
  with pytest.raises(ValueError, match=r'out.pth must end in .safetensors wi'):
    export(workdir, tmp_path / 'out.pth', 'ours')
  with pytest.raises(ValueError, match=r'.safetensors or .pth with'):
    export(workdir, tmp_path / 'out.bin', 'release')
  with pytest.raises(FileNotFoundError, match='config.json does not exist'):
    export(tmp_path, tmp_path / 'out.pth', 'release')


def _flat(params, prefix=''):
  for name, value in params.items():
    path = f'{prefix}.{name}' if prefix else name
    if isinstance(value, dict):
      yield from _flat(value, path)
    else:
      yield path, value
