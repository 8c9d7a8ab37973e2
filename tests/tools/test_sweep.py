"""The command that compares values of keys."""

import json
import signal
import subprocess
import sys

from etils import epath
import jax
import numpy as np
import pytest

from mdm_jax.builders import sweep_grid
from mdm_jax.builders.config import write_config
from mdm_jax.builders.stage import make_stage
from mdm_jax.checkpoint import manifest
from mdm_jax.inference import evaluation
from mdm_jax.inference.session import Model, Session
from mdm_jax.runtime import preemption, sharding
from mdm_jax.tools import run_commands, sweep_evaluation, sweep_training
from tests import commands, toy

# In place of mdm_jax.main: writes what it writes, waits, ends.
STUB = """
import json, os, pathlib, signal, sys, time
workdir, given = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir / 'begun', 'a') as file:
  file.write('x')
(workdir / 'config.json').write_text(json.dumps(given['config']))
(workdir / 'metrics.jsonl').write_text(
  ''.join(json.dumps(line) + '\\n' for line in given['lines'])
)
print(os.environ.get('CUDA_VISIBLE_DEVICES'), 'error: no')
sys.stdout.flush()
time.sleep(given['seconds'])
end = time.monotonic() + 20
while len([*workdir.parent.glob('*/begun')]) < given['together']:
  time.sleep(0.02)
  if time.monotonic() > end:
    sys.exit('error: alone')
if given['code'] == 9:
  os.kill(os.getpid(), 9)
sys.exit(given['code'])
"""

# In place of mdm_jax.evaluate.
EVALUATION = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(exist_ok=True)
line = {'metrics': {'fid': float(sys.argv[2])}, 'standard_errors': {'fid': 0.5}}
with path.open('a') as file:
  file.write(json.dumps(line) + '\\n')
