"""A run on images and then on clips, and what is sampled from it."""

import numpy as np
from PIL import Image, ImageSequence
import pytest

from configs import common
import mdm_jax
from mdm_jax.report import grid
from mdm_jax.report.sample_directory import SampleDirectory
from mdm_jax.runtime import files
from tests import commands, toy

FRAMES = 4


def frames_of(path):
  with Image.open(path) as image:
    return [np.asarray(x) for x in ImageSequence.Iterator(image)]


def make_config():
  """Images of 8 px, then clips of 8 px."""
  config = common.get_config()
  config.model.levels = [common.level(8, frames=FRAMES, frame_attention=(1,))]
  config.stages = [
    common.stage('images', 1, max_frames=1),
    common.stage('clips', 1),
  ]
  config = toy.shrink(common.smoke(config))
  assert config.data.name == 'moving_shapes'
  for stage in config.stages:
    stage.update(steps=3, batch_size=8)
  config.checkpoint_every = 1
  return config.lock()


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('run')
  toy.run(make_config(), workdir)
  return workdir


def test_resumed_equals_uninterrupted(workdir, tmp_path):
  config = make_config()
  toy.stop_at(1, config, tmp_path, 'clips')
  toy.run(config, tmp_path)
  for index in range(2):
    assert toy.digest(tmp_path, config, index) == (
      toy.digest(workdir, config, index)
    )


def test_it_goes_from_images_to_clips(workdir):
  assert len(frames_of(workdir / 'samples' / 'images_3.png')) == 1
  assert len(frames_of(workdir / 'samples' / 'clips_3.png')) == FRAMES
  lines = files.read_json_lines(workdir / 'metrics.jsonl')
  found = [line for line in lines if 'loss' in line]
  assert [line['stage'] for line in found][:: len(found) - 1] == [
    'images',
    'clips',
  ]
  assert 'loss_8' in found[0] and f'loss_{FRAMES}x8' in found[-1]


def test_clips_are_sampled_and_kept(workdir, tmp_path):
  model = mdm_jax.load(workdir)
  samples = model.sample(['a red circle moving up', 'a cross'], seed=1)
  (clips,) = samples.levels
  assert clips.shape == (2, FRAMES, 8, 8, 3)
  assert repr(samples) == f'<2 samples at {FRAMES}x8 px>'
  assert np.array_equal(samples[1], clips[1, 0])
  samples.save(tmp_path / 'grid.png')
  assert len(frames_of(tmp_path / 'grid.png')) == FRAMES
  # A clip alone is that of its batch, and is found again on the disk.
  (alone,) = model.sample('a cross', seed=samples.seeds[1]).levels
  np.testing.assert_array_equal(alone[0], clips[1])
  records = [{'prompt': 'a cross', 'seed': 2}]
  directory = SampleDirectory(tmp_path / 'samples', records)
  directory.add(0, [clips[1]])
  directory.finish({})
  name = f'0000_{FRAMES}x8.png'
  assert name in (tmp_path / 'samples' / 'index.html').read_text()
  for frame, expected in zip(
    frames_of(tmp_path / 'samples' / name), clips[1], strict=True
  ):
    np.testing.assert_array_equal(frame, expected)
  assert not SampleDirectory(tmp_path / 'samples', records).missing
  (tmp_path / 'samples' / name).write_bytes(b'no image')
  assert SampleDirectory(tmp_path / 'samples', records).missing == [0]


def test_clips_of_any_length_are_sampled(workdir):
  model = mdm_jax.load(workdir)

  def sample(prompts, **options):
    (clips,) = model.sample(prompts, steps=3, **options).levels
    return clips

  trained = sample(['a red circle', 'a cross'])
  (fewer,) = sample('a red circle', frames=2)
  assert fewer.shape == (2, 8, 8, 3)
  # The first parts are those of no other length; then come 2, 2 and 1 frames.
  longer = sample(['a red circle', 'a cross'], frames=FRAMES + 5)
  assert longer.shape == (2, FRAMES + 5, 8, 8, 3)
  np.testing.assert_array_equal(longer[:, :FRAMES], trained)
  later = [longer[0, k : k + 2] for k in (2, 4, 6)]
  assert all(np.any(a != b) for a, b in zip(later, later[1:]))
  # Step by step, for an animation, they are the same up to rounding.
  request = model.request(['a red circle'], steps=3, frames=FRAMES + 5)
  assert request.settings['frames'] == FRAMES + 5
  (steps,) = request.sample([0], path=True)
  assert len(steps) == 3
  (last,) = steps[-1]
  assert np.abs(np.asarray(last, int) - longer[0]).max() <= 1
  with pytest.raises(ValueError, match='^frames=0: give an integer from 1'):
    model.request(['a cross'], frames=0)
  images = mdm_jax.load(workdir, stage='images')
  with pytest.raises(ValueError, match="^frames=2: stage 1/2 'images' has im"):
    images.request(['a cross'], frames=2)


def test_clips_become_mp4_files(workdir, tmp_path):
  av = pytest.importorskip('av')

  def sample(stage, *flags):
    return commands.run(
      'mdm_jax.sample',
      f'--workdir={workdir}',
      f'--output={tmp_path}',
      '--prompt=a red circle',
      '--num_samples=1',
      '--steps=2',
      f'--stage={stage}',
      *flags,
      env=commands.on_devices(1),
    )

  result = sample('images', '--mp4')
  assert result.returncode == 1 and not list(tmp_path.iterdir())
  assert "error: --mp4: stage 1/2 'images' has images" in result.stderr
  result = sample('clips', '--mp4', '--frames=1')
  assert result.returncode == 1 and not list(tmp_path.iterdir())
  assert 'error: --mp4: --frames=1 is an image, no clip' in result.stderr
  # Also of samples that exist.
  for flags in ((), ('--mp4',)):
    result = sample('clips', *flags)
    assert result.returncode == 0, result.stderr
  with av.open(str(tmp_path / '0000.mp4')) as container:
    (video,) = container.streams.video
    assert video.average_rate == 8 and video.codec_context.name == 'h264'
    found = [
      frame.to_ndarray(format='gray') for frame in container.decode(video)
    ]
  clip = frames_of(tmp_path / f'0000_{FRAMES}x8.png')
  # Colours are stored at half the size, brightness is not.
  luma = np.float32(clip) @ np.float32([0.299, 0.587, 0.114]) * 219 / 255 + 16
  assert np.abs(np.stack(found) - luma).mean() < 8


def test_an_mp4_file_has_a_clips_frames(tmp_path):
  av = pytest.importorskip('av')
  clip = np.zeros((FRAMES, 32, 48, 3), np.uint8)
  for k, image in enumerate(clip):
    image[:, 12 * k :] = (200, 40, 90)
  grid.save_mp4(tmp_path / 'a.mp4', clip)
  with av.open(str(tmp_path / 'a.mp4')) as container:
    found = [
      frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)
    ]
  assert np.abs(np.stack(found) - np.float32(clip)).mean() < 4
