"""Drawing: an image depends on its prompt and its seed, not on its batch."""

import dataclasses
import functools
import re

import jax
from jax.extend.core import jaxprs_in_params
import numpy as np
import pytest

from mdm_jax import build, draw, hlo, inputs, sharding
from mdm_jax.diffusion import samplers

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
  """mesh -> what draws with an untrained network, and its parameters."""

  def make(mesh):
    stage = config.stages[1]
    model = build.make_model(config, stage)
    painter = build.make_painter(config, stage, mesh)
    params = random_params(model, config.text.max_length)
    shardings = sharding.tree_shardings(params, mesh, config.sharding_rules)
    return painter, sharding.place(params, shardings), shardings

  return make


@pytest.fixture(scope='module')
def draw_fn(config, made):
  """(prompts, seeds) -> images, 8 at once."""
  mesh = sharding.make_mesh(config.mesh)
  painter, params, shardings = made(mesh)

  @functools.cache
  def make(negative):
    (text,) = inputs.encode_prompts(config, [negative or ''])
    return draw.make_draw(painter, text, 8, shardings)

  return lambda prompts, seeds, negative=None: make(negative)(
    params, inputs.encode_prompts(config, prompts), seeds
  )


@pytest.fixture(scope='module')
def drawn(draw_fn):
  """Ten prompts, so that the second batch is filled up."""
  return draw_fn(PROMPTS, range(10))


def test_shapes(drawn):
  assert [level.shape for level in drawn] == [(10, 8, 8, 3), (10, 16, 16, 3)]
  assert all(level.dtype == np.uint8 for level in drawn)
  # Neither flat nor all clipped.
  assert all(20 < level.std() < 120 for level in drawn)


@pytest.mark.parametrize(
  'picked', [[9], [3, 9, 0], [5] * 8, [*range(9, -1, -1)]]
)
def test_independent_of_the_batch(draw_fn, drawn, picked):
  again = draw_fn([PROMPTS[i] for i in picked], picked)
  for level, expected in zip(again, drawn, strict=True):
    np.testing.assert_array_equal(level, expected[picked])


def test_prompt_and_seed_matter(draw_fn, drawn):
  other_seed = draw_fn(PROMPTS[:1], [1])
  other_prompt = draw_fn(PROMPTS[1:2], [0])
  for level, seed, prompt in zip(drawn, other_seed, other_prompt):
    expected = level[0].astype(int)
    assert np.abs(seed[0] - expected).mean() > 10
    assert np.abs(prompt[0] - expected).mean() > 0.1


def test_guidance_leads_away_from_a_negative_prompt(draw_fn, drawn):
  both = [PROMPTS[0], PROMPTS[3]]
  first, second = (
    draw_fn(both, [0, 0], negative=prompt)[1] for prompt in (None, both[1])
  )
  for i in range(2):
    assert np.abs(first[i].astype(int) - second[i]).mean() > 0.1


def test_devices_draw_a_picture_together(config, made, drawn):
  """Each has an eighth of the rows, and of the work."""
  text, negative = (
    inputs.encode_prompts(config, [prompt]) for prompt in (PROMPTS[1], '')
  )
  seeds, flops = np.array([1], np.uint32), []
  for spatial in (1, 8):
    mesh = sharding.make_mesh(
      {'data': 1, 'fsdp': 1, 'spatial': spatial}, jax.devices()[:spatial]
    )
    painter, params, _ = made(mesh)
    compiled = (
      jax.jit(painter.sample, out_shardings=sharding.replicated(mesh))
      .lower(params, text, negative, seeds)
      .compile()
    )
    flops.append(compiled.cost_analysis()['flops'])
    for level, expected in zip(
      compiled(params, text, negative, seeds), drawn, strict=True
    ):
      # Sums in another order may round a pixel to its neighbour.
      difference = np.abs(np.asarray(level[0], int) - expected[1])
      assert difference.max() <= 1
      assert difference.mean() < 0.01
  assert flops[1] < flops[0] / 5


