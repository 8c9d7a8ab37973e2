"""Compiles a run's steps for a TPU slice that is not there, and weighs them.

  python -m mdm_jax.tools.plan --config=configs/cc12m_1024.py \
      --topology=v5e:4x4 --config.mesh.fsdp=16
  python -m mdm_jax.tools.plan … --stage=2 --batch_per_chip=8
  python -m mdm_jax.tools.plan … --stage=2 --search --quick
  python -m mdm_jax.tools.plan … --price=1.2

Works on any x86 machine with `pip install libtpu`: the TPU's own compiler says
how much memory, arithmetic and traffic the very step takes that training would
run. Steps are bounded from below by the roofline: arithmetic, memory and links
at their peaks, all at once. A big step takes many minutes to compile, with
--quick a third of them; results are kept.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
import numpy as np

from mdm_jax import build, checks, draw, hlo, metrics, sharding
from mdm_jax import step as steps
from mdm_jax.data.text import CAPTIONS_MODEL
from mdm_jax.models.packing import TPU_LANES
from mdm_jax.models.unet import REMAT

_GIB = 2**30
_WORTH = 1.05  # times the images/s, for twice the images a chip
_CACHE = pathlib.Path.home() / '.cache' / 'mdm_jax' / 'plan'


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip's peaks, as cloud.google.com/tpu/docs/v5e, /v5p, /v6e give them.

  The memory is what the compiler leaves to a program.
  """

  flops: float  # FLOP/s, bfloat16
  memory: float  # GiB
  bandwidth: float  # bytes/s of its memory
  links: float  # bytes/s, of all links to other chips together


_CHIPS = {
  'v5e': Chip(197e12, 15.75, 819e9, 200e9),
  'v5p': Chip(459e12, 95.74, 2765e9, 600e9),
  'v6e': Chip(918e12, 31.25, 1640e9, 448e9),
}
_PLANE = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBE = (
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
  '8x8x16',
  '8x16x16',
)
TOPOLOGIES = {'v5e': _PLANE, 'v5p': _CUBE, 'v6e': _PLANE}

# google/flan-t5-xl's, for a config whose encoder is not on this machine.
_T5_XL = {
  'model_type': 't5',
  'feed_forward_proj': 'gated-gelu',
  'vocab_size': 32128,
  'd_model': 2048,
  'd_kv': 64,
  'd_ff': 5120,
  'num_layers': 24,
  'num_heads': 32,
  'relative_attention_num_buckets': 32,
  'layer_norm_epsilon': 1e-6,
}


def find_devices(topology: str) -> tuple[Chip, list[jax.Device]]:
  """The chips of a slice that need not exist.

  Raises:
    ValueError: there is no such slice, or no compiler for it here.
  """
  kind, _, shape = topology.partition(':')
  if shape not in TOPOLOGIES.get(kind, ()):
    raise ValueError(
      f'--topology={topology}: there is none of this name. Use one of '
      + '; '.join(
        f'{kind}:' + ', '.join(shapes) for kind, shapes in TOPOLOGIES.items()
      )
      + '.'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      'libtpu, the TPU compiler, is not installed: pip install libtpu.'
    )
  # Or it asks the cloud's metadata server which TPU this machine has, and
  # lets no other program compile meanwhile.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  description = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  )
  return _CHIPS[kind], list(description.devices)


