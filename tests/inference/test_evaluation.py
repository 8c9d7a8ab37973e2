"""Metrics of a small untrained model: right for its samples, repeatable."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
import types

import jax
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage

from mdm_jax.builders.config import stage_directory, write_config
from mdm_jax.builders.data import make_source
from mdm_jax.builders.model import make_model
from mdm_jax.builders.prompts import make_prompts
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.data.images import decode_image
from mdm_jax.eval import fid
from mdm_jax.inference import (
  evaluation,
  feature_extractors,
  sample_metrics,
  shapes_features,
  validation,
)
from mdm_jax.inference.pipeline import Pipeline
from mdm_jax.inference.sample_metrics import OfShapes, Samples
from mdm_jax.inference.session import Model, Session
from mdm_jax.report.sample_directory import SampleDirectory
from mdm_jax.runtime import sharding
from tests import commands

COUNT = 21
OF_CLIPS = 'flicker', 'fvd'


class Colors:
  """Replaces Inception: quick features, means and deviations of colours."""

  name, width = 'inception', 6
  fingerprint = {'weights': 'none'}
  seen = 0

  def __init__(self, path, batch_size, mesh):
    if path == 'missing.pth':
      raise FileNotFoundError(path)

  def num_rows(self, shape):
    return 1

  def encode(self, images):
    Colors.seen += len(images)
    x = np.asarray(images, np.float32)
    return np.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1)


def fake_sample_fn(params, text, seeds):
  """Replaces the sampler: images that depend on all its arguments."""
  images = [
    np.random.default_rng([seed, *row]).integers(seed, 256, (8, 8, 3), np.uint8)
    for row, seed in zip(text, seeds)
  ]
  return (np.stack(images),)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  Colors.seen = 0
  monkeypatch.setattr(feature_extractors, 'Inception', Colors)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(
    {'data': 1, 'fsdp': 1, 'spatial': 1}, jax.devices()[:1]
  )


@pytest.fixture(scope='module')
def config(make_config):
  config = make_config()
  config.eval.update(num_prompts=5, loss_batches=2)
  config.data.size = 18  # Fewer than the tests sample.
  config.seed = 5
  return config


@pytest.fixture(scope='module')
def run(config, random_params, tmp_path_factory):
  """The working directory of a run whose first stage is at step 3 of 20."""
  workdir = tmp_path_factory.mktemp('run')
  model = make_model(config, config.stages[0])
  params = random_params(model, config.text.max_length)
  write_config(workdir, json.loads(config.to_json()))
  with Checkpoints(
    stage_directory(workdir, config, 0), save_interval=1, max_to_keep=1
  ) as checkpoints:
    checkpoints.save(3, {'ema': jax.tree.map(jax.numpy.asarray, params)}, {})
  return workdir


def evaluate(run, config, mesh, options):
  """Without the sampler."""
  stage, weights = Session(run, config, mesh)._restore_weights()
  model = Model(str(run), stage, weights, weights.params, mesh)
  return evaluation.evaluate_run(model, options, fake_sample_fn, stage)


def statistics(images):
  sample = fid.Sample(6, len(images), len(images))
  sample.add(Colors.encode(None, images))
  return sample


def test_all_metrics_of_samples(
  config, run, mesh, clip_directory, tmp_path, monkeypatch, caplog
):
  """Samples batches of 8 and 10 prompts at once, more than the data set has."""
  monkeypatch.setattr(evaluation, '_PROMPTS_AT_ONCE', 10)
  monkeypatch.setattr(evaluation, '_SAVED', 2)
  monkeypatch.setattr(
    shapes_features,
    'Features',
    functools.partial(shapes_features.Features, num_images=32, num_steps=1),
  )
  options = evaluation.Options(
    metrics=[x for x in evaluation.METRICS if x not in ('loss', *OF_CLIPS)],
    num_samples=COUNT,
    seed=7,
    num_reference=13,
    inception='inception.pth',
    clip=clip_directory.path,
    cache=tmp_path,
  )
  found = evaluate(run, config, mesh, options)
  found, settings = found.metrics, found.settings
  missing = {*evaluation.value_names(config, options)} ^ found.keys()
  assert missing == {'edge_width', 'edge_width_of_data'}  # Without outlines.
  parts = [make_prompts(config, 18), make_prompts(config, 3)]
  captions = [name for part in parts for name in part.captions]
  (images,) = fake_sample_fn(
    None, np.concatenate([part.text for part in parts]), range(7, 7 + COUNT)
  )
  source = make_source(config, 'held_out', 8)
  reference = statistics(np.stack([source[i]['image'] for i in range(13)]))
  sample = statistics(images)
  assert found['fid'] == pytest.approx(
    fid.frechet_distance(sample.statistics, reference.statistics), rel=1e-6
  )
  assert found['kid'] == pytest.approx(
    fid.kernel_distance(sample.rows, reference.rows)[0], rel=1e-6
  )
  assert (found['precision'], found['recall']) == fid.precision_recall(
    sample.rows, reference.rows
  )
  clip = feature_extractors.Clip(clip_directory.path, COUNT, mesh)
  assert found['clip_score'] == pytest.approx(
    clip.scores(images, captions).mean(), rel=1e-5
  )
  assert 0 <= found['accuracy_background'] <= 1
  assert found['frechet'] > 0 and found['frechet'].count == COUNT
  assert settings['frechet']['images'] == 32
  # Runs of all seeds are measured in the same features.
  assert config.seed != settings['frechet']['seed'] == 0
  # Images of 8 px have no outlines.
  assert 'edge_width' not in found
  assert 'edge_width: no image has an outline to measure.' in caplog.text

  assert json.loads(json.dumps(settings))['step'] == 3
  expected = {
    'stage': '8',
    'step': 3,
    'weights': 'EMA',
    'resolution': 8,
    'seed': 7,
    'num_samples': COUNT,
    'num_reference': 13,
    'prompts': 'held_out',
    'rows': [COUNT, 13],
  }
  assert {name: settings[name] for name in expected} == expected
  assert settings['sampler']['num_steps'] == config.sampler.num_steps
  assert settings['reference']['inception'] == {'weights': 'none'}
  assert settings['clip'] == clip.fingerprint

  # The first samples are written to disk.
  directory = run / 'eval' / '8_3'
  lines = (directory / 'samples.jsonl').read_text().splitlines()
  assert [json.loads(line)['prompt'] for line in lines] == captions[:2]
  with Image.open(directory / '0001_8.png') as image:
    np.testing.assert_array_equal(image, images[1])
  page = (directory / 'index.html').read_text()
  assert page.count('<img') == 2
  assert f'{found["fid"]:.4g}' in page and 'held_out' in page


# Holds the lock of a directory until its input ends.
HOLDER = """
import sys
from mdm_jax.runtime import directory_lock
with directory_lock.holding(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_samples_of_two_evaluations_are_not_mixed(config, run, mesh, caplog):
  """The second measures all the same."""
  directory = run / 'eval' / '8_3'
  options = evaluation.Options(metrics=['prompt_accuracy'], num_samples=3)
  alone = evaluate(run, config, mesh, options)
  before = {each.name: each.read_bytes() for each in directory.iterdir()}
  with subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(directory)],
    cwd=commands.ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as other:
    assert other.stdout.readline() == 'held\n'
    options = dataclasses.replace(options, seed=99)
    found = evaluate(run, config, mesh, options)
    other.stdin.close()
  assert f'{directory} is in use: process {other.pid} on' in caplog.text
  assert caplog.text.count('This evaluation writes no samples.') == 1
  assert found.metrics.keys() == alone.metrics.keys()
  assert found.settings['seed'] == 99
  after = {each.name: each.read_bytes() for each in directory.iterdir()}
  assert after == before
  evaluate(run, config, mesh, options)
  lines = (directory / 'samples.jsonl').read_text().splitlines()
  assert [json.loads(line)['seed'] for line in lines] == [99, 100, 101]


