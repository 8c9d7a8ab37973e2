"""The tokenizer, and the model in this package."""

import hashlib
import json
import lzma
import pathlib
import pickle
import re

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mdm_jax.data import shapes, text
from mdm_jax.tools import train_tokenizer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
# What the release makes of prompts.
TOKENS = json.loads((GOLDEN / 'tokens.json').read_text())


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
  assert processor.decode(kept.tolist()) == caption.casefold()


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


def test_case_does_not_count(tokenizer, captions):
  for caption in ('A red circle', 'a RED circle', 'a red Circle'):
    np.testing.assert_array_equal(
      tokenizer.encode(caption), tokenizer.encode('a red circle')
    )
  model = train_tokenizer.train(['eine Straße in Ötz', 'ΣΊΣΥΦΟΣ'] * 9, 320)
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  for first, second in (('Ötz STRASSE', 'ÖTZ straße'), ('Σίσυφος', 'σίσυφοσ')):
    assert processor.encode(first) == processor.encode(second)


def test_captions_of_shapes_have_the_tokens_they_always_had(
  tokenizer, captions
):
  """Those of the model of earlier versions, which kept case."""
  tokens = np.stack(list(map(tokenizer.encode, captions)))
  assert hashlib.sha256(tokens.astype('<i4').tobytes()).hexdigest() == (
    'e834a0d750049779fe6e5d683120f7932e0fc2a174a2757612ce3523e37a4227'
  )


def test_words_that_training_never_saw(tokenizer, captions, t5_model, tmp_path):
  words = {word for caption in captions for word in text.words_of(caption)}
  assert words <= tokenizer.known_words
  assert {'circle', 'a', 'navy'} < tokenizer.known_words
  assert not {'purpl', 'hexagon', 'over'} & tokenizer.known_words
  assert text.ReleaseTokenizer(text.CAPTIONS_MODEL, 8).known_words
  # T5's file has no words, nor has one of an earlier version: all are known.
  for path in (t5_model, tmp_path / 'old.model'):
    if path != t5_model:
      with open(text.CAPTIONS_MODEL, 'rb') as file:
        model = file.read()
      known = text.with_words(b'', tokenizer.known_words)
      assert model.endswith(known)
      path.write_bytes(model.removesuffix(known))
    other = text.Tokenizer(str(path), 32)
    assert other.known_words is None
  np.testing.assert_array_equal(
    other.encode('A red ring'), tokenizer.encode('a red ring')
  )


def test_words_of_texts():
  assert text.words_of("A bear's  left-hand_side: 42%") == [
    *('a', 'bear', 's', 'left', 'hand', 'side', '42'),
  ]
  # Without spaces between words, each character is one.
  assert text.words_of('красный КРУГ 赤い丸🔴') == [
    *('красный', 'круг', '赤', 'い', '丸')
  ]
  many = {f'word{i}' for i in range(3000)}
  assert text.read_words(text.with_words(b'', many)) == many
  for damaged in (b'', b'\xff', b'\x08\x01', b'\x0a\x7f', b'\xca\x3e\x01\xff'):
    assert text.read_words(damaged) is None


def test_too_many_words_are_not_kept(monkeypatch):
  monkeypatch.setattr(train_tokenizer, '_MAX_WORDS', 3)
  for caption, known in (('a b c', {'a', 'b', 'c'}), ('a b c d', None)):
    model = train_tokenizer.train([caption] * 9, 300)
    assert text.read_words(model) == known


def test_shipped_model_is_what_the_command_trains():
  model = train_tokenizer.train(train_tokenizer.shapes_captions(), 450)
  with open(text.CAPTIONS_MODEL, 'rb') as file:
    assert file.read() == model


@pytest.fixture(scope='module')
def t5_model(tmp_path_factory):
  """T5's SentencePiece model, of the vocabulary that the release reads."""
  model = sentencepiece_model_pb2.ModelProto()
  model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
  for name, value in ('pad', 0), ('eos', 1), ('unk', 2), ('bos', -1):
    setattr(model.trainer_spec, f'{name}_id', value)
  kinds = {'<pad>': 'CONTROL', '</s>': 'CONTROL', '<unk>': 'UNKNOWN'}
  kind_of = model.SentencePiece.Type.Value
  with lzma.open(GOLDEN / 't5.vocab.xz', 'rt', encoding='utf-8') as lines:
    for line in list(lines)[:32_000]:  # The rest are sentinels.
      piece, score = line.rstrip('\n').split('\t')
      kind = kind_of(kinds.get(piece, 'NORMAL'))
      model.pieces.add(piece=piece, score=float(score), type=kind)
  path = tmp_path_factory.mktemp('t5') / 'spiece.model'
  path.write_bytes(model.SerializeToString())
  return str(path)


