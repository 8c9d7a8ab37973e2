"""Reading weights in the forms that they come in, good and damaged ones."""

import functools
import json
import struct

import jax
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mdm_jax.interop import hugging_face
from mdm_jax.runtime import sharding
from tests import fuzzing, torch_writer

WEIGHTS = {
  'a.weight': np.arange(32, dtype=np.float32).reshape(4, 8),
  'b.weight': np.arange(6, dtype=np.float16),
  'unused': np.zeros(3, np.float32),
}
SHAPES = {
  'a': {'kernel': jax.ShapeDtypeStruct((8, 4), np.float32)},
  'b': {'scale': jax.ShapeDtypeStruct((6,), np.float32)},
}


def name_of(path):
  return f'{path[0]}.weight'


@pytest.fixture
def mesh():
  return sharding.make_mesh({'data': -1, 'fsdp': 2, 'spatial': 1})


@pytest.fixture
def shardings(mesh):
  return {
    'a': {'kernel': jax.NamedSharding(mesh, PartitionSpec(None, 'fsdp'))},
    'b': {'scale': sharding.replicated(mesh)},
  }


@pytest.fixture(params=['one file', 'two files'])
def directory(request, tmp_path):
  if request.param == 'one file':
    safetensors.numpy.save_file(WEIGHTS, tmp_path / 'model.safetensors')
    return tmp_path
  places = {}
  for i, name in enumerate(WEIGHTS):
    places[name] = f'model-{i % 2}.safetensors'
  for file in set(places.values()):
    safetensors.numpy.save_file(
      {name: WEIGHTS[name] for name in places if places[name] == file},
      tmp_path / file,
    )
  (tmp_path / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': places})
  )
  return tmp_path


def test_loads_into_shards(directory, shardings):
  loaded = hugging_face.load(
    hugging_face.open_tensors(directory), SHAPES, shardings, name_of
  )
  kernel, scale = loaded['a']['kernel'], loaded['b']['scale']
  np.testing.assert_array_equal(kernel, WEIGHTS['a.weight'].T)
  np.testing.assert_array_equal(scale, WEIGHTS['b.weight'])
  assert scale.dtype == np.float32
  assert kernel.addressable_shards[0].data.shape == (8, 2)


def test_reads_bfloat16(tmp_path, shardings):
  weights = {
    name: value.astype(ml_dtypes.bfloat16) for name, value in WEIGHTS.items()
  }
  safetensors.numpy.save_file(weights, tmp_path / 'model.safetensors')
  loaded = hugging_face.load(
    hugging_face.open_tensors(tmp_path), SHAPES, shardings, name_of
  )
  np.testing.assert_array_equal(loaded['a']['kernel'], WEIGHTS['a.weight'].T)


def test_misfits_are_named(directory, shardings):
  shapes = {
    'a': {'kernel': jax.ShapeDtypeStruct((4, 8), np.float32)},
    'c': {'scale': jax.ShapeDtypeStruct((6,), np.float32)},
  }
  with pytest.raises(
    ValueError,
    match=(
      r'do not fit: a.weight is \(4, 8\), not \(8, 4\); c.weight is missing'
    ),
  ):
    hugging_face.load(
      hugging_face.open_tensors(directory), shapes, shardings, name_of
    )


@pytest.mark.parametrize('size', [0, 5, 60, -1])
def test_half_a_file_is_named(tmp_path, size):
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(WEIGHTS, path)
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(
    ValueError,
    match='model.safetensors is (empty|5 bytes long|damaged or half .*): downl',
  ):
    hugging_face.open_tensors(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='config.json does not exist'):
    hugging_face.read_config(tmp_path)
  with pytest.raises(FileNotFoundError, match='has no weights: download every'):
    hugging_face.open_tensors(tmp_path)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text('{"weight_map": {"a": "model-7.safetensors"}}')
  with pytest.raises(FileNotFoundError, match='model-7.safetensors does not'):
    hugging_face.open_tensors(tmp_path)
  safetensors.numpy.save_file(WEIGHTS, tmp_path / 'model-7.safetensors')
  with pytest.raises(ValueError, match="model-7.safetensors lacks 'a', which"):
    hugging_face.open_tensors(tmp_path)
  index.write_text('{')
  with pytest.raises(ValueError, match='index.json is no JSON .* text that'):
    hugging_face.open_tensors(tmp_path)


