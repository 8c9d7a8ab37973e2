"""What checkpoints promise on a disk, they hold in a bucket."""

import json
import threading
import time

from etils import epath
import google_crc32c
import jax
import numpy as np
import pytest

from mdm_jax.checkpoint import (
  contents,
  identity,
  manifest,
  restore,
  saved_steps,
)
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.inference import weights
from mdm_jax.runtime import files
from tests.checkpoint.test_damage import abstract, restored, save, state, train

STAGE = 'checkpoints/0_8'


@pytest.fixture
def directory(bucket):
  """For checkpoints of a stage; empty."""
  return epath.Path(bucket.path) / STAGE


@pytest.fixture
def two(directory):
  """With the steps 5 and 10."""
  identity.begin_run(directory.parent.parent)
  save(directory, 5, 10)
  return directory


class Objects:
  """The objects of the step 10, and of others, past all faults."""

  def __init__(self, bucket):
    self._system = bucket.past_the_proxy
    self._root = f'{bucket.path.removeprefix("gs://")}/{STAGE}'

  def of(self, step):
    """Their content by their names."""
    root = f'{self._root}/{step}'
    return {
      name.removeprefix(f'{root}/'): self._system.cat_file(name)
      for name in self._system.find(root)
    }

  def write(self, name, content, step=10):
    self._system.pipe_file(f'{self._root}/{step}/{name}', content)

  def remove(self, *names, step=10):
    for name in names:
      self._system.rm_file(f'{self._root}/{step}/{name}')

  def copy(self, name, step, other):
    self.write(name, self.of(step)[name], other)

  def names(self):
    """Of steps and what else there is beside them."""
    return sorted(
      path.rpartition('/')[2] for path in self._system.ls(self._root)
    )


@pytest.fixture
def objects(bucket):
  return Objects(bucket)


def flipped(content):
  return bytes([content[0] ^ 1]) + content[1:]


def test_saves_removes_the_oldest_and_restores(bucket, directory, objects):
  with Checkpoints(directory, save_interval=2, max_to_keep=2) as opened:
    assert opened.latest_step() is None
    saved = [s for s in range(1, 9) if opened.save(s, state(s), {'at': s})]
    assert saved == [2, 4, 6, 8]
    opened.wait()
    assert objects.names() == ['6', '8']
    assert opened.latest_step() == 8
    found, extra = opened.restore(abstract(), 6)
    assert extra == {'at': 6} and int(found['step']) == 6
    assert not opened.save(8, state(8), {}, force=True)
  assert restored(directory) == train(directory) == 8
  assert saved_steps.latest_step(directory) == 15
  saved_steps.mark_finished(directory, 15)
  assert saved_steps.finished_step(directory) == 15
  # Whoever may write objects need not see the properties of the bucket.
  assert not [x for x in bucket.requests if x.endswith('/storage/v1/b/tests')]


def test_a_flipped_byte_in_each_kind_of_object_is_found(two, objects):
  whole = objects.of(10)
  assert len(whole) > 15
  for name, content in whole.items():
    assert manifest.problem(two / '10') is None
    objects.write(name, flipped(content))
    problem = manifest.problem(two / '10')
    # Of the manifest only that it is no longer the text that it should be.
    assert problem == f'{name} has changed' or name == 'manifest.json'
    assert problem
    assert saved_steps.newest_good_step(two) == 5
    objects.write(name, content)  # It is another generation of it.
  assert restored(two) == 10


def test_a_missing_and_an_extra_object_are_found(two, objects):
  for name, content in objects.of(10).items():
    objects.remove(name)
    expected = f'{name} is missing' if name != 'manifest.json' else None
    assert manifest.exists(two / '10') == bool(expected)
    assert not expected or manifest.problem(two / '10') == expected
    assert saved_steps.newest_good_step(two) == 5
    objects.write(name, content)
  objects.write('state/more', b'')
  assert manifest.problem(two / '10') == 'state/more is extra'
  assert restored(two) == 5


def test_a_damaged_step_is_set_aside(two, objects, caplog):
  objects.remove('commit_success.txt', 'state/_METADATA')
  left = objects.of(10)
  assert restored(two) == 5
  assert train(two) == 5
  assert f'{two}/10 is damaged: commit_success.txt is missing, and 1' in (
    caplog.text
  )
  assert f'{two}/10 is now 10.corrupt.' in caplog.text
  assert objects.of('10.corrupt') == left
  assert objects.names() == ['10.corrupt', '15', '5']
  # Another one of the same step gets another name.
  for name, content in objects.of(15).items():
    objects.write(name, content)
    objects.remove(name, step=15)
  assert train(two) == 5
  assert objects.names() == ['10.corrupt', '10.corrupt+', '15', '5']
  assert objects.of('10.corrupt') == left


def in_order(names):
  """Names in the order in which they are moved."""
  return sorted(names, key=lambda name: '/' not in name)


