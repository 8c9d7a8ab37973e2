"""The demo's queue: images, order of requests, cancellation and messages."""

import dataclasses
import functools
import shlex
import threading

import jax
import numpy as np
import pytest

from mdm_jax.builders.model import make_model
from mdm_jax.builders.prompts import encode_prompts
from mdm_jax.builders.stage import make_stage
from mdm_jax.diffusion import samplers
from mdm_jax.inference.session import Model
from mdm_jax.inference.weights import SavedWeights, Weights
from mdm_jax.runtime import sharding
from mdm_jax.serving import film, queue
from tests import toy


@pytest.fixture(scope='module')
def make_queue(make_config, random_params, tmp_path_factory):
  """(step of the last checkpoint) -> a queue, its config and parameters."""
  config = make_config()
  config.mesh.update(data=1, fsdp=1, spatial=1)
  config.sampler.update(name='ddpm', guidance=3.0, threshold='clip')
  stage = config.stages[1]
  params = random_params(make_model(config, stage), config.text.max_length)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  placed = jax.device_put(params, sharding.replicated(mesh))
  made = []

  def make(step=20, others=None):
    workdir = tmp_path_factory.mktemp('a run')
    toy.save_run(workdir, config, 1, step, params)
    model = Model(
      str(workdir),
      make_stage(config, 1),
      Weights(1, step, placed),
      placed,
      mesh,
    )
    made.append(queue.SampleQueue(model, 2, others))
    return made[-1], config, placed

  yield make
  for sample_queue in made:
    sample_queue.close()


@pytest.fixture(scope='module')
def real(make_queue):
  """A queue after its warm-up, its config and its parameters."""
  made = make_queue()
  assert not made[0].ready.is_set()
  made[0].warm_up()
  assert made[0].ready.wait(600)
  return made


BLACK = (np.zeros((16, 8, 8, 3), np.uint8),)


class Gate:
  """Sampling steps that wait for `let`, and yield black images."""

  def __init__(self, sample_queue, monkeypatch):
    self._open = threading.Semaphore(0)
    self.begun = []
    monkeypatch.setattr(
      sample_queue, '_sample_steps', lambda *given: self._steps
    )

  def _steps(self, params, text, negative, seeds, num_steps, w):
    self.begun.append(int(seeds[0]))
    for _ in range(num_steps):
      assert self._open.acquire(timeout=600)
      yield BLACK, BLACK

  def let(self, steps):
    self._open.release(steps)


@pytest.fixture
def gated(real, monkeypatch):
  """A queue, and the gate that its sampling steps wait for."""
  sample_queue, *_ = real
  gate = Gate(sample_queue, monkeypatch)
  yield sample_queue, gate
  gate.let(10_000)


def request(sample_queue, **changes):
  return dataclasses.replace(
    sample_queue.default_request,
    **{'prompt': 'a red ring', 'seed': 7} | changes,
  )


def sampled(sample_queue, given):
  *_, last = sample_queue.watch(sample_queue.submit(given))
  assert last.step == given.steps
  return last.images


def test_samples_the_request(real):
  sample_queue, config, params = real
  given = request(sample_queue, num_images=3)
  images = sampled(sample_queue, given)
  assert [level.shape for level in images] == [(3, 8, 8, 3), (3, 16, 16, 3)]
  text = encode_prompts(config, [given.prompt] * 4)
  empty = encode_prompts(config, [''] * 4)
  *_, (_, expected) = sample_queue._sample_steps(1, 'ddpm', 'clip')(
    params, text, empty, [7, 8, 9, 10], 3, 3.0
  )
  for level, others in zip(images, expected, strict=True):
    np.testing.assert_array_equal(level, others[:3])
  # A request for one image gives the same image.
  one = sampled(sample_queue, request(sample_queue, num_images=1, seed=8))
  for level, others in zip(one, images, strict=True):
    difference = np.abs(level.astype(int) - others[1:2])
    # Sums in another order may round a pixel to its neighbour.
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_sampler_and_threshold_are_those_of_the_request(
  make_queue, monkeypatch
):
  sample_queue, *_ = make_queue()
  specs = []

  def record(given, shardings, with_inputs):
    specs.append(given.spec)
    return lambda *given: [(BLACK, BLACK)]

  monkeypatch.setattr(queue, 'make_sample_steps', record)
  for sampler, threshold in [('heun', 'none'), ('dpm', 'dynamic')]:
    sampled(
      sample_queue,
      request(sample_queue, sampler=sampler, threshold=threshold, steps=1),
    )
  usual = sample_queue._samplers[1][0].spec
  assert specs == [
    dataclasses.replace(usual, name='heun', threshold='none'),
    dataclasses.replace(usual, name='dpm', threshold='dynamic'),
  ]


