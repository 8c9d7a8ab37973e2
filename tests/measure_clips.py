"""Measures preparing clips, compared with a loop of PyAV.

    python -m tests.measure_clips OUTPUT.json VIDEOS.tar ...

`prepare_clips` makes 16 frames of 256 px, 8 a second, of each video. The loop
decodes the same frames to arrays of RGB pixels, and neither resizes nor encodes
them. By default PyAV converts each frame with new threads; the loop is measured
with them and without. All take turns, video by video, in CPU time of this
process. Decoding the prepared clips is measured too, at 64 and at 256 px.
"""

import argparse
import io
import json
import pathlib
import time

import av

from mdm_jax.data import images, tars
from mdm_jax.data.images import BadRecord
from mdm_jax.tools import prepare_clips

_OPTIONS = prepare_clips.Options()


def loop(data: bytes, threads: int = 0) -> list:
  """The frames of a clip, as a few lines of PyAV find them."""
  found = []
  with av.open(io.BytesIO(data)) as container:
    stream = container.streams.video[0]
    stream.thread_count = 1
    for frame in container.decode(stream):
      if frame.time >= (len(found) - 0.02) / _OPTIONS.fps:
        found.append(frame.to_ndarray(format='rgb24', threads=threads))
        if len(found) == _OPTIONS.frames:
          break
  return found


def main() -> None:
  """Measures, and writes the file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output', type=pathlib.Path)
  parser.add_argument('tars', nargs='+')
  arguments = parser.parse_args()
  seconds, sizes = {}, {'video': 0, 'clip': 0}

  def timed(name, function, *given):
    begin = time.process_time()
    result = function(*given)
    seconds[name] = seconds.get(name, 0) + time.process_time() - begin
    return result

  def prepare(data):
    return prepare_clips.encode(prepare_clips.read_frames(data, 'a', _OPTIONS))

  count, skipped = 0, 0
  for path in arguments.tars:
    for _, data, _ in tars.read_records(path, [], tars.VIDEO):
      try:
        prepare_clips.read_frames(data, 'a', _OPTIONS)  # Also warms up.
      except BadRecord:
        skipped += 1
        continue
      assert len(timed('loop', loop, data)) == _OPTIONS.frames
      timed('loop_of_one_thread', loop, data, 1)
      clip = timed('prepare', prepare, data)
      for side in (64, 256):
        timed(f'decode_{side}', images.decode_clip, clip, side, _OPTIONS.frames)
      count += 1
      sizes['video'] += len(data)
      sizes['clip'] += len(clip)
  document = {
    'clips': count,
    'skipped': skipped,
    'milliseconds_a_clip': {
      name: 1000 * each / count for name, each in seconds.items()
    },
    'prepare_over_loop': seconds['loop'] / seconds['prepare'],
    'prepare_over_loop_of_one_thread': seconds['loop_of_one_thread']
    / seconds['prepare'],
    'bytes_a_clip': {name: each / count for name, each in sizes.items()},
  }
  text = json.dumps(document, indent=2)
  arguments.output.write_text(f'{text}\n')
  print(text)


if __name__ == '__main__':
  main()
