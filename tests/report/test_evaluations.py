"""The table of an evaluation can be read, and names what it compares with."""

import json
import re

import pytest

from mdm_jax.eval.estimate import Estimate
from mdm_jax.report import evaluations
from mdm_jax.report.evaluations import Evaluation, find_earlier, one_line

SETTINGS = {
  'workdir': 'runs/a',
  'stage': '64',
  'step': 540,
  'weights': 'EMA',
  'loss': {'split': 'held_out', 'batches': 4, 'batch_size': 64},
  'num_samples': 64,
  'seed': 16,
  'prompts': 'held_out',
  'sampler': {'name': 'dpm', 'num_steps': 20, 'guidance_interval': (0.0, 1.0)},
}
METRICS = {
  'held_out_loss_64': Estimate(0.02317, 256, 0.00112),
  'accuracy_shape': Estimate(0.75641, 78, 0.0519),
  'accuracy_pattern': Estimate(0.3, 53, 0.05),
  'fid': Estimate(12.3456, 64),
  'kid_standard_deviation': 0.01,
}
CHANCE = {'accuracy_shape': 0.172, 'accuracy_pattern': 0.2394}


def rows(text):
  """Cells of each line."""
  return [re.split(r'\s{2,}', line.strip()) for line in text.splitlines()]


def test_first_evaluation():
  text = repr(Evaluation(METRICS, SETTINGS, CHANCE))  # As in a notebook.
  heading, names, _, *cells, summary = rows(text)
  assert heading == [
    'Metrics of stage 64 at step 540 (EMA); losses of 256 held_out '
    'images; 64 samples of held_out prompts:'
  ]
  assert names == ['metric', 'value', 'std. error', 'n', 'chance', 'better']
  assert cells == [
    ['held_out_loss_64', '0.02317', '0.0011', '256', '-', 'lower'],
    ['accuracy_shape', '75.6 %', '5.2 %', '78', '17.2 %', 'higher'],
    # Less than two standard errors above.
    ['accuracy_pattern', '30.0 %', '5.0 %', '53', '23.9 % (at chance)']
    + ['higher'],
    ['fid', '12.35', '-', '64', '-', 'lower'],
  ]
  assert summary[0].startswith('at chance: accuracy_pattern; by these')
  better = Evaluation(
    METRICS | {'accuracy_pattern': Estimate(0.35, 53, 0.05)}, SETTINGS, CHANCE
  )
  assert 'at chance' not in str(better)


def test_what_is_good_near_the_data_is_neither_higher_nor_lower():
  names = ('flicker', 'flicker_of_data', 'frechet_of_halves', 'edge_width')
  text = str(Evaluation({name: Estimate(1.0, 8) for name in names}, SETTINGS))
  _, _, _, *cells = rows(text)
  assert [row[-1] for row in cells] == ['data', '-', '-', 'lower']
  for name in ('fid', 'edge_width', 'accuracy_all'):
    evaluations.require_order(name, '--metric')
  for name in names[:3]:
    with pytest.raises(ValueError, match=f'^--metric={name}: more of it is'):
      evaluations.require_order(name, '--metric')


def test_accuracies_by_number_of_objects_have_a_table_beside_chance():
  by_objects = {
    'accuracy_color_1_object': Estimate(0.97, 60, 0.01),
    'accuracy_shape_1_object': Estimate(0.9, 60, 0.01),
    'accuracy_color_2_objects': Estimate(0.14, 30, 0.05),
  }
  chance = {name: 0.13 for name in by_objects}
  text = str(Evaluation(by_objects | METRICS, SETTINGS, chance | CHANCE))
  small, large = text.split('\n\n')
  assert [row for row in rows(small) if len(row) > 1] == [
    ['attribute', '1 object', 'chance', '2 objects', 'chance'],
    ['---------', '--------', '------', '---------', '------------------'],
    ['color', '97.0 %', '13.0 %', '14.0 %', '13.0 % (at chance)'],
    ['shape', '90.0 %', '13.0 %', '-', '-'],
  ]
  assert 'accuracy_shape ' in large and 'accuracy_color_1_object ' not in large
  assert 'at chance: accuracy_pattern; by these' in large


def test_training_logs_chance_beside_each_accuracy():
  values = METRICS | {'accuracy_shape_1_object': Estimate(0.9, 60, 0.01)}
  line = one_line(values, CHANCE | {'accuracy_shape_1_object': 0.2})
  assert 'accuracy_shape 0.7564 (chance 0.17), accuracy_pattern 0.3 (' in line
  assert (
    line.startswith('held_out_loss_64 0.02317, ') and '1_object' not in line
  )


def test_training_images_are_not_called_held_out():
  loss = SETTINGS['loss'] | {'split': 'train'}
  settings = SETTINGS | {'loss': loss, 'prompts': 'train'}
  metrics = {'train_split_loss_64': Estimate(0.1, 8, 0.01)}
  text = str(Evaluation(metrics, settings))
  assert 'losses of 256 TRAINING images; 64 samples of TRAINING prompts' in text


