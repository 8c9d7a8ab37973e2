"""Whole runs on a toy config: the files that they write, and exact resumes."""

import itertools
import json
import os
import pathlib
import re
import shutil
import types

import jax
import numpy as np
from PIL import Image
import pytest

from configs import common
import mdm_jax
from mdm_jax.builders.config import stage_directory, write_config
from mdm_jax.builders.data import batch_keys, make_source
from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import make_stage
from mdm_jax.checkpoint import manifest, restore, saved_steps
from mdm_jax.data import tar_index
from mdm_jax.data.pipeline import DataError
from mdm_jax.data.transforms import Transform
from mdm_jax.inference import validation, weights
from mdm_jax.optim import skip_step
from mdm_jax.report import goodput
from mdm_jax.runtime import directory_lock, replica_check, sharding
from mdm_jax.tools import train_tokenizer
from mdm_jax.training import expected, initial_state, loop, monitor
from tests import commands, toy
from tests.data import test_benchmarks
from tests.report.test_metric_writer import read_events
from tests.runtime.test_files import UNREADABLE
from tests.tools.test_prepare_data import good_files, write_tar


def toy_config():
  """Two stages of a few steps on one device, the second on mixed batches."""
  config = common.get_config()
  config.model.levels = [common.level(8), common.level(16)]
  config.stages = [common.stage('8', 1), common.stage('16', 2)]
  config = toy.shrink(common.smoke(config))
  for stage in config.stages:
    stage.batch_size = 8
  config.stages[1].update(mixed_ratio=(1.0, 1.0), batch_size=16)
  config.checkpoint_every = 2
  config.checkpoints_to_keep = 3
  config.averages.update(widths=(0.05, 0.1), snapshot_every=2)
  config.eval.update(every=3, loss_every=2, best_metric='held_out_loss_8')
  return config.lock()


def save_nothing_beside(config):
  config.averages.widths = ()
  config.eval.update(every=0, loss_every=0, best_metric='')


# What `finished` has compared with a recorded run: stage, step, metrics.
COMPARED = []


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The working directory of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('run')

  def make_comparison(stage):
    return lambda step, values: COMPARED.append((stage.name, step, {**values}))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(expected, 'make_comparison', make_comparison)
    toy.run(toy_config(), workdir, count_work=True)
  return workdir


def test_metrics_are_compared_with_those_of_a_recorded_run(finished):
  for name, steps in (
    ('loss_8', {('8', 2), ('8', 4), ('8', 6), ('16', 2), ('16', 4), ('16', 6)}),
    ('grad_norm', {('8', 2), ('8', 4), ('8', 6)}),
    ('held_out_loss_16', {('16', 2), ('16', 3), ('16', 4), ('16', 6)}),
    ('accuracy_all', {('8', 3), ('8', 6), ('16', 3), ('16', 6)}),
  ):
    found = {
      (stage, step) for stage, step, values in COMPARED if name in values
    }
    assert found >= steps, name


def test_writes_the_documented_files(finished):
  for name in ('8_3', '8_6', '16_3', '16_6'):
    with Image.open(finished / 'samples' / f'{name}.png') as image:
      assert min(image.size) > 100
  lines = [
    json.loads(line)
    for line in (finished / 'metrics.jsonl').read_text().splitlines()
  ]
  losses = [line for line in lines if 'loss_16' in line]
  assert [line['step'] for line in losses] == [2, 4, 6]
  assert losses[0]['loss'] == pytest.approx(
    losses[0]['loss_8'] + losses[0]['loss_16'], rel=1e-5
  )
  for key in (
    'grad_norm',
    'last_grad_norm',
    'update_norm',
    'param_norm',
    'learning_rate',
    'images_per_second',
    'flops_per_second',
    'mfu',
  ):
    assert losses[0][key] > 0
  for line in losses:
    assert line['images_seen'] == 16 * line['step']
    assert line['images_per_second'] * line['seconds_per_step'] == (
      pytest.approx(16)
    )
    # Each level sees at least one example of a band.
    bands = [name for name in line if '_noise_' in name]
    assert {name[: -len(name.partition('_noise_')[2])] for name in bands} == {
      'loss_8_noise_',
      'loss_16_noise_',
    }
    for size in ('8', '16'):
      each = [line[name] for name in bands if name.startswith(f'loss_{size}_')]
      assert min(each) <= line[f'loss_{size}'] <= max(each)
  stages = [
    read_events(finished / 'tensorboard' / name) for name in ('8', '16')
  ]
  for events in stages:
    assert [event.step for event in events.Images('samples')] == [3, 6]
    assert events.Images('samples')[-1].width > 100
    assert [event.step for event in events.Scalars('train/loss')] == [2, 4, 6]
  values = json.loads((finished / 'eval' / '6.json').read_text())
  metrics = evaluations(finished)
  assert [*metrics] == [
    (stage, step) for stage in ('8', '16') for step in (2, 3, 4, 6)
  ]
  assert metrics['16', 6] == values
  # Without samples by `eval.loss_every`.
  assert set(metrics['8', 4]) == {'held_out_loss_8'}
  assert set(metrics['8', 3]) == set(values) - {'held_out_loss_16'}
  assert (
    metrics['8', 3]['held_out_loss_8'] != metrics['8', 6]['held_out_loss_8']
  )
  event = stages[1].Scalars('eval/held_out_loss_16')[-1]
  assert event.step == 6
  assert event.value == pytest.approx(values['held_out_loss_16'])
  assert 0 < values['held_out_loss_16'] < 2
  assert 0 <= values['accuracy_background'] <= 1
  (chances,) = {
    line['chance_background']
    for line in lines_of(finished / 'metrics.jsonl')
    if 'accuracy_background' in line
  }
  assert chances == pytest.approx(1 / 6, abs=0.01)


