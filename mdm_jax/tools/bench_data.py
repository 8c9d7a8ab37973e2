"""Measures the throughput of the input pipeline, compared with Pillow alone.

  python -m mdm_jax.tools.bench_data
  python -m mdm_jax.tools.bench_data --config=configs/captioned_images.py \\
      --config.data.path=DIR --step_rate=2000

For tars in a bucket, add --config.data.name=tars and the --batch_size of a
host in training: the records of a batch are requested together. Without a
config it reads synthetic JPEGs of 1200 x 900 pixels. For each resolution it
prints the images/s of: a loop that decodes and resizes with Pillow; the same
loop with every JPEG decoded at full size; the pipeline in this process; and the
pipeline with worker processes. The measurements alternate. Of a recipe with
clips it prints the clips/s of each level, and the images/s of stages of images,
of those in `data.image_set` if there are any.
"""

import contextlib
import io
import itertools
import sys
import time

from absl import flags
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from mdm_jax.builders import ranges, recipes
from mdm_jax.builders.data import DRAWN, make_image_source, make_source
from mdm_jax.builders.model import (
  frames,
  image_resolution,
  image_resolutions,
)
from mdm_jax.builders.text import make_tokenizer
from mdm_jax.data import images, pipeline, transforms
from mdm_jax.data.text import CAPTIONS_MODEL, Tokenizer
from mdm_jax.mixed_batch import example_shape, level_name
from mdm_jax.report import console
from mdm_jax.runtime import command, files, flag_types, value_types

_BATCH_SIZE = 8
# How often each is measured. The best counts, as other programs may interfere.
_ROUNDS = 2


class SyntheticImages:
  """JPEGs of 1200 x 900 that compress about as well as photographs do."""

  def __init__(self, count: int = 16):
    """Makes `count` different images, which the source repeats."""
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
    """The number of records, many more than are read."""
    return 100_000

  def __getitem__(self, index: int) -> dict:
    """A record with `image` (a JPEG file), `caption` and `key`."""
    return {
      'image': self._files[index % len(self._files)],
      'caption': 'a photograph of nothing',
      'key': str(index),
    }


def pillow(data: bytes, resolution: int, draft: bool = True) -> np.ndarray:
  """Decodes an image with Pillow, and crops and resizes its centre square.

  Args:
    data: an image file.
    resolution: R, side of the result in pixels.
    draft: whether the JPEG decoder may reduce the image.

  Returns:
    uint8 [R, R, 3].
  """
  image = images.open_image(io.BytesIO(data))
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


def pillow_clip(
  data: bytes, resolution: int, frames: int, every: int = 1
) -> np.ndarray:
  """Decodes the first frames of an animation with Pillow, as `pillow` does.

  Args:
    data: an animation whose frames are shown equally long, or JPEG files.
    resolution: R, side of the result in pixels.
    frames: T, of the result.
    every: takes every nth frame of `every * frames`.

  Returns:
    uint8 [T, R, R, 3].
  """
  if len(files := images.split_jpegs(data)) > 1:
    chosen = files[: every * frames : every]
    return np.stack([pillow(file, resolution) for file in chosen])
  image, found = images.open_image(io.BytesIO(data)), []
  side = min(image.size)
  left, top = (image.width - side) / 2, (image.height - side) / 2
  for k in range(0, every * frames, every):
    image.seek(k)
    frame = image.convert('RGB').resize(
      (resolution, resolution),
      Image.Resampling.LANCZOS,
      box=(left, top, left + side, top + side),
      reducing_gap=2.0,
    )
    found.append(np.array(frame))
  return np.stack(found)


def pipeline_rate(
  source,
  transform: transforms.Transform,
  seconds: float,
  num_workers: int,
  batch_size: int = _BATCH_SIZE,
  num_threads: int = 1,
) -> float:
  """Measures the pipeline, in examples/s.

  Args:
    source: see `measure`.
    transform: see `measure`.
    seconds: see `measure`.
    num_workers: worker processes; 0: this process.
    batch_size: images that a worker reads together.
    num_threads: of each worker.
  """
  batches = iter(
    pipeline.make_dataset(
      source,
      transform=transform,
      batch_size=batch_size,
      seed=0,
      shuffle=True,
      num_workers=num_workers,
      num_threads=num_threads,
      prefetch=1,
    )
  )
  # Start the workers, and empty the buffers that fill while they start.
  for _ in range(4 * max(num_workers, 1) * num_threads):
    next(batches)
  count, begin = 0, time.perf_counter()
  while time.perf_counter() - begin < seconds:
    next(batches)
    count += batch_size
  rate = count / (time.perf_counter() - begin)
  batches.close()
  return rate


