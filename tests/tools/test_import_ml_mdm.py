"""Released weights become a working directory, or are refused by name."""

import functools
import json

import jax
import numpy as np
import pytest

from configs import common
from mdm_jax.builders.config import read_config, stage_directory
from mdm_jax.builders.model import make_model
from mdm_jax.checkpoint import restore, saved_steps
from mdm_jax.inference import session
from mdm_jax.interop import torch_checkpoint
from mdm_jax.interop.ml_mdm import to_release
from mdm_jax.tools.import_ml_mdm import import_checkpoint
from mdm_jax.training import loop
from tests import commands
from tests import toy as toy_run


@pytest.fixture
def nested2(t5_directory):
  """The config of the golden model of that name, at 8+16 px."""
  config = common.get_config()
  config.text.update(encoder='t5', path=str(t5_directory.path), max_length=8)
  config.model.text.update(width=48, masked_attention=False)
  config.model.levels = [
    common.level(
      8,
      channels=(32, 64),
      num_blocks=(1, 2),
      attention_layers=(0, 2),
      temporal_dim=128,
      scale_condition=64,
    ),
    common.level(
      16,
      channels=(32, 64),
      num_blocks=(2, 1),
      attention_layers=(0, 0),
      temporal_dim=128,
      attention_ffn=False,
      scale_condition=256,
    ),
  ]
  config.stages = [common.stage('16', 2)]
  return config.lock()


def test_golden_weights_are_imported(
  nested2, golden_network, golden_state_dict, tmp_path
):
  """Into the network that `test_nested_unet` compares with the release."""
  path = tmp_path / 'vis.pth'
  torch_checkpoint.write_state_dict(path, golden_state_dict('nested2'))
  import_checkpoint(path, nested2, tmp_path / 'run')
  written = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert written.pop('version') > 0
  assert written == json.loads(nested2.to_json())
  directory = stage_directory(tmp_path / 'run', nested2, 0)
  params = restore.restore_item(directory, 0, 'ema')
  network, expected = golden_network('nested2')
  assert make_model(nested2, nested2.stages[0]).unet == network
  jax.tree.map(np.testing.assert_array_equal, params, {'unet': expected})


@pytest.fixture
def toy(make_config, t5_directory):
  """Two stages, and () -> weights of the stage with `num_levels`."""
  config = make_config()
  config.text.update(encoder='t5', path=str(t5_directory.path))
  config.eval.update(num_prompts=8, loss_batches=1)
  for stage in config.stages:
    stage.steps = 1
  return config.lock()


def write_toy(config, path, index, random_params):
  model = make_model(config, config.stages[index])
  params = random_params(model, config.text.max_length)
  torch_checkpoint.write_state_dict(
    path, to_release(params['unet'], model.unet.levels)
  )
  return params


@pytest.mark.parametrize('index', [0, 1], ids=['grow', 'fine-tune'])
def test_training_goes_on(toy, random_params, tmp_path, index):
  params = write_toy(toy, tmp_path / 'a.pth', index, random_params)
  workdir = tmp_path / 'run'
  import_checkpoint(tmp_path / 'a.pth', toy, workdir)
  first = stage_directory(workdir, toy, 0)
  assert saved_steps.finished_step(first) == (0 if index == 0 else None)
  if index == 0:
    toy_run.run(toy, workdir)
  else:  # On all devices, of which each has the frozen T5.
    loop.train(toy, workdir, *loop.setup(toy, workdir))
  last = stage_directory(workdir, toy, 1)
  assert saved_steps.finished_step(last) == 1
  assert saved_steps.latest_step(first) == (0 if index == 0 else None)
  # One step at a rate of 1e-3 from what was imported.
  trained = restore.restore_item(last, 1, 'params')['unet']['level_0']
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-3),
    trained,
    params['unet']['level_0'],
  )


def stray(tmp_path, config, index, random_params):
  """A file of a stage's weights, with tensors that it does not need."""
  model = make_model(config, config.stages[index])
  params = random_params(model, config.text.max_length)
  tensors = to_release(params['unet'], model.unet.levels)
  for name in ('num_batches', 'inner_unet.inner_unet.ema.decay'):
    tensors[name] = np.zeros(1, np.float32)
  torch_checkpoint.write_state_dict(tmp_path / 'a.pth', tensors)
  return params


def test_stray_tensors_are_left_out_if_asked(
  toy, random_params, tmp_path, caplog
):
  caplog.set_level('INFO', logger='absl')
  params = stray(tmp_path, toy, 1, random_params)

  def run(ignore):
    import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run', ignore=ignore)

  with pytest.raises(
    ValueError,
    match='unknown inner_unet.inner_unet.ema.decay; unknown num_batches. '
    '--ignore=REGEX skips unknown tensors.',
  ):
    run(None)
  with pytest.raises(ValueError, match='fit: unknown num_batches. --ignore='):
    run('ema')
  with pytest.raises(
    ValueError, match='in no tensor .* not have: those are inner.*, num_batch'
  ):
    run('optimizer')
  with pytest.raises(ValueError, match=r"--ignore='\(' is no regular expr"):
    run('(')
  assert not (tmp_path / 'run').exists()
  run('.')  # It matches the model's own tensors, too.
  assert (
    'Ignored 2 tensors: inner_unet.inner_unet.ema.decay, num_batches.'
    in caplog.text
  )
  found = restore.restore_item(
    stage_directory(tmp_path / 'run', toy, 1), 0, 'ema'
  )
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_what_is_missing_is_never_ignored(toy, random_params, tmp_path):
  model = make_model(toy, toy.stages[0])
  params = random_params(model, toy.text.max_length)
  tensors = to_release(params['unet'], model.unet.levels)
  path = tmp_path / 'a.pth'
  torch_checkpoint.write_state_dict(path, tensors)
  with pytest.raises(ValueError, match='does not have: those are none'):
    import_checkpoint(path, toy, tmp_path / 'run', ignore='.')
  del tensors['lm_proj.bias']
  tensors['stray'] = np.zeros(1, np.float32)
  torch_checkpoint.write_state_dict(path, tensors)
  with pytest.raises(ValueError, match='fit: missing lm_proj.bias$'):
    import_checkpoint(path, toy, tmp_path / 'run', ignore='.')


