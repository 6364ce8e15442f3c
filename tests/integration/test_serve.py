"""The page to search on: the real command, asked by a real browser and by requests that it must refuse."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from PIL import Image

from dist_proxygml.embed import main as embed_main
from dist_proxygml.index import main as index_main
from dist_proxygml.serve import main as serve_main
from tests.shards_of_noise import write_noise_shards
from tests.trained_runs import write_finished_run

NUM_PHOTOS = 40


class Answer(NamedTuple):
    """What a request brought."""

    status: int
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Server(NamedTuple):
    """A running server."""

    url: str
    photos: Path
    index: Path
    run: Path

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return Answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read())


@contextmanager
def serving(photos: Path, index: Path, run: Path, *options: str) -> Iterator[Server]:
    """The command, until the block ends; it must end by itself when it is asked to."""
    command = [sys.executable, "-m", "dist_proxygml.serve", "--index", str(index), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield Server(line.split()[4], photos, index, run)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("serve")
    generator = np.random.default_rng(0)
    (root / "photos").mkdir()
    for number in range(NUM_PHOTOS):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
        image.save(root / "photos" / f"{number:02d} é.png")
    run = write_finished_run(root / "runs")
    embed_main(["--run", str(run), "--data", str(root / "photos"), "--out", str(root / "e")])
    assert index_main(["--embeddings", str(root / "e"), "--out", str(root / "index")]) == 0
    with serving(root / "photos", root / "index", run) as started:
        yield started


def photo(server: Server, number: int) -> bytes:
    return (server.photos / f"{number:02d} é.png").read_bytes()


def test_an_image_finds_itself_first_and_pages_continue(server: Server) -> None:
    pages = [server.ask("POST", f"/api/search?k=16&skip={skip}", photo(server, 7)).json for skip in (0, 16, 32)]
    matches = [match for page in pages for match in page["matches"]]
    assert matches[0]["id"] == "07 é.png"
    assert matches[0]["score"] == pytest.approx(1, abs=1e-5)
    assert [match["rank"] for match in matches] == list(range(1, NUM_PHOTOS + 1))
    assert len({match["id"] for match in matches}) == NUM_PHOTOS
    assert [page["more"] for page in pages] == [True, True, False]
    like = server.ask("POST", f"/api/search?k=5&like={quote('07 é.png')}").json["matches"]
    assert [match["id"] for match in like] == [match["id"] for match in matches[1:6]]


def test_mistakes_are_answered(server: Server) -> None:
    assert server.ask("POST", "/api/search", b"no image").status == 422
    assert server.ask("POST", "/api/search", b"").status == 422
    assert server.ask("POST", "/api/search?k=0", photo(server, 0)).status == 422
    assert server.ask("POST", "/api/search?like=nobody").status == 404
    assert server.ask("GET", f"/api/image?id={quote('../index/ids.jsonl')}").status == 404
    assert server.ask("DELETE", "/api/images?id=nobody").status == 404
    taken = server.ask("POST", f"/api/images?id={quote('07 é.png')}", photo(server, 7))
    assert taken.status == 422
    assert "07 é.png" in taken.json["detail"]
    assert server.ask("POST", "/api/search", bytes(65 << 20)).status == 413


def test_pages_of_other_sites_can_ask_for_nothing(server: Server) -> None:
    assert server.ask("GET", "/api/index", Host="attacker.example").status == 421
    assert server.ask("GET", "/api/index", Host="[::1").status == 421
    assert server.ask("GET", "/api/index", Origin="http://[").status == 403
    other = server.ask("POST", "/api/images?id=x", photo(server, 0), Origin="https://attacker.example")
    assert other.status == 403
    own = server.ask("POST", "/api/search", photo(server, 0), Origin=server.url)
    assert own.status == 200


def test_the_page_in_a_browser(browser: Any, server: Server, tmp_path: Path) -> None:
    """Search, more, an answer's own neighbours, add, remove; all of it from this server, without a complaint."""
    from playwright.sync_api import expect

    upload = tmp_path / "new bird.png"
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (50, 80, 3), dtype=np.uint8)).save(upload)
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    try:
        page = context.new_page()
        complaints: list[str] = []
        hosts: set[str] = set()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(server.url)
        page.get_by_text(f"{NUM_PHOTOS} images in a flat index").wait_for()

        page.set_input_files("#file", str(server.photos / "03 é.png"))
        first = page.locator("figure").first
        first.get_by_text("03 é.png").wait_for()
        assert first.locator("b").inner_text() == "1.00000"
        assert page.locator("figure").count() == 24
        page.get_by_role("button", name="More").click()
        page.locator("figure").nth(NUM_PHOTOS - 1).wait_for()
        assert page.get_by_role("button", name="More").is_hidden()
        second = page.locator("figure").nth(1)
        second_name = str(second.locator("img").get_attribute("alt"))
        second.locator(".like").click()
        expect(page.locator("figure")).to_have_count(24)
        names = page.locator("figure img").evaluate_all("images => images.map(image => image.alt)")
        assert second_name not in names

        page.set_input_files("#file", str(upload))
        page.locator("#new-class").fill("bird <b>")
        page.get_by_role("button", name="Add to the index").click()
        page.get_by_text(f"{NUM_PHOTOS + 1} images").wait_for()
        page.set_input_files("#file", str(server.photos / "03 é.png"))
        page.get_by_text("1.00000").wait_for()
        page.set_input_files("#file", str(upload))
        added = page.locator("figure").filter(has_text="bird <b>")
        added.wait_for()
        for number in range(6):
            expect(page.locator("figure img").nth(number)).not_to_have_js_property("naturalWidth", 0)
        for width in (400, 1200):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.locator("html").evaluate("page => page.scrollWidth <= page.clientWidth")
        if "DIST_PROXYGML_SCREENSHOTS" in os.environ:
            page.screenshot(path=Path(os.environ["DIST_PROXYGML_SCREENSHOTS"], "serve.png"))
        added.hover()
        added.get_by_role("button", name="Remove").click()
        page.get_by_text("new bird.png is removed").wait_for()
        page.get_by_text(f"{NUM_PHOTOS} images").wait_for()

        page.locator("#least").fill("1")
        page.locator("#least").press("Enter")
        page.get_by_text("Nothing with a score of 1 or more").wait_for()
        assert complaints == []
        assert hosts == {urlsplit(server.url).netloc, ""}  # "": the query's own picture
    finally:
        context.close()