# At -1 only what tells what a directory is stands at its old place.
@pytest.mark.parametrize(
  ['how', 'count'], [('moved', 8), ('moved', -1), ('copied', -1)]
)
def test_setting_aside_goes_on_where_it_was_killed(two, objects, how, count):
  objects.remove('extra/metadata')
  left = objects.of(10)
  for name in in_order(left)[:count]:
    objects.copy(name, 10, '10.corrupt')
    if how == 'moved':
      objects.remove(name)
  assert restored(two) == 5
  assert train(two) == 5
  assert objects.of('10.corrupt') == left
  assert objects.names() == ['10.corrupt', '15', '5']


def test_what_an_interrupted_save_has_left_is_removed(two, objects):
  for name, content in objects.of(10).items():
    if name not in ('manifest.json', 'commit_success.txt'):
      objects.write(name, content, 12)
  metadata = json.loads(objects.of(12)['_CHECKPOINT_METADATA'])
  metadata['commit_timestamp_nsecs'] = None
  objects.write('_CHECKPOINT_METADATA', json.dumps(metadata).encode(), 12)
  # It was killed at its beginning.
  objects.copy('_CHECKPOINT_METADATA', 12, 13)
  # Orbax would remove this as well.
  objects.write('state/d/a', b'content', '7.corrupt')
  assert restored(two) == 10
  assert objects.of(12)
  assert train(two) == 10
  assert objects.names() == ['10', '15', '5', '7.corrupt']


def test_a_removal_that_was_interrupted_is_finished(two, objects):
  whole = objects.of(5)
  objects.remove(*(name for name in whole if '/' in name), step=5)
  assert restored(two) == 10
  with Checkpoints(two, save_interval=1, max_to_keep=2) as opened:
    assert opened.latest_step() == 10
    opened.save(15, state(15), {'at': 15})
  assert objects.names() == ['10', '15']


def test_a_commit_without_a_manifest_is_the_last_resort(two, objects, caplog):
  objects.remove('manifest.json')
  objects.remove('manifest.json', 'commit_success.txt', step=5)
  assert restored(two) == 10
  assert '10 has no manifest, and no other step is good' in caplog.text
  objects.remove('state/_METADATA')
  assert restored(two) == 5
  assert train(two) == 5  # Although Orbax misses a file.


def test_a_copy_is_verified_on_the_other_side(two, tmp_path, bucket):
  disk, here = tmp_path / STAGE, epath.Path(bucket.path) / 'back' / STAGE
  system = bucket.past_the_proxy
  system.get(str(two), str(disk), recursive=True)
  identity.begin_run(tmp_path)
  assert restored(disk) == train(disk) == 10  # 15 has hashes of the disk.
  data = next((disk / '10' / 'state').glob('ocdbt*/d/*'))
  whole = data.read_bytes()
  data.write_bytes(flipped(whole))
  assert manifest.problem(disk / '10') == (
    f'{data.relative_to(disk / "10")} has changed'
  )
  data.write_bytes(whole)
  system.put(str(disk), str(here), recursive=True)
  for step in (5, 10, 15):
    assert manifest.problem(here / str(step)) is None
  for step in (10, 15):
    name = f'{here}/{step}/extra/metadata'
    system.pipe_file(name, flipped(system.cat_file(name)))
    assert manifest.problem(here / str(step)) == 'extra/metadata has changed'
  assert restored(here) == 5


def test_a_manifest_has_what_the_bucket_tells(bucket, two, objects):
  bucket.requests.clear()
  assert manifest.problem(two / '10') is None
  of_arrays = [x for x in bucket.requests if 'alt=media' in x and 'ocdbt' in x]
  assert not of_arrays
  found = json.loads(objects.of(10).pop('manifest.json'))['files']
  content = objects.of(10)
  assert found['state/_METADATA']['size'] == len(content['state/_METADATA'])
  assert set(found) == set(content) - {'manifest.json'}
  checksum = google_crc32c.Checksum(content['state/_METADATA']).digest()
  assert manifest.base64.b64decode(found['state/_METADATA']['crc32c']) == (
    checksum
  )


@pytest.mark.parametrize('status', [403, 400])
def test_no_answer_is_no_damage(bucket, two, objects, status):
  run = identity.read_run(bucket.path)
  with bucket.failing('.', status=status):
    for read in (
      lambda: restored(two),
      lambda: manifest.problem(two / '10'),
      lambda: saved_steps.finished_step(two),
      lambda: contents.problem(two / '10'),
      lambda: identity.begin_run(bucket.path),
      lambda: Checkpoints(two, save_interval=1, max_to_keep=1),
    ):
      with pytest.raises(OSError) as caught:
        read()
      assert caught.value.filename.startswith(f'{bucket.path}')
  with bucket.failing('alt=media.*tensorstore', status=403):
    with pytest.raises(OSError, match='PERMISSION_DENIED'):
      contents.problem(two / '10')
  assert identity.read_run(bucket.path) == run
  assert objects.names() == ['10', '5']
  assert restored(two) == 10