def test_no_picture_changes_its_device(config, made):
  """Guidance pairs what it compares; only the result is gathered."""
  mesh = sharding.make_mesh(config.mesh)
  painter, params, _ = made(mesh)
  batch = sharding.shard_batch(
    {
      'text': inputs.encode_prompts(config, PROMPTS[:8]),
      'seeds': np.arange(8, dtype=np.uint32),
    },
    mesh,
  )
  text = (
    jax.jit(painter.sample, out_shardings=sharding.replicated(mesh))
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
  painter, params, shardings = made(mesh)
  inputs_ = [
    jax.ShapeDtypeStruct((8, *shape), dtype)
    for shape, dtype in (
      ((config.text.max_length,), np.int32),
      ((config.text.max_length,), np.int32),
      ((), np.uint32),
    )
  ]

  def gathered(num_steps):
    spec = dataclasses.replace(painter.spec, num_steps=num_steps)
    program = (
      draw.jit_sample(dataclasses.replace(painter, spec=spec), shardings)
      .lower(params, *inputs_)
      .compile()
    )
    return hlo.collective_bytes(program.as_text())

  few, many = gathered(2), gathered(6)
  size = sum(x.nbytes for x in jax.tree.leaves(params['unet']))
  assert few == many and few['all-gather'] > 0.9 * size


def test_step_by_step_it_is_the_same_picture(config, made, drawn, monkeypatch):
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
  painter, params, shardings = made(mesh)
  draw_steps = draw.make_draw_steps(painter, shardings)
  text = inputs.encode_prompts(config, PROMPTS[:8])
  empty = inputs.encode_prompts(config, [''] * 8)
  first, *_, last = draw_steps(params, text, empty, range(8), 3, 3.0)
  for level, expected in zip(last, drawn, strict=True):
    difference = np.abs(np.asarray(level, int) - expected[:8])
    assert difference.max() <= 1
    assert difference.mean() < 0.01
  assert np.abs(np.asarray(first[1], int) - drawn[1][:8]).mean() > 5
  # Another number of steps, another weight.
  assert len(list(draw_steps(params, text, empty, range(8), 5, 1.5))) == 5
  assert len(traced) == 1


def text_keys(jaxpr, in_loop=False):
  """How often a traced program makes a text's keys: outside, inside loops."""
  found = np.zeros(2, int)
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general' and 'text_kv' in str(
      equation.source_info.name_stack
    ):
      found[int(in_loop)] += 1
    for inner in jaxprs_in_params(equation.params):
      found += text_keys(inner, in_loop or equation.primitive.name == 'scan')
  return found


@pytest.mark.parametrize('interval', [(0.0, 1.0), (0.2, 0.8)])
def test_keys_of_the_text_are_made_once(config, made, interval):
  painter, params, _ = made(sharding.make_mesh(config.mesh))
  painter = dataclasses.replace(
    painter, spec=dataclasses.replace(painter.spec, guidance_interval=interval)
  )
  text = inputs.encode_prompts(config, PROMPTS[:8])
  traced = jax.make_jaxpr(painter.sample)(
    params, text, text, np.arange(8, dtype=np.uint32)
  )
  # Of one layer, with the prompts and with the negative ones.
  assert text_keys(traced.jaxpr).tolist() == [2, 0]


def test_a_guided_step_costs_two_plain_ones(config, made):
  painter, params, _ = made(sharding.make_mesh(config.mesh))
  text = inputs.encode_prompts(config, PROMPTS[:8])
  seeds = np.arange(8, dtype=np.uint32)

  def flops(weight):  # XLA counts a loop's body once.
    spec = dataclasses.replace(painter.spec, name='ddim', guidance=weight)
    sample = dataclasses.replace(painter, spec=spec).sample
    return (
      jax.jit(sample).lower(params, text, text, seeds).cost_analysis()['flops']
    )

  assert flops(3.0) < 2.05 * flops(1.0)


def test_the_network_as_its_own_guide_changes_nothing(config, made):
  mesh = sharding.make_mesh(config.mesh)
  painter, params, shardings = made(mesh)
  guided = dataclasses.replace(painter, guide=painter.model)
  plain = dataclasses.replace(
    painter, spec=dataclasses.replace(painter.spec, guidance=1.0)
  )
  weaker = jax.tree.map(lambda x: x * 0.9, params)
  text = inputs.encode_prompts(config, PROMPTS[:8])

  plain, guided = (
    draw.make_draw(painter, text[0], 8, shardings | {'guide': shardings})
    for painter in (plain, guided)
  )
  expected, same, better = (
    drawer(params | {'guide': guide}, text, range(8))[1].astype(int)
    for drawer, guide in ((plain, params), (guided, params), (guided, weaker))
  )
  assert np.abs(same - expected).max() <= 1
  assert np.abs(better - expected).mean() > 1
