"""Every path that a command takes may be in a bucket, or is refused at once.

`TRIED` says for each flag, key and argument which function tries it. What is
not in it fails the first tests.
"""

import importlib.util
import inspect
import io
import json
import pathlib
import re
import shutil
import sys
import tarfile
import types
from unittest import mock
import xml.etree.ElementTree

from etils import epath
import gcsfs.retry
import jax
import numpy as np
from PIL import Image
import pytest

import mdm_jax
from mdm_jax.builders import ranges
from mdm_jax.builders.data import make_image_source
from mdm_jax.builders.model import make_model
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.inference import references, session, weights
from mdm_jax.interop import hugging_face, ml_mdm, torch_checkpoint
from mdm_jax.runtime import buckets, files, google_storage, value_types
from mdm_jax.serving import access
from mdm_jax.serving.model_card import make_model_card
from mdm_jax.tools import compare_samplers, compile_ahead
from tests import commands, toy
from tests.tools import test_emoji_tars
from tests.tools.test_prepare_clips import video, write_videos

ROOT = pathlib.Path(__file__).parents[1]
PROMPT = 'a red ring on navy'
_SMALL = ('--num_samples=2', '--steps=1', '--batch_size=8')


class Tries:
  """Runs commands, and notes which of their flags were in a bucket."""

  def __init__(self, bucket):
    self.path, self.files = bucket.path, bucket.files
    self.noted = set()

  def note(self, command, *names):
    """For what is tried by a function of this package instead."""
    self.noted |= {(command, name) for name in names}

  def __call__(self, command, *words, code=0, env=None, **paths):
    """Runs a command; flags that are given by name are paths."""
    for name, path in paths.items():
      assert path.startswith('gs://')
      self.note(command, name.removeprefix('config__').replace('__', '.'))
    given = [
      f'--{name.replace("__", ".")}={path}' for name, path in paths.items()
    ]
    env = commands.on_devices(1) | (env or {})
    result = commands.run(f'mdm_jax.{command}', *given, *words, env=env)
    assert result.returncode == code, result.stderr
    # What Python's own functions make of such a path.
    made = ROOT / 'gs:'
    if made.exists():
      shutil.rmtree(made)
      pytest.fail(f'{command} has written to a local directory gs:')
    return result

  def read(self, name):
    return self.files()[name]

  def upload(self, **contents):
    """Puts files at `path`; returns their paths."""
    found = {}
    for name, content in contents.items():
      found[name] = f'{self.path}/{name}'
      epath.Path(found[name]).write_bytes(content)
    return found


def upload(bucket, directory, name):
  """Copies a directory; returns its path in the bucket."""
  system, target = bucket.past_the_proxy, f'{bucket.name}/{name}'
  for file in pathlib.Path(directory).rglob('*'):
    if file.is_file():
      system.put_file(str(file), f'{target}/{file.relative_to(directory)}')
  return f'gs://{target}'


@pytest.fixture(scope='module')
def local_run(make_config, random_params, tmp_path_factory):
  """A finished run on shapes, of one stage, on the disk."""
  config = make_config()
  config.stages, config.model.levels = (
    config.stages[:1],
    config.model.levels[:1],
  )
  config.data.size = 32
  config.eval.update(num_prompts=8, loss_batches=1)
  workdir = tmp_path_factory.mktemp('run')
  (stage,) = config.stages
  params = random_params(make_model(config, stage), config.text.max_length)
  toy.save_run(workdir, config, 0, stage.steps, params)
  return workdir


@pytest.fixture(scope='module')
def run(bucket_server, local_run):
  """The same run, in the bucket."""
  return upload(bucket_server, local_run, 'run')


def images(folder, count):
  """Writes small images with captions."""
  folder.mkdir()
  for i in range(count):
    image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(folder / f'{i}.png')
    (folder / f'{i}.txt').write_text(f'{PROMPT} {i}')
  return folder


