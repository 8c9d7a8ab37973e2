"""What a run needs at its end is checked before it begins."""

import json

from absl import logging
import pytest

from mdm_jax.builders.prompts import Prompts
from mdm_jax.checkpoint.saved_steps import CheckpointError
from mdm_jax.report import trackers
from mdm_jax.training import loop, run


@pytest.mark.parametrize('name', ['checkpoints', 'samples', 'tensorboard'])
def test_a_file_in_place_of_a_directory_is_named(name, make_config, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / name).write_text('')
  with pytest.raises(ValueError, match=f'{workdir}/{name}: this is a file'):
    loop.setup(make_config().lock(), str(workdir))
  assert [path.name for path in workdir.iterdir()] == [name]


def test_a_file_in_place_of_the_working_directory(make_config, tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    with pytest.raises(ValueError, match='file'):
      loop.setup(make_config().lock(), str(workdir))


def test_a_working_directory_that_cannot_be_written(
  make_config, tmp_path, monkeypatch
):
  # Tests may run as root, who may write anywhere.
  monkeypatch.setattr('os.access', lambda path, mode: False)
  with pytest.raises(ValueError, match=f'nothing can be written to {tmp_path}'):
    loop.setup(make_config().lock(), str(tmp_path / 'run'))
  assert not list(tmp_path.iterdir())


def test_a_tracker_that_cannot_be_used(make_config, tmp_path, monkeypatch):
  config = make_config()
  config.trackers = ('tensorboard', 'wandb')

  def refuse(names):
    raise ValueError(f'{names}: no account')

  monkeypatch.setattr(trackers, 'check', refuse)
  with pytest.raises(ValueError, match="'tensorboard', 'wandb'.*: no account"):
    loop.setup(config.lock(), str(tmp_path / 'run'))
  assert not list(tmp_path.iterdir())


def test_parameters_that_a_mesh_does_not_divide(make_config, tmp_path):
  config = make_config()
  config.mesh.update(data=1, fsdp=8)
  config.sharding_rules = ((r'level_1/conv_in/kernel$', ('fsdp', None)),)
  with pytest.raises(ValueError, match='level_1/conv_in/kernel .* divide 3'):
    loop.setup(config.lock(), str(tmp_path / 'run'))
  assert not list(tmp_path.iterdir())


def test_a_stage_without_steps_of_the_one_before(make_config, tmp_path):
  config = make_config().lock()
  (directory := tmp_path / 'checkpoints' / '0_8').mkdir(parents=True)
  (directory / 'finished.json').write_text('{"step": 2}')
  mesh, frozen = loop.setup(config, str(tmp_path))
  with pytest.raises(CheckpointError, match='0_8 has no checkpoint, from wh'):
    loop.train(config, str(tmp_path), mesh, frozen)


def test_trackers_continue_the_run(make_config, tmp_path, monkeypatch):
  config, asked = make_config().lock(), []
  monkeypatch.setattr(
    run, 'make_trackers', lambda *given: asked.append(given) or []
  )
  for _ in range(2):
    with run.running(config, str(tmp_path), None, {}):
      pass
  own = json.loads((tmp_path / 'run.json').read_text())['run']
  config = json.loads(config.to_json())
  assert asked == [(('tensorboard',), str(tmp_path), config, own)] * 2


def test_the_command_at_the_end_can_be_pasted(
  make_config, tmp_path, monkeypatch, caplog
):
  config = make_config().lock()
  workdir = str(tmp_path / 'a run')
  mesh, frozen = loop.setup(config, workdir)
  # Nothing is left to train or evaluate.
  monkeypatch.setattr(loop.grow, 'next_stage', len)
  monkeypatch.setattr(loop, '_evaluate', lambda *given: None)
  caption = '"; rm x; \x1b[31m $(y)\n'
  monkeypatch.setattr(
    loop, 'make_prompts', lambda *given: Prompts([caption], None, None)
  )
  monkeypatch.setattr(logging.get_absl_logger(), 'propagate', True)
  logging.set_verbosity(logging.INFO)
  assert loop.train(config, workdir, mesh, frozen)
  lines = caplog.messages[-1].split('\n')
  assert lines == [
    'Next:',
    f"  python -m mdm_jax.sample --workdir='{workdir}' "
    r"""--prompt=$'"; rm x; \x1b[31m $(y)\x0a'""",
    f"  tensorboard --logdir='{workdir}'",
  ]
