"""Search results as an HTML page: each query beside its nearest images.

The page is self-contained: styles and thumbnails are embedded, nothing is fetched and no script runs. It follows the
reader's light or dark setting, and on a phone the images appear below their query. Markup is in templates/search.html.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dist_proxygml.reporting.render import render
from dist_proxygml.reporting.thumbnails import SIDE, data_url
from dist_proxygml.storage.files import publish_text


class Tile(NamedTuple):
    """One image of the page."""

    name: str
    pixels: torch.Tensor | None  # uint8 RGB [3, h, w]; None where the image is not at hand
    score: float | None = None  # None for a query
    class_name: str | None = None
    is_doubtful: bool = False

    @property
    def picture(self) -> str | None:
        """The thumbnail as a data URL."""
        if self.pixels is None:
            return None
        image = Image.fromarray(np.ascontiguousarray(self.pixels.permute(1, 2, 0).numpy()))
        image.thumbnail((SIDE, SIDE))
        return data_url(image)


class Row(NamedTuple):
    """One query with what was found."""

    query: Tile
    nearest: Sequence[Tile]
    nothing: str  # what to say where nothing was


def write_page(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    lead: str,
    makers: str | None = None,
    pages: Sequence[str] = (),
) -> None:
    """Publish the page atomically.

    Args:
        path: the file.
        rows: the queries in order.
        title, lead: its heading, and the sentence below.
        makers: who made the images, where that must be said with them.
        pages: names of the files of all pages beside it, itself included; linked where there are several.
    """
    page = render("search.html", rows=rows, title=title, lead=lead, makers=makers, pages=pages, own_name=path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, page)