def evaluations(workdir) -> dict[tuple[str, int], dict[str, float]]:
  """Metrics of the evaluations, by stage and step."""
  return {
    (line['stage'], line['step']): {
      name: value
      for name, value in line.items()
      if name.startswith(('held_out', 'accuracy'))
    }
    for line in lines_of(workdir / 'metrics.jsonl')
    if 'held_out_loss_8' in line
  }


def saved_beside(workdir, config) -> dict[str, dict]:
  """The saved state and extra values of each snapshot and of the best EMA."""
  found = {}
  for index in range(2):
    for kind in ('averages', 'best'):
      directory = stage_directory(workdir, config, index, kind)
      for step in saved_steps.good_steps(directory):
        extra = restore.read_extra(directory, step)
        found[f'{kind}/{index}/{step}'] = extra | {
          name: restore.restore_item(directory, step, name)
          for name in extra.get('widths', ['ema'])
        }
  return found


def test_snapshots_and_the_best_are_saved(finished):
  config = toy_config()
  kept = saved_beside(finished, config)
  assert {name for name in kept if name.startswith('averages')} == {
    f'averages/{index}/{step}' for index in range(2) for step in (2, 4, 6)
  }
  assert kept['averages/1/4']['updates'] == 4
  for index, stage in enumerate(('8', '16')):
    losses = {
      step: evaluations(finished)[stage, step]['held_out_loss_8']
      for step in (2, 3, 4, 6)
    }
    best = min(losses, key=losses.get)
    assert kept[f'best/{index}/{best}']['value'] == losses[best]
    assert len([name for name in kept if name.startswith(f'best/{index}')]) == 1

  last = stage_directory(finished, config, 1)
  params, lags = (
    restore.restore_item(last, None, name) for name in ('params', 'lags')
  )
  found = weights.restore_weights(config, finished, sigma_rel=0.1).params
  jax.tree.map(
    lambda x, p, lag: np.testing.assert_allclose(x, p + lag, atol=1e-6),
    found,
    params,
    lags['0.1'],
  )
  # The metrics are those of the saved weights.
  mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
  found = weights.restore_weights(config, finished, mesh, best=True).params
  assert (
    validation.validate(make_stage(config, 1), mesh, found)
    == (evaluations(finished)['16', best])
  )


def test_a_finished_run_does_not_train_again(finished):
  config = toy_config()
  before = toy.digest(finished, config, 1)
  toy.run(config, finished)
  assert toy.digest(finished, config, 1) == before


