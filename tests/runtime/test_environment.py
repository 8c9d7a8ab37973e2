"""Versions and devices in words; accelerators that JAX does not use."""

import types

import jax
import pytest

import mdm_jax
from mdm_jax.runtime import environment, sharding


def test_versions():
  assert environment.versions().startswith(
    f'mdm_jax {mdm_jax.__version__}, JAX {jax.__version__}, Python 3.'
  )


@pytest.mark.parametrize(
  'count, platform, kind, processes, expected',
  [
    (8, 'cpu', 'cpu', 1, '8 CPU devices'),
    (1, 'gpu', 'NVIDIA H100', 1, '1 GPU device (NVIDIA H100)'),
    (16, 'tpu', 'TPU v5e', 4, '16 TPU devices (TPU v5e) in 4 processes'),
  ],
)
def test_devices(count, platform, kind, processes, expected, monkeypatch):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  monkeypatch.setattr(jax, 'devices', lambda: [device] * count)
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  assert environment.devices() == expected


@pytest.mark.parametrize(
  'file, vendor, package',
  [
    ('dev/nvidia0', '', 'jax[cuda12]'),
    ('dev/nvidiactl', '', 'jax[cuda12]'),
    ('dev/accel1', '0x1ae0\n', 'jax[tpu]'),
    ('dev/vfio/3', '0x1ae0\n', 'jax[tpu]'),
    ('dev/vfio/3', '0x10de\n', None),  # Something else is passed through.
    ('dev/vfio/vfio', '0x1ae0\n', None),  # VFIO without a device.
    ('dev/null', '0x1ae0\n', None),
  ],
)
def test_an_accelerator_that_is_not_used(
  file, vendor, package, tmp_path, monkeypatch, caplog
):
  def moved(name):
    patterns = getattr(environment, name)
    monkeypatch.setattr(
      environment, name, tuple(f'{tmp_path}{pattern}' for pattern in patterns)
    )

  moved('_NVIDIA_FILES')
  moved('_TPU_FILES')
  monkeypatch.setattr(environment, '_VENDORS', f'{tmp_path}/*/vendor')
  monkeypatch.setattr(environment.shutil, 'which', lambda name: None)
  for path, text in ((file, ''), ('0/vendor', vendor)):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
  axes = {'data': -1, 'fsdp': 1, 'spatial': 1}
  sharding.make_mesh(axes)  # JAX_PLATFORMS asks for the CPU.
  assert not caplog.messages
  monkeypatch.delenv('JAX_PLATFORMS')
  sharding.make_mesh(axes)
  if package is None:
    assert not caplog.messages
  else:
    (line,) = caplog.messages
    assert f'pip install -U "{package}"' in line and '\n' not in line
  caplog.clear()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  environment.check_accelerators()
  assert not caplog.messages


@pytest.mark.parametrize(
  'plugins, remedy',
  [
    ([], 'pip install -U "jax[cuda12]", or unset JAX_PLATFORMS'),
    (['xla_tpu'], 'pip install -U "jax[cuda12]", or unset JAX_PLATFORMS'),
    (['xla_tpu', 'xla_cuda12'], 'see what nvidia-smi says, or unset JAX_PLAT'),
  ],
)
def test_a_gpu_that_is_asked_for_and_missing(plugins, remedy, monkeypatch):
  """JAX itself goes on with the CPU."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda,cpu')
  monkeypatch.setattr(
    environment.importlib.metadata,
    'entry_points',
    lambda group: [types.SimpleNamespace(name=name) for name in plugins],
  )
  with pytest.raises(ValueError, match='=cuda,cpu asks for an NV') as error:
    sharding.make_mesh({'data': -1, 'fsdp': 1, 'spatial': 1})
  assert remedy in str(error.value)