def release(t5_model, caption, is_of_captions=False):
  """The release's tokens, without padding."""
  tokens = text.ReleaseTokenizer(t5_model, 128, is_of_captions).encode(caption)
  assert tokens.dtype == np.int32 and len(tokens) == 128
  return tokens[: max(np.flatnonzero(tokens)) + 1].tolist()


@pytest.mark.parametrize('prompt', TOKENS['prompt'], ids=lambda x: ascii(x[:9]))
def test_prompts_have_the_tokens_of_the_release(t5_model, prompt):
  assert release(t5_model, prompt) == TOKENS['prompt'][prompt]


@pytest.mark.parametrize(
  'prompt, expected',
  [
    # No other piece goes on from `<`, and what follows is dropped with it.
    ('a <b> c', [3, 9, 3, 3155, 3, 75]),
    ('a <painting of', [3, 9, 3, 29, 1222, 13]),
    ('tail <', [9891, 3]),
    ('</s', [3]),
    ('<pad> a', [3, 0, 3, 9]),
    ('<extra_id_99>a<extra_id_100>', [3, 32000, 9, 3155]),
    # Of cuts with the same score the one with a longer last piece.
    ('444 SSS', [314, 3628, 180, 4256]),
    ('x\N{LOWER ONE EIGHTH BLOCK}y', [3, 226, 63]),
    ('fi \ufb01 \xbd', [361, 3, 3]),
    ('\xe9 e\u0301', [3, 154, 3, 15]),
    ('\ud800a', [3, 9]),
  ],
)
def test_prompts_have_the_tokens_of_mlx_data(t5_model, prompt, expected):
  """Expected is what MLX Data 0.2.0 makes of them, without `</s>`."""
  assert release(t5_model, prompt) == [*expected, 1]


def test_captions_end_with_one_more_space(t5_model):
  for caption, expected in [
    ('', [3, 3, 1]),
    ('a cat', [3, 9, 1712, 3, 1]),
    ('a cat ', [3, 9, 1712, 3, 3, 1]),
  ]:
    assert release(t5_model, caption, True) == expected


def test_long_texts_are_cut_as_in_the_release(t5_model):
  prompts = text.ReleaseTokenizer(t5_model, 128)
  words = 'a red ring ' * 60
  assert len(words) > 512
  np.testing.assert_array_equal(
    prompts.encode(words), prompts.encode(words[:512])
  )
  assert prompts.encode(words)[127] != 1  # `</s>` is cut off.
  assert prompts.excess(words) == '660 characters, the limit is 512'
  assert prompts.excess('x ' * 64) == '130 tokens, the limit is 128'
  # A caption has one more.
  fits = 'x ' * 63
  assert prompts.count(fits) == 128 and prompts.excess(fits) == ''
  captions = text.ReleaseTokenizer(t5_model, 128, is_of_captions=True)
  assert captions.excess(fits) == '129 tokens, the limit is 128'
  assert text.Tokenizer(t5_model, 128).excess('a' * 600) != ''
  assert text.Tokenizer(t5_model, 128).max_characters is None


def test_rules_are_in_the_fingerprint_and_pickled(t5_model):
  kinds = [
    text.Tokenizer(t5_model, 8),
    text.ReleaseTokenizer(t5_model, 8),
    text.ReleaseTokenizer(t5_model, 8, True),
  ]
  plain, prompts, captions = (kind.fingerprint() for kind in kinds)
  assert plain != prompts == captions
  assert [kind.vocab_size for kind in kinds] == [32_000, 32_100, 32_100]
  data = [pickle.dumps(kind) for kind in kinds]
  assert max(map(len, data)) < 400
  tokens = [pickle.loads(one).encode('a cat').tolist()[:5] for one in data]
  assert tokens == [[3, 9, 1712, 1, 0], [3, 9, 1712, 1, 0], [3, 9, 1712, 3, 1]]


def test_any_model_can_have_the_rules_of_the_release():
  tokenizer = text.ReleaseTokenizer(text.CAPTIONS_MODEL, 32)
  assert tokenizer.vocab_size == 450  # Without sentinels.
  plain = text.Tokenizer(text.CAPTIONS_MODEL, 32)
  caption = 'a red ring left of a blue cross'
  np.testing.assert_array_equal(
    tokenizer.encode(caption), plain.encode(caption)
  )
  # Dropped, and not spelt in bytes.
  np.testing.assert_array_equal(
    tokenizer.encode('a red\N{SNOWMAN} ring'), tokenizer.encode('a red ring')
  )
