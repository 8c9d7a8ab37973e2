r"""Makes clips of a few frames of videos, which training reads without PyAV.

  pip install av
  python -m mdm_jax.tools.prepare_clips --input='videos/*.tar' --output=DIR \
      --frames=16 --fps=8 --resolution=256

Inputs are tars of video2dataset or webdataset: videos (.mp4, .webm, .mov, .mkv,
.avi, .gif or .webp), each with a caption in a .txt or .json of the same name.
Each becomes a tar of the same name in DIR, in which a video is a .jpg of the
chosen frames, one JPEG file after the other. `prepare_data` and `index_tars`
take such tars, and recipes of images train on their first frames.

Videos that cannot be used are skipped, listed in DIR/<tar>.rejects.jsonl and
counted at the end. The same command continues after it was killed; tars that
were damaged or could not be read are tried again. A video's file, of at most
256 MiB, is read whole, and decoded as a stream to the last chosen frame.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import sys
import tarfile

from absl import flags, logging
from etils import epath
import numpy as np
from PIL import Image

from mdm_jax.data import images, tars
from mdm_jax.data.images import BadRecord, decoding
from mdm_jax.runtime import (
  command,
  directory_lock,
  files,
  flag_types,
  value_types,
)
from mdm_jax.tools.worker_pool import run_all

_QUALITY = 90  # of JPEG
_OPTIONS = 'options.json'
# FFmpeg's names of the formats that are read. It knows others, such as play
# lists, whose files name further files to read.
_FORMATS = 'mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif'
# A frame at least this share of a period after the last one is taken, as times
# in files are rounded.
_EARLY = 0.02


@dataclasses.dataclass(frozen=True)
class Options:
  """Which frames become a clip.

  Attributes:
    frames: most frames of a clip.
    min_frames: fewest; videos with fewer are skipped.
    fps: frames a second; 0 takes the video's own.
    skip_seconds: at the start of a video.
    resolution: larger frames are reduced to this shorter side in pixels.
    max_pixels: of a frame of the video; larger ones are skipped.
    max_seconds: of a video whose file states how long it is; longer ones are
      skipped. 0 skips none.
  """

  frames: int = 16
  min_frames: int = 16
  fps: float = 8.0
  skip_seconds: float = 0.0
  resolution: int = 256
  max_pixels: int = 10_000_000
  max_seconds: float = 0.0

  def check(self) -> None:
    """Raises ValueError for options that exclude each other."""
    if self.min_frames > self.frames:
      raise ValueError(
        f'--min_frames={self.min_frames} is more than --frames={self.frames}.'
      )


def read_frames(data: bytes, key: str, options: Options) -> list[Image.Image]:
  """Decodes the frames of a clip.

  Args:
    data: a video file.
    key: of the record, for errors.
    options: which frames.

  Raises:
    BadRecord: no video, damaged, too large, or too short.
  """
  chosen = []
  # Libraries of videos decode no animated WebP, and GIFs without transparency.
  decode = _decode_animation if images.is_animation(data) else _decode_video
  try:
    with decoding(key), contextlib.closing(decode(data, key, options)) as found:
      for frame in _choose(found, key, options):
        chosen.append(_reduce(frame, options))
        if len(chosen) == options.frames:
          break
  except BadRecord as bad:
    # A video that is cut off later has enough whole frames before.
    if len(chosen) < options.min_frames or bad.reason == 'too many pixels':
      reason = 'damaged video' if bad.reason == 'damaged image' else bad.reason
      raise BadRecord(key, reason, bad.detail) from bad
  if len(chosen) < options.min_frames:
    raise BadRecord(
      key, 'too few frames', f'{len(chosen)}, not {options.min_frames}'
    )
  if len(chosen) > 1 and all(x == chosen[0] for x in chosen):
    raise BadRecord(key, 'nothing moves')
  return chosen


def _decode_animation(data: bytes, key: str, options: Options) -> Iterator:
  """Those of a GIF or a WebP, see `images.stream_frames`."""
  yield from images.stream_frames(data, key, options.max_pixels)


def _decode_video(data: bytes, key: str, options: Options) -> Iterator:
  """The time, None if it has none, and the frame of PyAV, of each frame.

  At last the time at which the last one ends, and None, if it is known.
  """
  import av

  options_of_format = {'format_whitelist': _FORMATS}
  with av.open(io.BytesIO(data), options=options_of_format) as container:
    if not container.streams.video:
      raise BadRecord(key, 'no video stream')
    stream = container.streams.video[0]
    stream.thread_count = 1  # Each worker has a process.
    if stream.width * stream.height > options.max_pixels:
      size = f'{stream.width} x {stream.height}'
      raise BadRecord(key, 'too many pixels', size)
    seconds = (container.duration or 0) / av.time_base
    if options.max_seconds and seconds > options.max_seconds:
      raise BadRecord(key, 'too long', f'{seconds:.1f} seconds')
    frame = None
    for frame in container.decode(stream):
      yield frame.time, frame
    if frame is not None and frame.time is not None and frame.duration:
      yield frame.time + float(frame.duration * frame.time_base), None


def _choose(frames: Iterator, key: str, options: Options) -> Iterator:
  """The frames at about even times, whatever the rate of the video.

  A frame that is shown for longer is chosen several times.

  Args:
    frames: the time and the frame of each; at the end maybe its time and None.
    key: of the record, for errors.
    options: which frames.
  """
  start, last, number = None, None, 0
  for index, (time, frame) in enumerate(frames):
    if time is None:
      if options.fps or options.skip_seconds:
        raise BadRecord(key, 'frames without times')
      time = float(index)
    if start is None:
      start = time + options.skip_seconds
    if not options.fps:
      if time >= start and frame is not None:
        yield frame
      continue
    # In periods: the chosen frames are due at 0, 1, 2, ...
    periods = (time - start) * options.fps
    is_end = frame is None
    until = (
      math.ceil(periods - _EARLY) if is_end else math.floor(periods + _EARLY)
    )
    while last is not None and number < until:
      yield last
      number += 1
    if not is_end and number == until:
      yield frame
      number += 1
    last = frame


def _reduce(frame, options: Options) -> Image.Image:
  """A frame as an upright RGB image, reduced if it is larger.

  Args:
    frame: an image, or a frame of PyAV.
    options: the resolution.
  """
  image = frame
  if not isinstance(frame, Image.Image):
    # Threads, which take longer to start than a frame takes, are not wanted.
    image = Image.fromarray(frame.to_ndarray(format='rgb24', threads=1))
    # Degrees by which a player turns it counterclockwise.
    if turns := round(getattr(frame, 'rotation', 0) / 90) % 4:
      image = Image.fromarray(np.rot90(np.asarray(image), turns))
  scale = options.resolution / min(image.size)
  if scale < 1:
    size = tuple(max(1, round(scale * side)) for side in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
  return image


def encode(frames: list[Image.Image]) -> bytes:
  """The frames as JPEG files, one after the other, see `images.split_jpegs`.

  An animated WebP is smaller by two fifths, but takes seven times as long to
  encode, and twice as long to decode.
  """
  file = io.BytesIO()
  for frame in frames:
    frame.save(file, 'JPEG', quality=_QUALITY)
  return file.getvalue()


def convert(options: Options, job: tuple[str, epath.Path]) -> None:
  """Writes the clips of one tar of videos.

  Args:
    options: which frames.
    job: path of the tar, and of that to write.
  """
  path, output = job
  rejects, count = [], 0
  with files.replacing(output) as temporary:
    with tarfile.open(temporary, 'w', format=tarfile.PAX_FORMAT) as tar:
      for key, video, captions in tars.read_records(path, rejects, tars.VIDEO):
        try:
          clip = encode(read_frames(video, key, options))
        except BadRecord as bad:
          rejects.append(bad)
          continue
        name = key.partition('/')[2]
        about = json.dumps({'caption': captions}).encode()
        for suffix, data in (('jpg', clip), ('json', about)):
          member = tarfile.TarInfo(f'{name}.{suffix}')
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
        count += 1
    # Before the tar is there, which marks it as finished.
    files.write_text(
      _rejects(output),
      ''.join(
        json.dumps({'key': b.key, 'reason': b.reason, 'detail': b.detail})
        + '\n'
        for b in rejects
      ),
    )
  logging.info('%s: %d clips, %d skipped', output, count, len(rejects))


def _rejects(output: epath.Path) -> epath.Path:
  return output.with_suffix('.rejects.jsonl')


def _is_finished(output: epath.Path) -> bool:
  """Whether it has all clips of a tar that was whole and could be read."""
  return output.exists() and not any(
    line['reason'] in tars.UNREAD
    for line in files.read_json_lines(_rejects(output))
  )


def main(_) -> None:
  """Converts all tars, and counts what was skipped."""
  values = flags.FLAGS
  options = Options(
    **{
      field.name: values[field.name].value
      for field in dataclasses.fields(Options)
    }
  )
  output = epath.Path(values.output)
  try:
    import av  # noqa: F401
  except ImportError:
    sys.exit('error: videos need PyAV: pip install av')
  try:
    options.check()
    paths = tars.find(values.input)
    with directory_lock.holding(output):
      files.require_same_settings(
        output / _OPTIONS, dataclasses.asdict(options)
      )
      jobs = [(path, output / f'{tars.stem(path)}.tar') for path in paths]
      run_all(
        functools.partial(convert, options),
        [job for job in jobs if not _is_finished(job[1])],
        values.num_workers,
        ' tar',
      )
      skipped = [
        line for _, tar in jobs for line in files.read_json_lines(_rejects(tar))
      ]
  except ValueError as error:
    sys.exit(f'error: {error}')
  except (OSError, RuntimeError) as error:
    sys.exit(f'error: {error}. The same command continues.')
  reasons = sorted({line['reason'] for line in skipped})
  for reason in reasons:
    count = sum(line['reason'] == reason for line in skipped)
    print(f'skipped, {reason}: {count}')
  print(f'Next: python -m mdm_jax.tools.prepare_data --input={output}')


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  flag_types.define_repeated(
    'input',
    None,
    value_types.Path('glob', schemes=('*',)),
    'Tars of videos, or a glob of them in quotes.',
    required=True,
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('directory', output=True),
    'Directory to write the tars to.',
    required=True,
  )
  flag_types.integer(
    'frames', Options.frames, 1, 1024, 'Most frames of a clip.'
  )
  flag_types.integer(
    'min_frames',
    Options.min_frames,
    1,
    1024,
    'Skip videos of which fewer frames can be taken.',
  )
  flag_types.define(
    'fps',
    Options.fps,
    value_types.Number(float, 0, 1000),
    "Frames that are taken a second; 0: all of the video's own.",
  )
  flag_types.define(
    'skip_seconds',
    Options.skip_seconds,
    value_types.Number(float, 0, 10**6),
    'Seconds to leave out at the start of each video.',
  )
  flag_types.integer(
    'resolution',
    Options.resolution,
    8,
    4096,
    'Reduce larger frames to this shorter side in pixels.',
  )
  flag_types.integer(
    'max_pixels',
    Options.max_pixels,
    1,
    2**32,
    'Skip videos whose frames have more pixels.',
  )
  flag_types.define(
    'max_seconds',
    Options.max_seconds,
    value_types.Number(float, 0, 10**6),
    'Skip videos that last longer; 0: skip none.',
  )
  flag_types.integer(
    'num_workers', os.cpu_count() or 1, 1, 1000, 'Number of worker processes.'
  )
  command.run(main)