def test_earlier_evaluations(tmp_path):
  """Each metric has the newest one that has it, also that of training."""
  (tmp_path / '540.json').write_text(
    json.dumps({'held_out_loss_64': 0.02317, 'accuracy_shape': 0.7})
  )
  first = Evaluation({'fid': 15.0}, SETTINGS | {'step': 250, 'num_samples': 9})
  first.append_to(tmp_path / '64_250.jsonl')
  with (tmp_path / '64_250.jsonl').open('a') as lines:
    old = first.to_json() | {'date': '2020-01-02T03:04:05+00:00'}
    old['settings'] = old['settings'] | {'step': 400}
    lines.write(json.dumps(old) + '\n')
    # Of other tools, damaged, and without numbers.
    lines.write('{}\n[1]\n{"metrics": {"fid": "x"}, "settings": {"step": 1}}\n')
    lines.write('{"metrics": {"fid": 1.0}, "settings": {"step": -1}}\n{"met')
  training = {
    **SETTINGS,
    'sampler': SETTINGS['sampler'] | {'guidance_interval': [0.0, 1.0]},
    'num_samples': 256,
  }
  del training['step']
  earlier = find_earlier(tmp_path, training)
  assert {each.step for each in earlier} == {540, 250, 400, 1}
  text = str(Evaluation(METRICS, SETTINGS, CHANCE, earlier))
  _, names, _, *cells, _, from_training, from_file = rows(text)
  assert names[-2:] == ['before', 'change']
  assert [row[-2:] for row in cells] == [
    ['0.02317', '0'],
    ['70.0 %', '+5.6 points'],
    ['-', '-'],
    ['15', '-2.7'],
  ]
  assert re.fullmatch(
    r'before \(held_out_loss_64, accuracy_shape\): step 540, '
    r'20\d\d-\d\d-\d\d \d\d:\d\d UTC; with other settings: '
    r'num_samples: 256 -> 64',
    from_training[0],
  )
  assert from_file[0].startswith('before (fid): step 250, 20')
  assert from_file[0].endswith('settings: num_samples: 9 -> 64')


def test_the_earlier_one_is_of_the_same_stage_if_there_is_any(tmp_path):
  fid = {'fid': 15.0}
  of_stages = [
    {'metrics': fid, 'settings': SETTINGS | {'step': 250}},  # Once without date
    {
      'metrics': {'fid': 50.0, 'kid': 0.5},
      'date': '\x1b[2J',
      'settings': SETTINGS | {'stage': '1\n6', 'step': 500},
    },
  ]
  lines = tmp_path / 'a.jsonl'
  lines.write_text('\n'.join(map(json.dumps, of_stages)))
  text = str(
    Evaluation(fid | {'kid': 1.0}, SETTINGS, earlier=find_earlier(tmp_path, {}))
  )
  assert text.splitlines()[-2:] == [
    'before (fid): step 250',
    'before (kid): step 500, \\x1b[2J UTC; with other settings: '
    'stage: 1 6 -> 64',
  ]


def test_a_line_of_json(tmp_path):
  Evaluation(METRICS, SETTINGS, CHANCE).append_to(tmp_path / 'a' / 'b.jsonl')
  line = json.loads((tmp_path / 'a' / 'b.jsonl').read_text())
  assert line['metrics'] == METRICS  # Shares are from 0 to 1.
  assert line['n']['accuracy_shape'] == 78
  assert line['standard_errors'] == {
    'held_out_loss_64': 0.00112,
    'accuracy_shape': 0.0519,
    'accuracy_pattern': 0.05,
    'fid': None,
    'kid_standard_deviation': None,
  }
  assert line['chance'] == CHANCE
  assert line['settings']['step'] == 540
  (earlier,) = find_earlier(tmp_path / 'a', {})
  assert earlier.metrics['fid'] == pytest.approx(12.3456)
  assert earlier.date == line['date']


def test_numbers_that_json_lacks_are_named(tmp_path):
  nan = Estimate(float('nan'), 7, float('nan'))
  bands = {'noise': ['0 %', '100 %'], 'loss': [0.5, float('inf')]}
  found = Evaluation({'fid': nan, 'bands': bands}, SETTINGS)
  found.append_to(tmp_path / 'a.jsonl')

  def refuse(name):
    raise AssertionError(name)

  text = (tmp_path / 'a.jsonl').read_text()
  line = json.loads(text, parse_constant=refuse)
  assert line['metrics'] == {
    'fid': 'nan',
    'bands': {'noise': ['0 %', '100 %'], 'loss': [0.5, 'inf']},
  }
  assert line['standard_errors'] == {'fid': 'nan'}
  (earlier,) = find_earlier(tmp_path, {})
  assert earlier.metrics == {}


def test_evaluations_in_a_bucket(bucket):
  for fid in (15.0, 14.0):
    found = Evaluation({'fid': fid}, SETTINGS | {'step': 250})
    found.append_to(f'{bucket.path}/eval/64_250.jsonl')
  text = json.dumps({'held_out_loss_64': 0.02317})
  bucket.past_the_proxy.pipe_file(f'{bucket.path}/eval/540.json', text.encode())
  found = find_earlier(f'{bucket.path}/eval', {})
  assert {(each.step, *each.metrics.items()) for each in found} == {
    (250, ('fid', 15.0)),
    (250, ('fid', 14.0)),
    (540, ('held_out_loss_64', 0.02317)),
  }
  assert all(each.date.startswith('20') for each in found)