"""


class Trainings:
  """Sweeps of the learning rate, with a stub that trains nothing."""

  def __init__(self, config, directory):
    self.config, self.output = config, epath.Path(directory)
    self.codes = {}  # exit codes, by learning rate; others end with 0
    self.seconds = 0  # of each run
    self.together = 1  # runs that have to begin before any ends
    self.more = {}  # metrics of a run beside its loss, by learning rate
    self.fid = None  # that an evaluation finds, added to the learning rate

  def commands(self, workdir, changes):
    rate = changes['stages[0].learning_rate']
    lines = (
      {'seconds_per_step': 1.5, 'flops_per_second': 2},
      {'held_out_loss_16': 10 * rate + changes.get('seed', 0)}
      | self.more.get(rate, {}),
    )
    changed = sweep_grid.changed(self.config, changes)
    directory = self.output.parent / 'config'
    write_config(directory, json.loads(changed.to_json()))
    given = {
      'config': json.loads((directory / 'config.json').read_text()),
      'lines': [{'stage': '16', 'step': 4} | line for line in lines],
      'code': self.codes.get(rate, 0),
      'seconds': self.seconds,
      'together': self.together,
    }
    commands = [[sys.executable, '-c', STUB, str(workdir), json.dumps(given)]]
    if self.fid is not None:
      path = str(sweep_training.evaluation_path(workdir))
      words = [sys.executable, '-c', EVALUATION, path, str(self.fid + rate)]
      commands.append(words)
    return commands

  def sweep(self, *grid, config=None, metrics=('held_out_loss_16',), **options):
    config = config or self.config
    points = sweep_grid.combinations(
      grid, lambda *pair: sweep_grid.parse(config, *pair)
    )
    return sweep_training.train(
      config,
      points,
      self.commands,
      output=self.output,
      metrics=metrics,
      **options,
    )

  def begun(self):
    """How often each run was started."""
    return {
      path.parent.name: len(path.read_text())
      for path in sorted(self.output.glob('*/begun'))
    }


@pytest.fixture
def trainings(make_config, tmp_path):
  return Trainings(make_config(), tmp_path / 'sweep')


def rate(value):
  return f'stages0.learning_rate={value}'


def test_a_crash_is_a_row_and_is_tried_again(trainings):
  trainings.codes = {0.2: 1, 0.3: 9}
  results = trainings.sweep('stages[0].learning_rate=0.1,0.2,0.3,0.05')
  found = {name: (run.status, run.note) for name, run in results.runs.items()}
  assert found == {
    rate(0.1): ('finished', ''),
    rate(0.2): ('failed', 'None error: no'),
    rate(0.3): ('failed', 'ended by SIGKILL.'),
    rate(0.05): ('finished', ''),
  }
  best = json.loads(
    (trainings.output / 'results.jsonl').read_text().splitlines()[0]
  )
  assert best['run'] == rate(0.05)
  assert best['metrics'] == {'held_out_loss_16': 0.5}
  # 4 steps of 1.5 s, of 3 FLOPs each.
  assert (best['flops'], best['seconds']) == (12, 6)
  trainings.codes = {}
  results = trainings.sweep('stages[0].learning_rate=0.1,0.2,0.3,0.05')
  assert {run.status for run in results.runs.values()} == {'finished'}
  assert trainings.begun() == {
    rate(0.05): 1,
    rate(0.1): 1,
    rate(0.2): 2,
    rate(0.3): 2,
  }


def test_a_changed_grid_adds_runs(trainings):
  trainings.sweep('stages[0].learning_rate=0.1')
  seed = trainings.config.seed
  results = trainings.sweep(
    'stages[0].learning_rate=0.1,0.2', f'seed={seed},{seed + 1}'
  )
  # The first run has the config's seed.
  assert trainings.begun() == {
    rate(0.1): 1,
    f'{rate(0.1)},seed={seed + 1}': 1,
    f'{rate(0.2)},seed={seed}': 1,
    f'{rate(0.2)},seed={seed + 1}': 1,
  }
  lines = (trainings.output / 'table.md').read_text().splitlines()
  assert lines[2].split(' | ')[:4] == ['| 0.1', '1.5', '0.5', '2 of 2']
  assert len(lines) == 4 and len(results.runs) == 4


def test_runs_are_evaluated_after_training(trainings):
  grid = 'stages[0].learning_rate=0.1,0.2'
  options = {'metrics': ['fid', 'held_out_loss_16'], 'evaluated': {'a': '1'}}
  for fid, evaluated, count in ((7, '1', 1), (8, '1', 1), (9, '2', 2)):
    trainings.fid = fid
    options['evaluated'] = {'a': evaluated}
    trainings.sweep(grid, **options)
    assert trainings.begun() == {rate(0.1): count, rate(0.2): count}
    lines = (trainings.output / 'table.md').read_text().splitlines()
    known = 9 if count == 2 else 7
    assert [line.split(' | ')[:4] for line in lines[2:]] == [
      [f'| {x}', f'{known + x}', '0.5', f'{10 * x:g}'] for x in (0.1, 0.2)
    ]
  best, _ = (trainings.output / 'results.jsonl').read_text().splitlines()
  assert json.loads(best)['curve'][-1]['fid'] == 9.1
  # A training that fails is not evaluated.
  trainings.codes = {0.1: 1}
  options['evaluated'] = {'a': '3'}
  found = trainings.sweep(grid, **options).runs
  assert found[rate(0.1)].status == 'failed'
  lines = sweep_training.evaluation_path(trainings.output / rate(0.1))
  assert len(lines.read_text().splitlines()) == 2


def test_other_evaluations_are_not_averaged(trainings):
  grid = 'stages[0].learning_rate=0.1'
  for fid, seeds, flags in (
    (7, '0,1,2', {'a': '1', 'b': '2'}),
    (9, '0', {'a': '3', 'c': '4'}),
    (8, '2', {}),
  ):
    trainings.fid = fid if flags else None
    metric = 'fid' if flags else 'held_out_loss_16'
    results = trainings.sweep(
      grid, f'seed={seeds}', metrics=[metric], evaluated=flags
    )
    lines = (trainings.output / 'table.md').read_text().splitlines()
    if fid == 9:
      # The standard error is that of the one evaluation.
      assert lines[2].split(' | ') == [
        *('| 0.1', '9.1', '0.5', '1 of 3', '12', '6s'),
        'not averaged: evaluated with --a=1 and with --b=2 and without --c |',
      ]
      assert results.runs[f'{rate(0.1)},seed=1'].metrics['fid'] == 7.1
  # What training measures is read again where an evaluation has replaced it.
  assert results.runs[f'{rate(0.1)},seed=2'].evaluated == {}
  assert lines[2].split(' | ')[1:3] == ['3', '1 of 3']


def test_metrics_are_checked_before_training(make_config):
  config = make_config()
  points = [{'seed': 0}, {'stages[1].name': 'other'}]
  measures = evaluation.Options(metrics=['frechet', 'prompt_accuracy'])

  def check(*metrics, options=measures):
    sweep_training.check_points(config, points, metrics, options)

  check('frechet', 'frechet_of_data', 'accuracy_all_2_objects')
  check('held_out_loss_16', 'accuracy_all')  # As training measures them.
  check('held_out_loss_16', options=None)
  for metric, options in (('fid', measures), ('frechet', None)):
    with pytest.raises(ValueError, match=f'--metric={metric}: there are held'):
      check('accuracy_all', metric, options=options)
  # One run that has it is enough.
  config.text.num_classes = 6
  points = [{'text.encoder': 'label'}, {'text.encoder': 'learned'}]
  check('accuracy_all', options=None)
  with pytest.raises(ValueError, match='accuracy_all: there are held_out_los'):
    sweep_training.check_points(config, points[:1], ['accuracy_all'])


def test_a_metric_that_one_run_lacks_ends_nothing(trainings):
  trainings.more = {0.2: {'b': 7}}
  trainings.sweep('stages[0].learning_rate=0.1,0.2,0.3', metrics=['b'])
  assert trainings.begun() == {rate(x): 1 for x in (0.1, 0.2, 0.3)}
  lines = (trainings.output / 'table.md').read_text().splitlines()
  assert [line.split(' | ')[1:3] for line in lines[2:]] == [
    ['7', '12'],
    ['-', '12'],
    ['-', '12'],
  ]
  assert [line.endswith('| no b in 1 of 1 |') for line in lines[2:]] == [
    False,
    True,
    True,
  ]
  # What another invocation may plot is kept too.
  first, *_ = (trainings.output / 'results.jsonl').read_text().splitlines()
  assert json.loads(first)['curve'] == [
    {'stage': '16', 'step': 4, 'flops': 12, 'seconds': 6}
    | {'held_out_loss_16': 2, 'b': 7}
  ]


def test_another_config_is_refused(trainings):
  trainings.sweep('stages[0].learning_rate=0.1')
  for key, value in (('stages[0].steps', 7), ('sampler.num_steps', 17)):
    other = sweep_grid.changed(trainings.config, {key: value})
    with pytest.raises(ValueError) as raised:
      trainings.sweep('stages[0].learning_rate=0.2', config=other)
    message = str(raised.value)
    assert 'is a sweep of another config' in message and key in message
    assert f' -> {value})' in message
  # What changes no metric may differ.
  other = sweep_grid.changed(trainings.config, {'log_every': 99})
  trainings.sweep('stages[0].learning_rate=0.1', config=other)
  assert trainings.begun() == {rate(0.1): 1}


def test_runs_on_devices_of_their_own(trainings, capfd):
  trainings.together = 2
  groups = [{'CUDA_VISIBLE_DEVICES': name} for name in ('0,1', '2,3')]
  results = trainings.sweep('stages[0].learning_rate=1,2,3,4', groups=groups)
  assert {run.status for run in results.runs.values()} == {'finished'}
  lines = capfd.readouterr().err.splitlines()
  seen = [line.split() for line in lines if line.endswith('error: no')]
  assert sorted(name for name, *_ in seen) == [
    f'[{rate(f"{value}.0")}]' for value in (1, 2, 3, 4)
  ]
  assert {devices for _, devices, *_ in seen} == {'0,1', '2,3'}


@pytest.mark.parametrize(
  'found, visible, size, expected',
  (
    ('cpu 8', '', 1, [{}]),
    ('gpu 4', '', None, [{}]),
    ('gpu 4', '', 2, [{'CUDA_VISIBLE_DEVICES': x} for x in ('0,1', '2,3')]),
    ('gpu 3', '5,7,9', 1, [{'CUDA_VISIBLE_DEVICES': x} for x in '579']),
    ('gpu 1', '', 2, '--devices_per_run=2: there are only 1.'),
    ('tpu 4', '', 3, 'give one of .* TPU chips'),
    ('tpu 4', '', 4, [{'TPU_VISIBLE_CHIPS': '0,1,2,3'}]),
  ),
)
def test_devices_are_divided(monkeypatch, found, visible, size, expected):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  monkeypatch.setattr(
    run_commands.subprocess,
    'run',
    lambda *_, **__: subprocess.CompletedProcess([], 0, f'devices {found}', ''),
  )
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=expected):
      run_commands.device_groups(size)
    return
  groups = run_commands.device_groups(size)
  for group in groups:
    if bounds := group.pop('TPU_CHIPS_PER_PROCESS_BOUNDS', None):
      assert bounds == '2,2,1' and group.pop('TPU_PROCESS_BOUNDS') == '1,1,1'
      group.pop('ALLOW_MULTIPLE_LIBTPU_LOAD')
  assert groups == expected


# Sweeps until it is stopped.
SWEEP = """
import json, sys
from mdm_jax.builders.config import load_config
from tests.tools.test_sweep import Trainings
trainings = Trainings(load_config(json.loads(sys.argv[1])), sys.argv[2])
trainings.seconds = 60
trainings.sweep('stages[0].learning_rate=0.1,0.2')
"""


def test_a_stop_request_reaches_the_run_and_ends_the_sweep(trainings):
  process = subprocess.Popen(
    [
      *(sys.executable, '-c', SWEEP),
      *(trainings.config.to_json(), str(trainings.output)),
    ],
    cwd=commands.ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if 'error: no' in line:  # What the stub says when it has begun.
      break
  process.send_signal(signal.SIGTERM)
  assert process.wait(30) == preemption.EXIT_CODE
  assert trainings.begun() == {rate(0.1): 1}
  lines = (trainings.output / 'results.jsonl').read_text().splitlines()
  found = {line['run']: line['status'] for line in map(json.loads, lines)}
  assert found == {rate(0.1): 'stopped', rate(0.2): 'to do'}
  # The same command goes on.
  trainings.sweep('stages[0].learning_rate=0.1,0.2')
  assert trainings.begun() == {rate(0.1): 2, rate(0.2): 1}


def sweep(*arguments, code=0, **options):
  result = commands.run(
    'mdm_jax.tools.sweep', *arguments, env=commands.on_devices(1), **options
  )
  assert result.returncode == code, result.stderr
  return result


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A directory with a real run, swept by the command, and what it printed."""
  directory = tmp_path_factory.mktemp('sweep')
  path = directory / 'recipe.py'
  path.write_text(toy.recipe(1, 2, averages__widths=(0.05,), log_every=1))
  output = directory / 'out'
  result = sweep(
    f'--config={path}',
    '--config.averages.snapshot_every=1',
    '--config.averages.widths=(0.05,0.1)',
    '--grid=eval.loss_batches=2',
    '--metric=held_out_loss_8,accuracy_shape',
    f'--output={output}',
  )
  return output / 'eval.loss_batches=2', result


