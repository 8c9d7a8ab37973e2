"""Packages of emoji become tars, of which combinations are held out."""

import io
import json
import re
import tarfile

import numpy as np
from PIL import Image, ImageDraw, ImageFont
import pytest

from mdm_jax.data import images, sources
from mdm_jax.inference import labelled_features
from mdm_jax.tools import emoji_tars
from mdm_jax.tools.emoji_tars import Emoji, Record
from tests import commands

_TONES = '1f3fb', '1f3fc', '1f3fd', '1f3fe', '1f3ff'
_SMALL = 'light', 'medium-light', 'medium', 'medium-dark', 'dark'


def tgz(**contents):
  """A .tgz of files by name, with '/' for '__' and '.' for '_DOT_'."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as tar:
    for name, content in contents.items():
      member = tarfile.TarInfo(name.replace('__', '/').replace('_DOT_', '.'))
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return file.getvalue()


def emojibase():
  """The package of names, with a hand in six tones, a flag and a dog."""
  rows = [
    {
      'hexcode': '1F44B',
      'emoji': 'A',
      'label': 'waving hand',
      'tags': ['hello', 'hand', 'bye'],
      'group': 1,
      'subgroup': 16,
      'skins': [
        {
          'hexcode': f'1F44B-{code.upper()}',
          'emoji': 'A',
          'label': f'waving hand: {name} skin tone',
          'tone': tone,
        }
        for tone, (code, name) in enumerate(zip(_TONES, _SMALL), 1)
      ],
    },
    {'hexcode': '1F1E6', 'emoji': 'B', 'label': 'flag: Chad', 'group': 9},
    {'hexcode': '1F415-FE0F', 'emoji': 'WWW', 'label': 'dog', 'tags': ['pet']},
  ]
  names = {'groups': {'1': 'people', '9': 'flags'}, 'subgroups': {'16': 'hand'}}
  return tgz(
    package__en__data_DOT_json=json.dumps(rows).encode(),
    package__meta__groups_DOT_json=json.dumps(names).encode(),
  )


def record(color, size=32):
  """A WebP of a disc on a transparent ground."""
  image = Image.new('RGBA', (size, size))
  ImageDraw.Draw(image).ellipse((4, 4, size - 4, size - 4), fill=color)
  file = io.BytesIO()
  image.save(file, 'WEBP', lossless=True)
  return file.getvalue()


def fluent():
  """The package of images: the hand in three tones, the dog, one unknown."""
  codes = ['1f44b', '1f44b-1f3fb', '1f44b-1f3ff', '1f415-fe0f', '1f999']
  return tgz(
    **{
      f'package__assets__{code}_DOT_webp': record((40 * i, 90, 200))
      for i, code in enumerate(codes)
    }
  )


def animated():
  """A package of animations: the hand in three tones; the dog stands still."""
  codes = ['1f44b', '1f44b-1f3fb', '1f44b-1f3ff']
  return tgz(
    **{
      f'package__assets__{code}_DOT_webp': moving(i)
      for i, code in enumerate(codes)
    },
    package__assets__1f415_DOT_webp=record((0, 90, 200)),
  )


def moving(i):
  """A WebP of a disc that changes its colour, in 20 frames of 125 ms."""
  frames = []
  for k in range(20):
    with Image.open(io.BytesIO(record((10 * k, 90 * i, 200)))) as image:
      frames.append(image.copy())
  file = io.BytesIO()
  frames[0].save(
    file, 'WEBP', save_all=True, append_images=frames[1:], duration=125
  )
  return file.getvalue()


def records(tar):
  """The files of a tar by name."""
  with tarfile.open(tar) as opened:
    return {member.name: opened.extractfile(member).read() for member in opened}


def test_captions_are_varied():
  emoji = Emoji(
    '',
    'man: light skin tone, red hair',
    '',
    (1,),
    ('ginger', 'man', 'adult', 'hair'),
    '',
    '',
  )
  assert emoji_tars.captions_of(emoji, '3D') == [
    'a 3D emoji of man, red hair with light skin tone',
    'man, red hair with light skin tone, 3D emoji',
    '3D man, red hair with light skin tone',
    'man, red hair with light skin tone in 3D style',
    'a 3D emoji of man, red hair with light skin tone: ginger, adult',
  ]

  def first(label):
    return emoji_tars.captions_of(Emoji('', label, '', (), (), '', ''), 'flat')[
      0
    ]

  assert first('flag: Chad') == 'a flat emoji of flag of Chad'
  assert first('keycap: #') == 'a flat emoji of keycap #'
  assert first('kiss: woman, man, light skin tone, dark skin tone') == (
    'a flat emoji of kiss, woman, man with light skin tone and dark skin tone'
  )


def many():
  """300 emoji in 5 tones and 20 with pairs of them, 1000 without; 2 styles."""
  pairs = [(a, b) for a in range(1, 6) for b in range(1, 6)]
  tones = [((), *((i,) for i in range(1, 6)))] * 300 + [((), *pairs)] * 20
  return [
    Record(
      f'{style}_{i}_{tone}',
      style,
      Emoji('', '', f'{i:x}', tone, (), '', ''),
      b'',
    )
    for i, each in enumerate([*tones, *([((),)] * 1000)])
    for tone in each
    for style in emoji_tars.STYLES
  ]


def test_parts_of_held_out_combinations_are_seen():
  records = many()
  held_out = emoji_tars.choose_held_out(records)
  # 5 % of all but the people without a tone.
  assert 0.045 < len(held_out) / (len(records) - 640) < 0.055
  seen = [each for each in records if each.key not in held_out]
  subjects = {(each.emoji.subject, each.style) for each in seen}
  toned = {(each.emoji.subject, each.emoji.tones) for each in seen}
  tones = {each.emoji.tones for each in seen}
  kinds = {'skin tone': 0, 'style': 0}
  for each in records:
    emoji = each.emoji
    kind = held_out.get(each.key)
    if kind == 'skin tone':
      # In both styles; the emoji and the tone are seen, not together.
      assert (emoji.subject, emoji.tones) not in toned
      assert (emoji.subject, each.style) in subjects and emoji.tones in tones
      assert (emoji.subject, ()) in toned
    elif kind == 'style':
      assert not emoji.tones and (emoji.subject, each.style) not in subjects
      other = {*emoji_tars.STYLES} - {each.style}
      assert (emoji.subject, *other) in subjects
    if kind:
      kinds[kind] += 1
  assert kinds['skin tone'] > 150 and 80 < kinds['style'] < 120
  # Of each image alone: others do not change it.
  part = [each for each in records if int(each.emoji.subject, 16) % 2]
  assert emoji_tars.choose_held_out(part) == {
    each.key: held_out[each.key] for each in part if each.key in held_out
  }


def test_of_one_style_only_skin_tones_are_held_out():
  records = [each for each in many() if each.style == 'flat']
  held_out = emoji_tars.choose_held_out(records)
  assert len(held_out) > 75 and {*held_out.values()} == {'skin tone'}


def test_nothing_of_copies_is_held_out():
  records = many()
  held_out = emoji_tars.choose_held_out(records)
  first = next(each for each in records if each.key in held_out)
  without = emoji_tars.choose_held_out(records, {first.emoji.subject})
  assert without == {
    key: kind
    for key, kind in held_out.items()
    if key.split('_')[1] != first.key.split('_')[1]
  }
  same = [
    Record(key, '3D', Emoji('', '', key, (), (), '', ''), record(color))
    for key, color in (('a', 'red'), ('b', 'blue'), ('c', 'red'))
  ]
  assert emoji_tars.find_copies(same) == {'a', 'c'}


def test_command(tmp_path):
  (tmp_path / 'emojibase.tgz').write_bytes(emojibase())
  (tmp_path / 'fluent.tgz').write_bytes(fluent())
  result = commands.run(
    'mdm_jax.tools.emoji_tars',
    f'--emojibase={tmp_path}/emojibase.tgz',
    f'--fluent={tmp_path}/fluent.tgz',
    f'--output={tmp_path}/tars',
    '--resolution=16',
  )
  assert result.returncode == 0, result.stderr
  found = {
    name: records(tmp_path / 'tars' / f'{name}.tar')
    for name in ('train-00000', 'validation-00000')
  }
  keys = {
    f'{tar}/{name.removesuffix(".json")}': json.loads(content)
    for tar, files in found.items()
    for name, content in files.items()
    if name.endswith('.json')
  }
  assert {key.split('/')[1] for key in keys} == {
    *('fluent_1f44b', 'fluent_1f44b-1f3fb', 'fluent_1f44b-1f3ff'),
    'fluent_1f415-fe0f',
  }
  about = keys['train-00000/fluent_1f44b']
  assert about['caption'][0] == 'a 3D emoji of waving hand'
  assert about['group'] == 'people' and about['license'] == 'MIT'
  image, _ = images.decode_image(found['train-00000']['fluent_1f44b.png'], 16)
  expected, _ = images.decode_image(record((0, 90, 200)), 16)
  np.testing.assert_array_equal(image, expected)
  lines = (tmp_path / 'tars' / 'labels.jsonl').read_text().splitlines()
  labels = {line.pop('key'): line for line in map(json.loads, lines)}
  assert labels.keys() == keys.keys()
  assert labels['train-00000/fluent_1f44b'] == {
    'style': '3D',
    'group': 'people',
    'subgroup': 'hand',
    'skin_tone': 'none',
  }
  assert labelled_features.read_labels(tmp_path / 'tars' / 'labels.jsonl') == (
    labels
  )
  captions = (tmp_path / 'tars' / 'captions.txt').read_text().splitlines()
  assert captions.count('dog in 3D style') == 1
  # The folder is one of tars, whatever is beside them.
  done = commands.run(
    'mdm_jax.tools.prepare_data',
    *(f'--input={tmp_path}/tars', f'--output={tmp_path}/data'),
    '--num_workers=1',
  )
  assert done.returncode == 0, done.stderr
  source = sources.open_source(str(tmp_path / 'data'), 'train')
  read = [source[i] for i in range(len(source))]
  (hand,) = [each for each in read if each['key'] == 'train-00000/fluent_1f44b']
  assert hand['captions'] == about['caption']


def test_animations_become_clips(tmp_path):
  (tmp_path / 'emojibase.tgz').write_bytes(emojibase())
  (tmp_path / 'animated.tgz').write_bytes(animated())
  for command, *flags in (
    (
      'emoji_tars',
      f'--emojibase={tmp_path}/emojibase.tgz',
      f'--animated={tmp_path}/animated.tgz',
      f'--output={tmp_path}/tars',
    ),
    (
      'prepare_clips',
      f'--input={tmp_path}/tars/*.tar',
      f'--output={tmp_path}/clips',
      '--resolution=16',
    ),
  ):
    result = commands.run(f'mdm_jax.tools.{command}', *flags)
    assert result.returncode == 0, result.stderr
  found = {
    **records(tmp_path / 'clips' / 'train-00000.tar'),
    **records(tmp_path / 'clips' / 'validation-00000.tar'),
  }
  keys = {f'fluent_1f44b{tone}' for tone in ('', '-1f3fb', '-1f3ff')}
  assert {name.partition('.')[0] for name in found} == keys
  captions = json.loads(found['fluent_1f44b-1f3fb.json'])['caption']
  assert captions[0] == (
    'an animated 3D emoji of waving hand with light skin tone'
  )
  clip, _ = images.decode_clip(found['fluent_1f44b-1f3fb.jpg'], 16, 16)
  assert clip.shape == (16, 16, 16, 3)
  assert clip[:, 0, 0].min() > 240  # On white.
  assert clip[-1, 8, 8, 0] > clip[0, 8, 8, 0] + 100


def test_fonts_are_rendered(monkeypatch, tmp_path):
  (tmp_path / 'font.ttf').write_bytes(b'junk')
  (tmp_path / 'emojibase.tgz').write_bytes(emojibase())
  emoji = emoji_tars.read_emoji(tmp_path / 'emojibase.tgz')
  with pytest.raises(ValueError, match='font.ttf is not NotoColorEmoji.ttf'):
    list(emoji_tars.render_noto(tmp_path / 'font.ttf', emoji))
  font = ImageFont.load_default(size=100)
  monkeypatch.setattr(ImageFont, 'truetype', lambda *_: font)
  found = list(emoji_tars.render_noto(tmp_path / 'font.ttf', emoji))
  # 'WWW' is wider than a glyph.
  assert {each.emoji.label for each in found} == {
    *('waving hand', 'flag: Chad'),
    *(f'waving hand: {name} skin tone' for name in _SMALL),
  }
  (flag,) = [each for each in found if each.key == 'noto_1f1e6']
  with Image.open(io.BytesIO(flag.image)) as image:
    assert image.size == (136, 136) and image.mode == 'RGBA'
    left, top, right, bottom = image.getbbox()
    assert 40 < right - left < 100 and 50 < bottom - top < 100


@pytest.mark.parametrize(
  'given, message',
  [
    ({'emojibase': b'junk'}, 'emojibase is no whole .tgz of npm: download'),
    ({'fluent': fluent()[:-200]}, 'fluent is no whole .tgz of npm: download'),
    ({'emojibase': fluent()}, 'has no package/en/data.json'),
    ({'fluent': emojibase()}, r'has no package/assets/\*.webp'),
    ({'fluent': None}, 'no images: give --fluent, --noto or both'),
    ({'animated': fluent()}, '--animated makes clips, and --fluent'),
    (
      {'fluent': None, 'animated': fluent()},
      r'has no animated package/assets/\*.webp',
    ),
  ],
)
def test_other_files_are_named(given, message, tmp_path):
  files = {'emojibase': emojibase(), 'fluent': fluent()} | given
  flags = []
  for name, content in files.items():
    if content is not None:
      (tmp_path / name).write_bytes(content)
      flags.append(f'--{name}={tmp_path / name}')
  result = commands.run(
    'mdm_jax.tools.emoji_tars', *flags, f'--output={tmp_path}/tars'
  )
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ')
  assert re.search(message, line)
  assert not (tmp_path / 'tars').exists()
