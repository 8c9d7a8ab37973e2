"""Draws pictures from prompts with a trained model.

  python -m mdm_jax.sample --workdir=runs/shapes_64 --prompt="a red ring"
"""

import json
import pathlib
import sys
import time

from absl import app, flags, logging

_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Of the training run.', required=True)
_PROMPTS = flags.DEFINE_multi_string(
    'prompt', None, 'What to draw; may be repeated.', required=True)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'Receives the pictures. Default: WORKDIR/drawn.')
_NUM_SAMPLES = flags.DEFINE_integer(
    'num_samples', 4, 'Pictures of each prompt.', lower_bound=1)
_STEPS = flags.DEFINE_integer(
    'steps', None, 'Sampling steps. Default: as in the config.')
_SAMPLER = flags.DEFINE_enum(
    'sampler', None, ['ddim', 'ddpm', 'heun', 'dpm', 'dpm_sde'],
    'Default: as in the config.')
_GUIDANCE = flags.DEFINE_float(
    'guidance', None, 'Guidance weight, 1 is none. Default: as in the config.')
_NEGATIVE = flags.DEFINE_string(
    'negative_prompt', '', 'What guidance is to lead away from.')
_SPATIAL = flags.DEFINE_integer(
    'spatial', 1, 'Devices that draw each picture together, rows of it each.',
    lower_bound=1)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'Sample i of a prompt has seed + i.', lower_bound=0)


def main(argv: list[str]) -> None:
  """Restores, draws, writes."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  # Slow to import, and not needed for --help.
  from mdm_jax import (
    build,
    checkpoint,
    checks,
    compilation_cache,
    inputs,
    metrics,
    sharding,
    trained,
  )
  from mdm_jax.eval import grid

  metrics.setup_logging()
  compilation_cache.enable()
  try:
    config = build.reading_prompts(
        build.load_config(checkpoint.read_config(_WORKDIR.value)))
    changes = {'num_steps': _STEPS.value, 'name': _SAMPLER.value,
               'guidance': _GUIDANCE.value}
    config.sampler.update(
        {name: value for name, value in changes.items() if value is not None})
    prompts = [prompt for prompt in _PROMPTS.value
               for _ in range(_NUM_SAMPLES.value)]
    # Whatever it was trained on, here there may be other devices.
    config.mesh.update(data=-1, fsdp=1, spatial=_SPATIAL.value)
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.batch_shards(mesh)
    config.eval.batch_size = min(
        config.eval.batch_size, -(-len(prompts) // shards) * shards)
    checks.check(config, mesh)
    text = inputs.encode_prompts(config, prompts)
    (negative,) = inputs.encode_prompts(config, [_NEGATIVE.value])
    index, params = trained.restore_average(config, _WORKDIR.value, mesh)
    params |= build.load_frozen(config, mesh)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  draw = trained.make_draw(config, index, mesh, params, negative)
  begin = time.monotonic()
  seeds = [_SEED.value + i for i in range(_NUM_SAMPLES.value)
           ] * len(_PROMPTS.value)
  pictures = draw(params, text, seeds)

  output = pathlib.Path(
      _OUTPUT.value or pathlib.Path(_WORKDIR.value) / 'drawn')
  output.mkdir(parents=True, exist_ok=True)
  grid.save_png(output / 'grid.png', grid.grid(pictures, prompts))
  with (output / 'samples.jsonl').open('w') as lines:
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
      files = {}
      for level in pictures:
        resolution = level.shape[1]
        files[resolution] = f'{i:04d}_{resolution}.png'
        grid.save_png(output / files[resolution], level[i])
      lines.write(json.dumps({
          'prompt': prompt, 'negative_prompt': _NEGATIVE.value, 'seed': seed,
          'files': files,
          **config.sampler.to_dict()}) + '\n')
  logging.info('Drew %d pictures in %s: %s', len(prompts),
               metrics.duration(time.monotonic() - begin),
               output / 'grid.png')


if __name__ == '__main__':
  app.run(main)