def test_resumed_equals_uninterrupted(finished, tmp_path):
  """Interrupted once in each stage, and begun by an older version."""
  config = toy_config().unlock()
  config.log_every = 1
  toy.stop_at(2, config, tmp_path, '8')
  toy.make_older(tmp_path)
  toy.stop_at(3, config, tmp_path, '16')
  toy.run(config, tmp_path)
  for index in range(2):
    assert toy.digest(tmp_path, config, index) == toy.digest(
      finished, config, index
    )
  assert evaluations(tmp_path) == evaluations(finished)
  # What is logged is the mean over the steps since the last line.
  for name in ('8', '16'):
    each, means = (
      {line['step']: line for line in training_lines(workdir, name)}
      for workdir in (tmp_path, finished)
    )
    assert ([*each], [*means]) == ([*range(1, 7)], [2, 4, 6])
    for last, mean in means.items():
      for key in ('loss', 'grad_norm', 'update_norm', 'loss_8'):
        pair = [each[last - 1][key], each[last][key]]
        assert pair[0] != pair[1]
        assert mean[key] == pytest.approx(np.mean(pair), rel=1e-6)
      assert mean['last_loss'] == each[last]['loss'] == each[last]['last_loss']
  found, expected = (
    saved_beside(workdir, config) for workdir in (tmp_path, finished)
  )
  assert [*found] == [*expected]
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_damaged_last_checkpoint_is_trained_again(finished, tmp_path, caplog):
  config = toy_config()
  workdir = shutil.copytree(finished, tmp_path / 'run')
  directory = stage_directory(workdir, config, 1)
  for path in (directory / '6' / 'state' / 'd').iterdir():
    path.write_bytes(path.read_bytes()[:-1])
  toy.run(config, workdir)
  assert 'finished at step 6, but its newest good checkpoint is 4' in (
    caplog.text
  )
  assert (directory / '6.corrupt').exists()
  assert toy.digest(workdir, config, 1) == toy.digest(finished, config, 1)


@pytest.mark.parametrize(
  'case, is_finished', [('empty', True), ('directory', False)]
)
def test_side_files_that_cannot_be_read_are_made_anew(
  finished, tmp_path, case, is_finished, caplog
):
  config = toy_config()
  workdir = shutil.copytree(finished, tmp_path / 'run')
  last = stage_directory(workdir, config, 1).relative_to(workdir)
  # A stage that is not finished is evaluated anew at its end, in any case.
  named = ['config.json', 'eval/6.json']
  if not is_finished:
    named = ['config.json', 'run.json', f'{last}/finished.json']
  compared = [*named, 'eval/6.json']
  for name in {*named, 'eval/6.json', 'goodput.jsonl', 'metrics.jsonl'}:
    (workdir / name).unlink()
    UNREADABLE[case][0](workdir / name)
  toy.run(config, workdir)
  assert toy.digest(workdir, config, 1) == toy.digest(finished, config, 1)
  for name in named:
    assert f'{name} is ' in caplog.text
  for name in compared:
    made, old = (
      json.loads((path / name).read_text()) for path in (workdir, finished)
    )
    assert made == old, name


def test_swapped_stages_end_the_run_with_one_line(finished, tmp_path):
  config = toy_config()
  workdir = shutil.copytree(finished, tmp_path / 'run')
  first, last = (stage_directory(workdir, config, index) for index in range(2))
  first.rename(tmp_path / 'first')
  last.rename(first)
  (tmp_path / 'first').rename(last)
  with pytest.raises(saved_steps.CheckpointError) as error:
    toy.run(config, workdir)
  assert f'6: it was saved as step 6 of checkpoints/{first.name}' in (
    str(error.value)
  )


def test_checkpoints_by_time_change_nothing_else(finished, tmp_path):
  """A moment is always over: wherever a flag can be read, a state is saved."""
  config = toy_config().unlock()
  config.model.levels = config.model.levels[:1]
  config.stages = config.stages[:1]
  config.update(
    checkpoint_every=1000, checkpoint_minutes=1e-9, checkpoints_to_keep=9
  )
  toy.run(config.lock(), tmp_path)
  directory = stage_directory(tmp_path, config, 0)
  # Step 5 ends while the devices are one step ahead, its flag is read with 6.
  assert saved_steps.good_steps(directory) == [2, 3, 4, 6]
  assert toy.digest(tmp_path, config, 0) == toy.digest(finished, config, 0)


def poison(monkeypatch, key):
  """Makes the size of a record NaN."""
  call = Transform.__call__

  def poisoned(self, record, rng):
    example = call(self, record, rng)
    if record['key'] == key:
      example['scale'] = np.float32(np.nan)
    return example

  monkeypatch.setattr(Transform, '__call__', poisoned)


def one_stage():
  config = toy_config().unlock()
  config.model.levels = config.model.levels[:1]
  config.stages = config.stages[:1]
  config.sample_every = 6
  save_nothing_beside(config)
  return config


