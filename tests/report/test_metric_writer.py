"""Metrics survive a kill, rates exclude pauses, and peaks are right."""

import importlib.util
import io
import json
import logging as python_logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import types

from absl import flags, logging
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from mdm_jax.models import target
from mdm_jax.report import (
  background,
  console,
  grid,
  metric_writer,
  progress,
  trackers,
)
from mdm_jax.runtime import appending, files, peaks


def read_lines(workdir, name='metrics'):
  text = (workdir / f'{name}.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def read_events(directory):
  """What TensorBoard's own reader finds in the event files of a directory."""
  from tensorboard.backend.event_processing import event_accumulator

  keep_all = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
  return event_accumulator.EventAccumulator(str(directory), keep_all).Reload()


def open_writer(workdir, *names, config=None, run_id=None):
  return metric_writer.MetricWriter(
    workdir, trackers.make_trackers(names, workdir, config or {}, run_id)
  )


def test_metrics_reach_the_file_and_tensorboard(tmp_path):
  config = {'seed': 3, 'data': {'name': '<b>*x*'}}
  writer = open_writer(tmp_path, 'tensorboard', config=config)
  writer.scalars(
    3,
    {'train': {'loss': jnp.float32(0.5), 'seen': 7}, 'eval': {'fid': np.inf}},
    stage='32',
  )
  writer.flush()
  lines = read_lines(tmp_path)  # while it is still open
  assert lines[0].pop('time') > 1.7e9
  line = {'stage': '32', 'step': 3, 'loss': 0.5, 'seen': 7, 'fid': 'inf'}
  assert lines == [line]
  image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
  writer.image(4, 'samples', image, stage='64')
  writer.close()

  stage = read_events(tmp_path / 'tensorboard' / '32')
  assert stage.Tags()['scalars'] == ['train/loss', 'train/seen', 'eval/fid']
  for name, value in {'train/loss': 0.5, 'train/seen': 7.0}.items():
    (event,) = stage.Scalars(name)
    assert (event.step, event.value) == (3, value)
    assert event.wall_time > 1.7e9
  (event,) = read_events(tmp_path / 'tensorboard' / '64').Images('samples')
  assert (event.step, event.width, event.height) == (4, 6, 4)
  with Image.open(io.BytesIO(event.encoded_image_string)) as found:
    np.testing.assert_array_equal(found, image)
  whole = read_events(tmp_path / 'tensorboard')
  assert whole.PluginTagToContent('text').keys() == {'config'}
  (event,) = whole.Tensors('config')
  text = event.tensor_proto.string_val[0].decode()
  # Markdown shows lines after four spaces as they are.
  assert all(line.startswith('    ') for line in text.splitlines())
  assert json.loads(text) == config


def test_a_resumed_run_appends(tmp_path):
  for loss in (0.5, 0.25):
    writer = open_writer(tmp_path, 'tensorboard')
    writer.scalars(3, {'train': {'loss': loss}}, stage='32')
    writer.close()
  lines = read_lines(tmp_path)
  assert [line['loss'] for line in lines] == [0.5, 0.25]
  assert lines[0]['time'] <= lines[1]['time']


def run_program(program, *arguments, **env):
  root = pathlib.Path(console.__file__).parents[2]
  path = f'{env.pop("PYTHONPATH", root)}:{root}'
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(program), *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=600,
    env=os.environ | {'PYTHONPATH': path} | env,
  )


