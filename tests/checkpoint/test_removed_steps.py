"""A reader goes on with the newest step when its own is removed by training."""

import shutil
import threading

import jax
import numpy as np
import pytest

from mdm_jax.builders.config import stage_directory
from mdm_jax.builders.model import make_model
from mdm_jax.checkpoint import contents, manifest, restore, saved_steps
from mdm_jax.checkpoint.manager import Checkpoints
from mdm_jax.inference import session, weights
from tests import toy
from tests.checkpoint.test_damage import save

READS = {
  'restore_item': lambda directory, step: int(
    restore.restore_item(directory, step, 'step')
  ),
  'read_extra': lambda directory, step: restore.read_extra(directory, step)[
    'at'
  ],
  'abstract_item': lambda directory, step: (
    restore.abstract_item(directory, step, 'step').shape or 'no shape'
  ),
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('run') / 'checkpoints' / '0_8'
  save(path, *range(1, 9))
  for step in range(4, 9):
    (path / str(step)).rename(path / f'hidden_{step}')
  return path


@pytest.fixture
def directory(saved, tmp_path):
  """With the steps 1, 2 and 3; 4, 5 and so on are hidden."""
  return shutil.copytree(saved, tmp_path / 'checkpoints' / '0_8')


def interrupt(monkeypatch, module, name, times, then):
  """Calls `then` before the function, the first times that it is called."""
  function, calls, lock = getattr(module, name), [], threading.Lock()

  def interrupted(*arguments):
    with lock:
      calls.append(arguments)
      if len(calls) <= times:
        then()
    return function(*arguments)

  monkeypatch.setattr(module, name, interrupted)


def prune(directory, keep=1):
  """What training does when it has saved: the next step comes, old ones go."""

  def remove():
    steps = sorted(saved_steps._committed_steps(directory))
    new = directory / f'hidden_{steps[-1] + 1}'
    if new.exists():
      new.rename(directory / str(steps[-1] + 1))
      steps.append(steps[-1] + 1)
    for step in steps[:-keep]:
      shutil.rmtree(directory / str(step))

  return remove


def damage(directory):
  """A removal that has not come to its end."""

  def remove():
    step = directory / '3'
    shutil.rmtree(step / 'state')
    (step / 'manifest.json').unlink()
    (directory / 'hidden_4').rename(directory / '4')

  return remove


@pytest.mark.parametrize('read', READS)
@pytest.mark.parametrize('times', [1, 3])
@pytest.mark.parametrize('where', ['read', 'hash', 'list'])
def test_the_newest_step_is_read_instead(
  directory, monkeypatch, capfd, read, times, where
):
  module, name = {
    'hash': (manifest, '_hash'),
    'list': (manifest, 'list_files'),
    'read': {
      'restore_item': (contents, 'read_field'),
      'read_extra': (contents, 'read_extra'),
      'abstract_item': (contents, 'abstract_state'),
    }[read]
    if where == 'read'
    else None,
  }[where]
  interrupt(monkeypatch, module, name, times, prune(directory))
  found = READS[read](directory, None)
  assert found == ('no shape' if read == 'abstract_item' else 3 + times)
  assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('read', ['restore_item', 'abstract_item'])
def test_a_step_that_is_half_removed_is_replaced(directory, monkeypatch, read):
  interrupt(monkeypatch, contents, '_open_state', 1, damage(directory))
  found = READS[read](directory, None)
  assert found == ('no shape' if read == 'abstract_item' else 4)


def test_data_that_is_removed_after_opening_is_not_read_as_zeros(
  directory, monkeypatch
):
  open_state, removals = contents._open_state, [damage(directory)]

  def open_then_remove(*arguments):
    opened = open_state(*arguments)
    if 'ema' in arguments and removals:
      removals.pop()()
    return opened

  monkeypatch.setattr(contents, '_open_state', open_then_remove)
  ema = restore.restore_item(directory, None, 'ema')
  assert np.array_equal(ema['a']['b'], np.full((40, 50), 4))


@pytest.mark.parametrize('read', READS)
def test_a_step_that_was_asked_for_is_not_replaced(
  directory, monkeypatch, read
):
  name = {'read_extra': 'read_extra'}.get(read, '_open_state')
  interrupt(monkeypatch, contents, name, 1, prune(directory))
  with pytest.raises(FileNotFoundError, match='no checkpoint 3: committed'):
    READS[read](directory, 3)


def test_it_ends_also_if_every_step_is_removed(directory, monkeypatch):
  calls = []

  def remove():
    calls.append(1)
    prune(directory)()

  interrupt(monkeypatch, contents, 'read_extra', 99, remove)
  with pytest.raises(FileNotFoundError, match='has no checkpoint 7'):
    restore.read_extra(directory)
  assert len(calls) == restore.TRIES == 5


def test_another_reason_is_not_tried_again(directory, monkeypatch):
  reads = []
  interrupt(monkeypatch, contents, 'fields', 99, lambda: reads.append(1))
  with pytest.raises(ValueError, match="has no 'weights', only ema, opt_state"):
    restore.restore_item(directory, None, 'weights')
  assert len(reads) == 1


@pytest.mark.parametrize('where', ['read_field', 'abstract_state'])
def test_commands_go_on(
  make_config, random_params, tmp_path, monkeypatch, where
):
  config, workdir = make_config(), tmp_path / 'run'
  params = random_params(
    make_model(config, config.stages[1]), config.text.max_length
  )
  toy.save_run(workdir, config, 1, 5, params)
  directory = stage_directory(workdir, config, 1)

  def save_another():
    with Checkpoints(directory, save_interval=1, max_to_keep=1) as opened:
      new = jax.tree.map(lambda x: x + 1, params)
      opened.save(6, {'ema': new}, {}, force=True)

  interrupt(monkeypatch, contents, where, 1, save_another)
  model = session.open_run(str(workdir)).restore()
  assert model.weights.step == 6
  assert model.weights.fingerprint == manifest.fingerprint(directory / '6')
  jax.tree.map(
    lambda x, old: np.testing.assert_array_equal(x, old + 1),
    model.params,
    params,
  )


@pytest.mark.parametrize('where', ['read_extra', 'read_field', '_open_state'])
def test_a_snapshot_that_vanishes_is_left_out(tmp_path, monkeypatch, where):
  directory, kept = tmp_path / 'averages' / '0_8', tmp_path / 'averages' / '1_8'
  for path, steps in ((directory, (1, 2, 3)), (kept, (1, 2))):
    with Checkpoints(path, save_interval=1, max_to_keep=None) as opened:
      for step in steps:
        average = {'a': np.full(3, float(step), np.float32)}
        opened.save(
          step, {'0.1': average}, {'updates': step, 'widths': ['0.1']}
        )
  expected = weights._reconstruct(kept, 0.1)
  interrupt(
    monkeypatch,
    contents,
    where,
    1,
    lambda: shutil.rmtree(directory / '3'),
  )
  step, params, identity = weights._reconstruct(directory, 0.1)
  assert step == expected[0] == 2
  np.testing.assert_array_equal(params['a'], expected[1]['a'])
  # That of an older snapshot counts, too.
  shutil.rmtree(directory / '1')
  assert weights._reconstruct(directory, 0.1)[2] != identity