def test_images_of_the_data_score_as_the_data(config):
  """Of their own captions, beside blurred ones."""
  stage = types.SimpleNamespace(config=config, resolutions=(8, 64))
  names = ('prompt_accuracy', 'edge_width')
  source = make_source(config, 'held_out', 64)
  rows = range(18)
  images = np.stack([source[row]['image'] for row in rows])
  stated = make_prompts(config, 18).statements
  of_shapes = OfShapes(stage, names, None)
  of_shapes.add(Samples(images[:10], rows[:10], [], stated[:10]))
  of_shapes.add(Samples(images[10:], rows[10:], [], stated[10:]))
  found, _ = of_shapes.result()
  assert found['edge_width'] == found['edge_width_of_data']
  assert found['edge_width'] == pytest.approx(0.8, abs=0.05)
  one = [len(each['objects']) == 1 for each in stated]
  assert found['accuracy_count'].count == 18
  assert found['accuracy_count_1_object'].count == sum(one)
  assert found['accuracy_count_2_objects'].count == 18 - sum(one) > 0
  assert found['accuracy_all'] > 0.9

  blurred = ndimage.gaussian_filter(images * 1.0, (0, 1, 1, 0))
  of_shapes = OfShapes(stage, names, None)
  of_shapes.add(Samples(blurred.astype(np.uint8), rows, [], stated))
  blurred, _ = of_shapes.result()
  assert blurred['edge_width_of_data'] == found['edge_width']
  assert 2.3 < blurred['edge_width'] < 3.2


