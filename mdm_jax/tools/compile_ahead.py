"""Compiles steps for TPUs or GPUs that are not there, and measures them.

libtpu has the TPU compiler, and JAX's plugin for CUDA that of GPUs; both run on
any x86 machine. The compiled step is the one that training would run, so that
its memory, arithmetic and traffic are known exactly; on a GPU, whose libraries
choose kernels by trying them, nearly.
"""

from collections.abc import Callable
import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from mdm_jax.builders.base_stage import BaseStage
from mdm_jax.builders.check_levels import check_stages
from mdm_jax.builders.model import keep_stage, require_stage
from mdm_jax.builders.stage import Stage, make_stage
from mdm_jax.builders.text import frozen_shapes, make_text_encoder
from mdm_jax.data.text import CAPTIONS_MODEL
from mdm_jax.models import target
from mdm_jax.runtime import files, peaks, sharding
from mdm_jax.runtime.peaks import Chip
from mdm_jax.steps.sample import jit_sample
from mdm_jax.steps.train import jit_train_step
from mdm_jax.tools import hlo

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
_HOST = ('1', '2', '4', '8')
TOPOLOGIES = {
  'v5e': _PLANE,
  'v5p': _CUBE,
  'v6e': _PLANE,
  'h100': _HOST,
  'h200': _HOST,
}
_KINDS = {
  'v5e': 'TPU v5e',
  'v5p': 'TPU v5',
  'v6e': 'TPU v6',
  'h100': 'NVIDIA H100',
  'h200': 'NVIDIA H200',
}
# Bytes of memory; all else is the same in an H100 and an H200.
_GPU_MEMORY = {'h100': 84_978_434_048, 'h200': 150_083_731_456}
# XLA's description of a GPU, as of its `GpuTargetConfigProto`.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
# Without a GPU no kernel can be tried, and those that Triton generates need it.
_UNTRIED = '--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'

# config.json of google/flan-t5-xl, used if text.path is empty.
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
  """Finds the chips of a TPU slice or of a host of GPUs, which need not exist.

  Args:
    topology: name of the slice, such as 'v5e:4x4', or of the host, 'h100:8'.

  Returns:
    Peaks of a chip, and the devices to compile for.

  Raises:
    ValueError: there is no such slice, or its compiler is not installed.
  """
  kind, _, shape = topology.partition(':')
  if shape not in TOPOLOGIES.get(kind, ()):
    raise ValueError(
      f'--topology={topology} does not exist: use one of '
      + '; '.join(
        f'{kind}:' + ', '.join(shapes) for kind, shapes in TOPOLOGIES.items()
      )
      + '.'
    )
  chip = peaks.find_chip(_KINDS[kind])
  if kind in _GPU_MEMORY:
    return chip, _find_gpus(chip, _GPU_MEMORY[kind], shape)
  return chip, _find_tpus(topology)


def _find_tpus(topology: str) -> list[jax.Device]:
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      'libtpu, the TPU compiler, is not installed: pip install libtpu.'
    )
  # Otherwise libtpu asks the cloud's metadata server which TPU this machine
  # has, and lets no other program compile meanwhile.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  description = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  )
  return list(description.devices)


def _cuda_plugins() -> list[importlib.metadata.EntryPoint]:
  """What is installed of JAX's compilers for NVIDIA GPUs."""
  return [
    plugin
    for name in ('xla_cuda12', 'xla_cuda13')
    for plugin in importlib.metadata.entry_points(
      group='jax_plugins', name=name
    )
  ]


def _find_gpus(chip: Chip, memory: int, count: str) -> list[jax.Device]:
  if not _cuda_plugins():
    raise ValueError(
      "JAX's compiler for NVIDIA GPUs is not installed: pip install "
      '"jax[cuda12]". It needs no GPU.'
    )
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  given = os.environ.get('XLA_FLAGS', '')
  if _UNTRIED not in given:
    os.environ['XLA_FLAGS'] = f'{given} {_UNTRIED}'
  description = topologies.get_topology_desc(
    '',
    'cuda',
    topology=f'1x1x{count}',
    target_config=_HOPPER.format(
      bandwidth=chip.bandwidth, memory=memory, name=chip.kind
    ),
  )
  return list(description.devices)


