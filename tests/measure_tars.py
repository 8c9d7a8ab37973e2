"""Measures reading tars from a bucket, compared with a disk.

    python -m tests.measure_tars OUTPUT.json

Makes batches of 32 examples in one thread, of JPEGs of 1200 x 900 pixels.
Images/s are those of a core of its own: one over the CPU time of the process
and the time in which the thread was blocked, so that other programs on the
machine count little. The best of three turns counts. The server of the bucket
runs on the same machine, in another process.
"""

import argparse
import io
import json
import multiprocessing
import os
import pathlib
import tarfile
import tempfile
import threading
import time

from etils import epath

from mdm_jax.data import pipeline, tar_index, tars
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.tools.bench_data import SyntheticImages
from tests.bucket import serving

_BATCH_SIZE, _TARS, _IMAGES = 32, 4, 200
_PLACES = (('disk', 0.0), ('bucket', 0.0), ('bucket', 0.05))


def serve(connection) -> None:
  """Serves a bucket, with each latency that it is told."""
  with serving() as bucket:
    connection.send(bucket.environment)
    while (latency := connection.recv()) is not None:
      bucket.latency = latency
      connection.send(None)


def write_tar(path: epath.Path, images: SyntheticImages) -> None:
  """Writes a tar of captioned images."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as tar:
    for i in range(_IMAGES):
      for suffix, data in (('jpg', images[i]['image']), ('txt', b'nothing')):
        member = tarfile.TarInfo(f'{i:04}.{suffix}')
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  path.write_bytes(buffer.getvalue())


def clocks() -> tuple[float, float]:
  """Seconds of CPU of this process; seconds in which the thread did not wait.

  Those are Linux's: in which it ran, and in which others had its core.
  """
  path = f'/proc/self/task/{threading.get_native_id()}/schedstat'
  ran, waited, _ = map(int, pathlib.Path(path).read_text().split())
  return time.process_time(), (ran + waited) / 1e9


def measure(index: str, resolution: int, batches: int) -> dict[str, float]:
  """Measures one turn."""
  transform = Transform(Tokenizer(CAPTIONS_MODEL, 32), resolution)
  make = pipeline._Batches(
    ((tar_index.open_source(index, 'train'), transform),),
    (0,),
    seed=0,
    shuffle=True,
    batch_size=_BATCH_SIZE,
    process_index=0,
    process_count=1,
    end=batches + 2,
    stride=1,
  )
  make(0)
  begin, (cpu, active) = time.perf_counter(), clocks()
  for batch in range(1, batches + 1):
    make(batch)
  count = batches * _BATCH_SIZE
  wall = time.perf_counter() - begin
  cpu, active = (now - then for now, then in zip(clocks(), (cpu, active)))
  blocked = max(wall - active, 0)
  return {
    'images_per_second': count / (cpu + blocked),
    'cpu_milliseconds': 1000 * cpu / count,
    'blocked_milliseconds': 1000 * blocked / count,
  }


def main() -> None:
  """Writes the rates as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output', type=pathlib.Path)
  arguments = parser.parse_args()
  ours, theirs = multiprocessing.Pipe()
  server = multiprocessing.get_context('spawn').Process(
    target=serve, args=(theirs,), daemon=True
  )
  server.start()
  os.environ |= ours.recv()
  results = {}
  with tempfile.TemporaryDirectory() as directory:
    roots = {'disk': directory, 'bucket': 'gs://tests/measured'}
    for root in roots.values():
      for i in range(_TARS):
        write_tar(epath.Path(root) / f'{i}.tar', SyntheticImages())
      tar_index.write_index(tars.find([f'{root}/*.tar']), f'{root}/index', 0.0)
    for resolution, batches in (64, 12), (256, 6):
      found = {}
      for _ in range(3):
        for place, latency in _PLACES:
          ours.send(latency)
          ours.recv()
          name = f'{place}, {1000 * latency:.0f} ms'
          turn = measure(f'{roots[place]}/index', resolution, batches)
          found.setdefault(name, []).append(turn)
      best = {
        name: max(turns, key=lambda turn: turn['images_per_second'])
        for name, turns in found.items()
      }
      first = best['disk, 0 ms']['images_per_second']
      for each in best.values():
        each['share_of_disk'] = each['images_per_second'] / first
      results[f'{resolution} px'] = best
  ours.send(None)
  arguments.output.write_text(json.dumps(results, indent=2) + '\n')
  print(json.dumps(results, indent=2))


if __name__ == '__main__':
  main()