def prepare(
  config: ConfigDict,
  stage: int,
  batch_per_chip: int | None,
  num_chips: int,
  scratch: str,
) -> tuple[ConfigDict, list[str]]:
  """The config to compile: one stage, and an encoder that need not be here.

  Args:
    config: of the run.
    stage: index of the stage.
    batch_per_chip: images; None for the stage's own batch.
    num_chips: of the slice.
    scratch: a directory for the description of a T5.

  Returns:
    The config, and what is not as in the one given, a line each.
  """
  config = copy.deepcopy(config)  # Its stages and levels too.
  if not 0 <= stage < len(config.stages):
    raise ValueError(
      f'--stage={stage}: the config has {len(config.stages)}, counted from 0.'
    )
  notes = []
  config.stages = [config.stages[stage]]
  if batch_per_chip is not None:
    config.stages[0].batch_size = batch_per_chip * num_chips
  for level in config.model.levels:
    level.lanes = level.lanes or TPU_LANES
  shards = math.prod(
    sharding.mesh_sizes(config.mesh, num_chips)[axis]
    for axis in sharding.BATCH_AXES
  )
  rounded = math.ceil(config.eval.batch_size / shards) * shards
  if rounded != config.eval.batch_size:
    notes.append(f'eval.batch_size is {rounded}, for so many chips.')
    config.eval.batch_size = rounded
  text = config.text
  if text.encoder in ('t5', 'precomputed') and not text.path:
    pathlib.Path(scratch, 'config.json').write_text(json.dumps(_T5_XL))
    text.update(path=scratch, tokenizer=CAPTIONS_MODEL)
    notes.append("text.path is empty: planned with google/flan-t5-xl's shapes.")
  return config, notes


def abstract_state(config: ConfigDict, mesh: Mesh) -> Any:
  """The train state of the only stage, as sharded shapes."""
  stage = config.stages[0]
  model = build.make_model(config, stage)
  optimizer, _ = build.make_optimizer(config, stage)
  shapes = jax.eval_shape(
    lambda params: steps.new_state(params, optimizer, config.averages.widths),
    model.shapes(config.text.max_length),
  )
  return _place(
    shapes, sharding.tree_shardings(shapes, mesh, config.sharding_rules)
  )


def _place(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    shardings,
  )


def _text(config: ConfigDict, count: int, width: int) -> jax.ShapeDtypeStruct:
  length = config.text.max_length
  if config.text.encoder == 'precomputed':
    return jax.ShapeDtypeStruct((count, length, width), jnp.float32)
  if config.text.encoder == 'label':
    length = 1
  return jax.ShapeDtypeStruct((count, length), jnp.int32)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
  """A global training batch of the only stage, as sharded shapes."""
  stage = config.stages[0]
  width = build.make_text_encoder(config).width
  batch = build.batch_shapes(
    config, stage, _text(config, stage.batch_size, width)
  )
  return _place(
    batch,
    {
      name: sharding.batch_sharding(mesh, len(x.shape))
      for name, x in batch.items()
    },
  )


