"""The documentation as a site: it builds without a warning, and a browser finds its way without asking anybody else."""

import functools
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the built site is served."""
    project = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "mkdocs.yml", project)
    shutil.copytree(ROOT / "docs", project / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    folder = project / "build" / "site"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_site_leads_from_home_to_the_loss_and_finds_a_setting(site: str, browser: Any) -> None:
    page = browser.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda response: errors.append(response.url) if response.status >= 400 else None)

    page.goto(f"{site}/index.html")
    page.get_by_role("link", name="the API", exact=True).click()
    described = page.locator(".doc-class", has=page.locator("#dist_proxygml\\.head\\.loss\\.ProxyGMLLoss"))
    assert "regularization_weight" in described.inner_text()
    assert "classes are partitioned" in described.inner_text()
    assert page.locator("article [id^='dist_proxygml.']").count() >= 7

    page.get_by_role("button", name="Search").first.click()
    page.get_by_role("dialog", name="Search").locator("input").fill("step_timeout")
    page.get_by_role("dialog", name="Search").get_by_text("A step that hangs").wait_for()

    assert errors == []
    assert all(url.startswith((site, "data:", "blob:")) for url in requests), requests
    page.close()


def test_every_page_of_the_documentation_is_in_the_navigation() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert {page for page in pages if page not in navigation} == set()
