"""Prompts of benchmarks, read from the files that these publish."""

import json
import random
from typing import Any

from etils import epath

from mdm_jax.data import lines


def read_geneval(path: str) -> tuple[list[str], list[str]]:
  """The prompts of GenEval (2310.11513).

  Args:
    path: of `prompts/evaluation_metadata.jsonl` in its repository.

  Returns:
    The prompts, and the line of each.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line has no prompt.
  """
  prompts, found = [], lines.read_entries(path)
  for number, line in enumerate(found, 1):
    try:
      prompt = json.loads(line)['prompt']
    except (ValueError, LookupError, TypeError, RecursionError):
      prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError(
        f'{path}, entry {number}: this has no prompt: give '
        "prompts/evaluation_metadata.jsonl of GenEval's repository."
      )
    prompts.append(prompt)
  return prompts, found


def choose_coco(path: str, count: int = 30_000) -> list[dict[str, Any]]:
  """Captions of COCO, one of each of some of its photographs.

  As for the FID of 30,000 captions, both are chosen at random: always the same
  ones of the same file, in the same order.

  Args:
    path: of `annotations/captions_val2014.json`, or of another split.
    count: of photographs; all of them, if there are not as many.

  Returns:
    For each caption its 'prompt', 'image_id' and 'caption_id'.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no captions of COCO.
  """
  by_image = {}
  try:
    for each in json.loads(epath.Path(path).read_bytes())['annotations']:
      caption = ' '.join(each['caption'].split())
      by_image.setdefault(int(each['image_id']), {})[int(each['id'])] = caption
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    by_image = {}
  if not by_image:
    raise ValueError(
      f'{path} has no captions of COCO: give captions_val2014.json of its '
      'annotations_trainval2014.zip.'
    )
  # Of Python's random numbers, only these are the same in all versions.
  rng = random.Random(0).random
  chosen = sorted(sorted(by_image), key=lambda _: rng())[:count]
  found = []
  for image in chosen:
    captions = sorted(by_image[image].items())
    number, caption = captions[int(rng() * len(captions))]
    found.append({'prompt': caption, 'image_id': image, 'caption_id': number})
  return found
