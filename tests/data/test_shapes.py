"""The procedural data set: scenes, captions and held-out combinations."""

import pickle
import zlib

import numpy as np
import pytest

from mdm_jax.data import moving_shapes, shapes

COUNT = 300


def _scenes(split, seed=0, count=COUNT):
  source = shapes.ShapesSource(seed, split, count, resolution=64)
  return [source.scene(index) for index in range(count)]


def _combinations(scene):
  return {(item.shape, item.color, scene.background) for item in scene.objects}


def _flat(combinations):
  return {
    (*pair, background)
    for background, pairs in combinations.items()
    for pair in pairs
  }


def _pooled(image, factor):
  side = image.shape[0] // factor
  blocks = image.astype(np.float32).reshape(side, factor, side, factor, 3)
  return blocks.mean((1, 3))


def test_each_pair_misses_one_background():
  held_out, seen = _flat(shapes.HELD_OUT), _flat(shapes.SEEN)
  pairs = {combination[:2] for combination in held_out}
  assert len(held_out) == len(pairs) == 6 * 8
  assert len(seen) == 6 * 8 * 5 and not seen & held_out


@pytest.mark.parametrize('split', shapes.SPLITS)
def test_held_out_combinations_are_only_in_held_out(split):
  for scene, _, _ in _scenes(split):
    held_out = _combinations(scene) & _flat(shapes.HELD_OUT)
    assert len(held_out) == (1 if split == 'held_out' else 0)


def test_train_shows_everything_else():
  scenes = [scene for scene, _, _ in _scenes('train', count=2000)]
  assert set.union(*map(_combinations, scenes)) == _flat(shapes.SEEN)
  assert {scene.background for scene in scenes} == set(shapes.BACKGROUNDS)
  items = [item for scene in scenes for item in scene.objects]
  assert {item.pattern for item in items} == set(shapes.PATTERNS)
  singles = [scene for scene in scenes if len(scene.objects) == 1]
  assert {scene.layout for scene in singles} == set(shapes.PLACES)
  assert 1400 < len(singles) < 1600


@pytest.mark.parametrize(
  'source, version, expected',
  [
    (
      shapes.ShapesSource(0, 'train', 100, 32, 0.4),
      shapes.VERSION,
      ('1', 262444273, 107.954932),
    ),
    (
      moving_shapes.MovingShapesSource(0, 'train', 100, 32, 4),
      moving_shapes.VERSION,
      ('1.1', 3568556893, 108.643929),
    ),
  ],
  ids=['shapes', 'moving_shapes'],
)
def test_what_is_drawn_is_that_of_the_version(source, version, expected):
  """Raise VERSION, which ends cached features, with these numbers."""
  records = [source[i] for i in range(20)]
  text = '\n'.join(record['caption'] for record in records)
  mean = np.mean([record['image'].mean() for record in records])
  assert (version, zlib.crc32(text.encode())) == expected[:2]
  assert mean == pytest.approx(expected[2], abs=1e-4)


def test_the_share_of_two_objects():
  few, many = (
    shapes.ShapesSource(0, 'train', COUNT, 64, two_objects=share)
    for share in (0.25, 0.6)
  )
  counts = [
    [len(source.scene(i)[0].objects) for i in range(COUNT)]
    for source in (few, many)
  ]
  assert counts[0].count(2) / COUNT == pytest.approx(0.25, abs=0.06)
  assert counts[1].count(2) / COUNT == pytest.approx(0.6, abs=0.06)
  # A scene with as many objects as before is the same scene.
  same = [i for i in range(COUNT) if counts[0][i] == counts[1][i]]
  assert all(few.scene(i) == many.scene(i) for i in same)


def test_objects_are_inside_and_do_not_overlap():
  for scene, _, _ in _scenes('train'):
    for item in scene.objects:
      low, high = shapes.SIZES[item.size]
      assert low <= item.radius <= high
      for center in (item.x, item.y):
        assert item.radius < center < 1 - item.radius
    if len(scene.objects) == 2:
      first, second = scene.objects
      distance = {
        'left of': second.x - first.x,
        'above': second.y - first.y,
      }[scene.layout]
      assert distance >= first.radius + second.radius + 0.06 - 1e-9


def test_a_record_depends_on_seed_split_and_index_alone():
  source = shapes.ShapesSource(3, 'train', 10, resolution=32)
  record = pickle.loads(pickle.dumps(source))[7]
  assert record['key'] == 'train/7' and record['size'] == 32
  assert record['image'].dtype == np.uint8
  np.testing.assert_array_equal(record['image'], source[7]['image'])
  finer = shapes.ShapesSource(3, 'train', 99, resolution=128)
  assert finer.scene(7) == source.scene(7)
  others = [
    shapes.ShapesSource(4, 'train', 10, 32).scene(7),
    shapes.ShapesSource(3, 'validation', 10, 32).scene(7),
    source.scene(6),
  ]
  assert all(other != source.scene(7) for other in others)


def test_streams_are_disjoint():
  seen = {scene for scene, _, _ in _scenes('train', count=1000)}
  seen |= {scene for scene, _, _ in _scenes('validation', count=1000)}
  assert len(seen) == 2000


