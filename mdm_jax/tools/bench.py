r"""Measures how fast a config trains and samples on this machine's devices.

  python -m mdm_jax.tools.bench --config=configs/shapes_64.py
  python -m mdm_jax.tools.bench --config=configs/cc12m_64.py --batch_size=128 \
      --output=new.json --compare=old.json --profile=DIR

Images and text are random, so that no data set is needed. If config.text.path
is empty, random features of the same shape replace those of the T5 encoder. The
measured step is the one that training compiles.
"""

import collections
from collections.abc import Callable
import math
import os
import pathlib
import re
import sys
import time
from typing import Any

from absl import flags
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
import numpy as np

from mdm_jax.builders import ranges, recipes
from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.check import check
from mdm_jax.builders.check_levels import parts_of_batches
from mdm_jax.builders.model import keep_stage, require_stage
from mdm_jax.builders.stage import Stage
from mdm_jax.builders.text import empty_text, load_frozen, make_tokenizer
from mdm_jax.report import console
from mdm_jax.runtime import (
  command,
  compilation_cache,
  cpu,
  files,
  flag_types,
  peaks,
  sharding,
  value_types,
)
from mdm_jax.steps.sample import jit_sample
from mdm_jax.steps.train import jit_train_step

_T5_WIDTH = 2048  # of google/flan-t5-xl, which the recipes use
_PROFILED = 3  # steps in a trace
_TOP = 20  # operations of a trace to list
_PARTS = ('train', 'sample')
_WIDTH = 100  # most characters of an operation's origin


def without_t5(config: ConfigDict) -> ConfigDict:
  """Replaces a T5 encoder without a path by features of the same shape.

  Each token looks up the same vector, so that the network does the same work
  and the encoder none, as with precomputed features.
  """
  config = config.copy_and_resolve_references()
  if config.text.encoder in ('t5', 'precomputed') and not config.text.path:
    config.data.name = 'shapes'
    config.text.update(
      encoder='label', num_classes=1, class_names='', width=_T5_WIDTH
    )
  return config


def make_batch(stage: BaseStage) -> dict[str, np.ndarray]:
  """Makes a random training batch of a stage, see `objective.Batch`."""
  rng = np.random.default_rng(0)
  text = make_text(stage.config, stage.batch_size)
  shapes = stage.batch_shapes(jax.ShapeDtypeStruct(text.shape, text.dtype))
  batch = {
    name: rng.integers(0, 256, x.shape, x.dtype)
    if x.dtype == np.uint8
    else np.zeros(x.shape, x.dtype)
    for name, x in shapes.items()
  }
  sizes = np.full_like(batch['scale'], stage.resolutions[-1])
  return batch | {'text': text, 'scale': sizes}


def make_text(config: ConfigDict, count: int) -> np.ndarray:
  """Makes random inputs of the text encoder of full length, [count, L, ...].

  L is 1 for labels, but for the only one of `without_t5`, which stands for each
  token of a text.
  """
  rng = np.random.default_rng(1)
  empty = empty_text(config)
  if empty.ndim > 1:
    return rng.standard_normal((count, *empty.shape), empty.dtype)
  vocab_size = make_tokenizer(config).vocab_size
  length = (
    config.text.max_length if config.text.num_classes == 1 else len(empty)
  )
  return rng.integers(1, vocab_size, (count, length), empty.dtype)


