"""Tokenizes captions: by SentencePiece, or by the rules of Apple's release."""

from collections.abc import Iterable
import functools
import hashlib
import os
import re
from typing import NamedTuple

from etils import epath
import numpy as np
import sentencepiece

from mdm_jax.runtime import remote_reads

CAPTIONS_MODEL = os.path.join(os.path.dirname(__file__), 'captions.model')
MOVING_CAPTIONS_MODEL = os.path.join(
  os.path.dirname(__file__), 'moving_captions.model'
)

_PAD, _EOS = 0, 1
# T5 has 100 sentinels behind the pieces of its SentencePiece model, the last
# one first.
_T5_PIECES, _T5_SENTINELS = 32_000, 100
# Of a model's file, which is a Protocol Buffer: the field of the words that it
# was trained on. SentencePiece leaves fields above 200 to others.
_WORDS_FIELD = 1001
# A word, or a character of a script without spaces between words.
_UNSPACED = '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff'
_WORD = re.compile(f'[{_UNSPACED}]|[^\\W_{_UNSPACED}]+')


class Tokenizer:
  """A SentencePiece model with T5's conventions: pad 0, `</s>` 1.

  Only its arguments are pickled, so that each worker process loads the file.

  Attributes:
    path, max_length, is_of_captions: the arguments.
    max_characters: of a text; None for any number.
  """

  max_characters: int | None = None

  def __init__(self, path: str, max_length: int, is_of_captions: bool = False):
    """Loads a model.

    Args:
      path: a SentencePiece file, local or in a bucket. CAPTIONS_MODEL comes
        with this package.
      max_length: tokens of every encoded caption, `</s>` and padding included.
      is_of_captions: whether it encodes the captions of training data, and not
        prompts; SentencePiece's rules are the same for both.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no SentencePiece model, max_length is below 2, or pad
        and `</s>` are not 0 and 1.
    """
    if not epath.Path(path).is_file():
      raise FileNotFoundError(
        f'no tokenizer at {path!r}: give the path of a spiece.model (of'
        ' google/flan-t5-xl, say), or train one with'
        ' python -m mdm_jax.tools.train_tokenizer --output=FILE'
      )
    if max_length < 2:
      raise ValueError(f'max_length {max_length}: must be 2 or more')
    self.path, self.max_length = path, max_length
    self.is_of_captions = is_of_captions
    file = os.fspath(remote_reads.kept_copy(path))
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_file=file)
    # RuntimeError for what is no model; OSError if it cannot be read.
    except (RuntimeError, OSError) as error:
      reason = ' '.join(str(error).split())
      raise ValueError(
        f'{path!r} is no SentencePiece model: give a spiece.model ({reason}).'
      ) from None
    found = self._processor.pad_id(), self._processor.eos_id()
    if found != (_PAD, _EOS):
      raise ValueError(
        f'{path!r} has pad and </s> ids {found}: use a model trained with'
        f' pad_id={_PAD}, eos_id={_EOS}'
      )

  def __reduce__(self):
    """Pickles the arguments, not the loaded model."""
    # Worker processes share the copy of a file in a bucket, as they are killed.
    file = os.fspath(remote_reads.kept_copy(self.path))
    return type(self), (file, self.max_length, self.is_of_captions)

  def fingerprint(self) -> str:
    """Changes with the file's contents."""
    data = remote_reads.kept_copy(self.path).read_bytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()

  @functools.cached_property
  def known_words(self) -> frozenset[str] | None:
    """The words that the model was trained on, see `words_of`.

    None if its file does not have them: other programs made it, or an earlier
    version of `train_tokenizer`, or there were too many.
    """
    return read_words(remote_reads.kept_copy(self.path).read_bytes())

  @property
  def vocab_size(self) -> int:
    """Number of pieces in the model, special pieces and bytes included."""
    return self._processor.vocab_size()

  def encode(self, caption: str) -> np.ndarray:
    """Encodes ' ' + caption + `</s>`, as `ml-mdm` does.

    Returns:
      int32 `[max_length]`: the caption is truncated if it is too long, and
      `</s>` is followed by padding with 0.
    """
    kept = self._truncated(caption)
    tokens = np.full(self.max_length, _PAD, np.int32)
    tokens[: len(kept)] = kept
    return tokens

  def count(self, caption: str) -> int:
    """The number of tokens of a caption and `</s>`, without truncation."""
    return len(self._pieces(caption)) + 1

  def excess(self, caption: str, num_tokens: int | None = None) -> str:
    """Says why `encode` truncates a text; '' if it does not.

    Args:
      caption: the text.
      num_tokens: its `count`, if that is known.

    Returns:
      Such as '140 tokens, the limit is 128'.
    """
    limit = self.max_characters
    if limit is not None and len(caption) > limit:
      return f'{len(caption)} characters, the limit is {limit}'
    count = self.count(caption) if num_tokens is None else num_tokens
    if count > self.max_length:
      return f'{count} tokens, the limit is {self.max_length}'
    return ''

  def _truncated(self, caption: str) -> list[int]:
    """At most `max_length` tokens, `</s>` included."""
    return [*self._pieces(caption)[: self.max_length - 1], _EOS]

  def _pieces(self, caption: str) -> list[int]:
    return self._processor.encode(' ' + caption)