def test_metrics_of_training(config, run, mesh, caplog):
  """By default they are the metrics that training measures at its end."""
  session = Session(run, config, mesh)
  found = Pipeline(session, session.restore()).evaluate().metrics
  assert "is not finished: this is stage 1/2 '8' at step 3 of 20" in (
    caplog.text
  )
  model = session.restore()
  measured = validation.validate(model.stage, mesh, model.params)
  assert {name: found[name] for name in measured} == pytest.approx(
    measured, rel=1e-5
  )
  assert measured.keys() >= {'held_out_loss_8', 'accuracy_all'}
  for name, count in (('held_out_loss_8', 18), ('accuracy_all', 5)):
    assert measured[name].count == found[name].count == count
  assert measured['accuracy_all'].standard_error == pytest.approx(
    found['accuracy_all'].standard_error, rel=1e-4
  )
  # 32 rows of 18 images.
  assert measured['held_out_loss_8'].standard_error is None
  rows = np.array([[[3.0], [4.0]], [[2.0], [2.0]], [[5.0], [8.0]]])
  for count, error in ((3, None), (4, True)):
    one, _ = validation.mean_losses([rows, rows], count)
    assert (one.standard_error is not None) == bool(error)
    assert one == 1.5 and one.count == count
  table = found['losses_by_noise']
  count = np.array(table['examples'])
  assert count.sum() == 2 * config.stages[0].batch_size
  losses = [loss or 0 for loss in table['held_out_loss_8']]
  assert count @ losses / count.sum() == pytest.approx(found['held_out_loss_8'])


def test_reference_is_read_once(config, run, mesh, tmp_path):
  def judge(config=config, **changes):
    before = Colors.seen
    options = evaluation.Options(
      **{
        'metrics': ['fid'],
        'num_samples': 9,
        'num_reference': 11,
        'inception': 'inception.pth',
        'cache': tmp_path,
        **changes,
      }
    )
    value = evaluate(run, config, mesh, options).metrics['fid']
    return value, Colors.seen - before

  first, count = judge()
  assert count == 9 + 11
  assert judge() == (first, 9)
  assert judge(num_reference=12)[1] == 9 + 12
  other, count = judge(reference_split='train')
  assert count == 9 + 11 and other != first
  # Scenes of training are others.
  other = config.copy_and_resolve_references()
  other.data.two_objects = 0.9
  assert judge(other)[1] == 9
  assert judge(other, reference_split='train')[1] == 9 + 11


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'metrics': ['frechet']}, '--num_samples=1: frechet needs 2 images or'),
    ({'metrics': ['kid']}, '--num_samples=1: kid needs 2 images or more'),
    (
      {'metrics': ['precision_recall'], 'num_samples': 3},
      '--num_samples=3: precision_recall needs 4 images or more',
    ),
    (
      {'metrics': ['fid'], 'num_samples': 9, 'num_reference': 1},
      '--num_reference=1: fid needs 2 images or more',
    ),
    ({'metrics': ['loss'], 'seed': 2**32}, '--seed=4294967296 with 1 samples'),
    ({'metrics': ['loss'], 'resolution': 8}, '--resolution is that of images'),
  ],
)
def test_what_is_refused_is_refused_before_training(
  config, run, mesh, monkeypatch, changes, message
):
  monkeypatch.delattr(shapes_features, 'Features')  # It is said before.
  needs_inception = {*changes['metrics']} & {*evaluation.SET_METRICS}
  options = evaluation.Options(
    **{'num_samples': 1, **changes},
    inception='inception.pth' if needs_inception else None,
  )
  with pytest.raises(ValueError, match=message):
    evaluation.check_options(config, options)
  with pytest.raises(ValueError, match=message):
    evaluate(run, config, mesh, options)


