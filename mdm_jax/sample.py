r"""Samples images from prompts with a trained model.

python -m mdm_jax.sample --workdir=runs/shapes_64 \
  --prompt="a red ring in the centre, on navy"
"""

import importlib.util
import sys
import time

from absl import flags, logging
from etils import epath

from mdm_jax.builders import ranges
from mdm_jax.inference import run_flags
from mdm_jax.runtime import (
  buckets,
  command,
  cpu,
  directory_lock,
  files,
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
  'Text file with more prompts, one on each line; with --layout=geneval its '
  'evaluation_metadata.jsonl, with --layout=coco captions_val2014.json.',
)
_LAYOUT = flag_types.define(
  'layout',
  None,
  value_types.Choice(('geneval', 'coco', 'flat')),
  'Write the finest level alone, where programs that score it look for it: '
  'geneval: the directories of GenEval, 4 samples of each prompt; coco: one '
  "sample of each of 30,000 captions of COCO's photographs, numbered; flat: "
  'samples of any prompts, numbered. Default: files of every level.',
)
_OUTPUT = flag_types.define(
  'output',
  None,
  value_types.Path('directory', output=True),
  'Directory for the samples. Those that are there of the same model, prompt, '
  'seed and sampler are not sampled again: the same command continues one that '
  'was stopped. Default: WORKDIR/generated, with --layout WORKDIR/LAYOUT.',
)
_NUM_SAMPLES = flag_types.integer(
  'num_samples',
  None,
  1,
  10**7,
  'Samples of each prompt. Default: 4, with --layout=coco 1.',
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
  value_types.RUN,
  'Working directory of a worse model, smaller or trained for shorter, that '
  'guidance leads away from instead (autoguidance).',
)
_ANIMATE = flags.DEFINE_boolean(
  'animate',
  False,
  'Also write the sampling steps of each sample as an animated WebP, with all '
  'levels side by side.',
)
_MP4 = flags.DEFINE_boolean(
  'mp4',
  False,
  'Also write each clip of the finest level as an MP4 file: pip install av.',
)
_FRAMES = flag_types.define(
  'frames',
  None,
  ranges.FRAMES,
  'Frames of each clip. More than the model was trained with are sampled in '
  'parts: the first half of each is the last half of the one before, kept by '
  'replacing what the network predicts for it at every step. Default: as many '
  'as the model was trained with.',
)
_SPATIAL = flag_types.integer(
  'spatial', 1, 1, 10**6, 'Devices that share the rows of each image.'
)
_SEED = flag_types.define(
  'seed',
  0,
  value_types.SEED,
  'Sample i of all has seed + i; with --layout=geneval that of each prompt.',
)


def main(_: list[str]) -> None:
  """Loads a model, samples, writes."""
  # Slow to import, and not needed for --help.
  from mdm_jax.inference.pipeline import OutOfMemory, load
  from mdm_jax.report import console
  from mdm_jax.runtime import compilation_cache

  console.setup_logging()
  compilation_cache.enable()
  try:
    num_samples = _NUM_SAMPLES.value or (1 if _LAYOUT.value == 'coco' else 4)
    prompts, layout = _prompts(num_samples)
    output = _output(run_flags.workdir())
    value_types.check_outputs(output)
    model = load(
      run_flags.workdir(), spatial=_SPATIAL.value, **run_flags.model()
    )
    _check_mp4(model.model.stage)
    seed = _SEED.value
    if _LAYOUT.value == 'geneval':  # As its own program has it.
      seed = [seed] * len(prompts)
    request = model.request(
      [about['prompt'] for about in prompts],
      num_samples=num_samples,
      seed=seed,
      negative_prompt=_NEGATIVE.value,
      guide=_GUIDE.value,
      frames=_FRAMES.value,
      **run_flags.sampling(),
    )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  begin = time.monotonic()
  try:
    with directory_lock.holding(output):
      count = _sample(output, prompts, layout, model.model, request)
  except OutOfMemory as error:
    sys.exit(f'error: {error} Finished samples are kept.')
  except buckets.errors() as error:
    if files.is_local(output):
      raise
    reason = ' '.join(str(error).split())
    sys.exit(f'error: {output}: {reason}. Finished samples are kept.')
  logging.info(
    'Sampled %d images in %s: %s',
    count,
    console.duration(time.monotonic() - begin),
    output / 'index.html',
  )


