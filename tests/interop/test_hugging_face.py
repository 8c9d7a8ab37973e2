"""Reading model directories of safetensors, good and damaged ones."""

import json

import jax
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mdm_jax.interop import hugging_face
from mdm_jax.runtime import sharding

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
    match=('model.safetensors is damaged or half downloaded .* again'),
  ):
    hugging_face.open_tensors(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='config.json does not exist'):
    hugging_face.read_config(tmp_path)
  with pytest.raises(FileNotFoundError, match='model.safetensors does not'):
    hugging_face.open_tensors(tmp_path)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text('{"weight_map": {"a": "model-7.safetensors"}}')
  with pytest.raises(FileNotFoundError, match='model-7.safetensors does not'):
    hugging_face.open_tensors(tmp_path)
  safetensors.numpy.save_file(WEIGHTS, tmp_path / 'model-7.safetensors')
  with pytest.raises(ValueError, match='model-7.safetensors lacks a, which'):
    hugging_face.open_tensors(tmp_path)
  index.write_text('{')
  with pytest.raises(ValueError, match='index.json is no JSON'):
    hugging_face.open_tensors(tmp_path)
