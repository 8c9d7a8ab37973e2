"""Sampling: an image depends on its prompt and its seed, not on its batch."""

import dataclasses
import functools
import re

import jax
from jax.extend.core import jaxprs_in_params
import numpy as np
import pytest

from mdm_jax.builders.prompts import encode_prompts
from mdm_jax.builders.stage import make_stage
from mdm_jax.diffusion import samplers
from mdm_jax.models.conditioning import PrecomputedTextEncoder
from mdm_jax.runtime import sharding
from mdm_jax.steps.sample import jit_sample, make_sample_fn, make_sample_steps
from mdm_jax.tools import hlo

PROMPTS = [
  'a red ring',
  'a small blue star',
  'two green circles',
  'a cross',
  'a yellow square',
  'a large pink triangle',
  '',
  'a black dot',
  'a cyan ring',
  'a purple star above a white cross',
]


@pytest.fixture(scope='module')
def config(make_config):
  config = make_config()
  config.sampler.update(name='ddpm', guidance=3.0, threshold='clip')
  return config


@pytest.fixture(scope='module')
def made(config, random_params):
  """(mesh) -> a sampler with a random network, its parameters, shardings."""

  def make(mesh):
    stage = make_stage(config, 1)
    params = random_params(stage.model, config.text.max_length)
    shardings = sharding.tree_shardings(params, mesh, config.sharding_rules)
    return (
      stage.make_sampler(mesh),
      sharding.place(params, shardings),
      shardings,
    )

  return make


@pytest.fixture(scope='module')
def sample_fn(config, made):
  """(prompts, seeds) -> images, sampled in batches of 8."""
  mesh = sharding.make_mesh(config.mesh)
  sampler, params, shardings = made(mesh)

  @functools.cache
  def make(negative):
    (text,) = encode_prompts(config, [negative or ''])
    return make_sample_fn(sampler, text, 8, shardings)

  return lambda prompts, seeds, negative=None: make(negative)(
    params, encode_prompts(config, prompts), seeds
  )


@pytest.fixture(scope='module')
def samples(sample_fn):
  """Images of ten prompts, so that the second batch is padded."""
  return sample_fn(PROMPTS, range(10))


def test_shapes(samples):
  assert [level.shape for level in samples] == [(10, 8, 8, 3), (10, 16, 16, 3)]
  assert all(level.dtype == np.uint8 for level in samples)
  # Neither flat nor all clipped.
  assert all(20 < level.std() < 120 for level in samples)


@pytest.mark.parametrize(
  'picked', [[9], [3, 9, 0], [5] * 8, [*range(9, -1, -1)]]
)
def test_an_image_does_not_depend_on_its_batch(sample_fn, samples, picked):
  again = sample_fn([PROMPTS[i] for i in picked], picked)
  for level, expected in zip(again, samples, strict=True):
    np.testing.assert_array_equal(level, expected[picked])


def test_prompt_and_seed_matter(sample_fn, samples):
  other_seed = sample_fn(PROMPTS[:1], [1])
  other_prompt = sample_fn(PROMPTS[1:2], [0])
  for level, seed, prompt in zip(samples, other_seed, other_prompt):
    expected = level[0].astype(int)
    assert np.abs(seed[0] - expected).mean() > 10
    assert np.abs(prompt[0] - expected).mean() > 0.1


def test_guidance_leads_away_from_a_negative_prompt(sample_fn, samples):
  both = [PROMPTS[0], PROMPTS[3]]
  first, second = (
    sample_fn(both, [0, 0], negative=prompt)[1] for prompt in (None, both[1])
  )
  for i in range(2):
    assert np.abs(first[i].astype(int) - second[i]).mean() > 0.1


def test_devices_share_the_rows_of_an_image(config, made, samples):
  """Each device has an eighth of the rows, and of the work."""
  text, negative = (
    encode_prompts(config, [prompt]) for prompt in (PROMPTS[1], '')
  )
  seeds, flops = np.array([1], np.uint32), []
  for spatial in (1, 8):
    mesh = sharding.make_mesh(
      {'data': 1, 'fsdp': 1, 'spatial': spatial}, jax.devices()[:spatial]
    )
    sampler, params, _ = made(mesh)
    compiled = (
      jax.jit(sampler.sample, out_shardings=sharding.replicated(mesh))
      .lower(params, text, negative, seeds)
      .compile()
    )
    flops.append(compiled.cost_analysis()['flops'])
    for level, expected in zip(
      compiled(params, text, negative, seeds), samples, strict=True
    ):
      # Sums in another order may round a pixel to its neighbour.
      difference = np.abs(np.asarray(level[0], int) - expected[1])
      assert difference.max() <= 1
      assert difference.mean() < 0.01
  assert flops[1] < flops[0] / 5