def try_sample(tries, run):
  given = tries.upload(prompts_file=b'a green star\n')
  output = f'{tries.path}/out'
  flags = {'workdir': run, 'output': output, 'guide': run, **given}
  result = tries('sample', *_SMALL, **flags)
  assert 'Sampled 2 images in ' in result.stderr
  assert f'{output}/index.html' in result.stderr
  found = tries.files()
  lines = [x for name, x in found.items() if name.startswith('out/samples')]
  records = list(map(json.loads, b''.join(lines).splitlines()))
  assert {record['prompt'] for record in records} == {'a green star'}
  for record in records:
    name = f'out/{record["files"]["8"]}'
    assert Image.open(io.BytesIO(found[name])).size == (8, 8)
  assert found['out/grid.png'] and b'a green star' in found['out/index.html']
  again = tries('sample', *_SMALL, **flags)
  assert '2 of 2 samples exist already.' in again.stderr


def try_evaluate(tries, run, bucket, clip_directory):
  # In the run's own directory, where the next one finds it.
  tries('evaluate', '--metrics=loss', workdir=run)
  output = f'{tries.path}/found.jsonl'
  clip = upload(bucket, clip_directory.path, 'clip')
  flags = {'workdir': run, 'clip': clip, 'output': output}
  result = tries('evaluate', *_SMALL, '--metrics=loss,clip', **flags)
  assert f'Added to {output}.' in result.stderr
  assert 'before (held_out_loss_8): step 20' in result.stderr
  (line,) = files.read_json_lines(output)
  assert line['settings']['workdir'] == run
  assert np.isfinite(line['metrics']['clip_score'])
  (epath.Path(run) / 'eval').rmtree()


def try_folders(tries, bucket, inception_weights, tmp_path):
  torch_checkpoint.write_state_dict(tmp_path / 'i.pth', inception_weights)
  bucket.past_the_proxy.put_file(str(tmp_path / 'i.pth'), 'tests/i.pth')
  folder = upload(bucket, images(tmp_path / 'a', 4), 'images')
  flags = {
    'images': folder,
    'reference': folder,
    'inception': 'gs://tests/i.pth',
    'cache': f'{tries.path}/cache',
    'output': f'{tries.path}/found.jsonl',
  }
  tries('evaluate', '--metrics=precision_recall', '--batch_size=8', **flags)
  tries.note('evaluate', 'i3d')  # Read by the same lines as --inception.
  (line,) = files.read_json_lines(flags['output'])
  assert line['metrics'] == {'precision': 1, 'recall': 1}
  (name,) = [name for name in tries.files() if name.startswith('cache/')]
  folder = epath.Path(flags['cache'])
  with files.local_copy(folder / name.removeprefix('cache/')) as copy:
    fingerprint = str(np.load(copy)['fingerprint'])
  found = references.cached(folder, json.loads(fingerprint), pytest.fail)
  assert found.statistics.count == 4


def try_load(tries, run):
  model = mdm_jax.load(run)
  tries.note('load', 'workdir')
  samples = model.sample(PROMPT, steps=1, guide=run, guidance=2.0)
  assert samples[0].size == (8, 8)
  tries.note('load', 'guide')
  model.evaluate(['loss'], output=epath.Path(tries.path) / 'e.jsonl')
  assert len(files.read_json_lines(f'{tries.path}/e.jsonl')) == 1
  tries.note('load', 'output')


def try_moved(
  tries, make_config, random_params, bucket, t5_directory, tmp_path
):
  # A run on T5, whose files are elsewhere now.
  config = make_config()
  config.stages, config.model.levels = (
    config.stages[:1],
    config.model.levels[:1],
  )
  config.text.update(encoder='t5', path=str(t5_directory.path))
  (stage,) = config.stages
  params = random_params(make_model(config, stage), config.text.max_length)
  config.text.update(path='/gone', tokenizer='/gone.model')
  toy.save_run(tmp_path / 'run', config, 0, stage.steps, params)
  tokenizer = pathlib.Path(CAPTIONS_MODEL).read_bytes()
  moved = tries.upload(tokenizer=tokenizer) | {
    'text_path': upload(bucket, t5_directory.path, 't5'),
    'data_path': tries.path,
  }
  with pytest.raises(ValueError, match='--text_path=DIR'):
    mdm_jax.load(tmp_path / 'run')
  model = mdm_jax.load(tmp_path / 'run', **moved)
  sampled = model.sample(PROMPT, steps=1, guide=tmp_path / 'run', guidance=2.0)
  assert sampled[0].size == (8, 8)
  for command, flags in TRIED.items():
    tries.note(command, *(name for name in flags if name in moved))