def time_calls(call: Callable[[], jax.Array], count: int) -> np.ndarray:
  """Seconds between the ends of successive calls, with one always in flight.

  Args:
    call: starts the work, and returns an array that is ready when it is done.
    count: number of calls to time, after two warm-up calls.

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


def compile_step(
  jitted: Any, mesh: Mesh, *args
) -> tuple[jax.stages.Compiled, dict]:
  """Compiles a program, and measures the time and the program's memory.

  Args:
    jitted: the jitted function.
    mesh: the devices.
    *args: its arguments, or `jax.ShapeDtypeStruct`s.

  Returns:
    The program, and 'trace_seconds', 'compile_seconds', 'from_cache',
    'program_bytes' and 'flops', see `peaks.flops_per_step`.
  """
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
    'flops': peaks.flops_per_step(lowered, compiled, mesh.size),
  }


def rates(
  seconds: np.ndarray, images: float, flops: float | None, peak: float | None
) -> dict[str, float | None]:
  """Computes rates from the times of steps.

  Args:
    seconds: [N], time of each step.
    images: number of images of a step; for a sampling step the images divided
      by the number of steps.
    flops: FLOP of a step on each device, None if unknown.
    peak: peak FLOP/s of a device, None if unknown.

  Returns:
    Results by name, see `_ROWS`.
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
  stage: BaseStage, mesh: Mesh, frozen: Any
) -> tuple[Callable, jax.stages.Compiled, dict]:
  """Compiles the training step.

  Returns:
    A function that calls the step, the program, and the results of
    `compile_step`.
  """
  shardings = jax.tree.map(lambda x: x.sharding, stage.state_shapes(mesh))
  state = jax.jit(stage.new_state, out_shardings=shardings)(
    sharding.place(stage.init(), shardings.params)
  )
  batch = sharding.shard_batch(make_batch(stage), mesh)
  train_step = stage.make_train_step(empty_text(stage.config), mesh)
  compiled, found = compile_step(
    jit_train_step(train_step, state, batch, frozen),
    mesh,
    state,
    batch,
    frozen,
  )

  def call():
    nonlocal state
    state, values = compiled(state, batch, frozen)
    return values['loss']

  return call, compiled, found


def bench_sample(
  stage: Stage, mesh: Mesh, frozen: Any, num_steps: int
) -> tuple[Callable, jax.stages.Compiled, dict]:
  """Compiles the sampling of `eval.batch_size` images.

  Args:
    stage: a stage of the run.
    mesh: the devices.
    frozen: parameters that the model needs beside the trained ones.
    num_steps: number of sampling steps.

  Returns:
    As `bench_train`.
  """
  params = stage.init()
  params = (
    sharding.place(
      params,
      sharding.tree_shardings(params, mesh, stage.config.sharding_rules),
    )
    | frozen
  )
  count = stage.config.eval.batch_size
  text = make_text(stage.config, count)
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
    jit_sample(
      stage.make_sampler(mesh, num_steps=num_steps),
      jax.tree.map(lambda x: x.sharding, params),
    ),
    mesh,
    *arguments,
  )
  return lambda: compiled(*arguments)[-1], compiled, found


def _earlier(stage: BaseStage, mesh: Mesh) -> Any:
  """Untrained parameters of earlier stages that the stage needs."""
  params = stage.earlier_params(lambda each: each.init())
  return sharding.place(
    params, sharding.tree_shardings(params, mesh, stage.config.sharding_rules)
  )


def measure(
  stage: BaseStage,
  mesh: Mesh,
  *,
  count: int,
  sampling_steps: int,
  only: str | None = None,
  profile: str | None = None,
) -> dict[str, dict[str, Any]]:
  """Times the training step and a sampling step.

  Args:
    stage: a stage of the run.
    mesh: the devices.
    count: number of calls to time.
    sampling_steps: number of sampling steps in each timed call. They share the
      time of what runs once a call, an autoencoder's decoder or a T5, whose
      FLOP count in full: with few of them MFU is too high, images/s too low.
    only: 'train' or 'sample', to time one of them; None for both.
    profile: directory for a trace of a few calls; None for none.

  Returns:
    'train' and 'sample', or one of them, each a dict of results by name. An
    autoencoder is only trained.

  Raises:
    ValueError: sampling of an autoencoder is asked for.
  """
  if only == 'sample':
    stage.require_generative('--only')
  if not stage.is_generative:
    only = 'train'
  config = stage.config
  device = mesh.devices.flat[0]
  peak = peaks.peak_flops(device)
  frozen = load_frozen(config, mesh) | _earlier(stage, mesh)
  whole = config.sampler.num_steps
  short = min(sampling_steps, whole)
  found = {}
  for name, make, loops, images, per_call in (
    (
      'train',
      lambda: bench_train(stage, mesh, frozen),
      stage.settings.accumulate,
      stage.batch_size,
      1,
    ),
    (
      'sample',
      lambda: bench_sample(stage, mesh, frozen, short),
      1,
      config.eval.batch_size / whole,
      short,
    ),
  ):
    if only not in (None, name):
      continue
    call, compiled, compiling = make()
    seconds = time_calls(call, count) / per_call
    flops = compiling.pop('flops')
    found[name] = compiling | rates(
      seconds, images, flops and flops * loops, peak
    )
    # A peak is that since the process began, so of what is timed first.
    memory = device.memory_stats() if len(found) == 1 else None
    found[name]['peak_bytes'] = memory and memory.get('peak_bytes_in_use')
    if profile:
      with files.local_directory(epath.Path(profile) / name) as directory:
        with jax.profiler.trace(directory, create_perfetto_trace=True):
          for _ in range(_PROFILED):
            call().block_until_ready()
        found[name]['operations'] = operations(directory, compiled.as_text())
    del call, compiled  # With the state, which the next one has no room for.
  return found