def test_a_real_run_is_trained_and_shown(finished):
  workdir, result = finished
  (line,) = map(
    json.loads, (workdir.parent / 'results.jsonl').read_text().splitlines()
  )
  assert (line['run'], line['status']) == (workdir.name, 'finished')
  config = json.loads((workdir / 'config.json').read_text())
  assert config['eval']['loss_batches'] == 2
  assert config['averages'] == {'widths': [0.05, 0.1], 'snapshot_every': 1}
  metrics = json.loads((workdir / 'eval' / '2.json').read_text())
  assert line['metrics'] == pytest.approx(metrics)
  assert line['flops'] > 1e6 and 0 < line['seconds'] < 60
  *_, last = line['curve']
  assert (last['step'], last['flops']) == (2, line['flops'])
  headers, _, row, _ = result.stdout.splitlines()
  assert headers.split() == [
    *('eval.loss_batches', 'held_out_loss_8', 'accuracy_shape'),
    *('FLOPs', 'time'),
  ]
  assert float(row.split()[1]) == pytest.approx(
    metrics['held_out_loss_8'], 1e-3
  )


def test_a_finished_run_is_evaluated(finished):
  workdir, _ = finished
  before = sorted(workdir.rglob('*'))
  output = workdir.parent.parent / 'evaluated'
  flags = (
    f'--workdir={workdir}',
    '--grid=sampler.guidance=1,7.5',
    f'--output={output}',
    '--metrics=loss,prompt_accuracy',
    '--metric=held_out_loss_8,accuracy_shape',
  )
  sweep(*flags)
  first = (output / 'results.jsonl').read_text().splitlines()
  assert sorted(workdir.rglob('*')) == before
  found = {line['run']: line for line in map(json.loads, first)}
  assert sorted(found) == ['sampler.guidance=1.0', 'sampler.guidance=7.5']
  # Those of the config's own guidance are what training has measured.
  metrics = json.loads((workdir / 'eval' / '2.json').read_text())
  measured = found['sampler.guidance=7.5']['metrics']
  assert measured == pytest.approx(metrics, rel=1e-4)
  # What is measured already is not measured again.
  result = sweep('--grid=sigma_rel=none,0.07', *flags)
  assert result.stderr.count('samples: 8 of 8') == 2
  lines = (output / 'results.jsonl').read_text().splitlines()
  assert len(lines) == 4 and set(first) < set(lines)
  others = [json.loads(line)['metrics'] for line in set(lines) - set(first)]
  assert all(
    other['held_out_loss_8'] != pytest.approx(metrics['held_out_loss_8'], 1e-6)
    for other in others
  )
  # Results of other weights of the same step are not continued.
  path = output / 'results.jsonl'
  settings = json.loads(lines[0])['settings']
  (step,) = (workdir / 'checkpoints').glob('*/2')
  assert settings['fingerprint of the EMA'] == manifest.fingerprint(step)
  path.write_text(
    path.read_text().replace(settings['fingerprint of the EMA'], 'abc')
  )
  *_, line = sweep(*flags, code=1).stderr.splitlines()
  assert 'of other settings (fingerprint of the EMA' in line


