"""Whatever keeps a step from being read makes it a damaged step, in no time."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.checkpoint import contents, manifest, restore, saved_steps
from mdm_jax.checkpoint.manager import Checkpoints
from tests import fuzzing
from tests.runtime.test_files import UNREADABLE

NOT_FILES = (
  'directory',
  'pipe',
  'socket',
  'device',
  'dangling link',
  'circular link',
  'I/O error',
  '1 TB',
)


def state(step):
  return {
    'step': jnp.int32(step),
    'ema': {'a': {'b': jnp.full((40, 50), float(step))}, 'c': jnp.ones(3)},
    'opt_state': (jnp.full(7, float(step)), ()),
  }


def abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state(0),
  )


def save(directory, *steps, extra=None):
  with Checkpoints(directory, save_interval=1, max_to_keep=None) as opened:
    for step in steps:
      opened.save(step, state(step), {'at': step} | (extra or {}))


def restored(directory):
  """The step that a reader uses, by all that it reads."""
  step = int(restore.restore_item(directory, None, 'step'))
  ema = restore.restore_item(directory, None, 'ema')
  assert np.array_equal(ema['a']['b'], np.full((40, 50), step))
  assert restore.abstract_item(directory, None, 'ema')['c'].shape == (3,)
  assert restore.read_extra(directory)['at'] == step
  return step


def train(directory):
  """The step that training continues from; it then saves another, 15."""
  with Checkpoints(directory, save_interval=1, max_to_keep=None) as opened:
    found, extra = opened.restore(abstract())
    step = int(found['step'])
    assert opened.latest_step() == extra['at'] == step
    assert np.array_equal(found['ema']['a']['b'], np.full((40, 50), step))
    assert opened.save(15, state(15), {'at': 15})
  assert restored(directory) == 15
  return step


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run') / 'checkpoints' / '0_8'
  save(directory, 5, 10)
  return directory


@pytest.fixture
def two(saved, tmp_path):
  """A directory with the steps 5 and 10."""
  return shutil.copytree(saved, tmp_path / 'checkpoints' / '0_8')


@pytest.fixture
def bare(two):
  """The same, without manifests."""
  for step in ('5', '10'):
    (two / step / 'manifest.json').unlink()
  return two


def data_file(step):
  return max((step / 'state' / 'd').iterdir(), key=lambda p: p.stat().st_size)


def harm(path, case, monkeypatch):
  monkeypatch.chdir(path.parent)
  path.unlink()
  UNREADABLE[case][0](path)


@pytest.mark.parametrize('case', NOT_FILES)
@pytest.mark.parametrize(
  'name', ['manifest.json', '_CHECKPOINT_METADATA', 'extra/metadata', 'data']
)
def test_the_older_step_is_used(two, monkeypatch, caplog, name, case):
  path = data_file(two / '10') if name == 'data' else two / '10' / name
  harm(path, case, monkeypatch)
  assert restored(two) == 5
  named = path.relative_to(two / '10')
  assert f'0_8/10 is damaged: {named} ' in caplog.text
  assert train(two) == 5
  assert (two / '10.corrupt').is_dir()


@pytest.mark.parametrize(
  'case', [case for case in UNREADABLE if case != 'missing']
)
def test_any_manifest_is_read_or_refused(two, monkeypatch, case):
  harm(two / '10' / 'manifest.json', case, monkeypatch)
  assert manifest.problem(two / '10').startswith('manifest.json ')
  assert restored(two) == 5


@pytest.mark.parametrize('key', ['run', 'stage', 'step', 'files', 'hash'])
@pytest.mark.parametrize('value', [None, '', 7, True, [], {}, ['a'], {'a': []}])
def test_odd_values_in_a_manifest_are_damage(two, key, value):
  path = two / '10' / 'manifest.json'
  found = json.loads(path.read_text())
  if found[key] == value:
    return
  path.write_text(json.dumps(found | {key: value}, indent=1, sort_keys=True))
  assert manifest.problem(two / '10')
  assert restored(two) == 5


@pytest.mark.parametrize('count', fuzzing.COUNTS)
def test_any_damage_to_a_manifest_is_found(two, count):
  path = two / '10' / 'manifest.json'
  whole = path.read_bytes()

  def read(data):
    path.write_bytes(data)
    assert (manifest.problem(two / '10') is None) == (data == whole)
    manifest.identity(two / '10')

  fuzzing.check(read, lambda rng: fuzzing.damage(whole, rng), count, refuses=())


@pytest.mark.parametrize(
  'count', [100, pytest.param(2000, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize(
  'name', ['_CHECKPOINT_METADATA', 'state/_METADATA', 'extra/metadata']
)
def test_any_damage_without_a_manifest_is_survived(bare, name, count):
  path = bare / '10' / name
  whole = path.read_bytes()
  for index in range(count):  # TensorStore works in no forked process.
    path.write_bytes(
      fuzzing.case(lambda rng: fuzzing.damage(whole, rng), 0, index)
    )
    contents.is_committed(bare / '10')
    contents.cannot_be_opened(bare / '10')
    found = contents.problem(bare / '10')
    assert found is None or '\n' not in found


def test_an_error_of_the_disk_while_hashing_is_named(two, monkeypatch):
  """A file that opens, and cannot be read."""
  broken, path_type = data_file(two / '10'), type(manifest.epath.Path('/'))
  opened = path_type.open

  def open_broken(self, *arguments):
    path = '/proc/self/mem' if str(self) == str(broken) else self
    return opened(path_type(path), *arguments)

  monkeypatch.setattr(path_type, 'open', open_broken)
  name = broken.relative_to(two / '10')
  assert manifest.problem(two / '10') == (
    f'{name} cannot be read (Input/output error)'
  )
  assert restored(two) == 5


def only_markers(step):
  for name in ('state', 'extra'):
    shutil.rmtree(step / name)


def without(name):
  def remove(step):
    path = step / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()

  return remove


def empty_state(step):
  shutil.rmtree(step / 'state')
  (step / 'state').mkdir()


def no_arrays(step):
  data_file(step).unlink()


def with_content(name, content):
  return lambda step: (step / name).write_bytes(content)


def cut_array(step):
  path = data_file(step)
  os.truncate(path, path.stat().st_size // 2)


def other_leaf(step):
  """The state has an array less than its description says."""
  path = step / 'state' / '_METADATA'
  path.write_text(path.read_text().replace('"opt_state"', '"opt_stare"'))


def link_metadata(step):
  (step / '_CHECKPOINT_METADATA').unlink()
  (step / '_CHECKPOINT_METADATA').symlink_to('nowhere')


HOLLOW = {
  'only markers': (only_markers, 'state/_METADATA is missing'),
  'no state': (without('state'), 'state/_METADATA is missing'),
  'empty state': (empty_state, 'state/_METADATA is missing'),
  'no description': (without('state/_METADATA'), 'state/_METADATA is miss'),
  'no extra': (without('extra'), 'extra/metadata is missing'),
  'empty extra': (with_content('extra/metadata', b''), 'extra/metadata is em'),
  'no JSON': (with_content('extra/metadata', b'{"a'), 'extra/metadata is no J'),
  'a list': (with_content('extra/metadata', b'[1]'), 'extra/metadata does no'),
  'no arrays': (no_arrays, 'its state cannot be read'),
  'cut arrays': (cut_array, 'its state cannot be read'),
  'no index': (without('state/manifest.ocdbt'), 'its state cannot be read'),
  'odd index': (
    with_content('state/manifest.ocdbt', b'index'),
    'its state cannot be read',
  ),
  'odd description': (
    with_content('state/_METADATA', b'{"tree_metadata": {"a": 1}}'),
    'its state cannot be read',
  ),
  'another tree': (other_leaf, 'its state cannot be read'),
  'odd shapes': (
    with_content('state/array_metadatas/process_0', b'\xff'),
    'state/array_metadatas/process_0 is no JSON',
  ),
  'odd metadata': (
    with_content('_CHECKPOINT_METADATA', b'{"commit_timestamp_nsecs": "a"}'),
    '_CHECKPOINT_METADATA is not what Orbax writes',
  ),
  'no metadata': (link_metadata, '_CHECKPOINT_METADATA cannot be read'),
  'deep metadata': (
    with_content('_CHECKPOINT_METADATA', b'[' * 10_000),
    '_CHECKPOINT_METADATA is nested too deep',
  ),
}


@pytest.mark.parametrize('case', HOLLOW)
def test_a_hollow_step_without_a_manifest_is_no_step(bare, caplog, capfd, case):
  make, reason = HOLLOW[case]
  make(bare / '10')
  assert restored(bare) == 5
  assert f'0_8/10 is damaged: {reason}' in caplog.text
  with pytest.raises(saved_steps.CheckpointError, match='10 is damaged: '):
    restore.restore_item(bare, 10, 'step')
  assert train(bare) == 5
  assert (bare / '10.corrupt').is_dir()
  assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('case', HOLLOW)
def test_if_all_steps_are_hollow_that_is_an_error(bare, case):
  shutil.rmtree(bare / '5')
  make, reason = HOLLOW[case]
  make(bare / '10')
  with pytest.raises(saved_steps.CheckpointError, match=f'good .10: {reason}'):
    restored(bare)
  for _ in range(2):
    with pytest.raises(saved_steps.CheckpointError, match='but none is good'):
      Checkpoints(bare, save_interval=1, max_to_keep=2)


@pytest.mark.parametrize('case', ['no extra', 'no state'])
def test_a_manifest_of_a_hollow_step_does_not_help(two, case):
  make, reason = HOLLOW[case]
  make(two / '10')
  manifest.write(two / '10')
  with pytest.raises(saved_steps.CheckpointError, match=reason):
    saved_steps.require_step(two, 10)
  assert restored(two) == 5


def test_a_save_that_leaves_a_hollow_step_has_failed(two, monkeypatch):
  wait = Checkpoints._finish

  def lose(self, step):
    self._manager.wait_until_finished()
    only_markers(two / str(step))
    wait(self, step)

  monkeypatch.setattr(Checkpoints, '_finish', lose)
  opened = Checkpoints(two, save_interval=1, max_to_keep=None)
  opened.save(15, state(15), {})
  with pytest.raises(saved_steps.CheckpointError, match='saving step 15 faile'):
    opened.close()
  assert restored(two) == 10


@pytest.mark.parametrize('case', ['pipe', 'list', 'deep', 'circular link'])
def test_training_goes_on_beside_an_older_damaged_step(two, monkeypatch, case):
  harm(two / '5' / '_CHECKPOINT_METADATA', case, monkeypatch)
  assert restored(two) == 10
  assert train(two) == 10
  assert (two / '5.corrupt').is_dir()


@pytest.mark.parametrize(
  'case', ['empty', 'pipe', 'dangling link', 'circular link', 'device']
)
def test_what_is_only_named_like_a_step_is_none(two, monkeypatch, case):
  monkeypatch.chdir(two)
  UNREADABLE[case][0](two / '12')
  (two / '007').mkdir()
  assert restored(two) == 10
  assert train(two) == 10


def test_a_step_that_cannot_be_set_aside_is_an_error(two, monkeypatch):
  without('state')(two / '10')

  def fail(self, target):
    raise OSError(30, 'Read-only file system')

  monkeypatch.setattr(type(manifest.epath.Path('/')), 'rename', fail)
  with pytest.raises(saved_steps.CheckpointError, match='/10 .*: move it away'):
    Checkpoints(two, save_interval=1, max_to_keep=2)


def test_finding_a_step_reads_its_files_once(two, monkeypatch):
  reads = []
  hash_of = manifest._hash
  monkeypatch.setattr(
    manifest, '_hash', lambda *block: (reads.append(block), hash_of(*block))[1]
  )
  assert restored(two) == 10
  assert len(reads) == len(set(reads)) == len(manifest.list_files(two / '10'))


@pytest.mark.parametrize('case', ['empty', 'pipe', 'circular link', 'device'])
@pytest.mark.parametrize('name', ['checkpoints', 'checkpoints/0_8'])
def test_what_should_be_a_directory_is_named(tmp_path, name, case):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  UNREADABLE[case][0](path)
  with pytest.raises(saved_steps.CheckpointError, match='0_8 cannot be '):
    Checkpoints(tmp_path / 'checkpoints/0_8', save_interval=1, max_to_keep=1)
