"""CLIP against the outputs of PyTorch's CLIPModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.eval import clip

# Units of 4 px: a wide, a high and a small image for the network's 24 px.
SIZES = ((9, 13), (16, 11), (3, 3))


@pytest.fixture(scope='module')
def images(clip_directory):
  rng = np.random.default_rng(0)
  noise = [
    rng.integers(0, 256, (*size, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for size in SIZES
  ]
  return np.stack(
    [clip.resize(image, clip_directory.spec.image_size) for image in noise]
  )


@pytest.fixture(scope='module')
def encode(clip_directory):
  model = clip.Clip(clip_directory.spec)

  def call(method, *arguments):
    return np.asarray(
      jax.jit(
        lambda params, *rest: model.apply(
          {'params': params}, *rest, method=method
        )
      )(clip_directory.params, *arguments)
    )

  return call


def test_pixels_equal_pytorch(clip_directory, images):
  pixels = (images[:, ::5, ::5] / 255 - clip._MEAN) / clip._STD
  np.testing.assert_allclose(pixels, clip_directory.pixels, rtol=0, atol=1e-6)


def test_images_equal_pytorch(clip_directory, images, encode):
  found = encode('encode_images', images)
  np.testing.assert_allclose(found, clip_directory.images, rtol=0, atol=1e-5)


def test_text_equals_pytorch(clip_directory, encode):
  found = encode(
    'encode_text', clip_directory.tokens, clip_directory.tokenizer.end
  )
  np.testing.assert_allclose(found, clip_directory.text, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  'width, heads, ffn, layers, patch, text, count',
  [
    (768, 12, 3072, 12, 16, (512, 8, 2048), 149_620_736),  # ViT-B/16
    (1024, 16, 4096, 24, 14, (768, 12, 3072), 427_616_512),  # ViT-L/14
  ],
)
def test_reads_the_published_sizes(
  width, heads, ffn, layers, patch, text, count
):
  spec = clip.ClipSpec.from_hugging_face(
    {
      'model_type': 'clip',
      'projection_dim': text[0],
      'text_config': {
        'hidden_size': text[0],
        'num_attention_heads': text[1],
        'intermediate_size': text[2],
      },
      'vision_config': {
        'hidden_size': width,
        'num_attention_heads': heads,
        'intermediate_size': ffn,
        'num_hidden_layers': layers,
        'patch_size': patch,
      },
    }
  )
  shapes = jax.eval_shape(
    clip.Clip(spec).init,
    jax.random.key(0),
    jnp.zeros((1, 224, 224, 3), jnp.uint8),
    jnp.zeros((1, 77), jnp.int32),
  )
  # Without the temperature, which the score does not use.
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
  'change, message',
  [
    ({'model_type': 'siglip'}, "model_type is 'siglip': give a CLIP"),
    ({'text_config': {'hidden_act': 'relu'}}, "hidden_act is 'relu'"),
  ],
)
def test_other_models_are_refused(clip_directory, change, message):
  with pytest.raises(ValueError, match=message):
    clip.ClipSpec.from_hugging_face(clip_directory.config | change)


def test_scores():
  images = np.array([[3.0, 0], [0, 2], [1, 1]])
  text = np.array([[5.0, 0], [0, -1], [1, 0]])
  np.testing.assert_allclose(
    clip.scores(images, text), [100, 0, 100 / np.sqrt(2)], rtol=1e-12
  )
