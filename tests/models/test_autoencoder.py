"""The autoencoder: its shapes, its loss, that it learns, on any mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from mdm_jax.diffusion import pyramid
from mdm_jax.models.autoencoder import Autoencoder, AutoencoderSpec
from mdm_jax.optim import optimizer
from mdm_jax.optim.skip_step import SkipRule
from mdm_jax.runtime import sharding
from mdm_jax.steps import autoencoder
from mdm_jax.steps.train import make_step, new_state
from tests import meshes

BATCH = 16
# Two resolutions, to which the code of 4 x 4 x 2 belongs.
SPEC = AutoencoderSpec(
  resolution=16,
  channels=(8, 16),
  num_blocks=(1, 0),
  latent_channels=2,
  patch_size=2,
  num_groups=4,
)
PLAIN = Autoencoder(SPEC, jnp.float32)
KL = Autoencoder(
  dataclasses.replace(SPEC, kind='kl', kl_weight=0.5), jnp.float32
)
RULES = common.get_config().sharding_rules


@pytest.fixture(scope='module')
def batch():
  """Gradients between two colours, from left to right or from top to bottom."""
  rng = np.random.default_rng(0)
  first, second = rng.integers(0, 256, (2, BATCH, 1, 1, 3))
  weights = np.linspace(0, 1, 16)[None, :, None, None]
  images = (first + (second - first) * weights).repeat(16, 2)
  images[::2] = images[::2].swapaxes(1, 2)
  flags = {name: np.zeros(BATCH, bool) for name in ('bad', 'stop', 'save')}
  return {'image': images.astype(np.uint8), **flags}


@functools.cache
def random_params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), model.init(0)
  )


def images_of(batch):
  return pyramid.to_float(batch['image'])


def noise():
  return autoencoder.code_noise(KL, BATCH, jax.random.key(1))


def test_shapes():
  assert SPEC.downsampling == 4
  assert SPEC.code_shape == (4, 4, 2)
  params = PLAIN.init(0)['autoencoder']
  assert params['encoder']['to_code']['kernel'].shape == (3, 3, 16, 2)
  assert params['decoder']['conv_out']['kernel'].shape == (3, 3, 8, 12)
  assert np.abs(params['encoder']['to_code']['kernel']).max() > 0.1
  for name in ('code_mean', 'code_log_std'):
    np.testing.assert_array_equal(params[name], np.zeros(2))
  kl = KL.init(0)['autoencoder']
  assert kl['encoder']['to_code']['kernel'].shape == (3, 3, 16, 4)
  # Blocks are not modulated.
  assert set(params['encoder']['down_0']['block_0']) == {
    *('norm_in', 'conv_in', 'norm_out', 'conv_out')
  }


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'kind': 'vq'}, "kind='vq': use one of"),
    ({'num_blocks': (1,)}, r'one entry a resolution: got \(8, 16\) and \(1,\)'),
    ({'channels': (8, 10)}, 'num_groups=4 does not divide the 10 channels'),
    (
      {'resolution': 18},
      'resolution=18 .* 2 px .* 1 times: use a multiple of 4',
    ),
  ],
)
def test_settings_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize('model', [PLAIN, KL])
def test_statistics_standardise_the_codes(batch, model):
  images, params = images_of(batch), random_params(model)
  code = model.encode(params, images)
  assert code.shape == (BATCH, 4, 4, 2)
  assert code.dtype == jnp.float32
  raw, log_variance = model.moments(params, images)
  assert (log_variance is None) == (model is PLAIN)
  mean, log_std = model.statistics(params)
  assert np.abs(mean).min() > 0.1 and np.abs(log_std).min() > 0.1
  np.testing.assert_allclose(code, (raw - mean) / np.exp(log_std), rtol=1e-4)
  decoded = model.decode(params, code)
  assert decoded.shape == images.shape
  np.testing.assert_allclose(decoded, model.decode_raw(params, raw), atol=1e-4)


def test_psnr():
  rng = np.random.default_rng(0)
  first, second = rng.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
  second[2] = first[2]
  error = np.mean((first.astype(float) - second) ** 2, axis=(1, 2, 3))[:2]
  found = autoencoder.psnr(pyramid.to_float(first), pyramid.to_float(second))
  expected = 10 * np.log10(255**2 / error)
  np.testing.assert_allclose(found, [*expected, 100], rtol=1e-5)
  # What 8 bits do not hold does not count.
  white = jnp.ones((1, 8, 8, 3))
  assert autoencoder.psnr(white, 3 * white) == 100


def test_loss(batch):
  images = images_of(batch)

  def errors(model, params, code):
    decoded = model.decode_raw(params, code)
    return np.sqrt(np.mean((decoded - images) ** 2, axis=(1, 2, 3)) + 1e-5)

  params = random_params(PLAIN)
  loss, metrics = autoencoder.batch_loss(PLAIN, params, images, noise())
  raw, _ = PLAIN.moments(params, images)
  np.testing.assert_allclose(loss, errors(PLAIN, params, raw).mean(), rtol=1e-5)
  assert metrics.keys() == {'psnr', 'code_nll'}
  mean, log_std = map(np.asarray, PLAIN.statistics(params))
  z = (raw - mean) / np.exp(log_std)
  nll = (z**2 / 2 + log_std + 0.5 * math.log(2 * math.pi)).mean()
  np.testing.assert_allclose(metrics['code_nll'], nll, rtol=1e-4)

  params = random_params(KL)
  loss, metrics = autoencoder.batch_loss(KL, params, images, noise())
  mean, log_variance = KL.moments(params, images)
  assert np.std(log_variance) > 0.01
  code = mean + np.exp(log_variance / 2) * noise()
  pixels = errors(KL, params, code).mean()
  # Of two normal distributions, and of their standard deviations.
  std = np.exp(log_variance / 2)
  kl = (-np.log(std) + (std**2 + mean**2 - 1) / 2).mean()
  np.testing.assert_allclose(metrics['pixel_loss'], pixels, rtol=1e-5)
  np.testing.assert_allclose(metrics['kl'], kl, rtol=1e-4)
  np.testing.assert_allclose(loss, pixels + 0.5 * kl, rtol=1e-5)


def test_the_likelihood_of_codes_changes_their_statistics_alone(
  batch, monkeypatch
):
  images, params = images_of(batch), random_params(PLAIN)

  def gradients(weight):
    monkeypatch.setattr(autoencoder, '_FIT_WEIGHT', weight)
    # A function of its own: the weight is read while it is traced.
    loss = functools.partial(autoencoder.batch_loss, PLAIN)
    grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params, images, noise())
    return grads['autoencoder']

  without, with_it = gradients(0.0), gradients(1.0)
  for name in ('encoder', 'decoder'):
    jax.tree.map(np.testing.assert_array_equal, without[name], with_it[name])
  for name in ('code_mean', 'code_log_std'):
    np.testing.assert_array_equal(without[name], np.zeros(2))
    assert np.abs(with_it[name]).min() > 1e-3


def train(model, batch, sizes, accumulate, num_steps, learning_rate):
  """Steps on a mesh -> metrics of each, and the state at the end."""
  update = optimizer.make_optimizer(
    optimizer.learning_rate_schedule(
      learning_rate, warmup_steps=0, decay='cosine', num_steps=num_steps
    ),
    name='adamw',
    b1=0.9,
    b2=0.99,
    epsilon=1e-8,
    mu_dtype='float32',
    weight_decay=0.0,
    clip_norm=1.0,
    adam_scale=1.0,
  )
  mesh = meshes.make_mesh(*sizes)
  step = make_step(
    autoencoder.make_gradients(model, accumulate),
    update,
    skip_rule=SkipRule(spike_factor=10.0, window=100, max_skipped=9),
    ema_decay=0.9,
    seed=3,
    mesh=mesh,
  )
  shapes = jax.eval_shape(lambda p: new_state(p, update), model.shapes())
  shardings = sharding.tree_shardings(shapes, mesh, RULES)
  state = jax.jit(lambda p: new_state(p, update), out_shardings=shardings)(
    sharding.place(random_params(model), shardings.params)
  )
  batch, values = sharding.shard_batch(batch, mesh), []
  step = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, batch), None),
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  for _ in range(num_steps):
    state, metrics = step(state, batch, {})
    values.append(jax.device_get(metrics))
  return values, jax.device_get(state)


@pytest.fixture(scope='module')
def one_device(batch):
  """Metrics of four steps on one device."""
  return train(KL, batch, (1, 1, 1), 1, 4, 1e-2)[0]


@pytest.mark.parametrize(
  'sizes, accumulate', [((2, 2, 2), 1), ((1, 1, 1), 4), ((2, 2, 2), 2)]
)
def test_equals_one_device_and_the_whole_batch(
  batch, one_device, sizes, accumulate
):
  found, _ = train(KL, batch, sizes, accumulate, 4, 1e-2)
  losses = [each['loss'] for each in one_device]
  assert np.ptp(losses) > 1e-2
  for each, other in zip(found, one_device):
    assert each.keys() == other.keys() >= {'loss', 'psnr', 'kl', 'code_nll'}
    for name in ('loss', 'psnr', 'pixel_loss', 'kl', 'code_nll'):
      np.testing.assert_allclose(each[name], other[name], rtol=1e-4)
    for name in ('grad_norm', 'update_norm', 'param_norm'):
      np.testing.assert_allclose(each[name], other[name], rtol=1e-3)


def test_it_learns_and_its_codes_are_standard(batch):
  values, state = train(PLAIN, batch, (1, 1, 1), 1, 300, 2e-2)
  assert values[0]['psnr'] < 12
  images = images_of(batch)
  code = np.asarray(PLAIN.encode(state.ema, images))
  decoded = PLAIN.decode(state.ema, code)
  assert autoencoder.psnr(images, decoded).mean() > 26
  raw, _ = PLAIN.moments(state.ema, images)
  assert np.abs(np.mean(raw, (0, 1, 2))).max() > 0.2
  np.testing.assert_allclose(code.mean((0, 1, 2)), np.zeros(2), atol=0.1)
  np.testing.assert_allclose(code.std((0, 1, 2)), np.ones(2), atol=0.1)

  sums, counts, squares = autoencoder.make_validation_step(PLAIN)(
    state.ema, batch, 0
  )
  each = autoencoder.psnr(images, decoded)
  assert sums.shape == counts.shape == squares.shape == (1, 1)
  assert counts == BATCH
  np.testing.assert_allclose(sums[0, 0], each.sum(), rtol=1e-5)
  np.testing.assert_allclose(squares[0, 0], (each**2).sum(), rtol=1e-5)
