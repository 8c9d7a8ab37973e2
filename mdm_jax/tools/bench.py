"""Measures how fast a config trains and draws on the devices that are there.

  python -m mdm_jax.tools.bench --config=configs/shapes_64.py
  python -m mdm_jax.tools.bench --config=configs/cc12m_64.py --batch_size=128 \
      --output=new.json --compare=old.json --profile=DIR

Images and text are drawn, so that no data set is needed, and no T5: without
config.text.path its features are replaced by as many of the same width. The
step is the one that training compiles.
"""

import collections
from collections.abc import Callable
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

from absl import app, flags
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
import numpy as np

from mdm_jax import (
  build,
  checks,
  compilation_cache,
  cpu,
  draw,
  inputs,
  metrics,
  sharding,
)
from mdm_jax import step as steps

_T5_WIDTH = 2048  # Of google/flan-t5-xl, which the recipes use.
_PROFILED = 3
_TOP = 10
_WIDTH = 100


def without_t5(config: ConfigDict) -> ConfigDict:
  """The config with features of a T5's width instead of a T5 on disk.

  Each token looks the same vector up, so the network's work is as it was and
  the encoder's none, as if the features had been computed before.
  """
  config = config.copy_and_resolve_references()
  if config.text.encoder in ('t5', 'precomputed') and not config.text.path:
    config.data.name = 'shapes'
    config.text.update(
      encoder='label', num_classes=1, class_names='', width=_T5_WIDTH
    )
  return config


def make_batch(config: ConfigDict, stage: ConfigDict) -> dict[str, np.ndarray]:
  """A drawn batch of the stage's shapes, see `step.Batch`."""
  rng = np.random.default_rng(0)
  text = make_text(config, stage.batch_size)
  batch = {
    name: rng.integers(0, 256, x.shape, x.dtype)
    if x.dtype == np.uint8
    else np.zeros(x.shape, x.dtype)
    for name, x in build.batch_shapes(
      config, stage, jax.ShapeDtypeStruct(text.shape, text.dtype)
    ).items()
  }
  sizes = np.full_like(batch['scale'], build.resolutions(config, stage)[-1])
  return batch | {'text': text, 'scale': sizes}


def make_text(config: ConfigDict, count: int) -> np.ndarray:
  """Texts of full length, as the text encoder reads them: [count, L, ...]."""
  rng = np.random.default_rng(1)
  empty = inputs.empty_text(config)
  if empty.ndim > 1:
    return rng.standard_normal((count, *empty.shape), empty.dtype)
  vocab_size = inputs.make_tokenizer(config).vocab_size
  return rng.integers(
    1, vocab_size, (count, config.text.max_length), empty.dtype
  )


def time_calls(call: Callable[[], jax.Array], count: int) -> np.ndarray:
  """Seconds between the ends of successive calls, one of them always ahead.

  Args:
    call: starts the work, and returns what is ready when it is done.
    count: how many are timed, after two that are not.

  Returns:
    float64 [count].
  """
  for _ in range(2):
    call().block_until_ready()
  ends, ahead = [time.perf_counter()], call()
  for _ in range(count):
    pending, ahead = ahead, call()
    pending.block_until_ready()
    ends.append(time.perf_counter())
  ahead.block_until_ready()
  return np.diff(ends)


def compile_step(jitted: Any, *args) -> tuple[jax.stages.Compiled, dict]:
  """A program, and how long it took to have it."""
  hits = []

  def listen(event, **_):
    if event == '/jax/compilation_cache/cache_hits':
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  begin = time.perf_counter()
  lowered = jitted.lower(*args)
  middle = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  jax.monitoring.unregister_event_listener(listen)
  memory = compiled.memory_analysis()
  return compiled, {
    'trace_seconds': middle - begin,
    'compile_seconds': end - middle,
    'from_cache': bool(hits),
    'program_bytes': (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    ),
  }


def rates(
  seconds: np.ndarray, images: float, flops: float | None, peak: float | None
) -> dict[str, float | None]:
  """What follows from the times of steps.

  Args:
    seconds: of each step.
    images: that a step trains on or, in part, draws.
    flops: of a step on each device, if known.
    peak: FLOP/s of a device, if known.
  """
  median = float(np.median(seconds))
  per_second = flops and flops / median
  return {
    'step_seconds': median,
    'step_seconds_min': float(seconds.min()),
    'step_seconds_p10': float(np.quantile(seconds, 0.1)),
    'step_seconds_p90': float(np.quantile(seconds, 0.9)),
    'images_per_second': images / median,
    'device_flops': flops,
    'device_flops_per_second': per_second,
    'mfu': per_second and peak and per_second / peak,
  }


