"""The optimizer and the EMA against arithmetic in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.optim import ema, optimizer

ADAMW = {
  'name': 'adamw',
  'b1': 0.9,
  'b2': 0.99,
  'epsilon': 1e-8,
  'mu_dtype': 'float32',
  'weight_decay': 0.1,
  'clip_norm': 2.0,
  'adam_scale': 0.15,
}


@pytest.mark.parametrize(
  'decay, expected',
  [
    ('constant', {0: 0.05, 1: 0.1, 2: 0.15, 3: 0.2, 4: 0.2, 12: 0.2}),
    # Halfway between the end of the warm-up and the last step: half the peak.
    (
      'cosine',
      {
        0: 0.05,
        3: 0.2,
        4: 0.2,
        6: 0.1 + 0.05 * 2**0.5,
        8: 0.1,
        12: 0.0,
        99: 0.0,
      },
    ),
  ],
)
def test_learning_rate(decay, expected):
  schedule = optimizer.learning_rate_schedule(
    0.2, warmup_steps=4, decay=decay, num_steps=12
  )
  for step, rate in expected.items():
    assert float(schedule(step)) == pytest.approx(rate, abs=1e-7), step


@pytest.mark.parametrize('decay', ['constant', 'cosine'])
def test_learning_rate_without_warmup(decay):
  schedule = optimizer.learning_rate_schedule(
    0.2, warmup_steps=0, decay=decay, num_steps=10
  )
  assert float(schedule(0)) == pytest.approx(0.2)


def test_unknown_decay():
  with pytest.raises(ValueError, match="decay 'linear': use constant or cos"):
    optimizer.learning_rate_schedule(
      0.2, warmup_steps=4, decay='linear', num_steps=12
    )


def test_ema():
  rng = np.random.default_rng(0)
  history = rng.standard_normal((30, 5))
  found = {'a': jnp.zeros(5)}
  for step, params in enumerate(history):
    found = ema.update(found, {'a': jnp.float32(params)}, jnp.int32(step), 0.6)
  # Weight of a step's parameters: 1 - its decay, times all later decays.
  decays = np.minimum(0.6, (1 + np.arange(30)) / (10 + np.arange(30)))
  weights = [
    (1 - decay) * np.prod(decays[i + 1 :]) for i, decay in enumerate(decays)
  ]
  assert decays[0] == 0.1 and decays[12] < 0.6 and decays[13] == 0.6
  np.testing.assert_allclose(found['a'], weights @ history, atol=1e-6)


@pytest.mark.parametrize('mu_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('size', [0.1, 100.0])
def test_clip_and_adamw(size, mu_dtype):
  rng = np.random.default_rng(0)
  params = {'a': rng.standard_normal((4, 3)), 'b': rng.standard_normal(5)}
  adamw = optimizer.make_optimizer(
    lambda step: 0.01 * (step + 1), **ADAMW | {'mu_dtype': mu_dtype}
  )
  state = adamw.init({k: jnp.float32(v) for k, v in params.items()})
  m = v = 0
  for step in range(2):
    grads = {k: size * rng.standard_normal(x.shape) for k, x in params.items()}
    updates, state = adamw.update(
      {k: jnp.float32(x) for k, x in grads.items()},
      state,
      {k: jnp.float32(x) for k, x in params.items()},
    )

    def flat(tree):
      return np.concatenate([np.ravel(tree[k]) for k in sorted(tree)])

    g = flat(grads)
    norm = np.linalg.norm(g)
    assert (norm > 2) == (size == 100.0)
    g *= min(1, 2 / norm)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    adam = (
      m
      / (1 - 0.9 ** (step + 1))
      / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
    )
    expected = -0.01 * (step + 1) * (adam + 0.1 * flat(params))
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-4, atol=1e-7)
    m = m.astype(mu_dtype).astype(float)


def test_muon():
  rng = np.random.default_rng(0)
  shapes = {
    'conv_in': {'kernel': (3, 3, 3, 8)},
    'norm_out': {'scale': (8,)},
    'down_0': {'block_0': {'conv_in': {'kernel': (3, 3, 2, 8), 'bias': (8,)}}},
  }
  grads = {
    'unet': {
      'level_0': jax.tree.map(
        lambda shape: jnp.float32(rng.standard_normal(shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
      )
    }
  }
  muon = optimizer.make_optimizer(
    lambda step: 0.02, **{**ADAMW, 'name': 'muon', 'weight_decay': 0.0}
  )
  params = jax.tree.map(jnp.zeros_like, grads)
  updates, _ = muon.update(grads, muon.init(params), params)
  level = updates['unet']['level_0']
  block = level['down_0']['block_0']['conv_in']
  # Hidden kernels: all singular values of the update are about equal.
  singular = np.linalg.svd(block['kernel'].reshape(18, 8), compute_uv=False)
  assert singular.shape == (8,)
  assert 0.02 * 0.6 < singular.min() < singular.max() < 0.02 * 1.3
  # Other parameters: Adam's first step, the sign of the gradient, at Adam's own
  # learning rate. Optax gives it Nesterov momentum, as Muon has it.
  rate = 0.02 * 0.15 * (0.9 * 0.1 / (1 - 0.9**2) + 1)
  for path in (
    ('conv_in', 'kernel'),
    ('norm_out', 'scale'),
    ('down_0', 'block_0', 'conv_in', 'bias'),
  ):
    update, gradient = level, grads['unet']['level_0']
    for key in path:
      update, gradient = update[key], gradient[key]
    np.testing.assert_allclose(update, -rate * np.sign(gradient), rtol=1e-3)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_only_first_moments_are_bfloat16(name):
  params = {
    'unet': {
      'level_0': {
        'conv_in': {'kernel': jnp.ones((3, 3, 3, 8))},
        'norm_out': {'scale': jnp.ones(8)},
        'down_0': {'block_0': {'conv_in': {'kernel': jnp.ones((3, 3, 8, 8))}}},
      }
    }
  }
  update = optimizer.make_optimizer(
    lambda step: 0.1, **ADAMW | {'name': name, 'mu_dtype': 'bfloat16'}
  )
  state = update.init(params)
  _, after = update.update(params, state, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(after):
    key = jax.tree_util.keystr(path)
    if leaf.ndim:
      assert leaf.dtype == (jnp.bfloat16 if '.mu' in key else jnp.float32), key
  # A step may not change a type: its branch that skips returns the old state.
  assert all(
    jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype, state, after))
  )


def test_unknown_optimizer():
  with pytest.raises(ValueError, match="optimizer 'sgd': use adamw or muon"):
    optimizer.make_optimizer(lambda step: 0.1, **{**ADAMW, 'name': 'sgd'})
