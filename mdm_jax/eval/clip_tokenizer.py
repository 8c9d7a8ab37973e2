"""CLIP's tokenizer: byte-pair encoding of lower-case text.

The tokens are those of Hugging Face's CLIPTokenizer, from `vocab.json` and
`merges.txt`.
"""

from collections.abc import Mapping, Sequence
import functools
import re
import unicodedata

import numpy as np

_BEGIN, _END = '<|startoftext|>', '<|endoftext|>'
_WORD_END = '</w>'
_ENDINGS = re.compile("'(?:s|t|re|ve|m|ll|d)")
# Matched against the `_kind` of each character: letters, one number, others.
_RUNS = re.compile('L+|N|O+')


class ClipTokenizer:
  """Encodes captions.

  Attributes:
    end: the token that ends a caption, and that pads it.
  """

  def __init__(
    self, vocabulary: Mapping[str, int], merges: Sequence[str], max_length: int
  ):
    """Makes a tokenizer from the contents of its files.

    Args:
      vocabulary: token -> number, from `vocab.json`.
      merges: lines of `merges.txt`, with or without the '#version' line.
      max_length: number of tokens that `encode` returns.

    Raises:
      ValueError: the vocabulary is not that of CLIP.
    """
    pairs = [
      tuple(line.split())
      for line in merges
      if line.strip() and not line.startswith('#version')
    ]
    needed = [
      _BEGIN,
      _END,
      *_BYTES,
      *(sign + _WORD_END for sign in _BYTES),
      *map(''.join, pairs),
    ]
    missing = [token for token in needed if token not in vocabulary]
    if missing or any(len(pair) != 2 for pair in pairs):
      raise ValueError(
        f'vocab.json and merges.txt are not those of CLIP: {len(missing)} '
        f'tokens are missing, such as {missing[:3]}.'
      )
    self._vocabulary = vocabulary
    self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
    self._max_length = max_length
    self.end = vocabulary[_END]
    self._tokens = functools.lru_cache(100_000)(self._tokens_of_word)

  def encode(self, caption: str) -> np.ndarray:
    """Encodes a caption.

    Returns:
      int32 `[max_length]`: the begin token, the caption, truncated if it is too
      long, and one or more end tokens.
    """
    tokens = [self._vocabulary[_BEGIN]]
    for word in _words(caption):
      tokens.extend(self._tokens(word))
    tokens = tokens[: self._max_length - 1]
    padding = [self.end] * (self._max_length - len(tokens))
    return np.array(tokens + padding, np.int32)

  def _tokens_of_word(self, word: str) -> list[int]:
    parts = [_BYTES[byte] for byte in word.encode('utf-8')]
    parts[-1] += _WORD_END
    while known := [
      pair for pair in zip(parts, parts[1:]) if pair in self._ranks
    ]:
      best = min(known, key=self._ranks.__getitem__)
      merged, i = [], 0
      while i < len(parts):
        if tuple(parts[i : i + 2]) == best:
          merged.append(''.join(best))
          i += 2
        else:
          merged.append(parts[i])
          i += 1
      parts = merged
    return [self._vocabulary[part] for part in parts]


def _bytes_as_signs() -> list[str]:
  """A visible character for each byte: that of Latin-1, if it is visible."""
  signs, others = [], 0
  for byte in range(256):
    visible = 33 <= byte <= 126 or 161 <= byte <= 255 and byte != 173
    signs.append(chr(byte if visible else 256 + others))
    others += not visible
  return signs


_BYTES = _bytes_as_signs()


def _kind(sign: str) -> str:
  if sign.isspace():
    return ' '
  category = unicodedata.category(sign)[0]
  return category if category in 'LN' else 'O'


def _words(text: str) -> list[str]:
  """Normalises a caption (NFC, lower case) and splits it into words."""
  # Character by character, as in the original. str.lower of a whole text
  # depends on the ends of words, such as that of a Greek sigma.
  text = ''.join(map(str.lower, unicodedata.normalize('NFC', text)))
  kinds = ''.join(map(_kind, text))
  words, position = [], 0
  while position < len(text):
    match = _ENDINGS.match(text, position) or _RUNS.match(kinds, position)
    if match:
      words.append(text[match.start() : match.end()])
    position = match.end() if match else position + 1
  return words