def test_no_image_changes_its_device(config, made):
  """Guidance interleaves both predictions; only the images are gathered."""
  mesh = sharding.make_mesh(config.mesh)
  sampler, params, _ = made(mesh)
  batch = sharding.shard_batch(
    {
      'text': encode_prompts(config, PROMPTS[:8]),
      'seeds': np.arange(8, dtype=np.uint32),
    },
    mesh,
  )
  text = (
    jax.jit(sampler.sample, out_shardings=sharding.replicated(mesh))
    .lower(params, batch['text'], batch['text'], batch['seeds'])
    .compile()
    .as_text()
  )
  assert set(
    re.findall(
      r'(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)'
      r'(?:-start)?\(',
      text,
    )
  ) == {'all-gather'}


def test_parameters_are_gathered_once(config, made):
  mesh = sharding.make_mesh({'data': 1, 'fsdp': -1, 'spatial': 1})
  sampler, params, shardings = made(mesh)
  inputs_ = [
    jax.ShapeDtypeStruct((8, *shape), dtype)
    for shape, dtype in (
      ((config.text.max_length,), np.int32),
      ((config.text.max_length,), np.int32),
      ((), np.uint32),
    )
  ]

  def gathered(num_steps):
    spec = dataclasses.replace(sampler.spec, num_steps=num_steps)
    program = (
      jit_sample(dataclasses.replace(sampler, spec=spec), shardings)
      .lower(params, *inputs_)
      .compile()
    )
    return hlo.collective_bytes(program.as_text())

  few, many = gathered(2), gathered(6)
  size = sum(x.nbytes for x in jax.tree.leaves(params['unet']))
  assert few == many and few['all-gather'] > 0.9 * size


def test_sampling_step_by_step_gives_the_same_images(
  config, made, samples, monkeypatch
):
  traced = []
  one_step = samplers.sample_step
  monkeypatch.setattr(
    samplers,
    'sample_step',
    lambda *given, **options: (traced.append(1), one_step(*given, **options))[
      1
    ],
  )
  mesh = sharding.make_mesh(config.mesh)
  sampler, params, shardings = made(mesh)
  sample_steps = make_sample_steps(sampler, shardings)
  text = encode_prompts(config, PROMPTS[:8])
  empty = encode_prompts(config, [''] * 8)
  first, *_, last = sample_steps(params, text, empty, range(8), 3, 3.0)
  for level, expected in zip(last, samples, strict=True):
    difference = np.abs(np.asarray(level, int) - expected[:8])
    assert difference.max() <= 1
    assert difference.mean() < 0.01
  assert np.abs(np.asarray(first[1], int) - samples[1][:8]).mean() > 5
  # Another number of steps and another guidance weight.
  assert len(list(sample_steps(params, text, empty, range(8), 5, 1.5))) == 5
  assert len(traced) == 1
  # Without guidance each image goes through the network once.
  sizes = []
  predict = type(sampler.model).denoise
  monkeypatch.setattr(
    type(sampler.model),
    'denoise',
    lambda self, params, x_t, t, *given: (
      sizes.append(len(t)),
      predict(self, params, x_t, t, *given),
    )[1],
  )
  assert len(list(sample_steps(params, text, empty, range(8), 2, 1.0))) == 2
  assert sizes == [8]
  # What the network was given: noise, then what the sampler made of it.
  with_inputs = make_sample_steps(sampler, shardings, with_inputs=True)
  pairs = list(with_inputs(params, text, empty, range(8), 3, 3.0))
  for (_, found), expected in zip(pairs[::2], (first, last)):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  prepared = sampler.prepare(params, text, empty, np.arange(8, dtype=np.uint32))
  start = sampler.to_uint8(params, sampler.start(prepared, 0))
  jax.tree.map(np.testing.assert_array_equal, pairs[0][0], start)
  far = [np.abs(np.asarray(x_t[1], int) - last[1]).mean() for x_t, _ in pairs]
  assert far == sorted(far, reverse=True) and far[-1] < far[0] - 5, far


def text_keys(jaxpr, in_loop=False):
  """Counts computations of text keys in a program: outside loops, inside."""
  found = np.zeros(2, int)
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general' and 'text_kv' in str(
      equation.source_info.name_stack
    ):
      found[int(in_loop)] += 1
    for inner in jaxprs_in_params(equation.params):
      found += text_keys(inner, in_loop or equation.primitive.name == 'scan')
  return found


