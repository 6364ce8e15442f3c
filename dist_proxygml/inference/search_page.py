"""What a search found, as one HTML page for people: each query beside its nearest images.

The page is one file: styles and thumbnails are inside, nothing is fetched and no script runs. It follows the reader's
light or dark setting, and on a phone the images stand under their query.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dist_proxygml.data.shards import publish
from dist_proxygml.reporting.thumbnails import SIDE, data_url

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --text: #1c1e21; --quiet: #62676e; --line: #e3e4e6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --text: #e6e7e9; --quiet: #9aa0a8; --line: #2d3136; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.5rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
p { margin: 0.5rem 0 2rem; color: var(--quiet); }
section { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 1.6rem; padding: 1.1rem 0;
  border-top: 1px solid var(--line); align-items: start; }
.nearest { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 0.9rem; }
.nearest p { grid-column: 1 / -1; margin: 0; }
figure { margin: 0; }
img, .missing { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; padding: 4px; background: #ffffff;
  border: 1px solid var(--line); border-radius: 8px; }
.query img { border: 2px solid var(--text); }
.missing { display: grid; place-items: center; color: #62676e; font-size: 0.75rem; text-align: center; }
figcaption { margin-top: 0.3rem; font-size: 0.78rem; line-height: 1.3; color: var(--quiet); overflow-wrap: anywhere; }
figcaption b { display: block; color: var(--text); font-variant-numeric: tabular-nums; }
.query figcaption { font-weight: 600; color: var(--text); }
details { margin-top: 2rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: 0.9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem; }
  section { grid-template-columns: minmax(0, 1fr); gap: 0.8rem; }
  .query { width: 7rem; }
  .nearest { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0.6rem; }
}
"""


class Tile(NamedTuple):
    """One image of the page."""

    name: str
    pixels: torch.Tensor | None  # uint8 RGB [3, h, w]; None where the image is not at hand
    score: float | None = None  # None for a query
    class_name: str | None = None


class Row(NamedTuple):
    """One query with what was found."""

    query: Tile
    nearest: Sequence[Tile]
    nothing: str  # what to say where nothing was


def write_page(path: Path, rows: Sequence[Row], *, title: str, lead: str, makers: str | None = None) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the file.
        rows: the queries in order.
        title, lead: its heading, and the sentence below.
        makers: who made the images, where that must be said with them.
    """
    sections = []
    for row in rows:
        nearest = "".join(_figure(tile) for tile in row.nearest) or f"<p>{escape(row.nothing)}</p>"
        query = f'<div class="query">{_figure(row.query)}</div>'
        sections.append(f'<section>{query}<div class="nearest">{nearest}</div></section>')
    if makers is not None:
        sections.append(f"<details><summary>The makers of these images</summary><pre>{escape(makers)}</pre></details>")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as stream:
        stream.write(page.encode("utf-8"))


def _figure(tile: Tile) -> str:
    described = tile.name if tile.class_name is None else f"{tile.class_name}: {tile.name}"
    if tile.pixels is None:
        picture = '<span class="missing">not at hand</span>'
    else:
        picture = f'<img src="{_data_address(tile.pixels)}" alt="{escape(described, quote=True)}">'
    score = "" if tile.score is None else f"<b>{tile.score:.3f}</b>"
    return f"<figure>{picture}<figcaption>{score}{escape(described)}</figcaption></figure>"


def _data_address(pixels: torch.Tensor) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    image.thumbnail((SIDE, SIDE))
    return data_url(image)
