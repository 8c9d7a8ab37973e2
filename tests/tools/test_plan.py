"""Planning for a slice, with this machine's 8 devices in its place."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cc12m_1024, common
from mdm_jax.builders.data import make_dataset
from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import batch_sizes, make_stage
from mdm_jax.builders.text import make_text_encoder
from mdm_jax.runtime import sharding
from mdm_jax.runtime.peaks import Chip
from mdm_jax.tools import compile_ahead, plan

CHIP = Chip('cpu', flops=100e12, memory=16.0, bandwidth=1e12, links=1e11)


def test_unknown_topology_lists_the_known():
  for name in ('v5e:3x3', 'v9:4x4', 'v5e', ''):
    with pytest.raises(ValueError, match=f'{name}.*v5e:1x1, .*4x4.*v5p:2x2x1'):
      compile_ahead.find_devices(name)


def test_absent_compiler_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(importlib.metadata, 'entry_points', lambda **_: ())
  with pytest.raises(ValueError, match='pip install libtpu'):
    compile_ahead.find_devices('v5e:4x4')
  with pytest.raises(ValueError, match=r'pip install "jax\[cuda12\]"'):
    compile_ahead.find_devices('h100:8')


def test_needed_memory():
  # Two of the compiler's messages.
  assert (
    compile_ahead.needed_memory(
      'E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
      'required for HLO temporaries (40.00G) exceeds available HBM (15.75G)'
    )
    == 40
  )
  assert (
    compile_ahead.needed_memory(
      'Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.'
    )
    == 0.5
  )
  assert compile_ahead.needed_memory('INVALID_ARGUMENT: no such option') is None


def test_roofline_and_price():
  weight = {
    'flops': 20e12,
    'bytes': 50e9,
    'collectives': {'all-gather': 1e9, 'all-reduce': 2e9},
  }
  assert plan.roofline(weight, CHIP) == pytest.approx(
    {'arithmetic': 0.2, 'memory': 0.05, 'links': 0.03}
  )
  assert plan.chip_hours(7200, 2.0, 16) == 16


def test_an_answer_is_remembered_until_the_question_changes(tmp_path):
  asked = []

  def ask(question):
    def answer():
      asked.append(question)
      return {'value': len(asked)}

    return compile_ahead.cached(tmp_path / 'cache', question, answer)

  assert [
    ask(q)['value'] for q in ({'a': 1}, {'a': 1}, {'a': 2}, {'a': 1})
  ] == [1, 1, 2, 1]
  assert len(list((tmp_path / 'cache').iterdir())) == 2


def test_report_of_what_does_not_fit():
  rows, rate = plan.report({'needed': 17.5, 'seconds': 1}, CHIP, 32, 16)
  assert rows == [['fits', 'no: 17.50 of 16.0 GiB, 1.50 too much']]
  assert rate is None
  # A GPU's compiler measures it all the same.
  measured = {
    'state': {},
    'memory': 20 * 2**30,
    'activations': 2**30,
    'flops': 20e12,
    'bytes': 500e9,
    'collectives': {},
  }
  rows, rate = plan.report(measured, CHIP, 64, 16)
  assert rows[0] == ['fits', 'no: 20.00 of 16.0 GiB, 4.00 too much']
  assert rate is None and rows[-1][0] == 'roofline'


def test_report():
  measured = {
    'state': {'parameters': 2**30, 'text encoder': 0},
    'memory': 12 * 2**30,
    'activations': 8 * 2**30,
    'flops': 20e12,
    'bytes': 500e9,
    'collectives': {'all-gather': 1e9},
  }
  rows, rate = plan.report(measured, CHIP, 64, 16)
  assert rows == [
    ['fits', 'yes: 12.00 of 16.0 GiB, 4.00 left'],
    ['memory: parameters', '1.00 GiB'],
    ['memory: activations', '8.00 GiB'],
    ['arithmetic', '20.00 TFLOP, 5.00 an image'],
    ['memory moved', '500.0 GB, 125.0 an image'],
    ['all-gather', '1.000 GB'],
    ['roofline', '500 ms (arithmetic 200, memory 500, links 10)'],
    ['images/s', 'at most 128.0'],
  ]
  assert rate == 128


def test_prepare_makes_do_without_an_encoder(tmp_path):
  config = cc12m_1024.get_config()
  config.mesh.fsdp = 16
  given = config.to_json()
  prepared, notes = compile_ahead.prepare(config, 2, 4, 32, str(tmp_path))
  assert [stage.name for stage in prepared.stages] == ['1024']
  assert (prepared.stages[0].batch_size, prepared.eval.batch_size) == (128, 32)
  assert len(notes) == 2 and 'flan-t5-xl' in notes[1]
  # Or the run's images, and what they cost, would be counted wrong.
  assert config.to_json() == given
  encoder = make_text_encoder(prepared)
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), np.ones((1, 4), np.int32)
  )
  assert sum(
    map(math.prod, (x.shape for x in jax.tree.leaves(shapes)))
  ) == pytest.approx(1.22e9, rel=0.01)
  with pytest.raises(
    ValueError, match='--stage=3: the config has stages 0 to 2'
  ):
    compile_ahead.prepare(config, 3, None, 16, str(tmp_path))
  with pytest.raises(ValueError, match='does not arrange 24 devices'):
    compile_ahead.prepare(config, 2, None, 24, str(tmp_path))


@pytest.fixture
def config(make_config):
  config = make_config()
  config.mesh.update(data=2, fsdp=4)
  config.stages[1].update(batch_size=24, mixed_ratio=(1.0, 2.0))
  return config


@pytest.fixture
def slice_of_cpus(monkeypatch):
  """Every topology is this machine's 8 devices."""
  for module in (plan, compile_ahead):
    monkeypatch.setattr(
      module, 'find_devices', lambda topology: (CHIP, jax.devices())
    )
  monkeypatch.setattr(
    compile_ahead, '_versions', lambda topology: {}
  )  # libtpu's, if it were here.


