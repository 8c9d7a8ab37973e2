"""The frozen T5 in the forms that it is downloaded in."""

import shutil

from etils import epath
import jax
import numpy as np
import pytest
import safetensors.numpy

from mdm_jax.builders import text
from mdm_jax.runtime import sharding
from tests import torch_writer


def write_torch(weights, path):
  torch_writer.write(
    path,
    {
      name: torch_writer.tensor(
        name,
        value.size,
        shape=value.shape,
        strides=tuple(stride // 4 for stride in value.strides),
      )
      for name, value in weights.items()
    },
    {name: value.tobytes() for name, value in weights.items()},
  )


FORMS = {
  'pytorch_model.bin': (write_torch, 'pytorch_model.bin'),
  'one file': (safetensors.numpy.save_file, 't5xxl_fp32.safetensors'),
}


@pytest.fixture
def config(make_config, t5_directory):
  config = make_config()
  config.text.update(encoder='t5', path=str(t5_directory.path), max_length=8)
  return config


@pytest.mark.parametrize('form', FORMS)
def test_every_form_is_the_same_encoder(config, t5_directory, tmp_path, form):
  save, name = FORMS[form]
  weights = safetensors.numpy.load_file(t5_directory.path / 'model.safetensors')
  # The encoder alone, its embedding under another name.
  weights['encoder.embed_tokens.weight'] = weights.pop('shared.weight')
  save(weights, tmp_path / name)
  shutil.copy(t5_directory.path / 'spiece.model', tmp_path)
  mesh = sharding.make_mesh(config.mesh)
  expected = text.load_frozen(config, mesh)
  fingerprint = text.text_fingerprint(config)
  config.text.path = str(tmp_path / name if form == 'one file' else tmp_path)
  for directory in (False, True):
    if directory:
      shutil.copy(t5_directory.path / 'config.json', tmp_path)
    assert text.text_fingerprint(config) == fingerprint
    loaded = text.load_frozen(config, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.parametrize('form', FORMS)
def test_an_encoder_in_a_bucket_is_copied_once(
  config, t5_directory, bucket, tmp_path, form
):
  save, name = FORMS[form]
  mesh = sharding.make_mesh(config.mesh)
  expected = text.load_frozen(config, mesh), text.text_fingerprint(config)
  tokens = text.make_tokenizer(config).encode('a red ring')
  weights = safetensors.numpy.load_file(t5_directory.path / 'model.safetensors')
  save(weights, tmp_path / name)
  path = epath.Path(bucket.path)
  (path / name).write_bytes((tmp_path / name).read_bytes())
  for file in ('config.json', 'spiece.model'):
    (path / file).write_bytes((t5_directory.path / file).read_bytes())
  (path / 'tf_model.h5').write_bytes(b'large')
  config.text.path = bucket.path
  bucket.requests.clear()
  for _ in range(2):
    found = text.load_frozen(config, mesh), text.text_fingerprint(config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(
      text.make_tokenizer(config).encode('a red ring'), tokens
    )
  read = [x for x in bucket.requests if x.startswith('GET /download')]
  assert sum(name in request for request in read) == 1
  assert sum('spiece.model' in request for request in read) == 1
  assert not any('tf_model' in request for request in read)
  # Another file of the same name is not taken for the first.
  (path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
  with pytest.raises(ValueError, match=f'text.path=.*gs://.*{name} is '):
    text.load_frozen(config, mesh)
  (path / 'spiece.model').write_bytes(b'no model')
  with pytest.raises(ValueError, match='gs://.* is no SentencePiece model'):
    text.make_tokenizer(config)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('model_index.json', '{}', 'is a whole pipeline .* give the folder in it'),
    ('snapshots', None, "is a directory of Hugging Face's cache: give the"),
    ('flax_model.msgpack', '', 'is a model for other frameworks alone: give'),
    ('_CHECKPOINT_METADATA', '{}', 'is an Orbax checkpoint of JAX: export'),
    ('config.json', '<!DOCTYPE html>', 'is no JSON .* is a web page'),
    (
      'config.json',
      '',
      'config.json is no JSON .* is empty: download it again',
    ),
    ('config.json', '[' * 10**5, 'config.json is no JSON'),
    ('config.json', '[]', 'config.json is JSON, but no object'),
    ('config.json', '{}', 'text.path=.*: model_type None with feed_forward_p'),
    ('README.md', 'x', 'config.json does not exist: give'),
  ],
)
def test_what_is_no_t5_is_named(config, tmp_path, name, content, message):
  shutil.copy(f'{config.text.path}/spiece.model', tmp_path)
  config.text.path = str(tmp_path)
  if content is None:
    (tmp_path / name).mkdir()
  else:
    (tmp_path / name).write_text(content)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    text.make_text_encoder(config)
  assert '\n' not in str(error.value)
