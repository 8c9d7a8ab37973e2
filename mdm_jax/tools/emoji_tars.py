r"""Makes a small captioned data set of emoji from packages that one downloads.

  python -m mdm_jax.tools.emoji_tars --emojibase=emojibase-data-17.0.0.tgz \
      --fluent=fluent-emoji-3d-1.1.0.tgz --noto=NotoColorEmoji.ttf \
      --output=data/emoji_tars
  python -m mdm_jax.tools.prepare_data --input=data/emoji_tars \
      --output=data/emoji

docs/emoji.md says where the packages are. With --animated instead of the other
two the files are animations, for `prepare_clips`, see docs/video.md. The output
are tars in the layout of
img2dataset, `<key>.webp` and `<key>.json`, whose 'caption' is a list of
captions in varied wording. The combinations that are held out are the
validation split, `validation-00000.tar`. Beside the tars are

  captions.txt   all training captions, to train a tokenizer on
  held_out.txt   a prompt for each image that is held out
  labels.jsonl   key, style, group, subgroup and skin tone of each image
"""

from collections.abc import Collection, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import sys
import tarfile
from typing import Any
import zlib

from absl import flags, logging
from etils import epath
from PIL import Image, ImageDraw, ImageFont, features

from mdm_jax.data import images
from mdm_jax.runtime import (
  command,
  directory_lock,
  files,
  flag_types,
  value_types,
)

STYLES = ('3D', 'flat')
_ANIMATED = 'animated 3D'
_LICENSES = {'3D': 'MIT', 'flat': 'OFL-1.1', _ANIMATED: 'MIT'}
# Share of the combinations of an emoji with a skin tone, and of the emoji
# without one in two styles, that is held out.
HELD_OUT = 0.05
_DATA = 'package/en/data.json'
_GROUPS = 'package/meta/groups.json'
_IMAGES = re.compile(r'package/assets/([0-9a-f-]+)\.webp')
# The font has one set of bitmaps, of 136 x 128 pixels, which has this name.
_FONT_SIZE, _CANVAS, _TOP = 109, 136, 4
# Wider than one glyph: the font has none for the sequence.
_WIDEST = 140
_TAGS = 3  # of a caption
_TONES = ('light', 'medium-light', 'medium', 'medium-dark', 'dark')


@dataclasses.dataclass(frozen=True)
class Emoji:
  """An emoji of Unicode.

  Attributes:
    characters: its text.
    label: its short name, such as 'waving hand: dark skin tone'.
    subject: the code of the emoji without skin tones.
    tones: of its skin, from 1, light, to 5, dark: none, one or two.
    tags: keywords.
    group: such as 'people-body'.
    subgroup: such as 'hand-fingers-open'.
  """

  characters: str
  label: str
  subject: str
  tones: tuple[int, ...]
  tags: tuple[str, ...]
  group: str
  subgroup: str


@dataclasses.dataclass(frozen=True)
class Record:
  """A record of the data set: an image of an emoji.

  Attributes:
    key: such as 'fluent_1f44b'.
    style: one of STYLES, or that of animations.
    emoji: what it shows.
    image: an image file.
    suffix: of that.
  """

  key: str
  style: str
  emoji: Emoji
  image: bytes
  suffix: str = 'webp'


def code(hexcode: str) -> str:
  """The code of an emoji, without variation selectors: '1f3f3-200d-1f308'."""
  return '-'.join(part for part in hexcode.lower().split('-') if part != 'fe0f')


def read_emoji(path: epath.PathLike) -> dict[str, Emoji]:
  """Reads the package emojibase-data.

  Returns:
    The emoji by `code`.

  Raises:
    ValueError: it is no such package.
  """
  with _open_package(path) as package:
    rows = json.loads(_member(package, _DATA, path))
    names = json.loads(_member(package, _GROUPS, path))
  found = {}
  for row in rows:
    for each in (row, *row.get('skins', ())):
      tones = each.get('tone', ())
      found[code(each['hexcode'])] = Emoji(
        each['emoji'],
        each['label'],
        code(row['hexcode']),
        tuple(tones) if isinstance(tones, list | tuple) else (tones,),
        tuple(row.get('tags', ())),
        names['groups'].get(str(row.get('group')), 'none'),
        names['subgroups'].get(str(row.get('subgroup')), 'none'),
      )
  return found