@pytest.mark.parametrize(
  'interval, kind',
  [((0.0, 1.0), 'unet'), ((0.2, 0.8), 'unet'), ((0.2, 0.8), 'transformer')],
)
def test_text_keys_are_computed_once(
  config, make_config, random_params, interval, kind
):
  of_kind = make_config(kind)
  of_kind.sampler.update(config.sampler)
  stage = make_stage(of_kind, 1)
  params = random_params(stage.model, config.text.max_length)
  sampler = stage.make_sampler(sharding.make_mesh(config.mesh))
  sampler = dataclasses.replace(
    sampler, spec=dataclasses.replace(sampler.spec, guidance_interval=interval)
  )
  text = encode_prompts(config, PROMPTS[:8])
  traced = jax.make_jaxpr(sampler.sample)(
    params, text, text, np.arange(8, dtype=np.uint32)
  )
  # Once for the prompts and once for the negative prompts, in the one layer.
  assert text_keys(traced.jaxpr).tolist() == [2, 0]


def test_a_guided_step_costs_two_unguided_ones(config, made):
  sampler, params, _ = made(sharding.make_mesh(config.mesh))
  text = encode_prompts(config, PROMPTS[:8])
  seeds = np.arange(8, dtype=np.uint32)

  def flops(weight):  # FLOP of one step, since XLA counts a loop's body once.
    spec = dataclasses.replace(sampler.spec, name='ddim', guidance=weight)
    sample = dataclasses.replace(sampler, spec=spec).sample
    return (
      jax.jit(sample).lower(params, text, text, seeds).cost_analysis()['flops']
    )

  assert flops(3.0) < 2.05 * flops(1.0)


@pytest.mark.parametrize('name', ('ddim', 'heun'))
def test_the_guided_share_is_that_of_the_calls(config, made, name):
  sampler, *_ = made(sharding.make_mesh(config.mesh))

  def shares(interval, **changes):
    spec = dataclasses.replace(
      sampler.spec, name=name, num_steps=4, guidance_interval=interval
    )
    return dataclasses.replace(sampler, spec=spec, **changes).guided_share

  total = sampler.schedule.num_steps
  _, _, t, s = samplers.steps(4, sampler.schedule)
  # Heun's method calls the network at s too.
  low, high = t[1] / total, t[0] / total
  assert shares((0.0, 1.0)) == 1
  both, one = {'ddim': (2 / 4, 1 / 4), 'heun': (3 / 7, 2 / 7)}[name]
  assert shares((low, high)) == both
  assert shares((low, high - 0.5 / total)) == one
  assert shares((0.0, 0.0)) == 0
  # The times of training that the coarsest level is told.
  times = np.full((2, total + 1), 1)
  schedule = dataclasses.replace(sampler.schedule, times=times)
  assert shares((0.0, 0.1), schedule=schedule) == 1


def test_the_network_as_its_own_guide_changes_nothing(config, made):
  mesh = sharding.make_mesh(config.mesh)
  sampler, params, shardings = made(mesh)
  guided = dataclasses.replace(sampler, guide=sampler.model)
  plain = dataclasses.replace(
    sampler, spec=dataclasses.replace(sampler.spec, guidance=1.0)
  )
  weaker = jax.tree.map(lambda x: x * 0.9, params)
  text = encode_prompts(config, PROMPTS[:8])

  plain, guided = (
    make_sample_fn(sampler, text[0], 8, shardings | {'guide': shardings})
    for sampler in (plain, guided)
  )
  expected, same, better = (
    sample(params | {'guide': guide}, text, range(8))[1].astype(int)
    for sample, guide in ((plain, params), (guided, params), (guided, weaker))
  )
  assert np.abs(same - expected).max() <= 1
  assert np.abs(better - expected).mean() > 1


@pytest.fixture(scope='module')
def reads_padding(config, random_params):
  """(to_longest, ...) -> jitted (text, negative) -> images.

  A network of one level that attends to padding, on features [8, L, 12]. With
  `is_guide` it guides itself; further options change the sampler.
  """
  changed = config.copy_and_resolve_references()
  changed.model.text.masked_attention = False
  changed.sampler.num_steps = 2
  stage = make_stage(changed, 0)
  model = dataclasses.replace(
    stage.model,
    text_encoder=PrecomputedTextEncoder(12, np.float32),
    frozen_text=True,
  )
  params = random_params(model, 4)
  mesh = sharding.make_mesh(config.mesh)
  shardings = sharding.tree_shardings(params, mesh, config.sharding_rules)

  def make(to_longest, is_guide=False, **changes):
    network = dataclasses.replace(model, to_longest=to_longest)
    sampler = dataclasses.replace(
      stage.make_sampler(mesh, **changes),
      model=network,
      guide=network if is_guide else None,
    )
    sample = jit_sample(sampler, shardings | {'guide': shardings})
    seeds = np.zeros(8, np.uint32)
    return lambda text, negative: np.asarray(
      sample(params | {'guide': params}, text, negative, seeds)[0], int
    )

  return make


