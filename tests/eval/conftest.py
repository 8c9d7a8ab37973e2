"""Networks of random weights, and what PyTorch made of them.

`tests/data/eval` was written with PyTorch 2.13 on a CPU. Every weight is a
function of its name and its shape, see `golden_weight`, so that none is
stored. `inception.npz` and `inception_shapes.json` are of pytorch-fid 0.3.0's
InceptionV3, built without its download; `clip.npz` of the CLIPModel,
CLIPImageProcessorPil and CLIPTokenizer of transformers 5.24, all of the size
in `clip.json`; `merges.txt` are 200 merges trained on this project's docs.
"""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mdm_jax import hugging_face
from mdm_jax.eval import clip, clip_tokenizer

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'eval'


@pytest.fixture(scope='session')
def inception_weights(golden_weight):
  """A state dict of the FID Inception's names and shapes, 24 M numbers."""
  def make(name, shape):
    x = golden_weight(name, shape)
    if name.endswith('running_var'):
      return 1 + np.abs(x)  # x is a tenth of a normal one.
    # What ReLU halves.
    return x * np.float32(np.sqrt(2)) if len(shape) > 1 else x
  shapes = json.loads((DATA / 'inception_shapes.json').read_text())
  return {name: make(name, tuple(shape)) for name, shape in shapes.items()}


def _vocabulary(merges):
  signs = clip_tokenizer._BYTES
  # As OpenAI's is ordered, without its gaps.
  ordered = [chr(i) for i in range(0x17e) if chr(i) in signs]
  first = [sign for sign in ordered if ord(sign) < 256]
  ordered = first + [sign for sign in ordered if ord(sign) >= 256]
  vocabulary = {}
  for token in [*ordered, *(sign + '</w>' for sign in ordered),
                *(''.join(line.split()) for line in merges[1:]),
                '<|startoftext|>', '<|endoftext|>']:
    vocabulary.setdefault(token, len(vocabulary))
  return vocabulary


@pytest.fixture(scope='session')
def clip_directory(tmp_path_factory, golden_weight):
  """A small CLIP as Hugging Face lays it out, and what PyTorch's encodes.

  Attributes: `path`, `config`, `spec`, `params`, `tokenizer`, `vocabulary`,
  `merges`, `captions`, and the golden `tokens`, `pixels` (every fifth of each
  side), `images` and `text`.
  """
  description = json.loads((DATA / 'clip.json').read_text())
  merges = (DATA / 'merges.txt').read_text().splitlines()
  vocabulary = _vocabulary(merges)
  path = tmp_path_factory.mktemp('clip')
  (path / 'config.json').write_text(json.dumps(description['config']))
  (path / 'vocab.json').write_text(json.dumps(vocabulary))
  (path / 'merges.txt').write_text('\n'.join(merges))
  safetensors.numpy.save_file(
      {name: np.asarray(golden_weight(name, tuple(shape)))
       for name, shape in description['shapes'].items()},
      path / 'model.safetensors')
  spec = clip.ClipSpec.from_hugging_face(description['config'])
  shapes = jax.eval_shape(
      clip.Clip(spec).init, jax.random.key(0),
      jnp.zeros((1, spec.image_size, spec.image_size, 3), jnp.uint8),
      jnp.zeros((1, spec.max_length), jnp.int32))['params']
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = hugging_face.load(
      hugging_face.open_tensors(path), shapes,
      jax.tree.map(lambda _: here, shapes), clip.hugging_face_name)
  return types.SimpleNamespace(
      path=path, config=description['config'], spec=spec, params=params,
      tokenizer=clip_tokenizer.ClipTokenizer(
          vocabulary, merges, spec.max_length),
      vocabulary=vocabulary, merges=merges, captions=description['captions'],
      **np.load(DATA / 'clip.npz'))