def read_fluent(
  path: epath.PathLike, emoji: dict[str, Emoji], animated: bool = False
) -> Iterator[Record]:
  """Reads the images of the package @lobehub/fluent-emoji-3d.

  Args:
    path: of the package.
    emoji: by `code`.
    animated: whether it is one of the packages @lobehub/fluent-emoji-anim-1 to
      4 instead, of which the animations are read, and not the still images.

  Raises:
    ValueError: it is no such package.
  """
  count = 0
  with _open_package(path) as package:
    for member in sorted(package, key=lambda member: member.name):
      match = _IMAGES.fullmatch(member.name)
      if match and code(match[1]) in emoji:
        data = package.extractfile(member).read()
        if animated and not images.is_animation(data):
          continue
        count += 1
        style = _ANIMATED if animated else '3D'
        yield Record(f'fluent_{match[1]}', style, emoji[code(match[1])], data)
  if not count:
    raise ValueError(
      f'{path} has no {"animated " * animated}package/assets/*.webp: give the '
      f'.tgz of @lobehub/fluent-emoji-{"anim-1 to 4" if animated else "3d"}.'
    )


def render_noto(
  path: epath.PathLike, emoji: dict[str, Emoji]
) -> Iterator[Record]:
  """Renders what the font Noto Color Emoji has, at the size of its bitmaps.

  Raises:
    ValueError: it is no such font, or Pillow cannot join characters.
  """
  if not features.check('raqm'):
    raise ValueError(
      'this Pillow lacks Raqm, which joins characters to one emoji: install '
      'Pillow from PyPI, and FriBiDi (Debian: libfribidi0).'
    )
  try:
    font = ImageFont.truetype(io.BytesIO(files.read_bytes(path)), _FONT_SIZE)
  # That of Pillow for what is no font, or has no glyphs of this size.
  except OSError as error:
    raise ValueError(
      f'{path} is not NotoColorEmoji.ttf with bitmaps of size {_FONT_SIZE} '
      f'({error}).'
    ) from None
  for name, each in sorted(emoji.items()):
    left, _, right, _ = font.getbbox(each.characters)
    if right - left > _WIDEST:
      continue
    image = Image.new('RGBA', (_CANVAS, _CANVAS))
    ImageDraw.Draw(image).text(
      (0, _TOP), each.characters, font=font, embedded_color=True
    )
    if image.getbbox():
      file = io.BytesIO()
      image.save(file, 'WEBP', lossless=True)
      yield Record(f'noto_{name}', 'flat', each, file.getvalue())


def captions_of(emoji: Emoji, style: str) -> list[str]:
  """Captions of an image in varied wording; the first is used as a prompt."""
  name = _phrase(emoji)
  article = 'an' if style.startswith('a') else 'a'
  full = f'{article} {style} emoji of {name}'
  found = [
    full,
    f'{name}, {style} emoji',
    f'{style} {name}',
    f'{name} in {style} style',
  ]
  words = set(re.findall(r'\w+', emoji.label.lower()))
  tags = [tag for tag in emoji.tags if tag.lower() not in words]
  found += [
    f'{full}: {", ".join(tags[start : start + _TAGS])}'
    for start in range(0, min(len(tags), 2 * _TAGS), _TAGS)
  ]
  return found