def try_demo(tries, run):
  given = tries.upload(password_file=b'ann:short\n')
  result = tries('demo', workdir=run, code=1, **given)
  path = given['password_file']
  assert result.stderr.startswith(f'error: {path}, line 1: write NAME:PASSWORD')
  epath.Path(path).write_text('ann:long enough\n')
  assert access.read_passwords(path) == [('ann', 'long enough')]
  # The rest of it needs Gradio.
  opened = session.open_run(run, any_prompt=True)
  (saved, *_) = weights.saved_weights(opened.config, opened.workdir)
  model = opened.of(saved).restore()
  assert make_model_card(model).summary.startswith('It draws')


def try_weights(tries, run, bucket, t5_directory, random_params):
  """Imports weights, and exports them again."""
  t5 = upload(bucket, t5_directory.path, 't5')
  recipe = toy.recipe(1, 1, text__encoder='t5', text__path=t5)
  exec(recipe, found := {})
  config = found['get_config']()
  model = make_model(config, config.stages[0])
  params = random_params(model, config.text.max_length)['unet']
  tensors = ml_mdm.to_release(params, model.unet.levels)
  given = tries.upload(config=recipe.encode())
  with files.replacing(f'{tries.path}/a.pth') as path:
    torch_checkpoint.write_state_dict(path, tensors)
  given['checkpoint'] = f'{tries.path}/a.pth'
  workdir, output = f'{tries.path}/imported', f'{tries.path}/b.pth'
  tries('tools.import_ml_mdm', workdir=workdir, **given)
  _, imported = session.read_weights(workdir)
  jax.tree.map(np.testing.assert_array_equal, imported.params['unet'], params)
  tries(
    'tools.export_weights', '--names=release', workdir=workdir, output=output
  )
  with files.local_copy(output) as copy:
    opened = hugging_face.open_tensors(copy)
    exported = hugging_face.select(opened, ml_mdm.NAMES)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(exported[name][...], tensor)


def try_train_tokenizer(tries):
  captions = ''.join(f'a {word} ring\n' for word in 'abcdefgh').encode()
  given = tries.upload(captions=captions)
  output = f'{tries.path}/a.model'
  tries('tools.train_tokenizer', '--vocab_size=300', output=output, **given)
  assert 1 in Tokenizer(output, 8).encode('a ring')


def try_emoji(tries):
  given = tries.upload(
    emojibase=test_emoji_tars.emojibase(),
    fluent=test_emoji_tars.fluent(),
    noto=b'no font',
  )
  output = f'{tries.path}/emoji'
  result = tries('tools.emoji_tars', output=output, code=1, **given)
  assert 'is not NotoColorEmoji.ttf' in result.stderr
  del given['noto']
  tries('tools.emoji_tars', output=output, **given)
  assert 'emoji/train-00000.tar' in tries.files()
  del given['fluent']
  given |= tries.upload(animated=test_emoji_tars.animated())
  output = f'{tries.path}/animated_emoji'
  tries('tools.emoji_tars', output=output, **given)
  assert 'animated_emoji/train-00000.tar' in tries.files()


