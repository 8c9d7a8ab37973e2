"""Checkpoints restore the saved bytes, or name the leaf that does not fit."""

import random
import re
import resource
import shutil
import subprocess
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from mdm_jax.builders.config import differences
from mdm_jax.checkpoint import manifest, restore, saved_steps
from mdm_jax.checkpoint.manager import Checkpoints


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  ema: Any
  opt_state: Any


def make_mesh(num_devices):
  return jax.make_mesh(
    (num_devices,),
    ('fsdp',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )


def shardings_of(state, num_devices):
  mesh = make_mesh(num_devices)
  return jax.tree.map(
    lambda leaf: NamedSharding(
      mesh,
      PartitionSpec('fsdp') if leaf.ndim == 2 else PartitionSpec(),
    ),
    state,
  )


def make_state(num_devices=8, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    'down_0': {'kernel': jax.random.normal(keys[0], (16, 4))},
    'out': {'bias': jnp.ones(4, jnp.bfloat16)},
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = State(
    step=jnp.int32(seed),
    params=params,
    ema=jax.tree.map(lambda leaf: leaf * 2, params),
    opt_state=optimizer.init(params),
  )
  return jax.device_put(state, shardings_of(state, num_devices))


def abstract(state, num_devices=8):
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    state,
    shardings_of(state, num_devices),
  )


def assert_same_bytes(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
    assert leaf.dtype == other.dtype
    assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def opened(tmp_path):
  checkpoints = Checkpoints(tmp_path / '0_32', save_interval=5, max_to_keep=2)
  yield checkpoints
  checkpoints.close()


@pytest.mark.parametrize('num_devices', [8, 2, 1])
def test_restores_the_same_bytes_on_any_device_count(opened, num_devices):
  state = make_state(8)
  extra = {'data': {'next_index': 7}, 'name': None}
  assert opened.save(5, state, extra)
  opened.wait()
  wanted = abstract(state, num_devices)
  restored, restored_extra = opened.restore(wanted)
  assert_same_bytes(restored, state)
  assert restored_extra == extra
  for leaf, other in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted)):
    assert leaf.sharding == other.sharding
  kernel = restored.params['down_0']['kernel']
  assert len(kernel.addressable_shards) == num_devices


def test_saves_when_due_and_keeps_the_newest(tmp_path, opened, caplog):
  state = make_state()
  with caplog.at_level('INFO', logger='absl'):
    saved = [
      step for step in range(1, 17) if opened.save(step, state, {'at': step})
    ]
    assert saved == [5, 10, 15]
    assert opened.save(16, state, {'at': 16}, force=True)
    assert not opened.save(16, state, {'at': 16}, force=True)
    opened.wait()
  assert [
    re.sub(r'\d+\.\ds', 'N', line)
    for line in caplog.messages
    if line.startswith('Saved')
  ] == [f'Saved step {n} in N: {tmp_path}/0_32/{n}' for n in (5, 10, 15, 16)]
  assert opened.latest_step() == 16
  assert sorted(p.name for p in (tmp_path / '0_32').iterdir()) == ['15', '16']
  assert opened.restore(abstract(state), step=15)[1] == {'at': 15}
  assert opened.restore(abstract(state))[1] == {'at': 16}


def test_a_saved_state_may_be_donated(opened):
  """Steps that donate the state right after a save do not change the save."""
  sharding = NamedSharding(make_mesh(8), PartitionSpec('fsdp'))
  values = np.arange(2**20, dtype=np.float32)
  step = jax.jit(lambda state: {'w': state['w'] + 1}, donate_argnums=0)
  state = {'w': jax.device_put(values, sharding)}
  state = step({'w': state['w'] - 1})
  opened.save(5, state, {})
  donated = step(state)
  state = step(donated)
  assert donated['w'].is_deleted()
  np.testing.assert_array_equal(np.asarray(state['w']), values + 2)
  opened.wait()
  restored, _ = opened.restore(
    {'w': jax.ShapeDtypeStruct((2**20,), np.float32, sharding=sharding)}
  )
  np.testing.assert_array_equal(np.asarray(restored['w']), values)


