"""Which versions and which devices a program runs with, in words."""

import glob
import importlib.metadata
import os
import pathlib
import platform
import shutil

from absl import logging
import jax

import mdm_jax

_CUDA = 'jax[cuda12]'
# Of NVIDIA's driver, in containers, and of Windows' Linux.
_NVIDIA_FILES = ('/dev/nvidia[0-9]*', '/dev/nvidiactl')
_TPU_FILES = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# Other devices may be passed through VFIO too: this is Google's PCI vendor id.
_VENDORS, _GOOGLE = '/sys/bus/pci/devices/*/vendor', '0x1ae0'


def log_start(**rows: str) -> None:
  """Logs versions, devices and further rows, a line each, values aligned.

  Args:
    **rows: values by label.
  """
  rows = {'version': versions(), 'devices': devices()} | rows
  width = max(map(len, rows))
  for label, value in rows.items():
    logging.info('%s  %s', label.ljust(width), value)


def versions() -> str:
  """Versions of this package, JAX and Python."""
  return (
    f'mdm_jax {mdm_jax.__version__}, JAX {jax.__version__}, '
    f'Python {platform.python_version()}'
  )


def devices() -> str:
  """Back end, number and kind of all devices; processes if several."""
  found = jax.devices()
  kind = found[0].device_kind
  text = f'{len(found)} {found[0].platform.upper()} device'
  text += 's' if len(found) > 1 else ''
  if kind.lower() != found[0].platform:
    text += f' ({kind})'
  if jax.process_count() > 1:
    text += f' in {jax.process_count()} processes'
  return text


def check_accelerators() -> None:
  """Logs a line if JAX uses the CPU of a machine with a GPU or a TPU.

  Not if JAX_PLATFORMS asks for the CPU.

  Raises:
    ValueError: JAX_PLATFORMS asks for an accelerator, and JAX uses the CPU.
  """
  if jax.default_backend() != 'cpu':
    return
  if platforms := os.environ.get('JAX_PLATFORMS'):
    # Other back ends that are missing are JAX's error.
    if platforms.startswith('cuda,'):
      found = 'JAX finds none: see what nvidia-smi says'
      if not _has_cuda_plugin():
        found = f'JAX for CUDA is not installed: pip install -U "{_CUDA}"'
      raise ValueError(
        f'JAX_PLATFORMS={platforms} asks for an NVIDIA GPU, and {found}, or '
        'unset JAX_PLATFORMS to use the CPU.'
      )
    return
  if _exist(_NVIDIA_FILES) or shutil.which('nvidia-smi'):
    kind, package = 'an NVIDIA GPU', _CUDA
  elif _exist(_TPU_FILES) and _has_google_devices():
    kind, package = 'a TPU', 'jax[tpu]'
  else:
    return
  logging.warning(
    'This machine seems to have %s, but JAX cannot use it and runs on the CPU: '
    'pip install -U "%s". (JAX_PLATFORMS=cpu hides this line.)',
    kind,
    package,
  )


def _has_cuda_plugin() -> bool:
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return any('cuda' in plugin.name for plugin in plugins)


def _exist(patterns: tuple[str, ...]) -> bool:
  return any(glob.glob(pattern) for pattern in patterns)


def _has_google_devices() -> bool:
  return any(
    pathlib.Path(path).read_text().strip() == _GOOGLE
    for path in glob.glob(_VENDORS)
  )
