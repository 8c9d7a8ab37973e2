"""Tables and plots of sweeps, and what is read back."""

from etils import epath
import pytest

from mdm_jax.report import sweep_results

BASE = {'rate': 0.1, 'interval': (0, 1), 'seed': 0}


@pytest.fixture
def results(tmp_path):
  """Two rates with three seeds each, of which one has failed, and a third."""
  found = sweep_results.read(
    epath.Path(tmp_path),
    # Given twice, it is shown once.
    ['accuracy_all', 'held_out_loss_64', 'accuracy_all'],
    BASE.get,
  )
  for rate, scores in ((0.2, (0.5, 0.6, 0.7)), (0.4, (0.8, 0.9, None))):
    for seed, score in enumerate(scores):
      run = found.add(f'rate={rate},seed={seed}', {'rate': rate, 'seed': seed})
      if score is None:
        run.status, run.note = sweep_results.FAILED, 'a | b\nc'
        continue
      run.status = sweep_results.FINISHED
      run.metrics = {'accuracy_all': score, 'held_out_loss_64': 1.25}
      run.flops, run.seconds = 2e15 + seed * 1e15, 60.0 + seed * 60
      run.curve = [{'flops': 1e15, 'seconds': 30.0, 'accuracy_all': 0.1}]
  found.add('interval', {'interval': (0.2, 0.8)})
  return found


def test_the_table_has_means_and_errors_best_first(results, tmp_path):
  results.write()
  assert (tmp_path / 'table.md').read_text().splitlines() == [
    '| rate | interval | accuracy_all | std. error | held_out_loss_64 '
    '| std. error | runs | FLOPs | time | note |',
    f'|{" --- |" * 10}',
    # The standard errors are 0.05 and 0.1 / 3 ** 0.5.
    '| 0.4 | (0, 1) | 85.0 % | 5.0 % | 1.25 | 0 | 2 of 3 | 2.5e+15 | 1m30s '
    '| failed: a / b c |',
    '| 0.2 | (0, 1) | 60.0 % | 5.8 % | 1.25 | 0 | 3 of 3 | 3e+15 | 2m00s | - |',
    '| 0.1 | (0.2, 0.8) | - | - | - | - | 0 of 1 | - | - | to do |',
  ]
  assert str(results).splitlines()[2].split()[:4] == [
    '0.4',
    '(0,',
    '1)',
    '85.0',
  ]


def test_lower_is_better_for_losses(results, tmp_path):
  results.metrics = ['held_out_loss_64']
  results.runs['rate=0.2,seed=1'].metrics['held_out_loss_64'] = 1.0
  results.write()
  lines = (tmp_path / 'table.md').read_text().splitlines()
  assert [line.split()[1] for line in lines[2:]] == ['0.2', '0.4', '0.1']


def test_what_is_written_is_read(results, tmp_path):
  results.write()
  read = sweep_results.read(results.directory, results.metrics, BASE.get)
  assert read.runs == results.runs
  # By the values alone: what others name, it has from the config.
  run = read.find({'rate': 0.2, 'interval': (0, 1), 'seed': 0})
  assert run.run == 'rate=0.2,seed=0'
  assert read.find({'interval': (0.2, 0.8), 'rate': 0.1}).run == 'interval'
  assert read.find({'rate': 0.3}) is None
  assert read.add('interval', {'rate': 7}).run == 'interval-2'


def test_a_directory_of_something_else_is_refused(tmp_path):
  directory = epath.Path(tmp_path)
  (tmp_path / '.writer.lock').touch()
  assert sweep_results.read(directory, ['a'], BASE.get).runs == {}
  (tmp_path / 'b').touch()
  (tmp_path / 'results.jsonl').write_text('{"run": 1}\n')
  with pytest.raises(ValueError, match='holds something else, such as b: give'):
    sweep_results.read(directory, ['a'], BASE.get)


def plotted(axis):
  return [
    (call.kwargs['label'], *map(list, call.args))
    for call in axis.plot.call_args_list
  ]


def test_metric_is_plotted_against_flops_and_seconds(results, axes, tmp_path):
  results.write(str(tmp_path / 'plot.svg'))
  assert (tmp_path / 'plot.svg').read_text() == 'svg'
  best, other = 'rate=0.4, interval=(0, 1)', 'rate=0.2, interval=(0, 1)'
  for axis, x in zip(axes, (1e15, 30.0)):
    assert plotted(axis) == [
      (label, [x], [10.0]) for label in (best, '_', other, '_', '_')
    ]


def test_curves_of_other_evaluations_are_not_plotted(results, axes, tmp_path):
  results.evaluated = {'num_samples': '8'}
  results.write(str(tmp_path / 'plot.svg'))
  assert [plotted(axis) for axis in axes] == [[], []]
  results.runs['rate=0.2,seed=1'].evaluated = {'num_samples': '8'}
  results.write(str(tmp_path / 'plot.svg'))
  assert [label for label, *_ in plotted(axes[0])] == [
    'rate=0.2, interval=(0, 1)'
  ]


def test_metric_is_plotted_against_what_is_swept(axes, tmp_path):
  results = sweep_results.read(epath.Path(tmp_path), ['fid'], lambda key: None)
  for guidance, width, fid in ((4, None, 9), (1, None, 7), (1, 0.1, 5)):
    results.add(
      f'{guidance}{width}',
      {'guidance': guidance, 'width': width},
      status=sweep_results.FINISHED,
      metrics={'fid': float(fid)},
    )
  results.write(str(tmp_path / 'plot.png'))
  assert plotted(axes[0]) == [
    ('width=0.1', [1], [5.0]),
    ('width=none', [1, 4], [7.0, 9.0]),
  ]
  assert plotted(axes[1]) == [('guidance=1', [0.1], [5.0])]