def test_a_kill_loses_no_line_and_nothing_heavy_is_imported(tmp_path):
  # TensorBoard's own writers import it where it is installed.
  (tmp_path / 'tensorflow.py').write_text('import os; os._exit(3)')
  program = """
      import os, signal, sys
      from mdm_jax.report import metric_writer, trackers
      assert not {'tensorboard', 'wandb'} & set(sys.modules)
      made = trackers.make_trackers(['tensorboard'], sys.argv[1], {}, None)
      writer = metric_writer.MetricWriter(sys.argv[1], made)
      for step in range(5):
        writer.scalars(step, {'train': {'loss': step}}, stage='a')
      writer.flush()
      heavy = ('tensorflow', 'torch', 'transformers', 'wandb')
      assert not any(name in sys.modules for name in heavy)
      os.kill(os.getpid(), signal.SIGKILL)
  """
  done = run_program(program, tmp_path, PYTHONPATH=tmp_path)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert [line['loss'] for line in read_lines(tmp_path)] == [0, 1, 2, 3, 4]
  events = read_events(tmp_path / 'tensorboard' / 'a').Scalars('train/loss')
  assert [event.value for event in events] == [0, 1, 2, 3, 4]


class Slow:
  """A tracker that comes to no end, or fails always."""

  title, upload = 'Slow', None

  def __init__(self, call):
    self.scalars = self.image = self.finish = call


