"""Measures how fast images are read, against Pillow alone.

  python -m mdm_jax.tools.bench_data
  python -m mdm_jax.tools.bench_data --config=configs/captioned_images.py \
      --config.data.path=DIR --step_rate=2000

Without a config it makes JPEGs of 1200 x 900. For each resolution it prints
images/s of: a loop that does nothing but decode and resize with Pillow; the
same without the decoder's own reduction; the pipeline in this process; and
the pipeline with worker processes. They take turns.
"""

import io
import json
import pathlib
import sys
import time

from absl import app, flags
from ml_collections import config_flags
import numpy as np
from PIL import Image

from mdm_jax import inputs, metrics
from mdm_jax.data import pipeline, transforms
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer

_BATCH_SIZE = 8
# Each is measured that often, and its best counts: others use the machine too.
_ROUNDS = 2


class SyntheticImages:
  """JPEGs of 1200 x 900 that compress about as well as photographs do."""

  def __init__(self, count: int = 16):
    """Makes them; the source repeats them."""
    rng = np.random.default_rng(0)
    self._files = []
    for _ in range(count):
      coarse = rng.integers(0, 256, (30, 40, 3), np.uint8)
      image = np.asarray(Image.fromarray(coarse).resize((1200, 900)), float)
      image += rng.normal(0, 8, image.shape)
      buffer = io.BytesIO()
      Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
        buffer, 'JPEG', quality=90
      )
      self._files.append(buffer.getvalue())

  def __len__(self) -> int:
    """Far more than are read."""
    return 100_000

  def __getitem__(self, index: int) -> dict:
    """A record."""
    return {
      'image': self._files[index % len(self._files)],
      'caption': 'a photograph of nothing',
      'key': str(index),
    }


def pillow(data: bytes, resolution: int, draft: bool = True) -> np.ndarray:
  """Decodes and resizes the centre square, and nothing else."""
  image = Image.open(io.BytesIO(data))
  side = min(image.size)
  if draft and (reduction := side / (2 * resolution)) > 1:
    image.draft('RGB', [int(size / reduction) for size in image.size])
  image = image.convert('RGB')
  side = min(image.size)
  left, top = (image.width - side) / 2, (image.height - side) / 2
  return np.array(
    image.resize(
      (resolution, resolution),
      Image.Resampling.LANCZOS,
      box=(left, top, left + side, top + side),
      reducing_gap=2.0 if draft else None,
    )
  )


def measure(
  source,
  tokenizer: Tokenizer,
  resolution: int,
  seconds: float,
  worker_counts: list[int],
) -> dict[str, float]:
  """Images/s of each way to read them.

  Args:
    source: of records whose images are files.
    tokenizer: of the captions.
    resolution: of the examples.
    seconds: that each measurement takes about.
    worker_counts: worker processes of the pipeline; 0 is this process.
  """

  def pillow_rate(draft):
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
      pillow(source[count % len(source)]['image'], resolution, draft)
      count += 1
    return count / (time.perf_counter() - begin)

  def pipeline_rate(num_workers):
    # Only this one exists now, or others would fill their buffers meanwhile.
    batches = iter(
      pipeline.make_dataset(
        source,
        transform=transforms.Transform(tokenizer, resolution),
        batch_size=_BATCH_SIZE,
        seed=0,
        shuffle=True,
        num_workers=num_workers,
        prefetch=1,
      )
    )
    # It starts, and what has come into its buffers meanwhile goes.
    for _ in range(4 * max(num_workers, 1)):
      next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
      next(batches)
      count += _BATCH_SIZE
    rate = count / (time.perf_counter() - begin)
    batches.close()
    return rate

  rates = {}
  for _ in range(_ROUNDS):
    found = {
      'pillow': pillow_rate(True),
      'pillow, full decode': pillow_rate(False),
    }
    found |= {
      f'{count} workers': pipeline_rate(count) for count in worker_counts
    }
    rates = {
      name: max(rate, rates.get(name, 0)) for name, rate in found.items()
    }
  return rates


def main(argv: list[str]) -> None:
  """Flags to a table."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  values = flags.FLAGS
  metrics.setup_logging()
  try:
    if config := values.config:
      source = inputs.make_source(config, 'train', 0)
      tokenizer = inputs.make_tokenizer(config)
      resolutions = [level.resolution for level in config.model.levels]
      if not isinstance(source[0]['image'], bytes):
        raise ValueError(
          f'data.name={config.data.name!r} has no image files to decode.'
        )
    else:
      source = SyntheticImages()
      tokenizer = Tokenizer(CAPTIONS_MODEL, 32)
      resolutions = [64, 256, 1024]
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  counts = sorted(set(map(int, values.workers)))
  results = {}
  for resolution in resolutions:
    rates = measure(source, tokenizer, resolution, values.seconds, counts)
    results[resolution] = rates
    rows = [
      [name, round(rate, 1), round(rate / rates['pillow'], 2)]
      for name, rate in rates.items()
    ]
    header = [f'{resolution} px', 'images/s', "of Pillow's"]
    if values.step_rate:
      header.append('of the step rate')
      rows = [[*row, round(row[1] / values.step_rate, 2)] for row in rows]
    print(metrics.table(rows, header) + '\n', flush=True)
  if values.output:
    pathlib.Path(values.output).write_text(json.dumps(results, indent=2))


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  config_flags.DEFINE_config_file(
    'config', None, 'Whose data set and resolutions to measure.'
  )
  flags.DEFINE_list(
    'workers', '0,1,2', 'Numbers of worker processes; 0: in this one.'
  )
  flags.DEFINE_float('seconds', 3.0, 'That each measurement takes.')
  flags.DEFINE_float(
    'step_rate', None, 'Images/s that training takes, to compare with.'
  )
  flags.DEFINE_string('output', None, 'A JSON file for the figures.')
  app.run(main)
