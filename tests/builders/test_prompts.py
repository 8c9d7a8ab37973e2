"""The level of chance of prompt accuracy."""

import pytest

from mdm_jax.builders.prompts import (
  chance_accuracy,
  make_vocabulary,
  unknown_words,
)
from mdm_jax.data import shapes
from mdm_jax.eval import prompt_accuracy
from mdm_jax.tools import train_tokenizer


def test_chance_is_what_images_of_other_prompts_score():
  """As drawn, and for uniform attributes as guessed."""
  chance = chance_accuracy()
  source = shapes.ShapesSource(7, 'held_out', 150, 64)
  images = [source[i]['image'] for i in range(150)]
  stated = [source.scene(i)[2] for i in range(150)]
  vocabulary = make_vocabulary()
  right = prompt_accuracy.accuracy(images, stated, vocabulary)
  assert right['all'] > 0.9
  wrong = prompt_accuracy.accuracy(images, [*stated[1:], stated[0]], vocabulary)
  assert wrong.keys() == set(prompt_accuracy.NAMES)
  assert chance.keys() - wrong.keys() == {
    f'{name}_{count}'
    for name in prompt_accuracy.NAMES
    for count in ('1_object', '2_objects')
  }
  # Other images have one object more often than two.
  assert chance['count_1_object'] == pytest.approx(0.76, abs=0.03)
  assert chance['count_2_objects'] == pytest.approx(0.24, abs=0.03)
  for name, value in wrong.items():
    assert abs(value - chance[name]) < max(3 * value.standard_error, 0.02), name
  assert chance['background'] == pytest.approx(1 / 6, abs=0.02)
  # One object in three of four scenes, two in the others.
  assert chance['count'] == pytest.approx(0.75**2 + 0.25**2, abs=0.03)
  assert chance['all'] < 0.01


def test_unknown_words_are_named_with_what_is_known(make_config, tmp_path):
  config = make_config()
  assert unknown_words(config, ['A Red ring', 'on navy', '']) == ''
  assert '"purpl", "hexagon", "over"; it' in unknown_words(
    config, ['A purpl HEXAGON, left-of a hexagon', 'over_the purpl']
  )
  text = unknown_words(config, ['a purpl', 'hexagon ' + 'ab' * 400])
  first, known = text.split('; it knows ')
  assert first == (
    f'words that training never saw: "purpl", "hexagon", "{"ab" * 15}"'
  )
  known = known.split(', ')
  assert known == sorted(known) and {'a', 'purple', 'yellow'} < {*known}
  assert ' and 4 more; ' in unknown_words(config, ['q w e r t y u i o'])

  # The shipped tokenizer says nothing of other captions.
  config.data.name = 'captioned_images'
  assert unknown_words(config, ['a purpl']) == ''

  # Of many words those that are near.
  words = [f'word{i}' for i in range(300)] + ['purple', 'elephant', 'elephants']
  path = tmp_path / 'many.model'
  path.write_bytes(train_tokenizer.train([' '.join(words)] * 3, 700))
  config.text.tokenizer = str(path)
  assert unknown_words(config, ['an Elefant']) == (
    'words that training never saw: "an", "elefant"; it knows 303 words, of '
    'which elephant, elephants are near'
  )
  assert unknown_words(config, ['zzz']).endswith('; it knows 303 words')
  config.text.encoder = 't5'
  assert unknown_words(config, ['zzz']) == ''