def lines_of(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def training_lines(workdir, stage='8') -> list[dict]:
  return [
    line
    for line in lines_of(workdir / 'metrics.jsonl')
    if 'last_loss' in line and line['stage'] == stage
  ]


def test_poisoned_step_is_skipped_also_when_resumed(tmp_path, monkeypatch):
  config = one_stage().lock()
  keys = batch_keys(config, [(8, 8, 3)], [8], batch=2)
  poison(monkeypatch, keys[5])
  once, twice = tmp_path / 'once', tmp_path / 'twice'
  toy.run(config, once)
  toy.stop_at(3, config, twice)
  toy.run(config, twice)
  line = {
    'stage': '8',
    'step': 3,
    'loss': 'nan',
    'grad_norm': 'nan',
    'keys': keys,
  }
  assert lines_of(once / 'skipped.jsonl') == [line]
  # A mean leaves it out: of steps 3 and 4 it is step 4's.
  logged = training_lines(once)[1]
  assert logged['skipped_steps'] == 1
  assert logged['loss'] == logged['last_loss'] > 0
  assert logged['grad_norm'] == logged['last_grad_norm'] > 0
  assert lines_of(twice / 'skipped.jsonl') == [line, line]
  assert toy.digest(once, config, 0) == toy.digest(twice, config, 0)
  state = restore.restore_item(stage_directory(once, config, 0), None, 'guard')
  assert (state['accepted'], state['skipped'], state['in_a_row']) == (5, 1, 0)
  # Steps 3 and 4 were trained twice.
  sessions, seconds = goodput.totals(twice)
  assert sessions == 2
  assert seconds['lost'] > 0
  line = lines_of(twice / 'metrics.jsonl')[-1]
  assert (line['stage'], line['step']) == ('goodput', 2)
  assert line['step_seconds'] == pytest.approx(seconds['step'])
  for bucket in ('start_up', 'compile', 'step', 'save', 'sample', 'evaluate'):
    assert seconds[bucket] > 0
  for session, lines in itertools.groupby(
    lines_of(twice / 'goodput.jsonl'), lambda line: line['session']
  ):
    lines = list(lines)
    assert sum(sum(line['seconds'].values()) for line in lines) == (
      pytest.approx(lines[-1]['time'] - session, rel=0.01)
    )


def test_too_many_poisoned_steps_stop_the_run(tmp_path, monkeypatch):
  config = one_stage()
  config.guard.max_skipped = 2
  for batch in (1, 3, 4):
    poison(monkeypatch, batch_keys(config, [(8, 8, 3)], [8], batch)[0])
  message = r"stage 1/1 '8': 2 consecutive steps were skipped, the last is 5"
  for _ in range(2):
    with pytest.raises(skip_step.Diverged, match=message):
      toy.run(config.lock(), tmp_path)
  directory = stage_directory(tmp_path, config, 0)
  assert saved_steps.latest_step(directory) == 4
  for key in ('params', 'ema', 'opt_state'):
    for leaf in jax.tree.leaves(restore.restore_item(directory, None, key)):
      assert np.isfinite(leaf).all()


def test_a_device_with_another_copy_is_named(tmp_path, monkeypatch):
  config = one_stage()
  config.replicas_every = 3
  place = sharding.place

  def harm(tree, shardings):
    placed = place(tree, shardings)
    conv = placed['unet']['level_0']['conv_in']
    shards = conv['kernel'].addressable_shards
    copies = [np.array(shard.data) for shard in shards]
    copies[6].view(np.uint8).flat[2] ^= 1
    conv['kernel'] = jax.make_array_from_single_device_arrays(
      copies[0].shape,
      conv['kernel'].sharding,
      [
        jax.device_put(copy, shard.device)
        for copy, shard in zip(copies, shards)
      ],
    )
    return placed

  monkeypatch.setattr(sharding, 'place', harm)
  mesh = sharding.make_mesh(config.mesh)
  with pytest.raises(
    replica_check.ReplicasDiffer,
    match=('cpu:6 of process 0 has another copy of params.*conv_in.kernel'),
  ):
    loop.train(config.lock(), tmp_path, mesh, {})
  # Before it was saved.
  assert saved_steps.latest_step(stage_directory(tmp_path, config, 0)) is None


def test_another_config_is_refused(finished):
  config = toy_config().unlock()
  config.stages[1].steps = 7
  # These may be others.
  config.mesh.update(data=1, spatial=8)
  config.stages[1].accumulate = 2
  with pytest.raises(ValueError, match=r'\(stages\[1\].steps: 6 -> 7\)'):
    loop.setup(config, finished)


def places(value, path=''):
  """(path, container, key) of every value in a tree of JSON."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, child in list(items):
    name = f'{path}[{key}]' if isinstance(key, int) else f'{path}.{key}'
    if isinstance(child, dict | list) and child:
      yield from places(child, name)
    else:
      yield name.removeprefix('.'), value, key


def test_every_key_but_those_named_must_stay(tmp_path):
  config = toy_config()
  written = json.loads(config.to_json())
  refused = []
  for name, container, key in places(written):
    value = container[key]
    container[key] = not value if isinstance(value, bool) else f'{value}1'
    write_config(tmp_path, written)
    try:
      loop.setup(config, tmp_path)
    except ValueError as error:
      assert f'another config ({name}: ' in str(error)
      refused.append(name)
    container[key] = value
  allowed = [name for name, *_ in places(written) if name not in refused]
  assert {re.split(r'[.[]', name)[0] for name in allowed} == {
    'mesh',
    'sharding_rules',
    'data',
    'log_every',
    'trackers',
    'sample_every',
    'checkpoint_every',
    'checkpoint_minutes',
    'checkpoints_to_keep',
    'save_failures',
    'averages',
    'replicas_every',
    'profile_every',
    'text',
    'sampler',
    'eval',
    'guard',
    'watchdog',
    'model',
    'stages',
  }
  assert {name for name in allowed if name.startswith(('data.', 'text.'))} == {
    'data.num_workers',
    'data.num_threads',
    'data.prefetch',
    'data.max_bad_fraction',
    'data.may_change',
    'data.max_pixels',
    'text.class_names',
    'data.path',
    'data.image_path',
    'text.path',
    'text.tokenizer',
  }
  assert {name for name in allowed if name.startswith(('model', 'stages'))} == {
    f'{name}[{i}].{key}'
    for i in range(2)
    for name, key in (
      ('model.levels', 'lanes'),
      ('model.levels', 'remat'),
      ('stages', 'accumulate'),
    )
  }
  assert {
    'dtype',
    'seed',
    'model.levels[1].channels[0]',
    'data.name',
    'stages[0].learning_rate',
    'optimizer.ema_decay',
    'averages.widths[0]',
  } < set(refused)
  assert len(refused) > 80


def run_sample(real=False, **options):
  """Runs the command in a process of its own: commands share flags' names."""
  flags = [
    f'--{name}={value}'
    for name, values in options.items()
    for value in (values if isinstance(values, list) else [values])
  ]
  return commands.run(
    'mdm_jax.sample', *flags, env=commands.on_devices(1), real=real
  )


def test_sample_command(finished, tmp_path):
  prompts = ['a red ring, on grey', 'a small blue star, on white']
  with directory_lock.holding(finished):  # It only reads there.
    result = run_sample(
      real=True,
      workdir=finished,
      prompt=prompts,
      num_samples=2,
      steps=2,
      output=tmp_path,
      seed=5,
      animate=True,
    )
  assert result.returncode == 0, result.stderr
  lines = [
    json.loads(line)
    for line in (tmp_path / 'samples.jsonl').read_text().splitlines()
  ]
  assert [line['prompt'] for line in lines] == [
    prompts[0],
    prompts[0],
    prompts[1],
    prompts[1],
  ]
  assert [line['seed'] for line in lines] == [5, 6, 7, 8]
  assert lines[0]['num_steps'] == 2
  # Samples of another model are not taken for its own.
  last = stage_directory(finished, toy_config(), 1) / '6'
  assert lines[0]['fingerprint'] == manifest.fingerprint(last)
  for line in lines:
    for resolution in ('8', '16'):
      with Image.open(tmp_path / line['files'][resolution]) as image:
        assert image.size == (int(resolution),) * 2
    with Image.open(tmp_path / line['files']['path']) as animation:
      assert animation.n_frames == 2
  assert (tmp_path / 'grid.png').exists()
  listed = tmp_path / 'prompts.txt'
  listed.write_text(f'{prompts[0]}\n\n' + 'a star ' * 1000, encoding='utf-8')
  # One more of each; the others are there, also if the run is of an older
  # version.
  older = shutil.copytree(finished, tmp_path / 'run')
  toy.make_older(older)
  result = run_sample(
    workdir=older,
    prompts_file=listed,
    num_samples=2,
    steps=2,
    output=tmp_path,
    seed=5,
    animate=True,
  )
  assert '2 of 4 samples exist already' in result.stderr
  assert '1 of 2 prompts are cut, such as "a star a star' in result.stderr


def seeds_in(directory):
  return [line['seed'] for line in lines_of(directory / 'samples.jsonl')]


def test_sample_for_benchmarks(finished, tmp_path):
  metadata = tmp_path / 'evaluation_metadata.jsonl'
  metadata.write_text(test_benchmarks.GENEVAL)
  output = tmp_path / 'geneval'
  flags = {
    'workdir': finished,
    'layout': 'geneval',
    'prompts_file': metadata,
    'num_samples': 2,
    'steps': 2,
  }
  result = run_sample(output=output, **flags)
  assert result.returncode == 0, result.stderr
  lines = test_benchmarks.GENEVAL.splitlines()
  for folder, line in zip(('00000', '00001'), lines, strict=True):
    assert json.loads((output / folder / 'metadata.jsonl').read_text()) == (
      json.loads(line)
    )
    images = sorted((output / folder / 'samples').iterdir())
    assert [path.name for path in images] == ['00000.png', '00001.png']
    for path in images:
      with Image.open(path) as image:
        assert image.size == (16, 16)
  # As its own program, with the same noise for each prompt.
  assert seeds_in(output) == [0, 1, 0, 1]
  images[0].unlink()
  result = run_sample(output=output, **flags)
  assert '3 of 4 samples exist already' in result.stderr
  assert images[0].exists()

  captions = tmp_path / 'captions_val2014.json'
  captions.write_text(json.dumps(test_benchmarks.annotations(3)))
  flags |= {'layout': 'coco', 'prompts_file': captions, 'num_samples': 1}
  result = run_sample(output=tmp_path / 'coco', **flags)
  assert result.returncode == 0, result.stderr
  names = {path.name for path in (tmp_path / 'coco').glob('*.png')}
  assert names == {'00000.png', '00001.png', '00002.png'}
  # Of the same noise for each prompt, a distance of sets would tell nothing.
  assert seeds_in(tmp_path / 'coco') == [0, 1, 2]
  for changes, error in (
    ({'output': output}, f'{output} has samples of another --layout'),
    ({'prompt': 'a ring'}, '--layout=coco takes its prompts from'),
    ({'prompts_file': metadata}, f'{metadata} has no captions of COCO'),
    ({'animate': True}, '--animate writes files that --layout has no place'),
  ):
    result = run_sample(**flags | changes)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f'error: {error}')


