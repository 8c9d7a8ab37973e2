"""Samples images from prompts with a trained model.

python -m mdm_jax.sample --workdir=runs/shapes_64 --prompt="a red ring on navy"
"""

import sys
import time

from absl import flags, logging
from etils import epath

from mdm_jax.inference import run_flags
from mdm_jax.runtime import (
  command,
  cpu,
  directory_lock,
  flag_types,
  value_types,
)

_PROMPTS = flag_types.define_repeated(
  'prompt', [], value_types.Text(), 'Prompt to sample'
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
  """Loads a model, samples, writes."""
  # Slow to import, and not needed for --help.
  from mdm_jax.data.lines import read_entries
  from mdm_jax.inference.pipeline import OutOfMemory, load
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
    output = _output(run_flags.workdir())
    value_types.check_outputs(output)
    model = load(
      run_flags.workdir(), spatial=_SPATIAL.value, **run_flags.weights()
    )
    request = model.request(
      prompts,
      num_samples=_NUM_SAMPLES.value,
      seed=_SEED.value,
      negative_prompt=_NEGATIVE.value,
      guide=_GUIDE.value,
      **run_flags.sampling(),
    )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  begin = time.monotonic()
  try:
    with directory_lock.holding(output):
      count = _sample(output, model.model, request)
  except OutOfMemory as error:
    sys.exit(f'error: {error} Finished samples are kept.')
  logging.info(
    'Sampled %d images in %s: %s',
    count,
    console.duration(time.monotonic() - begin),
    output / 'index.html',
  )


def _sample(output, model, request) -> int:
  """Samples what is missing in the output directory.

  Args:
    output: the directory.
    model: a `session.Model`.
    request: a `pipeline.Request`.

  Returns:
    The number of new samples.
  """
  from mdm_jax.report.sample_directory import SampleDirectory

  samples = SampleDirectory(
    output,
    [
      {'prompt': prompt, 'seed': seed, **model.description, **request.settings}
      for prompt, seed in zip(request.prompts, request.seeds)
    ],
  )
  rows = samples.missing
  if len(rows) < len(request.seeds):
    logging.info(
      '%d of %d samples exist already.',
      len(request.seeds) - len(rows),
      len(request.seeds),
    )
  # Of each sample the levels at its steps; the last ones are the sample.
  for row, steps in zip(rows, request.sample(rows, _ANIMATE.value)):
    samples.add(row, steps[-1], steps if _ANIMATE.value else None)
  samples.finish(
    {
      'Model': {'workdir': model.workdir, **model.description},
      'Sampler': request.settings,
    }
  )
  return len(rows)


def _output(workdir: str) -> epath.Path:
  """The directory of the samples."""
  return epath.Path(_OUTPUT.value or epath.Path(workdir) / 'generated')


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('workdir')
  command.run(main)