def try_compare(tries, run, monkeypatch):
  output = f'{tries.path}/a.png'
  flags = ('--num_images=2', '--steps=1', '--batch_size=8')
  tries('tools.compare_with_data', *flags, workdir=run, output=output)
  assert tries.files()['a.png'].startswith(b'\x89PNG')
  labels = [
    json.dumps({'key': f'{split}/{i}', 'kind': split})
    for split in ('train', 'held_out')
    for i in range(8)
  ]
  given = tries.upload(labels='\n'.join(labels).encode())
  tries(
    'tools.nearest_images',
    *(*flags, '--num_samples=2', '--num_training=8', '--classifier_steps=1'),
    workdir=run,
    output=f'{tries.path}/b.png',
    **given,
  )
  output = f'{tries.path}/results.json'
  flags = (
    *('--samplers=ddim', '--steps=1', '--num_images=8'),
    *('--classifier_images=16', '--classifier_steps=1'),
  )
  tries('tools.compare_samplers', *flags, workdir=run, output=output)
  (found,) = json.loads(tries.files()['results.json'])
  assert found['sampler'] == 'ddim' and 0 <= found['accuracy'] <= 1
  # Without Matplotlib, which the tests do not install.
  figure, axes = mock.MagicMock(), [mock.MagicMock(), mock.MagicMock()]
  figure.savefig = lambda path, format: path.write_text(format)
  library = mock.MagicMock()
  library.pyplot.subplots.return_value = figure, axes
  monkeypatch.setitem(sys.modules, 'matplotlib', library)
  compare_samplers._plot([found], f'{tries.path}/plot.svg')
  assert tries.files()['plot.svg'] == b'svg'
  tries.note('tools.compare_samplers', 'plot')


def try_sweep(tries, run):
  given = tries.upload(config=toy.recipe(1, 1).encode())
  output = f'{tries.path}/sweep'
  flags = ('--grid=seed=1', '--metric=nonsense')
  result = tries('tools.sweep', *flags, output=output, code=1, **given)
  assert '--metric=nonsense: there are held_out_loss_8' in result.stderr
  flags = (
    *('--grid=sampler.guidance=1,2', '--metric=accuracy_all'),
    *('--num_samples=2', '--batch_size=8'),
  )
  tries('tools.sweep', *flags, workdir=run, output=output)
  found = files.read_json_lines(f'{output}/results.jsonl')
  assert {line['run'] for line in found} == {
    'sampler.guidance=1.0',
    'sampler.guidance=2.0',
  }
  assert b'| sampler.guidance |' in tries.files()['sweep/table.md']
  again = tries('tools.sweep', *flags, workdir=run, output=output)
  assert 'Evaluation' not in again.stderr
  # The functions of mdm_jax.evaluate read these, and compare_samplers plots.
  names = 'clip', 'inception', 'i3d', 'reference', 'cache', 'plot'
  tries.note('tools.sweep', *names)


def try_compare_models(tries):
  given = tries.upload(one=toy.recipe(1, 1).encode())
  output = f'{tries.path}/comparison'
  flags = (
    *(f'--recipe={name}={given["one"]}' for name in 'ab'),
    *('--budgets=0.1', '--metrics=loss'),
  )
  result = tries('tools.compare_models', *flags, output=output, code=1)
  assert "stage '8' would have 0.1 steps" in result.stderr
  costs = json.loads(tries.files()['comparison/costs.json'])
  assert costs['a'] == costs['b'] and costs['a']['flops']['8'] > 0
  # The same functions as of tools.sweep read and write these.
  names = 'clip', 'inception', 'i3d', 'reference', 'cache', 'plot'
  tries.note('tools.compare_models', *names)


def try_bench(tries):
  given = tries.upload(config=toy.recipe(1, 1).encode())
  flags = ('--batch_size=8', '--steps=1', '--only=train')
  output, profile = f'{tries.path}/a.json', f'{tries.path}/trace'
  given |= tries.upload(compare=b'{"train": {}}')
  result = tries('tools.bench', *flags, output=output, profile=profile, **given)
  assert 'ratio' in result.stdout
  found = json.loads(tries.files()['a.json'])
  assert found['config'] == given['config']
  assert found['train']['operations'][0]['share'] > 0
  names = ' '.join(tries.files())
  assert re.search(r'trace/train/\S+/perfetto_trace.json.gz', names)