def test_nothing_is_compiled_after_the_warm_up(real, monkeypatch):
  sample_queue, *_ = real
  monkeypatch.setattr(samplers, 'sample_step', None)
  usual = request(sample_queue)
  for changes in (
    {},
    {'steps': 7},
    {'guidance': 1.5},
    {'num_images': 3},
    {'prompt': ''},
    {'negative_prompt': 'a cross'},
  ):
    sampled(sample_queue, dataclasses.replace(usual, **changes))
  with pytest.raises(TypeError, match='not callable'):
    sampled(sample_queue, request(sample_queue, sampler='dpm'))


def test_warm_up_that_fails_ends(make_queue, monkeypatch):
  sample_queue, *_ = make_queue()

  def fail(*given):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED')

  monkeypatch.setattr(sample_queue, '_sample_steps', lambda *given: fail)
  sample_queue.warm_up()
  assert sample_queue.ready.wait(600)


def test_one_at_a_time_and_few_may_wait(gated):
  sample_queue, gate = gated
  jobs = [
    sample_queue.submit(request(sample_queue, steps=2, seed=i))
    for i in range(3)
  ]
  views = [sample_queue.watch(job) for job in jobs]
  assert [next(view).ahead for view in views] == [0, 1, 2]
  with pytest.raises(queue.QueueFull, match='2 requests are waiting already'):
    sample_queue.submit(request(sample_queue))
  gate.let(2)
  *_, last = views[0]
  assert (last.step, last.ahead) == (2, 0)
  assert next(views[1])[:3] == (0, 0, ())
  assert next(views[2]) == (1, 0, (), 'waiting')
  views.append(
    sample_queue.watch(
      sample_queue.submit(request(sample_queue, steps=1, seed=3))
    )
  )
  assert next(views[3]).ahead == 2
  gate.let(5)
  assert [list(view)[-1].step for view in views[1:]] == [2, 2, 1]
  assert gate.begun == [0, 1, 2, 3]


def test_cancelled_while_sampling(gated):
  sample_queue, gate = gated
  job = sample_queue.submit(request(sample_queue, steps=1000))
  view = sample_queue.watch(job)
  gate.let(2)
  while next(view).step < 2:
    pass
  job.cancel()
  gate.let(1)  # Lets the current step end.
  assert [progress.step for progress in view][-1:] in ([], [3])
  assert job.step == 3
  gate.let(1)
  assert len(sampled(sample_queue, request(sample_queue, steps=1))[0]) == 4


def test_cancelled_while_waiting(gated):
  sample_queue, gate = gated
  first, second, third = (
    sample_queue.submit(request(sample_queue, steps=1, seed=i))
    for i in range(3)
  )
  second.cancel()
  assert [progress.step for progress in sample_queue.watch(second)] == [0]
  view = sample_queue.watch(third)
  assert next(view).ahead == 1
  gate.let(2)
  assert [
    list(view)[-1].step for view in (sample_queue.watch(first), view)
  ] == [
    1,
    1,
  ]
  assert gate.begun == [0, 2]


def test_what_nobody_waits_for_is_dropped(gated):
  sample_queue, gate = gated
  wanted = [True] * 4
  jobs = [
    sample_queue.submit(
      request(sample_queue, steps=1000, seed=i),
      is_wanted=functools.partial(wanted.__getitem__, i),
    )
    for i in range(3)
  ]
  # The place of one that waited is free at once, without a step.
  wanted[1] = False
  jobs.append(
    sample_queue.submit(
      request(sample_queue, steps=1, seed=3),
      is_wanted=functools.partial(wanted.__getitem__, 3),
    )
  )
  assert jobs[1].future.cancelled()
  # One that is being sampled ends with its step, and those that wait with it.
  gate.let(1)
  view = sample_queue.watch(jobs[0])
  while not next(view).step:
    pass
  wanted[0] = wanted[2] = False
  gate.let(2)
  jobs[3].future.result(600)
  assert jobs[0].step <= 2 and jobs[2].step == 0 and jobs[3].step == 1
  assert gate.begun == [0, 3]


