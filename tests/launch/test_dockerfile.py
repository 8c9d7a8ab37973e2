"""The Dockerfile's steps, run in a fresh Debian tree, and a run inside it.

As root, without Docker: `mmdebstrap` makes the tree of the base image, and each
step runs in it by chroot, in a mount namespace of its own, whose mounts end
with it.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from tests import toy

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = ROOT / 'launch' / 'Dockerfile'
USER = '4242:4242'  # It is in no file of the image.
# What a container has: processes, devices of its host, 64 MiB of shared memory.
MOUNTS = """
  root=$1; shift
  mount -t proc proc "$root/proc"
  mount -t sysfs -o ro sysfs "$root/sys"
  mount -t tmpfs -o size=64m shm "$root/dev/shm"
"""
# All else is then read-only.
READ_ONLY = """
  mount --bind "$1" "$1"
  mount --bind "$1/data" "$1/data"
  mount -o remount,bind,ro "$1"
"""
# How this machine reaches its package index.
NETWORK = re.compile(r'PIP_|.*_proxy$|SSL_CERT_FILE$|REQUESTS_CA_BUNDLE$', re.I)


def read_steps(path):
  """(instruction, argument) of each step; continued lines are joined."""
  lines = [
    line for line in path.read_text().splitlines() if line.strip()[:1] != '#'
  ]
  text = '\n'.join(lines).replace('\\\n', '')
  return [tuple(line.split(None, 1)) for line in text.splitlines() if line]


class Image:
  """A directory tree, to which the steps of a Dockerfile are applied."""

  def __init__(self, root):
    self.root = root
    self.env = {'PATH': '/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}
    self.arguments = {}
    self.directory, self.entrypoint = '/', []

  def build(self, steps):
    for instruction, argument in steps:
      getattr(self, f'_{instruction.lower()}')(argument)

  def run(self, command, user='0:0', read_only=False, **env):
    """Runs a command in the tree; its output is in one text."""
    script = (READ_ONLY if read_only else '') + MOUNTS
    script += 'exec chroot --userspec="$1" "$root" "${@:2}"'
    inside = f'cd {self.directory}; exec "$@"'
    variables = [f'{key}={value}' for key, value in (self.env | env).items()]
    return subprocess.run(
      ['unshare', '--mount', 'bash', '-ec', script, 'bash', self.root, user]
      + ['env', '-i', *variables, 'sh', '-ec', inside, 'sh', *command],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=600,
    )

  def _from(self, name):
    release = re.fullmatch(r'debian:(\w+)-slim', name)[1]
    done = subprocess.run(
      ['mmdebstrap', '--variant=minbase', release, self.root],
      capture_output=True,
      text=True,
    )
    assert not done.returncode, done.stderr
    shutil.copy('/etc/resolv.conf', self.root / 'etc')

  def _arg(self, text):
    name, _, default = text.partition('=')
    self.arguments[name] = default

  def _env(self, text):
    for word in shlex.split(text):
      name, _, value = word.partition('=')
      self.env[name] = re.sub(
        r'\$\{?(\w+)\}?', lambda match: self.env[match[1]], value
      )

  def _workdir(self, path):
    self.directory = os.path.join(self.directory, path)
    self._inside(self.directory).mkdir(parents=True, exist_ok=True)

  def _copy(self, text):
    *sources, target = shlex.split(text)
    for source in sources:
      command = ['cp', '-r', ROOT / source]
      subprocess.run([*command, self._inside(target)], check=True)

  def _run(self, text):
    done = self.run(['sh', '-c', text], **self.arguments, **self._network())
    assert not done.returncode, f'{text}\n{done.stdout}'

  def _entrypoint(self, text):
    self.entrypoint = json.loads(text)

  def _inside(self, path):
    return self.root / os.path.join(self.directory, path).lstrip('/')

  def _network(self):
    """Settings of this machine for pip; files that they name are copied."""
    found = {}
    for name, value in os.environ.items():
      if not NETWORK.match(name):
        continue
      if os.path.isfile(value):
        copy = self.root / 'run' / name
        shutil.copy(value, copy)
        value = f'/run/{name}'
      found[name] = value
    return found


def needed():
  """Why the tree cannot be made here, or None; installs mmdebstrap."""
  if os.geteuid():
    return 'chroot needs root'
  if subprocess.run(['unshare', '--mount', 'true']).returncode:
    return 'this machine permits no mounts'
  if not shutil.which('mmdebstrap'):
    if not shutil.which('apt-get'):
      return 'mmdebstrap is not installed'
    install = (
      'apt-get update -qq && apt-get install -y -qq --no-install-recommends '
      'mmdebstrap'
    )
    subprocess.run(
      ['sh', '-c', install],
      env=os.environ | {'DEBIAN_FRONTEND': 'noninteractive'},
      stdout=subprocess.DEVNULL,
    )
  if not shutil.which('mmdebstrap'):
    return 'apt-get gave no mmdebstrap'


@pytest.mark.processes  # It takes as long as those: about a minute.
def test_the_image_trains_as_any_user_on_a_read_only_disk(tmp_path):
  if reason := needed():
    pytest.skip(reason)
  # Others may not enter pytest's directory; chroot may.
  image = Image(tmp_path / 'image')
  try:
    image.build(read_steps(DOCKERFILE))
    data = image.root / 'data'
    data.mkdir()
    os.chown(data, *map(int, USER.split(':')))
    (data / 'toy.py').write_text(
      toy.recipe(1, 4, sample_every=4, data__num_workers=1)
    )

    def run(*command):
      return image.run(
        command,
        user=USER,
        read_only=True,
        JAX_PLATFORMS='cpu',
        JAX_DISABLE_MOST_OPTIMIZATIONS='true',
      )

    assert run('touch', '/mdm_jax/file').returncode == 1
    main = [*image.entrypoint, '--config=/data/toy.py']
    done = run(*main, '--workdir=/data/run')
    assert done.returncode == 0, done.stdout
    (warning,) = re.findall('WARNING (.*)', done.stdout)
    assert warning.startswith('Nothing is cached in ~/.cache/mdm_jax/xla: ')
    assert 'Traceback' not in done.stdout and 'Finished in' in done.stdout
    saved = data / 'run' / 'checkpoints' / '0_8' / '4' / 'manifest.json'
    assert saved.stat().st_uid == int(USER.split(':')[0])
    assert (data / 'run' / 'samples' / '8_4.png').exists()
    # By default it writes beside the code, which is refused in one line.
    done = run(*main)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
      'error: runs/toy cannot be written to: Read-only file system.'
    )
    # What TPUs and buckets need is there.
    done = run('python', '-c', 'import gcsfs, libtpu')
    assert done.returncode == 0, done.stdout
  finally:
    shutil.rmtree(image.root, ignore_errors=True)


@pytest.mark.parametrize('step', ['NONSENSE x', 'USER nobody'])
def test_a_step_that_this_test_cannot_run_fails(step):
  with pytest.raises(AttributeError, match=step.split()[0].lower()):
    Image(pathlib.Path('/none')).build([tuple(step.split())])


def test_the_image_holds_what_main_needs():
  lines = DOCKERFILE.read_text().splitlines()
  copied = [line.split()[1] for line in lines if line.startswith('COPY ')]
  assert set(copied) == {'requirements.txt', 'configs', 'mdm_jax'}
  assert all((ROOT / name).exists() for name in copied)
  assert lines[-1] == 'ENTRYPOINT ["python", "-m", "mdm_jax.main"]'
