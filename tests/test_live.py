"""Drawing for those who look on: the same pictures, in turn, and cancelled."""

import dataclasses
import shlex
import threading

import jax
import numpy as np
import pytest

from mdm_jax import build, draw, inputs, live, sharding
from mdm_jax.diffusion import samplers
from tests import toy


@pytest.fixture(scope='module')
def make_studio(make_config, random_params, tmp_path_factory):
  """(step of the last stage's checkpoint) -> a studio, config, parameters."""
  config = make_config()
  config.mesh.update(data=1, fsdp=1, spatial=1)
  config.sampler.update(name='ddpm', guidance=3.0, threshold='clip')
  stage = config.stages[1]
  params = random_params(
    build.make_model(config, stage), config.text.max_length
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  placed = jax.device_put(params, sharding.replicated(mesh))
  made = []

  def make(step=20):
    workdir = tmp_path_factory.mktemp('a run')
    toy.save_run(workdir, config, 1, step, params)
    made.append(
      live.Studio(config, 1, step, placed, mesh, str(workdir), max_waiting=2)
    )
    return made[-1], config, placed

  yield make
  for studio in made:
    studio.close()


@pytest.fixture(scope='module')
def real(make_studio):
  """A studio that is warm, its config and its parameters."""
  made = make_studio()
  assert not made[0].ready.is_set()
  made[0].warm_up()
  assert made[0].ready.wait(120)
  return made


class Gate:
  """Steps that are taken when the test says so, each of black pictures."""

  def __init__(self, studio, monkeypatch):
    self._open = threading.Semaphore(0)
    self.begun = []
    monkeypatch.setattr(
      studio, '_draw_steps', lambda sampler, threshold: self._steps
    )

  def _steps(self, params, text, negative, seeds, num_steps, w):
    self.begun.append(int(seeds[0]))
    for _ in range(num_steps):
      assert self._open.acquire(timeout=60)
      yield (np.zeros((len(seeds), 8, 8, 3), np.uint8),)

  def let(self, steps):
    self._open.release(steps)


@pytest.fixture
def gated(real, monkeypatch):
  """A studio, and the gate that its steps wait at."""
  studio, *_ = real
  gate = Gate(studio, monkeypatch)
  yield studio, gate
  gate.let(10_000)


def order(studio, **changes):
  return dataclasses.replace(
    studio.usual, **{'prompt': 'a red ring', 'seed': 7} | changes
  )


def drawn(studio, given):
  *_, last = studio.watch(studio.submit(given))
  assert last.step == given.steps
  return last.pictures


def test_draws_what_was_ordered(real):
  studio, config, params = real
  given = order(studio, num_pictures=3)
  pictures = drawn(studio, given)
  assert [level.shape for level in pictures] == [(3, 8, 8, 3), (3, 16, 16, 3)]
  text = inputs.encode_prompts(config, [given.prompt] * 4)
  empty = inputs.encode_prompts(config, [''] * 4)
  *_, expected = studio._draw_steps('ddpm', 'clip')(
    params, text, empty, [7, 8, 9, 10], 3, 3.0
  )
  for level, others in zip(pictures, expected, strict=True):
    np.testing.assert_array_equal(level, others[:3])
  # Alone it is the same.
  one = drawn(studio, order(studio, num_pictures=1, seed=8))
  for level, others in zip(one, pictures, strict=True):
    difference = np.abs(level.astype(int) - others[1:2])
    # Sums in another order may round a pixel to its neighbour.
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_sampler_and_threshold_are_those_of_the_order(make_studio, monkeypatch):
  studio, *_ = make_studio()
  specs = []

  def record(painter, shardings):
    specs.append(painter.spec)
    return lambda *given: [(np.zeros((4, 8, 8, 3), np.uint8),)]

  monkeypatch.setattr(draw, 'make_draw_steps', record)
  for sampler, threshold in [('heun', 'none'), ('dpm', 'dynamic')]:
    drawn(studio, order(studio, sampler=sampler, threshold=threshold, steps=1))
  usual = studio._painter.spec
  assert specs == [
    dataclasses.replace(usual, name='heun', threshold='none'),
    dataclasses.replace(usual, name='dpm', threshold='dynamic'),
  ]


def test_nothing_is_compiled_after_the_warm_up(real, monkeypatch):
  studio, *_ = real
  monkeypatch.setattr(samplers, 'sample_step', None)
  usual = order(studio)
  for changes in (
    {},
    {'steps': 7},
    {'guidance': 1.5},
    {'num_pictures': 3},
    {'prompt': ''},
    {'negative_prompt': 'a cross'},
  ):
    drawn(studio, dataclasses.replace(usual, **changes))
  with pytest.raises(TypeError, match='not callable'):
    drawn(studio, order(studio, sampler='dpm'))


def test_warm_up_that_fails_ends(make_studio, monkeypatch):
  studio, *_ = make_studio()

  def fail(*given):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED')

  monkeypatch.setattr(studio, '_draw_steps', lambda *given: fail)
  studio.warm_up()
  assert studio.ready.wait(60)


def test_one_at_a_time_and_few_wait(gated):
  studio, gate = gated
  jobs = [studio.submit(order(studio, steps=2, seed=i)) for i in range(3)]
  views = [studio.watch(job) for job in jobs]
  assert [next(view).ahead for view in views] == [0, 1, 2]
  with pytest.raises(live.Busy, match='2 others are waiting already'):
    studio.submit(order(studio))
  gate.let(2)
  *_, last = views[0]
  assert (last.step, last.ahead) == (2, 0)
  assert next(views[1]) == (0, 0, ())
  assert next(views[2]) == (1, 0, ())
  views.append(studio.watch(studio.submit(order(studio, steps=1, seed=3))))
  assert next(views[3]).ahead == 2
  gate.let(5)
  assert [list(view)[-1].step for view in views[1:]] == [2, 2, 1]
  assert gate.begun == [0, 1, 2, 3]


def test_cancelled_while_it_is_drawn(gated):
  studio, gate = gated
  job = studio.submit(order(studio, steps=1000))
  view = studio.watch(job)
  gate.let(2)
  while next(view).step < 2:
    pass
  job.cancel()
  gate.let(1)  # The step that is being taken.
  assert [progress.step for progress in view][-1:] in ([], [3])
  assert job.step == 3
  gate.let(1)
  assert len(drawn(studio, order(studio, steps=1))[0]) == 4


def test_cancelled_while_it_waits(gated):
  studio, gate = gated
  first, second, third = (
    studio.submit(order(studio, steps=1, seed=i)) for i in range(3)
  )
  second.cancel()
  assert [progress.step for progress in studio.watch(second)] == [0]
  view = studio.watch(third)
  assert next(view).ahead == 1
  gate.let(2)
  assert [list(view)[-1].step for view in (studio.watch(first), view)] == [1, 1]
  assert gate.begun == [0, 2]


def test_who_looks_away_cancels(gated):
  studio, gate = gated
  job = studio.submit(order(studio, steps=1000))
  view = studio.watch(job)
  gate.let(1)
  while not next(view).step:
    pass
  view.close()
  gate.let(1)
  job.future.result(60)
  assert job.step == 2


def test_a_failing_device_fails_one_order(gated, monkeypatch):
  studio, gate = gated

  def fail(*given):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED')

  with monkeypatch.context() as patch:
    patch.setattr(studio, '_draw_steps', lambda *given: fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match='EXHAUSTED'):
      drawn(studio, order(studio))
  gate.let(1)
  drawn(studio, order(studio, steps=1))


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'prompt': 'a' * 10_000},
      'The prompt has 10,000 characters: shorten it to 1,000.',
    ),
    (
      {'negative_prompt': 'b' * 1001},
      'The negative prompt has 1,001 characters: shorten it to 1,000.',
    ),
    ({'prompt': 'a\0b'}, 'The prompt contains U+0000'),
    ({'prompt': '\ud800'}, 'The prompt contains U+D800'),
    ({'steps': 0}, 'Steps: 0; give a number from 1 to 1,000.'),
    ({'steps': 1001}, 'Steps: 1,001; give a number from 1 to 1,000.'),
    ({'steps': None}, 'Steps: empty; give a number from 1 to 1,000.'),
    ({'num_pictures': 9}, 'Pictures: 9; give a number from 1 to 8.'),
    ({'num_pictures': 0}, 'Pictures: 0; give a number from 1 to 8.'),
    ({'seed': -1}, 'Seed: -1; give a number from 0 to 4,294,967,288.'),
    ({'seed': 2**32}, 'Seed: 4,294,967,296; give a number'),
    ({'guidance': float('nan')}, 'Guidance: nan; give a number from 0 to 20.'),
    ({'sampler': '../x'}, "Unknown sampler '../x': use one of ('ddim',"),
    ({'threshold': 'x'}, "Unknown threshold 'x': use one of ('none',"),
  ],
)
def test_bad_order(real, changes, message):
  studio, *_ = real
  with pytest.raises(ValueError) as error:
    studio.submit(order(studio, **changes))
  assert str(error.value).startswith(message)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('prompt', ['', 'красный круг', '赤い丸', '🔴' * 500])
