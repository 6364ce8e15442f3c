"""The report in a real browser: everything on it is drawn, fits a phone and a desk, in the light and in the dark."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.reporting.page import write_report
from tests.report_runs import write_picture_shards, write_run

LOOK = """() => ({
    images: document.images.length,
    broken: [...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.alt),
    collapsed: [...document.images].filter(image => image.getBoundingClientRect().width < 40).map(image => image.alt),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    scrolled: [...document.querySelectorAll('.scroll')].filter(part => part.scrollWidth > part.clientWidth).length,
    outside: [...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, pre'))
        .filter(element => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map(element => element.outerHTML.slice(0, 80)),
    background: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
})"""


class View(NamedTuple):
    """A page as it was drawn."""

    seen: dict[str, Any]
    complaints: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section full, and a class name that is too long for any line."""
    folder = tmp_path_factory.mktemp("report")
    generator = np.random.default_rng(0)
    tiles = generator.integers(0, 256, (60, 12, 12, 3)).astype(np.uint8)
    pictures = [Image.fromarray(tile).resize((90, 60), Image.Resampling.BICUBIC) for tile in tiles]
    files = [encoded(picture) for picture in pictures]
    splits = write_picture_shards(
        folder / "shards",
        {
            "test": [(file, number // 5) for number, file in enumerate(files[:50])],
            "train": [(files[50], 0), (files[3], 1), (encoded(pictures[7].resize((150, 100))), 1)],
        },
        names={"test": ["x" * 70 + " & <long>", *(f"class {label}" for label in range(1, 10))]},
    )
    run = write_run(folder / "run", splits["test"], name="A <name> & more")
    return write_report(run, splits["test"])


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def view(browser: Any, path: Path, *, width: int, scheme: str) -> View:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    try:
        page = context.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri(), wait_until="load")
        return View(page.evaluate(LOOK), complaints, [url for url in requests if not url.startswith("data:")])
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_everything_is_drawn_and_fits(browser: Any, report: Path, width: int, scheme: str) -> None:
    seen, complaints, requests = view(browser, report, width=width, scheme=scheme)
    assert complaints == []
    assert requests == [report.as_uri()]  # the page itself, and nothing else
    assert seen["images"] > 150
    assert (seen["broken"], seen["collapsed"]) == ([], [])
    assert (seen["overflow"], seen["outside"], seen["scrolled"]) == (0, [], 0)


def test_light_and_dark_are_what_the_reader_asks_for(browser: Any, report: Path) -> None:
    bright = {}
    for scheme in ("light", "dark"):
        seen = view(browser, report, width=800, scheme=scheme).seen
        for part in ("background", "text"):
            channels = seen[part].removeprefix("rgb(").removesuffix(")").split(",")
            bright[scheme, part] = sum(map(int, channels)) / 3 / 255
    assert bright["light", "background"] > 0.9 > 0.3 > bright["light", "text"]
    assert bright["dark", "background"] < 0.2 < 0.8 < bright["dark", "text"]


def test_what_should_be_seen_here_would_be_seen(browser: Any, report: Path, tmp_path: Path) -> None:
    """The checks above notice a page that loads, breaks or overflows."""
    broken = tmp_path / "broken.html"
    html = report.read_text().replace("</main>", '<img src="data:image/png;base64,AAAA" alt="none">' + "</main>")
    html = html.replace("<h1>", '<h1 style="width: 900px">').replace("<main>", '<main><img src="http://x.test/y.png">')
    broken.write_text(html)
    seen, complaints, _ = view(browser, broken, width=360, scheme="light")
    assert seen["broken"][-1] == "none"
    assert seen["overflow"] > 500
    assert any("Content Security Policy" in complaint for complaint in complaints)