FAULTS = [
  {'status': 503, 'times': 1},
  {'status': 429, 'times': 1},
  {'reset': 'request', 'times': 1},
  {'reset': 'response', 'times': 1},
  {'stall': 0.5, 'times': 2},
]


@pytest.mark.parametrize('fault', FAULTS, ids=str)
def test_passing_faults_are_overcome(bucket, two, fault):
  for pattern in ('POST /upload.*media', 'POST /upload.*resumable'):
    with bucket.failing(pattern, **fault) as harm:
      step = saved_steps.latest_step(two) + 1
      save(two, step)
      assert harm.hit == fault['times']
      assert saved_steps.require_step(two) == step
  for pattern in ('GET.*tensorstore', 'GET.*_METADATA.*alt=media'):
    with bucket.failing(pattern, **fault) as harm:
      assert restored(two) == step
      assert harm.hit == fault['times']


@pytest.mark.parametrize('what', ['POST /upload', '.'])
def test_a_permission_that_is_lost_fails_saves(bucket, two, caplog, what):
  opened = Checkpoints(two, save_interval=1, max_to_keep=2, save_failures=2)

  def attempt(step):
    begin = time.monotonic()
    opened.save(step, state(step), {'at': step})
    assert time.monotonic() - begin < 5
    opened.drain()

  with bucket.failing(what, status=403):
    attempt(11)
  attempt(12)
  attempt(13)
  (line,) = [line for line in caplog.messages if ' in a row): ' in line]
  assert 'saving step 11 failed (1 of 2 in a row): ' in line
  assert 'no permission (' in line or 'PERMISSION_DENIED' in line
  with bucket.failing(what, status=403):
    attempt(14)
    attempt(15)
    with pytest.raises(saved_steps.CheckpointError, match='2 of 2 in a row'):
      attempt(16)
  assert restored(two) == 13
  assert train(two) == 13


def test_older_steps_that_may_not_be_removed_stay(bucket, two, caplog):
  with Checkpoints(two, save_interval=1, max_to_keep=1) as opened:
    with bucket.failing('DELETE.*0_8/(5|10)/', status=403):
      opened.save(15, state(15), {'at': 15})
      opened.drain()
    assert 'older checkpoints could not be removed (no permission' in (
      caplog.text
    )
    assert opened.save(20, state(20), {'at': 20})
  assert [path.name for path in two.iterdir()] == ['20']


def test_a_reader_goes_on_while_old_steps_are_removed(two):
  done = threading.Event()

  def write():
    with Checkpoints(two, save_interval=1, max_to_keep=1) as opened:
      for step in range(11, 19):
        opened.save(step, state(step), {'at': step})
    done.set()

  thread = threading.Thread(target=write)
  thread.start()
  steps = []
  while not done.is_set() and thread.is_alive():
    item = restore.restore_item(two, None, 'ema')
    steps.append(int(item['a']['b'][0, 0]))
    assert np.array_equal(item['a']['b'], np.full((40, 50), steps[-1]))
  thread.join()
  assert done.is_set()
  assert steps == sorted(steps) and len(set(steps)) > 1
  assert restored(two) == 18


def test_post_hoc_averages_are_reconstructed(bucket, tmp_path):
  found = []
  for parent in (epath.Path(bucket.path), tmp_path):
    path = parent / 'averages' / '0_8'
    with Checkpoints(path, save_interval=1, max_to_keep=None) as opened:
      for step in (1, 2, 3):
        average = {'a': np.full(3, float(step), np.float32)}
        opened.save(
          step, {'0.1': average}, {'updates': step, 'widths': ['0.1']}
        )
    found.append(weights._reconstruct(path, 0.1))
  assert found[0][0] == found[1][0] == 3
  assert jax.tree.map(np.ndarray.tobytes, found[0][1]) == (
    jax.tree.map(np.ndarray.tobytes, found[1][1])
  )


def test_other_buckets_are_refused():
  with pytest.raises(saved_steps.CheckpointError, match='gs:// only'):
    Checkpoints('s3://a/checkpoints/0_8', save_interval=1, max_to_keep=1)


def test_a_directory_that_cannot_be_read_is_made_anew(bucket):
  """As any side file of a run, see `files.set_aside`."""
  for _ in range(2):
    files.write_text(f'{bucket.path}/a.json/b', 'c')
    files.set_aside(f'{bucket.path}/a.json')
    files.write_text(f'{bucket.path}/a.json/b', 'd')
    files.set_aside(f'{bucket.path}/a.json')
  assert bucket.files() == {
    'a.json.unreadable/b': b'c',
    'a.json.unreadable+/b': b'd',
  }