def test_mismatches_are_named(opened):
  state = make_state()
  opened.save(5, state, {})
  opened.wait()

  def message(params):
    with pytest.raises(ValueError) as error:
      opened.restore(abstract(state.replace(params=params)))
    assert '\n' not in str(error.value)
    return str(error.value)

  kernel, bias = state.params['down_0'], state.params['out']
  text = message({'down_0': kernel, 'out': {'bias': jnp.ones(4)}})
  assert 'params/out/bias is bfloat16[4], not float32[4]' in text
  assert 'kernel' not in text
  text = message({'down_0': {'kernel': jnp.ones((16, 8))}, 'out': bias})
  assert 'params/down_0/kernel is float32[16, 4], not float32[16, 8]' in text
  text = message({'down_0': kernel, 'up_0': {'bias': jnp.ones(4)}})
  assert 'params/up_0/bias is absent, not float32[4]' in text
  assert 'params/out/bias is bfloat16[4], not absent' in text


def test_restores_only_a_part(tmp_path, opened):
  state = make_state()
  opened.save(5, state, {})
  opened.wait()
  directory = tmp_path / '0_32'

  item = restore.abstract_item(directory, 5, 'ema')
  assert item['down_0']['kernel'].shape == (16, 4)
  assert item['out']['bias'].dtype == jnp.bfloat16

  on_host = restore.restore_item(directory, None, 'ema')
  assert_same_bytes(on_host, state.ema)
  assert isinstance(on_host['down_0']['kernel'], np.ndarray)

  wanted = shardings_of(item, 2)
  sharded = restore.restore_item(directory, 5, 'ema', wanted)
  assert_same_bytes(sharded, state.ema)
  assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == wanted

  replicated = NamedSharding(make_mesh(4), PartitionSpec())
  everywhere = restore.restore_item(directory, 5, 'params', replicated)
  assert_same_bytes(everywhere, state.params)
  assert everywhere['out']['bias'].sharding == replicated

  with pytest.raises(ValueError, match="no 'weights', only ema, opt_state"):
    restore.restore_item(directory, 5, 'weights')
  with pytest.raises(FileNotFoundError, match=r'checkpoint 6.* are \[5\]'):
    restore.restore_item(directory, 6, 'ema')


def test_an_uncommitted_step_never_counts(tmp_path):
  directory = tmp_path / '0_32'
  arguments = dict(save_interval=1, max_to_keep=2)
  state = make_state()
  checkpoints = Checkpoints(directory, **arguments)
  assert checkpoints.latest_step() is None
  assert saved_steps.latest_step(directory) is None
  with pytest.raises(FileNotFoundError, match='has no checkpoint'):
    checkpoints.restore(abstract(state))
  checkpoints.save(3, state, {})
  checkpoints.close()

  (directory / '7').mkdir()
  (directory / '8' / 'state').mkdir(parents=True)
  (directory / '9.orbax-checkpoint-tmp').mkdir()
  assert saved_steps.latest_step(directory) == 3

  checkpoints = Checkpoints(directory, **arguments)
  assert checkpoints.latest_step() == 3
  assert_same_bytes(checkpoints.restore(abstract(state))[0], state)
  assert checkpoints.save(7, state, {})
  checkpoints.close()
  assert saved_steps.latest_step(directory) == 7
  assert (directory / '8.uncommitted' / 'state').is_dir()


def test_a_stage_is_finished_only_at_a_committed_step(tmp_path, opened):
  directory = tmp_path / '0_32'
  assert saved_steps.finished_step(directory) is None
  with pytest.raises(FileNotFoundError):
    saved_steps.mark_finished(directory, 5)
  state = make_state()
  opened.save(5, state, {})
  opened.wait()
  saved_steps.mark_finished(directory, 5)
  assert saved_steps.finished_step(directory) == 5
  # The marker file does not disturb the next one that opens the directory.
  again = Checkpoints(directory, save_interval=5, max_to_keep=2)
  assert again.latest_step() == 5
  again.close()


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


@pytest.fixture
def two(tmp_path):
  """A directory with the steps 5 and 10, made from the seeds 5 and 10."""
  directory = tmp_path / '0_32'
  checkpoints = Checkpoints(directory, save_interval=5, max_to_keep=2)
  for step in (5, 10):
    checkpoints.save(step, make_state(seed=step), {'at': step})
  checkpoints.close()
  return directory


def restored_step(directory):
  return int(restore.restore_item(directory, None, 'step'))


def test_24_of_24_flipped_bits_are_found(two):
  rng = random.Random(0)
  files = sorted(path for path in (two / '10').rglob('*') if path.is_file())
  assert len(files) > 10
  for _ in range(24):
    # Verified before, so that what is remembered must not hide it.
    assert restored_step(two) == 10
    path = rng.choice(files)
    whole = path.read_bytes()
    flip(path, rng)
    assert restored_step(two) == 5
    if path.name != 'manifest.json':
      name = path.relative_to(two / '10')
      assert manifest.problem(two / '10') == f'{name} has changed'
    path.write_bytes(whole)
  assert restored_step(two) == 10