def operations(
  directory: str | os.PathLike, program: str
) -> list[dict[str, Any]]:
  """Finds the operations that take most time in a trace, longest first.

  Args:
    directory: directory of the trace.
    program: optimised HLO of the program, which tells where an operation comes
      from.

  Returns:
    For each operation 'name', 'share' of the time and 'origin'.
  """
  (path, *_) = sorted(
    pathlib.Path(directory).rglob('*.xplane.pb'), reverse=True
  )
  seconds = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      # A GPU's kernels are named after operations, but not the same, and may be
      # a library's; further lines sum them up.
      is_stream = plane.name.startswith('/device:GPU') and line.name.startswith(
        'Stream'
      )
      for event in line.events:
        name = dict(event.stats).get('hlo_op')
        # Not operations that contain others, whose time would count twice.
        if (
          name
          and (is_stream or name == event.name)
          and not name.startswith(('while', 'call', 'conditional'))
        ):
          seconds[name] += event.duration_ns * 1e-9
  total = sum(seconds.values())
  return [
    {'name': name, 'share': value / total, 'origin': _origin(name, program)}
    for name, value in seconds.most_common(_TOP)
  ]


def _origin(name: str, program: str) -> str:
  """The place of an operation in the network; without one, its shape."""
  found = re.search(
    rf'%{re.escape(name)} = (\S+ [\w-]+\().*?(op_name="[^;"]*|$)',
    program,
    re.MULTILINE,
  )
  if not found:
    return ''
  shape, path = found.groups()
  return '/'.join(path.split('/')[1:])[:_WIDTH] or f'{shape}…)'


# Results to print: name and title.
_ROWS = (
  ('step_seconds', 'step, s (median)'),
  ('step_seconds_p10', 'step, s (10th percentile)'),
  ('step_seconds_p90', 'step, s (90th percentile)'),
  ('step_seconds_min', 'step, s (shortest)'),
  ('images_per_second', 'images/s'),
  ('device_flops', 'FLOP per step and device'),
  ('device_flops_per_second', 'FLOP/s of a device'),
  ('mfu', 'share of peak FLOP/s (MFU)'),
  ('program_bytes', 'memory of the program, bytes'),
  ('peak_bytes', 'peak memory of the device, bytes'),
  ('trace_seconds', 'tracing, s'),
  ('compile_seconds', 'compiling, s'),
)


def describe(found: dict) -> str:
  """Describes the config, the devices and their peak in a few lines."""
  mesh = ', '.join(f'{name} {size}' for name, size in found['mesh'].items())
  peak = found['peak_flops']
  lines = [
    f"{found['config']}, stage '{found['stage']}': {found['batch_size']} "
    f'images per step, {found["sample_batch_size"]} samples at once, '
    f'{found["dtype"]}',
    f'{math.prod(found["mesh"].values())} x {found["device"]} ({mesh}), JAX '
    f'{found["jax"]}',
    'peak of each device: '
    + (f'{peak:.3g} FLOP/s' if peak else 'unknown')
    + (
      ', measured with a matrix product'
      if found['device'] == 'cpu'
      else " in bfloat16, the vendor's number"
      if peak
      else ''
    ),
  ]
  if found['random_text_features']:
    lines.append(
      f'no text.path: random features of width {_T5_WIDTH}, no encoder'
    )
  return '\n'.join(lines)


