"""launch/gke.sh: its commands and the manifest, and how it follows a job."""

import subprocess

import pytest
import yaml

from tests.launch.scripts import GOOGLE, LAUNCH


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