def test_sample_uses_an_older_checkpoint(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  last = stage_directory(workdir, toy_config(), 1) / '6'
  path = next((last / 'state' / 'd').iterdir())
  path.unlink()
  os.mkfifo(path)
  result = run_sample(workdir=workdir, prompt='x', num_samples=1, steps=1)
  assert result.returncode == 0, result.stderr
  text = f'{last.name} is damaged: {path.relative_to(last)} is a named pipe'
  assert text in result.stderr
  assert 'Traceback' not in result.stderr
  (line,) = lines_of(workdir / 'generated' / 'samples.jsonl')
  assert line['step'] == 4


def test_a_second_sampler_is_refused(finished):
  output = finished / 'generated'
  with directory_lock.holding(output):
    result = run_sample(workdir=finished, prompt='a red ring')
    assert [path.name for path in output.iterdir()] == ['.lock']
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith(
    f'error: {output} is in use: process {os.getpid()} on '
  )
  assert not output.exists()


def test_sample_with_a_guide(finished, tmp_path):
  prompt = 'a red ring, on grey'
  images = []
  for options in ({}, {'guide': finished}, {'guidance': 1}):
    result = run_sample(
      workdir=finished,
      prompt=prompt,
      num_samples=1,
      steps=2,
      output=tmp_path,
      **options,
    )
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / '0000_16.png') as image:
      images.append(np.asarray(image, int))
  # By itself it is guided nowhere.
  assert np.abs(images[1] - images[2]).max() <= 1
  assert np.abs(images[0] - images[2]).max() > 1
  result = run_sample(
    workdir=finished, prompt=prompt, guide=finished, negative_prompt='a star'
  )
  assert result.returncode == 1
  assert 'error: guidance leads away from one thing' in result.stderr