def report(found: dict, other: dict | None) -> str:
  """Tables of the results.

  Args:
    found: results of this run.
    other: results of another run to compare with, or None.
  """
  parts = []
  for name in _PARTS:
    if name not in found:
      continue
    rows = []
    for key, title in _ROWS:
      value = found[name][key]
      row = [title, value]
      if other is not None:
        old = other.get(name, {}).get(key)
        row += [old, value / old if value and old else None]
      rows.append(row)
    header = [name, 'this'] + (['other', 'ratio'] if other else [])
    parts.append(console.table(rows, header))
    if found[name]['from_cache']:
      parts.append('Compiled before: read from the cache.')
    if 'operations' in found[name]:
      parts.append(
        console.table(
          [
            [row['name'], f'{row["share"]:.1%}', row['origin']]
            for row in found[name]['operations']
          ],
          ['operation', 'share of time', 'origin'],
        )
      )
  return '\n\n'.join(parts)


def _read(path: str) -> dict:
  """Results of another run; raises ValueError for any other file."""

  def is_valid(found):
    return isinstance(found, dict) and any(
      isinstance(found.get(name), dict) for name in _PARTS
    )

  try:
    return files.read_json(path, is_valid)
  except files.UnreadableFile as error:
    raise ValueError(
      f'--compare={path}: it {error.reason}: give a file that --output has '
      'written.'
    ) from None


def main(_: list[str]) -> None:
  """Measures training and sampling, and prints tables."""
  values = flags.FLAGS
  console.setup_logging()
  compilation_cache.enable()
  try:
    other = values.compare and _read(values.compare)
    config = without_t5(values.config)
    index = len(config.stages) - 1 if values.stage is None else values.stage
    require_stage(config, index)
    if values.batch_size:
      config.stages[index].batch_size = values.batch_size
      config.eval.batch_size = values.batch_size
    keep_stage(config, index)
    cpu.use_cores(parts_of_batches(config))
    mesh = sharding.make_mesh(config.mesh)
    *_, stage = check(config, mesh)
    found = measure(
      stage,
      mesh,
      count=values.steps,
      sampling_steps=values.sampling_steps,
      only=values.only,
      profile=values.profile,
    )
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  device = mesh.devices.flat[0]
  found |= {
    'config': config_flags.get_config_filename(flags.FLAGS['config']),
    'stage': stage.name,
    'batch_size': stage.batch_size,
    'sample_batch_size': config.eval.batch_size,
    'dtype': config.dtype,
    'mesh': dict(mesh.shape),
    'device': device.device_kind,
    'text_encoder': values.config.text.encoder,
    'random_text_features': config.text.encoder != values.config.text.encoder,
    'peak_flops': peaks.peak_flops(device),
    'jax': jax.__version__,
  }
  print(describe(found) + '\n\n' + report(found, other))
  if values.output:
    files.write_json(values.output, found)


if __name__ == '__main__':
  cpu.use_huge_pages()
  # Here, so that importing this module leaves other programs' flags alone.
  recipes.define('Recipe, as for mdm_jax.main.')
  flag_types.integer(
    'stage', None, 0, 99, 'Index of the stage, from 0. Default: the last.'
  )
  flag_types.define(
    'batch_size',
    None,
    ranges.KEYS['eval.batch_size'],
    'Images of a training step, and images sampled at once. Default: the batch '
    'size of the stage, and eval.batch_size.',
  )
  flag_types.integer(
    'steps',
    20,
    1,
    10**6,
    'Number of training steps, and of sampling calls, to time.',
  )
  flag_types.define(
    'sampling_steps',
    4,
    ranges.KEYS['sampler.num_steps'],
    'Sampling steps in each timed sampling call.',
  )
  flag_types.define(
    'only',
    None,
    value_types.Choice(_PARTS),
    'What to measure. Default: both.',
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('file', output=True),
    'JSON file to write the results to.',
  )
  flag_types.define(
    'compare',
    None,
    value_types.Path('file'),
    'JSON file that --output wrote in another run, to compare with.',
  )
  flag_types.define(
    'profile',
    None,
    value_types.Path('directory', output=True),
    'Directory for a trace of a few steps, for TensorBoard. ui.perfetto.dev '
    'opens its perfetto_trace.json.gz.',
  )
  command.run(main, recipes.parse_flags)
