"""A run of a recorded recipe is compared with the recorded one; others not."""

import importlib
import json
import pathlib
import shutil
import subprocess
import sys
import types

from etils import epath
import jax
import numpy as np
import pytest

from mdm_jax.builders.config import has_config_of, write_config
from mdm_jax.builders.stage import make_stages
from mdm_jax.runtime import files
from mdm_jax.training import expected

ROOT = pathlib.Path(__file__).parents[2]
STEPS = range(50, 2001, 50)


def loss_at(step):
  return 2 / step**0.5


def lines(name='8'):
  """A made metrics.jsonl: a line before an interruption counts no more."""
  found = [{'time': 1.0, 'stage': name, 'step': 100, 'loss': 99.0}]
  for step in STEPS:
    numbers = {'loss': loss_at(step), 'loss_8': loss_at(step), 'grad_norm': 0.5}
    numbers |= {'mfu': 0.1, 'loss_8_noise_0_25': 1.0, 'images_seen': 3}
    found.append({'time': 1.0, 'stage': name, 'step': step, **numbers})
  metrics = {'held_out_loss_8': 0.1, 'accuracy_all': 0.4, 'chance_all': 0.1}
  metrics |= {'accuracy_all_1_object': 0.4, 'last_loss': 'nan'}
  return [*found, {'time': 1.0, 'stage': name, 'step': 2000, **metrics}]


@pytest.fixture
def directory(monkeypatch, tmp_path):
  """Where the recorded runs are."""
  spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(expected.importlib.util, 'find_spec', lambda name: spec)
  (tmp_path / 'expected').mkdir()
  return tmp_path / 'expected'


@pytest.fixture
def config(make_config):
  config = make_config()
  config.log_every = 50
  return config


def record(path, config, **changes):
  document = {
    'config': json.loads(config.to_json()),
    'bands': expected.BANDS,
    'curves': expected.curves_of(lines()),
  }
  path.write_text(json.dumps(document | changes))


def test_curves():
  curves = expected.curves_of(lines())['8']
  assert curves.keys() == {
    *('loss_8', 'grad_norm', 'held_out_loss_8', 'accuracy_all')
  }
  steps, values = curves['loss_8']
  assert steps[0] == 50 and steps[-1] == 2000
  assert steps == sorted(steps) and 15 < len(steps) <= 40
  for step in (50, 70, 333, 1999, 2000):
    found = expected.value_at(curves['loss_8'], step)
    assert found == pytest.approx(loss_at(step), rel=0.05)
  assert expected.value_at(curves['loss_8'], 49) is None
  assert expected.value_at(curves['loss_8'], 2001) is None
  assert curves['accuracy_all'] == [[2000], [0.4]]
  assert expected.value_at(curves['accuracy_all'], 2000) == 0.4


@pytest.mark.parametrize(
  'step, values, named',
  [
    (100, {'loss': 9.9, 'loss_8': 0.29, 'grad_norm': 1.4}, None),
    (100, {'loss_8': 0.31, 'grad_norm': 0.5}, 'loss_8 is 0.31, but 0.2 in'),
    (100, {'loss_8': 0.1}, 'loss_8 is 0.1, but 0.2 in'),
    (1000, {'grad_norm': 2.0}, 'grad_norm is 2, but 0.5 in'),
    (1000, {'loss_8': float('nan')}, 'loss_8 is nan'),
    (2000, {'held_out_loss_8': 0.2}, 'held_out_loss_8 is 0.2, but 0.1 in'),
    (2000, {'accuracy_all': 0.27}, None),
    (2000, {'accuracy_all': 0.2}, 'more than 15 points off'),
    # Nothing is known of these.
    (1000, {'accuracy_all': 0.0, 'held_out_loss_8': 9.0, 'x': 1.0}, None),
    (10, {'loss_8': 9.0}, None),
    (3000, {'loss_8': 9.0}, None),
  ],
)
def test_far_values_are_named_once(
  directory, config, caplog, step, values, named
):
  record(directory / 'a.json', config)
  stage = make_stages(config)[0]
  compare = expected.make_comparison(stage)
  compare(step, values)
  compare(step, values)
  found = [each.getMessage() for each in caplog.records]
  assert len(found) == (named is not None)
  if named:
    assert named in found[0] and '\n' not in found[0]
    assert f'{stage.title}: at step {step} ' in found[0]
    assert 'configs/expected/a.json' in found[0]
  # The other stage has no curves.
  expected.make_comparison(make_stages(config)[1])(step, {'loss_8': 99.0})
  assert len(caplog.records) == len(found)