class ReleaseTokenizer(Tokenizer):
  """The rules of Apple's `ml-mdm` over the pieces of a SentencePiece model.

  A text becomes the pieces with the largest sum of scores, as in SentencePiece,
  but it is not normalised: all spaces are kept, and what is no piece is
  dropped. `</s>` and other special pieces are parsed where a text has them.
  The captions of training data end with a space more than prompts, so that a
  lone space stands before `</s>`.
  """

  max_characters = 512

  def __init__(self, path: str, max_length: int, is_of_captions: bool = False):
    """Loads a model; the arguments are those of `Tokenizer`."""
    super().__init__(path, max_length, is_of_captions)
    self._vocabulary = _read_vocabulary(
      remote_reads.kept_copy(path).read_bytes()
    )

  def fingerprint(self) -> str:
    """Changes with the file's contents, and is not that of `Tokenizer`."""
    return f'{super().fingerprint()} release'

  @property
  def vocab_size(self) -> int:
    """Number of pieces, special pieces and T5's sentinels included."""
    return self._vocabulary.size

  def _truncated(self, caption: str) -> list[int]:
    # Too many tokens are cut after `</s>` is appended, as in the release.
    tokens = [*self._pieces(caption[: self.max_characters]), _EOS]
    return tokens[: self.max_length]

  def _pieces(self, caption: str) -> list[int]:
    end = ' ' if self.is_of_captions else ''
    return _best_pieces(f' {caption}{end}', self._vocabulary)


# By the value of `text.tokenizer_rules`.
TOKENIZERS = {'sentencepiece': Tokenizer, 'release': ReleaseTokenizer}


def words_of(text: str) -> list[str]:
  """The words of a text, without case: runs of letters and digits."""
  return _WORD.findall(text.casefold())


def with_words(model: bytes, words: Iterable[str]) -> bytes:
  """A SentencePiece file that also has the words that it was trained on."""
  data = '\n'.join(sorted(words)).encode()
  return model + _varint(_WORDS_FIELD << 3 | 2) + _varint(len(data)) + data


def read_words(model: bytes) -> frozenset[str] | None:
  """The words that `with_words` added; None if it has not."""
  start = 0
  try:
    while start < len(model):
      key, start = _read_varint(model, start)
      if key & 7 != 2:  # The fields of a model are all of varying length.
        return None
      length, start = _read_varint(model, start)
      if key >> 3 == _WORDS_FIELD:
        return frozenset(model[start : start + length].decode().split('\n'))
      start += length
  except (IndexError, UnicodeDecodeError):  # Damaged, but SentencePiece reads.
    pass
  return None


def _varint(value: int) -> bytes:
  """A number as Protocol Buffers write it: 7 bits a byte, the lowest first."""
  data = b''
  while value > 127:
    data += bytes([value & 127 | 128])
    value >>= 7
  return data + bytes([value])


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
  """A number of `_varint`, and where it ends."""
  value = shift = 0
  while data[start] > 127:
    value |= (data[start] & 127) << shift
    start, shift = start + 1, shift + 7
  return value | data[start] << shift, start + 1


class _Vocabulary(NamedTuple):
  """The pieces of a model, in UTF-8 with plain spaces.

  Attributes:
    pieces: id and cost of each piece; the cost is minus its score.
    beginnings: of all pieces that are longer.
    size: number of ids.
  """

  pieces: dict[bytes, tuple[int, float]]
  beginnings: frozenset[bytes]
  size: int


@functools.lru_cache(2)
def _read_vocabulary(model: bytes) -> _Vocabulary:
  """Reads the contents of a SentencePiece file."""
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  size = processor.vocab_size()
  scores = {
    # The release reads scores from a text file with five decimals.
    processor.id_to_piece(i): (i, round(-processor.get_score(i), 5))
    for i in range(size)
    if not processor.is_byte(i)
  }
  if size == _T5_PIECES:
    size += _T5_SENTINELS
    scores |= {
      f'<extra_id_{i}>': (size - 1 - i, 0.0) for i in range(_T5_SENTINELS)
    }
  pieces = {
    piece.replace('\N{LOWER ONE EIGHTH BLOCK}', ' ').encode(): value
    for piece, value in scores.items()
  }
  beginnings = frozenset(
    piece[:end] for piece in pieces for end in range(1, len(piece))
  )
  return _Vocabulary(pieces, beginnings, size)


def _best_pieces(text: str, vocabulary: _Vocabulary) -> list[int]:
  """Cuts a text into the known pieces with the smallest sum of costs.

  It works on bytes, as MLX Data does, which the release tokenizes with. Where
  no piece goes on, everything since the last place where a piece ended is
  dropped, and the next piece begins after it.

  Args:
    text: any text.
    vocabulary: the pieces.

  Returns:
    The ids of the pieces.
  """
  # Lone surrogates are no characters, and have no bytes.
  data = text.encode(errors='ignore')
  # Node 0 is the start of the text, and each place where pieces end has
  # another: the least cost up to it, the node before and the id between.
  costs, back = [0.0], [(0, -1)]
  begun, last = [(0, 0)], 0  # pieces that may go on: first byte and node
  for end in range(1, len(data) + 1):
    ending, going_on = [], []
    for start, node in begun:
      piece = data[start:end]
      if piece in vocabulary.pieces:
        token, cost = vocabulary.pieces[piece]
        ending.append((costs[node] + cost, node, token))
      if piece in vocabulary.beginnings:
        going_on.append((start, node))
    if ending:
      # Of equals the longest piece, whose node is the earliest.
      cost, node, token = min(ending)
      last = len(costs)
      costs.append(cost)
      back.append((node, token))
      going_on.append((end, last))
    begun = going_on or [(end, last)]
  tokens = []
  while last:
    last, token = back[last]
    tokens.append(token)
  return tokens[::-1]
