import jax
import numpy as np
import pytest

from mdm_jax.diffusion import guidance


def _network(calls):
  def denoise(x_t, t, cond):
    calls.append(len(t))
    offset = cond['text'][:, None, None, None] + t[:, None, None, None]
    return tuple(x * (level + 1) + offset for level, x in enumerate(x_t))

  return denoise


def _inputs():
  rng = np.random.default_rng(5)
  x_t = tuple(
    rng.normal(size=(2, side, side, 3)).astype(np.float32) for side in (2, 4)
  )
  t = np.array([3, 7])
  cond = {'text': np.array([1.0, 2], np.float32), 'scale': None}
  uncond = {'text': np.array([-1.0, 5], np.float32), 'scale': None}
  return x_t, t, cond, uncond


@pytest.mark.parametrize('w', [7.5, 0.0, np.float32(1.0)])
def test_one_forward_gives_both_halves(w):
  x_t, t, cond, uncond = _inputs()
  calls = []
  got = guidance.guided_denoise_fn(_network(calls), cond, uncond, w)(x_t, t)
  assert calls == [4]
  denoise = _network([])
  for level, (with_text, without) in enumerate(
    zip(denoise(x_t, t, cond), denoise(x_t, t, uncond), strict=True)
  ):
    expected = without + w * (with_text - without)
    np.testing.assert_allclose(got[level], expected, rtol=1e-6, atol=1e-5)


def test_a_weight_of_one_is_one_plain_forward():
  x_t, t, cond, _ = _inputs()
  calls = []
  got = guidance.guided_denoise_fn(_network(calls), cond, None, 1.0)(x_t, t)
  assert calls == [2]
  expected = _network([])(x_t, t, cond)
  for level, plain in zip(got, expected, strict=True):
    np.testing.assert_array_equal(level, plain)


def test_a_traced_weight_is_compiled_once():
  x_t, t, cond, uncond = _inputs()
  calls = []

  @jax.jit
  def guided(w):
    return guidance.guided_denoise_fn(_network(calls), cond, uncond, w)(x_t, t)

  plain = guided(1.0)
  strong = guided(3.0)
  assert calls == [4]
  np.testing.assert_allclose(
    strong[0] - plain[0],
    np.broadcast_to([[[[4.0]]], [[[-6.0]]]], plain[0].shape),
    atol=1e-5,
  )


@pytest.mark.parametrize('rescale', [0.7, 1.0])
def test_rescaled_to_the_contrast_of_the_conditional(rescale):
  x_t, t, cond, uncond = _inputs()

  def network(x_t, t, cond):
    scale = cond['text'][:, None, None, None]
    return tuple(scale * x for x in x_t)

  plain, rescaled = (
    guidance.guided_denoise_fn(network, cond, uncond, 4.0, amount)(x_t, t)
    for amount in (0.0, rescale)
  )
  for level, expected, x in zip(rescaled, plain, x_t, strict=True):
    for i in range(2):
      wanted = np.std(cond['text'][i] * x[i])
      ratio = rescale * wanted / np.std(expected[i]) + 1 - rescale
      np.testing.assert_allclose(level[i], ratio * expected[i], rtol=1e-4)


def test_a_constant_output_is_not_rescaled():
  """As that of a fresh network, which is zero."""
  x_t, t, cond, uncond = _inputs()

  def network(x_t, t, cond):
    return tuple(0 * x + 2.0 for x in x_t)

  denoise = guidance.guided_denoise_fn(network, cond, uncond, 4.0, 0.7)
  for level in denoise(x_t, t):
    np.testing.assert_array_equal(level, 2.0)


def test_guided_only_within_the_interval():
  x_t, _, cond, uncond = _inputs()
  calls = []
  guided = guidance.guided_denoise_fn(
    _network([]), cond, uncond, 3.0, interval=(4, 7)
  )
  always = guidance.guided_denoise_fn(_network([]), cond, uncond, 3.0)
  for step in (3, 4, 7, 8):
    t = np.array([step, step]) - 1  # What the network is given.
    got = guided(x_t, t)
    is_guided = 4 <= step <= 7
    expected = always(x_t, t) if is_guided else _network(calls)(x_t, t, cond)
    for level, wanted in zip(got, expected, strict=True):
      np.testing.assert_allclose(level, wanted, rtol=1e-6, atol=1e-5)
  assert calls == [2, 2]


def test_autoguidance_leads_away_from_the_guide():
  x_t, t, cond, uncond = _inputs()
  network = _network([])
  good, bad = (
    lambda x_t, t, cond=c: network(x_t, t, cond) for c in (cond, uncond)
  )
  got = guidance.autoguided_denoise_fn(good, bad, 2.5)(x_t, t)
  for level, better, worse in zip(got, good(x_t, t), bad(x_t, t), strict=True):
    expected = worse + 2.5 * (better - worse)
    np.testing.assert_allclose(level, expected, rtol=1e-5)
  assert guidance.autoguided_denoise_fn(good, bad, 1.0) is good
  within = guidance.autoguided_denoise_fn(good, bad, 2.5, interval=(4, 7))
  t = np.array([3, 3]) - 1
  for level, expected in zip(within(x_t, t), good(x_t, t), strict=True):
    np.testing.assert_allclose(level, expected, rtol=1e-6)