def _prompts(num_samples: int):
  """What is to be sampled.

  Args:
    num_samples: of each prompt.

  Returns:
    For each prompt a dict with it as 'prompt', and with what its benchmark says
    of it; and the `layouts.Layout`, or None.

  Raises:
    ValueError, OSError: there is nothing to sample, or flags that exclude each
      other.
  """
  from mdm_jax.data import benchmarks, lines
  from mdm_jax.report import layouts

  name, path = _LAYOUT.value, _PROMPTS_FILE.value
  for flag in (_ANIMATE, _MP4):
    if name and flag.value:
      raise ValueError(
        f'--{flag.name} writes files that --layout has no place for: leave one '
        'of them out.'
      )
  if name in ('geneval', 'coco') and (_PROMPTS.value or not path):
    raise ValueError(
      f'--layout={name} takes its prompts from --prompts_file alone: give '
      + (
        "prompts/evaluation_metadata.jsonl of GenEval's repository."
        if name == 'geneval'
        else "captions_val2014.json of COCO's annotations_trainval2014.zip."
      )
    )
  if name == 'geneval':
    texts, metadata = benchmarks.read_geneval(path)
    prompts = [
      {'prompt': text, 'metadata': line} for text, line in zip(texts, metadata)
    ]
    layout = layouts.geneval(num_samples, metadata)
  elif name == 'coco':
    prompts, layout = benchmarks.choose_coco(path), layouts.numbered(name)
  else:
    texts = [*_PROMPTS.value, *(lines.read_entries(path) if path else ())]
    prompts = [{'prompt': text} for text in texts]
    layout = layouts.numbered(name) if name else None
  if not prompts:
    raise ValueError('nothing to sample: give --prompt or --prompts_file.')
  return prompts, layout


def _check_mp4(stage) -> None:
  """Raises ValueError if --mp4 asks for what cannot be written."""
  if not _MP4.value:
    return
  if len(stage.model.image_shapes[-1]) == 3:
    raise ValueError(
      f'--mp4: {stage.title} has images, not clips: leave it out.'
    )
  if _FRAMES.value == 1:
    raise ValueError('--mp4: --frames=1 is an image, no clip: leave one out.')
  if importlib.util.find_spec('av') is None:
    raise ValueError('--mp4 needs PyAV: pip install av')


def _sample(output, prompts, layout, model, request) -> int:
  """Samples what is missing in the output directory.

  Args:
    output: the directory.
    prompts, layout: see `_prompts`.
    model: a `session.Model`.
    request: a `pipeline.Request`.

  Returns:
    The number of new samples.
  """
  from mdm_jax.report.sample_directory import SampleDirectory

  repeats = len(request.seeds) // len(prompts)
  about = (each for each in prompts for _ in range(repeats))
  flags_of_files = (('path', _ANIMATE), ('mp4', _MP4))
  try:
    samples = SampleDirectory(
      output,
      [
        {**each, 'seed': seed, **model.description, **request.settings}
        for each, seed in zip(about, request.seeds)
      ],
      layout,
      needed=[name for name, flag in flags_of_files if flag.value],
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  rows = samples.missing
  if len(rows) < len(request.seeds):
    logging.info(
      '%d of %d samples exist already.',
      len(request.seeds) - len(rows),
      len(request.seeds),
    )
  # Of each sample the levels at its steps; the last ones are the sample.
  for row, steps in zip(rows, request.sample(rows, _ANIMATE.value)):
    path = steps if _ANIMATE.value else None
    samples.add(row, steps[-1], path, _MP4.value)
  samples.finish(
    {
      'Model': {'workdir': model.workdir, **model.description},
      'Sampler': request.settings,
    }
  )
  return len(rows)


def _output(workdir: str) -> epath.Path:
  """The directory of the samples."""
  return epath.Path(
    _OUTPUT.value or epath.Path(workdir) / (_LAYOUT.value or 'generated')
  )


if __name__ == '__main__':
  cpu.use_huge_pages()
  flags.mark_flag_as_required('workdir')
  command.run(main)
