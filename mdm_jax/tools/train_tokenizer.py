"""Trains a small SentencePiece tokenizer with T5's special tokens.

  python -m mdm_jax.tools.train_tokenizer --output=captions.model

`mdm_jax/data/captions.model` was made by this command, and
`moving_captions.model` with `--data=moving_shapes --vocab_size=560`, from the
captions of shapes too, on whose images a network of clips may be trained.
`--data_path=DIR`, a data set that `prepare_data` wrote, trains on the captions
of its training images, `--captions=FILE` on those of a file, one per line.
Captions and prompts are read without case. Any text can be encoded: words that
are not in the vocabulary are split into bytes. The file also has the words of
the captions, so that others can be named in a warning.
"""

from collections.abc import Iterable, Iterator
import io
import sys
import tempfile

from absl import logging
from etils import epath
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mdm_jax.data import moving_shapes, shapes, sources
from mdm_jax.data.lines import read_entries
from mdm_jax.data.pipeline import usable_records
from mdm_jax.data.text import with_words, words_of
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
  'Text file with one caption per line, which are used instead of --data.',
)
_DATA_PATH = flag_types.define(
  'data_path',
  None,
  value_types.Path('directory', schemes=()),
  'Data set that prepare_data wrote, whose captions are used instead.',
)
_DATA = flag_types.define(
  'data',
  'shapes',
  value_types.Choice(('shapes', 'moving_shapes')),
  'Procedural data set whose captions are used; with moving_shapes also those '
  'of shapes.',
)
_VOCAB_SIZE = flag_types.integer(
  'vocab_size',
  450,
  260,
  10**6,
  'Size of the vocabulary, of which 256 are bytes and 3 special tokens.',
)
_NUM_CAPTIONS = 20_000
# Latin, Greek, Cyrillic and Armenian letters, to which Unicode adds none.
_CASED = range(0x600), range(0x1E00, 0x2000)
# Of captions with more different words, none are kept: few words are missing.
_MAX_WORDS = 100_000


def shapes_captions(
  count: int = _NUM_CAPTIONS, moving: bool = False
) -> Iterable[str]:
  """Captions of the first training scenes of shapes.

  With `moving` also those of moving shapes, which are trained on beside images
  of shapes.
  """
  found = [shapes.ShapesSource(0, 'train', count, resolution=64)]
  if moving:
    found.append(moving_shapes.MovingShapesSource(0, 'train', count, 64, 1))
  return (source.scene(i)[1] for source in found for i in range(count))


def _captions() -> Iterable[str]:
  if _CAPTIONS.value and _DATA_PATH.value:
    raise ValueError('give either --captions or --data_path.')
  if _CAPTIONS.value:
    captions = read_entries(_CAPTIONS.value)
    if not captions:
      raise ValueError(f'{_CAPTIONS.value} has no captions: give one a line.')
    return captions
  if _DATA_PATH.value:
    source = sources.open_source(_DATA_PATH.value, 'train')
    records = usable_records(source, range(len(source)))
    return (text for record in records for text in record['captions'])
  return shapes_captions(moving=_DATA.value == 'moving_shapes')


def train(captions: Iterable[str], vocab_size: int) -> bytes:
  """Trains a BPE model (pad 0, `</s>` 1, unknown 2), which ignores case.

  Args:
    captions: to train on.
    vocab_size: of the model, at most.

  Returns:
    The serialized SentencePiece model, with the words of the captions, see
    `text.read_words`.

  Raises:
    RuntimeError: from SentencePiece, if there are no captions.
  """
  model, words = io.BytesIO(), set()

  def noting_words() -> Iterator[str]:
    for caption in captions:
      if len(words) <= _MAX_WORDS:
        words.update(words_of(caption))
      yield caption

  with tempfile.TemporaryDirectory() as directory:
    rules = epath.Path(directory) / 'case.tsv'
    rules.write_text(_case_folding())
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=noting_words(),
      model_writer=model,
      # The unigram trainer finds no pieces in words that occur in one form
      # only.
      model_type='bpe',
      # Not nmt_nfkc_cf, which is ten times as large and rewrites much more.
      normalization_rule_tsv=str(rules),
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
  found = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
  # The same captions make the same file, wherever the rules were.
  found.normalizer_spec.ClearField('normalization_rule_tsv')
  data = found.SerializeToString(deterministic=True)
  return data if len(words) > _MAX_WORDS else with_words(data, words)


def _case_folding() -> str:
  """Rules for SentencePiece: each character, and those that replace it."""
  folded = {code: chr(code).casefold() for block in _CASED for code in block}
  return ''.join(
    f'{code:X}\t{" ".join(f"{ord(each):X}" for each in text)}\n'
    for code, text in folded.items()
    if text != chr(code)
  )


def main(_: list[str]) -> None:
  """Trains and writes one model."""
  try:
    model = train(_captions(), _VOCAB_SIZE.value)
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