def measure(
  source,
  transform: transforms.Transform,
  seconds: float,
  worker_counts: list[int],
  batch_size: int = _BATCH_SIZE,
  num_threads: int = 1,
) -> dict[str, float]:
  """Measures the throughput of Pillow and of the pipeline.

  Args:
    source: a source whose images are files.
    transform: what becomes of them: images or clips of a resolution.
    seconds: approximate duration of each measurement.
    worker_counts: numbers of worker processes to measure; 0: this process.
    batch_size: images that a worker reads together.
    num_threads: of each worker.

  Returns:
    Name of the measurement -> images/s, or clips/s.
  """
  resolution = transform.resolution

  def pillow_rate(**options):
    count, begin = 0, time.perf_counter()
    for i in itertools.count():
      if (duration := time.perf_counter() - begin) >= seconds:
        break
      with contextlib.suppress(images.BadRecord):  # Training replaces it.
        record = source[i % len(source)]
        data = record['image']
        with images.decoding(record['key']):
          if transform.frames > 1:
            pillow_clip(data, resolution, transform.frames, transform.every)
          else:
            pillow(data, resolution, **options)
        count += 1
    if not count:
      raise ValueError('none of the records that were read can be decoded.')
    return count / duration

  rates = {}
  for _ in range(_ROUNDS):
    found = {'pillow': pillow_rate()}
    if transform.frames == 1:
      found['pillow, full decode'] = pillow_rate(draft=False)
    # Each is made just before it is measured: the workers of another would
    # fill their buffers at the same time.
    found |= {
      f'{count} workers': pipeline_rate(
        source, transform, seconds, count, batch_size, num_threads
      )
      for count in worker_counts
    }
    rates = {
      name: max(rate, rates.get(name, 0)) for name, rate in found.items()
    }
  return rates


def main(_: list[str]) -> None:
  """Measures what the flags ask for and prints a table per resolution."""
  console.setup_logging()
  try:
    _measure_all(flags.FLAGS)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


def _sizes(config: ConfigDict) -> list[tuple[int, int, int]]:
  """Pixels a side, frames and their distance, of what stages are trained on."""
  levels = config.model.levels
  finest = levels[-1].frames
  sides = [image_resolution(config, level) for level in levels]
  found = [*zip(sides, (level.frames for level in levels))]
  for stage in config.stages:  # Some take fewer frames.
    found += zip(image_resolutions(config, stage), frames(config, stage))
  return [
    (side, count, finest // count if count > 1 else 1)
    for side, count in dict.fromkeys(found)
  ]


def _measure_all(values: flags.FlagValues) -> None:
  images_beside = None
  if config := values.config:
    if config.data.name in DRAWN:
      raise ValueError(
        f'data.name={config.data.name!r} has no image files to decode.'
      )
    source = make_source(config, 'train', 0)
    tokenizer = make_tokenizer(config, of_captions=True)
    sizes = _sizes(config)
    if config.data.image_set not in DRAWN:
      images_beside = make_image_source(config, 0)
  else:
    source = SyntheticImages()
    tokenizer = Tokenizer(CAPTIONS_MODEL, 32)
    sizes = [(64, 1, 1), (256, 1, 1), (1024, 1, 1)]
  counts = sorted(set(values.workers))
  results = {}
  for resolution, count, every in sizes:
    rates = measure(
      images_beside if images_beside and count == 1 else source,
      transforms.Transform(tokenizer, resolution, frames=count, every=every),
      values.seconds,
      counts,
      values.batch_size,
      config.data.num_threads if config else 1,
    )
    name = level_name(example_shape(resolution, count))
    results[name] = rates
    rows = [
      [way, round(rate, 1), round(rate / rates['pillow'], 2)]
      for way, rate in rates.items()
    ]
    noun = 'images' if count == 1 else 'clips'
    header = [f'{name} px', f'{noun}/s', '/ Pillow']
    if values.step_rate:
      header.append('/ step rate')
      rows = [[*row, round(row[1] / values.step_rate, 2)] for row in rows]
    print(console.table(rows, header) + '\n', flush=True)
  if values.output:
    files.write_json(values.output, results)


if __name__ == '__main__':
  # Here, so that importing this module leaves other programs' flags alone.
  recipes.define(
    'Config with the data set and resolutions to measure.', required=False
  )
  flag_types.define(
    'workers',
    [0, 1, 2],
    value_types.List(ranges.KEYS['data.num_workers']),
    'Numbers of worker processes to measure; 0: load in this process.',
  )
  flag_types.integer(
    'batch_size',
    _BATCH_SIZE,
    1,
    10**5,
    'Images that a worker reads together. From a bucket, give as many as in '
    'training: up to 32 of them are requested at once.',
  )
  flag_types.define(
    'seconds',
    3.0,
    value_types.Number(float, 0.001, 10**5),
    'Duration of each measurement.',
  )
  flag_types.define(
    'step_rate',
    None,
    value_types.Number(float, 0.001, 10**9),
    'Images/s that training consumes, for comparison.',
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('file', output=True),
    'JSON file for the results.',
  )
  command.run(main, recipes.parse_flags)
