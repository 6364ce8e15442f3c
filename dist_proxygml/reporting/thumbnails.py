"""Small pictures of a split's images as data URLs, each of bounded size.

A page holds at most a few hundred of them, so a bound on each bounds the page. PNG where that is smaller (drawings),
otherwise JPEG with decreasing quality until it fits; an image that never fits (noise) is halved in size.
"""

import base64
import io
from functools import partial

from PIL import Image

from dist_proxygml.data.images import decode_small
from dist_proxygml.data.index import ShardIndex
from dist_proxygml.data.pipeline import ShardImages
from dist_proxygml.data.transforms import Resize

SIDE = 128  # maximum pixels: twice the displayed size, for high-resolution screens
MAX_BYTES = 16_000  # of one picture, before base64 makes it a third longer
_QUALITIES = (85, 70, 50)


class Thumbnails:
    """Pictures of a split by sample id. Raises ValueError naming the sample if one cannot be read."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._images = ShardImages(index, Resize(SIDE))
        self._urls: dict[int, str] = {}

    def url(self, sample_id: int) -> str:
        """Return a picture as a data URL."""
        if sample_id not in self._urls:
            decode = partial(decode_small, side=SIDE, upright=self.index.upright)
            self._urls[sample_id] = data_url(self._images.read(sample_id, decode))
        return self._urls[sample_id]

    def file(self, sample_id: int) -> bytes:
        """Return the bytes of an image file."""
        return self._images.read(sample_id, bytes)


def data_url(image: Image.Image) -> str:
    """Encode a picture in at most MAX_BYTES as a data URL."""
    kind, payload = min(
        (_encoded(image, "png"), _encoded(image, "jpeg", quality=_QUALITIES[0])),
        key=lambda candidate: len(candidate[1]),
    )
    while len(payload) > MAX_BYTES:
        for quality in _QUALITIES[1:]:
            kind, payload = _encoded(image, "jpeg", quality=quality)
            if len(payload) <= MAX_BYTES:
                break
        image = image.reduce(2)
    return f"data:image/{kind};base64,{base64.b64encode(payload).decode('ascii')}"


def _encoded(image: Image.Image, kind: str, **options: int) -> tuple[str, bytes]:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return kind, stream.getvalue()
