"""The benchmark measures the real steps, on drawn inputs of their shapes."""

import importlib
import json

import jax
import numpy as np
import pytest

from configs import common
from mdm_jax.builders.check import check
from mdm_jax.builders.model import make_model
from mdm_jax.builders.stage import make_stage
from mdm_jax.runtime import sharding
from mdm_jax.tools import bench


@pytest.mark.parametrize('name', ['cc12m_1024', 'flickr_64', 'imagenet_256'])
def test_needs_neither_data_nor_t5(name):
  recipe = importlib.import_module(f'configs.{name}').get_config('').lock()
  config = bench.without_t5(recipe)
  check(config, sharding.make_mesh(config.mesh))
  model = make_model(config, config.stages[-1])
  width = 2048 if recipe.text.encoder == 't5' else recipe.text.width
  assert model.text_encoder.width == width
  text = bench.make_text(config, 2)
  is_label = recipe.text.encoder == 'label'
  assert text.shape == (2, 1 if is_label else config.text.max_length)
  assert text.dtype == np.int32
  assert (text > 0).all()


def test_batch_of_a_mixed_stage(make_config):
  config = make_config()
  stage = config.stages[1]
  stage.update(mixed_ratio=(1.0, 3.0), batch_size=8)
  batch = bench.make_batch(make_stage(config, 1))
  assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
    'image': ((6, 16, 16, 3), 'uint8'),
    'image_8': ((2, 8, 8, 3), 'uint8'),
    'text': ((8, 8), 'int32'),
    'scale': ((8,), 'float32'),
    'bad': ((8,), 'bool'),
    'stop': ((8,), 'bool'),
    'save': ((8,), 'bool'),
  }


def test_rates():
  found = bench.rates(
    np.array([0.1, 0.2, 0.2, 0.2, 0.9]), images=8, flops=1e9, peak=2e10
  )
  assert found == pytest.approx(
    {
      'step_seconds': 0.2,
      'step_seconds_min': 0.1,
      'step_seconds_p10': 0.14,
      'step_seconds_p90': 0.62,
      'images_per_second': 40.0,
      'device_flops': 1e9,
      'device_flops_per_second': 5e9,
      'mfu': 0.25,
    }
  )
  unknown = bench.rates(np.ones(2), images=8, flops=None, peak=None)
  assert unknown['mfu'] is None and unknown['device_flops_per_second'] is None


def test_measures_both_steps(make_config, tmp_path):
  config = make_config()
  stage = config.stages[0]
  stage.update(batch_size=2, accumulate=2)
  config.eval.batch_size = 4
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  found = bench.measure(
    make_stage(config, 0),
    mesh,
    count=3,
    sampling_steps=2,
    profile=str(tmp_path),
  )
  for name, images in (('train', 2), ('sample', 4 / 3)):
    results = found[name]
    assert 0 < results['step_seconds_min'] <= results['step_seconds']
    assert results['images_per_second'] * results['step_seconds'] == (
      pytest.approx(images)
    )
    assert results['mfu'] > 0
    assert results['program_bytes'] > 1e4
    assert results['compile_seconds'] > 0
    shares = [row['share'] for row in results['operations']]
    assert len(shares) == 20
    assert shares == sorted(shares, reverse=True) and sum(shares) < 1
    assert any('NestedUNet' in row['origin'] for row in results['operations'])
    # For Perfetto and for TensorBoard.
    files = {path.name for path in (tmp_path / name).rglob('*.*')}
    assert 'perfetto_trace.json.gz' in files
    assert any(name.endswith('.xplane.pb') for name in files)
  # Two examples forth and back, against two steps of four images, guided.
  flops = found['train']['device_flops'] / found['sample']['device_flops']
  assert 0.5 < flops < 1.1
  again = json.loads(json.dumps(found))
  again['train']['step_seconds'] *= 2
  lines = bench.report(found, again).splitlines()
  (median,) = (
    line
    for line in lines
    if line.startswith('step, s') and line.endswith(' 0.5')
  )
  assert len(median.split()) == 6


def test_an_autoencoder_is_trained_alone(make_config):
  config = make_config()
  config.stages = [common.stage('first', 0, kind='autoencoder', batch_size=2)]
  config.autoencoder.update(
    resolution=8, channels=(8,), num_blocks=(0,), num_groups=4, patch_size=2
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  stage = make_stage(config, 0)
  found = bench.measure(stage, mesh, count=2, sampling_steps=2)
  assert found.keys() == {'train'} and found['train']['device_flops'] > 1e4
  with pytest.raises(ValueError, match="--only=sample: stage 'first' is an"):
    bench.measure(stage, mesh, count=2, sampling_steps=2, only='sample')


def trace_of_a_gpu() -> str:
  """A trace as XLA writes it.

  Kernels have names of their own, or a library's; another line has the whole
  program.
  """

  def event(name, microseconds, op=None):
    op = f'stats {{ metadata_id: 1 str_value: "{op}" }}' if op else ''
    return f"""events {{
      metadata_id: {names.index(name)} duration_ps: {microseconds}000000 {op}
    }}"""

  names = ['', 'fusion_7', 'nvjet_tst_64x8', 'MemcpyD2D', 'module']
  metadata = '\n'.join(
    f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
    for i, name in enumerate(names)
  )
  return f"""planes {{
    name: "/device:GPU:0"
    lines {{
      name: "Stream #13(Compute)"
      {event('fusion_7', 3, 'fusion.7')}
      {event('nvjet_tst_64x8', 5, 'custom-call.2')}
      {event('nvjet_tst_64x8', 1, 'custom-call.2')}
      {event('MemcpyD2D', 9)}
    }}
    lines {{
      name: "XLA Modules"
      {event('module', 9, 'jit_step')}
    }}
    {metadata}
    stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  }}"""


def test_operations_of_a_gpu(tmp_path):
  (tmp_path / 'host.xplane.pb').write_bytes(
    jax.profiler.ProfileData.text_proto_to_serialized_xspace(trace_of_a_gpu())
  )
  program = (
    '  %custom-call.2 = f32[8]{0} custom-call(%a), op_name="jit(f)/mid/b"'
  )
  product, fusion = bench.operations(tmp_path, program)
  assert (product['name'], fusion['name']) == ('custom-call.2', 'fusion.7')
  assert product['share'] == pytest.approx(2 / 3)
  assert product['origin'] == 'mid/b'