def test_it_is_sampled_in_float32_and_trained_as_the_recipe_says(
  toy, random_params, tmp_path, caplog
):
  caplog.set_level('INFO', logger='absl')
  toy.dtype = 'bfloat16'
  params = write_toy(toy, tmp_path / 'a.pth', 0, random_params)
  workdir = tmp_path / 'run'
  import_checkpoint(tmp_path / 'a.pth', toy, workdir)
  assert toy.dtype == 'bfloat16'
  assert caplog.text.count('in float32, where the recipe trains in bf') == 1
  assert '--config.dtype=bfloat16 to sample in that' in caplog.text
  assert session.open_run(str(workdir)).config.dtype == 'float32'
  # Training has not begun, and may have the dtype of its recipe.
  loop.setup(toy, workdir)
  assert session.open_run(str(workdir)).config.dtype == 'bfloat16'
  # Then it stays.
  toy_run.save_run(workdir, toy, 1, 1, params)
  toy.dtype = 'float32'
  with pytest.raises(ValueError, match="dtype: 'bfloat16' -> 'float32'"):
    loop.setup(toy, workdir)


def test_the_command_says_what_it_changes(
  t5_directory, random_params, tmp_path
):
  text = toy_run.recipe(
    1,
    2,
    dtype='bfloat16',
    text__encoder='t5',
    text__path=str(t5_directory.path),
  )
  (tmp_path / 'recipe.py').write_text(text)
  exec(text, found := {})
  stray(tmp_path, found['get_config'](), 0, random_params)

  def run(workdir, *flags):
    return commands.run(
      'mdm_jax.tools.import_ml_mdm',
      f'--checkpoint={tmp_path / "a.pth"}',
      f'--config={tmp_path / "recipe.py"}',
      f'--workdir={tmp_path / workdir}',
      *flags,
    )

  refused = run('a', '--ignore=[')
  assert refused.returncode == 1
  assert "error: --ignore='[' is no regular expression" in refused.stderr
  assert 'Traceback' not in refused.stderr
  for workdir, flags, dtype in [
    ('a', [], 'float32'),
    ('b', ['--config.dtype=bfloat16'], 'bfloat16'),
  ]:
    result = run(workdir, '--ignore=num|ema', *flags)
    assert result.returncode == 0, result.stderr
    assert 'Ignored 2 tensors: ' in result.stderr
    assert ('computed in float32' in result.stderr) == (dtype == 'float32')
    assert read_config(tmp_path / workdir)['dtype'] == dtype


def test_misfits_are_named(toy, random_params, tmp_path):
  write_toy(toy, tmp_path / 'a.pth', 1, random_params)
  toy.stages[1].num_levels = 1
  with pytest.raises(
    ValueError,
    match=r'a.pth has 2 levels, but the stages .*'
    r'\[1, 1\]',
  ):
    import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run')
  toy.stages[1].num_levels = 2
  toy.model.levels[1].num_blocks = (1, 0)
  with pytest.raises(ValueError, match='The weights do not fit: '):
    import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run')
  toy.text.encoder = 'learned'
  with pytest.raises(ValueError, match="use 't5'"):
    import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_used_workdir_is_left_alone(toy, random_params, tmp_path):
  write_toy(toy, tmp_path / 'a.pth', 0, random_params)
  import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run')
  with pytest.raises(ValueError, match='0_8 exists: give another --workdir'):
    import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run')
  # As a process leaves it that is killed while it saves.
  (tmp_path / 'run/checkpoints/0_8/0/manifest.json').unlink()
  import_checkpoint(tmp_path / 'a.pth', toy, tmp_path / 'run')


def test_a_run_is_not_imported_into(toy, random_params, tmp_path):
  params = write_toy(toy, tmp_path / 'a.pth', 0, random_params)
  write_toy(toy, tmp_path / 'b.pth', 1, random_params)
  workdir = tmp_path / 'run'
  import_checkpoint(tmp_path / 'a.pth', toy, workdir)
  written = (workdir / 'config.json').read_bytes()
  toy.stages[0].learning_rate *= 2
  with pytest.raises(ValueError, match=r'another config .*\.learning_rate'):
    import_checkpoint(tmp_path / 'b.pth', toy, workdir)
  toy.stages[0].learning_rate /= 2
  toy_run.save_run(workdir, toy, 0, 1, params)
  with pytest.raises(ValueError, match='0_8 has been trained: give another --'):
    import_checkpoint(tmp_path / 'b.pth', toy, workdir, dtype='bfloat16')
  assert (workdir / 'config.json').read_bytes() == written


def test_another_stage_is_imported_beside_the_first(
  toy, random_params, tmp_path
):
  write_toy(toy, tmp_path / 'a.pth', 0, random_params)
  write_toy(toy, tmp_path / 'b.pth', 1, random_params)
  workdir = tmp_path / 'run'
  import_checkpoint(tmp_path / 'a.pth', toy, workdir)
  import_checkpoint(tmp_path / 'b.pth', toy, workdir, dtype='bfloat16')
  assert read_config(workdir)['dtype'] == 'bfloat16'
  assert [
    saved_steps.latest_step(stage_directory(workdir, toy, index))
    for index in range(2)
  ] == [0, 0]