def prepare(
  config: ConfigDict,
  stage: int,
  batch_per_chip: int | None,
  num_chips: int,
  scratch: str,
) -> tuple[ConfigDict, list[str]]:
  """Makes a config with one stage, and with a text encoder that need not exist.

  Args:
    config: configuration of the run.
    stage: index of the stage.
    batch_per_chip: images on each chip; None for the stage's own batch.
    num_chips: number of chips in the slice.
    scratch: directory for the config file of a T5, if text.path is empty.

  Returns:
    The config, of which the stage is the last one, and a line for each change
    to report.

  Raises:
    ValueError: there is no such stage, or the mesh does not fit the slice.
  """
  config = copy.deepcopy(config)  # Copies the stages and levels too.
  require_stage(config, stage)
  notes = []
  if batch_per_chip is not None:
    config.stages[stage].batch_size = batch_per_chip * num_chips
  keep_stage(config, stage)
  shards = math.prod(
    sharding.mesh_sizes(config.mesh, num_chips)[axis]
    for axis in sharding.BATCH_AXES
  )
  rounded = math.ceil(config.eval.batch_size / shards) * shards
  if rounded != config.eval.batch_size:
    notes.append(f'eval.batch_size is rounded up to {rounded}.')
    config.eval.batch_size = rounded
  text = config.text
  if text.encoder in ('t5', 'precomputed') and not text.path:
    pathlib.Path(scratch, 'config.json').write_text(json.dumps(_T5_XL))
    text.update(path=scratch, tokenizer=CAPTIONS_MODEL)
    notes.append("text.path is empty: planned with google/flan-t5-xl's shapes.")
  return config, notes


def abstract_batch(stage: BaseStage, mesh: Mesh) -> dict[str, Any]:
  """A global training batch of a stage, as `jax.ShapeDtypeStruct`s."""
  batch = stage.batch_shapes(_text(stage, stage.batch_size))
  return sharding.with_shardings(
    batch,
    {
      name: sharding.batch_sharding(mesh, len(x.shape))
      for name, x in batch.items()
    },
  )


def _text(stage: BaseStage, count: int) -> jax.ShapeDtypeStruct:
  """Shape of prompts as the text encoder reads them, [count, L, ...]."""
  text = stage.config.text
  if text.encoder == 'precomputed':
    width = make_text_encoder(stage.config).width
    return jax.ShapeDtypeStruct((count, text.max_length, width), jnp.float32)
  length = 1 if text.encoder == 'label' else text.max_length
  return jax.ShapeDtypeStruct((count, length), jnp.int32)


def _frozen(stage: BaseStage, mesh: Mesh) -> Any:
  """What a stage needs beside its own parameters, as `ShapeDtypeStruct`s."""
  return frozen_shapes(stage.config, mesh) | _earlier(stage, mesh)


def _earlier(stage: BaseStage, mesh: Mesh) -> Any:
  """Parameters of earlier stages, see `BaseStage.earlier_params`."""
  return stage.earlier_params(lambda each: each.state_shapes(mesh).ema)


def trace_train(stage: BaseStage, mesh: Mesh) -> jax.stages.Traced:
  """Traces the training step of a stage."""
  text = _text(stage, 1)
  train_step = stage.make_train_step(np.zeros(text.shape[1:], text.dtype), mesh)
  arguments = (
    stage.state_shapes(mesh),
    abstract_batch(stage, mesh),
    _frozen(stage, mesh),
  )
  return jit_train_step(train_step, *arguments).trace(*arguments)


def trace_sample(stage: Stage, mesh: Mesh, **changes: Any) -> jax.stages.Traced:
  """Traces the sampling of a batch of `eval.batch_size` images.

  Args:
    stage: a stage of the run.
    mesh: the devices.
    **changes: fields of `SamplerSpec` that are not as in the config.
  """
  config = stage.config
  params = stage.state_shapes(mesh).ema | _frozen(stage, mesh)
  count = config.eval.batch_size
  text = _text(stage, count)
  jitted = jit_sample(
    stage.make_sampler(mesh, **changes),
    jax.tree.map(lambda x: x.sharding, params),
  )
  seeds = jax.ShapeDtypeStruct((count,), jnp.uint32)
  return jitted.trace(params, text, text, seeds)