def test_an_autoencoder_is_not_measured_by_samples(config):
  config, options = copy.deepcopy(config), evaluation.Options()
  evaluation.check_options(config, options)
  config.stages[-1].update(kind='autoencoder', num_levels=0)
  with pytest.raises(ValueError, match="stage '16' is an autoencoder, which"):
    evaluation.check_options(config, options)


def test_a_small_reference_is_named_before_sampling(
  config, run, mesh, tmp_path
):
  config = config.copy_and_resolve_references()
  config.data.size = 3
  options = evaluation.Options(
    metrics=['precision_recall'],
    num_samples=5,
    inception='inception.pth',
    cache=tmp_path,
  )
  evaluation.check_options(config, options)
  message = 'The reference has 3 images: precision_recall needs 4 images or'
  with pytest.raises(ValueError, match=message):
    evaluate(run, config, mesh, options)
  assert Colors.seen == 3


def test_warns_of_singular_covariances(caplog):
  rng = np.random.default_rng(0)
  six, seven = (
    statistics(rng.integers(0, 256, (n, 4, 4, 3), np.uint8)) for n in (6, 7)
  )
  sample_metrics.compare(['fid'], seven, seven)
  assert not caplog.text
  sample_metrics.compare(['fid'], seven, six)
  assert '7 images and 6: no more than its 6 features' in caplog.text


def test_kid_has_no_standard_error(monkeypatch):
  rng = np.random.default_rng(0)
  sets = [
    statistics(rng.integers(0, 256, (n, 4, 4, 3), np.uint8)) for n in (7, 9)
  ]
  monkeypatch.setitem(sample_metrics._SUBSETS, 'subset_size', 5)
  found, _ = sample_metrics.compare(['kid'], *sets)
  # Subsets share images, so that their deviation tells less.
  assert found['kid'].standard_error is None
  assert found['kid_standard_deviation'] > 0
  assert found['kid'].count == 7


def test_folders(tmp_path, mesh):
  rng = np.random.default_rng(0)
  for name, low in (('a', 0), ('b', 0), ('c', 99)):
    (tmp_path / name).mkdir()
    for i in range(9):
      Image.fromarray(rng.integers(low, 256, (5, 4, 3), np.uint8)).save(
        tmp_path / name / f'{i}.png'
      )

  def judge(images, reference):
    options = evaluation.Options(
      inception='inception.pth',
      reference=str(tmp_path / reference),
      cache=tmp_path / 'cache',
    )
    return evaluation.evaluate_folder(str(tmp_path / images), options, 4, mesh)

  itself, near, far = (judge('a', name) for name in 'abc')
  assert itself.metrics['fid'] == pytest.approx(0, abs=1e-6)
  assert 0.01 < near.metrics['fid'] < 0.3 * far.metrics['fid']
  assert near.metrics['kid'] < far.metrics['kid']
  assert itself.metrics['precision'] == itself.metrics['recall'] == 1
  assert near.settings['num_reference'] == 9
  assert (
    near.settings['reference']['files'] != (near.settings['images']['files'])
  )


def test_samples_are_compared_with_photographs(tmp_path, mesh):
  """Of other sizes, as the captions of COCO are sampled."""
  rng = np.random.default_rng(0)
  photographs = tmp_path / 'photographs'
  (photographs / 'more').mkdir(parents=True)
  records = [{'prompt': 'a', 'seed': i} for i in range(7)]
  samples = SampleDirectory(tmp_path / 'samples', records)
  for i in range(7):
    pixels = rng.integers(0, 256, (12, 9 + i, 3), np.uint8).repeat(5, 0)
    name = f'more/{i}.png' if i % 2 else f'{i}.png'
    Image.fromarray(pixels).save(photographs / name)
    levels = [decode_image((photographs / name).read_bytes(), 8)[0]] * 2
    samples.add(i, [levels[0][::2, ::2], levels[1]])
  samples.finish({})
  options = evaluation.Options(
    metrics=['fid', 'kid'],
    inception='inception.pth',
    reference=str(photographs),
    cache=tmp_path / 'cache',
  )
  with pytest.raises(ValueError, match='give images of one size, or --resol'):
    evaluation.evaluate_folder(str(tmp_path / 'samples'), options, 4, mesh)
  options = dataclasses.replace(options, resolution=8)
  for _ in range(2):  # The second reads the cache.
    found = evaluation.evaluate_folder(
      str(tmp_path / 'samples'), options, 4, mesh
    )
    # They are the same images.
    assert found.metrics['fid'] == pytest.approx(0, abs=1e-6)
  assert found.settings['num_samples'] == found.settings['num_reference'] == 7
  assert found.settings['reference']['resolution'] == 8
  assert found.settings['images']['resolution'] == 8
  # At another resolution they are others, and are read again.
  seen = Colors.seen
  options = dataclasses.replace(options, resolution=6)
  evaluation.evaluate_folder(str(tmp_path / 'samples'), options, 4, mesh)
  assert Colors.seen == seen + 14


