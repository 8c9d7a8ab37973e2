r"""Shows samples beside the nearest training images: does the model copy?

  python -m mdm_jax.tools.nearest_images --workdir=runs/emoji_64 \
      --labels=data/emoji_tars/labels.jsonl --output=nearest.png

Each cell shows a prompt of the held-out split: the samples of all levels,
coarse to fine, the image that the data set has for this prompt, and the
training image that is nearest to the sample, by pixels, and with --labels also
by the features of a classifier. The records are the first ones of the split, so
nothing is selected. nearest.json has the distances: a model that copies is
nearer to its training images than held-out images are. It also has the Fréchet
distance of samples and held-out images in these features, beside that of as
many training images.
"""

import sys
from typing import Any

from absl import flags, logging
from etils import epath

from mdm_jax.inference import run_flags
from mdm_jax.runtime import command, cpu, files, flag_types, value_types

_OUTPUT = flag_types.define(
  'output',
  None,
  value_types.Path('file', output=True, suffixes=('.png',)),
  'PNG file to write; the numbers are written beside it, as .json.',
  required=True,
)
_LABELS = flag_types.define(
  'labels',
  None,
  value_types.Path('file'),
  "JSON lines with the 'key' and the classes of each record, to train the "
  'classifier on. Default: neighbours by pixels alone.',
)
_STEPS = flag_types.integer(
  'classifier_steps', 1500, 1, 10**7, 'Training steps of the classifier.'
)
_NUM_IMAGES = flag_types.integer('num_images', 16, 1, 1000, 'Prompts to show.')
_NUM_SAMPLES = flag_types.integer(
  'num_samples', 320, 2, 10**6, 'Prompts to sample for the distances, at most.'
)
_NUM_TRAINING = flag_types.integer(
  'num_training',
  20_000,
  1,
  10**6,
  'Training images to search, at most: the first of the split.',
)
_SEED = flag_types.define('seed', 0, value_types.SEED, 'Sample i has seed + i.')


def main(_: list[str]) -> None:
  """Samples, finds neighbours, writes the image and the numbers."""
  # Slow to import, and not needed for --help.
  from mdm_jax.inference import labelled_features, split_images
  from mdm_jax.inference.pipeline import load
  from mdm_jax.report import console, grid
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  count = max(_NUM_IMAGES.value, _NUM_SAMPLES.value)
  output = epath.Path(_OUTPUT.value)
  try:
    value_types.check_seeds('--seed', _SEED.value, count)
    labels = _LABELS.value and labelled_features.read_labels(_LABELS.value)
    model = load(run_flags.workdir(), **run_flags.model())
    training, held_out = split_images.read_both(
      model.model.stage, _NUM_TRAINING.value, count
    )
    spaces = {'pixels': lambda images: images}
    found = {}
    if labels:
      features, found['classifier_accuracy'] = labelled_features.train(
        training, held_out, labels, _STEPS.value
      )
      spaces['features'] = features.encode
    found['losses'] = _losses(model.model)
    samples = model.sample(
      held_out.prompts,
      seed=[_SEED.value + i for i in range(len(held_out.prompts))],
      **run_flags.sampling(),
    )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  neighbours, distances = _compare(
    spaces, samples.levels[-1], held_out.images, training.images
  )
  found |= distances | {
    'samples': len(held_out.keys),
    'training_images': len(training.keys),
    'classifier_steps': _STEPS.value if labels else None,
    'model': model.model.description,
  }
  shown = slice(_NUM_IMAGES.value)
  columns = [*samples.levels, held_out.images, *neighbours]
  grid.save_png(
    output,
    grid.grid([each[shown] for each in columns], held_out.captions[shown]),
  )
  files.write_json(output.with_suffix('.json'), found)
  for name, value in found.items():
    logging.info('%s: %s', name, value)
  logging.info('Wrote %s and %s.', output, output.with_suffix('.json').name)


def _losses(model) -> dict[str, dict[str, float]]:
  """The loss of each level on held-out images, and on as many training images.

  Both have the same noise.

  Args:
    model: a `session.Model`.
  """
  import jax

  from mdm_jax.inference import split_images, validation
  from mdm_jax.steps.evaluate import make_band_step

  stage = model.stage
  step = jax.jit(
    make_band_step(stage.model, stage.objective, validation.LOSS_SEED, 1)
  )
  found = {}
  of_training = split_images.on_training_images(stage)
  for name, data, split in (
    ('held_out', stage, None),
    ('training', of_training, 'train'),
  ):
    sums = validation.over_held_out(data, model.mesh, model.params, step, split)
    count = validation.count_held_out(data, split)
    losses = validation.mean_losses(sums, count)
    found[name] = {
      name: float(loss)
      for name, loss in zip(stage.level_names, losses, strict=True)
    }
  return found


def _compare(spaces, samples, held_out, training):
  """Finds the nearest training images.

  Args:
    spaces: name -> function from images to what is compared.
    samples, held_out, training: uint8 [N, R, R, 3], [N, R, R, 3], [M, R, R, 3].

  Returns:
    For each space the nearest training image of each sample, and all numbers.
  """
  import numpy as np

  from mdm_jax.eval import fid
  from mdm_jax.eval.nearest import nearest

  neighbours: list[Any] = []
  found: dict[str, Any] = {}
  for name, encode in spaces.items():
    rows = {
      'samples': encode(samples),
      'held_out': encode(held_out),
      'training': encode(training),
    }
    index, of_samples = nearest(rows['samples'], rows['training'])
    neighbours.append(training[index])
    found[f'nearest_by_{name}'] = {
      'median_of_samples': float(np.median(of_samples)),
      'median_of_held_out': float(
        np.median(nearest(rows['held_out'], rows['training'])[1])
      ),
    }
    if name == 'features' and len(samples) > 1:
      as_many = np.random.default_rng(0).permutation(len(training))
      reference = fid.Statistics.of(rows['held_out'])
      found['frechet'] = {
        key: fid.frechet_distance(fid.Statistics.of(features), reference)
        for key, features in (
          ('samples', rows['samples']),
          ('training_images', rows['training'][as_many[: len(samples)]]),
        )
      }
  return neighbours, found


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('workdir')
  command.run(main)
