"""A page of pictures that a browser opens from disk."""

import base64
from collections.abc import Iterable, Mapping
import dataclasses
import html
import io
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

_THUMBNAIL = 256  # pixels; smaller levels are shown enlarged
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
{figures}
</main>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A picture and what is said of it.

  Attributes:
    caption: the prompt.
    levels: uint8 [H_r, H_r, 3] each, coarse to fine.
    links: where the files of the levels lie, as seen from the page.
    details: what else sets it apart, such as its seed.
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
  """Writes a page that needs no other file but those it links to.

  Args:
    path: of the page, replaced at once.
    title: of the page.
    tables: what holds for all pictures: headings, and names and values.
    entries: the pictures, of which it keeps only small copies.
  """
  path = pathlib.Path(path)
  figures = list(map(_figure, entries))
  width = max((164 * figure.count('<img') for figure in figures), default=164)
  text = _PAGE.format(
    title=html.escape(title),
    width=width,
    figures='\n'.join(figures),
    tables='\n'.join(map(_table, tables, tables.values())),
  )
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)


def _table(heading: str, values: Mapping[str, Any]) -> str:
  rows = ''.join(
    f'<tr><td>{html.escape(str(name))}</td>'
    f'<td>{html.escape(str(value))}</td></tr>'
    for name, value in values.items()
  )
  return (
    f'<details open><summary>{html.escape(heading)}</summary>'
    f'<table>{rows}</table></details>'
  )


def _figure(entry: Entry) -> str:
  images = ''.join(
    f'<a href="{html.escape(link)}"><img src="{_thumbnail(level)}" '
    f'alt="{len(level)} pixels"></a>'
    for level, link in zip(entry.levels, entry.links, strict=True)
  )
  details = ', '.join(
    f'{name} {value}' for name, value in entry.details.items()
  )
  return (
    f'<figure><div>{images}</div>'
    f'<figcaption>{html.escape(entry.caption)} '
    f'<small>{html.escape(details)}</small></figcaption></figure>'
  )


def _thumbnail(image: np.ndarray) -> str:
  picture, file = Image.fromarray(image), io.BytesIO()
  picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
  # Few pixels are worth keeping as they are.
  picture.save(file, 'WebP', lossless=picture.width <= 64, quality=85)
  data = base64.b64encode(file.getvalue()).decode()
  return f'data:image/webp;base64,{data}'
