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
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; color: #282828;
  max-width: 90em; padding: 0 1em; }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5em; }}
figure {{ margin: 0; max-width: {width}px; }}
figure div {{ display: flex; gap: 4px; }}
img {{ width: 160px; image-rendering: pixelated; display: block; }}
figcaption {{ overflow-wrap: anywhere; }}
small, summary {{ color: #666; }}
td {{ padding-right: 1.5em; vertical-align: top; }}
</style>
<h1>{title}</h1>
{tables}
<main>
{entries}
</main>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A sample on the page.

  Attributes:
    caption: the prompt.
    levels: images of the levels, uint8 [H_r, H_r, 3], coarse to fine.
    links: paths of the levels' files, relative to the page.
    details: further values to show, such as the seed.
  """

  caption: str
  levels: tuple[np.ndarray, ...]
  links: tuple[str, ...]
  details: Mapping[str, Any]


def save(
  path: str | os.PathLike,
  title: str,
  tables: Mapping[str, Mapping[str, Any]],
  entries: Iterable[Entry],
) -> None:
  """Writes a page with embedded thumbnails and links to the full images.

  Args:
    path: path of the page.
    title: title of the page.
    tables: tables of names and values to show above the samples, by heading.
    entries: the samples.
  """
  texts = list(map(_figure, entries))
  width = max((164 * text.count('<img') for text in texts), default=164)
  text = _PAGE.format(
    title=_escape(title),
    width=width,
    entries='\n'.join(texts),
    tables='\n'.join(map(_table, tables, tables.values())),
  )
  files.write_text(path, text)


def _escape(value: Any) -> str:
  return html.escape(printable(str(value)))


def _table(heading: str, values: Mapping[str, Any]) -> str:
  rows = ''.join(
    f'<tr><td>{_escape(name)}</td><td>{_escape(value)}</td></tr>'
    for name, value in values.items()
  )
  return (
    f'<details open><summary>{_escape(heading)}</summary>'
    f'<table>{rows}</table></details>'
  )


def _figure(entry: Entry) -> str:
  images = ''.join(
    f'<a href="{_escape(link)}"><img src="{_thumbnail(level)}" '
    f'alt="{len(level)} pixels"></a>'
    for level, link in zip(entry.levels, entry.links, strict=True)
  )
  details = ', '.join(
    f'{name} {value}' for name, value in entry.details.items()
  )
  return (
    f'<figure><div>{images}</div>'
    f'<figcaption>{_escape(entry.caption)} '
    f'<small>{_escape(details)}</small></figcaption></figure>'
  )


def _thumbnail(image: np.ndarray) -> str:
  thumbnail, file = Image.fromarray(image), io.BytesIO()
  thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
  # Small images are lossless, since their pixels are shown enlarged.
  thumbnail.save(file, 'WebP', lossless=thumbnail.width <= 64, quality=85)
  data = base64.b64encode(file.getvalue()).decode()
  return f'data:image/webp;base64,{data}'
