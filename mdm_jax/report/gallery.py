"""Writes an HTML page of samples that a browser opens from disk."""

import base64
from collections.abc import Iterable, Mapping
import dataclasses
import html
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from mdm_jax.runtime import files
from mdm_jax.runtime.printable import printable

_THUMBNAIL = 256  # largest width and height of a thumbnail in pixels
# Names of settings as the page shows them; others are shown as they are.
_NAMES = {
  'workdir': 'run',
  'step': 'training step',
  'fingerprint': 'hash of the checkpoint',
  'name': 'sampler',
  'num_steps': 'sampling steps',
  'eta': 'eta (noise that DDIM adds)',
  'guidance': 'guidance weight (CFG; 1 is none)',
  'guidance_rescale': 'guidance rescale (0 is none)',
  'guidance_interval': 'guidance interval (fractions of T)',
  'threshold': 'threshold of the predicted x0',
  'pixels': 'from floats to pixels',
  'level_offset': 'offset of the levels (nats of log-SNR)',
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; color: #282828;
  max-width: 90em; padding: 0 1em; }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5em; }}
figure {{ margin: 0; width: {width}px; max-width: 100%; }}
figure div {{ display: flex; gap: 4px; margin-bottom: 4px; }}
figure div a {{ flex: 0 1 160px; }}
img {{ width: 100%; image-rendering: pixelated; display: block; }}
figcaption {{ overflow-wrap: anywhere; }}
small, summary {{ color: #666; }}
details {{ margin-top: 1em; }}
td {{ padding-right: 1.5em; vertical-align: top; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p>{help}</p>
<main>
{entries}
</main>
{tables}
</html>
"""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A sample on the page.

  Attributes:
    caption: the prompt.
    levels: images of the levels, uint8 [H_r, H_r, 3], or clips; coarse to fine.
    links: paths of the levels' files, relative to the page.
    details: further values to show, such as the seed.
    animation: path of an animation of the sampling steps, relative to the page;
      None for none.
  """

  caption: str
  levels: tuple[np.ndarray, ...]
  links: tuple[str, ...]
  details: Mapping[str, Any]
  animation: str | None = None


def save(
  path: str | os.PathLike,
  title: str,
  tables: Mapping[str, Mapping[str, Any]],
  entries: Iterable[Entry],
) -> None:
  """Writes a page with embedded thumbnails and links to the full images.

  Animations are not embedded: they are shown from their files.

  Args:
    path: path of the page.
    title: title of the page.
    tables: tables of names and values to show below the samples, by heading.
    entries: the samples.
  """
  texts, levels, animated = [], 1, False
  for entry in entries:  # One at a time, as many large images fill the memory.
    texts.append(_figure(entry))
    levels = max(levels, len(entry.levels))
    animated |= entry.animation is not None
  about = (
    'The levels of each sample are side by side, coarse to fine. Click one for '
    'its file.'
  )
  if animated:
    about += (
      ' Below them is what the model predicted at each sampling step, from '
      'noise to the sample.'
    )
  text = _PAGE.format(
    title=_escape(title),
    help=about,
    width=164 * levels - 4,
    entries='\n'.join(texts),
    tables='\n'.join(map(_table, tables, tables.values())),
  )
  files.write_text(path, text)


def _escape(value: Any) -> str:
  return html.escape(printable(str(value)))


def _table(heading: str, values: Mapping[str, Any]) -> str:
  rows = ''.join(
    f'<tr><td>{_escape(_NAMES.get(name, name.replace("_", " ")))}</td>'
    f'<td>{_escape(_value(value))}</td></tr>'
    for name, value in values.items()
  )
  return (
    f'<details open><summary>{_escape(heading)}</summary>'
    f'<table>{rows}</table></details>'
  )


def _value(value: Any) -> Any:
  match value:
    case None | '':
      return 'none'
    case list() | tuple():
      return ' to '.join(map(str, value))
    case dict():  # of a guide
      return ', '.join(f'{key} {_value(item)}' for key, item in value.items())
  return value


def _figure(entry: Entry) -> str:
  images = ''.join(
    f'<a href="{_escape(link)}"><img src="{_source(level, link)}" '
    f'alt="{level.shape[-2]} pixels"></a>'
    for level, link in zip(entry.levels, entry.links, strict=True)
  )
  details = ', '.join(
    f'{name} {value}' for name, value in entry.details.items()
  )
  animation = ''
  if entry.animation:
    link = _escape(entry.animation)
    animation = (
      f'<a href="{link}"><img src="{link}" alt="sampling steps" '
      'loading="lazy"></a>'
    )
  return (
    f'<figure><div>{images}</div>{animation}'
    f'<figcaption>{_escape(entry.caption)} '
    f'<small>{_escape(details)}</small></figcaption></figure>'
  )


def _source(level: np.ndarray, link: str) -> str:
  """An embedded thumbnail; clips are played from their files."""
  return _thumbnail(level) if level.ndim == 3 else _escape(link)


def _thumbnail(image: np.ndarray) -> str:
  thumbnail, file = Image.fromarray(image), io.BytesIO()
  thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
  # Small images are lossless, since their pixels are shown enlarged.
  thumbnail.save(file, 'WebP', lossless=thumbnail.width <= 64, quality=85)
  data = base64.b64encode(file.getvalue()).decode()
  return f'data:image/webp;base64,{data}'