def try_plan(tries):
  given = tries.upload(config=toy.recipe(1, 1).encode())
  cache = f'{tries.path}/cache'
  result = tries(
    'tools.plan', '--topology=v9:1x1', cache=cache, code=1, **given
  )
  assert 'error: ' in result.stderr and 'Traceback' not in result.stderr
  # The rest of it needs TPU's compiler.
  answers = iter([{'a': 1}])
  for _ in range(2):
    found = compile_ahead.cached(
      epath.Path(cache), ['question'], lambda: next(answers)
    )
    assert found == {'a': 1}
  assert len(tries.files()) == 2


def write_tar(folder, count):
  """Small images with captions; returns the bytes of a tar."""
  images(folder, count)
  with tarfile.open(tar := folder.with_suffix('.tar'), 'w') as file:
    for path in sorted(folder.iterdir()):
      file.add(path, path.name)
  return tar.read_bytes()


def try_training(tries, bucket, t5_directory, tmp_path):
  """Indexes tars, precomputes text, trains on both."""
  tar = tries.upload(**{'a.tar': write_tar(tmp_path / 'tar', 16)})['a.tar']
  index = f'{tries.path}/index'
  flags = ('--validation_fraction=0.5',)
  tries(
    'tools.index_tars', *flags, input=tar.replace('a.tar', '*'), output=index
  )
  assert 'index/index.json' in tries.files()
  t5 = upload(bucket, t5_directory.path, 't5')
  recipe = toy.recipe(
    1, 1, data__name='tars', text__encoder='t5', text__max_length=16
  )
  given = tries.upload(config=recipe.encode())
  data = {'config__data__path': index, 'config__text__path': t5}
  tokenizer = upload(bucket, pathlib.Path(CAPTIONS_MODEL).parent, 'data')
  data['config__text__tokenizer'] = f'{tokenizer}/captions.model'
  tries('tools.precompute_text', **given, **data)
  assert 'index/text/empty.npy' in tries.files()
  workdir = f'{tries.path}/run'
  tries(
    'main',
    '--config.text.encoder=precomputed',
    workdir=workdir,
    **given,
    **data,
  )
  names = ' '.join(tries.files())
  assert 'run/config.json' in names
  for name in ('metrics', 'goodput'):
    assert re.search(rf'run/{name}\S*.jsonl', names), names
  assert re.search(r'run/checkpoints/\S+/1/', names)
  output = f'{tries.path}/bench.json'
  tries(
    'tools.bench_data',
    *('--workers=0', '--seconds=0.01', '--config.text.encoder=precomputed'),
    output=output,
    **given,
    **data,
  )
  assert json.loads(tries.files()['bench.json'])


def try_prepare_data(tries, tmp_path):
  tar = tries.upload(**{'a.tar': write_tar(tmp_path / 'tar', 4)})['a.tar']
  tries('tools.prepare_data', input=tar, output=f'{tries.path}/set')
  assert 'set/dataset_info.json' in tries.files()


def try_prepare_clips(tries, tmp_path):
  write_videos(tmp_path / 'a.tar', {'a': video(range(48))})
  tar = tries.upload(**{'a.tar': (tmp_path / 'a.tar').read_bytes()})['a.tar']
  tries('tools.prepare_clips', input=tar, output=f'{tries.path}/clips')
  assert 'clips/a.tar' in tries.files()


def try_class_names(tries, make_config):
  names = [f'class {i}' for i in range(20)]
  config = make_config()
  given = tries.upload(names='\n'.join(names).encode())
  config.text.update(
    encoder='label', num_classes=20, class_names=given['names']
  )
  assert make_tokenizer(config).name(3) == 'class 3'
  tries.note('main', 'text.class_names')


def try_image_set(tries, make_config, tmp_path):
  tries.upload(**{'a.tar': write_tar(tmp_path / 'tar', 4)})
  index = f'{tries.path}/index'
  tries('tools.index_tars', input=f'{tries.path}/*.tar', output=index)
  config = make_config()
  config.data.update(name='moving_shapes', image_set='tars', image_path=index)
  source = make_image_source(config, 8)
  assert len(source) > 0 and isinstance(source[0]['image'], bytes)
  tries.note('main', 'data.image_path')