def test_samplers_are_compared(finished, tmp_path):
  output = tmp_path / 'found.json'

  def compare(steps, real=False):
    result = commands.run(
      'mdm_jax.tools.compare_samplers',
      f'--workdir={finished}',
      '--samplers=ddim',
      f'--steps={steps}',
      '--num_images=8',
      '--classifier_images=64',
      '--classifier_steps=1',
      f'--output={output}',
      env=commands.on_devices(1),
      real=real,
    )
    assert result.returncode == 0, result.stderr
    return result

  compare('2', real=True)
  (first,) = json.loads(output.read_text())
  assert first['frechet'] > 0
  assert 0 <= first['accuracy'] <= 1
  # Those of another model are not taken for its own, and stay.
  other = first | {'fingerprint': 'other', 'steps': 1}
  output.write_text(json.dumps([first, other]))
  result = compare('1,2')
  assert 'ddim, 2 steps' not in result.stderr
  assert 'ddim, 1 steps' in result.stderr
  *before, last = json.loads(output.read_text())
  assert before == [other, first]
  assert (last['steps'], last['fingerprint']) == (1, first['fingerprint'])
  assert [line.split()[:2] for line in result.stdout.splitlines()[2:]] == [
    ['ddim', '1'],
    ['ddim', '2'],
    ['chance', '-'],
  ]