@pytest.mark.parametrize(
  'changes, is_same',
  [
    ({}, True),
    ({'data.path': '/mine', 'text.tokenizer': '/mine.model'}, True),
    ({'mesh.data': 2, 'checkpoint_every': 7, 'trackers': ()}, True),
    ({'log_every': 1}, False),
    ({'seed': 1}, False),
    ({'sampler.guidance': 1.5}, False),
    ({'eval.num_prompts': 8}, False),
    ({'optimizer.b2': 0.9}, False),
  ],
)
def test_changed_recipes_are_not_compared(config, directory, changes, is_same):
  record(directory / 'a.json', config)
  config.update_from_flattened_dict(changes)
  new = json.loads(config.to_json())
  assert (expected.find(new) is not None) == is_same


def test_a_key_that_was_added_since_is_no_change(config):
  new = json.loads(config.to_json())
  old = json.loads(config.to_json())
  del old['sampler']['pixels'], old['stages'][0]['accumulate']
  assert has_config_of(old, new)
  new['sampler']['pixels'] = 'truncate'
  assert not has_config_of(old, new)


@pytest.mark.parametrize(
  'change',
  [
    {'bands': {'loss': 'x'}},
    {'curves': {'8': {'loss': [[1, 2], [3]]}}},
    {'curves': {'8': {'loss': [[2, 1], [3, 3]]}}},
    {'curves': {'8': {'loss': [[0], [3]]}}},
    {'curves': {'8': {'loss': [[], []]}}},
    {'curves': {'8': []}},
    {'bands': None},
  ],
  ids=str,
)
def test_a_damaged_record_is_named(config, directory, caplog, change):
  record(directory / 'a.json', config, **change)
  compare = expected.make_comparison(make_stages(config)[0])
  compare(1, {'loss_8': 99.0})
  (line,) = [each.getMessage() for each in caplog.records]
  assert 'a.json' in line and 'not compared' in line


def test_other_processes_are_silent(config, directory, caplog, monkeypatch):
  record(directory / 'a.json', config)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  expected.make_comparison(make_stages(config)[0])(100, {'loss_8': 99.0})
  assert not caplog.records


def test_the_script_records_a_run(config, tmp_path, directory):
  """In a copy of the repository, whose files stay as they are."""
  run, copy = tmp_path / 'run', tmp_path / 'copy'
  run.mkdir()
  write_config(run, json.loads(config.to_json()))
  found = [*lines('8'), *lines('16')]
  (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, found)) + '\n{')
  shutil.copytree(ROOT / 'docs' / 'results', copy / 'docs' / 'results')
  (copy / 'mdm_jax').symlink_to(ROOT / 'mdm_jax')
  (copy / 'configs').mkdir()
  (copy / 'configs' / 'tiny.py').write_text(
    'import json\nfrom mdm_jax.builders.config import load_config\n'
    f'def get_config(mode):\n  found = json.loads({config.to_json()!r})\n'
    "  found['seed'] = len(mode)\n  return load_config(found)\n"
  )
  for command in (
    ['git', 'init', '-q', '.'],
    ['git', 'add', 'configs'],
    [
      *('git', '-c', 'user.name=a', '-c', 'user.email=a@b'),
      *('commit', '-q', '--allow-empty', '-m', 'x'),
    ],
    [sys.executable, 'docs/results/record_expected.py', 'tiny:', str(run)],
  ):
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert not done.returncode, done.stderr
  written = copy / 'configs' / 'expected' / 'tiny_.json'
  shutil.copy(written, directory)
  read = expected.find(json.loads(config.to_json()))
  assert read.path == epath.Path(directory / 'tiny_.json')
  assert read.bands == expected.BANDS
  assert read.curves == expected.curves_of(found)
  assert len(json.loads(written.read_text())['commit']) == 12

  (run / 'metrics.jsonl').write_text(json.dumps(found[3]))
  done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
  assert done.returncode == 1
  assert "has nothing of stage '16': train" in done.stderr

  command[2] = 'tiny:other'
  done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
  assert done.returncode == 1
  assert 'has another config than tiny:other: train' in done.stderr


def test_shipped_records_are_of_the_recipes_as_they_are():
  """A recipe that has changed needs another record, or none."""
  for path in sorted((ROOT / 'configs' / 'expected').glob('*.json')):
    found = files.read_json(path, expected._is_valid)
    name, *mode = found['recipe'].split(':')
    assert path.stem == '_'.join([name, *mode])
    recipe = importlib.import_module(f'configs.{name}').get_config(*mode)
    new = json.loads(recipe.to_json())
    assert has_config_of(found['config'], new), (
      f'{path} is of another config than {found["recipe"]}: train the recipe '
      'and record it, see docs/monitoring.md, or remove the file.'
    )
    names = [stage['name'] for stage in found['config']['stages']]
    assert [*found['curves']] == names, path
    for curves in found['curves'].values():
      assert 'grad_norm' in curves, path
      for steps, values in curves.values():
        assert len(steps) <= expected._POINTS + 1, path
        assert np.all(np.isfinite(values)), path
