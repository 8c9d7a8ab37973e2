"""Metrics survive a kill, rates exclude pauses, and peaks are right."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import types

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.report import background, console, metric_writer, progress
from mdm_jax.runtime import peaks


def read_lines(workdir, name='metrics'):
  text = (workdir / f'{name}.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def read_events(workdir):
  from tensorboardX.proto.event_pb2 import Event

  events = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      length = int.from_bytes(data[:8], 'little')
      events.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return {
    value.tag: (event.step, value)
    for event in events
    for value in event.summary.value
  }


def test_metrics_reach_the_file_and_tensorboard(tmp_path):
  writer = metric_writer.MetricWriter(tmp_path)
  writer.scalars(3, {'loss': jnp.float32(0.5), 'fid': np.inf}, stage='32')
  writer.flush()
  lines = read_lines(tmp_path)  # while it is still open
  assert lines[0].pop('time') > 1.7e9
  assert lines == [{'stage': '32', 'step': 3, 'loss': 0.5, 'fid': 'inf'}]
  writer.image(3, 'samples', np.full((4, 6, 3), 7, np.uint8))
  writer.close()

  events = read_events(tmp_path)
  step, value = events['32/loss']
  assert step == 3 and value.simple_value == 0.5
  assert events['samples'][1].image.width == 6


def test_a_resumed_run_appends(tmp_path):
  for loss in (0.5, 0.25):
    writer = metric_writer.MetricWriter(tmp_path)
    writer.scalars(3, {'loss': loss}, stage='32')
    writer.close()
  lines = read_lines(tmp_path)
  assert [line['loss'] for line in lines] == [0.5, 0.25]
  assert lines[0]['time'] <= lines[1]['time']


def test_a_kill_loses_no_line(tmp_path):
  program = textwrap.dedent("""
      import os, signal, sys
      from mdm_jax.report import metric_writer
      writer = metric_writer.MetricWriter(sys.argv[1])
      for step in range(5):
        writer.scalars(step, {'loss': step}, stage='a')
      writer.flush()
      heavy = ('tensorflow', 'torch', 'transformers')
      assert not any(name in sys.modules for name in heavy)
      os.kill(os.getpid(), signal.SIGKILL)
  """)
  root = str(pathlib.Path(console.__file__).parents[2])
  process = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    env=os.environ | {'PYTHONPATH': root},
  )
  assert process.returncode == -signal.SIGKILL
  assert [line['loss'] for line in read_lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_slow_tensorboard_holds_up_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(background, '_CLOSING', 0.1)
  free = threading.Event()
  monkeypatch.setattr(
    metric_writer.tensorboardX.event_file_writer.EventsWriter,
    'write_event',
    lambda *args: free.wait(),
  )
  writer = metric_writer.MetricWriter(tmp_path)
  for step in range(100):  # Would never return if it waited for TensorBoard.
    writer.scalars(step, {'loss': step}, stage='a')
  writer.close()
  assert [line['loss'] for line in read_lines(tmp_path)] == [*range(100)]
  free.set()


def test_a_disk_that_fills_up_ends_nothing(tmp_path):
  program = textwrap.dedent("""
      import resource, sys
      import numpy as np
      from mdm_jax.report import metric_writer
      writer = metric_writer.MetricWriter(sys.argv[1])
      writer.image(0, 'a', np.zeros((8, 8, 3), np.uint8))
      writer.flush()
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
      noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
      for step in range(20):
        writer.image(step, 'a', noise)
        writer.scalars(step, {'loss': step}, stage='a')
      writer.close()
  """)
  result = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=600,
    cwd=pathlib.Path(console.__file__).parents[2],
  )
  assert result.returncode == 0
  assert 'TensorBoard cannot be written' in result.stderr
  assert 'Traceback' not in result.stderr
  assert [line['loss'] for line in read_lines(tmp_path)] == [*range(20)]


def test_broken_files_end_nothing(tmp_path, caplog):
  (tmp_path / 'metrics.jsonl').mkdir()
  (tmp_path / 'tensorboard').write_text('')
  writer = metric_writer.MetricWriter(tmp_path)
  for step in range(3):
    writer.scalars(step, {'loss': step}, stage='a')
  writer.image(3, 'samples', np.zeros((4, 6, 3), np.uint8))
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
    levels={'32': 0.05, '64': 0.073},
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
  lines_of.report(301, **values | {'levels': {'32': 0.123}})
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
  lines_of = progress.Progress('a stage', 100, 1100, 8, later_steps)
  clock.monotonic = lambda: 50.0
  with caplog.at_level('INFO', logger='absl'):
    lines_of.report(
      200, loss=0.1, levels={'8': 0.1}, grad_norm=0.3, learning_rate=1e-3
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


def test_peak_flops_of_a_cpu_is_measured():
  flops = peaks.measure_matmul_flops(jax.devices()[0], size=256, seconds=0.02)
  assert 1e8 < flops < 1e14
  assert 1e9 < peaks.peak_flops(jax.devices()[0]) < 1e14


def test_flops_of_a_matrix_product():
  x = jnp.ones((64, 64))
  compiled = jax.jit(lambda x: x @ x).lower(x).compile()
  assert peaks.flops_per_step(compiled) == 2 * 64**3

  def stub(cost):
    return types.SimpleNamespace(cost_analysis=lambda: cost)

  assert peaks.flops_per_step(stub([{'flops': 5.0}])) == 5.0
  for cost in (None, [], {}, {'flops': -1.0}):
    assert peaks.flops_per_step(stub(cost)) is None


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
  logger = logging.get_absl_logger()
  monkeypatch.setattr(logger, 'handlers', [handler])
  verbosity = logging.get_verbosity()
  seen = []
  monkeypatch.setattr(
    handler.python_handler, 'emit', lambda record: seen.append(record.msg)
  )
  console.setup_logging()
  logging.info('of a library')
  logging.warning('its warning')
  logging.warning('An NVIDIA GPU may be present on this machine, but …')
  progress.Progress('a stage', 0, 9, 8).report(
    1, loss=0.0, levels={}, grad_norm=0.0, learning_rate=0.0
  )
  logging.set_verbosity(verbosity)
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