def test_an_owner_cancels_its_own(gated):
  sample_queue, gate = gated
  mine, other, mine_too = (
    sample_queue.submit(request(sample_queue, steps=2, seed=i), owner)
    for i, owner in enumerate(('me', 'you', 'me'))
  )
  view = sample_queue.watch(mine)
  while next(view).state != 'sampling':  # One that has not begun takes no step.
    pass
  sample_queue.cancel('me')
  assert mine_too.future.cancelled() and not other.cancelled.is_set()
  gate.let(3)
  mine.future.result(600)
  other.future.result(600)
  assert mine.step == 1 and other.step == 2


def test_closing_the_iterator_cancels(gated):
  sample_queue, gate = gated
  job = sample_queue.submit(request(sample_queue, steps=1000))
  view = sample_queue.watch(job)
  gate.let(1)
  while not next(view).step:
    pass
  view.close()
  gate.let(1)
  job.future.result(600)
  assert job.step == 2


def test_a_failing_device_fails_one_request(gated, monkeypatch):
  sample_queue, gate = gated

  def fail(*given):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED')

  with monkeypatch.context() as patch:
    patch.setattr(sample_queue, '_sample_steps', lambda *given: fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match='EXHAUSTED'):
      sampled(sample_queue, request(sample_queue))
  gate.let(1)
  sampled(sample_queue, request(sample_queue, steps=1))


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
    ({'prompt': 'a\0b'}, 'The prompt contains the character U+0000'),
    ({'prompt': '\ud800'}, 'The prompt contains the character U+D800'),
    ({'steps': 0}, 'Steps: 0; give a number from 1 to 1,000.'),
    ({'steps': 1001}, 'Steps: 1,001; give a number from 1 to 1,000.'),
    ({'steps': None}, 'Steps: empty; give a number from 1 to 1,000.'),
    ({'num_images': 9}, 'Images: 9; give a number from 1 to 8.'),
    ({'num_images': 0}, 'Images: 0; give a number from 1 to 8.'),
    ({'seed': -1}, 'Seed: -1; give a number from 0 to 4,294,967,288.'),
    ({'seed': 2**32}, 'Seed: 4,294,967,296; give a number'),
    ({'guidance': float('nan')}, 'Guidance: nan; give a number from 0 to 20.'),
    ({'sampler': '../x'}, "Unknown sampler '../x': use one of ('ddim',"),
    ({'threshold': 'x'}, "Unknown threshold 'x': use one of ('none',"),
    ({'weights': '/x'}, "Unknown checkpoint '/x': use one of ('stage 16, E"),
  ],
)
def test_bad_request(real, changes, message):
  sample_queue, *_ = real
  with pytest.raises(ValueError) as error:
    sample_queue.submit(request(sample_queue, **changes))
  assert str(error.value).startswith(message)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('prompt', ['', 'красный круг', '赤い丸', '🔴' * 500])
def test_any_text_is_a_prompt(gated, prompt):
  sample_queue, gate = gated
  gate.let(1)
  sampled(sample_queue, request(sample_queue, prompt=prompt, steps=1))


def test_unknown_words_are_noted(real):
  sample_queue, *_ = real
  note = sample_queue.note(request(sample_queue, prompt='A purpl <b>Ring'))
  assert (
    'The prompt has words that training never saw: "purpl", "b"; it knows a, '
  ) in note
  assert sample_queue.note(request(sample_queue, negative_prompt='hazy'))


def test_a_truncated_prompt_is_noted(real):
  sample_queue, *_ = real
  assert sample_queue.note(request(sample_queue, prompt='a ring')) == ''
  assert sample_queue.note(
    request(sample_queue, prompt='a ring, ' * 9)
  ).endswith(' tokens, the limit is 8.')


@pytest.mark.parametrize(
  'prompt', ['a red ring', '', 'it\'s $(HOME) `x` "y"; --seed=3 #', '赤い丸']
)
def test_command(real, prompt):
  sample_queue, *_ = real
  given = request(sample_queue, prompt=prompt, guidance=2.5)
  words = shlex.split(sample_queue.command(given, 2))
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
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sample_queue, '_moved', {'text_path': '/t5', 'data_path': None}
    )
    assert sample_queue.command(given).endswith(' --text_path=/t5')
  away = sample_queue.command(dataclasses.replace(given, negative_prompt='a b'))
  assert "--negative_prompt='a b' " in away