def compile_train(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
  """The training step of the only stage."""
  stage = config.stages[0]
  text = _text(config, 1, build.make_text_encoder(config).width)
  train_step = build.make_train_step(
    config, stage, np.zeros(text.shape[1:], text.dtype), config.seed
  )
  arguments = (
    abstract_state(config, mesh),
    abstract_batch(config, mesh),
    build.frozen_shapes(config, mesh),
  )
  return (
    steps.jit_train_step(train_step, *arguments).lower(*arguments).compile()
  )


def compile_sample(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
  """The sampling of one batch with the only stage's network."""
  stage = config.stages[0]
  painter = build.make_painter(config, stage, mesh)
  params = abstract_state(config, mesh).ema | build.frozen_shapes(config, mesh)
  count = config.eval.batch_size
  text = _text(config, count, build.make_text_encoder(config).width)
  return (
    draw.jit_sample(painter, jax.tree.map(lambda x: x.sharding, params))
    .lower(params, text, text, jax.ShapeDtypeStruct((count,), jnp.uint32))
    .compile()
  )


def bytes_per_chip(tree: Any) -> int:
  """Of sharded shapes, on one chip and without padding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def weigh(compiled: jax.stages.Compiled, turns: int = 1) -> dict[str, Any]:
  """What a compiled program takes on each chip.

  Args:
    compiled: the program.
    turns: of the loop that it spends its time in. XLA counts a loop's
      arithmetic and memory traffic once.

  Returns:
    Bytes of memory, `arguments` and `activations` (all that is temporary, the
    largest at any moment) and their sum `memory`; `flops` and `bytes` moved to
    and from memory by the compiler's count; and `collectives`, bytes by kind.
  """
  memory = compiled.memory_analysis()
  arguments = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  counted = compiled.cost_analysis()
  return {
    'arguments': arguments,
    'activations': temporary,
    'memory': arguments + temporary,
    'flops': counted['flops'] * turns,
    'bytes': counted['bytes accessed'] * turns,
    'collectives': hlo.collective_bytes(compiled.as_text(), turns),
  }


def needed_memory(message: str) -> float | None:
  """The GiB that the compiler says a program needs and does not have.

  None if the message is about something else.
  """
  found = re.search(r'\(([\d.]+)([MG])\) exceeds available HBM', message)
  found = found or re.search(r'Used ([\d.]+)([MG]) of [\d.]+[MG] hbm', message)
  if not found:
    return None
  return float(found[1]) / (1024 if found[2] == 'M' else 1)


def roofline(weight: Mapping[str, Any], chip: Chip) -> dict[str, float]:
  """Seconds that each part takes at its peak; a step takes the longest."""
  return {
    'arithmetic': weight['flops'] / chip.flops,
    'memory': weight['bytes'] / chip.bandwidth,
    'links': sum(weight['collectives'].values()) / chip.links,
  }


def chip_hours(
  images: float, images_per_second: float, num_chips: int
) -> float:
  """What a slice of chips takes for so many images."""
  return images / images_per_second * num_chips / 3600


def _versions() -> dict[str, str]:
  root = pathlib.Path(__file__).parents[1]
  source = hashlib.sha256(
    b''.join(path.read_bytes() for path in sorted(root.rglob('*.py')))
  )
  return {
    'mdm_jax': source.hexdigest(),
    **{
      name: importlib.metadata.version(name)
      for name in ('jax', 'jaxlib', 'libtpu', 'flax', 'optax')
    },
  }


def cached(directory: pathlib.Path, question: Any, answer) -> Any:
  """What `answer()` returns, or has returned for the same question before.

  Args:
    directory: of the answers, a JSON file each.
    question: of JSON's types.
    answer: returns JSON's types.
  """
  key = hashlib.sha256(
    json.dumps(question, sort_keys=True).encode()
  ).hexdigest()
  path = directory / f'{key[:32]}.json'
  if path.exists():
    return json.loads(path.read_text())
  result = answer()
  directory.mkdir(parents=True, exist_ok=True)
  # A name of its own: several may plan at once, and one may be stopped.
  with tempfile.NamedTemporaryFile('w', dir=directory, delete=False) as file:
    json.dump(result, file)
  os.replace(file.name, path)
  return result


def measure(
  config: ConfigDict, topology: str, step: str, directory: pathlib.Path
) -> dict[str, Any]:
  """Compiles a step of a prepared config's only stage, or remembers it.

  Args:
    config: as `prepare` makes it.
    topology: of the slice.
    step: 'train' or 'sample'.
    directory: of what is remembered.

  Returns:
    What `weigh` does and `state`, bytes by kind, and `seconds` of compiling;
    or `needed`, GiB, if it does not fit.

  Raises:
    ValueError: the config is wrong for so many chips.
  """
  _, devices = find_devices(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  checks.check_stages(config, mesh)

  def answer():
    state = abstract_state(config, mesh)
    if step == 'train':
      kept = {
        'parameters': state.params,
        'optimizer': state.opt_state,
        'average': (state.ema, state.lags),
      }
    else:
      kept = {'average': state.ema}
    kept['text encoder'] = build.frozen_shapes(config, mesh)
    sizes = {kind: bytes_per_chip(tree) for kind, tree in kept.items()}
    begin = time.monotonic()
    turns = (
      config.stages[0].accumulate
      if step == 'train'
      else config.sampler.num_steps
    )
    try:
      compiled = (compile_train if step == 'train' else compile_sample)(
        config, mesh
      )
    except jax.errors.JaxRuntimeError as error:
      needed = needed_memory(str(error))
      if needed is None:
        raise
      return {
        'state': sizes,
        'needed': needed,
        'seconds': time.monotonic() - begin,
      }
    return {
      'state': sizes,
      **weigh(compiled, turns),
      'seconds': time.monotonic() - begin,
    }

  # Where T5's description lies does not matter.
  asked = json.loads(config.to_json())
  asked['text']['path'] = ''
  question = [
    asked,
    topology,
    step,
    jax.config.jax_optimization_level,
    _versions(),
  ]
  return cached(directory, question, answer)


def report(
  measured: Mapping[str, Any], chip: Chip, images: int, num_chips: int
) -> tuple[list[list[str]], float | None]:
  """A step's rows, and images/s of the slice; None if it does not fit.

  Args:
    measured: as `measure` returns it.
    chip: of the slice.
    images: a step, over all chips.
    num_chips: of the slice.
  """

  def gib(size):
    return f'{size / _GIB:.2f} GiB'

  if 'needed' in measured:
    needed = measured['needed']
    return [
      [
        'fits',
        f'no: {needed:.2f} of {chip.memory} GiB, '
        f'{needed - chip.memory:.2f} too much',
      ]
    ], None
  left = chip.memory - measured['memory'] / _GIB
  rows = [
    [
      'fits',
      f'{"yes" if left >= 0 else "no"}: '
      f'{measured["memory"] / _GIB:.2f} of {chip.memory} GiB, '
      f'{left:.2f} left',
    ]
  ]
  rows += [
    [f'memory: {kind}', gib(size)]
    for kind, size in measured['state'].items()
    if size
  ]
  per_chip = images / num_chips
  rows += [
    ['memory: activations', gib(measured['activations'])],
    [
      'arithmetic',
      f'{measured["flops"] / 1e12:.2f} TFLOP, '
      f'{measured["flops"] / per_chip / 1e12:.2f} an image',
    ],
    [
      'memory moved',
      f'{measured["bytes"] / 1e9:.1f} GB, '
      f'{measured["bytes"] / per_chip / 1e9:.1f} an image',
    ],
  ]
  rows += [
    [f'{kind}', f'{size / 1e9:.3f} GB']
    for kind, size in sorted(measured['collectives'].items())
  ]
  parts = roofline(measured, chip)
  seconds = max(parts.values())
  rows += [
    [
      'roofline',
      f'{seconds * 1e3:.0f} ms ('
      + ', '.join(f'{name} {part * 1e3:.0f}' for name, part in parts.items())
      + ')',
    ],
    ['images/s', f'at most {images / seconds:.1f}'],
  ]
  return rows, images / seconds


def plan(
  config: ConfigDict,
  topology: str,
  stages: Sequence[int],
  batch_per_chip: int | None,
  step: str,
  price: float | None,
  directory: pathlib.Path,
) -> None:
  """Prints a table a stage, and what the run costs.

  Args:
    config: of the run.
    topology: of the slice.
    stages: indices of the stages.
    batch_per_chip: images; None for the stages' own batches.
    step: 'train' or 'sample'.
    price: of a chip-hour; None if it is not asked for.
    directory: of what is remembered.
  """
  chip, devices = find_devices(topology)
  print(
    f'{topology}, {len(devices)} chips of {chip.flops / 1e12:.0f} TFLOP/s, '
    f'{chip.memory} GiB at {chip.bandwidth / 1e9:.0f} GB/s, links of '
    f'{chip.links / 1e9:.0f} GB/s'
  )
  hours = []
  for index in stages:
    with tempfile.TemporaryDirectory() as scratch:
      prepared, notes = prepare(
        config, index, batch_per_chip, len(devices), scratch
      )
      if step == 'sample' and prepared.text.encoder == 't5':
        prepared.text.encoder = 'precomputed'
        notes.append('Without the text encoder, which runs once.')
      measured = measure(prepared, topology, step, directory)
    stage = prepared.stages[0]
    images = stage.batch_size if step == 'train' else prepared.eval.batch_size
    rows, rate = report(measured, chip, images, len(devices))
    rows.append(['compiled in', metrics.duration(measured['seconds'])])
    if rate and step == 'train':
      given = config.stages[index]
      hours.append(
        chip_hours(given.steps * given.batch_size, rate, len(devices))
      )
      rows.append(['chip-hours', _price(hours[-1], price)])
    print(
      '\n'
      + metrics.table(
        rows,
        [
          f"stage '{stage.name}', {step} step",
          f'{images / len(devices):g} images a chip, '
          f'{_mesh(prepared, devices)}',
        ],
      )
    )
    print('\n'.join(notes), flush=True)
  if len(hours) > 1:
    print(f'All {len(hours)} stages: {_price(sum(hours), price)}')


def _price(hours: float, price: float | None) -> str:
  return f'at least {hours:,.0f}' + (
    '' if price is None else f', at {price:g} each {hours * price:,.0f}'
  )


def _mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> str:
  sizes = sharding.mesh_sizes(config.mesh, len(devices))
  return 'mesh ' + ' x '.join(f'{n} {axis}' for axis, n in sizes.items())


def search(
  config: ConfigDict, topology: str, index: int, directory: pathlib.Path
) -> None:
  """Tries meshes, rematerialisation and batches, and recommends the fastest.

  For each mesh and policy the batch a chip doubles until it does not fit or
  brings little. Policies and meshes that save memory are for where it is
  short: the search ends at the first that it is not for.
  """
  chip, devices = find_devices(topology)
  count = len(devices)
  best = None
  for fsdp, remat in itertools.product(
    sorted({1, min(16, count), count}), REMAT
  ):
    rate, ended = 0, False
    batch = int(sum(config.stages[index].mixed_ratio))  # Once its pattern.
    while not ended:
      tried = copy.deepcopy(config)
      tried.mesh.update(data=-1, fsdp=fsdp, spatial=1)
      for level in tried.model.levels:
        level.remat = remat
      what = f'--config.mesh.fsdp={fsdp} remat={remat} --batch_per_chip={batch}'
      try:
        with tempfile.TemporaryDirectory() as scratch:
          prepared, _ = prepare(tried, index, batch, count, scratch)
          measured = measure(prepared, topology, 'train', directory)
      except ValueError as error:  # Such as an indivisible parameter.
        print(f'{what}: {error}', flush=True)
        break
      before = rate
      rows, rate = report(measured, chip, batch * count, count)
      print(
        f'{what}: {rows[0][1]}'
        + (f'; at most {rate:.1f} images/s' if rate else ''),
        flush=True,
      )
      if not rate:
        break
      if best is None or rate > best[0]:
        best = rate, what
      ended = rate < _WORTH * before
      batch *= 2
    if ended:
      break
  print('Nothing fits.' if best is None else f'Best: {best[1]}')


def main(argv: list[str]) -> None:
  """Flags to one call."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  values = flags.FLAGS
  # The arrays that are not compiled for the slice.
  jax.config.update('jax_platforms', 'cpu')
  if values.quick:
    jax.config.update('jax_optimization_level', 'O1')
  metrics.setup_logging()
  cache = pathlib.Path(values.cache)
  config = values.config
  stages = range(len(config.stages)) if values.stage is None else [values.stage]
  try:
    if values.search:
      search(config, values.topology, stages[-1], cache)
    else:
      plan(
        config,
        values.topology,
        stages,
        values.batch_per_chip,
        values.step,
        values.price,
        cache,
      )
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'Of the run.')
  flags.DEFINE_string('topology', None, 'A slice, such as v5e:4x4.')
  flags.DEFINE_integer('stage', None, 'Counted from 0; by default all.')
  flags.DEFINE_integer(
    'batch_per_chip', None, "Images; by default the stage's batch."
  )
  flags.DEFINE_enum('step', 'train', ['train', 'sample'], 'Which to compile.')
  flags.DEFINE_bool(
    'search', False, 'Try meshes, rematerialisation and batches.'
  )
  flags.DEFINE_bool(
    'quick',
    False,
    "Compile at XLA's level O1, with less search for the "
    'best windows of convolutions: for a look round, not the last word.',
  )
  flags.DEFINE_float('price', None, 'Of a chip for an hour.')
  flags.DEFINE_string('cache', str(_CACHE), 'Where results are kept.')
  flags.mark_flags_as_required(['config', 'topology'])
  app.run(main)