def try_compilation_cache(tries, run):
  cache = f'{tries.path}/xla'
  tries.note('sample', 'JAX_COMPILATION_CACHE_DIR')
  env = {'JAX_COMPILATION_CACHE_DIR': cache}
  tries(
    'sample',
    *_SMALL,
    f'--prompt={PROMPT}',
    workdir=run,
    env=env,
    output=f'{tries.path}/a',
  )
  assert [name for name in tries.files() if name.startswith('xla/jit_')]


# Of all that use a trained model, read by the same lines.
_MOVED = dict.fromkeys(('text_path', 'tokenizer', 'data_path'), try_moved)
TRIED = {
  'main': {
    'config': try_training,
    'workdir': try_training,
    'data.path': try_training,
    'data.image_path': try_image_set,
    'text.path': try_training,
    'text.tokenizer': try_training,
    'text.class_names': try_class_names,
  },
  'sample': {
    'workdir': try_sample,
    'prompts_file': try_sample,
    'output': try_sample,
    'guide': try_sample,
    'JAX_COMPILATION_CACHE_DIR': try_compilation_cache,
    **_MOVED,
  },
  'evaluate': {
    'workdir': try_evaluate,
    'clip': try_evaluate,
    'output': try_evaluate,
    'images': try_folders,
    'reference': try_folders,
    'inception': try_folders,
    'i3d': try_folders,
    'cache': try_folders,
    **_MOVED,
  },
  'demo': {'workdir': try_demo, 'password_file': try_demo, **_MOVED},
  # mdm_jax.load, and the methods of what it returns.
  'load': {
    'workdir': try_load,
    'guide': try_load,
    'output': try_load,
    **_MOVED,
  },
  'tools.bench': {
    'config': try_bench,
    'output': try_bench,
    'compare': try_bench,
    'profile': try_bench,
  },
  'tools.bench_data': {'config': try_training, 'output': try_training},
  'tools.compare_models': dict.fromkeys(
    (
      *('output', 'plot'),
      *('clip', 'inception', 'i3d', 'reference', 'cache'),
    ),
    try_compare_models,
  ),
  'tools.compare_samplers': {
    'workdir': try_compare,
    'output': try_compare,
    'plot': try_compare,
  },
  'tools.compare_with_data': {
    'workdir': try_compare,
    'output': try_compare,
    **_MOVED,
  },
  'tools.emoji_tars': {
    'animated': try_emoji,
    'emojibase': try_emoji,
    'fluent': try_emoji,
    'noto': try_emoji,
    'output': try_emoji,
  },
  'tools.export_weights': {'workdir': try_weights, 'output': try_weights},
  'tools.import_ml_mdm': {
    'config': try_weights,
    'checkpoint': try_weights,
    'workdir': try_weights,
  },
  'tools.index_tars': {'input': try_training, 'output': try_training},
  'tools.nearest_images': {
    'workdir': try_compare,
    'output': try_compare,
    'labels': try_compare,
    **_MOVED,
  },
  'tools.plan': {'config': try_plan, 'cache': try_plan},
  'tools.precompute_text': {'config': try_training},
  'tools.prepare_clips': {
    'input': try_prepare_clips,
    'output': try_prepare_clips,
  },
  'tools.prepare_data': {'input': try_prepare_data, 'output': try_prepare_data},
  'tools.sweep': dict.fromkeys(
    (
      *('config', 'workdir', 'output', 'plot'),
      *('clip', 'inception', 'i3d', 'reference', 'cache'),
    ),
    try_sweep,
  ),
  'tools.train_tokenizer': {
    'output': try_train_tokenizer,
    'captions': try_train_tokenizer,
  },
}
# What can't be in a bucket, with the reason.
REFUSED = {
  'tools.train_tokenizer': {'data_path': 'ArrayRecord files need a disk'}
}
TRIES = sorted(
  {each for flags in TRIED.values() for each in flags.values()},
  key=lambda each: each.__name__,
)


def path_flags(command):
  """The flags of a command whose values are paths, from its --helpxml."""
  text = commands.run(f'mdm_jax.{command}', '--helpxml').stdout
  return {
    flag.findtext('name')
    for flag in xml.etree.ElementTree.fromstring(text).iter('flag')
    if re.search('path|recipe', flag.findtext('type'))
  }