@pytest.fixture
def model(make_config, tmp_path):
  """Of eight devices, without weights."""
  config = make_config()
  config.eval.batch_size = 8
  mesh = sharding.make_mesh(
    {'data': -1, 'fsdp': 1, 'spatial': 1}, jax.devices()
  )
  return Model(str(tmp_path), make_stage(config, 0), None, {}, mesh)


def test_what_is_wrong_with_a_finished_run_is_said(model):
  config, points = model.stage.config, [{'sampler.guidance': 2.0}]
  # Devices that cannot share a batch of training can sample.
  config.stages[0].batch_size = 3
  for stage, message in (
    (None, 'has no EMA: train longer first.'),
    ('typo', "The run has no stage 'typo': give one of '8', '16'."),
  ):
    opened = Session(model.workdir, config, model.mesh, stage)
    with pytest.raises(ValueError, match=message):
      sweep_evaluation.evaluate(
        opened,
        points,
        evaluation.Options(metrics=['prompt_accuracy']),
        output=epath.Path(model.workdir) / 'out',
        metrics=['accuracy_all'],
      )


def test_metrics_are_checked_before_an_evaluation(model, monkeypatch):
  steps = {'EMA': ['8', 1], 'fingerprint of the EMA': 'abc'}
  monkeypatch.setattr(sweep_evaluation, '_steps', lambda *_: steps)
  with pytest.raises(ValueError, match='16: there are held_out_loss_8.$'):
    sweep_evaluation.evaluate(
      Session(model.workdir, model.stage.config, model.mesh, None),
      [{'sampler.guidance': 2.0}],
      evaluation.Options(metrics=['loss']),
      output=epath.Path(model.workdir) / 'out',
      metrics=['held_out_loss_8', 'held_out_loss_16'],
    )


