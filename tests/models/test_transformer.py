"""A transformer level against plain NumPy in float64, and its variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.models.conditioning import Cond, TextSpec
from mdm_jax.models.nested_unet import NestedUNet
from mdm_jax.models.unet import LevelSpec

# 8 px in patches of 2: 4 x 4 tokens of two heads of 8 channels.
SPEC = LevelSpec(
  kind='transformer',
  channels=(16,),
  num_blocks=(2,),
  attention_layers=(0,),
  temporal_dim=24,
  scale_condition=8,
  num_heads=2,
  patch_size=2,
  position_waves=1,
)
RNG = np.random.default_rng(0)
X_T = RNG.standard_normal((3, 8, 8, 3)).astype(np.float32)
T = np.array([3.0, 500.0, 999.0], np.float32)
TEXT = RNG.standard_normal((3, 5, 12)).astype(np.float32)
MASK = np.arange(5) < np.array([[5], [2], [1]])
SCALE = np.array([4.0, 8.0, 20.0], np.float32)


def network(spec=SPEC, masked=True, dtype=jnp.float32):
  return NestedUNet((spec,), TextSpec(10, 0, 1, masked), dtype)


@pytest.fixture(scope='module')
def params():
  """Parameters of which none is zero."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(
    network().init, jax.random.key(0), (X_T,), T, Cond(TEXT, MASK)
  )['params']
  return jax.tree.map(
    lambda x: (
      (0.4 * rng.standard_normal(x.shape)).astype(np.float32) + (x.ndim == 1)
    ),
    shapes,
  )


def dense(module, x):
  return x @ module['kernel'] + module.get('bias', 0)


def silu(x):
  return x / (1 + np.exp(-x))