def choose_held_out(
  records: Sequence[Record], copies: Collection[str] = ()
) -> dict[str, str]:
  """Chooses the combinations that are held out, by hashes of codes alone.

  Of each emoji with skin tones, 5 % of the tones, or pairs of tones of two
  people, are held out in both styles; without a tone it is never held out.
  Of 10 % of the emoji without skin tones that are in both styles, one style is
  held out. So each part of a combination is seen in other combinations.

  Args:
    records: all of them.
    copies: codes of emoji, see `find_copies`, of which nothing is held out, as
      training would see it.

  Returns:
    By the key of an image that is held out, 'skin tone' or 'style'.
  """
  tones, styles = {}, {}
  for record in records:
    emoji = record.emoji
    tones.setdefault(emoji.subject, set()).add(emoji.tones)
    styles.setdefault(emoji.subject, set()).add(record.style)
  tone_of, style_of = {}, {}
  for subject in tones.keys() - set(copies):
    with_tone = sorted(
      tones[subject] - {()}, key=lambda each: _hash(subject, each)
    )
    if with_tone:
      # Rounded up or down by chance: of one in four emoji, one of five tones.
      number = int(HELD_OUT * len(with_tone) + _hash(subject))
      tone_of[subject] = with_tone[: min(number, len(with_tone) - 1)]
    elif len(styles[subject]) == 2 and _hash(subject) < 2 * HELD_OUT:
      style_of[subject] = STYLES[_hash(subject, 'style') < 0.5]
  found = {}
  for record in records:
    emoji = record.emoji
    if emoji.tones in tone_of.get(emoji.subject, ()):
      found[record.key] = 'skin tone'
    elif style_of.get(emoji.subject) == record.style:
      found[record.key] = 'style'
  return found


def find_copies(records: Sequence[Record]) -> set[str]:
  """The emoji that share an image with others, such as the flag of Norway.

  Returns:
    Their codes without skin tones.
  """
  subjects = {}
  for record in records:
    image = images.load_image(record.image, key=record.key)[0]
    digest = hashlib.blake2b(image.tobytes()).digest()
    subjects.setdefault(digest, []).append(record.emoji.subject)
  return {
    subject
    for found in subjects.values()
    if len(found) > 1
    for subject in found
  }


def reduced(record: Record, resolution: int) -> Record:
  """The same image at another resolution, as training would decode it."""
  image, _ = images.decode_image(record.image, resolution, record.key)
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG', optimize=True)
  return dataclasses.replace(record, image=file.getvalue(), suffix='png')


def write(
  records: Sequence[Record], held_out: dict[str, str], output: epath.Path
) -> dict[str, int]:
  """Writes the tars, and what is beside them.

  Args:
    records: to write.
    held_out: what `choose_held_out` returned.
    output: the directory.

  Returns:
    The number of images of each tar.
  """
  # The first ones of a split are what sample grids show, and what losses and
  # references are of: of both styles, and not sixteen flags.
  records = sorted(records, key=lambda record: _hash(record.key))
  tars = {
    'train-00000': [each for each in records if each.key not in held_out],
    'validation-00000': [each for each in records if each.key in held_out],
  }
  labels, captions, prompts = [], [], []
  for name, found in tars.items():
    with (
      files.replacing(output / f'{name}.tar') as temporary,
      tarfile.open(temporary, 'w') as tar,
    ):
      for record in found:
        about = _describe(record, held_out)
        _add(tar, f'{record.key}.{record.suffix}', record.image)
        _add(tar, f'{record.key}.json', json.dumps(about).encode())
        labels.append({**_labels(about), 'key': f'{name}/{record.key}'})
        if record.key in held_out:
          prompts.append(about['caption'][0])
        else:
          captions += about['caption']
  files.write_text(output / 'captions.txt', '\n'.join(captions) + '\n')
  files.write_text(output / 'held_out.txt', '\n'.join(prompts) + '\n')
  files.write_text(
    output / 'labels.jsonl', ''.join(json.dumps(row) + '\n' for row in labels)
  )
  return {name: len(found) for name, found in tars.items()}


