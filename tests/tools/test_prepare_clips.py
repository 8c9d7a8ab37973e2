"""Videos become clips of the frames that were asked for, or are counted."""

import fractions
import io
import json
import struct
import tarfile

import av
import numpy as np
from PIL import Image
import pytest

from configs import common
from mdm_jax.builders.data import make_dataset
from mdm_jax.builders.stage import make_stage
from mdm_jax.data import images, tar_index
from mdm_jax.data.images import BadRecord
from mdm_jax.tools.prepare_clips import Options, encode, read_frames
from tests import commands

OPTIONS = Options(frames=8, min_frames=4, fps=8, resolution=32)


def video(
  values, size=(64, 48), rate=24, times=None, kind='mp4', audio=False, turn=0
):
  """The file of a video whose frame i is grey of 5 times `values[i]`."""
  file = io.BytesIO()
  with av.open(file, 'w', format=kind) as container:
    codec = {'mp4': 'mpeg4', 'gif': 'gif'}.get(kind, 'mpeg4')
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height = size
    stream.pix_fmt = 'rgb8' if kind == 'gif' else 'yuv420p'
    if kind != 'gif':
      stream.bit_rate = 4_000_000
    sound = container.add_stream('aac', rate=8000) if audio else None
    for i, value in enumerate(values):
      image = np.full((size[1], size[0], 3), 5 * value, np.uint8)
      image[: size[1] // 2, : size[0] // 2] //= 2  # Dark at the top left.
      frame = av.VideoFrame.from_ndarray(image, format='rgb24')
      frame.time_base = fractions.Fraction(1, rate)
      frame.pts = i if times is None else times[i]
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if sound:
      container.mux(sound.encode())
  data = bytearray(file.getvalue())
  if turn:  # The matrix of the track's header: a quarter turn clockwise.
    matrix = (0, turn << 16, 0, -turn << 16, 0, 0, 0, 0, 1 << 30)
    place = data.index(b'tkhd') + 44
    data[place : place + 36] = struct.pack('>9i', *matrix)
  return bytes(data)


def write_videos(path, videos, suffix='mp4'):
  with tarfile.open(path, 'w') as tar:
    for name, data in videos.items():
      for end, content in ((suffix, data), ('txt', f'clip {name}'.encode())):
        member = tarfile.TarInfo(f'{name}.{end}')
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def values_of(frames):
  """What `video` was given, by the light part of each frame."""
  return [round(np.asarray(x)[-4:, -4:].mean() / 5) for x in frames]


def test_frames_are_chosen_by_their_times():
  frames = read_frames(video(range(48)), 'a', OPTIONS)
  assert values_of(frames) == [0, 3, 6, 9, 12, 15, 18, 21]
  assert frames[0].size == (43, 32)  # 64 x 48
  later = Options(8, 4, 8, skip_seconds=0.5, resolution=32)
  assert values_of(read_frames(video(range(48)), 'a', later)) == [
    *range(12, 36, 3)
  ]
  every = Options(8, 4, fps=0, resolution=100)
  frames = read_frames(video(range(48)), 'a', every)
  assert values_of(frames) == [*range(8)]
  assert frames[0].size == (64, 48)  # Not enlarged.


def test_of_a_variable_rate_the_times_count():
  times = [0, 1, 2, 3, 9, 10, 12, 18, 20, 21, 30, 31]
  frames = read_frames(video(range(12), times=times), 'a', OPTIONS)
  # At 8 a second, one is due at 0, 3, 6, ... of 24; 3 is still shown at 6.
  assert [times[i] for i in values_of(frames)] == [0, 3, 3, 9, 12, 12, 18, 21]
  later = Options(8, 2, 8, skip_seconds=0.25, resolution=32)  # 6 of 24.
  frames = read_frames(video(range(12), times=times), 'a', later)
  assert [times[i] for i in values_of(frames)] == [3, 9, 12, 12, 18, 21, 21, 21]


def test_the_last_frame_is_shown_until_the_end():
  # Two seconds at four a second.
  assert values_of(
    read_frames(video(range(8), rate=4), 'a', Options(16, 16, 8))
  ) == [i // 2 for i in range(16)]


@pytest.mark.parametrize('turn', (-1, 1))
def test_turned_videos_are_made_upright(turn):
  (first, *_) = read_frames(video([20] * 9 + [30] * 9, turn=turn), 'a', OPTIONS)
  assert first.size == (32, 43)
  corners = np.asarray(first)[[8, 8, -8, -8], [8, -8, 8, -8], 0] < 75
  # Clockwise, what was at the top left is at the top right.
  assert corners.tolist() == [False, turn == 1, turn == -1, False]


def test_long_videos_are_skipped():
  data = video(range(48))  # Two seconds.
  read_frames(data, 'a', Options(8, 4, max_seconds=2.1))
  with pytest.raises(BadRecord, match='too long .2.0 seconds'):
    read_frames(data, 'a', Options(8, 4, max_seconds=1.9))


def test_no_other_file_is_read(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'secret.mp4').write_bytes(video(range(48)))
  listed = b'ffconcat version 1.0\nfile secret.mp4\n'
  with pytest.raises(BadRecord, match='damaged video'):
    read_frames(listed, 'a', OPTIONS)


def test_a_frame_is_repeated_while_it_is_shown():
  data = animation([500] + [125] * 8)
  assert values_of(read_frames(data, 'a', OPTIONS)) == [0, 0, 0, 0, 1, 2, 3, 4]
  # Five a second.
  frames = read_frames(animation([200] * 6), 'a', OPTIONS)
  assert values_of(frames) == [0, 1, 1, 2, 3, 3, 4, 4]
  # So is the last one: of 750 ms, one is due each 125 ms before the end.
  frames = read_frames(animation([125, 125, 500]), 'a', OPTIONS)
  assert values_of(frames) == [0, 1, 2, 2, 2, 2]
  every = Options(8, 2, fps=0)
  frames = read_frames(animation([125, 125, 500]), 'a', every)
  assert values_of(frames) == [0, 1, 2]


def test_sound_and_odd_sizes_do_not_matter():
  frames = read_frames(video(range(30), audio=True), 'a', OPTIONS)
  assert values_of(frames) == [0, 3, 6, 9, 12, 15, 18, 21]
  frames = read_frames(video(range(30), size=(34, 70)), 'a', OPTIONS)
  assert frames[0].size == (32, 66)
  frames = read_frames(video(range(10, 40), kind='gif'), 'a', OPTIONS)
  assert len(frames) >= 4


def animation(durations, kind='WEBP', size=(64, 48)):
  """An animation whose frame i is grey of 5 times i, on a transparent left."""
  frames = []
  for i in range(len(durations)):
    frame = Image.new('RGBA', size)
    frame.paste((5 * i, 5 * i, 5 * i, 255), (size[0] // 2, 0, *size))
    frames.append(frame)
  file = io.BytesIO()
  options = {'disposal': 2} if kind == 'GIF' else {'lossless': True}
  frames[0].save(
    file,
    kind,
    save_all=True,
    append_images=frames[1:],
    duration=durations,
    **options,
  )
  return file.getvalue()


@pytest.mark.parametrize('kind', ('WEBP', 'GIF'))
def test_animated_images_are_videos(kind):
  data = animation([40] * 10 + [80] * 30, kind)  # 0 to 360 ms, then 400, 480
  frames = read_frames(data, 'a', OPTIONS)
  # One is due each 125 ms: at 160, 280, 400, 560, 640, 800 and 880 ms.
  assert values_of(frames) == [0, 4, 7, 10, 12, 13, 15, 16]
  assert frames[0].size == (43, 32)
  assert np.asarray(frames[3])[:, :18].min() > 250  # White.
  with pytest.raises(BadRecord, match='too few frames'):
    read_frames(animation([40] * 5, kind), 'a', OPTIONS)
  with pytest.raises(BadRecord, match='too many pixels'):
    read_frames(data, 'a', Options(8, 4, 8, max_pixels=1000))
  with pytest.raises(BadRecord, match='damaged video'):
    read_frames(data[: len(data) // 20], 'a', OPTIONS)


@pytest.mark.parametrize(
  'data, problem',
  [
    (b'This is a text.', 'damaged video'),
    (b'', 'damaged video'),
    (video(range(5)), 'too few frames'),
    (video([9] * 30), 'nothing moves'),
    (video(range(48))[:4000], 'damaged video'),
    (video(range(9), size=(640, 320)), 'too many pixels'),
  ],
  ids=['text', 'empty', 'short', 'still', 'cut', 'large'],
)
def test_what_is_no_clip_is_a_bad_record(data, problem):
  options = Options(8, 4, 8, resolution=32, max_pixels=100_000)
  with pytest.raises(BadRecord) as bad:
    read_frames(data, 'key', options)
  assert bad.value.reason == problem and bad.value.key == 'key'


def webp(frames):
  file = io.BytesIO()
  first, *rest = frames
  first.save(
    file, 'WEBP', quality=90, save_all=True, append_images=rest, duration=125
  )
  return file.getvalue()


@pytest.mark.parametrize('make', (encode, webp))
def test_frames_of_a_clip(make):
  frames = read_frames(video(range(48), (64, 64)), 'a', OPTIONS)
  data = make(frames)
  clip, side = images.decode_clip(data, 32, 8)
  assert clip.shape == (8, 32, 32, 3) and side == 32
  assert np.abs(clip - np.stack(frames).astype(int)).max() < 12
  # The first one is what an image is.
  first, size = images.decode_image(data, 32)
  np.testing.assert_array_equal(first, clip[0])
  assert size == 32
  for start, every, values in (
    (0.0, 1, [0, 3, 6, 9]),
    (1.0, 1, [12, 15, 18, 21]),
    (0.5, 1, [6, 9, 12, 15]),
    (0.0, 2, [0, 6, 12, 18]),
  ):
    clip, side = images.decode_clip(data, 16, 4, every, start=start)
    assert clip.shape == (4, 16, 16, 3) and side == 32
    assert values_of(clip) == values
  # Of uniform places each beginning is as likely.
  begun = [
    values_of(images.decode_clip(data, 16, 6, start=i / 12)[0])[0]
    for i in range(12)
  ]
  assert begun == [0] * 4 + [3] * 4 + [6] * 4
  # Equal frames, which a WebP stores once.
  frames = [frames[i] for i in (0, 0, 0, 1, 2, 2, 3, 3)]
  clip, _ = images.decode_clip(make(frames), 16, 8)
  assert values_of(clip) == [0, 0, 0, 3, 6, 6, 9, 9]
  with pytest.raises(BadRecord, match='too few frames .8, not 9'):
    images.decode_clip(data, 16, 9)
  with pytest.raises(BadRecord, match='too many pixels'):
    images.decode_clip(data, 16, 4, max_pixels=32 * 31)
  for cut in (data[: len(data) // 2], b'no image'):
    with pytest.raises(BadRecord):
      images.decode_clip(cut, 16, 8)


def test_all_frames_of_an_animation():
  frames = read_frames(video(range(48)), 'a', OPTIONS)
  found = images.load_frames(webp(frames))
  assert found.shape == (8, 32, 43, 3)
  assert np.abs(found - np.stack(frames).astype(int)).max() < 12
  with pytest.raises(BadRecord, match='too many pixels'):
    images.load_frames(webp(frames), max_pixels=8 * 43 * 32 - 1)


def test_only_the_wanted_jpegs_are_decoded():
  """Of a larger clip also only as many pixels as are needed."""
  frames = read_frames(video(range(48), (320, 240)), 'a', Options(8, 4))
  jpegs = images.split_jpegs(encode(frames))
  assert len(jpegs) == 8 and b''.join(jpegs) == encode(frames)
  for i in (0, 1, 3, 5, 7):
    jpegs[i] = jpegs[i][:100] + jpegs[i][-2:]
  data = b''.join(jpegs)
  # Frames 2, 4 and 6.
  clip, side = images.decode_clip(data, 16, 3, 2, start=1.0)
  assert side == 240 and values_of(clip) == [6, 12, 18]
  with pytest.raises(BadRecord, match='damaged image'):
    images.decode_clip(data, 16, 3, 2, start=0.0)
  images.decode_clip(data, 16, 3, 2, start=1.0, max_pixels=80 * 60)
  with pytest.raises(BadRecord, match='too many pixels'):
    images.decode_clip(data, 16, 3, 2, start=1.0, max_pixels=80 * 60 - 1)


def test_images_are_not_split():
  image = Image.new('RGB', (8, 8))
  file = io.BytesIO()
  image.save(file, 'JPEG')
  thumbnail = file.getvalue()
  file = io.BytesIO()
  # As in EXIF: the end of one image is not where the next begins.
  image.save(file, 'JPEG', comment=thumbnail)
  for data in (file.getvalue(), thumbnail, webp([image]), b'', b'no image'):
    assert images.split_jpegs(data) == [data]


def prepare(given, output, *flags):
  return commands.run(
    'mdm_jax.tools.prepare_clips',
    f'--input={given}',
    f'--output={output}',
    '--frames=8',
    '--min_frames=8',
    '--resolution=32',
    '--num_workers=1',
    *flags,
  )


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Clips of six videos, one of them a text; and what was printed."""
  given = tmp_path_factory.mktemp('videos')
  good = {str(i): video(range(i, i + 30)) for i in range(5)}
  write_videos(given / 'a.tar', good | {'bad': b'no video'})
  output = given / 'clips'
  done = prepare(f'{given}/*.tar', output)
  assert not done.returncode, done.stderr
  return given, output, done.stdout


def test_bad_videos_are_counted(prepared):
  _, output, printed = prepared
  assert 'skipped, damaged video: 1' in printed
  (line,) = (output / 'a.rejects.jsonl').read_text().splitlines()
  assert json.loads(line)['key'] == 'a/bad'
  with tarfile.open(output / 'a.tar') as tar:
    assert len(tar.getnames()) == 10
    about = json.load(tar.extractfile('3.json'))
    assert about == {'caption': ['clip 3']}
    found = images.split_jpegs(tar.extractfile('3.jpg').read())
    assert len(found) == 8


def test_only_whole_tars_are_finished(prepared, tmp_path):
  given, output, _ = prepared
  before = (output / 'a.tar').stat().st_mtime_ns
  whole = (given / 'a.tar').read_bytes()
  (tmp_path / 'a.tar').write_bytes(whole)
  (tmp_path / 'b.tar').write_bytes(whole[: len(whole) // 2])  # Half a download.
  done = prepare(f'{tmp_path}/*.tar', output)
  assert not done.returncode and 'skipped, damaged tar: 1' in done.stdout
  assert (output / 'a.tar').stat().st_mtime_ns == before
  (tmp_path / 'b.tar').write_bytes(whole)
  done = prepare(f'{tmp_path}/*.tar', output)
  assert not done.returncode and 'damaged tar' not in done.stdout
  with tarfile.open(output / 'b.tar') as tar:
    assert len(tar.getnames()) == 10


def test_wrong_options_are_one_line(prepared, tmp_path):
  given, finished, _ = prepared
  (tmp_path / 'folder').mkdir()
  for tars, output, flags, problem in (
    ('*.tar', 'out', ('--frames=4',), '--min_frames=8 is more than'),
    ('*.tar', 'out', (), 'matches no file'),
    ('folder', 'out', (), f"is a folder: give '{tmp_path}/folder/*.tar'"),
    (given / 'a.tar', finished, ('--fps=4',), 'was begun with other fps'),
  ):
    done = prepare(tmp_path / tars, tmp_path / output, *flags)
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
    assert problem in line


def test_where_clips_begin(prepared, tmp_path):
  """Four of eight frames are the first, in the middle, or anywhere."""
  with tarfile.open(tmp_path / 'one.tar', 'w') as tar:
    with tarfile.open(prepared[1] / 'a.tar') as clips:
      for name in ('0.jpg', '0.json'):
        tar.addfile(clips.getmember(name), clips.extractfile(name))
  index = tmp_path / 'index'
  tar_index.write_index([f'{tmp_path}/one.tar'], str(index), 0.0)
  config = common.get_config().unlock()
  config.data.update(name='tars', path=str(index))

  def batches(start, **options):
    config.data.clip_start = start
    found = make_dataset(
      config,
      'train',
      [(4, 16, 16, 3)],
      (1,),
      process_index=0,
      process_count=1,
      **options,
    )
    return [batch['image'][0] for batch, _ in zip(found, range(30))]

  def begun(clips):
    return {values_of(clip)[0] for clip in clips}

  assert begun(batches('first')) == {0}
  assert begun(batches('centre')) == {6}
  drawn = batches('random')
  assert begun(drawn) == {0, 3, 6, 9, 12}
  np.testing.assert_array_equal(
    batches('random', start_batch=7)[:23], drawn[7:]
  )
  # What is measured does not change.
  assert begun(batches('random', num_batches=5)) == {6}


def test_clips_are_trained_on(prepared, tmp_path):
  """Also images of their first frames, and frames of coarser levels."""
  _, output, _ = prepared
  index = tmp_path / 'index'
  done = commands.run(
    'mdm_jax.tools.index_tars', f'--input={output}/*.tar', f'--output={index}'
  )
  assert not done.returncode, done.stderr
  config = common.get_config().unlock()
  config.data.update(name='tars', path=str(index), clip_start='first')
  shapes = [(16, 16, 3), (4, 16, 16, 3), (8, 16, 16, 3)]
  (batch,) = make_dataset(
    config,
    'train',
    shapes,
    (6, 4, 2),
    process_index=0,
    process_count=1,
    num_batches=1,
  )
  assert batch['image'].shape == (2, 8, 16, 16, 3)
  assert batch['image_4x16'].shape == (2, 4, 16, 16, 3)
  assert batch['image_16'].shape == (2, 16, 16, 3)
  firsts = [values_of(clip)[0] for clip in batch['image']]
  for clip, first in zip(batch['image'], firsts):
    assert values_of(clip) == [*range(first, first + 24, 3)]
  for clip in batch['image_4x16']:
    first = values_of(clip)[0]
    assert values_of(clip) == [*range(first, first + 24, 6)]
  assert (batch['scale'] == 32).all()
  # In a stage of its own, the coarser level sees frames as far apart.
  config.model.levels = [common.level(16, frames=4), common.level(16, frames=8)]
  config.stages = [common.stage('4x16', 1, batch_size=2)]
  (batch,) = make_stage(config, 0).make_dataset('train', num_batches=1)
  for clip in batch['image']:
    first = values_of(clip)[0]
    assert values_of(clip) == [*range(first, first + 24, 6)]