def test_flips_in_the_manifest_are_found(two):
  path = two / '10' / 'manifest.json'
  whole = path.read_bytes()
  rng = random.Random(0)
  for _ in range(100):
    flip(path, rng)
    assert manifest.problem(two / '10')
    path.write_bytes(whole)


def truncate(step):
  path = max((step / 'state' / 'd').iterdir(), key=lambda p: p.stat().st_size)
  with path.open('r+b') as file:
    file.truncate(path.stat().st_size - 1)
  return f'{path.relative_to(step)} has changed'


def remove(step):
  path = next(path for path in (step / 'state' / 'd').iterdir())
  path.unlink()
  return f'{path.relative_to(step)} is missing'


def remove_metadata(step):
  (step / '_CHECKPOINT_METADATA').unlink()
  return '_CHECKPOINT_METADATA is missing'


def add(step):
  (step / 'state' / 'more').write_bytes(b'')
  return 'state/more is extra'


def empty(step):
  shutil.rmtree(step)
  step.mkdir()
  return 'is not committed'


@pytest.mark.parametrize(
  'harm', [truncate, remove, remove_metadata, add, empty]
)
def test_a_damaged_step_is_named_and_set_aside(two, caplog, harm):
  expected = harm(two / '10')
  left = sorted(path.name for path in (two / '10').rglob('*'))

  # Whoever only reads passes it over.
  assert restored_step(two) == 5
  assert (two / '10').exists()

  # Training sets it aside, and deletes nothing of it.
  checkpoints = Checkpoints(two, save_interval=5, max_to_keep=2)
  messages = [record.getMessage() for record in caplog.records]
  assert any(
    re.search(rf'0_32/10 .*{re.escape(expected)}', message)
    for message in messages
  ), messages
  assert checkpoints.latest_step() == 5
  restored, extra = checkpoints.restore(abstract(make_state()))
  assert_same_bytes(restored, make_state(seed=5))
  assert extra == {'at': 5}
  assert sorted(p.name for p in (two / '10.corrupt').rglob('*')) == left
  assert checkpoints.save(10, make_state(seed=10), {})
  checkpoints.close()
  assert restored_step(two) == 10


def test_a_step_damaged_while_training_is_set_aside(two):
  checkpoints = Checkpoints(two, save_interval=5, max_to_keep=3)
  checkpoints.save(15, make_state(seed=15), {'at': 15})
  checkpoints.wait()
  truncate(two / '15')
  assert checkpoints.restore(abstract(make_state()))[1] == {'at': 10}
  assert (two / '15.corrupt').exists()
  with pytest.raises(FileNotFoundError):
    checkpoints.restore(abstract(make_state()), 15)
  truncate(two / '10')
  with pytest.raises(saved_steps.CheckpointError, match='10 is damaged: state'):
    checkpoints.restore(abstract(make_state()), 10)
  checkpoints.close()


def test_no_good_step_is_an_error_whenever_asked(two):
  problems = {step: truncate(two / str(step)) for step in (10, 5)}
  for number in range(3):
    with pytest.raises(saved_steps.CheckpointError) as error:
      Checkpoints(two, save_interval=5, max_to_keep=2)
    assert 'has checkpoints, but none is good' in str(error.value)
    for step, problem in problems.items():
      named = f'{step}: {problem}' if number == 0 else f'{step}.corrupt'
      assert named in str(error.value)
  for read in (saved_steps.latest_step, restored_step):
    with pytest.raises(saved_steps.CheckpointError, match='none is good'):
      read(two)
  assert sorted(path.name for path in two.iterdir()) == [
    '10.corrupt',
    '5.corrupt',
  ]


def test_a_step_without_a_manifest_is_the_last_resort(two, caplog):
  (two / '10' / 'manifest.json').unlink()
  assert restored_step(two) == 5
  assert not caplog.records

  truncate(two / '5')
  assert restored_step(two) == 10
  assert '0_32/10 has no manifest' in caplog.text
  (two / '5' / 'manifest.json').unlink()
  checkpoints = Checkpoints(two, save_interval=5, max_to_keep=2)
  assert checkpoints.latest_step() == 10
  checkpoints.save(15, make_state(seed=15), {})
  checkpoints.close()

  # As if the process had died between a commit and writing the manifest.
  shutil.copytree(two / '15', two / '20')
  (two / '20' / 'manifest.json').unlink()
  checkpoints = Checkpoints(two, save_interval=5, max_to_keep=2)
  assert checkpoints.latest_step() == 15
  checkpoints.close()
  assert (two / '20.uncommitted' / 'state').is_dir()