def test_steps_are_kept_small(real):
  """The film: what the network was given and predicted, and the log-SNR."""
  sample_queue, *_ = real
  job = sample_queue.submit(request(sample_queue, steps=40, num_images=2))
  *_, last = sample_queue.watch(job)
  assert [frame.step for frame in job.film] == sorted(film.frame_steps(40))
  assert job.film[0].step == 1 and job.film[-1].step == 40
  assert len(job.film) == film.MAX_FRAMES
  jax.tree.map(np.testing.assert_array_equal, job.film[-1].x0, last.images)
  snr = np.array([frame.log_snr for frame in job.film])
  assert (np.diff(snr, axis=0) > 0).all() and snr[0, 0] < -5
  assert (snr[:, 1] < snr[:, 0]).all()  # The finer level is noisier.
  assert job.film[0].x_t[1].shape == (2, 16, 16, 3)
  assert job.film[0].x_t[1].std() > 85  # noise


def test_frames_are_small_and_as_noisy_as_the_images():
  rng = np.random.default_rng(0)
  large = rng.integers(0, 256, (5, 150, 150, 3), np.uint8)
  frame = film.make_frame(1, np.zeros(1), (large,), (large,))
  assert frame.x_t[0].shape == frame.x0[0].shape == (4, 50, 50, 3)
  assert frame.x_t[0].std() > 70 and frame.x0[0].std() < 30
  assert frame.x0[0][3, 2, 5, 1] == int(large[3, 6:9, 15:18, 1].mean())
  assert film.shrink(large, 150) is large


def test_other_weights_are_loaded_when_they_are_asked_for(
  make_queue, monkeypatch
):
  loaded = []

  def load(saved, shift):
    loaded.append(saved)
    if shift is None:
      raise FileNotFoundError('it is gone\nfor good')
    params = jax.tree.map(lambda x: x + shift, model.params)
    return dataclasses.replace(
      model, params=params, weights=Weights(1, saved.step, params, best=True)
    )

  others = {
    saved: functools.partial(load, saved, shift)
    for saved, shift in (
      (SavedWeights('16', 20), None),  # The queue has it already.
      (SavedWeights('16', 10, best=True), 0.1),
      (SavedWeights('16', 18, sigma_rel=0.1), 0.2),
      (SavedWeights('8', 5), None),
    )
  }
  sample_queue, *_ = make_queue(others=others)
  model = sample_queue._model
  own, best, average, other = sample_queue.choices
  assert own == 'stage 16, EMA, step 20'
  assert other == 'stage 8, EMA, step 5'
  made = {
    name: sampled(sample_queue, request(sample_queue, weights=name, steps=1))
    for name in (own, best, average, best, best, own)
  }
  assert [one.step for one in loaded] == [10, 18, 10]
  assert not np.array_equal(made[own][1], made[best][1])
  assert not np.array_equal(made[average][1], made[best][1])
  # The failure ends this request, and no other.
  with pytest.raises(queue.WeightsUnavailable, match='others. it is gone$'):
    sampled(sample_queue, request(sample_queue, weights=other))
  sampled(sample_queue, request(sample_queue, weights=best, steps=1))
  job = sample_queue.submit(request(sample_queue, weights=best, steps=1))
  job.future.result(600)
  assert (job.model['step'], job.model['weights']) == (10, 'best EMA')
  for name, flags in (
    (own, []),
    (best, ['--best=True']),
    (average, ['--sigma_rel=0.1']),
    (other, ['--stage=8']),
  ):
    given = request(sample_queue, weights=name)
    words = shlex.split(sample_queue.command(given))
    found = {'--stage', '--sigma_rel', '--best'}
    assert [w for w in words if w.partition('=')[0] in found] == flags


@pytest.mark.parametrize(
  'step, about',
  [
    (20, '8 and 16 px'),
    (
      5,
      "8 and 16 px. Training has not ended: this is stage 2/2 '16' at step 5 "
      'of 20',
    ),
  ],
)
def test_says_whether_training_has_ended(make_queue, step, about):
  assert make_queue(step)[0].about.endswith(', ' + about)


def test_an_earlier_stage_is_called_so(make_queue):
  sample_queue, config, params = make_queue()
  model = dataclasses.replace(
    sample_queue._model,
    stage=make_stage(config, 0),
    weights=Weights(0, 20, params),
  )
  for saved, state in (
    (SavedWeights('8', 20), 'Training has not ended: this is'),
    (SavedWeights('16', 5), 'An earlier stage of training:'),
  ):
    found = queue.SampleQueue(model, 2, {saved: None})
    assert found.about.endswith(f"8 px. {state} stage 1/2 '8' at step 20 of 20")
    found.close()