def test_first_record_never_changes():
  scene, caption, stated = shapes.ShapesSource(0, 'train', 1, 64).scene(0)
  assert scene.layout == 'left of' and scene.background == 'white'
  assert caption == (
    'a small dotted orange circle to the right of a dotted pink circle,'
    ' white background'
  )
  assert stated == {
    'background': 'white',
    'objects': [
      {
        'shape': 'circle',
        'color': 'orange',
        'pattern': 'dotted',
        'size': 'small',
      },
      {'shape': 'circle', 'color': 'pink', 'pattern': 'dotted'},
    ],
    'relation': 'right of',
  }


def test_source_repr_and_errors():
  source = shapes.ShapesSource(1, 'train', 5, 64)
  assert len(source) == 5
  assert repr(source) == (
    "ShapesSource(seed=1, split='train', size=5, resolution=64, "
    'two_objects=0.25)'
  )
  with pytest.raises(IndexError, match='index 5'):
    source[5]
  with pytest.raises(ValueError, match="'test'.*'held_out'"):
    shapes.ShapesSource(1, 'test', 5, 64)
  with pytest.raises(ValueError, match='resolution 4'):
    shapes.ShapesSource(1, 'train', 5, 4)[0]


def test_captions_say_what_is_stated():
  for scene, caption, stated in _scenes('train'):
    assert caption.isascii() and caption == caption.lower()
    assert len(caption) < 120 and scene.background in caption
    for item, said in _matched(scene, stated):
      for attribute, value in said.items():
        assert getattr(item, attribute) == value and value in caption
      assert {'shape', 'color'} <= set(said)
      assert 'pattern' in said or item.pattern == 'solid'
    patterns = [asked.get('pattern') for asked in stated['objects']]
    assert ('solid' in caption) == ('solid' in patterns)
    if len(scene.objects) == 2:
      first, second = (asked['shape'] for asked in stated['objects'])
      before, _, after = caption.partition(stated['relation'])
      assert first in before and second in after


def _matched(scene, stated):
  """Pairs of an object and what its caption states."""
  objects = scene.objects
  if stated.get('relation', scene.layout) != scene.layout:
    assert stated['relation'] == shapes.INVERSE[scene.layout]
    objects = objects[::-1]
  assert stated.get('position', scene.layout) == scene.layout
  return zip(objects, stated['objects'], strict=True)


def test_optional_attributes_are_sometimes_omitted():
  stated = [stated for _, _, stated in _scenes('train')]
  single = [each for each in stated if len(each['objects']) == 1]
  said = np.mean(['position' in each for each in single])
  assert 0.8 < said < 0.9
  sizes = ['size' in item for each in stated for item in each['objects']]
  assert 0.8 < np.mean(sizes) < 0.9


@pytest.mark.parametrize('coarse, fine', [(16, 64), (64, 256), (256, 1024)])
def test_drawing_is_area_averaging(coarse, fine):
  scenes = [scene for scene, _, _ in _scenes('train', count=12)]
  worst = 0.0
  for scene in scenes:
    expected = _pooled(shapes.draw(scene, fine), fine // coarse)
    difference = shapes.draw(scene, coarse) - expected
    # Hatching darkens objects at higher resolutions by a few per cent.
    worst = max(worst, np.abs(difference).mean())
    assert np.percentile(np.abs(difference), 99) < 45
  assert worst < 5


def test_detail_grows_with_the_resolution():
  item = shapes.Object('circle', 'red', 'solid', 'large', 0.5, 0.5, 0.25)
  scene = shapes.Scene((item,), 'grey', 'centre')
  for resolution, textured in ((64, False), (256, True)):
    image = shapes.draw(scene, resolution).astype(np.float32)
    corner = image[: resolution // 8, : resolution // 8, 0]
    middle = slice(7 * resolution // 16, 9 * resolution // 16)
    inside = image[middle, middle, 0]
    assert (corner.std() > 1) == textured
    assert (inside.std() > 3) == textured
    # The grain averages out.
    assert abs(corner.mean() - 128) < 0.6


def test_dark_parts_are_a_shade_of_the_color():
  item = shapes.Object('square', 'blue', 'striped', 'large', 0.5, 0.5, 0.25)
  image = shapes.draw(shapes.Scene((item,), 'white', 'centre'), 160)
  color = np.array(shapes.COLORS['blue'])
  np.testing.assert_allclose(image[80, 80], color, atol=1)
  # Half a period below.
  np.testing.assert_allclose(image[88, 80], shapes.DARK * color, atol=1)
  np.testing.assert_array_equal(image[4, 4], shapes.BACKGROUNDS['white'])


def test_silhouettes_and_pattern_tiles():
  masks = shapes.silhouettes()
  areas = {name: mask.mean() for name, mask in masks.items()}
  np.testing.assert_allclose(areas['circle'], np.pi / 4, atol=0.01)
  np.testing.assert_allclose(areas['square'], 0.86**2, atol=0.03)
  np.testing.assert_allclose(
    areas['ring'], np.pi / 4 * (1 - 0.52**2), atol=0.01
  )
  tiles = shapes.pattern_tiles()
  assert tuple(tiles) == shapes.PATTERNS
  dark = {name: tile.mean() for name, tile in tiles.items()}
  assert dark['solid'] == 0
  np.testing.assert_allclose(dark['striped'], 0.5, atol=0.04)
  np.testing.assert_allclose(dark['checked'], 0.5, atol=0.04)
  np.testing.assert_allclose(dark['dotted'], np.pi * 0.09, atol=0.02)