def _describe(record: Record, held_out: dict[str, str]) -> dict[str, Any]:
  """The JSON of a record."""
  emoji = record.emoji
  return {
    'key': record.key,
    'caption': captions_of(emoji, record.style),
    'tags': emoji.tags,
    'style': record.style,
    'group': emoji.group,
    'subgroup': emoji.subgroup,
    'skin_tone': ', '.join(_TONES[tone - 1] for tone in emoji.tones) or 'none',
    'held_out': held_out.get(record.key, ''),
    'license': _LICENSES[record.style],
  }


def _labels(about: dict[str, Any]) -> dict[str, str]:
  names = 'style', 'group', 'subgroup', 'skin_tone'
  return {name: about[name] for name in names}


def _phrase(emoji: Emoji) -> str:
  """The name in a caption: 'man, red hair with dark skin tone'."""
  base, _, rest = emoji.label.partition(': ')
  details = [each for each in rest.split(', ') if each]
  if base in ('flag', 'keycap'):
    return f'{base} of {rest}' if base == 'flag' else f'{base} {rest}'
  tones = [each for each in details if each.endswith(' skin tone')]
  name = ', '.join([base, *(each for each in details if each not in tones)])
  return f'{name} with {" and ".join(tones)}' if tones else name


def _hash(*values: Any) -> float:
  """A number from 0 to 1 that depends on values alone."""
  digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=8).digest()
  return int.from_bytes(digest) / 2**64


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))


@contextlib.contextmanager
def _open_package(path: epath.PathLike) -> Iterator[tarfile.TarFile]:
  with files.local_copy(path) as copy:
    try:
      with tarfile.open(copy) as package:
        yield package
    except (tarfile.TarError, EOFError, zlib.error):
      raise ValueError(
        f'{path} is no whole .tgz of npm: download it again.'
      ) from None


def _member(package: tarfile.TarFile, name: str, path: epath.PathLike) -> bytes:
  try:
    return package.extractfile(name).read()
  except KeyError:
    raise ValueError(
      f'{path} has no {name}: give the .tgz of emojibase-data.'
    ) from None


def main(_: list[str]) -> None:
  """Reads the packages, writes the tars, prints the size of each."""
  values = flags.FLAGS
  output = epath.Path(values.output)
  try:
    if values.animated and (values.fluent or values.noto or values.resolution):
      raise ValueError(
        '--animated makes clips, and --fluent, --noto and --resolution are of '
        'images: run it for each.'
      )
    emoji = read_emoji(values.emojibase)
    records = [
      *(read_fluent(values.fluent, emoji) if values.fluent else ()),
      *(render_noto(values.noto, emoji) if values.noto else ()),
    ]
    for path in values.animated:
      records += read_fluent(path, emoji, animated=True)
    if not records:
      raise ValueError(
        'no images: give --fluent, --noto or both, or --animated.'
      )
    held_out = choose_held_out(records, find_copies(records))
    if values.resolution:
      records = [reduced(each, values.resolution) for each in records]
    with directory_lock.holding(output):
      counts = write(records, held_out, output)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  for name, count in counts.items():
    logging.info('%s: %d images', output / f'{name}.tar', count)


if __name__ == '__main__':
  for name, text in (
    ('emojibase', 'The .tgz of npm package emojibase-data: the names.'),
    ('fluent', 'The .tgz of npm package @lobehub/fluent-emoji-3d.'),
    ('noto', 'The font NotoColorEmoji.ttf, with bitmaps.'),
  ):
    flag_types.define(
      name,
      None,
      value_types.Path('file'),
      text,
      required=name == 'emojibase',
    )
  flag_types.define_repeated(
    'animated',
    [],
    value_types.Path('file'),
    'The .tgz of npm package @lobehub/fluent-emoji-anim-1, or 2 to 4.',
  )
  flag_types.define(
    'output',
    None,
    value_types.Path('directory', output=True),
    'Directory to write the tars to.',
    required=True,
  )
  flag_types.integer(
    'resolution',
    0,
    0,
    1024,
    'Side in pixels at which images are stored, so that training decodes them '
    'faster; 0: as they are.',
  )
  command.run(main)
