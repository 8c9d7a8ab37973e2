"""A checkpoint is used only as what it was saved as: run, stage and step."""

import json
import shutil

import numpy as np
import pytest

from mdm_jax.checkpoint import identity, manifest, restore, saved_steps
from mdm_jax.checkpoint.manager import Checkpoints
from tests.checkpoint.test_damage import restored, save, train
from tests.runtime.test_files import ODD, UNREADABLE


def begin(workdir, *steps, stage, extra=None):
  """A run with checkpoints of one stage; returns their directory."""
  identity.begin_run(workdir)
  save(workdir / 'checkpoints' / stage, *steps, extra=extra)
  return workdir / 'checkpoints' / stage


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The working directories of two runs with the steps 5 and 10."""
  parent = tmp_path_factory.mktemp('runs')
  for name in 'ab':
    begin(parent / name, 5, 10, stage='0_8')
  begin(parent / 'a', 3, stage='1_16')
  return parent


@pytest.fixture
def runs(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'runs')


@pytest.fixture
def own(runs):
  return runs / 'a' / 'checkpoints' / '0_8'


def as_before(step, **changes):
  """Makes the manifest one that an earlier version has written."""
  path = step / 'manifest.json'
  hashes = json.loads(path.read_text())['files'] | changes
  path.write_text(json.dumps(hashes, indent=1, sort_keys=True) + '\n')
  assert manifest.identity(step) is None


def test_a_run_keeps_its_identifier(tmp_path):
  assert identity.read_run(tmp_path) is None
  identity.begin_run(tmp_path)
  run = identity.read_run(tmp_path)
  identity.begin_run(tmp_path)
  assert identity.read_run(tmp_path) == run
  identity.begin_run(tmp_path / 'other')
  assert identity.read_run(tmp_path / 'other') != run


def test_the_manifest_says_what_it_is_of(own, runs):
  run = json.loads((runs / 'a' / 'run.json').read_text())['run']
  assert manifest.identity(own / '10') == (run, 'checkpoints/0_8', 10)


def test_a_copy_under_another_number_is_not_used(own, caplog):
  shutil.copytree(own / '5', own / '12')
  assert restored(own) == 10
  text = '0_8/12 is damaged: it was saved as step 5 of checkpoints/0_8'
  assert text in caplog.text
  with pytest.raises(saved_steps.CheckpointError, match='saved as step 5 of'):
    restore.restore_item(own, 12, 'step')
  assert train(own) == 10
  assert (own / '12.corrupt').is_dir()


def test_swapped_steps_are_not_used(own):
  (own / '5').rename(own / 'x')
  (own / '10').rename(own / '5')
  (own / 'x').rename(own / '10')
  for read in (restored, train):
    with pytest.raises(saved_steps.CheckpointError) as error:
      read(own)
    assert '10: it was saved as step 5 of checkpoints/0_8' in str(error.value)
  # As the message says.
  (own / '10.corrupt').rename(own / '5')
  (own / '5.corrupt').rename(own / '10')
  assert train(own) == 10


@pytest.mark.parametrize('place', ['checkpoints/1_16/10', 'best/0_8/10'])
def test_a_step_of_another_stage_is_not_used(own, runs, place, caplog):
  path = runs / 'a' / place
  shutil.copytree(own / '10', path)
  with pytest.raises(
    saved_steps.CheckpointError, match='10 of checkpoints/0_8'
  ):
    saved_steps.require_step(path.parent, 10)
  if '1_16' in place:
    assert restored(path.parent) == 3


def test_swapped_stages_are_not_used(own):
  other = own.with_name('1_16')
  own.rename(own.with_name('x'))
  other.rename(own)
  own.with_name('x').rename(other)
  for directory in (own, other):
    with pytest.raises(saved_steps.CheckpointError, match='none is good'):
      restored(directory)


@pytest.mark.parametrize('as_step', ['10', '15'])
def test_a_step_of_another_run_is_not_used(own, runs, as_step, caplog):
  shutil.rmtree(own / '10')
  shutil.rmtree(own.with_name('1_16'))
  theirs = runs / 'b' / 'checkpoints' / '0_8'
  if as_step == '15':
    save(theirs, 15)
  shutil.copytree(theirs / as_step, own / as_step)
  assert restored(own) == 5
  assert f'0_8/{as_step} is damaged: it is of another run, ' in caplog.text
  assert f'remove {runs}/a/run.json' in caplog.text
  # The remedy that the message names.
  (runs / 'a' / 'run.json').unlink()
  identity.begin_run(runs / 'a')
  if as_step == '10':
    assert train(own) == 10
  assert restored(own) == 15
  assert identity.read_run(runs / 'a') == identity.read_run(runs / 'b')


def test_a_run_may_be_begun_from_the_checkpoints_of_another(runs, tmp_path):
  theirs = runs / 'b' / 'checkpoints'
  workdir = tmp_path / 'new'
  shutil.copytree(theirs, workdir / 'checkpoints')
  assert restored(workdir / 'checkpoints' / '0_8') == 10
  identity.begin_run(workdir)
  assert train(workdir / 'checkpoints' / '0_8') == 10


def test_a_run_may_be_moved_and_copied(runs, tmp_path):
  shutil.copytree(runs / 'a', tmp_path / 'copy')
  (runs / 'a').rename(tmp_path / 'moved')
  (tmp_path / 'disk').mkdir()
  linked = tmp_path / 'linked'
  linked.mkdir()
  shutil.copy(tmp_path / 'copy' / 'run.json', linked)
  shutil.copytree(tmp_path / 'copy' / 'checkpoints', tmp_path / 'disk' / 'c')
  (linked / 'checkpoints').symlink_to(tmp_path / 'disk' / 'c')
  for name in ('copy', 'moved', 'linked'):
    assert train(tmp_path / name / 'checkpoints' / '0_8') == 10


@pytest.mark.parametrize('case', [*UNREADABLE, *ODD, '""', '"a"'])
def test_an_identifier_that_is_lost_is_that_of_the_newest(
  own, runs, monkeypatch, case
):
  path = runs / 'a' / 'run.json'
  run = identity.read_run(runs / 'a')
  monkeypatch.chdir(runs / 'a')
  path.unlink()
  if case in UNREADABLE:
    UNREADABLE[case][0](path)
  else:
    path.write_text(f'{{"run": {case}}}')
  assert restored(own) == 10
  identity.begin_run(runs / 'a')
  assert identity.read_run(runs / 'a') == run


def test_a_damaged_manifest_gives_no_identifier(own, runs):
  shutil.rmtree(own.with_name('1_16'))
  path = own / '10' / 'manifest.json'
  run = identity.read_run(runs / 'a')
  path.write_text(path.read_text().replace(run, run[::-1]))
  assert manifest.problem(own / '10') == 'manifest.json is damaged'
  (runs / 'a' / 'run.json').unlink()
  identity.begin_run(runs / 'a')
  assert identity.read_run(runs / 'a') == run
  assert train(own) == 5


def test_manifests_of_earlier_versions_are_used(own, runs, caplog):
  for step in ('5', '10'):
    as_before(own / step)
  assert restored(own) == 10
  assert train(own) == 10
  # The bytes are still compared.
  as_before(own / '15', **{'extra/metadata': ['0' * 32]})
  assert restored(own) == 10
  assert 'extra/metadata has changed' in caplog.text


def test_without_an_identity_the_content_is_compared(runs, caplog):
  own = begin(runs / 'c', 5, 10, stage='8')
  for step in ('5', '10'):
    as_before(own / step)
  shutil.copytree(own / '5', own / '12')
  assert restored(own) == 10
  assert '8/12 is damaged: it was saved as step 5.' in caplog.text
  assert train(own) == 10
  assert (own / '12.corrupt').is_dir()


def test_without_an_identity_the_stage_is_compared(tmp_path):
  own = begin(tmp_path, 5, stage='0_8', extra={'stage': '8'})
  as_before(own / '5')
  assert restored(own) == 5
  other = tmp_path / 'checkpoints' / '1_16'
  shutil.copytree(own, other)
  with pytest.raises(saved_steps.CheckpointError, match="in stage '8'"):
    restored(other)


@pytest.mark.parametrize('manifests', ['old', 'none'])
def test_without_a_good_step_a_renamed_one_is_refused(own, manifests):
  shutil.rmtree(own / '10')
  (own / '5').rename(own / '10')
  if manifests == 'old':
    as_before(own / '10')
  else:
    (own / '10' / 'manifest.json').unlink()
  with pytest.raises(
    saved_steps.CheckpointError, match='it was saved as step 5'
  ):
    train(own)


def finish(directory, step):
  saved_steps.mark_finished(directory, step)
  return directory / 'finished.json'


def test_the_end_of_another_stage_or_run_is_none(own, runs, caplog):
  path = finish(own, 10)
  assert saved_steps.finished_step(own) == 10
  other = own.with_name('1_16')
  shutil.copy(path, other)
  assert saved_steps.finished_step(other) is None
  assert '1_16/finished.json is not used: it is of checkpoints/0_8' in (
    caplog.text
  )
  shutil.copy(path, runs / 'b' / 'checkpoints' / '0_8')
  assert saved_steps.finished_step(runs / 'b' / 'checkpoints' / '0_8') is None
  assert '0_8/finished.json is not used: it is of another run' in caplog.text
  # As earlier versions have written it.
  path.write_text('{"step": 10}')
  assert saved_steps.finished_step(own) == 10


@pytest.mark.parametrize('case', [*UNREADABLE, *ODD])
def test_an_end_that_cannot_be_read_is_found_again(
  own, monkeypatch, caplog, case
):
  path = own / 'finished.json'
  monkeypatch.chdir(own)
  if case in UNREADABLE:
    UNREADABLE[case][0](path)
  else:
    path.write_text(f'{{"step": {case}}}')
  assert saved_steps.finished_step(own) is None
  assert ('finished.json' in caplog.text) == path.exists()
  finish(own, 10)
  assert saved_steps.finished_step(own) == 10


def test_imported_weights_stay_finished(tmp_path):
  """They have no steps to take, so that is not found again by training."""
  with Checkpoints(tmp_path / '0_8', save_interval=1, max_to_keep=1) as opened:
    opened.save(0, {'ema': {'a': np.ones(3)}}, {}, force=True)
  finish(tmp_path / '0_8', 0).write_text('')
  assert saved_steps.finished_step(tmp_path / '0_8') == 0
