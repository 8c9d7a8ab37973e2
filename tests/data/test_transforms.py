"""Records -> examples: captions, crops and flips."""

import pickle

import numpy as np
import pytest

from mdm_jax.data import transforms
from mdm_jax.data.transforms import Transform
from tests.data.test_images import encode, ramp


class Lengths:
  """A tokenizer: the length of the caption, twice."""

  def encode(self, caption):
    return np.full(2, len(caption), np.int32)


def test_transform_of_a_file():
  record = {'image': encode(ramp(40, 30)), 'caption': 'a cat', 'key': 'k'}
  transform = pickle.loads(pickle.dumps(Transform(Lengths(), 8)))
  example = transform(record, np.random.default_rng(0))
  assert sorted(example) == ['image', 'scale', 'text']
  assert example['image'].shape == (8, 8, 3)
  assert example['text'].tolist() == [5, 5]
  assert example['text'].dtype == np.int32
  assert example['scale'] == 30 and example['scale'].dtype == np.float32


def test_an_image_goes_under_its_name_at_its_resolution(monkeypatch):
  record = {'image': encode(ramp(40, 30)), 'caption': 'a cat', 'key': 'k'}
  decoded = []
  decode = transforms.decode_image

  def decode_image(data, resolution, *args):
    decoded.append(resolution)
    return decode(data, resolution, *args)

  monkeypatch.setattr(transforms, 'decode_image', decode_image)
  coarse = Transform(Lengths(), 4, image_name='image_4')
  example = coarse(record, np.random.default_rng(0))
  assert decoded == [4]
  assert example['image_4'].shape == (4, 4, 3) and 'image' not in example
  assert example['scale'] == 30


def test_transform_of_an_array():
  image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
  record = {'image': image, 'caption': '', 'key': 'k'}
  transform = Transform(Lengths(), 4)
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(transform(record, rng)['image'], image)
  assert transform(record, rng)['scale'] == 4
  assert transform(record | {'size': 300}, rng)['scale'] == 300
  with pytest.raises(ValueError, match=r'k: .*\(4, 4, 3\).*resolution is 8'):
    Transform(Lengths(), 8)(record, rng)


def test_flip_mirrors_half_of_the_images_and_is_off_by_default():
  image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
  record = {'image': image, 'caption': '', 'key': 'k'}
  flipped = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    found = Transform(Lengths(), 4, flip=True)(record, rng)['image']
    if (found != image).any():
      np.testing.assert_array_equal(found, image[:, ::-1])
      flipped += 1
    rng = np.random.default_rng(seed)
    assert (Transform(Lengths(), 4)(record, rng)['image'] == image).all()
  assert 75 < flipped < 125


@pytest.mark.parametrize('size', [(300, 100), (100, 300)])
def test_a_random_crop_lies_anywhere_along_the_longer_side(size):
  record = {'image': encode(ramp(*size)), 'caption': 'a cat', 'key': 'k'}
  along = int(size[0] > size[1])  # Of the array: rows run along the height.
  channel = 1 - along

  def middle(seed, **options):
    example = Transform(Lengths(), 20, **options)(
      record, np.random.default_rng(seed)
    )
    return example['image'][10, 10].astype(int)

  centre = middle(0)[channel]
  assert abs(centre - 130) < 3  # Half of a pixel right of the middle.
  found = [middle(seed, random_crop=True) for seed in range(40)]
  values = [pixel[channel] for pixel in found]
  # The middle of a third of the ramp is from 1/6 to 5/6 of it.
  assert 38 < min(values) < 75 and 185 < max(values) < 222
  assert abs(np.mean(values) - 130) < 25
  # The shorter side is never cropped.
  assert np.ptp([pixel[1 - channel] for pixel in found]) <= 3
  np.testing.assert_array_equal(found[3], middle(3, random_crop=True))