def test_batch_is_the_pipelines(config, tmp_path):
  prepared, _ = compile_ahead.prepare(config, 1, None, 8, str(tmp_path))
  mesh = sharding.make_mesh(config.mesh)
  stage = config.stages[1]
  batch = next(
    iter(
      make_dataset(
        config,
        'train',
        make_model(config, stage).image_shapes,
        batch_sizes(stage),
        process_index=0,
        process_count=1,
      )
    )
  )
  expected = sharding.shard_batch(
    batch | {'stop': batch['bad'], 'save': batch['bad']}, mesh
  )
  planned = compile_ahead.abstract_batch(make_stage(prepared, 0), mesh)
  assert {
    name: (x.shape, x.dtype, x.sharding) for name, x in planned.items()
  } == {name: (x.shape, x.dtype, x.sharding) for name, x in expected.items()}


def test_state_by_kind(config, tmp_path):
  prepared, _ = compile_ahead.prepare(config, 1, None, 8, str(tmp_path))
  prepared.averages.widths = (0.05, 0.1)
  mesh = sharding.make_mesh(config.mesh)
  state = make_stage(prepared, 0).state_shapes(mesh)
  size = compile_ahead.bytes_per_chip(state.params)
  whole = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(state.params))
  assert whole / 4 < size < whole  # Kernels are spread over 4.
  assert compile_ahead.bytes_per_chip(state.ema) == size
  assert compile_ahead.bytes_per_chip(state.lags) == 2 * size
  # Two moments and a count or two.
  assert 0 < compile_ahead.bytes_per_chip(state.opt_state) - 2 * size <= 16


def test_plan_compiles_once(
  config, slice_of_cpus, tmp_path, capsys, monkeypatch
):
  ask = [config, 'v5e:2x4', [0], None, 'train', 1.5, tmp_path]
  plan.plan(*ask)
  first = capsys.readouterr().out
  for words in (
    "stage '8', train step",
    '2 images a chip',
    'mesh 2 data x 4 fsdp x 1 spatial',
    'fits',
    'yes: 0.',
    'memory: optimizer',
    'all-reduce',
    'roofline',
    'at 1.5 each',
  ):
    assert words in first, words
  assert 'no lower bounds' not in first
  monkeypatch.setattr(compile_ahead, 'trace_train', None)
  plan.plan(*ask)
  assert capsys.readouterr().out == first
  remembered = json.loads(next(tmp_path.glob('*.json')).read_text())
  assert remembered['memory'] == (
    remembered['arguments'] + remembered['activations']
  )
  assert remembered['arguments'] > sum(remembered['state'].values())
  # Of another level of optimisation nothing is known yet.
  jax.config.update('jax_optimization_level', 'O1')
  try:
    with pytest.raises(TypeError, match='not callable'):
      plan.plan(*ask)
  finally:
    jax.config.update('jax_optimization_level', 'UNKNOWN')