def bytes_per_chip(tree: Any) -> int:
  """Bytes of a tree of sharded arrays on one chip, without XLA's padding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def weigh(compiled: jax.stages.Compiled, turns: int = 1) -> dict[str, Any]:
  """Memory, arithmetic and traffic of a compiled program on each chip.

  Args:
    compiled: the program.
    turns: number of iterations of the program's main loop. XLA counts a loop's
      arithmetic and memory traffic once, and adds them to those of the rest:
      for a TPU, what runs once is multiplied too.

  Returns:
    Bytes of memory: `arguments`, `activations` (the peak of all temporary
    memory) and their sum `memory`. `flops` and the `bytes` moved to and from
    memory, by the compiler's count; for a GPU, whose compiler counts nothing,
    without the former. `turns`, of a TPU, by which both are multiplied.
    `collectives`: bytes received, by kind.
  """
  memory = compiled.memory_analysis()
  arguments = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  temporary = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  text = compiled.as_text()
  if target.platform() == 'gpu':
    counted = {'bytes': sum(hlo.moved_bytes(text, turns).values())}
  else:
    cost = compiled.cost_analysis()
    counted = {
      'flops': cost['flops'] * turns,
      'bytes': cost['bytes accessed'] * turns,
      'turns': turns,
    }
  return {
    'arguments': arguments,
    'activations': temporary,
    'memory': arguments + temporary,
    **counted,
    'collectives': hlo.collective_bytes(text, turns),
  }


def _count_flops(config: ConfigDict, step: str) -> float:
  """FLOPs of a step of all devices, counted before compilation.

  Args:
    config, step: see `measure`.
  """
  # For one CPU, whose program calls no libraries.
  with target.planning('cpu'):
    stage = make_stage(config, len(config.stages) - 1)
    trace = trace_train if step == 'train' else trace_sample
    return peaks.count_flops(trace(stage, sharding.one_cpu()))


def needed_memory(message: str) -> float | None:
  """Reads the memory that a program needs from an out-of-memory message.

  Args:
    message: an error message of the TPU compiler.

  Returns:
    GiB; None if the message is about another error.
  """
  found = re.search(r'\(([\d.]+)([MG])\) exceeds available HBM', message)
  found = found or re.search(r'Used ([\d.]+)([MG]) of [\d.]+[MG] hbm', message)
  if not found:
    return None
  return float(found[1]) / (1024 if found[2] == 'M' else 1)


def measure(
  config: ConfigDict, topology: str, step: str, directory: epath.Path | None
) -> dict[str, Any]:
  """Compiles a step of a prepared config and measures it, or reads the cache.

  Args:
    config: from `prepare`.
    topology: name of the slice.
    step: 'train' or 'sample'.
    directory: directory of the cached results.

  Returns:
    The results of `weigh`, or only `needed` in GiB if the program does not fit
    into memory. Also `state`, bytes on each chip by kind, and `seconds` of
    compiling.

  Raises:
    ValueError: the config does not fit the slice.
  """
  chip, devices = find_devices(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  # Where a T5 is does not change the program, but its architecture does.
  key = json.loads(config.to_json())
  key['text']['path'] = repr(make_text_encoder(config))
  with target.planning('gpu' if chip.kind.startswith('NVIDIA') else 'tpu'):
    *_, stage = check_stages(config, mesh)
    return cached(
      directory,
      [key, topology, step, _settings(), _versions(topology)],
      lambda: _measure(stage, mesh, step),
    )


def _measure(stage: BaseStage, mesh: Mesh, step: str) -> dict[str, Any]:
  if step == 'sample':
    stage.require_generative('--step')
  state = stage.state_shapes(mesh)
  kinds = {'EMA': state.ema}
  turns, trace = stage.config.sampler.num_steps, trace_sample
  if step == 'train':
    kinds = {
      'parameters': state.params,
      'optimizer': state.opt_state,
      'EMA': (state.ema, state.lags),
    }
    turns, trace = stage.settings.accumulate, trace_train
  kinds['text encoder'] = frozen_shapes(stage.config, mesh)
  if earlier := _earlier(stage, mesh):
    kinds['earlier stages'] = earlier
  sizes = {kind: bytes_per_chip(tree) for kind, tree in kinds.items()}
  begin = time.monotonic()
  try:
    needs = weigh(trace(stage, mesh).lower().compile(), turns)
  except jax.errors.JaxRuntimeError as error:
    needed = needed_memory(str(error))
    if needed is None:
      raise
    needs = {'needed': needed}
  if target.platform() == 'gpu':
    needs['flops'] = _count_flops(stage.config, step) / mesh.size
  return {'state': sizes, **needs, 'seconds': time.monotonic() - begin}


def cached(
  directory: epath.Path | None, question: Any, answer: Callable[[], Any]
) -> Any:
  """Returns `answer()`, or the cached answer to the same question.

  Args:
    directory: directory of the cache, which has a JSON file for each answer;
      None for none.
    question: everything that the answer depends on, of JSON's types.
    answer: computes the answer, of JSON's types.
  """
  if directory is None:
    return answer()
  key = hashlib.sha256(
    json.dumps(question, sort_keys=True).encode()
  ).hexdigest()
  path = directory / f'{key[:32]}.json'
  if path.exists():
    with contextlib.suppress(ValueError):  # Damaged: computed again.
      return files.read_json(path)
  result = answer()
  try:
    files.write_json(path, result, shared=True)
  except OSError as error:
    logging.warning('The result is not cached: %s', error)
  return result


def _settings() -> dict[str, Any]:
  """What changes the compiled program, but is no part of the config."""
  return {
    'level': jax.config.jax_optimization_level,
    'precision': jax.config.jax_default_matmul_precision,
    # Without what `find_devices` adds for GPUs, in its first call only.
    'xla': os.environ.get('XLA_FLAGS', '').replace(_UNTRIED, '').split(),
    'libtpu': os.environ.get('LIBTPU_INIT_ARGS', '').split(),
  }


def _versions(topology: str) -> dict[str, str]:
  root = pathlib.Path(__file__).parents[1]
  source = hashlib.sha256(
    b''.join(path.read_bytes() for path in sorted(root.rglob('*.py')))
  )
  if topology.split(':')[0] in _GPU_MEMORY:
    compilers = {each.name: each.dist.version for each in _cuda_plugins()}
  else:
    compilers = {'libtpu': importlib.metadata.version('libtpu')}
  return {
    'mdm_jax': source.hexdigest(),
    **compilers,
    **{
      name: importlib.metadata.version(name)
      for name in ('jax', 'jaxlib', 'flax', 'optax')
    },
  }
