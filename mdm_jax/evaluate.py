r"""Measures a trained model, with the settings that its metrics depend on.

  python -m mdm_jax.evaluate --workdir=runs/shapes_64
  python -m mdm_jax.evaluate --workdir=runs/shapes_64 --num_samples=10000 \
      --metrics=fid,kid --inception=pt_inception-2015-12-05-6726825d.pth

Or compares two directories of images, without a model:

  python -m mdm_jax.evaluate --images=DIR --reference=DIR \
      --inception=pt_inception-2015-12-05-6726825d.pth

All images of a directory have one size, or are cropped and resized to
--resolution. Of samples that mdm_jax.sample wrote, the finest level is used.
"""

import sys

from absl import logging
from etils import epath

from mdm_jax.builders import ranges
from mdm_jax.inference import run_flags
from mdm_jax.runtime import command, cpu, flag_types, value_types

_KINDS = ranges.EVALUATION
_METRICS = flag_types.define(
  'metrics',
  None,
  _KINDS['metrics'],
  'Some of loss, prompt_accuracy, edge_width, frechet, fid, kid, '
  'precision_recall, clip, flicker, fvd. Default: those that need no files, '
  'but frechet, which is for shapes, trains a classifier and caches it; for '
  'directories fid, kid and precision_recall. flicker and fvd are of clips.',
)
_NUM_SAMPLES = flag_types.define(
  'num_samples',
  None,
  _KINDS['num_samples'],
  'Images to sample. Default: eval.num_prompts of the config.',
)
_SEED = flag_types.define(
  'seed',
  None,
  _KINDS['seed'],
  'Sample i has seed + i. Default: as at the end of training.',
)
_LOSS_BATCHES = flag_types.define(
  'loss_batches',
  None,
  ranges.KEYS['eval.loss_batches'],
  'Batches of the held-out loss. Default: eval.loss_batches of the config.',
)
_INCEPTION = flag_types.define(
  'inception',
  None,
  _KINDS['inception'],
  'File pt_inception-2015-12-05-6726825d.pth, for fid, kid and '
  'precision_recall.',
)
_CLIP = flag_types.define(
  'clip',
  None,
  _KINDS['clip'],
  'Directory of a CLIP as Hugging Face lays it out, for clip.',
)
_I3D = flag_types.define(
  'i3d',
  None,
  _KINDS['i3d'],
  'File rgb_imagenet.pt, also known as i3d_pretrained_400.pt, for fvd.',
)
_NUM_REFERENCE = flag_types.define(
  'num_reference',
  None,
  _KINDS['num_reference'],
  'Images of the data set to compare with, at most. Default: 10,000.',
)
_REFERENCE_SPLIT = flag_types.define(
  'reference_split',
  None,
  _KINDS['reference_split'],
  'Split of the data set to compare with. Default: the held-out one.',
)
_REFERENCE = flag_types.define(
  'reference',
  None,
  _KINDS['reference'],
  'Directory of images to compare with, instead of the data set.',
)
_IMAGES = flag_types.define(
  'images',
  None,
  value_types.Path('directory'),
  'Directory of images to measure, such as one that mdm_jax.sample wrote, '
  'instead of a --workdir.',
)
_RESOLUTION = flag_types.define(
  'resolution',
  None,
  _KINDS['resolution'],
  'Side in pixels, to which the centre square of each image of --images and '
  '--reference is resized. Default: as they are, all of one size.',
)
_CACHE = flag_types.define(
  'cache',
  None,
  _KINDS['cache'],
  'Directory of cached reference features. Default: '
  '~/.cache/mdm_jax/references.',
)
_OUTPUT = flag_types.define(
  'output',
  None,
  _KINDS['output'],
  'File to which metrics and settings are appended, as a line of JSON. '
  'Default: WORKDIR/eval/<stage>_<step>.jsonl, or none for --images.',
)


# What says which samples of a run are measured, and how.
_OF_RUNS = (
  *('num_samples', 'seed', 'loss_batches', 'num_reference', 'reference_split'),
  *('clip', 'i3d', 'stage', 'sigma_rel', 'best'),
  *('sampler', 'steps', 'guidance', 'threshold', 'level_offset'),
)


def _check_flags() -> None:
  """Raises ValueError if a flag is missing, or would do nothing."""
  if bool(run_flags.workdir()) == bool(_IMAGES.value):
    raise ValueError('give either --workdir, or --images and --reference.')
  if _IMAGES.value:
    flag_types.refuse(_OF_RUNS, '--images')
  elif _REFERENCE.value:
    flag_types.refuse(('num_reference', 'reference_split'), '--reference')


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  # Slow to import, and not needed for --help.
  from mdm_jax.inference import evaluation, pipeline
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache, sharding

  console.setup_logging()
  compilation_cache.enable()
  options = {
    'metrics': _METRICS.value,
    'num_samples': _NUM_SAMPLES.value,
    'seed': _SEED.value,
    'num_reference': _NUM_REFERENCE.value,
    'reference_split': _REFERENCE_SPLIT.value,
    'reference': _REFERENCE.value,
    'resolution': _RESOLUTION.value,
    'inception': _INCEPTION.value,
    'clip': _CLIP.value,
    'i3d': _I3D.value,
    'cache': _CACHE.value,
  }
  workdir, output = run_flags.workdir(), _OUTPUT.value
  try:
    _check_flags()
    if _IMAGES.value:
      mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'spatial': 1})
      batch_size = sharding.round_up(run_flags.batch_size() or 16, mesh)
      found = evaluation.evaluate_folder(
        _IMAGES.value, evaluation.make_options(options), batch_size, mesh
      )
      logging.info('%s', found)
      if output:
        found.append_to(output)
    else:
      if not output:
        value_types.check_outputs(epath.Path(workdir) / 'eval')
      model = pipeline.load(workdir, any_prompt=False, **run_flags.model())
      output = output or model.evaluations
      found = model.evaluate(
        loss_batches=_LOSS_BATCHES.value,
        output=output,
        **options,
        **run_flags.sampling(),
      )
      logging.info('%s', found)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  if output:
    logging.info('Added to %s.', output)


if __name__ == '__main__':
  cpu.use_huge_pages()
  command.run(main)