def test_sizes_of_a_t5_are_measured_apart(
  config, slice_of_cpus, tmp_path, t5_directory, monkeypatch
):
  monkeypatch.setattr(
    compile_ahead,
    '_measure',
    lambda stage, *_: (
      measured.append(stage.model.text_encoder.spec.num_layers)
      or {'layers': measured[-1]}
    ),
  )
  found, measured = [], []
  layers = t5_directory.config['num_layers']
  for name, more in (('a', 0), ('b', 1), ('c', 0)):
    path = tmp_path / name
    shutil.copytree(t5_directory.path, path)
    changed = t5_directory.config | {'num_layers': layers + more}
    (path / 'config.json').write_text(json.dumps(changed))
    config.text.update(encoder='t5', path=str(path))
    found.append(
      compile_ahead.measure(config, '', 'train', tmp_path / 'cache')['layers']
    )
  assert found == [layers, layers + 1, layers]
  assert measured == [layers, layers + 1]  # Not again where it has moved.


def test_other_compilers_and_flags_are_measured_apart(
  config, slice_of_cpus, tmp_path, monkeypatch
):
  measured = []
  monkeypatch.setattr(
    compile_ahead,
    '_measure',
    lambda *_: measured.append(0) or {'count': len(measured)},
  )

  def measure():
    return compile_ahead.measure(config, '', 'train', tmp_path)['count']

  assert (measure(), measure()) == (1, 1)
  flags = f'{os.environ.get("XLA_FLAGS", "")} {compile_ahead._UNTRIED}'
  monkeypatch.setenv('XLA_FLAGS', flags)
  assert measure() == 1  # As a call after the first one finds them.
  monkeypatch.setenv('XLA_FLAGS', f'--xla_other {flags}')
  assert measure() == 2
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_other')
  assert measure() == 3
  with jax.default_matmul_precision('highest'):
    assert measure() == 4
  assert measure() == 3


def test_the_compiler_of_a_gpu_is_that_of_its_plugin(monkeypatch):
  plugin = types.SimpleNamespace(
    name='xla_cuda12', dist=types.SimpleNamespace(version='0.1')
  )
  monkeypatch.setattr(
    importlib.metadata,
    'entry_points',
    lambda group, name: [plugin] if name == plugin.name else [],
  )
  assert compile_ahead._versions('h200:8')['xla_cuda12'] == '0.1'


def test_sampling_step(config, slice_of_cpus, tmp_path, capsys):
  plan.plan(config, 'v5e:2x4', [0], None, 'sample', None, tmp_path)
  out = capsys.readouterr().out
  assert "stage '8', sample step" in out and '1 images a chip' in out
  # The encoder of prompts does not run in each step, but counts so.
  steps = config.sampler.num_steps
  assert f'counts {steps} times, with the loop: the times may be' in out


def test_an_autoencoder_is_trained_alone(
  config, slice_of_cpus, tmp_path, capsys
):
  config.stages[0] = common.stage('first', 0, kind='autoencoder', batch_size=16)
  config.autoencoder.update(
    resolution=8, channels=(8,), num_blocks=(0,), num_groups=4, patch_size=2
  )
  plan.plan(config, 'v5e:2x4', [0], None, 'train', None, tmp_path)
  out = capsys.readouterr().out
  assert "stage 'first', train step" in out and '2 images a chip' in out
  with pytest.raises(ValueError, match="'first' is an autoencoder, .*=train"):
    plan.plan(config, 'v5e:2x4', [0], None, 'sample', None, tmp_path)


def test_a_gpu_is_counted_before_its_libraries(
  config, slice_of_cpus, tmp_path, monkeypatch
):
  gpu = dataclasses.replace(CHIP, kind='NVIDIA H100')
  found = {}
  for chip in (CHIP, gpu):
    monkeypatch.setattr(
      compile_ahead, 'find_devices', lambda _, chip=chip: (chip, jax.devices())
    )
    prepared, _ = compile_ahead.prepare(config, 0, None, 8, str(tmp_path))
    # Flash attention does not compile here.
    prepared.mesh.update(data=1, fsdp=4, spatial=2)
    for level in prepared.model.levels:
      level.lanes = 1
    found[chip.kind] = compile_ahead.measure(prepared, '', 'train', None)
  here, there = found['cpu'], found['NVIDIA H100']
  # Each device has its part.
  assert 0.5 < there['flops'] / here['flops'] < 1.5
  assert there['bytes'] > 0 and there['state'] == here['state']


def test_prompts_of_a_gpus_program_count_once(config, tmp_path):
  prepared, _ = compile_ahead.prepare(config, 0, None, 8, str(tmp_path))
  prepared.sampler.num_steps = 1
  one = compile_ahead._count_flops(prepared, 'sample')
  prepared.sampler.num_steps = 9
  nine = compile_ahead._count_flops(prepared, 'sample')
  assert 8 * one < nine < 8.9 * one