def norm(module, x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * module['scale']


def waves(value):
  angles = value * 10000.0 ** (-np.arange(3) / 3)
  return np.concatenate([np.sin(angles), np.cos(angles)])


def turned(x, row, column):
  """Turns the pairs (i, i + 4) of a head, two by row and two by column."""
  out = x.copy()
  for i, angle in enumerate([2 * row, row / 4, 2 * column, column / 4]):
    a, b = x[i], x[i + 4]
    out[i] = a * np.cos(angle) - b * np.sin(angle)
    out[i + 4] = a * np.sin(angle) + b * np.cos(angle)
  return out


def in_numpy(params, x, t, text, mask, scale):
  """The network in float64, example by example and token by token."""
  params = jax.tree.map(np.float64, params)
  level, width, heads, dim = params['level_0'], 16, 2, 8

  def attention(block, x, words):
    query, key, value = np.split(
      dense(block['qkv'], norm(block['norm'], x)), 3, 1
    )
    text = dense(block['text_kv'], norm(block['norm_text'], words))
    out = np.zeros_like(x)
    for head in range(heads):
      own = slice(head * dim, (head + 1) * dim)
      q, k = (
        norm(block[n], x[:, own])
        for n, x in (('q_norm', query), ('k_norm', key))
      )
      for i in range(16):
        place = i // 4 - 1.5, i % 4 - 1.5
        q[i], k[i] = turned(q[i], *place), turned(k[i], *place)
      text_k = norm(block['text_k_norm'], text[:, own])
      text_v = text[:, width + head * dim : width + (head + 1) * dim]
      logits = q @ np.concatenate([k, text_k]).T / np.sqrt(dim)
      weights = np.exp(logits)
      weights /= weights.sum(1, keepdims=True)
      out[:, own] = weights @ np.concatenate([value[:, own], text_v])
    return dense(block['proj'], out)

  def predict(x, t, text, mask, scale):
    words = dense(params['text']['lm_proj'], text)[mask]
    pooled = dense(params['text']['cond_emb'], words.mean(0))
    time = dense(level['time_out'], silu(dense(level['time_in'], waves(t))))
    tokens = [
      dense(level['time_token'], silu(time + pooled)),
      dense(
        level['scale_token'],
        silu(dense(level['scale_in'], waves(min(scale, 8)))),
      ),
    ]
    patches = []
    for i in range(16):
      row, column = divmod(i, 4)
      patch = x[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()
      angles = np.pi * (np.array([row, column]) + 0.5) / 4
      position = np.concatenate([np.sin(angles), np.cos(angles)])
      patches.append(
        dense(level['conv_in'], patch)
        + dense(level['position'], position)
        + tokens[0]
      )
    h = np.array(patches + tokens)
    for i in range(2):
      block = level['middle'][f'block_{i}']
      h = h + attention(block, h, words)
      gate, up = np.split(
        dense(block['ffn_in'], norm(block['ffn_norm'], h)), 2, axis=1
      )
      h = h + dense(block['ffn_out'], silu(gate) * up)
    out = np.zeros((8, 8, 3))
    for i, patch in enumerate(
      dense(level['conv_out'], norm(level['norm_out'], h[:16]))
    ):
      row, column = divmod(i, 4)
      out[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.reshape(
        2, 2, 3
      )
    return out

  return np.stack([predict(*each) for each in zip(x, t, text, mask, scale)])


@pytest.fixture(scope='module')
def expected(params):
  return in_numpy(params, X_T, T, TEXT, MASK, SCALE)


@pytest.fixture(scope='module')
def apply(params):
  """(spec, dtype=float32) -> program, loss, prediction and gradients."""
  rng = np.random.default_rng(2)
  target = rng.standard_normal(X_T.shape).astype(np.float32)

  def run(spec, dtype=jnp.float32):
    def loss(params):
      (out,) = network(spec, dtype=dtype).apply(
        {'params': params}, (X_T,), T, Cond(TEXT, MASK, SCALE)
      )
      return ((out - target) ** 2).mean(), out

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params)
    (value, out), grads = program.compile()(params)
    return program.as_text(), value, out, grads

  return run


@pytest.fixture(scope='module')
def plain(apply):
  return apply(SPEC)


def test_equals_numpy(plain, expected):
  assert expected.std() > 0.5
  np.testing.assert_allclose(plain[2], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('remat', ['block', 'level'])
def test_rematerialisation_changes_no_numbers(apply, plain, remat):
  text, value, _, grads = apply(dataclasses.replace(SPEC, remat=remat))
  np.testing.assert_allclose(value, plain[1], rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=4e-5 * (1 + np.abs(y).max())
    ),
    grads,
    plain[3],
  )
  assert 'optimization_barrier' in text
  assert 'optimization_barrier' not in plain[0]


def test_half_precision_is_close(apply, expected):
  text, _, out, grads = apply(SPEC, jnp.bfloat16)
  error = np.abs(np.asarray(out) - expected)
  assert 1e-4 < error.mean() < 0.05 * np.abs(expected).mean()
  assert out.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  # All matrix products but those of what is given as float32.
  assert 'bf16' in text


def test_every_parameter_learns(plain):
  for path, grad in jax.tree_util.tree_leaves_with_path(plain[3]):
    assert np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


def test_cached_text_changes_nothing(params, expected):
  model = network()

  @jax.jit
  def predict(params, x, t, text, mask, scale):
    cond = Cond(text, mask, scale)
    _, variables = model.apply(
      {'params': params}, (0 * x,), 0 * t, cond, mutable='context'
    )
    # The words are not read any more.
    (out,) = model.apply(
      {'params': params, **variables},
      (x,),
      t,
      cond._replace(text=jnp.full_like(text, jnp.nan)),
    )
    return out

  out = predict(params, X_T, T, TEXT, MASK, SCALE)
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'kind': 'mamba'}, "kind='mamba': use one of"),
    ({'channels': (16, 16), 'num_blocks': (1, 1)}, 'one entry a resolution'),
    (
      {
        'channels': (16, 16),
        'num_blocks': (1, 1),
        'attention_layers': (0, 0),
      },
      'give one width and one depth',
    ),
    ({'num_blocks': (0,)}, 'give one width and one depth'),
    ({'attention_layers': (1,)}, r'attention_layers=\(1,\): that is of UNets'),
    ({'attention_ffn': False}, 'attention_ffn=False: that is of UNets'),
    ({'num_groups': 8}, 'num_groups=8: that is of UNets; leave it at 32'),
    ({'lanes': 128}, 'lanes=128: that is of UNets; leave it at 1'),
    ({'num_heads': 3}, 'num_heads=3 does not divide the width 16'),
    # Heads of 2 channels have no pair of dimensions for each axis.
    ({'num_heads': 8}, 'num_heads=8 .* heads of a multiple of 4'),
  ],
)
def test_invalid_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SPEC, **changes)


def test_only_the_innermost_level_can_be_one():
  model = NestedUNet((SPEC, SPEC), TextSpec(10, 0, 1))
  with pytest.raises(ValueError, match='Only the coarsest level'):
    jax.eval_shape(
      model.init, jax.random.key(0), (X_T, X_T), T, Cond(TEXT, MASK)
    )