def test_every_command_is_in_the_table():
  found = {
    '.'.join(path.relative_to(ROOT / 'mdm_jax').with_suffix('').parts)
    for path in (ROOT / 'mdm_jax').rglob('*.py')
    if "if __name__ == '__main__':" in path.read_text()
  }
  assert found == TRIED.keys() - {'load'}


@pytest.mark.parametrize('command', sorted(TRIED.keys() - {'load'}))
def test_every_path_is_in_the_table(command):
  flags = {*TRIED[command], *REFUSED.get(command, {})}
  keys = {key for key in ranges.KEYS if '.' in key}
  assert path_flags(command) == flags - keys - {'JAX_COMPILATION_CACHE_DIR'}


def test_every_key_that_is_a_path_is_in_the_table():
  keys = {
    key
    for key, kind in ranges.KEYS.items()
    if isinstance(getattr(kind, 'element', kind), value_types.Path)
  }
  assert keys == {key for key in TRIED['main'] if '.' in key}
  options = {
    name
    for name, kind in ranges.EVALUATION.items()
    if isinstance(kind, value_types.Path)
  }
  assert options <= TRIED['evaluate'].keys()


@pytest.mark.parametrize('each', TRIES, ids=lambda each: each.__name__)
def test_a_path_in_a_bucket(each, bucket, request):
  tries = Tries(bucket)
  fixtures = [*inspect.signature(each).parameters][1:]
  each(tries, *map(request.getfixturevalue, fixtures))
  assert tries.noted >= {
    (command, flag)
    for command, flags in TRIED.items()
    for flag, function in flags.items()
    if function is each
  }


# The least that each command needs, but for a path that is wrong.
NEEDED = {
  'main': ('--config=shapes_64', 'workdir'),
  'sample': ('--prompt=a', 'workdir'),
  'evaluate': ('--workdir=.', 'output'),
  'demo': ('--host=127.0.0.1', 'workdir'),
  'tools.bench': ('--config=shapes_64', 'output'),
  'tools.bench_data': ('--config=shapes_64', 'output'),
  'tools.compare_models': ('--metrics=loss', 'plot'),
  'tools.compare_samplers': ('--steps=1', 'workdir'),
  'tools.compare_with_data': ('--workdir=.', 'output'),
  'tools.emoji_tars': ('--resolution=64', 'output'),
  'tools.export_weights': ('--workdir=.', 'output'),
  'tools.import_ml_mdm': ('--config=shapes_64', 'checkpoint'),
  'tools.index_tars': ('--input=*.tar', 'output'),
  'tools.nearest_images': ('--workdir=.', 'output'),
  'tools.plan': ('--config=shapes_64', 'cache'),
  'tools.precompute_text': ('--batch_size=8', 'config'),
  'tools.prepare_clips': ('--input=*.tar', 'output'),
  'tools.prepare_data': ('--input=.', 'output'),
  'tools.sweep': ('--metric=a', 'config'),
  'tools.train_tokenizer': ('--vocab_size=300', 'output'),
}


def refusal(command, flag, path, env=None):
  """What a command says of a path, as its only line."""
  needed, _ = NEEDED[command]
  before = {*ROOT.iterdir()}
  result = commands.run(
    f'mdm_jax.{command}', needed, f'--{flag}={path}', env=env
  )
  assert result.returncode == 1 and not result.stdout
  (line,) = result.stderr.splitlines()
  assert line.startswith(f'error: --{flag}={path}: ') and line.endswith('.')
  assert {*ROOT.iterdir()} == before
  return line


