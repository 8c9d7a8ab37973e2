"""The bare loop reads what the pipeline reads, or comparing them is no use."""

import json
import types

import numpy as np
import pytest

from configs import webvid_256
from mdm_jax.data import tar_index
from mdm_jax.data.images import decode_clip, decode_image
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.data.transforms import Transform
from mdm_jax.tools import bench_data
from tests.tools.test_prepare_clips import animation
from tests.tools.test_prepare_data import good_files, write_tar


@pytest.mark.parametrize('resolution', [64, 256, 1024])
def test_pillow_alone_gives_the_same_pixels(resolution):
  data = bench_data.SyntheticImages(1)[0]['image']
  expected, side = decode_image(data, resolution)
  assert side == 900
  np.testing.assert_array_equal(bench_data.pillow(data, resolution), expected)
  full = bench_data.pillow(data, resolution, draft=False)
  assert np.abs(full.astype(int) - expected).mean() < 4


def test_each_way_is_measured():
  transform = Transform(Tokenizer(CAPTIONS_MODEL, 8), 8)
  rates = bench_data.measure(
    bench_data.SyntheticImages(1), transform, 0.01, [0]
  )
  assert sorted(rates) == ['0 workers', 'pillow', 'pillow, full decode']
  # Nothing reads a 900 px JPEG in a tenth of a millisecond.
  assert all(1 < rate < 10_000 for rate in rates.values())


def test_damaged_images_are_not_counted():
  transform = Transform(Tokenizer(CAPTIONS_MODEL, 8), 8)
  (good,) = [bench_data.SyntheticImages(1)[0]]
  damaged = good | {'image': b'junk'}
  rates = bench_data.measure([damaged, good, damaged], transform, 0.1, [])
  assert 1 < rates['pillow'] < 1000
  with pytest.raises(ValueError, match='none of the records .* decoded'):
    bench_data.measure([damaged], transform, 0.01, [])


def test_a_config_is_measured(make_config, tmp_path, capsys):
  """Also if its first record cannot be read; it needs image files."""
  config = make_config()
  values = types.SimpleNamespace(
    config=config, workers=[], seconds=0.1, batch_size=1, step_rate=None
  )
  with pytest.raises(ValueError, match="^data.name='shapes' has no image fil"):
    bench_data._measure_all(values)
  write_tar(tmp_path / 's.tar', good_files(3) | {'000.txt': b'caf\xe9'})
  tar_index.write_index([f'{tmp_path}/s.tar'], f'{tmp_path}/index', 0.0)
  config.data.update(name='tars', path=f'{tmp_path}/index')
  values.output = str(tmp_path / 'rates.json')
  bench_data._measure_all(values)
  assert json.loads((tmp_path / 'rates.json').read_text()).keys() == {'8', '16'}
  assert '16 px' in capsys.readouterr().out


def test_stages_of_images_are_measured():
  config = webvid_256.get_config()
  assert bench_data._sizes(config) == [(64, 16, 1), (256, 16, 1), (64, 1, 1)]


def test_the_loop_over_jpegs_gives_the_same_pixels():
  data = bench_data.SyntheticImages(1)[0]['image'] * 8
  expected, side = decode_clip(data, 64, 4, 2)
  assert side == 900
  np.testing.assert_array_equal(
    bench_data.pillow_clip(data, 64, 4, 2), expected
  )


def test_clips_are_measured():
  data = animation([100] * 8)
  found = bench_data.pillow_clip(data, 8, 4, 2)
  expected, _ = decode_clip(data, 8, 4, 2)
  # Where it is transparent, the loop without more care has black.
  np.testing.assert_array_equal(found[:, :, 5:], expected[:, :, 5:])
  records = [{'image': data, 'caption': 'a clip', 'key': 'a'}] * 100
  transform = Transform(Tokenizer(CAPTIONS_MODEL, 8), 8, frames=4, every=2)
  rates = bench_data.measure(records, transform, 0.01, [0])
  assert sorted(rates) == ['0 workers', 'pillow']
