"""Samples images from prompts with a trained model.

python -m mdm_jax.sample --workdir=runs/shapes_64 --prompt="a red ring"
"""

import pathlib
import sys
import time
from typing import Any

from absl import flags, logging

from mdm_jax.inference import run_flags
from mdm_jax.runtime import (
  command,
  cpu,
  directory_lock,
  flag_types,
  value_types,
)

_PROMPTS = flag_types.define_repeated(
  'prompt', [], value_types.Text(), 'Prompt to sample; may be repeated.'
)
_PROMPTS_FILE = flag_types.define(
  'prompts_file',
  None,
  value_types.Path('text'),
  'Text file with more prompts, one on each line.',
)
_OUTPUT = flag_types.define(
  'output',
  None,
  value_types.Path('directory', output=True),
  'Directory for the samples. Those that are there of the same model, prompt, '
  'seed and sampler are not sampled again: the same command continues one that '
  'was stopped. Default: WORKDIR/generated.',
)
_NUM_SAMPLES = flag_types.integer(
  'num_samples', 4, 1, 10**7, 'Samples of each prompt.'
)
_NEGATIVE = flag_types.define(
  'negative_prompt',
  '',
  value_types.Text(),
  'Text that guidance leads away from.',
)
_GUIDE = flag_types.define(
  'guide',
  None,
  value_types.Path('directory'),
  'Working directory of a worse model, smaller or trained for shorter, that '
  'guidance leads away from instead (autoguidance).',
)
_ANIMATE = flags.DEFINE_boolean(
  'animate',
  False,
  'Also write the sampling steps of each sample as an animated WebP, with all '
  'levels side by side.',
)
_SPATIAL = flag_types.integer(
  'spatial', 1, 1, 10**6, 'Devices that share the rows of each image.'
)
_SEED = flag_types.define(
  'seed', 0, value_types.SEED, 'Sample i of a prompt has seed + i.'
)


def main(_: list[str]) -> None:
  """Restores a model, samples, writes."""
  # Slow to import, and not needed for --help.
  import jax

  from mdm_jax.builders.prompts import encode_prompts
  from mdm_jax.data.lines import read_entries
  from mdm_jax.inference.session import open_run
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  try:
    prompts = list(_PROMPTS.value)
    if _PROMPTS_FILE.value:
      prompts += read_entries(_PROMPTS_FILE.value)
    if not prompts:
      raise ValueError('nothing to sample: give --prompt or --prompts_file.')
    if _GUIDE.value and _NEGATIVE.value:
      raise ValueError(
        'guidance leads away from one thing: give --guide or --negative_prompt.'
      )
    value_types.check_seeds('--seed', _SEED.value, _NUM_SAMPLES.value)
    value_types.check_outputs(_output(run_flags.workdir()))
    session = open_run(
      run_flags.workdir(),
      any_prompt=True,
      num_images=len(prompts) * _NUM_SAMPLES.value,
      spatial=_SPATIAL.value,
      **run_flags.options(),
    )
    text = encode_prompts(session.config, prompts)
    (negative,) = encode_prompts(session.config, [_NEGATIVE.value])
    model = session.restore()
    guide = None
    if _GUIDE.value:
      guide = session.restore_guide(model, _GUIDE.value)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  begin = time.monotonic()
  output = _output(model.workdir)
  try:
    with directory_lock.holding(output):
      count = _sample(output, model, guide, prompts, text, negative)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    sys.exit(
      'error: memory does not suffice for '
      f'{session.config.eval.batch_size} images at once: give a smaller '
      '--batch_size; finished samples are kept.'
    )
  logging.info(
    'Sampled %d images in %s: %s',
    count,
    console.duration(time.monotonic() - begin),
    pathlib.Path(output) / 'index.html',
  )


def _sample(output, model, guide, prompts, text, negative) -> int:
  """Samples what is missing in the output directory.

  Args:
    output: the directory.
    model: a `session.Model`.
    guide: another, or None.
    prompts: texts.
    text: [N, ...] the prompts as the text encoder reads them.
    negative: [...] the negative prompt as the text encoder reads it.

  Returns:
    The number of new samples.
  """
  import jax
  import numpy as np
  import tqdm

  from mdm_jax.report.sample_directory import SampleDirectory
  from mdm_jax.steps.sample import make_sample_batches

  settings = _settings(model, guide)
  samples = SampleDirectory(
    output,
    [
      {
        'prompt': prompt,
        'seed': _SEED.value + i,
        **model.description,
        **settings,
      }
      for prompt in prompts
      for i in range(_NUM_SAMPLES.value)
    ],
  )
  rows = np.array(samples.missing, int)
  total = len(prompts) * _NUM_SAMPLES.value
  if len(rows) < total:
    logging.info('%d of %d samples exist already.', total - len(rows), total)
  params = model.params | ({'guide': guide.params} if guide else {})
  batch_size = model.stage.config.eval.batch_size
  sample_batches = make_sample_batches(
    model.stage.make_sampler(model.mesh, guide and guide.stage.model),
    negative,
    batch_size,
    jax.tree.map(lambda x: x.sharding, params),
    path=_ANIMATE.value,
  )
  batches = sample_batches(
    params,
    text[rows // _NUM_SAMPLES.value],
    _SEED.value + rows % _NUM_SAMPLES.value,
  )
  left = iter(rows.tolist())
  with tqdm.tqdm(
    total=len(rows),
    unit='image',
    smoothing=0,
    disable=len(rows) <= batch_size,
  ) as bar:
    for batch in batches:
      # Of each sample the images of its steps; the last ones are the sample.
      for *path, levels in zip(*(zip(*images) for images in batch)):
        samples.add(next(left), levels, [*path, levels] if path else None)
        bar.update()
  samples.finish(
    {
      'Model': {'workdir': model.workdir, **model.description},
      'Sampler': settings,
    }
  )
  return len(rows)


def _settings(model, guide) -> dict[str, Any]:
  """What samples depend on beside prompt, seed and model."""
  settings = {
    **model.stage.config.sampler.to_dict(),
    'negative_prompt': _NEGATIVE.value,
  }
  # Samples of older versions, which were rounded, go on without the key.
  if settings['pixels'] == 'round':
    del settings['pixels']
  return settings | ({'guide': guide.description} if guide else {})


def _output(workdir: str) -> pathlib.Path:
  """The directory of the samples."""
  return pathlib.Path(_OUTPUT.value or pathlib.Path(workdir, 'generated'))


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('workdir')
  command.run(main)
