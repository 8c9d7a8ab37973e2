"""Trains a small SentencePiece tokenizer with T5's special tokens.

  python -m mdm_jax.tools.train_tokenizer --output=captions.model

`mdm_jax/data/captions.model` was made by this command. `--captions=FILE` (one
caption per line) trains on other captions. Any text can be encoded: words that
are not in the vocabulary are split into bytes. With `--lowercase` a text is
read without case, in captions and in prompts.
"""

from collections.abc import Iterable
import io
import sys

from absl import flags, logging
import sentencepiece

from mdm_jax.data import shapes
from mdm_jax.data.lines import read_entries
from mdm_jax.runtime import (
  command,
  directory_lock,
  files,
  flag_types,
  value_types,
)

_OUTPUT = flag_types.define(
  'output',
  None,
  value_types.Path('file', output=True),
  'File to write the model to.',
  required=True,
)
_CAPTIONS = flag_types.define(
  'captions',
  None,
  value_types.Path('text'),
  'Text file with one caption per line; by default, captions of shapes.',
)
_VOCAB_SIZE = flag_types.integer(
  'vocab_size',
  450,
  260,
  10**6,
  'Size of the vocabulary, of which 256 are bytes and 3 special tokens.',
)
_LOWERCASE = flags.DEFINE_boolean(
  'lowercase', False, 'Make a tokenizer that reads texts without case.'
)
_NUM_CAPTIONS = 20_000


def shapes_captions(count: int = _NUM_CAPTIONS) -> Iterable[str]:
  """Captions of the first training scenes of the shapes data set."""
  source = shapes.ShapesSource(0, 'train', count, resolution=64)
  return (source.scene(index)[1] for index in range(count))


def train(
  captions: Iterable[str], vocab_size: int, lowercase: bool = False
) -> bytes:
  """Trains a BPE model (pad 0, `</s>` 1, unknown 2).

  Args:
    captions: to train on.
    vocab_size: of the model, at most.
    lowercase: whether the model folds the case of every text, and characters of
      compatibility, such as ² (Unicode's NFKC).

  Returns:
    The serialized SentencePiece model.

  Raises:
    RuntimeError: from SentencePiece, if there are no captions.
  """
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(captions),
    model_writer=model,
    # The unigram trainer finds no pieces in words that occur in one form only.
    model_type='bpe',
    normalization_rule_name='nmt_nfkc_cf' if lowercase else 'identity',
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=1.0,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    num_threads=1,
    minloglevel=2,
  )
  return model.getvalue()


def main(_: list[str]) -> None:
  """Trains and writes one model."""
  try:
    captions = shapes_captions()
    if _CAPTIONS.value:
      captions = read_entries(_CAPTIONS.value)
    if not captions:
      raise ValueError(f'{_CAPTIONS.value} has no captions: give one a line.')
    model = train(captions, _VOCAB_SIZE.value, _LOWERCASE.value)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  except RuntimeError as error:
    reason = ' '.join(str(error).split())
    sys.exit(
      f'error: --vocab_size={_VOCAB_SIZE.value}: SentencePiece cannot train on '
      f'these captions ({reason}): give another size or more captions.'
    )
  with (
    directory_lock.holding_file(_OUTPUT.value),
    files.replacing(_OUTPUT.value) as temporary,
  ):
    temporary.write_bytes(model)
  logging.info('wrote %s (%d bytes)', _OUTPUT.value, len(model))


if __name__ == '__main__':
  command.run(main)