def bench_train(
  config: ConfigDict, stage: ConfigDict, mesh: Mesh, frozen: Any
) -> tuple[Callable, jax.stages.Compiled, dict]:
  """The train step -> a call of it, its program, what compiling took."""
  model = build.make_model(config, stage)
  optimizer, _ = build.make_optimizer(config, stage)

  def make_state(params):
    return steps.new_state(params, optimizer, config.averages.widths)

  shardings = sharding.tree_shardings(
    jax.eval_shape(make_state, model.shapes(config.text.max_length)),
    mesh,
    config.sharding_rules,
  )
  state = jax.jit(make_state, out_shardings=shardings)(
    sharding.place(model.init(0, config.text.max_length), shardings.params)
  )
  batch = sharding.shard_batch(make_batch(config, stage), mesh)
  train_step = build.make_train_step(
    config, stage, inputs.empty_text(config), seed=0
  )
  compiled, found = compile_step(
    steps.jit_train_step(train_step, state, batch, frozen), state, batch, frozen
  )

  def call():
    nonlocal state
    state, values = compiled(state, batch, frozen)
    return values['loss']

  return call, compiled, found


def bench_sample(
  config: ConfigDict, stage: ConfigDict, mesh: Mesh, frozen: Any
) -> tuple[Callable, jax.stages.Compiled, dict]:
  """Likewise of drawing `eval.batch_size` pictures."""
  model = build.make_model(config, stage)
  painter = build.make_painter(config, stage, mesh)
  params = model.init(0, config.text.max_length)
  params = (
    sharding.place(
      params, sharding.tree_shardings(params, mesh, config.sharding_rules)
    )
    | frozen
  )
  count = config.eval.batch_size
  text = make_text(config, count)
  placed = sharding.shard_batch(
    {
      'text': text,
      'negative': text,
      'seeds': np.arange(count, dtype=np.uint32),
    },
    mesh,
  )
  arguments = (params, placed['text'], placed['negative'], placed['seeds'])
  compiled, found = compile_step(
    draw.jit_sample(painter, jax.tree.map(lambda x: x.sharding, params)),
    *arguments,
  )
  return lambda: compiled(*arguments)[-1], compiled, found


def measure(
  config: ConfigDict,
  stage: ConfigDict,
  mesh: Mesh,
  *,
  count: int,
  sampling_steps: int,
  profile: str = '',
) -> dict[str, dict[str, Any]]:
  """Times the train and the sample step.

  Args:
    config: of the run, checked.
    stage: of the run.
    mesh: the devices.
    count: steps that are timed.
    sampling_steps: network steps of the drawing that is timed; those of a
      whole one are as long each.
    profile: a directory for a trace of a few steps, '' for none.

  Returns:
    'train' and 'sample', each name -> figure; a 'sample' step is one of the
    sampler's.
  """
  device = mesh.devices.flat[0]
  peak = metrics.peak_flops(device)
  frozen = build.load_frozen(config, mesh)
  whole = config.sampler.num_steps
  short = config.copy_and_resolve_references()
  short.sampler.num_steps = min(sampling_steps, whole)
  found = {}
  for name, make, loops, images, per_call in (
    (
      'train',
      lambda: bench_train(config, stage, mesh, frozen),
      stage.accumulate,
      stage.batch_size,
      1,
    ),
    (
      'sample',
      lambda: bench_sample(short, stage, mesh, frozen),
      1,
      config.eval.batch_size / whole,
      short.sampler.num_steps,
    ),
  ):
    call, compiled, compiling = make()
    seconds = time_calls(call, count) / per_call
    found[name] = compiling | rates(
      seconds, images, metrics.flops_per_step(compiled, loops), peak
    )
    memory = device.memory_stats()
    found[name]['peak_bytes'] = memory and memory.get('peak_bytes_in_use')
    if profile:
      with jax.profiler.trace(f'{profile}/{name}', create_perfetto_trace=True):
        for _ in range(_PROFILED):
          call().block_until_ready()
      found[name]['operations'] = operations(
        f'{profile}/{name}', compiled.as_text()
      )
  return found


def operations(directory: str, program: str) -> list[dict[str, Any]]:
  """The operations that a trace shows most time in, longest first.

  Args:
    directory: of the trace.
    program: its HLO text, which says what an operation was made of.
  """
  (path, *_) = sorted(
    pathlib.Path(directory).rglob('*.xplane.pb'), reverse=True
  )
  seconds = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        # Those that only hold others would count them twice.
        if not event.name.startswith(('while', 'call', 'conditional')) and any(
          key == 'hlo_op' and value == event.name for key, value in event.stats
        ):
          seconds[event.name] += event.duration_ns * 1e-9
  total = sum(seconds.values())
  return [
    {'name': name, 'share': value / total, 'origin': _origin(name, program)}
    for name, value in seconds.most_common(_TOP)
  ]


def _origin(name: str, program: str) -> str:
  """What an operation was made of: its place in the network, or its shape."""
  found = re.search(
    rf'%{re.escape(name)} = (\S+ [\w-]+\().*?(op_name="[^;"]*|$)',
    program,
    re.MULTILINE,
  )
  if not found:
    return ''
  shape, path = found.groups()
  return '/'.join(path.split('/')[1:])[:_WIDTH] or f'{shape}…)'


