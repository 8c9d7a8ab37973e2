"""launch/tpu_vm.sh: its commands, and their effects on stand-ins for VMs."""

import concurrent.futures
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.launch.scripts import GOOGLE, LAUNCH, PASTE


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
