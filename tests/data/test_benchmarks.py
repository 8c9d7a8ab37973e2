"""Prompts of benchmarks, as these publish them."""

import json

import pytest

from mdm_jax.data import benchmarks

# Two lines of GenEval's file.
GENEVAL = (
  '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], '
  '"prompt": "a photo of a bench"}\n'
  '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": '
  '[{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}\n'
)


def annotations(num_images: int) -> dict:
  """As in captions_val2014.json: five captions of each image, in no order."""
  found = [
    {
      'image_id': 7 * image,
      'id': 10 * image + i,
      'caption': f' Caption {i}\nof {image}. ',
    }
    for i in range(5)
    for image in range(1, num_images + 1)
  ]
  return {'info': {}, 'images': [], 'annotations': found}


def test_prompts_of_geneval_and_their_lines(tmp_path):
  path = tmp_path / 'evaluation_metadata.jsonl'
  path.write_text(GENEVAL)
  prompts, lines = benchmarks.read_geneval(path)
  assert prompts == ['a photo of a bench', 'a photo of two clocks']
  assert lines == GENEVAL.splitlines()
  assert json.loads(lines[1])['include'] == [{'class': 'clock', 'count': 2}]


@pytest.mark.parametrize(
  'line',
  ['a photo of a dog', '{"tag": 1}', '[1]', '{"prompt": " "}', '[' * 10**5],
)
def test_a_file_of_other_prompts_is_named(tmp_path, line):
  path = tmp_path / 'prompts.txt'
  path.write_text(GENEVAL + line)
  with pytest.raises(
    ValueError, match=r'prompts.txt, entry 3: .*evaluation_met'
  ):
    benchmarks.read_geneval(path)


def test_captions_of_coco_are_one_of_each_photograph(tmp_path):
  path = tmp_path / 'captions_val2014.json'
  path.write_text(json.dumps(annotations(40)))
  chosen = benchmarks.choose_coco(path, 30)
  assert len(chosen) == 30
  for each in chosen:
    image, caption = divmod(each['caption_id'], 10)
    assert each['image_id'] == 7 * image
    assert each['prompt'] == f'Caption {caption} of {image}.'
  images = [each['image_id'] for each in chosen]
  assert len({*images}) == 30 and images != sorted(images)
  assert {each['caption_id'] % 10 for each in chosen} == {0, 1, 2, 3, 4}
  # In all versions, and whatever the order in the file.
  assert images[:5] == [252, 182, 112, 28, 231]
  other = annotations(40)
  other['annotations'].reverse()
  path.write_text(json.dumps(other))
  assert benchmarks.choose_coco(path, 30) == chosen
  assert len(benchmarks.choose_coco(path)) == 40


@pytest.mark.parametrize(
  'value',
  [{}, [1], {'annotations': []}, {'annotations': [{'image_id': 1, 'id': 2}]}],
)
def test_a_file_without_captions_of_coco_is_named(tmp_path, value):
  path = tmp_path / 'instances_val2014.json'
  path.write_text(json.dumps(value))
  with pytest.raises(
    ValueError, match='instances_val2014.json has no captions'
  ):
    benchmarks.choose_coco(path)
  path.write_text('[' * 10**5)
  with pytest.raises(ValueError, match='has no captions of COCO'):
    benchmarks.choose_coco(path)
