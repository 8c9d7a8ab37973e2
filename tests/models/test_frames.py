"""Levels of clips: attention between frames, and levels finer in time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.diffusion import guidance, pyramid
from mdm_jax.models import attention
from mdm_jax.models.conditioning import Cond, TextSpec
from mdm_jax.models.matryoshka import Matryoshka
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.packing import Features
from mdm_jax.models.unet import FRAME_ATTENTION, LevelSpec
from mdm_jax.training.grow import grow

RNG = np.random.default_rng(0)
B, TEXT_WIDTH = 2, 12
COND = Cond(
  RNG.standard_normal((B, 5, TEXT_WIDTH)).astype(np.float32),
  np.arange(5) < np.array([[5], [3]]),
)
TIMES = np.array([20.0, 700.0], np.float32)
SHARED = {'temporal_dim': 16, 'scale_condition': 8, 'num_heads': 2}
LEVELS = {
  'unet': LevelSpec(
    channels=(8,),
    num_blocks=(0,),
    attention_layers=(1,),
    num_groups=4,
    **SHARED,
  ),
  'transformer': LevelSpec(
    kind='transformer',
    channels=(16,),
    num_blocks=(1,),
    attention_layers=(0,),
    patch_size=2,
    **SHARED,
  ),
}
# Of 8 px and twice the frames, or of 16 px.
OUTER = LevelSpec(
  channels=(8,),
  num_blocks=(0,),
  attention_layers=(0,),
  frame_attention=(1,),
  num_groups=4,
  **SHARED,
)


class Encoder:
  width = TEXT_WIDTH


def clips(spec, frames, kind='divided'):
  """The same level for clips."""
  return dataclasses.replace(
    spec,
    frames=frames,
    frame_attention=(1,) * len(spec.channels),
    frame_attention_kind=kind,
    num_heads=1 if kind == 'joint' else spec.num_heads,
  )


def model_of(*levels, resolutions=None):
  resolutions = resolutions or (8,) * len(levels)
  return Matryoshka(
    NestedUNet(levels, TextSpec(10, 0, 1)), Encoder(), resolutions, True
  )


def noise(model, batch=B, seed=1):
  rng = np.random.default_rng(seed)
  return tuple(
    rng.standard_normal((batch, *shape)).astype(np.float32)
    for shape in model.level_shapes
  )


def run(model, params, x_t, t=TIMES, cond=COND, repeats=1):
  return jax.jit(model.denoise, static_argnums=4)(params, x_t, t, cond, repeats)


def rows(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


@pytest.mark.parametrize('attention', FRAME_ATTENTION)
@pytest.mark.parametrize('kind', LEVELS)
def test_an_image_model_becomes_one_of_clips_bit_for_bit(
  kind, attention, random_params
):
  level = clips(LEVELS[kind], 3, attention)
  images = model_of(dataclasses.replace(level, frames=1, frame_attention=()))
  of_clips = model_of(level)
  trained = random_params(images, 5)
  grown = grow(of_clips.init(3, 5), trained)
  assert len(jax.tree.leaves(grown)) > len(jax.tree.leaves(trained))
  (x_t,) = noise(of_clips)
  (found,) = run(of_clips, grown, (x_t,))
  # Each frame is denoised as an image.
  each = np.repeat(np.arange(B), 3)
  (expected,) = run(
    images,
    trained,
    (x_t.reshape(-1, 8, 8, 3),),
    TIMES[each],
    rows(COND, each),
  )
  np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize('frames, resolution', [(6, 8), (3, 16)])
def test_a_level_finer_in_time_leaves_the_coarser_as_it_was(
  frames, resolution, random_params
):
  inner = clips(LEVELS['unet'], 3)
  outer = dataclasses.replace(OUTER, frames=frames)
  if resolution == 16:
    outer = dataclasses.replace(
      outer,
      channels=(8, 8),
      num_blocks=(0, 0),
      attention_layers=(0, 0),
      frame_attention=(0, 1),
    )
  small = model_of(inner)
  large = model_of(inner, outer, resolutions=(8, resolution))
  assert large.level_shapes[1] == (frames, resolution, resolution, 3)
  trained = random_params(small, 5)
  grown = grow(large.init(3, 5), trained)
  x_t = noise(large)
  found = run(large, grown, x_t)
  (expected,) = run(small, trained, x_t[:1])
  np.testing.assert_array_equal(found[0], expected)
  # Once trained, each level sees the other: a frame of one, that of the other.
  params = random_params(large, 5)
  before = run(large, params, x_t)
  last = x_t[0].copy()
  last[:, -1] += 1
  after = run(large, params, (last, x_t[1]))
  assert np.abs(before[1] - after[1]).min(axis=(0, 2, 3, 4)).max() > 0
  changed = x_t[1].copy()
  changed[:, 0] += 1
  after = run(large, params, (x_t[0], changed))
  assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after))


@pytest.mark.parametrize('attention', FRAME_ATTENTION)
@pytest.mark.parametrize('kind', LEVELS)
def test_only_attention_between_frames_mixes_them(
  kind, attention, random_params
):
  alone = model_of(dataclasses.replace(LEVELS[kind], frames=3))
  mixing = model_of(clips(LEVELS[kind], 3, attention))
  for model, expected in ((alone, [0, 1, 0]), (mixing, [1, 1, 1])):
    params = random_params(model, 5)
    (x_t,) = noise(model)
    changed = x_t.copy()
    changed[:, 1] += 1
    (before,), (after,) = (run(model, params, (x,)) for x in (x_t, changed))
    seen = np.abs(before - after).max(axis=(0, 2, 3, 4)) > 0
    assert list(seen) == expected


@pytest.mark.parametrize('kind', FRAME_ATTENTION)
def test_trained_attention_stays_where_one_frame_is_left(kind, random_params):
  inner = clips(LEVELS['unet'], 2, kind)
  model = model_of(inner, dataclasses.replace(OUTER, frames=4))
  half = model.with_frames(2)
  assert [level.frames for level in half.unet.levels] == [1, 2]
  # It takes all that was trained.
  assert half.shapes(5) == model.shapes(5)
  params, x_t = random_params(model, 5), noise(half)
  assert x_t[0].shape == (B, 8, 8, 3)
  before = run(half, params, x_t)
  layer = params['unet']['level_0']['up_0']['frame_attention_0_0']
  layer['proj']['kernel'] = np.zeros_like(layer['proj']['kernel'])
  after = run(half, params, x_t)
  assert np.abs(before[0] - after[0]).max() > 1e-3


def test_a_clip_does_not_depend_on_the_others_of_its_batch(random_params):
  inner = clips(LEVELS['transformer'], 2)
  outer = dataclasses.replace(
    OUTER,
    frames=4,
    channels=(8, 8, 8),
    num_blocks=(0, 0, 0),
    attention_layers=(0, 0, 0),
    frame_attention=(1, 0, 0),
  )
  model = model_of(inner, outer, resolutions=(8, 16))
  params = random_params(model, 5)
  x_t = noise(model)
  both = run(model, params, x_t)
  for i in range(B):
    only = np.array([i])
    one = run(model, params, rows(x_t, only), TIMES[only], rows(COND, only))
    for level, of_both in zip(one, both):
      np.testing.assert_allclose(level, of_both[only], atol=2e-5)
  # In a mixed batch the finer level may see the first alone.
  mixed = run(model, params, (x_t[0], x_t[1][:1]))
  np.testing.assert_allclose(mixed[1], both[1][:1], atol=2e-5)
  np.testing.assert_allclose(mixed[0][:1], both[0][:1], atol=2e-5)


def test_text_is_encoded_once_for_all_frames_and_steps(random_params):
  model = model_of(clips(LEVELS['unet'], 3))
  params = random_params(model, 5)
  x_t = noise(model)
  prepared = jax.jit(model.prepare)(params, COND)
  for path, leaf in jax.tree_util.tree_leaves_with_path(prepared.context):
    assert len(leaf) == B, path
  away = COND._replace(text=np.zeros_like(COND.text))

  def guided(cond, away):
    return guidance.guided_denoise_fn(
      lambda x_t, t, cond: model.denoise(params, x_t, t, cond), cond, away, 3.0
    )(x_t, TIMES)

  found = jax.jit(guided)(prepared, jax.jit(model.prepare)(params, away))
  towards, back = run(model, params, x_t), run(model, params, x_t, cond=away)
  for level, a, b in zip(found, towards, back, strict=True):
    np.testing.assert_allclose(level, b + 3 * (a - b), atol=1e-4)


def test_attention_between_frames_in_float64():
  frames, heads, channels, size = 4, 2, 8, 4
  layer = attention.FrameAttention(frames, heads, jnp.float32)
  rng = np.random.default_rng(3)
  x = rng.standard_normal((2 * frames, 3, 5, channels)).astype(np.float32)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), Features(x))['params']
  params = jax.tree.map(
    lambda p: rng.standard_normal(p.shape).astype(np.float32), shapes
  )
  found = layer.apply({'params': params}, Features(x)).x

  def norm(name, x):
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x / rms * params[name]['scale'].astype(np.float64)

  def from_2_to_64th(count):
    return np.exp(np.linspace(np.log(2), np.log(1 / 64), count))

  turns = from_2_to_64th(size // 2)
  waves = np.outer(range(frames), from_2_to_64th(channels // 2))
  places = np.hstack([np.sin(waves), np.cos(waves)])
  expected = np.array(x, np.float64)
  for clip in range(2):
    for row in range(3):
      for column in range(5):
        at = slice(clip * frames, (clip + 1) * frames), row, column
        h = norm('norm', expected[at]) + places
        qkv = h @ params['qkv']['kernel']
        h = np.zeros((frames, channels))
        for head in range(heads):
          q, k, v = (
            qkv[:, i * channels + head * size :][:, :size] for i in range(3)
          )
          q, k = (
            np.stack(
              [turned(x, i * turns) for i, x in enumerate(norm(name, y))]
            )
            for name, y in (('q_norm', q), ('k_norm', k))
          )
          weights = np.exp(q @ k.T / np.sqrt(size))
          weights /= weights.sum(-1, keepdims=True)
          h[:, head * size : (head + 1) * size] = weights @ v
        expected[at] += h @ params['proj']['kernel']
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('others', (0, 2))
def test_joint_attention_in_float64(others):
  """Of 3 frames of 2 x 3 places, and maybe two tokens without a place."""
  frames, heads, channels, size, grid = 3, 2, 32, 16, (2, 3)
  layer = attention.FrameAttention(frames, heads, jnp.float32, True, grid)
  rng = np.random.default_rng(3)
  shape = (2 * frames, *grid) if not others else (2 * frames, 1, 6 + others)
  x = rng.standard_normal((*shape, channels)).astype(np.float32)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), Features(x))['params']
  params = jax.tree.map(
    lambda p: rng.standard_normal(p.shape).astype(np.float32) / 2, shapes
  )
  found = layer.apply({'params': params}, Features(x)).x

  def norm(name, x):
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x / rms * params[name]['scale'].astype(np.float64)

  def angles(frame, place):
    times = frame * np.exp(np.linspace(np.log(2), np.log(1 / 64), 4))
    row, column = divmod(place, 3) if place < 6 else (0.5, 1)
    turns = np.array([2, 1 / 3])
    return np.concatenate([times, (row - 0.5) * turns, (column - 1) * turns])

  def wave(frame):
    times = frame * np.exp(
      np.linspace(np.log(2), np.log(1 / 64), channels // 2)
    )
    return np.concatenate([np.sin(times), np.cos(times)])

  tokens = np.array(x, np.float64).reshape(2, frames, -1, channels)
  for clip in range(2):
    at = [(t, p) for t in range(frames) for p in range(tokens.shape[2])]
    h = np.stack([norm('norm', tokens[clip, t, p]) + wave(t) for t, p in at])
    qkv, h = h @ params['qkv']['kernel'], np.zeros((len(at), channels))
    for head in range(heads):
      part = slice(head * size, (head + 1) * size)
      q, k, v = (each[:, part] for each in np.split(qkv, 3, axis=1))
      q, k = (
        np.stack(
          [turned(y, angles(*where)) for y, where in zip(norm(name, z), at)]
        )
        for name, z in (('q_norm', q), ('k_norm', k))
      )
      weights = np.exp(q @ k.T / np.sqrt(size))
      h[:, part] = weights / weights.sum(-1, keepdims=True) @ v
    added = (h @ params['proj']['kernel']).reshape(tokens[clip].shape)
    tokens[clip] += added
  np.testing.assert_allclose(
    found, tokens.reshape(found.shape), rtol=2e-5, atol=2e-5
  )


def turned(x, angles):
  """Pairs (i, i + D/2) as complex numbers."""
  half = len(angles)
  z = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
  return np.concatenate([z.real, z.imag])


def test_a_pyramid_takes_every_nth_frame_and_averages_pixels():
  clips = RNG.standard_normal((4, 6, 8, 8, 3)).astype(np.float32)
  shapes = [(4, 4, 3), (2, 4, 4, 3), (2, 8, 8, 3), (6, 8, 8, 3)]
  levels = pyramid.make_pyramid(clips, shapes, (1, 1, 1, 0.5))
  np.testing.assert_array_equal(levels[3], clips[:2])
  np.testing.assert_array_equal(levels[2], clips[:, [0, 3]])
  pooled = clips.reshape(4, 6, 4, 2, 4, 2, 3).mean((3, 5))
  np.testing.assert_allclose(levels[1], pooled[:, [0, 3]], atol=1e-6)
  np.testing.assert_allclose(levels[0], pooled[:, 0], atol=1e-6)
  with pytest.raises(ValueError, match='4 and 6 frames'):
    pyramid.make_pyramid(clips, [(4, 8, 8, 3), (6, 8, 8, 3)], (1, 1))
  with pytest.raises(
    ValueError, match='6x8x8: crop them to 3x8x8, as of level 0'
  ):
    pyramid.make_pyramid(clips, [(3, 8, 8, 3)], (1,))


@pytest.mark.parametrize(
  'changes, problem',
  [
    ({'frames': 0}, 'frames=0'),
    ({'frame_attention': (1, 1)}, 'give one entry for each of the channels'),
    ({'num_heads': 8, 'frame_attention': (1,)}, 'heads of an even size'),
    (
      {'frame_attention': (1,), 'frame_attention_kind': 'joint'},
      'joint frame_attention, into heads of a multiple of 8 channels',
    ),
    ({'frame_attention_kind': 'all'}, "frame_attention_kind='all': use one of"),
  ],
)
def test_invalid_settings_are_refused(changes, problem):
  with pytest.raises(ValueError, match=problem):
    dataclasses.replace(LEVELS['unet'], **changes)


def test_frames_must_divide_those_of_the_next_level():
  levels = clips(LEVELS['unet'], 3), dataclasses.replace(OUTER, frames=4)
  with pytest.raises(ValueError, match='3 frames is inside of one of 4'):
    model_of(*levels).shapes(5)