@pytest.mark.parametrize('command', sorted(TRIED.keys() - {'load'}))
def test_a_wrong_path_is_one_line(command, bucket):
  _, flag = NEEDED[command]
  ends = {'output': 'a.png'} if 'output' in flag else {}
  end = ends.get(flag, 'a')
  if command == 'tools.export_weights':
    end = 'a.pth'
  elif flag == 'config':
    end = 'a.py'
  elif flag == 'plot':
    end = 'a.svg'
  line = refusal(command, flag, f'gs:/{bucket.name}/{end}')
  assert 'write gs:// with two slashes' in line
  line = refusal(command, flag, f'gs://not-there/{end}')
  assert 'there is no bucket not-there: create it' in line
  if 'workdir' in flag:
    line = refusal(command, flag, f's3://a/{end}')
    assert 'give a path on this machine, or one of gs://.' in line
    return
  scheme, package = next(
    (scheme, package)
    for scheme, package in buckets.PACKAGES.items()
    if not importlib.util.find_spec(package)
  )
  line = refusal(command, flag, f'{scheme}://a/{end}')
  assert f'{scheme}:// needs a package: pip install {package}.' in line


REFUSALS = {
  'no credentials': (
    {'status': 401, 'body': b'Anonymous caller does not have access'},
    'run `gcloud auth application-default login`',
  ),
  'requester pays': (
    {'status': 400, 'body': b'Bucket is a requester pays bucket'},
    'set MDM_JAX_BILLING_PROJECT to the project that pays',
  ),
  'clock': (
    {'status': 400, 'body': b'Invalid JWT: not in a reasonable timeframe'},
    'set the clock',
  ),
}


@pytest.mark.parametrize('command', ['main', 'evaluate', 'tools.bench'])
@pytest.mark.parametrize('name', REFUSALS)
def test_a_bucket_that_refuses_is_one_line(command, name, bucket):
  fault, expected = REFUSALS[name]
  _, flag = NEEDED[command]
  with bucket.failing('.', **fault):
    assert expected in refusal(command, flag, f'{bucket.path}/a')


@pytest.mark.parametrize('command', ['main', 'evaluate', 'tools.bench'])
def test_what_may_not_be_written_is_said_before_work_is_lost(command, bucket):
  _, flag = NEEDED[command]
  body = b'{"error": {"message": "no access to storage.objects.create"}}'
  with bucket.failing('^POST', status=403, body=body):
    line = refusal(command, flag, f'{bucket.path}/a')
  assert 'storage.objects.create' in line and 'Storage Object User' in line
  assert bucket.files() == {}


def test_what_a_bucket_refuses_later_is_one_line_too(bucket):
  output = f'--output={bucket.path}/a.model'
  # Not the lock, which comes first.
  with bucket.failing('uploadType=multipart', status=403, share=0.5) as fault:
    result = commands.run('mdm_jax.tools.train_tokenizer', output)
    assert fault.hit == 1
  assert result.returncode == 1
  *_, line = result.stderr.splitlines()
  assert line.startswith('error: no permission (Forbidden: ')
  assert line.endswith('. What is finished is kept.')
  assert 'Traceback' not in result.stderr
  assert 'a.model' not in bucket.files()


def test_a_workdir_that_is_a_file(bucket):
  files.write_text(f'{bucket.path}/a', '')
  for command in ('main', 'sample'):
    line = refusal(command, 'workdir', f'{bucket.path}/a')
    assert 'this is a file: give the path of a directory.' in line


def test_no_network_is_one_line_within_a_minute(monkeypatch):
  waits = []

  async def sleep(seconds):
    waits.append(seconds)

  monkeypatch.setattr(
    gcsfs.retry, 'asyncio', types.SimpleNamespace(sleep=sleep)
  )
  system = google_storage.FileSystem(
    endpoint_url='http://127.0.0.1:1', token='anon', skip_instance_cache=True
  )
  monkeypatch.setattr(buckets, 'file_system', lambda path: system)
  with pytest.raises(
    ValueError, match='no answer from the bucket: .*Cannot connect'
  ):
    value_types.Path('directory').check('gs://tests/run')
  # An object and a list are asked for at once.
  assert 10 < sum(waits) / 2 < 50


def test_a_bucket_that_is_silent_is_one_line(bucket, monkeypatch):
  monkeypatch.setattr(buckets, '_PATIENCE', 1)
  with bucket.failing('.', stall=3):
    with pytest.raises(ValueError, match='does not answer: is the network up?'):
      value_types.Path('directory').check(f'{bucket.path}/a')