def test_a_stage_with_a_damaged_last_step_is_not_finished(two, caplog):
  saved_steps.mark_finished(two, 10)
  assert saved_steps.finished_step(two) == 10
  truncate(two / '10')
  assert saved_steps.finished_step(two) is None
  assert 'finished at step 10, but its newest good checkpoint is 5' in (
    caplog.text
  )
  truncate(two / '5')
  with pytest.raises(saved_steps.CheckpointError):
    saved_steps.finished_step(two)


@pytest.fixture(params=['full disk', 'limit of a file'])
def disk(request, tmp_path):
  """A directory, and a function that makes writes to it fail or succeed."""
  path = tmp_path / 'disk'
  path.mkdir()
  if request.param == 'limit of a file':
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail(now):
      resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if now else soft, hard))

    yield path, fail
    fail(False)
    return
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', path],
    capture_output=True,
    text=True,
  )
  if mounted.returncode:
    pytest.skip(f'may not mount: {mounted.stderr}')

  def fail(now):
    (path / 'ballast').unlink(missing_ok=True)
    if now:
      with (
        pytest.raises(OSError, match='No space'),
        (path / 'ballast').open('wb', buffering=0) as file,
      ):
        while True:
          file.write(bytes(4096))

  yield path, fail
  subprocess.run(['umount', path], check=True)


def test_failed_saves_are_retried_then_end_the_run(disk, caplog):
  path, fail = disk
  directory = path / '0_32'
  # Random, so that compression makes it no smaller than either limit.
  state = lambda seed: {
    'w': jax.random.normal(jax.random.key(seed), (512, 512))
  }
  checkpoints = Checkpoints(
    directory, save_interval=2, max_to_keep=2, save_failures=2
  )

  def failures():
    return [
      record.getMessage()
      for record in caplog.records
      if 'saving step' in record.getMessage()
    ]

  def save(step):
    """Saves, and waits as long as a step may take."""
    checkpoints.save(step, state(step), {'at': step})
    if checkpoints._saving:
      checkpoints._saving.exception()

  save(2)
  save(3)
  fail(True)
  save(4)
  assert failures() == []
  save(5)
  (line,) = failures()
  assert re.search(r'0_32: saving step 4 failed \(1 of 2 in a row\): .+', line)
  assert '\n' not in line
  fail(False)
  save(6)
  save(7)
  assert len(failures()) == 1
  restored, extra = checkpoints.restore(
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state(0),
    )
  )
  assert_same_bytes(restored, state(6))
  assert extra == {'at': 6}
  # The files of the failed save have been removed.
  assert {path.name for path in directory.iterdir()} == {'2', '6'}

  # A save that works starts the count anew.
  fail(True)
  save(8)
  save(9)
  assert '(1 of 2 in a row)' in failures()[-1]
  save(10)
  with pytest.raises(saved_steps.CheckpointError, match='2 of 2 in a row'):
    save(11)
  assert restore.restore_item(directory, None, 'w').tobytes() == (
    np.asarray(state(6)['w']).tobytes()
  )

  save(12)
  with pytest.raises(saved_steps.CheckpointError, match='saving step 12'):
    checkpoints.wait()
  fail(False)
  checkpoints.close()
  assert (directory / '2' / 'manifest.json').exists()


def test_differences_name_every_change():
  old = {
    'seed': 0,
    'data': {'name': 'shapes', 'flip': True},
    'stages': [{'steps': 100, 'sizes': [64]}, {'steps': 100}],
    'rules': [],
    'old': {'a': 1},
  }
  new = {
    'seed': 0,
    'data': {'name': 'cc12m', 'flip': 1},
    'stages': [{'steps': 100, 'sizes': (64, 256)}, {'steps': 200}],
    'rules': [],
    'new': None,
  }
  assert differences(old, new) == [
    "data.name: 'shapes' -> 'cc12m'",
    'data.flip: True -> 1',
    'stages[1].steps: 100 -> 200',
    'old.a: 1 -> absent',
    'stages[0].sizes[1]: absent -> 256',
    'new: absent -> None',
  ]
