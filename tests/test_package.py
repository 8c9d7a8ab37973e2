"""The package can be installed, and trains outside of the clone."""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

from PIL import Image
import yaml

ROOT = pathlib.Path(__file__).parents[1]


def requirements(name: str) -> list[str]:
  """The lines of a requirements file before those for tests."""
  text, _, _ = (ROOT / name).read_text().partition('# For tests')
  return [line for line in text.splitlines() if not line.startswith('#')]


def test_dependencies_are_those_of_the_requirements():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert project['dependencies'] == requirements('requirements.txt')
  extras = project['optional-dependencies']
  assert extras['demo'] == requirements('requirements-demo.txt')
  assert extras.keys() == {
    'demo',
    'wandb',
    'parquet',
    'video',
    'gs',
    's3',
    'tpu',
    'cuda',
  }


def test_one_license_and_one_address_everywhere():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  text = (ROOT / 'LICENSE').read_text()
  # The text of apache.org, unchanged: licences are recognised by it.
  assert hashlib.md5(text.encode()).hexdigest() == (
    '3b83ef96387f14655fc854ddc3c6bd57'
  )
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['license'] == project['license'] == 'Apache-2.0'
  paper = citation['preferred-citation']
  assert (paper['title'], paper['year']) == (
    'Matryoshka Diffusion Models',
    2024,
  )
  address = project['urls']['Repository']
  assert citation['repository-code'] == address
  # In README.md and the notebook it is also part of an address of Colab.
  owner = address.split('/')[-2]
  for name in ('README.md', 'docs/quickstart.ipynb'):
    text = (ROOT / name).read_text()
    owners = re.findall(r'github(?:\.com)?/([^/\s]+)/mdm_jax\b', text)
    assert set(owners) == {owner}, name
  assert address in (ROOT / 'README.md').read_text()


def run(*command, **options) -> subprocess.CompletedProcess:
  done = subprocess.run(
    list(map(str, command)), capture_output=True, text=True, **options
  )
  assert not done.returncode, done.stderr
  return done


def test_a_wheel_trains_in_any_directory(tmp_path):
  source = tmp_path / 'source'  # Building leaves files behind.
  for name in ('configs', 'mdm_jax'):
    shutil.copytree(
      ROOT / name,
      source / name,
      ignore=shutil.ignore_patterns('__pycache__'),
    )
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  run(
    *(sys.executable, '-m', 'pip', 'wheel', source, f'--wheel-dir={tmp_path}'),
    *('--no-deps', '--no-build-isolation', '--no-cache-dir'),
  )
  (wheel,) = tmp_path.glob('mdm_jax-*.whl')
  assert any(
    name.endswith('licenses/LICENSE')
    for name in zipfile.ZipFile(wheel).namelist()
  )
  environment = tmp_path / 'environment'
  venv.create(environment, with_pip=False)
  python = environment / 'bin' / 'python'
  run(
    *(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps'),
    wheel,
  )
  # The dependencies come from this environment.
  packages = sysconfig.get_paths(vars={'base': str(environment)})['purelib']
  pathlib.Path(packages, 'dependencies.pth').write_text(
    sysconfig.get_paths()['purelib']
  )
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'mine.py').write_text(
    'from configs import shapes_64\n'
    'def get_config():\n'
    '  config = shapes_64.get_config()\n'
    "  config.dtype = 'float8'\n"
    '  return config\n'
  )
  # Compiled as users have it.
  variables = {
    name: value
    for name, value in os.environ.items()
    if name not in ('PYTHONPATH', 'JAX_DISABLE_MOST_OPTIMIZATIONS')
  } | {'XLA_FLAGS': ''}

  def train(*flags):
    return subprocess.run(
      [python, '-m', 'mdm_jax.main', *flags],
      cwd=elsewhere,
      env=variables,
      capture_output=True,
      text=True,
    )

  done = train(
    '--config=shapes_64:smoke',
    '--config.eval.num_prompts=8',
    '--config.sampler.num_steps=1',
    '--config.stages[0].steps=3',
    '--config.stages[1].steps=3',
    # As small as in toy.shrink: XLA's defaults compile slowly.
    '--config.text.num_layers=0',
    '--config.eval.loss_every=0',
    '--config.model.levels[1].num_blocks=(0,0)',
  )
  assert not done.returncode, done.stderr
  assert 'Finished in' in done.stderr
  samples = elsewhere / 'runs' / 'shapes_64_smoke' / 'samples' / '64_3.png'
  with Image.open(samples) as image:
    assert image.width > 100
  # Recipes of one's own start from shipped ones; others are named.
  for config, message in (
    ('mine.py', "error: dtype='float8'"),
    ('shapes_65', 'error: --config=shapes_65: there is no shipped recipe'),
  ):
    done = train(f'--config={config}')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)
