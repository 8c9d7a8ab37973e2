"""What the demo says about a model, to somebody who has not seen its config."""

import io
import json
import re
import tarfile

import jax
import numpy as np
from PIL import Image
import pytest

from mdm_jax.builders.stage import make_stage
from mdm_jax.data import shapes
from mdm_jax.inference.session import Model
from mdm_jax.inference.weights import Weights
from mdm_jax.runtime import sharding
from mdm_jax.serving.model_card import make_model_card
from mdm_jax.tools import prepare_data, train_tokenizer


@pytest.fixture
def make_card(make_config, tmp_path):
  """(keys of the config) -> the model card of a run in `tmp_path`."""

  def make(**changes):
    config = make_config()
    config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    params = {'a': np.zeros((30, 40)), 'b': {'c': np.zeros(34)}}
    return make_model_card(
      Model(
        str(tmp_path), make_stage(config, 1), Weights(1, 20, params), {}, mesh
      )
    )

  return make


def pairs(prompt):
  """The (shape, colour) pairs and the background that a prompt names."""
  words = re.findall(r'\w+', prompt)
  colors = [word for word in words if word in shapes.COLORS]
  named = [word for word in words if word in shapes.SHAPES]
  (background,) = [word for word in words if word in shapes.BACKGROUNDS]
  return list(zip(named, colors, strict=True)), background


def test_shapes(make_card):
  card = make_card()
  assert card.words['Shapes'] == shapes.SHAPES
  assert card.words['Backgrounds'] == tuple(shapes.BACKGROUNDS)
  assert card.summary.endswith('is made at 8 and 16 pixels at once.')
  assert card.facts['Resolution'] == '8 and 16 pixels, denoised together'
  assert card.facts['Parameters'] == '1,234'
  assert card.facts['Training'].startswith('20 steps of 16 images at 8 pixels,')
  assert 'Accuracy' not in card.facts
  *seen, left_out = card.examples.values()
  for prompts, split in ((sum(seen, ()), 'SEEN'), (left_out, 'HELD_OUT')):
    for prompt in prompts:
      found, background = pairs(prompt)
      assert found and {*found} <= {*getattr(shapes, split)[background]}, prompt
  assert ('circle', 'red') in shapes.HELD_OUT['white']  # As the note says.


def test_accuracy_at_the_end_of_training(make_card, tmp_path, caplog):
  path = tmp_path / 'eval' / '20.json'
  path.parent.mkdir()
  values = {'held_out_loss_8': 0.1, 'held_out_loss_16': 0.1}
  values |= {'accuracy_all': 0.291, 'accuracy_color': 0.87}
  path.write_text(json.dumps(values))
  accuracy = make_card().facts['Accuracy']
  assert (
    '29% (chance 0%) of images showed all that the prompt says: '
    'colour 87% (chance 14%); for prompts with' in accuracy
  )
  path.write_text('[]')
  assert 'Accuracy' not in make_card().facts
  assert '20.json' in caplog.text


def test_classes(make_card, tmp_path):
  names = tmp_path / 'names.txt'
  names.write_text('\n'.join(f'kind {i}' for i in range(6)))
  card = make_card(
    **{
      'text.encoder': 'label',
      'text.num_classes': 6,
      'text.class_names': str(names),
    }
  )
  assert card.words == {'Classes': tuple(f'kind {i}' for i in range(6))}
  assert card.examples['Classes'][0] == 'kind 0'


def test_captions_of_images(make_card, tmp_path):
  captions = ['a  cat\non a mat', 'a cat on a mat', 'x' * 91, 'a dog']
  file = io.BytesIO()
  Image.new('RGB', (20, 20)).save(file, 'PNG')
  with tarfile.open(tmp_path / 'some.tar', 'w') as tar:
    for i, caption in enumerate(captions):
      for name, data in (
        (f'{i}.png', file.getvalue()),
        (f'{i}.txt', caption.encode()),
      ):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  prepare_data.prepare(
    f'{tmp_path}/*.tar',
    f'{tmp_path}/cats',
    prepare_data.Options(validation_fraction=0),
  )
  card = make_card(
    **{'data.name': 'captioned_images', 'data.path': f'{tmp_path}/cats/'}
  )
  (found,) = card.examples.values()
  assert sorted(found) == ['a cat on a mat', 'a dog']
  assert card.facts['Data'] == 'your own images (cats)'
  # The shipped tokenizer was trained on other captions.
  assert not card.words and not card.note
  path = tmp_path / 'many.model'
  words = ' '.join(f'word{i}' for i in range(300))
  path.write_bytes(train_tokenizer.train([words] * 3, 400))
  card = make_card(
    **{'data.name': 'captioned_images', 'text.tokenizer': str(path)}
  )
  assert not card.words and 'had 300 different words.' in card.note


def test_without_the_data_there_are_no_captions(make_card, tmp_path):
  card = make_card(
    **{'data.name': 'captioned_images', 'data.path': str(tmp_path)}
  )
  assert card.examples == {}
