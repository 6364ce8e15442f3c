"""An export goes to the Hugging Face Hub and comes back: huggingface_hub's own client, against a stand-in of the Hub.

The stand-in speaks the part of the Hub's protocol that files below 5 MB need: they travel inside the commit.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from dist_proxygml import Embedder
from dist_proxygml.export import main
from dist_proxygml.inference import hub
from tests.trained_runs import write_finished_run

COMMIT = "c0ffee" + 34 * "0"


class Hub:
    """What the stand-in holds and was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.fetched: list[str] = []
        self.fails_to_commit = False


def handler_of(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, content: Any, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if path == "/api/repos/create":
                state.created.append(json.loads(body))
                self.answer({"url": f"http://{self.headers['Host']}/birds/finches", "id": "birds/finches"})
            elif path == "/api/validate-yaml":  # the head of the card
                self.answer({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                self.answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
            elif path.endswith("/commit/main") and not state.fails_to_commit:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                url = f"http://{self.headers['Host']}/birds/finches/commit/{COMMIT}"
                self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
            else:
                self.answer({"error": "out of order"}, 400, X_Error_Message="out of order")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/api/whoami-v2":
                known = self.headers.get("Authorization") == "Bearer hf_right"
                self.answer({"name": "ada", "type": "user", "orgs": []}, 200 if known else 401)
            elif path.startswith("/api/models/birds/finches/tree/"):
                self.answer([{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in state.files.items()])
            elif path.startswith("/api/models/birds/finches"):
                siblings = [{"rfilename": name} for name in state.files]
                self.answer({"id": "birds/finches", "sha": COMMIT, "siblings": siblings, "private": True})
            elif (name := path.removeprefix(f"/birds/finches/resolve/{COMMIT}/")) in state.files:
                data = state.files[name]
                if self.command == "GET":
                    state.fetched.append(name)
                self.answer(data, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
            else:
                self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

    return Handler


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    listener = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    thread = Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose checkpoint has a backbone; its bank is made up."""

    class Bank:
        shape = (3, 2, 4)

        def parts(self) -> list[tuple[int, int]]:
            return [(0, 3)]

        def read_(self, rows_xND: torch.Tensor, *, first: int) -> None:
            rows_xND.fill_(first)

    monkeypatch.setattr("dist_proxygml.checkpoint.model.TrainedModel.bank", lambda self: Bank())
    return write_finished_run(tmp_path / "runs")


def push(run: Path, out: Path) -> int:
    return main(["--run", str(run), "--out", str(out), "--push-to-hub", "birds/finches"])


def test_what_is_pushed_comes_back_as_the_same_model(
    run: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, tmp_path / "export") == 0
    assert f"pushed to {constants.ENDPOINT}/birds/finches/commit/{COMMIT}" in capsys.readouterr().out
    assert server.created[0].get("private") or server.created[0]["visibility"] == "private"
    assert server.created[0]["name"] == "finches"
    written = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    assert server.files == written

    # The repository's owner adds what is no part of an export; none of it is fetched.
    server.files |= {"modeling.py": b"raise SystemExit", "weights.pkl": b"\x80", ".gitattributes": b"*"}
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    fetched = Embedder.from_pretrained("hf-hub:birds/finches", device="cpu")
    np.testing.assert_array_equal(fetched.embed(images), Embedder.from_run(run, device="cpu").embed(images))
    assert {*server.fetched} == written.keys()
    np.testing.assert_array_equal(
        Embedder.from_pretrained(tmp_path / "export", device="cpu").embed(images), fetched.embed(images)
    )


def test_a_file_that_was_changed_on_the_hub_is_refused(run: Path, server: Hub, tmp_path: Path) -> None:
    assert push(run, tmp_path / "export") == 0
    server.files["backbone.safetensors"] = server.files["backbone.safetensors"][:-1] + b"\x01"
    with pytest.raises(ValueError, match=r"backbone\.safetensors"):
        Embedder.from_pretrained("hf-hub:birds/finches", device="cpu")


def test_a_repository_of_something_else_is_refused(server: Hub) -> None:
    server.files |= {"config.json": b"{}", "model.safetensors": b"x", "modeling.py": b"raise SystemExit"}
    with pytest.raises(ValueError, match=r"hf-hub:birds/finches, found no export\.json"):
        Embedder.from_pretrained("hf-hub:birds/finches", device="cpu")


def test_a_repository_that_is_not_there_is_named(server: Hub) -> None:
    with pytest.raises(ValueError, match=r"cannot fetch hf-hub:birds/sparrows.*check the name"):
        Embedder.from_pretrained("hf-hub:birds/sparrows", device="cpu")


def test_a_push_without_the_right_token_is_refused_before_anything_is_written(
    run: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(run, tmp_path / "export") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
    assert server.files == {}


def test_a_name_that_is_none_is_refused_before_anything_is_asked(server: Hub) -> None:
    with pytest.raises(ValueError, match=r"ORGANISATION/NAME.*'a/b/c'"):
        hub.check_push("a/b/c")


def test_an_export_that_cannot_be_pushed_stays_and_the_message_says_how_to_push_it(
    run: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fails_to_commit = True
    assert push(run, tmp_path / "export") == 2
    assert f"hf upload birds/finches {tmp_path / 'export'}" in capsys.readouterr().err
    assert Embedder.from_pretrained(tmp_path / "export", device="cpu").embedding_dim == 4


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision"):
        Embedder.from_pretrained(tmp_path, revision="v1")