def test_any_text_is_a_prompt(gated, prompt):
  studio, gate = gated
  gate.let(1)
  drawn(studio, order(studio, prompt=prompt, steps=1))


def test_says_what_was_not_read(real):
  studio, *_ = real
  assert studio.note(order(studio, prompt='a ring')) == ''
  assert studio.note(order(studio, prompt='a ring, ' * 9)).endswith(
    'and the network reads 8: the rest was left out.'
  )


@pytest.mark.parametrize(
  'prompt', ['a red ring', '', 'it\'s $(HOME) `x` "y"; --seed=3 #', '赤い丸']
)
def test_command(real, prompt):
  studio, *_ = real
  given = order(studio, prompt=prompt, guidance=2.5)
  words = shlex.split(studio.command(given, 2))
  assert words[:3] == ['python', '-m', 'mdm_jax.sample']
  assert words[4:] == [
    f'--prompt={prompt}',
    '--guidance=2.5',
    '--steps=3',
    '--sampler=ddpm',
    '--threshold=clip',
    '--seed=9',
    '--num_samples=1',
  ]
  assert words[3].startswith('--workdir=/') and 'a run' in words[3]
  away = studio.command(dataclasses.replace(given, negative_prompt='a b'))
  assert "--negative_prompt='a b' " in away


def test_examples_are_captions_of_the_data_set(real):
  studio, *_ = real
  examples = studio.examples(5)
  assert len(set(examples)) == 5
  assert all('on ' in text or 'background' in text for text in examples)


@pytest.mark.parametrize(
  'step, about',
  [
    (20, '8 and 16 px'),
    (
      5,
      "8 and 16 px. Training has not ended: stage 2/2 '16' at step 5 of 20 "
      'draws',
    ),
  ],
)
def test_says_whether_training_has_ended(make_studio, step, about):
  assert make_studio(step)[0].about.endswith(', ' + about)
