"""Whole runs whose working directory is in a bucket."""

import contextlib
import io
import json
import signal
import subprocess
import threading
import time

import fsspec.asyn
import jax
from PIL import Image
import pytest

from configs import common
from mdm_jax.builders.text import load_frozen
from mdm_jax.report import background, goodput
from mdm_jax.runtime import directory_lock, files, preemption, sharding
from mdm_jax.training import loop, monitor
from tests import commands, toy
from tests.report.test_metric_writer import read_events

STEPS = 24


def toy_config():
  """A stage that logs each step, and samples at every eighth."""
  config = common.get_config()
  config.model.levels = [common.level(8)]
  config.stages = [common.stage('8', 1)]
  config = toy.shrink(common.smoke(config))
  config.stages[0].update(steps=STEPS, batch_size=8)
  config.update(log_every=1, sample_every=8, checkpoint_every=12)
  return config.lock()


def run(config, workdir):
  loop.setup(config, workdir)
  mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
  assert loop.train(config, workdir, mesh, load_frozen(config, mesh))


@pytest.fixture
def watched(bucket, monkeypatch):
  """Requests of the main thread, while the bucket stalls for some steps.

  Yields:
    A list of (step, bucket of the goodput), one for each request.
  """
  at, now, found = [0], [None], []
  add, switch = monitor.Monitor.add, goodput.Goodput.switch
  sync = fsspec.asyn.sync
  go_on, stack = threading.Event(), contextlib.ExitStack()
  faults, stalled = [], []

  def spied_sync(*args, **options):
    if threading.current_thread() is threading.main_thread():
      found.append((at[0], now[0]))
    return sync(*args, **options)

  def spied_switch(self, name):
    now[0] = name
    switch(self, name)

  def spied_add(self, step, values):
    at[0] = step
    if step == 14:  # After the first checkpoint, and the first grid.
      self._run.stop._wait()
      fault = bucket.failing('.', until=go_on)
      faults.append(stack.enter_context(fault))
      stalled.append(time.monotonic())
    if step == STEPS - 1:
      # A request is stalled, and no step has waited until it timed out.
      assert faults[0].hit and time.monotonic() - stalled[0] < 15
      go_on.set()
    add(self, step, values)

  monkeypatch.setattr(monitor.Monitor, 'add', spied_add)
  monkeypatch.setattr(goodput.Goodput, 'switch', spied_switch)
  monkeypatch.setattr(fsspec.asyn, 'sync', spied_sync)
  with stack:
    yield found
  go_on.set()


def test_no_step_waits_for_the_bucket(bucket, watched, monkeypatch):
  """A bucket that answers nothing for some steps holds up none of them."""
  monkeypatch.setattr(background, '_UPLOAD_EVERY', 0.01)
  config = toy_config()
  run(config, bucket.path)
  # But for saves, the training thread asks for nothing between two steps.
  between = {where for step, where in watched if 0 < step < STEPS}
  assert between <= {'save'}
  found = bucket.files()
  for step in (8, 16, 24):
    with Image.open(io.BytesIO(found[f'samples/8_{step}.png'])) as image:
      assert min(image.size) > 100
  run(config, bucket.path)  # It has finished: this one only reads it.
  lines = files.read_json_lines(f'{bucket.path}/metrics.jsonl')
  assert [line['step'] for line in lines if 'loss' in line] == [
    *range(1, STEPS + 1)
  ]
  assert [line['step'] for line in lines if line['stage'] == 'goodput'] == [
    1,
    2,
  ]
  events = read_events(f'{bucket.path}/tensorboard/8')
  assert [event.step for event in events.Images('samples')] == [8, 16, 24]
  assert [event.step for event in events.Scalars('train/loss')] == [
    *range(1, STEPS + 1)
  ]
  sessions, seconds = goodput.totals(bucket.path)
  assert sessions == 2 and seconds['step'] > 0
  metrics = json.loads(bucket.files()[f'eval/{STEPS}.json'])
  assert 0 < metrics['held_out_loss_8'] < 2


def test_a_stopped_run_has_logged_all_of_its_steps(bucket, tmp_path):
  """It has held the lock until then, and releases it."""
  recipe, workdir = tmp_path / 'recipe.py', f'{bucket.path}/run'
  recipe.write_text(
    toy.recipe(
      1, 100_000, log_every=1, sample_every=10**6, checkpoint_every=10**6
    )
  )
  command = ('mdm_jax.main', f'--config={recipe}', f'--workdir={workdir}/')
  run = commands.start(
    *command,
    env=commands.on_devices(1),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  try:
    while ' step ' not in run.stdout.readline():
      assert run.poll() is None
    refused = commands.run(*command)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(
      f'error: {workdir} is in use: process {run.pid} on '
    )
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
  finally:
    run.kill()
  assert run.returncode == preemption.EXIT_CODE, output
  assert not any(directory_lock.NAME in name for name in bucket.files())
  lines = files.read_json_lines(f'{workdir}/metrics.jsonl')
  steps = [line['step'] for line in lines if 'loss' in line]
  assert steps == [*range(1, len(steps) + 1)]
  saved = {
    int(name.split('/')[3])
    for name in bucket.files()
    if name.startswith('run/checkpoints/') and name.endswith('manifest.json')
  }
  assert max(saved) == len(steps)
