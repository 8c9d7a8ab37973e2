"""Class labels as tokens."""

import pytest

from mdm_jax.data.labels import LabelledSource, Labels, read_names

NAMES = ('rose', 'tulip', 'crane', '3', 'crane')


def test_tokens_follow_padding_and_no_class():
  labels = Labels(5, NAMES)
  assert labels.vocab_size == 7
  assert [
    labels.encode(p).tolist() for p in ('', '0', '4', 'rose', 'tulip')
  ] == [[1], [2], [6], [2], [3]]
  # A number always means the class with that number.
  assert labels.encode('3').tolist() == [5]
  assert labels.encode('1').dtype == 'int32'
  assert labels.name(1) == 'tulip'
  assert Labels(5).name(1) == '1'


@pytest.mark.parametrize(
  'labels, prompt, message',
  [
    (Labels(5), '5', "no classes are '5': give a number from 0 to 4.$"),
    (Labels(5), 'rose', "no classes are 'rose': give a number from 0 to 4.$"),
    (Labels(5), '-1', "no classes are '-1'"),
    (Labels(5, NAMES), 'Rose', "no classes are 'Rose': .* 4, or a name"),
    (Labels(5, NAMES), 'crane', "2 classes are 'crane': give a number"),
  ],
)
def test_other_prompts_are_refused(labels, prompt, message):
  with pytest.raises(ValueError, match=message):
    labels.encode(prompt)


def test_names_of_a_file(tmp_path):
  path = tmp_path / 'label.labels.txt'
  path.write_text('tench, Tinca tinca\ngoldfish \n')
  assert read_names(str(path)) == ('tench, Tinca tinca', 'goldfish')
  with pytest.raises(FileNotFoundError, match='class_names=.*/none'):
    read_names(f'{tmp_path}/none')


def test_counts_that_do_not_fit():
  with pytest.raises(ValueError, match='text.num_classes=0: give'):
    Labels(0)
  with pytest.raises(ValueError, match='has 5 names for text.num_classes=6'):
    Labels(6, NAMES)


def test_a_record_gets_its_label():
  source = LabelledSource([{'label': 3, 'key': 'a'}], Labels(5, NAMES))
  assert len(source) == 1
  assert source[0]['text'].tolist() == [5]
  assert source[0]['key'] == 'a'