def torch_tensors(weights=WEIGHTS):
  """A state dict, and the bytes of its storages."""
  kinds = {np.dtype(np.float32): 'Float', np.dtype(np.float16): 'Half'}
  tensors, data = {}, {}
  for i, (name, value) in enumerate(weights.items()):
    strides = tuple(stride // value.itemsize for stride in value.strides)
    tensors[name] = torch_writer.tensor(
      str(i),
      value.size,
      shape=value.shape,
      strides=strides,
      kind=kinds[value.dtype],
    )
    data[str(i)] = value.tobytes()
  return tensors, data


def prefixed(prefix, tensors):
  return {f'{prefix}{name}': value for name, value in tensors.items()}


# What programs save, given a state dict and another of the same names.
SAVED = {
  'torch.save of a state dict': lambda own, other: own,
  'DistributedDataParallel': lambda own, other: prefixed('module.', own),
  'torch.compile': lambda own, other: prefixed('_orig_mod.', own),
  'both': lambda own, other: prefixed('module._orig_mod.', own),
  'both, the other way': lambda own, other: prefixed('_orig_mod.module.', own),
  'FSDP': lambda own, other: {
    f'_fsdp_wrapped_module.{name.replace(".", "._fsdp_wrapped_module.")}': value
    for name, value in own.items()
  },
  'activation checkpointing': lambda own, other: {
    name.replace('.', '._checkpoint_wrapped_module.'): value
    for name, value in own.items()
  },
  'Lightning': lambda own, other: {
    'epoch': 3,
    'state_dict': prefixed('model.', own)
    | prefixed('critic.', {'w': other['a.weight']}),
    'optimizer_states': [{'state': {0: {'exp_avg': other['a.weight']}}}],
    'hyper_parameters': {'lr': 1e-4},
  },
  'PyTorch tutorial': lambda own, other: {
    'epoch': 3,
    'model_state_dict': own,
    'optimizer_state_dict': {'state': {0: other}},
  },
  'EMA beside it': lambda own, other: {'model': other, 'ema': own},
  'EMA of timm': lambda own, other: {
    'state_dict': other,
    'state_dict_ema': own,
  },
  'EMA and DDP': lambda own, other: {
    'model': prefixed('module.', other),
    'model_ema': prefixed('module.', own),
  },
  'EMA of ema-pytorch': lambda own, other: (
    prefixed('online_model.', other)
    | prefixed('ema_model.', own)
    | {'step': other['a.weight']}
  ),
  'several EMAs': lambda own, other: {'model': other, 'emas': [own]},
  'an optimizer by names': lambda own, other: {
    'model': own,
    'optimizer': {'exp_avg': other, 'exp_avg_sq': other},
    'opt': {'ema': other},
  },
  'AveragedModel': lambda own, other: (
    prefixed('module.', own) | {'n_averaged': other['a.weight']}
  ),
  'DeepSpeed': lambda own, other: {
    'module': own,
    'ds_config': {},
    'dtype': 'x',
  },
  'a part of a larger model': lambda own, other: (
    prefixed('text_encoder.', own)
    | prefixed('unet.', {'conv.weight': other['a.weight']})
  ),
}


@pytest.mark.parametrize('form', SAVED)
@pytest.mark.parametrize('old', [False, True], ids=['zip', 'before 1.6'])
def test_loads_what_programs_save(tmp_path, shardings, form, old):
  own, data = torch_tensors()
  other = {
    name: torch_writer.tensor(
      '9',
      value.size,
      shape=value.shape,
      strides=tuple(stride // value.itemsize for stride in value.strides),
    )
    for name, value in WEIGHTS.items()
  }
  saved, path = SAVED[form](own, other), tmp_path / 'x.pth'
  if old:
    arrays = dict(zip('012', (value.reshape(-1) for value in WEIGHTS.values())))
    torch_writer.write_old(path, saved, arrays | {'9': np.ones(32, np.float32)})
  else:
    torch_writer.write(path, saved, data | {'9': bytes(4 * 32)})
  check_loaded(path, shardings)


def check_loaded(path, shardings):
  tensors = hugging_face.select(
    hugging_face.open_tensors(path), ['a.weight', 'b.weight']
  )
  loaded = hugging_face.load(tensors, SHAPES, shardings, name_of)
  np.testing.assert_array_equal(loaded['a']['kernel'], WEIGHTS['a.weight'].T)
  np.testing.assert_array_equal(loaded['b']['scale'], WEIGHTS['b.weight'])
  return tensors


def save(path, weights=WEIGHTS):
  """A file of the kind that its name says."""
  if path.suffix == '.safetensors':
    safetensors.numpy.save_file(weights, path)
  elif path.suffix == '.json':
    ending = path.name.partition('.')[2].partition('.index')[0]
    stem = path.name.partition('.')[0]
    places = {
      name: f'{stem}-{i % 2}.{ending}' for i, name in enumerate(weights)
    }
    for file in set(places.values()):
      save(
        path.with_name(file),
        {n: weights[n] for n in places if places[n] == file},
      )
    path.write_text(
      '\ufeff' + json.dumps({'metadata': {}, 'weight_map': places})
    )
  else:
    torch_writer.write(path, *torch_tensors(weights))


def halves(count=2):
  """Names of files of equal parts, and what they hold."""
  names = list(WEIGHTS)
  return {
    f'model-{i + 1:05}-of-{count:05}.safetensors': {
      name: WEIGHTS[name] for name in names[i::count]
    }
    for i in range(count)
  }


@pytest.mark.parametrize(
  'names',
  [
    ['model.safetensors'],
    ['pytorch_model.bin'],
    ['pytorch_model.bin.index.json'],
    ['model.safetensors.index.json'],
    ['model.fp16.safetensors'],
    ['model.safetensors.index.fp16.json'],
    ['diffusion_pytorch_model.safetensors'],
    ['t5xxl_fp16.safetensors'],
    ['epoch=3-step=100.ckpt', 'optimizer.pt'],
    ['model.pth'],
    ['model.safetensors', 'pytorch_model.bin', 'other.safetensors'],
    ['pytorch_model.bin', 'training_args.bin', 'optimizer.bin'],
  ],
  ids=' '.join,
)
def test_loads_directories_and_files(tmp_path, shardings, names):
  for name in names:
    save(tmp_path / name)
  found = check_loaded(tmp_path, shardings)
  if not names[0].endswith('.json'):
    check_loaded(tmp_path / names[0], shardings)
  plain = {name: WEIGHTS[name] for name in ('a.weight', 'b.weight')}
  # Features that were precomputed from one form fit the other.
  assert hugging_face.fingerprint(found, plain) == (
    hugging_face.fingerprint(plain, plain)
  )


def test_loads_shards_without_an_index(tmp_path, shardings):
  for name, weights in halves().items():
    save(tmp_path / name, weights)
  check_loaded(tmp_path, shardings)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='has 1 of the 2 files of model'):
    hugging_face.open_tensors(tmp_path)


def test_several_models_are_named(tmp_path):
  for name in ('a.safetensors', 'b.safetensors'):
    save(tmp_path / name)
  with pytest.raises(ValueError, match='several models: give one of a.safet'):
    hugging_face.open_tensors(tmp_path)


@pytest.mark.parametrize(
  'name', ['../x.bin', '/etc/passwd', '..', '.', '', 'a/b', 7, None, ['x']]
)
def test_an_index_names_only_files_beside_it(tmp_path, name):
  (tmp_path / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': {'a': name}})
  )
  with pytest.raises(ValueError, match='in place of the name of a file'):
    hugging_face.open_tensors(tmp_path)


@pytest.mark.parametrize(
  'dtype',
  [np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
)
def test_reads_other_floats(tmp_path, shardings, dtype):
  path = tmp_path / 'x.safetensors'
  weights = {name: value.astype(dtype) for name, value in WEIGHTS.items()}
  names = {
    np.dtype(np.float64): 'F64',
    np.dtype(ml_dtypes.float8_e5m2): 'F8_E5M2',
  }
  entries, data = {}, b''
  for name, value in weights.items():
    entries[name] = {
      'dtype': names.get(value.dtype, 'F8_E4M3'),
      'shape': value.shape,
      'data_offsets': [len(data), len(data) + value.nbytes],
    }
    data += value.tobytes()
  header = json.dumps(entries).encode()
  path.write_bytes(struct.pack('<Q', len(header)) + header + data)
  tensors = hugging_face.select(hugging_face.open_tensors(path), ['a.weight'])
  loaded = hugging_face.load(tensors, SHAPES, shardings, name_of)
  np.testing.assert_array_equal(
    loaded['a']['kernel'], weights['a.weight'].astype(np.float32).T
  )


@pytest.mark.parametrize(
  'weights, message',
  [
    ({'a.weight': np.zeros(3, np.int8)}, 'a.weight is quantised to int8: give'),
    (
      {'a.weight': np.zeros(3), 'a.weight_scale': np.zeros(1)},
      'a.weight is quantised',
    ),
    (
      {'module.a.weight': np.zeros(3), 'a.weight': np.ones(3)},
      'a.weight is there twice, as .module.a.weight. and .a.weight.:',
    ),
  ],
)
def test_weights_of_another_meaning_are_refused(weights, message):
  with pytest.raises(ValueError, match=message):
    hugging_face.select(weights, ['a.weight'])


def test_names_that_no_network_has_are_left_out():
  names = ['x', 'x\ny', 'x\x1b[2J', '\ud800', 'x' * 1001, 'é']
  assert [*hugging_face.select(dict.fromkeys(names), ['w'])] == ['x', 'é']


def test_a_second_name_is_as_good():
  weights = {'x.encoder.embed': np.zeros(3), 'x.b': np.zeros(3)}
  found = hugging_face.select(
    weights, ['shared', 'b'], {'shared': 'encoder.embed'}
  )
  assert found.keys() == {'shared', 'b'}


def test_long_names_cost_little(tmp_path):
  names = ['a.' * 500_000 + 'b', '.' * 10**6, 'a' * 10**6]
  fuzzing.check(
    lambda names: hugging_face.select(dict.fromkeys(names), ['x.y.z']),
    lambda rng: names,
    1,
    refuses=(),
  )


class Refused(Exception):
  """A ValueError or FileNotFoundError in one short line."""


def refuse_long_errors(read, *given):
  try:
    read(*given)
  except (ValueError, FileNotFoundError) as error:
    assert '\n' not in str(error) and len(str(error)) < 800, error
    raise Refused from error


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_safetensors_is_read_or_refused(tmp_path, count):
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(WEIGHTS, path)
  content = path.read_bytes()
  (length,) = struct.unpack('<Q', content[:8])
  header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

  def make(rng):
    if rng.random() < 0.3:
      path.write_bytes(fuzzing.damage(content, rng))
      return path
    text = fuzzing.damage_json(header, rng).encode()
    length = len(text)
    if rng.random() < 0.2:
      length = int(rng.choice((0, 1, length - 1, 10**8, 2**47, 2**63)))
    path.write_bytes(struct.pack('<Q', length) + text + data)
    return path

  def read(path):
    for value in hugging_face.open_tensors(path).values():
      np.asarray(value)

  fuzzing.check(
    functools.partial(refuse_long_errors, read), make, count, refuses=Refused
  )


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_index_is_read_or_refused(tmp_path, count):
  index = tmp_path / 'model.safetensors.index.json'
  save(index)
  value = json.loads(index.read_text(encoding='utf-8-sig'))

  def make(rng):
    index.write_text(fuzzing.damage_json(value, rng), encoding='utf-8')
    return tmp_path

  fuzzing.check(
    functools.partial(refuse_long_errors, hugging_face.open_tensors),
    make,
    count,
    refuses=Refused,
  )
