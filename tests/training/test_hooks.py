"""When hooks are due, and what the profiler writes."""

import types

import jax
import jax.numpy as jnp
import pytest

from mdm_jax.report.metric_writer import MetricWriter
from mdm_jax.report.progress import Progress
from mdm_jax.training.hooks import Hook, Hooks, _Profiler


def due(hook, **options):
  return [step for step in range(13) if hook.is_due(step, **options)]


def test_periods():
  assert due(Hook(print, 4)) == [4, 8, 12]
  assert due(Hook(print, 4, delay=3)) == [7, 11]
  assert due(Hook(print, 0)) == []
  assert due(Hook(print, 0, at_end=True, with_saves=True), last=True) == []


def test_two_periods():
  assert due(Hook(print, 4, 6)) == [4, 6, 8, 12]
  assert due(Hook(print, 0, 5)) == [5, 10]
  assert Hook(print, 0, 5, at_end=True).is_due(7, last=True)


def test_ends_and_saves():
  assert Hook(print, 5, at_end=True).is_due(7, last=True)
  assert not Hook(print, 5).is_due(7, last=True)
  assert Hook(print, 5, with_saves=True).is_due(7, saving=True)
  assert not Hook(print, 5, at_end=True).is_due(7, saving=True)


def test_pending_work_of_an_interrupted_run_is_done_again():
  calls = []

  def hook(name, every, **options):
    return Hook(
      lambda step, state: calls.append((name, step)), every, **options
    )

  hooks = Hooks(
    [hook('log', 2)], [hook('grid', 2), hook('eval', 3, replayed=True)]
  )
  assert [step for step in range(1, 8) if hooks.are_due(step)] == [2, 3, 4, 6]
  hooks.replay(6, None)
  hooks.replay(4, None)
  assert calls == [('eval', 6)]
  hooks.report(6, None)
  hooks.report(5, None)
  assert calls[1:] == [('grid', 6), ('eval', 6)]


def test_what_is_saved_is_checked_first():
  checked = []
  check = Hook(
    lambda step, state: checked.append(step), 10, with_saves=True, at_end=True
  )
  hooks = Hooks(
    [check], [Hook(print, 4, saves=True), Hook(print, 3), Hook(print, 0)]
  )
  for step in range(1, 12):
    hooks.check(step, None, last=step == 11, saving=step == 5)
  assert checked == [4, 5, 8, 10, 11]


def test_profiler_traces_some_steps(tmp_path):
  profiler = _Profiler(
    types.SimpleNamespace(workdir=tmp_path, writer=None),
    types.SimpleNamespace(num_steps=9),
    Progress('a stage', 0, 9, 1),
  )
  profiler.stop(1, None)  # Nothing to stop.
  profiler.start(2, None)
  state = jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
  profiler.start(3, state)  # One at a time.
  profiler.stop(4, state)
  # Where TensorBoard looks for it.
  (trace,) = tmp_path.glob('tensorboard/plugins/profile/*/*.xplane.pb')
  assert trace.stat().st_size > 1000
  assert list(trace.parent.glob('perfetto_trace.json.gz'))
  with pytest.raises(RuntimeError):  # It is stopped.
    jax.profiler.stop_trace()
  profiler.start(7, state)  # It would end after the stage.
  assert not profiler._is_tracing


def test_a_trace_for_a_bucket_is_uploaded(bucket, monkeypatch, tmp_path):
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setattr('tempfile.tempdir', None)
  # A busy machine needs longer for a trace of all that this process compiled.
  monkeypatch.setattr('mdm_jax.report.background._CLOSING', 120.0)
  writer = MetricWriter(bucket.path)
  profiler = _Profiler(
    types.SimpleNamespace(workdir=bucket.path, writer=writer),
    types.SimpleNamespace(num_steps=9),
    Progress('a stage', 0, 9, 1),
  )
  profiler.start(1, None)
  profiler.stop(4, jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
  writer.close()
  sizes = {name: len(data) for name, data in bucket.files().items()}
  (trace,) = (name for name in sizes if name.endswith('.xplane.pb'))
  assert trace.startswith('tensorboard/plugins/profile/')
  assert sizes[trace] > 1000
  assert f'{trace.rpartition("/")[0]}/perfetto_trace.json.gz' in sizes
  assert not [*tmp_path.iterdir()]


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path, caplog):
  (tmp_path / 'tensorboard').write_text('no directory')
  profiler = _Profiler(
    types.SimpleNamespace(workdir=tmp_path, writer=None),
    types.SimpleNamespace(num_steps=9),
    Progress('a stage', 0, 9, 1),
  )
  state = jnp.ones(3)
  for step in (1, 5):
    profiler.start(step, state)
    profiler.stop(step + 3, state)
  assert caplog.text.count('The trace cannot be written') == 1
  # JAX goes on tracing after that, which other tests of this process could not.
  (tmp_path / 'tensorboard').unlink()
  jax.profiler.stop_trace()