def test_a_slow_or_failing_tracker_holds_up_nothing(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(background, '_CLOSING', 0.1)
  free = threading.Event()

  def fail(*args):
    raise OSError('no network')

  writer = metric_writer.MetricWriter(
    tmp_path,
    [
      Slow(lambda *args: free.wait()),
      Slow(fail),
      *trackers.make_trackers(['tensorboard'], tmp_path, {}, None),
    ],
  )
  for step in range(100):  # Would never return if it waited.
    writer.scalars(step, {'train': {'loss': step}}, stage='a')
  writer.flush()
  writer.close()
  free.set()
  assert [line['loss'] for line in read_lines(tmp_path)] == [*range(100)]
  events = read_events(tmp_path / 'tensorboard' / 'a').Scalars('train/loss')
  assert [event.value for event in events] == [*range(100)]
  assert caplog.text.count('Slow cannot be written: no network') == 1
  assert 'Slow: 101 writes were dropped' in caplog.text


def test_a_disk_that_fills_up_ends_nothing(tmp_path):
  program = """
      import resource, sys
      import numpy as np
      from mdm_jax.report import metric_writer, trackers
      made = trackers.make_trackers(['tensorboard'], sys.argv[1], {}, None)
      writer = metric_writer.MetricWriter(sys.argv[1], made)
      writer.image(0, 'a', np.zeros((8, 8, 3), np.uint8), stage='b')
      writer.flush()
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
      noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
      for step in range(20):
        writer.image(step, 'a', noise, stage='b')
        writer.scalars(step, {'train': {'loss': step}}, stage='b')
      writer.close()
  """
  result = run_program(program, tmp_path)
  assert result.returncode == 0
  assert 'TensorBoard cannot be written' in result.stderr
  assert 'Traceback' not in result.stderr
  assert [line['loss'] for line in read_lines(tmp_path)] == [*range(20)]
  # What was cut off is gone, so that the rest can be read.
  events = read_events(tmp_path / 'tensorboard' / 'b')
  assert len(events.Images('a')) == 1
  losses = [event.value for event in events.Scalars('train/loss')]
  assert losses == [*range(20)]


def test_a_disk_that_is_full_at_first(tmp_path, monkeypatch):
  def fail(file, record):
    raise OSError('full')

  (board,) = trackers.make_trackers(['tensorboard'], tmp_path, {'a': 3}, None)
  with monkeypatch.context() as patch:
    patch.setattr(trackers.time, 'time', iter(range(99)).__next__)
    patch.setattr(trackers, '_append_record', fail)
    for step in range(3):
      with pytest.raises(OSError):
        board.scalars('b', step, 0.0, {'train/loss': step})
  board.scalars('b', 3, 0.0, {'train/loss': 3})
  board.finish()
  # Attempts leave no files behind, and the config is not forgotten.
  assert len([*tmp_path.rglob('events.*')]) == 2
  assert read_events(tmp_path / 'tensorboard').Tensors('config')
  (event,) = read_events(tmp_path / 'tensorboard' / 'b').Scalars('train/loss')
  assert event.step == 3


def test_two_sessions_in_a_bucket(bucket, monkeypatch):
  """TensorBoard reads the event files of both as one, also as they grow."""
  monkeypatch.setattr(appending, '_FULL', 1000)
  image = np.zeros((4, 6, 3), np.uint8)
  board = f'{bucket.path}/tensorboard'
  for first in (0, 20):
    writer = open_writer(bucket.path, 'tensorboard', config={'a': 3})
    for step in range(first, first + 20):
      writer.scalars(step, {'train': {'loss': step}}, stage='b')
    writer.submit(grid.save_png, f'{bucket.path}/samples/b_{first}.png', image)
    writer.image(first, 'samples', image, stage='b')
    writer.skipped({'step': first})
    writer.flush()
    events = read_events(f'{board}/b')
    losses = [event.value for event in events.Scalars('train/loss')]
    assert losses[-20:] == [*range(first, first + 20)]
    writer.scalars(first + 19, {'train': {'loss': 7}}, stage='b')
    writer.close()
    assert events.Reload().Scalars('train/loss')[-1].value == 7
  assert len(events.Images('samples')) == 2
  assert read_events(board).Tensors('config')
  lines = files.read_json_lines(f'{bucket.path}/metrics.jsonl')
  assert [line['loss'] for line in lines] == [*range(20), 7, *range(20, 40), 7]
  skipped = files.read_json_lines(f'{bucket.path}/skipped.jsonl')
  assert skipped == [{'step': 0}, {'step': 20}]
  found = bucket.files()
  for first in (0, 20):
    with Image.open(io.BytesIO(found[f'samples/b_{first}.png'])) as saved:
      np.testing.assert_array_equal(saved, image)
  # 20 numbers, each about 60 bytes, and an image are two objects.
  assert sum('tensorboard/b/' in name for name in found) == 4


def test_bursts_of_errors_lose_nothing(bucket):
  """Nor do they hold up anything."""
  with bucket.failing('upload', status=503, times=2) as fault:
    writer = open_writer(bucket.path, 'tensorboard')
    for step in range(10):
      writer.scalars(step, {'train': {'loss': step}}, stage='b')
    writer.close()
  assert fault.hit == 2
  lines = files.read_json_lines(f'{bucket.path}/metrics.jsonl')
  assert [line['loss'] for line in lines] == [*range(10)]
  events = read_events(f'{bucket.path}/tensorboard/b').Scalars('train/loss')
  assert [event.value for event in events] == [*range(10)]


def test_a_slow_bucket_has_all_lines_within_the_time_limit(bucket, monkeypatch):
  """A stop request leaves no time to upload one file after the other."""
  monkeypatch.setattr(metric_writer, '_PATIENCE', 4.0)
  writer = open_writer(bucket.path, 'tensorboard')
  writer.scalars(1, {'train': {'loss': 1}}, stage='b')
  writer.skipped({'step': 1})
  with bucket.delayed(0.6):
    writer.flush()
  names = {name.partition('-')[0] for name in bucket.files()}
  assert {'metrics', 'skipped'} < names
  assert sum(name.startswith('tensorboard/b/') for name in names) == 1
  writer.close()


def wandb_run(workdir, **env):
  """Two numbers and an image of a session of the same run."""
  program = """
      import sys
      import numpy as np
      from mdm_jax.report import metric_writer, trackers
      from mdm_jax.runtime import ending
      trackers.check(['wandb'])
      assert 'tensorboard' not in sys.modules
      made = trackers.make_trackers(
        ['wandb'], sys.argv[1], {'seed': 3}, '0123456789abcdef' * 2
      )
      writer = metric_writer.MetricWriter(sys.argv[1], made)
      writer.scalars(
        4, {'train': {'loss': 0.125}, 'eval': {'fid': 2.5}}, stage='16'
      )
      writer.image(4, 'samples', np.zeros((4, 6, 3), np.uint8), stage='16')
      writer.close()
      ending.leave(0)
  """
  home = {'HOME': str(workdir), 'WANDB_MODE': 'offline'}
  return run_program(program, workdir, **home | env)


def test_weights_and_biases_offline(tmp_path):
  result = wandb_run(tmp_path)
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  (directory,) = tmp_path.glob('wandb/offline-run-*')
  # A later session has the same identifier.
  assert directory.name.endswith('-0123456789abcdef0123456789abcdef')
  (image,) = directory.glob('files/media/images/16/samples_*.png')
  with Image.open(image) as found:
    assert found.size == (6, 4)
  # Protocol buffers: the name, the tag of the value, its length, the value.
  (record,) = directory.glob('*.wandb')
  text = record.read_bytes()
  assert b'\x0d16/train/loss\x82\x01\x050.125' in text
  assert b'\x0b16/eval/fid\x82\x01\x032.5' in text
  assert b'\x0716/step\x82\x01\x014' in text
  assert b'\x04seed\x82\x01\x013' in text  # The config.
  assert tmp_path.name.encode() in text  # The run's name.


def test_weights_and_biases_of_a_run_in_a_bucket(bucket, tmp_path):
  result = wandb_run(
    f'{bucket.path}/run_3', HOME=str(tmp_path), TMPDIR=str(tmp_path)
  )
  assert result.returncode == 0, result.stderr
  (directory,) = tmp_path.glob('mdm_jax_wandb_*/wandb/offline-run-*')
  (record,) = directory.glob('*.wandb')
  assert b'run_3' in record.read_bytes()
  assert not any('wandb' in name for name in bucket.files())


def test_trackers_are_checked_before_the_run(monkeypatch, caplog):
  trackers.check(['tensorboard'])
  find = importlib.util.find_spec
  for name in ('tensorboard', 'wandb'):
    # W&B writes a directory of its name where it is run.
    for found in (None, types.SimpleNamespace(origin=None)):
      with monkeypatch.context() as patch:
        patch.setattr(
          importlib.util,
          'find_spec',
          lambda asked, name=name, found=found: (
            found if asked == name else find(asked)
          ),
        )
        with pytest.raises(ValueError) as error:
          trackers.check(['tensorboard', 'wandb'])
        assert str(error.value) == (
          f"trackers: '{name}' needs a package: pip install {name}."
        )

  class Error(Exception):
    pass

  class UsageError(Error):
    pass

  asked = []

  def login(**options):
    asked.append(mode)
    raise error

  monkeypatch.setattr(
    trackers,
    'wandb',
    types.SimpleNamespace(
      setup=lambda: types.SimpleNamespace(
        settings=types.SimpleNamespace(mode=mode)
      ),
      login=login,
      Error=Error,
      errors=types.SimpleNamespace(UsageError=UsageError),
    ),
  )
  mode, error = 'offline', UsageError()
  trackers.check(['wandb'])
  mode = 'online'
  with pytest.raises(ValueError, match='run `wandb login`, or set WANDB_MODE='):
    trackers.check(['wandb'])
  error = Error('no network')  # Training does not depend on it.
  trackers.check(['wandb'])
  assert asked == ['online', 'online']
  assert 'Weights & Biases cannot be reached now: no network' in caplog.text

  # Pydantic's errors have several lines.
  def refuse():
    raise ValueError("mode\n  Input should be 'online'")

  with monkeypatch.context() as patch:
    patch.setattr(trackers.wandb, 'setup', refuse)
    with pytest.raises(ValueError, match="WANDB_…: mode Input should be 'on"):
      trackers.check(['wandb'])

  # Nor on what happens later.
  trackers.wandb.Settings = lambda **options: None

  def init(**options):
    raise error

  trackers.wandb.init = init
  (tracker,) = trackers.make_trackers(['wandb'], 'x', {}, None)
  with pytest.raises(OSError, match='no network'):
    tracker.scalars('16', 1, 0.0, {'train/loss': 1.0})
  tracker.finish()


def test_broken_files_end_nothing(tmp_path, caplog):
  (tmp_path / 'metrics.jsonl').mkdir()
  (tmp_path / 'tensorboard').write_text('')
  writer = open_writer(tmp_path, 'tensorboard')
  for step in range(3):
    writer.scalars(step, {'train': {'loss': step}}, stage='a')
  writer.image(3, 'samples', np.zeros((4, 6, 3), np.uint8), stage='a')
  writer.skipped({'step': 3})
  writer.submit((tmp_path / 'absent' / 'a.png').write_bytes, b'')
  writer.flush()
  writer.close()
  assert read_lines(tmp_path, 'skipped') == [{'step': 3}]
  assert 'metrics.jsonl cannot be written' in caplog.text
  assert 'metrics.jsonl: 3 writes were dropped' in caplog.text
  assert 'images: 1 writes were dropped' in caplog.text
  assert 'TensorBoard cannot be written' in caplog.text


def test_rates_exclude_pauses(monkeypatch):
  now = 0.0
  monkeypatch.setattr(
    progress, 'time', types.SimpleNamespace(monotonic=lambda: now)
  )
  lines = []
  monkeypatch.setattr(
    logging, 'info', lambda text, *args: lines.append(text % args)
  )
  lines_of = progress.Progress(
    "stage 1/2 '32'", first_step=100, last_step=1100, batch_size=8
  )
  values = dict(
    loss=0.123,
    parts={'32': 0.05, '64': 0.073},
    grad_norm=0.31,
    learning_rate=1e-3,
  )
  now = 50.0
  rates = lines_of.report(200, **values)
  assert rates == {
    'images_per_second': 16.0,
    'seconds_per_step': 0.5,
    'eta_seconds': 450.0,
  }
  with pytest.raises(KeyError), lines_of.pause():
    now += 30
    raise KeyError
  now += 20
  rates = lines_of.report(300, **values)
  assert rates['images_per_second'] == 40.0  # 20 s for 100 steps of 8
  assert rates['eta_seconds'] == 400.0  # 100 s for 200 steps, 800 remaining
  assert lines[1] == (
    "stage 1/2 '32'  step 300/1100 (27 %)  40.0 images/s  eta 6m40s  "
    'loss 0.1230 (32: 0.0500, 64: 0.0730)  grad 0.31  lr 1.0e-03'
  )
  now += 1
  lines_of.report(301, **values | {'parts': {'32': 0.123}})
  assert 'loss 0.1230  grad' in lines[2]


@pytest.mark.parametrize(
  'later_steps, expected',
  [
    (0.0, 'eta 7m30s  loss'),
    # 450 s, and 1300 steps of 0.5 s.
    (1300.0, 'eta 7m30s, all stages ~18m20s  loss'),
    (None, 'eta 7m30s, all stages ≥7m30s  loss'),
  ],
)
def test_the_end_of_the_run_is_estimated(
  later_steps, expected, monkeypatch, caplog
):
  clock = types.SimpleNamespace(monotonic=lambda: 0.0)
  monkeypatch.setattr(progress, 'time', clock)
  lines_of = progress.Progress('a stage', 100, 1100, 8)
  lines_of.later_steps = later_steps
  clock.monotonic = lambda: 50.0
  with caplog.at_level('INFO', logger='absl'):
    lines_of.report(
      200, loss=0.1, parts={'8': 0.1}, grad_norm=0.3, learning_rate=1e-3
    )
  assert expected in caplog.messages[0]


@pytest.mark.parametrize(
  'seconds,expected',
  [
    (0.4, '0s'),
    (59.6, '1m00s'),
    (252, '4m12s'),
    (3900, '1h05m'),
    (183600, '2d03h'),
  ],
)
def test_duration(seconds, expected):
  assert console.duration(seconds) == expected


@pytest.mark.parametrize(
  'kind,expected',
  [
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5p', 459e12),
    ('TPU v5', 459e12),
    ('TPU v6 lite', 918e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12),
    ('GeForce 256', None),
  ],
)
def test_peak_flops_by_device_kind(kind, expected):
  device = types.SimpleNamespace(platform='gpu', device_kind=kind)
  assert peaks.peak_flops(device) == expected


def test_memory_of_the_fullest_device(monkeypatch):
  assert peaks.memory_in_use() == {}  # A CPU does not tell.

  def device(**stats):
    return types.SimpleNamespace(memory_stats=lambda: stats)

  devices = [
    device(bytes_in_use=2**30, peak_bytes_in_use=2**32),
    device(bytes_in_use=3 * 2**29, peak_bytes_in_use=2**31),
  ]
  monkeypatch.setattr(jax, 'local_devices', lambda: devices)
  assert peaks.memory_in_use() == {
    'device_memory_gib': 1.5,
    'device_memory_peak_gib': 4.0,
  }
  devices[1] = device(bytes_in_use=2**31)
  assert peaks.memory_in_use() == {'device_memory_gib': 2.0}


def test_peak_flops_of_a_cpu_is_measured():
  flops = peaks.measure_matmul_flops(jax.devices()[0], size=256, seconds=0.02)
  assert 1e8 < flops < 1e14
  assert 1e9 < peaks.peak_flops(jax.devices()[0]) < 1e14


def test_flops_of_a_matrix_product():
  x = jnp.ones((64, 64))
  lowered = jax.jit(lambda x: x @ x).lower(x)
  compiled = lowered.compile()
  assert peaks.flops_per_step(lowered, compiled, 1, 3) == 3 * 2 * 64**3

  def stub(cost):
    return types.SimpleNamespace(cost_analysis=lambda: cost)

  assert peaks.flops_per_step(lowered, stub([{'flops': 5.0}]), 1) == 5.0
  for cost in (None, [], {}, {'flops': -1.0}):
    assert peaks.flops_per_step(lowered, stub(cost), 1) is None
  # What a GPU's libraries do is not in the compiled program.
  with target.planning('gpu'):
    flops = peaks.flops_per_step(lowered, stub({'flops': 5.0}), 4)
  assert flops == 2 * 64**3 / 4


def test_parameters_are_summed_over_blocks():
  shape = jax.ShapeDtypeStruct((100, 20), jnp.float32)
  params = {
    'inner': {'down_0': {'conv': {'kernel': shape, 'bias': jnp.ones(20)}}},
    'out': {'bias': jnp.ones(3)},
  }
  assert console.num_parameters(params) == 2023
  assert console.parameter_table(params).splitlines()[2:] == [
    'inner/down_0       2,020',
    'out/bias               3',
  ]


def test_only_our_lines_and_warnings_are_logged(monkeypatch):
  handler = logging.get_absl_handler()
  monkeypatch.setattr(handler, 'filters', [])
  # As commands have it, once.
  monkeypatch.setattr(python_logging.root, 'handlers', [handler])
  monkeypatch.setattr(logging.get_absl_logger(), 'propagate', True)
  verbosity, parsed = logging.get_verbosity(), flags.FLAGS.is_parsed()
  seen = []
  monkeypatch.setattr(
    handler.python_handler, 'emit', lambda record: seen.append(record.msg)
  )
  console.setup_logging()
  logging.info('of a library')
  logging.warning('its warning')
  logging.warning('An NVIDIA GPU may be present on this machine, but …')
  progress.Progress('a stage', 0, 9, 8).report(
    1, loss=0.0, parts={}, grad_norm=0.0, learning_rate=0.0
  )
  logging.set_verbosity(verbosity)
  if not parsed:
    flags.FLAGS.unparse_flags()
  assert [text[:12] for text in seen] == ['its warning', '%s  step %d/']


def test_table_is_aligned():
  rows = [('32', 1.23456, 1000, None), ('64 px', 0.1, 20, 3)]
  assert console.table(rows, ('level', 'loss', 'steps', 'fid')) == '\n'.join(
    [
      'level   loss  steps  fid',
      '-----  -----  -----  ---',
      '32     1.235  1,000    -',
      '64 px    0.1     20    3',
    ]
  )
  assert console.table([], ('level', 'loss')) == 'level  loss\n-----  ----'
