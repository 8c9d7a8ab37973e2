"""The tokenizer against transformers' CLIPTokenizer with the same merges."""

import numpy as np
import pytest

from mdm_jax.eval.clip_tokenizer import ClipTokenizer


def test_equals_hugging_face(clip_directory):
  """Scripts, accents, digits, endings, emoji; empty and far too long."""
  found = [
    clip_directory.tokenizer.encode(caption)
    for caption in clip_directory.captions
  ]
  np.testing.assert_array_equal(found, clip_directory.tokens)
  assert found[0].dtype == np.int32


def test_empty_and_long_captions(clip_directory):
  encode, end = clip_directory.tokenizer.encode, clip_directory.tokenizer.end
  assert list(encode(''))[1:] == [end] * 23
  long = encode('ab ' * 3000)
  assert len(long) == 24 and list(long).count(end) == 1 and long[-1] == end


def test_another_vocabulary_is_refused(clip_directory):
  vocabulary = {
    token: i
    for i, token in enumerate(clip_directory.vocabulary)
    if token != 'the</w>'
  }
  with pytest.raises(ValueError, match=r"1 tokens .* \['the</w>'\]"):
    ClipTokenizer(vocabulary, clip_directory.merges, 77)
