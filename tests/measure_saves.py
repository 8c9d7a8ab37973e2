"""Measures how long a checkpoint takes to be saved: on a disk, in a bucket.

    python -m tests.measure_saves OUTPUT.json

The checkpoint has 480 MiB. The bucket is an emulator on the same machine, which
keeps objects in memory; what harms requests in the tests is not asked. A save
counts until its manifest is there.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import fsspec
import jax
import numpy as np

from mdm_jax.checkpoint import manifest
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.report import console
from tests.bucket import serving

ARRAYS, SIZE = 120, 2**20  # float32: 4 MiB each


def measure(directory: str, state, turns: int) -> tuple[list, list]:
  """Seconds of each save and of each verification."""
  saves, checks = [], []
  with Checkpoints(directory, save_interval=1, max_to_keep=1) as checkpoints:
    for step in range(1, turns + 2):  # The first one warms up.
      begin = time.perf_counter()
      checkpoints.save(step, state, {})
      checkpoints.wait()
      saves.append(time.perf_counter() - begin)
      begin = time.perf_counter()
      assert manifest.problem(f'{directory}/{step}') is None
      checks.append(time.perf_counter() - begin)
  return saves[1:], checks[1:]


def main() -> None:
  """Writes the seconds as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output', type=pathlib.Path)
  parser.add_argument('--turns', type=int, default=5)
  arguments = parser.parse_args()
  console.setup_logging()
  draw = np.random.default_rng(0).standard_normal
  state = jax.device_put(
    {'step': np.int32(1)}
    | {f'array_{i}': draw(SIZE, np.float32) for i in range(ARRAYS)}
  )
  result = {'mebibytes': ARRAYS * SIZE * 4 / 2**20, 'turns': arguments.turns}
  with serving() as bucket, tempfile.TemporaryDirectory() as directory:
    for name in bucket.environment.keys() - {'GOOGLE_CLOUD_PROJECT'}:
      os.environ[name] = bucket.server_url
    fsspec.filesystem('gs').clear_instance_cache()
    for place, root in (('disk', directory), ('bucket', bucket.path)):
      saves, checks = measure(
        f'{root}/run/checkpoints/0_8', state, arguments.turns
      )
      result[place] = {
        'seconds': float(np.median(saves)),
        'seconds_to_verify': float(np.median(checks)),
      }
  result['ratio'] = result['bucket']['seconds'] / result['disk']['seconds']
  arguments.output.write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
