"""Where programs that score samples look for them: names of files."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
  """Files of the finest level alone, named as another program expects.

  Attributes:
    name: of the layout.
    image: index of a sample -> path of its PNG file in the directory.
    pattern: regular expression that all of these paths match, and no other.
    texts: index of a sample -> texts that belong to it, by path.
  """

  name: str
  image: Callable[[int], str]
  pattern: str
  texts: Callable[[int], Mapping[str, str]] = lambda index: {}


def numbered(name: str) -> Layout:
  """Files `00000.png`, `00001.png`, … in the directory itself.

  Args:
    name: of the layout.
  """
  return Layout(name, '{:05d}.png'.format, r'\d{5,}\.png')


def geneval(num_samples: int, metadata: Sequence[str]) -> Layout:
  """That of GenEval (2310.11513), which its `evaluate_images.py` reads.

  `00000/samples/00000.png` is the first sample of the first prompt, and
  `00000/metadata.jsonl` the line of that prompt in `evaluation_metadata.jsonl`.

  Args:
    num_samples: of each prompt.
    metadata: line of each prompt.
  """

  def image(index):
    prompt, sample = divmod(index, num_samples)
    return f'{prompt:05d}/samples/{sample:05d}.png'

  def texts(index):
    prompt = index // num_samples
    return {f'{prompt:05d}/metadata.jsonl': f'{metadata[prompt]}\n'}

  return Layout('geneval', image, r'\d{5,}/samples/\d{5,}\.png', texts)