def test_seconds_of_an_image_are_without_compiling(model, monkeypatch):
  def make_sample_steps(sampler, shardings):
    made.append(sampler.spec.guidance)
    image = np.zeros((8, 8, 8, 3), np.uint8)
    return lambda *_: [(image,)]

  monkeypatch.setattr(sweep_evaluation, 'make_sample_steps', make_sample_steps)
  made, programs = [], {}
  # Those without guidance are another program than all others.
  for guidance, batches in ((4.0, 1), (1.0, 1), (2.0, 2), (1.0, 2)):
    changed = model.changed({'guidance': guidance}, {})
    sample_fn, times = sweep_evaluation._make_sample_fn(changed, programs)
    (images,) = sample_fn({}, np.zeros((11, 8), int), range(11))
    assert (len(images), len(times)) == (11, batches)
  assert made == [4.0, 1.0]


@pytest.mark.parametrize(
  'flags, message',
  (
    (('--grid=seed=1',), 'give either --config, to train, or the --workdir'),
    (
      ('--config=shapes_64', '--workdir=.', '--grid=seed=1'),
      'give either --config, to train, or the --workdir',
    ),
    (('--config=shapes_64',), 'nothing to compare: give --grid=KEY=VALUE'),
    (
      ('--config=shapes_64', '--grid=seed=1', '--num_samples=8'),
      '--num_samples needs --metrics',
    ),
    (
      ('--config=shapes_64', '--grid=seed=1', '--metrics=fid'),
      '--metrics=fid needs --inception=FILE',
    ),
    (
      ('--config=shapes_64', '--grid=seed=1', '--seeds=1'),
      'seed is given twice',
    ),
    (
      ('--config=shapes_64', '--grid=stages[1].loss_weights=(1,)'),
      'stages[1].loss_weights=(1,): give one number for each of its 2 levels',
    ),
    (
      ('--config=shapes_64', '--grid=seed=1'),
      '--metric=nonsense: there are held_out_loss_32, held_out_loss_64, accu',
    ),
    (
      ('--config=shapes_64', '--grid=seed=1', '--metric=flicker'),
      '--metric=flicker: more of it is neither better nor worse',
    ),
  ),
)
def test_a_mistake_is_one_line(flags, message, tmp_path):
  output = tmp_path / 'out'
  result = sweep('--metric=nonsense', *flags, f'--output={output}', code=1)
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line
  assert not result.stdout and not output.exists()


def test_trainings_and_evaluations_are_not_mixed(finished, trainings):
  workdir, _ = finished
  *_, line = sweep(
    *(f'--workdir={workdir}', '--grid=sampler.guidance=1', '--metric=fid'),
    f'--output={workdir.parent}',
    code=1,
  ).stderr.splitlines()
  assert f'--output={workdir.parent} is a sweep of trainings' in line
  trainings.sweep('stages[0].learning_rate=0.1')
  path = trainings.output / 'results.jsonl'
  line = json.loads(path.read_text()) | {'settings': {'num_samples': 8}}
  path.write_text(json.dumps(line) + '\n')
  with pytest.raises(ValueError, match='sweep evaluates a finished run'):
    trainings.sweep('stages[0].learning_rate=0.1')