@pytest.mark.parametrize(
  'options, message',
  [
    ({'metrics': ['loss', 'fidd']}, '--metrics=fidd: here they are some of'),
    ({'metrics': ['kid']}, '--metrics=kid needs --inception=FILE'),
    ({'metrics': ['clip']}, '--metrics=clip needs --clip=DIR'),
    ({'metrics': ['fid'], 'inception': 'missing.pth'}, 'missing.pth'),
    (
      {'metrics': ['fid'], 'inception': 'x', 'reference_split': 'test'},
      "split 'test': choose one of",
    ),
    (
      {'metrics': ['fid'], 'inception': 'x', 'resolution': 8},
      '--resolution is that of images in directories: give --reference too',
    ),
    (
      {'metrics': ['fid'], 'inception': 'x', 'reference': 'nowhere'},
      'nowhere has no images',
    ),
    ({'reference': 'x'}, '--reference is for the metrics fid, kid, precision_'),
    ({'metrics': ['loss'], 'clip': 'x'}, '--clip is for the metrics clip: add'),
  ],
)
def test_wrong_options(config, run, mesh, options, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    evaluate(run, config, mesh, evaluation.Options(**options))


def test_labels_have_no_accuracy_and_need_names_for_clip(
  config, run, mesh, clip_directory
):
  config = config.copy_and_resolve_references()
  config.text.update(encoder='label', num_classes=8)
  for name in ('prompt_accuracy', 'edge_width', 'frechet'):
    with pytest.raises(ValueError, match=f'--metrics={name}: here'):
      evaluate(run, config, mesh, evaluation.Options(metrics=[name]))
  with pytest.raises(ValueError, match='needs words, but text.class_names'):
    options = evaluation.Options(metrics=['clip'], clip=clip_directory.path)
    evaluate(run, config, mesh, options)


def test_command(run):
  """Adds a line to the existing file, with the settings that were used."""
  path = run / 'eval' / '8_3.jsonl'
  path.parent.mkdir(exist_ok=True)
  path.write_text('{}\n')
  result = commands.run(
    'mdm_jax.evaluate',
    f'--workdir={run}',
    '--num_samples=3',
    '--steps=2',
    '--seed=5',
    '--sampler=dpm',
    '--loss_batches=1',
    env=commands.on_devices(1),
    real=True,
  )
  assert not result.returncode, result.stderr
  assert 'held_out_loss_8' in result.stderr
  _, line = map(json.loads, path.read_text().splitlines())
  assert {'accuracy_all', 'held_out_loss_8'} < line['metrics'].keys()
  settings = line['settings']
  assert settings['sampler']['name'] == 'dpm'
  assert settings['sampler']['num_steps'] == 2
  assert (settings['num_samples'], settings['seed']) == (3, 5)
  assert settings['loss']['batches'] == 1


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'give either --workdir, or --images and --reference'),
    (['--workdir=nowhere'], '--workdir=nowhere: there is no such directory'),
    (['--workdir=docs'], 'docs/config.json does not exist'),
    (['--images=docs', '--reference=docs', '--metrics=fid'], 'inception'),
    (
      ['--images=docs', '--reference=docs', '--num_samples=5'],
      '--num_samples does nothing with --images',
    ),
    (
      ['--workdir=docs', '--reference=docs', '--num_reference=5'],
      '--num_reference does nothing with --reference',
    ),
  ],
)
def test_command_ends_in_one_line(arguments, message):
  result = commands.run('mdm_jax.evaluate', *arguments)
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith('error: ')
  assert message in result.stderr.splitlines()[-1]
  assert 'Traceback' not in result.stderr
