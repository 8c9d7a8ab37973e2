"""Draws pictures from prompts with a trained model.

python -m mdm_jax.sample --workdir=runs/shapes_64 --prompt="a red ring"
"""

import pathlib
import sys
import time

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the training run.', required=True
)
_PROMPTS = flags.DEFINE_multi_string(
  'prompt', [], 'What to draw; may be repeated.'
)
_PROMPTS_FILE = flags.DEFINE_string(
  'prompts_file', None, 'A text file with more prompts, one a line.'
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'Receives the pictures. Those that are there of the same '
  'model, prompt, seed and sampler are not drawn again: the same command '
  'continues one that was stopped. Default: WORKDIR/drawn.',
)
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples', 4, 'Pictures of each prompt.', lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  'steps', None, 'Sampling steps. Default: as in the config.'
)
_SAMPLER = flags.DEFINE_enum(
  'sampler',
  None,
  ['ddim', 'ddpm', 'heun', 'dpm', 'dpm_sde'],
  'Default: as in the config.',
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, 'Guidance weight, 1 is none. Default: as in the config.'
)
_THRESHOLD = flags.DEFINE_enum(
  'threshold',
  None,
  ['none', 'clip', 'dynamic', 'dynamic_if'],
  'What keeps predicted images in range. Default: as in the config.',
)
_NEGATIVE = flags.DEFINE_string(
  'negative_prompt', '', 'What guidance is to lead away from.'
)
_GUIDE = flags.DEFINE_string(
  'guide',
  None,
  'Working directory of a worse model, smaller or trained for '
  'shorter, that guidance is to lead away from instead (autoguidance).',
)
_WIDTH = flags.DEFINE_float(
  'width',
  None,
  'Of the average of the weights, where training has kept '
  'snapshots: see docs/averages.md. Default: the decaying average.',
)
_BEST = flags.DEFINE_boolean(
  'best', False, 'Draw with the average that training has kept as the best.'
)
_ANIMATE = flags.DEFINE_boolean(
  'animate',
  False,
  'Also write how each picture comes about, a WebP with '
  'all levels side by side.',
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Pictures drawn at once, over all devices. Default: '
  'eval.batch_size of the config.',
  lower_bound=1,
)
_SPATIAL = flags.DEFINE_integer(
  'spatial',
  1,
  'Devices that draw each picture together, rows of it each.',
  lower_bound=1,
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Sample i of a prompt has seed + i.', lower_bound=0
)


def main(argv: list[str]) -> None:
  """Restores, draws, writes."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Slow to import, and not needed for --help.
  import jax
  import numpy as np
  import tqdm

  from mdm_jax import (
    build,
    checkpoint,
    checks,
    compilation_cache,
    draw,
    inputs,
    metrics,
    sharding,
    trained,
  )
  from mdm_jax.eval.pictures import Pictures

  metrics.setup_logging()
  compilation_cache.enable()
  try:
    config = build.reading_prompts(
      build.load_config(checkpoint.read_config(_WORKDIR.value))
    )
    changes = {
      'num_steps': _STEPS.value,
      'name': _SAMPLER.value,
      'guidance': _GUIDANCE.value,
      'threshold': _THRESHOLD.value,
    }
    config.sampler.update(
      {name: value for name, value in changes.items() if value is not None}
    )
    prompts = _PROMPTS.value + _read_lines(_PROMPTS_FILE.value)
    if not prompts:
      raise ValueError('nothing to draw: give --prompt or --prompts_file.')
    # Whatever it was trained on, here there may be other devices.
    config.mesh.update(data=-1, fsdp=1, spatial=_SPATIAL.value)
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.batch_shards(mesh)
    count = len(prompts) * _NUM_SAMPLES.value
    batch_size = config.eval.batch_size = min(
      _BATCH_SIZE.value or config.eval.batch_size, -(-count // shards) * shards
    )
    checks.check(config, mesh)
    text = inputs.encode_prompts(config, prompts)
    (negative,) = inputs.encode_prompts(config, [_NEGATIVE.value])
    average = trained.restore_average(
      config, _WORKDIR.value, mesh, width=_WIDTH.value, best=_BEST.value
    )
    params = average.params | build.load_frozen(config, mesh)
    settings = {**config.sampler.to_dict(), 'negative_prompt': _NEGATIVE.value}
    guide = None
    if _GUIDE.value:
      if _NEGATIVE.value:
        raise ValueError(
          'guidance leads away from one thing: give --guide or '
          '--negative_prompt.'
        )
      guide, params['guide'], settings['guide'] = trained.restore_guide(
        config, average.index, _GUIDE.value, mesh
      )
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')

  trained.warn_if_unfinished(config, average, _BEST.value)
  model = trained.describe(
    config, _WORKDIR.value, average, width=_WIDTH.value, best=_BEST.value
  )
  pictures = Pictures(
    _OUTPUT.value or pathlib.Path(_WORKDIR.value) / 'drawn',
    [
      # As JSON has it: sequences are lists there.
      {
        'prompt': prompt,
        'seed': _SEED.value + i,
        **model,
        **{
          name: list(value) if isinstance(value, tuple) else value
          for name, value in settings.items()
        },
      }
      for prompt in prompts
      for i in range(_NUM_SAMPLES.value)
    ],
  )
  rows = np.array(pictures.missing, int)
  if len(rows) < count:
    logging.info(
      '%d of %d pictures are there already.', count - len(rows), count
    )
  draw_batches = draw.make_draw_batches(
    build.make_painter(config, config.stages[average.index], mesh, guide),
    negative,
    batch_size,
    jax.tree.map(lambda x: x.sharding, params),
    path=_ANIMATE.value,
  )
  begin = time.monotonic()
  batches = draw_batches(
    params,
    text[rows // _NUM_SAMPLES.value],
    _SEED.value + rows % _NUM_SAMPLES.value,
  )
  left = iter(rows.tolist())
  try:
    with tqdm.tqdm(
      total=len(rows),
      unit='picture',
      smoothing=0,
      disable=len(rows) <= batch_size,
    ) as bar:
      for batch in batches:
        # Of each picture what its steps have shown, and itself at last.
        for *path, levels in zip(*(zip(*images) for images in batch)):
          pictures.add(next(left), levels, [*path, levels] if path else None)
          bar.update()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    sys.exit(
      f'error: memory does not suffice for {batch_size} pictures at '
      'once: give a smaller --batch_size; what is drawn is kept.'
    )
  pictures.finish(
    {'Model': {'workdir': _WORKDIR.value, **model}, 'Sampler': settings}
  )
  logging.info(
    'Drew %d pictures in %s: %s',
    len(rows),
    metrics.duration(time.monotonic() - begin),
    pictures.directory / 'index.html',
  )


def _read_lines(path: str | None) -> list[str]:
  if path is None:
    return []
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text in UTF-8.') from error
  return [line.strip() for line in lines if line.strip()]


if __name__ == '__main__':
  app.run(main)
