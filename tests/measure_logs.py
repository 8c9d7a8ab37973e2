"""Measures what logging into a bucket costs a training step.

    python -m tests.measure_logs OUTPUT.json

Trains steps of a small network, and logs each of them and a sample grid of
every tenth: in turns to a disk, and to a bucket whose every answer takes 100 ms
longer and whose every hundredth one is 503. The server of the bucket is another
process of the same machine. The time on the CPU is that of this process, all of
its threads together, which other programs disturb less.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from configs import shapes_64
from mdm_jax.builders.check_levels import parts_of_batches
from mdm_jax.builders.stage import Stage, make_stages
from mdm_jax.builders.text import empty_text
from mdm_jax.report import console, grid, trackers
from mdm_jax.report.goodput import Goodput
from mdm_jax.report.metric_writer import MetricWriter
from mdm_jax.runtime import cpu, sharding
from mdm_jax.steps.train import jit_train_step
from mdm_jax.tools import bench
from tests.bucket import serving

LATENCY, SHARE = 0.1, 0.01


def make_step(stage: Stage, mesh):
  """A compiled step, its state and a batch."""
  shardings = jax.tree.map(lambda x: x.sharding, stage.state_shapes(mesh))
  state = jax.jit(stage.new_state, out_shardings=shardings)(
    sharding.place(stage.init(), shardings.params)
  )
  batch = sharding.shard_batch(bench.make_batch(stage), mesh)
  jitted = jit_train_step(
    stage.make_train_step(empty_text(stage.config), mesh), state, batch, {}
  )
  return jitted.lower(state, batch, {}).compile(), state, batch


def train(step, state, batch, workdir, seconds):
  """Trains for some seconds.

  Returns:
    The state, the seconds of each step, and the seconds of CPU time per step.
  """
  boards = trackers.make_trackers(['tensorboard'], workdir, {'a': 1}, None)
  writer, goodput = MetricWriter(workdir, boards), Goodput(workdir)
  image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
  times, pending = [], None
  end, used = time.perf_counter() + seconds, time.process_time()
  while time.perf_counter() < end:
    begin = time.perf_counter()
    state, values = step(state, batch, {})
    if pending is not None:
      numbers = {
        name: float(value)
        for name, value in jax.device_get(pending).items()
        if not np.ndim(value)
      }
      writer.scalars(len(times), {'train': numbers}, stage='a')
    goodput.write('a', len(times))
    if len(times) % 10 == 5:
      path = pathlib.PurePosixPath('samples', f'{len(times)}.png')
      writer.submit(grid.save_png, f'{workdir}/{path}', image)
      writer.image(len(times), 'samples', image, stage='a')
    jax.block_until_ready(state)
    pending = values
    times.append(time.perf_counter() - begin)
  goodput.close()
  writer.close()
  return state, times, (time.process_time() - used) / len(times)


def serve() -> None:
  """Serves a bucket until standard input ends, then prints what it has seen."""
  with (
    serving() as bucket,
    bucket.delayed(LATENCY),
    bucket.failing('.', status=503, share=SHARE) as fault,
  ):
    print(json.dumps([bucket.path, bucket.environment]), flush=True)
    sys.stdin.read()
    written = sum(map(len, bucket.files().values()))
    seen = {'requests': fault.seen, 'errors': fault.hit, 'bytes': written}
    print(json.dumps(seen), flush=True)


def main() -> None:
  """Writes the times as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output', type=pathlib.Path, nargs='?')
  parser.add_argument('--serve', action='store_true', help='a bucket, no steps')
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--seconds', type=float, default=30, help='of a turn')
  arguments = parser.parse_args()
  if arguments.serve:
    return serve()
  console.setup_logging()
  config = shapes_64.get_config('smoke')
  config.stages[0].batch_size = 64
  cpu.use_cores(parts_of_batches(config))
  mesh = sharding.make_mesh(config.mesh)
  step, state, batch = make_step(make_stages(config)[0], mesh)
  server = subprocess.Popen(
    [sys.executable, '-m', 'tests.measure_logs', '--serve'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  path, environment = json.loads(server.stdout.readline())
  os.environ |= environment
  places = ['disk', 'bucket']
  times = {place: [] for place in places}
  used = {place: [] for place in places}
  with tempfile.TemporaryDirectory() as directory:
    roots = {'disk': directory, 'bucket': path}
    for turn in range(arguments.rounds + 1):
      for place in places:
        state, found, per_step = train(
          step, state, batch, f'{roots[place]}/{turn}', arguments.seconds
        )
        if turn:  # The first one warms up.
          times[place].append(found)
          used[place].append(per_step)
      places.reverse()
  seen = json.loads(server.communicate()[0])
  pooled = {
    place: float(np.median(np.concatenate(each)))
    for place, each in times.items()
  }
  cpu_time = {place: float(np.median(each)) for place, each in used.items()}
  result = {
    'latency_seconds': LATENCY,
    'share_of_errors': SHARE,
    'turns': arguments.rounds,
    'steps': {place: sum(map(len, each)) for place, each in times.items()},
    'seconds_per_step': pooled,
    'ratio': pooled['bucket'] / pooled['disk'],
    'cpu_seconds_per_step': cpu_time,
    'cpu_ratio': cpu_time['bucket'] / cpu_time['disk'],
    **seen,
  }
  arguments.output.write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
