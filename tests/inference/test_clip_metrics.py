"""Metrics of clips, with quick networks in the place of the real ones."""

import types

import jax
import numpy as np
import pytest

from configs import common
from mdm_jax.builders.data import make_source
from mdm_jax.builders.stage import make_stage
from mdm_jax.eval import fid
from mdm_jax.eval.flicker import flicker
from mdm_jax.inference import evaluation, feature_extractors
from mdm_jax.inference.session import Model
from mdm_jax.runtime import sharding

FRAMES, COUNT = 9, 13


class Colors:
  """Mean colours of frames, or of whole clips."""

  width = 3
  fingerprint = {'weights': 'none'}

  def __init__(self, path, batch_size, mesh):
    pass


class OfFrames(Colors):
  name = 'inception'

  def num_rows(self, shape):
    return shape[0]

  def encode(self, clips):
    return clips.mean((2, 3)).reshape(-1, 3)


class OfClips(Colors):
  name = 'i3d'

  def num_rows(self, shape):
    return 1

  def encode(self, clips):
    return clips.mean((1, 2, 3))


@pytest.fixture
def model(tmp_path, monkeypatch):
  monkeypatch.setattr(feature_extractors, 'Inception', OfFrames)
  monkeypatch.setattr(feature_extractors, 'I3D', OfClips)
  config = common.get_config()
  config.model.levels = [
    common.level(8, frames=FRAMES, frame_attention=(1,)),
  ]
  config.stages = [
    common.stage('images', 1, max_frames=1),
    common.stage('clips', 1),
  ]
  config = common.smoke(config)
  mesh = sharding.make_mesh(
    {'data': 1, 'fsdp': 1, 'spatial': 1}, jax.devices()[:1]
  )
  weights = types.SimpleNamespace(
    step=6, ema='EMA', fingerprint='0', best=False
  )
  return Model(str(tmp_path), make_stage(config, 1), weights, {}, mesh)


def sample(params, text, seeds):
  clips = [
    np.random.default_rng(seed).integers(0, 256, (FRAMES, 8, 8, 3), np.uint8)
    for seed in seeds
  ]
  return (np.stack(clips),)


def options(tmp_path, metrics, **changes):
  return evaluation.Options(
    metrics=metrics,
    num_samples=COUNT,
    num_reference=11,
    cache=str(tmp_path / 'cache'),
    **{'inception': 'inception.pth', 'i3d': 'i3d.pt', **changes},
  )


def test_clips_are_compared(model, tmp_path):
  found = evaluation.evaluate_run(
    model,
    options(tmp_path, ['fid', 'fvd', 'flicker', 'precision_recall']),
    sample,
    model.stage,
  )
  first = evaluation.Options().seed
  (clips,) = sample(None, None, range(first, first + COUNT))
  source = make_source(model.stage.config, 'held_out', 8, FRAMES)
  data = np.stack([source[i]['image'] for i in range(COUNT)])
  for name, network in (('fid', OfFrames), ('fvd', OfClips)):
    ours, theirs = (
      fid.Statistics.of(network.encode(None, x)) for x in (clips, data[:11])
    )
    assert found.metrics[name] == pytest.approx(
      fid.frechet_distance(ours, theirs), rel=1e-6
    )
  assert found.metrics['fid'].count == COUNT * FRAMES
  assert found.metrics['fvd'].count == COUNT
  assert found.metrics['flicker'] == pytest.approx(flicker(clips).mean())
  assert found.metrics['flicker_of_data'] == pytest.approx(flicker(data).mean())
  assert found.settings['fvd']['i3d'] == {'weights': 'none'}
  assert found.settings['fvd']['frames'] == FRAMES
  assert found.settings['fvd']['count'] == 11
  assert found.settings['flicker'] == {'split': 'held_out', 'count': COUNT}
  # Frames of a clip depend on each other.
  for name, count in (('precision', COUNT * FRAMES), ('recall', 11 * FRAMES)):
    assert found.metrics[name].count == count
    assert found.metrics[name].standard_error is None


def test_each_clip_of_the_data_flickers_once(model, tmp_path):
  """Also where more are sampled than there are."""
  config = model.stage.config.unlock()
  config.data.size = 5
  trained = make_stage(config, 1)
  model = Model(model.workdir, trained, model.weights, {}, model.mesh)
  flickers = options(tmp_path, ['flicker'], inception=None, i3d=None)
  found = evaluation.evaluate_run(model, flickers, sample, trained)
  source = make_source(config, 'held_out', 8, FRAMES)
  data = flicker(np.stack([source[i]['image'] for i in range(5)]))
  of_data = found.metrics['flicker_of_data']
  assert (of_data, of_data.count) == (pytest.approx(data.mean()), 5)
  assert of_data.standard_error == pytest.approx(data.std(ddof=1) / 5**0.5)
  assert found.metrics['flicker'].count == COUNT
  assert found.settings['flicker']['count'] == 5


@pytest.mark.parametrize(
  'stage, metric, changes, message',
  [
    (1, 'fvd', {'i3d': None}, '^--metrics=fvd needs --i3d=FILE, rgb_im'),
    (1, 'fvd', {'reference': 'a'}, '^--metrics=fvd compares with clips of'),
    (0, 'fvd', {}, '^--metrics=fvd: here they are some of loss,'),
    (0, 'flicker', {}, '^--metrics=flicker: here they are some of loss,'),
    (1, 'edge_width', {}, '^--metrics=edge_width: here they are some of'),
  ],
)
def test_what_cannot_be_measured_is_named(
  model, tmp_path, stage, metric, changes, message
):
  trained = make_stage(model.stage.config, stage)
  model = Model(model.workdir, trained, model.weights, {}, model.mesh)
  with pytest.raises(ValueError, match=message):
    evaluation.evaluate_run(
      model, options(tmp_path, [metric], **changes), sample, trained
    )


def test_short_clips_have_no_video_distance(model, tmp_path):
  config = model.stage.config.unlock()
  config.model.levels[0].frames = 8
  trained = make_stage(config, 1)
  model = Model(model.workdir, trained, model.weights, {}, model.mesh)
  message = 'fvd needs clips of 9 frames or more, and those of the model have 8'
  fvd = options(tmp_path, ['fvd'], inception=None)
  with pytest.raises(ValueError, match=message):
    evaluation.check_options(config, fvd)
  with pytest.raises(ValueError, match='^--metrics=fvd: here they are some of'):
    evaluation.check_options(config, fvd, 'images')
  with pytest.raises(ValueError, match=message):
    evaluation.evaluate_run(model, fvd, sample, trained)
