"""The tokenizer, and the model in this package."""

import pickle
import re

import numpy as np
import pytest
import sentencepiece

from mdm_jax.data import shapes, text
from mdm_jax.tools import train_tokenizer


@pytest.fixture(scope='module')
def tokenizer():
  return text.Tokenizer(text.CAPTIONS_MODEL, 32)


@pytest.fixture(scope='module')
def captions():
  source = shapes.ShapesSource(0, 'validation', 1000, 64)
  return [source.scene(index)[1] for index in range(1000)]


def test_words_of_the_shapes_are_single_pieces(tokenizer, captions):
  words = {word for each in captions for word in re.findall('[a-z]+', each)}
  words |= {*shapes.COLORS, *shapes.BACKGROUNDS, *shapes.SHAPES}
  words |= {*shapes.PATTERNS, *shapes.SIZES}
  assert len(words) > 40
  for word in words:
    assert np.count_nonzero(tokenizer.encode(word)) == 2, word


def test_shapes_captions_fit(tokenizer, captions):
  for caption in captions:
    tokens = tokenizer.encode(caption)
    length = np.count_nonzero(tokens)
    assert length <= 24 and tokens[length - 1] == 1


def test_encode_appends_the_end_and_pads(tokenizer):
  tokens = tokenizer.encode('a red ring')
  assert tokens.shape == (32,) and tokens.dtype == np.int32
  assert tokens[3] == 1 and not tokens[4:].any()
  assert (tokens[:3] > 2 + 256).all() and len(set(tokens[:3])) == 3
  np.testing.assert_array_equal(tokenizer.encode(' a red ring'), tokens)
  np.testing.assert_array_equal(tokenizer.encode(''), [1] + [0] * 31)


def test_long_captions_are_truncated_before_the_end_token(tokenizer):
  short = text.Tokenizer(text.CAPTIONS_MODEL, 4)
  tokens = short.encode('a red ring left of a blue cross')
  np.testing.assert_array_equal(tokens[:3], tokenizer.encode('a red ring')[:3])
  assert tokens[3] == 1


def test_any_text_is_spelt_in_bytes(tokenizer):
  processor = sentencepiece.SentencePieceProcessor(
    model_file=text.CAPTIONS_MODEL
  )
  caption = 'Zebra 東 \N{SNOWMAN}'
  tokens = tokenizer.encode(caption)
  assert 2 not in tokens
  kept = tokens[: np.count_nonzero(tokens) - 1]
  assert processor.decode(kept.tolist()) == caption


def test_pickles_as_its_arguments(tokenizer):
  data = pickle.dumps(tokenizer)
  assert len(data) < 300
  loaded = pickle.loads(data)
  np.testing.assert_array_equal(
    loaded.encode('a teal star'), tokenizer.encode('a teal star')
  )
  assert loaded.vocab_size == 450


def test_errors_name_the_remedy(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.*train_tokenizer'):
    text.Tokenizer('nowhere.model', 8)
  with pytest.raises(ValueError, match='max_length 1'):
    text.Tokenizer(text.CAPTIONS_MODEL, 1)
  other = tmp_path / 'other.model'
  with open(other, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['a red ring'] * 9),
      model_writer=file,
      vocab_size=270,
      hard_vocab_limit=False,
      byte_fallback=True,
      minloglevel=2,
    )
  with pytest.raises(ValueError, match='pad_id=0'):
    text.Tokenizer(str(other), 8)


def test_training_learns_the_words_it_is_given(tmp_path):
  path = tmp_path / 'new.model'
  path.write_bytes(train_tokenizer.train(['a zebra in the snow'] * 9, 300))
  tokenizer = text.Tokenizer(str(path), 8)
  assert np.count_nonzero(tokenizer.encode('a zebra')) == 3


def test_shipped_model_is_what_the_command_trains():
  model = train_tokenizer.train(train_tokenizer.shapes_captions(), 450)
  with open(text.CAPTIONS_MODEL, 'rb') as file:
    assert file.read() == model
