"""Tokenizes captions with SentencePiece."""

import hashlib
import os
import pathlib

import numpy as np
import sentencepiece

CAPTIONS_MODEL = os.path.join(os.path.dirname(__file__), 'captions.model')

_PAD, _EOS = 0, 1


class Tokenizer:
  """A SentencePiece model with T5's conventions: pad 0, `</s>` 1.

  Only its arguments are pickled, so that each worker process loads the file.
  """

  def __init__(self, path: str, max_length: int):
    """Loads a model.

    Args:
      path: a SentencePiece file. CAPTIONS_MODEL comes with this package.
      max_length: tokens of every encoded caption, `</s>` and padding included.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no SentencePiece model, max_length is below 2, or pad
        and `</s>` are not 0 and 1.
    """
    if not os.path.isfile(path):
      raise FileNotFoundError(
        f'no tokenizer at {path!r}: give the path of a spiece.model (of'
        ' google/flan-t5-xl, say), or train one with'
        ' python -m mdm_jax.tools.train_tokenizer --output=FILE'
      )
    if max_length < 2:
      raise ValueError(f'max_length {max_length}: must be 2 or more')
    self.path, self.max_length = path, max_length
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
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
    return type(self), (self.path, self.max_length)

  def fingerprint(self) -> str:
    """Changes with the file's contents."""
    data = pathlib.Path(self.path).read_bytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()

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
    pieces = self._pieces(caption)[: self.max_length - 1]
    tokens = np.full(self.max_length, _PAD, np.int32)
    tokens[: len(pieces) + 1] = [*pieces, _EOS]
    return tokens

  def count(self, caption: str) -> int:
    """The number of tokens of a caption and `</s>`, without truncation."""
    return len(self._pieces(caption)) + 1

  def _pieces(self, caption: str) -> list[int]:
    return self._processor.encode(' ' + caption)