def test_a_second_server_needs_changes_of_its_own_and_may_be_read_only(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--index", str(server.index), "--port"]
    assert serve_main([*command, "0"]) == 2
    assert "--changes" in capfd.readouterr().err
    write_noise_shards(tmp_path / "shards", [4, 9, 7])
    embed_main(["--run", str(server.run), "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "e")])
    assert index_main(["--embeddings", str(tmp_path / "e"), "--out", str(tmp_path / "labelled")]) == 0
    with serving(server.photos, tmp_path / "labelled", server.run, "--read-only") as other:
        doubt = other.ask("GET", "/api/index").json["doubt"]  # measured where classes are known
        assert "doubtful" in doubt["sentence"]
        assert -1 <= doubt["below"] <= 2
        assert other.ask("POST", "/api/search", photo(server, 0)).status == 200
        assert other.ask("POST", "/api/images?id=x", photo(server, 0)).status == 404
        assert other.ask("DELETE", f"/api/images?id={quote('07 é.png')}").status == 404
    assert not (tmp_path / "labelled.changes").exists()
    port = str(urlsplit(server.url).port)
    assert serve_main([*command, port]) == 2
    assert f":{port}" in capfd.readouterr().err
    assert serve_main([*command, "0", "--host", "0.0.0.0"]) == 2
    assert "--read-only" in capfd.readouterr().err