_ROWS = (
  ('step_seconds', 'step, s (median)'),
  ('step_seconds_p10', '… 10 %'),
  ('step_seconds_p90', '… 90 %'),
  ('step_seconds_min', '… shortest'),
  ('images_per_second', 'images/s'),
  ('device_flops', 'FLOP a step and device'),
  ('device_flops_per_second', 'FLOP/s of a device'),
  ('mfu', '… of its peak (MFU)'),
  ('program_bytes', 'memory of the program, bytes'),
  ('peak_bytes', 'peak memory of the device, bytes'),
  ('trace_seconds', 'tracing, s'),
  ('compile_seconds', 'compiling, s'),
)


def describe(found: dict) -> str:
  """What was measured where, in a few lines."""
  mesh = ', '.join(f'{name} {size}' for name, size in found['mesh'].items())
  peak = found['peak_flops']
  lines = [
    f"{found['config']}, stage '{found['stage']}': {found['batch_size']} "
    f'images a step, {found["pictures"]} pictures at once, {found["dtype"]}',
    f'{math.prod(found["mesh"].values())} x {found["device"]} ({mesh}), JAX '
    f'{found["jax"]}',
    'peak of each: '
    + (f'{peak:.3g} FLOP/s' if peak else 'unknown')
    + (
      ', measured with a matrix product'
      if found['device'] == 'cpu'
      else ' in bfloat16, by its vendor'
      if peak
      else ''
    ),
  ]
  if found['text_features_drawn']:
    lines.append(
      f'no text.path: drawn features of width {_T5_WIDTH}, no encoder'
    )
  return '\n'.join(lines)


def report(found: dict, other: dict | None) -> str:
  """Tables of the figures; beside another run's, and their ratio, if given."""
  parts = []
  for name in ('train', 'sample'):
    rows = []
    for key, title in _ROWS:
      value = found[name][key]
      row = [title, value]
      if other is not None:
        old = other[name].get(key)
        row += [old, value / old if value and old else None]
      rows.append(row)
    header = [name, 'this'] + (['other', 'ratio'] if other else [])
    parts.append(metrics.table(rows, header))
    if found[name]['from_cache']:
      parts.append('Compiled before: read from the cache.')
    if 'operations' in found[name]:
      parts.append(
        metrics.table(
          [
            [row['name'], f'{row["share"]:.1%}', row['origin']]
            for row in found[name]['operations']
          ],
          ['operation', 'share', 'of'],
        )
      )
  return '\n\n'.join(parts)


def main(argv: list[str]) -> None:
  """Flags to tables."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  values = flags.FLAGS
  metrics.setup_logging()
  compilation_cache.enable()
  try:
    other = values.compare and json.loads(
      pathlib.Path(values.compare).read_text()
    )
    config = without_t5(values.config)
    indices = range(len(config.stages))
    if values.stage is not None and values.stage not in indices:
      raise ValueError(
        f'--stage={values.stage}: the config has stages 0 to {indices[-1]}.'
      )
    stage = config.stages[-1 if values.stage is None else values.stage]
    if values.batch_size:
      stage.batch_size = config.eval.batch_size = values.batch_size
    config.stages = [stage]
    cpu.use_cores(checks.parts_of_batches(config))
    mesh = sharding.make_mesh(config.mesh)
    checks.check(config, mesh)
    found = measure(
      config,
      stage,
      mesh,
      count=values.steps,
      sampling_steps=values.sampling_steps,
      profile=values.profile,
    )
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')
  device = mesh.devices.flat[0]
  found |= {
    'config': config_flags.get_config_filename(flags.FLAGS['config']),
    'stage': stage.name,
    'batch_size': stage.batch_size,
    'pictures': config.eval.batch_size,
    'dtype': config.dtype,
    'mesh': dict(mesh.shape),
    'device': device.device_kind,
    'text_encoder': values.config.text.encoder,
    'text_features_drawn': config.text.encoder != values.config.text.encoder,
    'peak_flops': metrics.peak_flops(device),
    'jax': jax.__version__,
  }
  print(describe(found) + '\n\n' + report(found, other))
  if values.output:
    pathlib.Path(values.output).write_text(json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  cpu.use_huge_pages()
  # Here, so that importing this module leaves other programs' flags alone.
  config_flags.DEFINE_config_file(
    'config', None, 'A recipe, as for mdm_jax.main.', lock_config=True
  )
  flags.DEFINE_integer('stage', None, 'From 0. Default: the last.')
  flags.DEFINE_integer(
    'batch_size',
    None,
    'Images a step, and pictures drawn at once. Default: '
    "the stage's, and eval.batch_size.",
    lower_bound=1,
  )
  flags.DEFINE_integer('steps', 20, 'That are timed.', lower_bound=1)
  flags.DEFINE_integer(
    'sampling_steps',
    4,
    'Of the sampler, in each drawing that is timed.',
    lower_bound=1,
  )
  flags.DEFINE_string('output', None, 'A JSON file for the figures.')
  flags.DEFINE_string('compare', None, 'Such a file, of another run.')
  flags.DEFINE_string(
    'profile',
    '',
    'Receives a trace of a few steps, for TensorBoard and, '
    'perfetto_trace.json.gz, for ui.perfetto.dev.',
  )
  flags.mark_flag_as_required('config')
  app.run(main)
