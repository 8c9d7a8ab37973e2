"""`mdm_jax.load`: samples are those of the command, and are compiled once."""

import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import mdm_jax
from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import make_stage
from mdm_jax.inference import pipeline, validation
from mdm_jax.runtime import directory_lock
from mdm_jax.steps import sample as steps_sample
from tests import commands, toy

PROMPTS = ['a red ring on navy', 'two green stars']


@pytest.fixture(scope='module')
def workdir(make_config, random_params, tmp_path_factory):
  """Of a run that has ended."""
  config = make_config()
  config.eval.update(num_prompts=8, loss_batches=1, batch_size=16)
  config.sampler.guidance = 2.0
  workdir = tmp_path_factory.mktemp('run')
  for index in range(2):
    model = make_model(config, config.stages[index])
    params = random_params(model, config.text.max_length)
    toy.save_run(workdir, config, index, config.stages[index].steps, params)
  return str(workdir)


@pytest.fixture(scope='module')
def model(workdir):
  return mdm_jax.load(workdir)


def test_an_image_is_that_of_the_command(model, workdir, tmp_path):
  samples = model.sample(
    PROMPTS, num_samples=2, seed=3, steps=2, negative_prompt='a blue star'
  )
  result = commands.run(
    'mdm_jax.sample',
    f'--workdir={workdir}',
    *(f'--prompt={prompt}' for prompt in PROMPTS),
    '--num_samples=2',
    '--seed=3',
    '--steps=2',
    '--negative_prompt=a blue star',
    f'--output={tmp_path}',
  )
  assert result.returncode == 0, result.stderr
  for i, line in enumerate((tmp_path / 'samples.jsonl').open()):
    record = json.loads(line)
    assert record['prompt'] == samples.prompts[i] == PROMPTS[i // 2]
    assert record['seed'] == samples.seeds[i] == 3 + i
    for level, side in zip(samples.levels, (8, 16)):
      with Image.open(tmp_path / record['files'][str(side)]) as image:
        np.testing.assert_array_equal(image, level[i])
  assert i == 3
  # They depend on prompt and seed.
  assert len({level.tobytes() for level in samples.levels[-1]}) == 4


def test_a_batch_size_is_compiled_once(model, monkeypatch):
  """Of a jitted program; without the compilation, to be fast."""
  jitted, sizes = [], []

  def jit_sample(sampler, _, continues=False):
    if not continues:  # As no clip is.
      jitted.append(sampler.spec.num_steps)

    def program(params, text, negative, seeds):
      sizes.append(len(text))
      return tuple(np.zeros((len(text), r, r, 3), np.uint8) for r in (8, 16))

    return program

  monkeypatch.setattr(steps_sample, 'jit_sample', jit_sample)
  fresh = pipeline.Pipeline(model._session, model.model)
  fresh.sample('a red ring', num_samples=3)
  fresh.sample(PROMPTS, num_samples=4, guidance=2, seed=9)
  fresh.sample(PROMPTS, negative_prompt='a star', batch_size=1)
  fresh.evaluate('prompt_accuracy')
  assert (jitted, sizes) == ([3], [8] * 4)  # There are eight devices.
  assert len(fresh.sample('a red ring', num_samples=35)) == 35
  assert len(fresh.sample('a red ring', num_samples=9)) == 9
  assert (jitted, sizes[4:]) == ([3], [16] * 4)
  fresh.sample('a red ring', steps=2)
  fresh.sample('a red ring')
  assert jitted == [3, 2]


@pytest.mark.parametrize(
  'devices, count, most, expected',
  [
    (1, 1, 16, 1),
    (1, 3, 16, 4),
    (1, 99, 16, 16),
    (1, 20, 24, 24),
    (4, 1, 16, 4),
    (4, 5, 16, 8),
    (4, 5, 4, 4),
  ],
)
def test_few_batch_sizes(model, devices, count, most, expected):
  mesh = jax.make_mesh(
    (devices, 1, 1),
    ('data', 'fsdp', 'spatial'),
    devices=jax.devices()[:devices],
  )
  restored = dataclasses.replace(model.model, mesh=mesh)
  restored = restored.changed({}, {'batch_size': most})
  assert pipeline._batch_size(restored, count) == expected


def test_samples_are_pil_images(model):
  samples = model.sample(PROMPTS, steps=2)
  assert len(samples) == 2
  assert [image.size for image in samples] == [(16, 16)] * 2
  np.testing.assert_array_equal(samples[1], samples.levels[-1][1])
  assert samples[-1] == samples.images[1] == samples[1:][0]
  assert [level.shape for level in samples.levels] == [
    (2, 8, 8, 3),
    (2, 16, 16, 3),
  ]
  assert {level.dtype for level in samples.levels} == {np.dtype(np.uint8)}
  with Image.open(io.BytesIO(samples._repr_png_())) as shown:
    np.testing.assert_array_equal(shown, samples.grid())
  assert repr(samples) == '<2 samples at 8, 16 px>'
  assert repr(model.sample('a', steps=2)) == '<1 sample at 8, 16 px>'
  with pytest.raises(IndexError):
    samples[2]
  with pytest.raises(TypeError):
    samples[0, 1]


def test_an_earlier_stage(workdir, model, tmp_path):
  earlier = mdm_jax.load(workdir, stage='8')
  assert repr(earlier) == f"<model of {workdir}: stage 1/2 '8', step 20, EMA>"
  assert model.resolutions == (8, 16)
  assert earlier.resolutions == (8,)
  # Training has measured the last stage.
  (pathlib.Path(workdir) / 'eval').mkdir(exist_ok=True)
  path = pathlib.Path(workdir) / 'eval' / '20.json'
  path.write_text('{"held_out_loss_8": 1.0}')
  found = earlier.evaluate('loss', output=tmp_path / 'a.jsonl')
  assert 'settings: stage: 16 -> 8' in str(found)
  path.unlink()


def test_evaluations_are_added_and_compared(model):
  first = model.evaluate('prompt_accuracy', steps=2)
  assert model.config.sampler.num_steps == 3
  second = model.evaluate(
    ['prompt_accuracy', 'loss'], steps=2, num_samples=5, seed=1
  )
  assert second.earlier[0].metrics == first.values
  assert 'settings: num_samples: 8 -> 5, seed: 16 -> 1' in str(second)
  *_, line = map(json.loads, model.evaluations.open())
  assert line['metrics'] == second.metrics
  assert line['n']['accuracy_all'] == 5
  assert line['standard_errors']['held_out_loss_16'] > 0


def test_earlier_losses_of_training_images_have_their_name(
  make_config, tmp_path
):
  """Once they were called held-out losses, also without a validation split."""
  config = make_config()
  config.data.update(name='tfds:x', validation_split='')
  (tmp_path / 'eval').mkdir()
  (tmp_path / 'eval' / '20.json').write_text('{"held_out_loss_8": 0.5}')
  (earlier,) = validation.find_earlier(make_stage(config, 1), tmp_path)
  assert earlier.metrics == {'train_split_loss_8': 0.5}


def test_a_run_that_can_only_be_read_is_evaluated(model, tmp_path, monkeypatch):
  def refuse(path):
    raise directory_lock.NotWritable(f'{path} cannot be written to.')

  with monkeypatch.context() as patch:
    patch.setattr(directory_lock, 'holding', refuse)
    found = model.evaluate(
      'prompt_accuracy', steps=2, output=tmp_path / 'a.jsonl'
    )
  (line,) = map(json.loads, (tmp_path / 'a.jsonl').open())
  assert line['metrics'] == found.metrics


def test_the_metrics_of_a_broken_model_are_read_back(model, tmp_path):
  stage = model.model.stage
  values = dict.fromkeys(stage.measured, float('nan'))
  validation.write_metrics(stage, str(tmp_path), values)
  assert 'NaN' not in (tmp_path / 'eval' / '20.json').read_text()
  found = validation.read_metrics(stage, str(tmp_path))
  assert found.keys() == values.keys() and np.isnan([*found.values()]).all()


def test_the_table_at_the_end_of_training(model, tmp_path, caplog):
  """That of `evaluate`, here of what has been measured already."""
  values = {
    'held_out_loss_8': 0.5,
    'held_out_loss_16': 0.25,
    'accuracy_shape': 0.1,
  }
  (tmp_path / 'eval').mkdir()
  (tmp_path / 'eval' / '20.json').write_text(json.dumps(values))
  stage, mesh = model.model.stage, model.model.mesh
  with caplog.at_level('INFO', logger='absl'):
    assert validation.validate_last(stage, str(tmp_path), mesh, {}) == values
  assert (
    'Metrics of stage 16 at step 20 (EMA); losses of 16 held_out images; '
    '8 samples of held_out prompts:\nmetric'
  ) in caplog.text
  assert re.search(r'accuracy_shape +10.0 % .*\(at chance\)', caplog.text)


@pytest.mark.parametrize(
  'prompts, options, message',
  [
    ([], {}, 'nothing to sample: give a prompt.'),
    ('a', {'steps': 0}, 'sampler.num_steps=0: give an integer from 1'),
    ('a', {'sampler': 'dmp'}, "sampler.name='dmp': use one of ddim, "),
    ('a', {'guidance': 'x'}, "sampler.guidance='x': give a number"),
    ('a', {'batch_size': 0}, 'eval.batch_size=0: give an integer from 1'),
    ('a', {'num_samples': 0}, 'num_samples=0: give an integer from 1'),
    ('a', {'seed': -1}, 'seed=-1: give an integer from 0'),
    ('a', {'seed': [1, 2]}, 'seed has 2 values: give one, or one for each of'),
    ('a', {'seed': [-1]}, 'seed=-1: give an integer from 0'),
    ([1], {}, "prompts=1: give a text (also of a class, such as '207')."),
    (None, {}, 'prompts=None: give a text'),
    (b'a', {}, "prompts=b'a': give a text"),
    ('a', {'guide': 5}, 'guide=5: give the path of a directory'),
    ('a', {'guide': 'b', 'negative_prompt': 'c'}, 'leads away from one thing'),
    ('a', {'guide': 'nowhere'}, "guide='nowhere': there is no such directory"),
  ],
)
def test_wrong_options(model, prompts, options, message):
  with pytest.raises(ValueError) as raised:
    model.sample(prompts, **options)
  assert message in str(raised.value)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'num_samples': 0}, 'num_samples=0: give an integer from 1'),
    ({'seed': -1}, 'seed=-1: give an integer from 0'),
    ({'metrics': 'fidd'}, "metrics=['fidd']: use one of loss"),
    ({'metrics': 5}, 'metrics=5: give a list'),
    ({'metrics': []}, 'metrics is empty: give some of loss,'),
    ({'metrics': 'fid', 'inception': '~/no'}, "='~/no': there is no such file"),
    (
      {'reference': '.', 'num_reference': 'x'},
      "num_reference='x': give an int",
    ),
    ({'output': '.'}, "output='.': this is a directory"),
    ({'loss_batches': 0}, 'eval.loss_batches=0: give an integer from 1'),
  ],
)
def test_wrong_options_of_an_evaluation(model, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    model.evaluate(**options)


def test_too_little_memory(model, monkeypatch):
  def fail(*args):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no memory')
    yield

  monkeypatch.setattr(model, '_program', lambda *args: fail)
  with pytest.raises(ValueError, match='for 8 images at once: give a smaller'):
    model.sample('a')


def test_numbers_of_numpy(model):
  request = model.request(
    np.array(['a', 'b']),
    num_samples=np.int64(2),
    seed=np.uint32(2**32 - 4),
    steps=np.int32(2),
    guidance=np.float32(1.5),
    batch_size=np.int64(8),
  )
  assert request.seeds == [*range(2**32 - 4, 2**32)]
  seeds = model.request(PROMPTS, num_samples=2, seed=np.array([9, 5])).seeds
  assert seeds == [9, 10, 5, 6]
  settings = json.loads(json.dumps(request.settings))
  assert (settings['num_steps'], settings['guidance']) == (2, 1.5)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'stage': 16}, "has no stage 16: give one of '8', '16'."),
    ({'spatial': 0}, 'spatial=0: give'),
    ({'spatial': '2'}, "spatial='2': give an integer"),
    ({'sigma_rel': 'x'}, "sigma_rel='x': give a number"),
  ],
)
def test_wrong_options_of_load(workdir, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    mdm_jax.load(workdir, **options)


def test_no_run(tmp_path):
  with pytest.raises(ValueError, match='workdir=None: give the path of'):
    mdm_jax.load(None)
  with pytest.raises(ValueError, match='nothing.: there is no such directory'):
    mdm_jax.load(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match='directory of a training run'):
    mdm_jax.load(tmp_path)


def test_the_page_of_the_docs(workdir, tmp_path, monkeypatch):
  """Its code runs, on a model that is smaller."""
  page = (commands.ROOT / 'docs' / 'python.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', page, re.S)
  first, cache, parts = blocks
  assert 'compilation_cache.enable()' in cache
  for old, new in (
    ("'runs/shapes_64'", repr(workdir)),
    ('num_samples=64', 'num_samples=8, steps=2'),
    ("'a.png'", repr(str(tmp_path / 'a.png'))),
    ('seed=1)', 'seed=1, steps=2)'),
  ):
    assert old in first
    first, parts = first.replace(old, new), parts.replace(old, new)
  shown = []
  monkeypatch.setattr(Image.Image, 'show', lambda image: shown.append(image))
  space = {}
  exec(first + parts, space)
  assert shown == [space['samples'][0]]
  assert 0 <= space['found'].metrics['accuracy_all'] <= 1
  assert space['batch']['image'].dtype == np.uint8
  assert [x.shape for x in space['predictions']] == [
    (1, 8, 8, 3),
    (1, 16, 16, 3),
  ]
  assert [len(levels) for levels in space['steps']] == [2, 2]
  with Image.open(tmp_path / 'a.png') as image:
    assert image.width > 100


def test_importing_the_package_imports_nothing():
  code = 'import sys, mdm_jax; print([*{"jax", "numpy"} & {*sys.modules}])'
  found = subprocess.run(
    [sys.executable, '-c', code],
    cwd=commands.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert found.stdout.strip() == '[]'
