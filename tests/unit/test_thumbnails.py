"""Small pictures: bounded in bytes whatever is on them, and what they show."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.reporting.thumbnails import MAX_BYTES, SIDE, Thumbnails, data_url
from tests.report_runs import write_picture_shards


def decoded(url: str) -> Image.Image:
    head, _, payload = url.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))


@pytest.mark.parametrize("limit", [MAX_BYTES, 3000, 700])
def test_noise_fits_as_well(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("dist_proxygml.reporting.thumbnails.MAX_BYTES", limit)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    url = data_url(Image.fromarray(noise))
    assert len(url) <= limit * 4 / 3 + 40
    assert decoded(url).size[0] >= 16


def test_a_drawing_keeps_every_pixel_and_a_large_image_its_proportions(tmp_path: Path) -> None:
    drawing = Image.new("RGB", (40, 20), "white")
    drawing.paste((200, 30, 30), (10, 5, 30, 15))
    wide = Image.fromarray(np.tile(np.arange(0, 250, 1, dtype=np.uint8), (200, 4))).convert("RGB")
    streams = [io.BytesIO(), io.BytesIO()]
    drawing.save(streams[0], "PNG")
    wide.save(streams[1], "JPEG")
    index = write_picture_shards(tmp_path, {"test": [(stream.getvalue(), 0) for stream in streams]})["test"]
    thumbnails = Thumbnails(index)
    assert np.array_equal(np.asarray(decoded(thumbnails.url(0)).convert("RGB")), np.asarray(drawing))
    assert decoded(thumbnails.url(1)).size == (SIDE, 26)  # of 1000 x 200
    assert thumbnails.file(0) == streams[0].getvalue()


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    index = write_picture_shards(tmp_path, {"test": [(b"\xff\xd8\xff no image", 0)]})["test"]
    with pytest.raises(ValueError, match=r"test-00000000\b.*label 0\b.*decode"):
        Thumbnails(index).url(0)