def test_samples_are_shown_beside_the_data(finished, tmp_path):
  output = tmp_path / 'comparison.png'
  result = commands.run(
    'mdm_jax.tools.compare_with_data',
    f'--workdir={finished}',
    f'--output={output}',
    '--num_images=2',
    '--steps=2',
    '--guidance=0',  # So that the seeds alone differ.
    env=commands.on_devices(1),
  )
  assert result.returncode == 0, result.stderr
  with Image.open(output) as image:
    page = np.asarray(image)
  source = make_source(toy_config(), 'held_out', 16)
  # Levels of 8 and 16 pixels and the data, 128 px each, 2 px apart.
  shown = page[16 : 16 + 128 : 8, 16 + 260 : 16 + 388 : 8]
  np.testing.assert_array_equal(shown, source[0]['image'])
  first, second = samples_of_two_cells(page)
  assert np.abs(first - second).max() > 30


def samples_of_two_cells(page):
  """The finest samples on a page of two cells, one above the other."""
  height = (len(page) - 16) // 2
  return [
    page[start : start + 128 : 8, 146:274:8].astype(int)
    for start in (16, 16 + height)
  ]


def test_samples_are_shown_beside_the_nearest_images(finished, tmp_path):
  output = tmp_path / 'nearest.png'
  result = commands.run(
    'mdm_jax.tools.nearest_images',
    f'--workdir={finished}',
    f'--output={output}',
    *('--num_images=2', '--num_samples=4', '--num_training=8', '--steps=2'),
    '--guidance=0',  # So that the seeds alone differ.
    env=commands.on_devices(1),
  )
  assert result.returncode == 0, result.stderr
  page = np.asarray(Image.open(output))
  held_out = make_source(toy_config(), 'held_out', 16)[0]['image']
  training = make_source(toy_config(), 'train', 16)
  training = [training[i]['image'] for i in range(8)]
  # Levels of 8 and 16 pixels, the data and its neighbour, 128 px each, 2 px
  # apart.
  sample, data, neighbour = (
    page[16 : 16 + 128 : 8, start : start + 128 : 8]
    for start in (146, 276, 406)
  )
  np.testing.assert_array_equal(data, held_out)
  first, second = samples_of_two_cells(page)
  assert np.abs(first - second).max() > 30
  distances = [
    np.square(sample.astype(float) - image).mean() for image in training
  ]
  np.testing.assert_array_equal(neighbour, training[np.argmin(distances)])
  found = json.loads((tmp_path / 'nearest.json').read_text())
  assert found['samples'] == 4 and found['training_images'] == 8
  assert found['nearest_by_pixels']['median_of_held_out'] > 0
  assert 'frechet' not in found
  # What training has measured of the held-out images at its end.
  losses = found['losses']
  (path,) = [
    path for path in (finished / 'eval').glob('*.json') if path.stem.isdigit()
  ]
  for pixels, loss in losses['held_out'].items():
    expected = json.loads(path.read_text())[f'held_out_loss_{pixels}']
    assert loss == pytest.approx(expected, rel=1e-5)
    assert losses['training'][pixels] != loss


def test_sample_without_a_run_names_the_directory(tmp_path):
  result = run_sample(workdir=tmp_path / 'none', prompt='x')
  assert result.returncode == 1
  assert 'none: there is no such directory' in result.stderr
  assert 'Traceback' not in result.stderr


def image_config(path):
  config = toy_config().unlock()
  config.stages = config.stages[:1]
  config.data.update(name='tars', path=str(path), max_bad_fraction=1.0)
  save_nothing_beside(config)
  return config.lock()


@pytest.fixture
def images(tmp_path):
  """An index of twenty images; one of them is damaged."""
  files = good_files(20)
  files['007.jpg'] = files['007.jpg'][:-200]
  write_tar(tmp_path / 's.tar', files)
  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  return tmp_path / 'index'


def test_bad_records_are_counted_or_end_the_run(images, tmp_path, monkeypatch):
  config = image_config(images)
  toy.run(config, tmp_path / 'run')
  lines = [
    json.loads(line)
    for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  ]
  found = [line['bad_records'] for line in lines if 'bad_records' in line]
  # 48 examples are two epochs of 20 and 8 more.
  assert found == sorted(found) and found[-1] in (2, 3)
  monkeypatch.setattr(monitor, '_MIN_RECORDS', 0)
  config.data.max_bad_fraction = 0.01
  with pytest.raises(ValueError, match='could not be used, more than data'):
    toy.run(config, tmp_path / 'ended')