def features(*lengths):
  """Features [8, 16, 12] of texts of these lengths, which repeat."""
  rng = np.random.default_rng(0)
  text = 5 * rng.standard_normal((len(lengths), 16, 12), np.float32)
  text *= (np.arange(16) < np.array(lengths)[:, None])[..., None]
  return text[np.arange(8) % len(lengths)]


def test_a_prompt_is_as_long_as_the_longer_of_it_and_its_negative(
  reads_padding,
):
  text, negative = features(2, 9, 4, 16, 7), features(2, 2, 11, 5)
  sample = reads_padding(True)
  together = sample(text, negative)
  for i in (0, 1, 2, 7):  # Alone, in a batch of its own.
    alone = [np.repeat(x[i : i + 1], 8, axis=0) for x in (text, negative)]
    np.testing.assert_array_equal(sample(*alone)[0], together[i])
  # As with bare arrays of 11 positions: prompts of 4, negative prompts of 11.
  bare = reads_padding(False)(text[:, :11], negative[:, :11])
  assert np.abs(bare[2] - together[2]).max() <= 1
  assert np.abs(bare[1] - together[1]).mean() > 1


def test_without_guidance_a_prompt_has_its_own_length(reads_padding):
  text, negative = features(2, 9), features(16)
  unguided = reads_padding(True, guidance=1.0)(text, negative)
  bare = reads_padding(False, guidance=1.0)(text[:, :9], negative[:, :9])
  assert np.abs(unguided[1] - bare[1]).max() <= 1
  assert np.abs(unguided[0] - bare[0]).mean() > 1
  # A guide reads the prompt, and no negative prompt. Led away from itself, the
  # network stays where it was.
  guided = reads_padding(True, is_guide=True)(text, negative)
  assert np.abs(guided - unguided).max() <= 1


def test_pixels_are_rounded_or_truncated(reads_padding):
  text = features(4, 9)
  rounded, truncated = (
    reads_padding(True, pixels=pixels)(text, text)
    for pixels in ('round', 'truncate')
  )
  assert set(np.unique(rounded - truncated)) == {0, 1}


def test_each_level_is_told_its_own_time(config, made):
  sampler, params, _ = made(sharding.make_mesh(config.mesh, jax.devices()[:1]))
  text = encode_prompts(config, PROMPTS[:2])
  rng = np.random.default_rng(0)
  x_t = tuple(
    rng.standard_normal((2, side, side, 3), np.float32)
    for side in sampler.model.resolutions
  )

  @jax.jit
  def denoise(t):
    cond = sampler.model.encode(params, text)
    return sampler.model.denoise(params, x_t, t, cond)

  coarse, fine = denoise(np.array([100, 700]))
  own = denoise(np.array([[100, 700], [700, 700]]))
  # This fine level has no block before the coarse one that reads its time.
  np.testing.assert_array_equal(own[0], coarse)
  np.testing.assert_array_equal(own[1][1], fine[1])
  assert np.abs(own[1][0] - fine[0]).max() > 1e-4


def test_an_offset_of_the_levels_in_sampling(config):
  """It is traced with guidance in an interval; 0 is the schedule itself."""
  changed = config.copy_and_resolve_references()
  changed.diffusion.level_times = 'independent'
  stage = make_stage(changed, 1)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  plain, moved = (
    stage.make_sampler(
      mesh, name='heun', guidance_interval=(0.2, 0.8), level_offset=offset
    )
    for offset in (0.0, 2.0)
  )
  assert plain.schedule is stage.objective.schedule
  assert moved.schedule.times[1, 500] > 500 == moved.schedule.times[0, 500]
  text = jax.ShapeDtypeStruct((2, 8), np.int32)
  seeds = jax.ShapeDtypeStruct((2,), np.uint32)
  found = jax.eval_shape(moved.sample, stage.model.shapes(8), text, text, seeds)
  assert [level.shape for level in found] == [(2, 8, 8, 3), (2, 16, 16, 3)]