def test_search_recommends_the_fastest_that_fits(
  config, slice_of_cpus, tmp_path, capsys, monkeypatch
):
  def measure(config, topology, step, directory):
    (level,) = {level.remat for level in config.model.levels}
    per_chip = config.stages[0].batch_size // 8
    if per_chip > {'none': 1, 'block': 4, 'level': 4}[level]:
      return {'needed': 20.0}
    return {
      'state': {},
      'memory': 0,
      'activations': 0,
      'bytes': 0,
      'collectives': {'all-gather': 1e10 * (config.mesh.fsdp + 1)},
      'flops': per_chip * {'none': 10, 'block': 12, 'level': 15}[level],
    }

  monkeypatch.setattr(plan, 'measure', measure)
  config.stages[1].mixed_ratio = (0.0, 1.0)
  plan.search(config, 'v5e:2x4', 1, tmp_path)
  out = capsys.readouterr().out.splitlines()
  assert out[-1] == (
    'Best: --config.mesh.fsdp=1 remat=block --batch_per_chip=4'
  )
  assert sum('too much' in line for line in out) == 6


def test_chip_hours_are_of_what_fits(
  config, slice_of_cpus, tmp_path, capsys, monkeypatch
):
  def measure(config, topology, step, directory):
    fits = config.stages[0].num_levels == 1
    return {
      'state': {},
      'memory': (10 if fits else 20) * 2**30,
      'activations': 0,
      'bytes': 1e9,
      'collectives': {},
      'flops': 1e12,
      'seconds': 1,
    }

  monkeypatch.setattr(plan, 'measure', measure)
  plan.plan(config, 'h100:8', [0, 1], None, 'train', 1.5, tmp_path)
  out = capsys.readouterr().out
  assert '10.00 of 16.0 GiB, 6.00 left' in out
  assert 'no: 20.00 of 16.0 GiB, 4.00 too much' in out
  assert out.count('chip-hours') == 1 and 'All' not in out


def test_search_ends_where_memory_is_not_short(
  config, slice_of_cpus, tmp_path, capsys, monkeypatch
):
  def measure(config, topology, step, directory):
    per_chip = config.stages[0].batch_size // 8
    return {
      'state': {},
      'memory': 0,
      'activations': 0,
      'bytes': 0,
      'collectives': {},
      'flops': 100 + per_chip,
    }

  monkeypatch.setattr(plan, 'measure', measure)
  config.stages[1].update(mixed_ratio=(1.0, 2.0), accumulate=2)
  plan.search(config, 'v5e:2x4', 1, tmp_path)
  out = capsys.readouterr().out.splitlines()
  batches = [
    int(re.search(r'batch_per_chip=(\d+): yes', line)[1]) for line in out[:-1]
  ]
  assert batches == [6 * 2**i for i in range(len(batches))]
  gains = [2 * (100 + b) / (100 + 2 * b) for b in batches[:-1]]
  assert all(gain >= 1.05 for gain in gains[:-1]) and gains[-1] < 1.05
  assert out[-1] == (
    f'Best: --config.mesh.fsdp=1 remat=none --batch_per_chip={batches[-1]}'
  )


def test_search_of_what_no_slice_can_have_names_why(
  config, slice_of_cpus, tmp_path, capsys
):
  for level in config.model.levels:
    level.num_heads = 7
  with pytest.raises(ValueError, match='num_heads=7 does not divide'):
    plan.search(config, 'v5e:2x4', 1, tmp_path)
  assert 'Nothing fits' not in capsys.readouterr().out


@pytest.mark.parametrize('searches', [False, True])
def test_a_missing_t5_is_named_in_a_line(
  config, slice_of_cpus, tmp_path, monkeypatch, searches
):
  config.text.update(encoder='t5', path=str(tmp_path / 'missing'))
  values = types.SimpleNamespace(
    config=config,
    topology='v5e:2x4',
    stage=None,
    batch_per_chip=None,
    step='train',
    search=searches,
    quick=False,
    price=None,
    cache=str(tmp_path / 'cache'),
  )
  monkeypatch.setattr(plan.flags, 'FLAGS', values)
  monkeypatch.setattr(plan.console, 'setup_logging', lambda: None)
  monkeypatch.setattr(plan.flag_types, 'refuse', lambda *_: None)
  with pytest.raises(SystemExit, match='^error: .*missing/spiece.model'):
    plan.main([])


def test_precomputed_features_are_read_as_they_are(tmp_path):
  config = cc12m_1024.get_config()
  config.text.encoder = 'precomputed'
  prepared, _ = compile_ahead.prepare(config, 2, None, 16, str(tmp_path))
  text = compile_ahead._text(make_stage(prepared, 0), 3)
  assert (text.shape, text.dtype) == ((3, 128, 2048), jnp.float32)