def test_another_data_set_is_refused(images, tmp_path):
  config = image_config(images)
  # An older run's name of it; the data set has no validation split.
  config.eval.update(every=3, best_metric='held_out_loss_8')
  toy.stop_at(2, config, tmp_path / 'run')
  tar = tmp_path / 's.tar'
  write_tar(tar, good_files(21))
  shutil.rmtree(images)
  tar_index.write_index([tar], str(images), 0.0)
  with pytest.raises(
    ValueError,
    match=(
      'not those of the last checkpoint .*records: .20. -> .21.; files: .* '
      'bring them back'
    ),
  ):
    toy.run(config, tmp_path / 'run')
  config.data.may_change = True
  toy.run(config, tmp_path / 'run')
  path = tmp_path / 'run' / 'eval' / '6.json'
  values = json.loads(path.read_text())
  assert values.keys() == {'train_split_loss_8'}
  best = restore.read_extra(
    stage_directory(tmp_path / 'run', config, 0, 'best')
  )
  assert best['metric'] == 'train_split_loss_8'
  path.write_text('{"held_out_loss_8": 0.25}')
  toy.run(config, tmp_path / 'run')
  lines = lines_of(tmp_path / 'run' / 'metrics.jsonl')
  last = [line for line in lines if 'train_split_loss_8' in line][-1]
  assert last['train_split_loss_8'] == 0.25
  assert not any('held_out_loss_8' in line for line in lines)


def test_another_tokenizer_is_refused_in_the_next_stage(finished, tmp_path):
  config = toy_config()
  toy.stage_anew(finished, tmp_path / 'run', config, 1)
  path = tmp_path / 'other.model'
  path.write_bytes(train_tokenizer.train(['a cat on a mat'] * 3, 280))
  config.text.tokenizer = str(path)
  with pytest.raises(DataError, match='last checkpoint .tokenizer: '):
    toy.run(config, tmp_path / 'run')


def test_data_that_differ_from_those_of_the_checkpoint():
  config = common.get_config()
  stage = types.SimpleNamespace(config=config)
  old, new = ({'tokenizer': 'a', 'Pillow': x} for x in ('13.0.0', '12.3.0'))
  initial_state._check_data(stage, old, new)
  # Earlier versions did not note the text encoder.
  initial_state._check_data(stage, old, new | {'text_encoder': 'a'})
  with pytest.raises(DataError, match='text_encoder'):
    initial_state._check_data(
      stage, old | {'text_encoder': 'b'}, new | {'text_encoder': 'a'}
    )
  with pytest.raises(DataError, match='tokenizer'):
    initial_state._check_data(stage, old, new | {'tokenizer': 'b'})
  config.data.name = 'captioned_images'
  with pytest.raises(DataError, match="Pillow: '13.0.0' -> '12.3.0'"):
    initial_state._check_data(stage, old, new)


def test_classes_of_a_tfds_data_set(flowers, tmp_path):
  config = common.get_config()
  config.model.levels = [common.level(8)]
  config.stages = [common.stage('8', 1)]
  config = toy.shrink(common.smoke(config))
  config.data.update(
    name='tfds:flowers', path=str(flowers), validation_split='test'
  )
  config.text.update(
    encoder='label',
    num_classes=3,
    caption_dropout=0.0,
    class_names=str(flowers / 'flowers/1.0.0/label.labels.txt'),
  )
  # The first two pass zero-initialised layers to reach the text encoder.
  config.stages[0].update(steps=4, batch_size=8)
  config.eval.update(num_prompts=8, batch_size=8)
  toy.run(config.lock(), tmp_path)
  directory = stage_directory(tmp_path, config, 0)
  fresh = make_model(config, config.stages[0]).init(0, 1)
  weights = restore.restore_item(directory, None, 'params')
  before, after = (
    params['text_encoder']['embedding']['embedding']
    for params in (fresh, weights)
  )
  # Padding and the empty label were never seen, every class was.
  assert (
    np.equal(before, after).all(axis=1).tolist() == [True] * 2 + [False] * 3
  )
  assert (tmp_path / 'samples' / '8_4.png').exists()
  values = json.loads((tmp_path / 'eval' / '4.json').read_text())
  assert set(values) == {'held_out_loss_8'}

  # Sampling needs only the names of the classes from the data set.
  for path in flowers.glob('flowers/1.0.0/*record*'):
    path.unlink()
  images = mdm_jax.load(tmp_path).sample(
    ['tulip', '1', '0'], steps=1, seed=[0, 0, 0]
  )
  np.testing.assert_array_equal(images[0], images[1])
  assert not np.array_equal(images[0], images[2])
  result = run_sample(workdir=tmp_path, prompt='rosehip')
  assert result.returncode == 1
  assert "error: no classes are 'rosehip'" in result.stderr
