"""Remote shards: a server that fails, stalls, cuts and corrupts; commands that do; several processes; the limit."""

import asyncio
import errno
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import re
import select
import selectors
import shlex
import signal
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import aiohttp  # noqa: F401  # its first import takes longer than the time-outs here
import fsspec
import pytest

from dist_proxygml.data import remote
from dist_proxygml.data.remote import ShardCache, file_url, is_remote
from dist_proxygml.data.shards import ShardReader
from dist_proxygml.storage.lock import locked_file

CONTENT = random.Random(3).randbytes(200_003)
OTHER = random.Random(5).randbytes(150_001)
THIRD = random.Random(7).randbytes(180_007)
SECONDS = 20  # far more than anything here takes, far less than for ever

pytestmark = pytest.mark.timeout(240)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shard(file: str, content: bytes) -> dict[str, Any]:
    return {"file": file, "num_bytes": len(content), "sha256": sha256(content)}


FIRST = shard("train-000000.tar", CONTENT)


@dataclass
class Reply:
    """What the server does with one request; by default it serves the file."""

    status: int = 200
    num_sent: int | None = None  # of the body's bytes
    claimed: int | None = None  # Content-Length; 0: no such header
    flipped: bool = False  # one bit
    surplus: bytes = b""
    redirect: str = ""
    stalls: bool = False  # after the bytes that are sent, until the server is closed
    gated: bool = False  # serves, once `gate` is set

    def __str__(self) -> str:  # for the names of tests
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{name}={getattr(self, name)}" for name in changed)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.replies: list[Reply] = []  # to the next requests
        self.requests: list[str] = []
        self.tokens: list[str | None] = []  # that came with them
        self.arrived = threading.Condition()
        self.gate = threading.Event()
        self.stalled = threading.Event()
        self.cut_off = threading.Event()  # somebody hung up before the end
        self.closed = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set"

    def wait_for_requests(self, number: int, *, seconds: float = SECONDS) -> bool:
        with self.arrived:
            return self.arrived.wait_for(lambda: len(self.requests) >= number, timeout=seconds)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        with self.server.arrived:
            self.server.requests.append(self.path)
            self.server.tokens.append(self.headers["Authorization"])
            reply = self.server.replies.pop(0) if self.server.replies else Reply()
            self.server.arrived.notify_all()
        name = unquote(self.path).partition("?")[0].rpartition("/")[2]
        if reply.redirect or reply.status != 200 or name not in self.server.files:
            self.send_response(302 if reply.redirect else 404 if reply.status == 200 else reply.status)
            if reply.redirect:
                self.send_header("Location", reply.redirect)
            self.end_headers()
            return
        body = self.server.files[name] + reply.surplus
        if reply.flipped:
            body = body[:777] + bytes([body[777] ^ 4]) + body[778:]
        if reply.gated:
            self.server.gate.wait(SECONDS)
        self.send_response(200)
        length = len(body) if reply.claimed is None else reply.claimed
        if length:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        try:
            self.wfile.write(body[: reply.num_sent])
        except ConnectionError:
            self.server.cut_off.set()
        if reply.stalls:
            self.wfile.flush()
            self.server.stalled.set()
            self.server.closed.wait(SECONDS)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        running.files = {"train-000000.tar": CONTENT, "train-000001.tar": OTHER, "train-000002.tar": THIRD}
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.closed.set()
        running.gate.set()
        running.shutdown()
        thread.join()


def cache_of(location: str, directory: Path, **settings: Any) -> ShardCache:
    return ShardCache(
        location, directory, **{"num_attempts": 3, "backoff_seconds": 0.001, "is_typed": True, **settings}
    )


@pytest.fixture
def cache(server: Server, tmp_path: Path) -> ShardCache:
    return cache_of(server.url, tmp_path / "cache", stall_seconds=5)


def content_of(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


def cached(cache: ShardCache) -> set[str]:
    return {path.name for path in (cache.directory / "shards").iterdir()}


def failure(cache: ShardCache, **entry: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        cache.open_shard(**(entry or FIRST))
    assert not (cache.directory / "shards").exists() or not cached(cache), "something was left"
    return str(caught.value)


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["http://h/x", "HTTPS://h/x", "s3://b/x", "gs://b/x", "hf://u/r", "pipe:cat {}", "ais://b"]
)
def test_urls_and_commands_are_remote(location: str) -> None:
    assert is_remote(location)


@pytest.mark.parametrize("location", ["shards/demo", "/data/a b", "C:/shards", "./pipe:x", "../s3", ""])
def test_everything_else_is_a_path(location: str) -> None:
    assert not is_remote(location)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://h/a b/é/", "https://h/a%20b/%C3%A9/x-1.tar"),
        ("https://h/a%20b?sig=a%2Fb&x=1", "https://h/a%20b/x-1.tar?sig=a%2Fb&x=1"),
        ("https://h", "https://h/x-1.tar"),
        ("S3://bucket/a b/", "s3://bucket/a b/x-1.tar"),
        ("gs://bucket", "gs://bucket/x-1.tar"),
        ("hf://datasets/u/r@main/a", "hf://datasets/u/r@main/a/x-1.tar"),
        ("pipe:cat {} | tee log.{}", "pipe:cat x-1.tar | tee log.x-1.tar"),
    ],
)
def test_a_name_is_put_where_it_belongs(location: str, url: str) -> None:
    assert file_url(location, "x-1.tar") == url


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "/etc/passwd",
        ".x",
        "-o",
        "",
        "a b",
        "x;id",
        "$(id)",
        "`id`",
        "a\n",
        "x'",
        "pipe:id",
        "a?b",
        "é",
        "x" * 300,
    ],
)
@pytest.mark.parametrize("location", ["https://h/x", "pipe:cat {}"])
def test_a_name_that_is_more_than_a_name_is_refused(location: str, name: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        file_url(location, name)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ais://bucket/x", "http, https, s3, gs, hf, pipe, got ais"),
        ("shards/demo", "local path"),
        ("pipe:cat shard.tar", "{}"),
        ("https:///x", "https://host/folder"),
        ("https://h/x#part", "'#'"),
        ("hf://name", "hf://datasets/USER/NAME"),
    ],
)
def test_a_location_that_cannot_be_fetched_from_is_refused_at_once(tmp_path: Path, location: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ShardCache(location, tmp_path)


@pytest.mark.parametrize("setting", ["limit_bytes", "num_attempts", "stall_seconds"])
def test_settings_must_be_positive(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}.*\\b0\\b.*\\b0\\b"):
        ShardCache("http://h", tmp_path, **{setting: 0})


@pytest.mark.parametrize("digest", ["../../x", sha256(b"")[:-1], sha256(b"").upper(), ""])
def test_a_hash_that_is_none_never_becomes_a_file_name(server: Server, cache: ShardCache, digest: str) -> None:
    assert "64 hex digits" in failure(cache, file="train-000000.tar", num_bytes=3, sha256=digest)
    assert server.requests == []


# --- a server that fails -------------------------------------------------------------------------


def test_a_shard_is_fetched_once_and_read_from_the_cache(server: Server, cache: ShardCache) -> None:
    for _ in range(2):
        assert content_of(pickle.loads(pickle.dumps(cache)).open_shard(**FIRST)) == CONTENT
    assert server.requests == ["/set/train-000000.tar"]
    assert cached(cache) == {f"{sha256(CONTENT)}.tar"}


def test_a_shard_reader_reads_through_the_cache(cache: ShardCache) -> None:
    reader = ShardReader(lambda number: cache.open_shard(**FIRST))
    assert reader.read(0, offset=5, num_bytes=4, crc32=zlib.crc32(CONTENT[5:9])) == CONTENT[5:9]
    reader.close()


@pytest.mark.parametrize(
    "bad",
    [
        Reply(status=500),
        Reply(status=429),
        Reply(num_sent=1_000),
        Reply(num_sent=1_000, claimed=1_000),
        Reply(num_sent=1_000, claimed=0),
        Reply(num_sent=0, claimed=0),
        Reply(flipped=True),
        Reply(num_sent=100_000, stalls=True),
        Reply(num_sent=0, stalls=True),
    ],
    ids=str,
)
def test_a_bad_reply_is_asked_for_again(server: Server, cache: ShardCache, bad: Reply) -> None:
    quick = cache_of(cache.location, cache.directory, stall_seconds=0.5)
    server.replies = [bad, bad]
    assert content_of(quick.open_shard(**FIRST)) == CONTENT
    assert len(server.requests) == 3
    assert cached(cache) == {f"{sha256(CONTENT)}.tar"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Reply(status=503), "status 503"),
        (Reply(num_sent=1_000), "payload is not completed"),
        (Reply(num_sent=1_000, claimed=1_000), "its 1000 bytes have the sha256"),
        (Reply(flipped=True), "the index says " + sha256(CONTENT)[:12]),
        (Reply(num_sent=100_000, stalls=True), "no byte for 0.5 s"),
    ],
    ids=str,
)
def test_after_the_last_attempt_the_error_says_why(server: Server, cache: ShardCache, bad: Reply, reason: str) -> None:
    server.replies = [bad] * 9
    quick = cache_of(cache.location, cache.directory, stall_seconds=0.5)
    message = failure(quick)
    assert message.startswith(f"{server.url}/train-000000.tar could not be fetched, attempt 3 of 3: ")
    assert reason in message
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_not_there_is_not_asked_for_again(server: Server, cache: ShardCache, status: int) -> None:
    server.replies = [Reply(status=status)]
    message = failure(cache)
    assert "attempt 1 of 3" in message
    assert f"status {status}" in message
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "Cannot connect to host 127.0.0.1:9" in failure(cache_of("http://127.0.0.1:9", tmp_path))


def test_redirects_are_followed(server: Server, cache: ShardCache) -> None:
    server.replies = [Reply(redirect=f"{server.url}/elsewhere/train-000000.tar")]
    assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert server.requests == ["/set/train-000000.tar", "/set/elsewhere/train-000000.tar"]


@pytest.mark.parametrize("scheme", ["file", "s3", "pipe", "data"])
def test_a_redirect_cannot_leave_the_web(server: Server, cache: ShardCache, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "local").write_bytes(CONTENT)
    server.replies = [Reply(redirect=f"{scheme}://{tmp_path}/local")]
    assert "attempt 1 of 3" in failure(cache)


def test_a_server_that_sends_too_much_is_cut_off_and_not_asked_again(server: Server, cache: ShardCache) -> None:
    server.replies = [Reply(surplus=bytes(1 << 26), claimed=0)]
    assert "attempt 1 of 3: it has more than the 200003 bytes" in failure(cache)
    assert server.cut_off.wait(SECONDS)


def test_a_server_that_announces_too_much_is_not_read(server: Server, cache: ShardCache) -> None:
    server.replies = [Reply(num_sent=0, claimed=200_004, stalls=True)]
    assert "attempt 1 of 3: it has more than the 200003 bytes" in failure(cache)


def test_a_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/set"))
    monkeypatch.delenv("no_proxy", raising=False)
    assert content_of(cache_of("http://elsewhere.invalid/set", tmp_path).open_shard(**FIRST)) == CONTENT
    assert server.requests == ["http://elsewhere.invalid/set/train-000000.tar"]


def test_a_notebook_with_an_event_loop_of_its_own_can_fetch(cache: ShardCache) -> None:
    async def cell() -> int:
        return cache.open_shard(**FIRST)

    assert content_of(asyncio.run(cell())) == CONTENT


def test_spaces_and_quotes_in_addresses_and_folders_work(server: Server, tmp_path: Path) -> None:
    cache = cache_of(f"{server.url}/a b'c;id/[1-3]{{x}}", tmp_path / "my 'cache' $(id)")
    assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert server.requests == ["/set/a%20b'c;id/%5B1-3%5D%7Bx%7D/train-000000.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["my 'cache' $(id)"]


def test_messages_keep_secrets(server: Server, cache: ShardCache) -> None:
    server.files = {}
    message = failure(cache_of(f"{server.url.replace('//', '//me:word@')}?signature=abc", cache.directory))
    assert server.requests == ["/set/train-000000.tar?signature=abc"]
    assert f"{server.url}/train-000000.tar" in message
    assert "signature" not in message
    assert "word" not in message
    server.replies = [
        Reply(redirect="http://me:word@127.0.0.1:9/?signature=abc"),
        Reply(redirect="x://me:word@h?signature"),
    ]
    for settings in ({"num_attempts": 1}, {}):
        message = failure(cache_of(cache.location, cache.directory, **settings))
        assert "signature" not in message
        assert "word" not in message


def test_retries_leave_the_random_numbers_of_a_run_alone(server: Server, cache: ShardCache) -> None:
    server.replies = [Reply(status=500)] * 2
    before = random.getstate()
    os.close(cache.open_shard(**FIRST))
    assert random.getstate() == before


def test_waiting_times_double(server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.replies = [Reply(status=500)] * 9
    failure(cache_of(cache.location, cache.directory, num_attempts=9, backoff_seconds=1))
    waits = [wait for wait in waits if wait > 0.1]  # without those of subprocess.wait
    assert len(waits) == 8
    for doubled, wait in enumerate(waits):
        assert 0.5 * 2**doubled <= wait <= 1.5 * 2**doubled or wait == 60
    assert max(waits) == 60


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "the source"
    folder.mkdir()
    (folder / "train-000000.tar").write_bytes(CONTENT)
    return folder


def test_a_command_may_be_a_pipeline(source: Path, tmp_path: Path) -> None:
    location = f"pipe:gzip -c {shlex.quote(str(source))}/{{}} | gunzip"
    assert content_of(cache_of(location, tmp_path / "cache").open_shard(**FIRST)) == CONTENT


@pytest.mark.parametrize(
    "bad",
    [
        "exit 5",
        "cat {file}; exit 5",  # after all of its data
        "head -c 100000 {file}",
        "exit 5 | cat",
        "(cat {file}; exit 5) | cat",
        "cat {file}; kill -9 $$",
        "cat {file}; exec >&-; sleep 1000",
        "sleep 1000",
    ],
)
def test_a_command_that_fails_twice_is_run_a_third_time(source: Path, tmp_path: Path, bad: str) -> None:
    file = shlex.quote(str(source / "train-000000.tar"))
    count = shlex.quote(str(tmp_path / "count"))
    bad = bad.format(file=file)
    location = f"pipe:: {{}}; echo >>{count}; if [ $(wc -l <{count}) -ge 3 ]; then cat {file}; else {bad}; fi"
    cache = cache_of(location, tmp_path / "cache", stall_seconds=0.5)
    assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert (tmp_path / "count").read_text() == "\n" * 3
    assert cached(cache) == {f"{sha256(CONTENT)}.tar"}


@pytest.mark.parametrize("last", ["sleep 1000 | sleep 1000", "exit 0"])
def test_a_stalled_command_dies_with_its_helpers(tmp_path: Path, last: str) -> None:
    # Every process of the command holds the FIFO open; it hangs up when the last one is gone.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    location = f"pipe:: {{}}; exec 9>{shlex.quote(str(fifo))}; echo alive >&9; sleep 1000 & {last}"
    began = time.monotonic()
    message = failure(cache_of(location, tmp_path / "cache", stall_seconds=0.3, num_attempts=1))
    assert time.monotonic() - began < SECONDS
    assert "stalled" in message
    assert os.read(reader, 100) == b"alive\n"
    poll = select.poll()
    poll.register(reader, 0)  # hanging up is always reported
    assert poll.poll(1000 * SECONDS), "a helper lives on"
    os.close(reader)


def test_a_command_says_why_it_failed(tmp_path: Path) -> None:
    location = "pipe:: {}; echo the door is >&2; echo closed >&2; exit 5"
    assert "exit status 5 and said 'the door is closed'" in failure(cache_of(location, tmp_path))


def test_a_command_has_no_input(tmp_path: Path) -> None:
    cache = cache_of("pipe:cat; : {}", tmp_path, stall_seconds=5)
    saved, (reader, writer) = os.dup(0), os.pipe()
    os.dup2(reader, 0)  # a terminal that nobody types at
    try:
        assert content_of(cache.open_shard(**shard("empty.tar", b""))) == b""
    finally:
        os.dup2(saved, 0)
        for descriptor in (saved, reader, writer):
            os.close(descriptor)


def test_a_missing_program_is_named_at_once(tmp_path: Path) -> None:
    message = failure(cache_of("pipe:no-such-program {}", tmp_path / "cache"))
    assert "attempt 1 of 3" in message
    assert "no-such-program: command not found" in message
    assert "install that program" in message


def test_a_transfer_may_take_longer_than_a_stall_while_it_gives_bytes(tmp_path: Path) -> None:
    cache = cache_of(
        "pipe:: {}; for _ in 1 2 3 4 5; do sleep 0.3; echo; done", tmp_path, stall_seconds=1, num_attempts=1
    )
    assert content_of(cache.open_shard(**shard("x.tar", b"\n" * 5))) == b"\n" * 5


def test_what_a_command_says_cannot_write_on_a_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in failure(cache_of("pipe:: {}; printf '\\033[31mred' >&2; exit 5", tmp_path, num_attempts=1))


def test_a_command_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    assert "attempt 1 of 3: it has more than the 200003 bytes" in failure(cache_of("pipe:yes {}", tmp_path))


# --- stores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "library"), [("https", "aiohttp"), ("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_library_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, library: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else real(name, *rest))
    with pytest.raises(ValueError, match=f"{scheme}://b.*{library}.*`pip install {library}`"):
        ShardCache(f"{scheme}://b", tmp_path)


@pytest.fixture
def stores(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stands for Amazon and Google."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url.removesuffix("/set"),
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_DEFAULT_REGION": "us-east-1",
        "STORAGE_EMULATOR_HOST": server.url.removesuffix("/set"),
    }.items():
        monkeypatch.setenv(name, value)


STORES = pytest.mark.parametrize(
    ("scheme", "library", "path"),
    [
        ("s3", "s3fs", "/bucket/a%20b%27%24%28id%29/train-000000.tar"),
        ("gs", "gcsfs", "/download/storage/v1/b/bucket/o/a%20b'$(id)%2Ftrain-000000.tar?alt=media"),
    ],
)


@STORES
@pytest.mark.usefixtures("stores")
def test_a_shard_comes_from_an_object_store(
    server: Server, tmp_path: Path, scheme: str, library: str, path: str
) -> None:
    pytest.importorskip(library)
    cache = cache_of(f"{scheme}://bucket/a b'$(id)", tmp_path / "cache", stall_seconds=5)
    assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert server.requests == [path]


@STORES
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Reply(status=404), "attempt 1 of 2: the server answered with status 404"),
        (Reply(status=403), "attempt 1 of 2: .*Forbidden"),
        (Reply(surplus=b"more"), "attempt 1 of 2: it has more than the 200003 bytes"),
        (Reply(num_sent=1_000, stalls=True), "attempt 2 of 2: it stalled: no byte for 0.5 s"),
        (Reply(flipped=True), "attempt 2 of 2: its 200003 bytes have the sha256"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("stores")
def test_an_object_store_that_fails_is_one_line(
    server: Server, tmp_path: Path, scheme: str, library: str, path: str, bad: Reply, reason: str
) -> None:
    pytest.importorskip(library)
    server.replies = [bad] * 9
    seconds = 0.5 if bad.stalls else SECONDS
    message = failure(cache_of(f"{scheme}://bucket/set", tmp_path / "cache", num_attempts=2, stall_seconds=seconds))
    assert re.search(reason, message)
    assert "\n" not in message


def test_the_hub_gets_the_users_token_and_nobody_else_does(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    endpoint = server.url.removesuffix("/set")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "word")
    server.replies = [Reply(redirect=f"{server.url}/train-000000.tar".replace("127.0.0.1", "localhost"))]
    cache = cache_of("hf://datasets/user/name@refs%2Fpr%2F1/a b", tmp_path)
    assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert server.requests == [
        "/datasets/user/name/resolve/refs%2Fpr%2F1/a%20b/train-000000.tar",
        "/set/train-000000.tar",
    ]
    assert server.tokens == ["Bearer word", None]


# --- several processes ---------------------------------------------------------------------------


def open_in_a_process(cache: ShardCache, channel: Connection) -> None:
    channel.send(os.getpid())
    channel.send(sha256(content_of(cache.open_shard(**FIRST))))


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(processes: Any, cache: ShardCache) -> tuple[Any, Connection]:
    """A process that opens the shard; it has begun when this returns."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=open_in_a_process, args=(cache, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(SECONDS), "the process did not start"
    assert ours.recv() == process.pid
    return process, ours


def test_two_processes_share_one_download(server: Server, cache: ShardCache, processes: Any) -> None:
    server.replies = [Reply(gated=True), Reply(gated=True)]
    both = [start(processes, cache) for _ in range(2)]
    assert server.wait_for_requests(1)
    assert not server.wait_for_requests(2, seconds=0.5), "the second process did not wait for the first"
    server.gate.set()
    for process, channel in both:
        assert channel.poll(SECONDS)
        assert channel.recv() == sha256(CONTENT)
        process.join(SECONDS)
        assert process.exitcode == 0
    assert server.requests == ["/set/train-000000.tar"]


def test_a_process_killed_in_mid_download_leaves_nothing_that_is_used(
    server: Server, cache: ShardCache, processes: Any
) -> None:
    server.replies = [Reply(num_sent=100_000, stalls=True)]
    killed, _ = start(processes, cache)
    assert server.stalled.wait(SECONDS)
    waiting, channel = start(processes, cache)  # for the lock of the process that dies
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(SECONDS)
    assert channel.poll(SECONDS), "the dead process's lock was not released"
    assert channel.recv() == sha256(CONTENT)
    waiting.join(SECONDS)
    assert cached(cache) == {f"{sha256(CONTENT)}.tar"}, "the leftover was not removed"


def test_a_forked_process_fetches_although_its_parent_had_fsspec_at_work(server: Server, cache: ShardCache) -> None:
    fsspec.filesystem("http").cat_file(f"{server.url}/train-000001.tar")  # starts the thread that a fork loses
    os.close(cache.open_shard(**SECOND))
    process = multiprocessing.get_context("fork").Process(target=lambda: os.close(cache.open_shard(**FIRST)))
    process.start()
    process.join(SECONDS)
    process.kill()
    assert process.exitcode == 0
    assert len(server.requests) == 3


def test_an_interrupt_ends_a_transfer_at_once(server: Server, cache: ShardCache, processes: Any) -> None:
    server.replies = [Reply(num_sent=100_000, stalls=True)]
    process, _ = start(processes, cache_of(cache.location, cache.directory, stall_seconds=1000))
    assert server.stalled.wait(SECONDS)
    os.kill(process.pid, signal.SIGINT)
    process.join(SECONDS)
    assert process.exitcode == 1
    assert cached(cache) == set()


def open_until_interrupted(cache: ShardCache, interrupt: Any) -> None:
    """Open the shard; while the loop waits, the interrupt comes to another thread. As one that comes just before the
    loop begins to wait, it does not end that wait.
    """
    waits = threading.Event()

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            if timeout != 0:
                waits.set()
            found = super().select(timeout)
            waits.clear()
            return found

    def send() -> None:
        interrupt.wait()
        waits.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selectors, "DefaultSelector", Selector)
        cache.open_shard(**FIRST)


def test_an_interrupt_that_does_not_end_a_wait_is_noticed(server: Server, cache: ShardCache, processes: Any) -> None:
    server.replies = [Reply(num_sent=100_000, stalls=True)]
    interrupt = processes.Event()
    stalling = cache_of(cache.location, cache.directory, stall_seconds=1000)
    process = processes.Process(target=open_until_interrupted, args=(stalling, interrupt), daemon=True)
    process.start()
    assert server.stalled.wait(SECONDS)
    interrupt.set()
    process.join(SECONDS)
    assert process.exitcode == 1
    assert cached(cache) == set()


def test_a_leftover_is_removed_and_never_used(server: Server, cache: ShardCache) -> None:
    shards = cache.directory / "shards"
    shards.mkdir(parents=True)
    (shards / f"{sha256(CONTENT)}.tar.tmp-99999").write_bytes(CONTENT)
    assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert len(server.requests) == 1
    assert cached(cache) == {f"{sha256(CONTENT)}.tar"}


def test_a_process_forked_while_a_lock_is_held_does_not_keep_it(tmp_path: Path) -> None:
    with locked_file(tmp_path / "lock", wait=True) as held:
        assert held
        child = os.fork()
        if child == 0:
            signal.pause()
        with locked_file(tmp_path / "lock", wait=False) as again:
            assert not again
    try:
        with locked_file(tmp_path / "lock", wait=False) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- the limit -----------------------------------------------------------------------------------

SECOND, LAST = shard("train-000001.tar", OTHER), shard("train-000002.tar", THIRD)
ROOM_FOR_TWO = len(CONTENT) + len(THIRD)


def age(cache: ShardCache, entry: dict[str, Any], seconds: int) -> None:
    """Pretend that a shard was opened so many seconds after 1970."""
    os.utime(cache.directory / "shards" / f"{entry['sha256']}.tar", (seconds, seconds))


def test_the_least_recently_opened_shard_goes_first(server: Server, cache: ShardCache) -> None:
    limited = cache_of(cache.location, cache.directory, limit_bytes=ROOM_FOR_TWO)
    for entry, seconds in ((FIRST, 1), (SECOND, 2)):
        os.close(limited.open_shard(**entry))
        age(cache, entry, seconds)
    os.close(limited.open_shard(**FIRST))
    os.close(limited.open_shard(**LAST))
    assert cached(cache) == {f"{FIRST['sha256']}.tar", f"{LAST['sha256']}.tar"}
    os.close(limited.open_shard(**SECOND))
    assert cached(cache) == {f"{LAST['sha256']}.tar", f"{SECOND['sha256']}.tar"}
    assert len(server.requests) == 4


def test_room_is_made_before_a_download(server: Server, cache: ShardCache) -> None:
    limited = cache_of(cache.location, cache.directory, limit_bytes=len(CONTENT))
    os.close(limited.open_shard(**FIRST))
    server.replies = [Reply(gated=True)]
    thread = threading.Thread(target=lambda: os.close(limited.open_shard(**SECOND)))
    thread.start()
    assert server.wait_for_requests(2)
    assert f"{FIRST['sha256']}.tar" not in cached(cache)
    server.gate.set()
    thread.join(SECONDS)
    assert cached(cache) == {f"{SECOND['sha256']}.tar"}


def test_what_others_fetched_meanwhile_is_brought_back_into_the_limit(server: Server, cache: ShardCache) -> None:
    limited = cache_of(cache.location, cache.directory, limit_bytes=len(CONTENT))
    server.replies = [Reply(gated=True)]
    thread = threading.Thread(target=lambda: os.close(limited.open_shard(**FIRST)))
    thread.start()
    assert server.wait_for_requests(1)
    os.close(limited.open_shard(**SECOND))
    assert f"{SECOND['sha256']}.tar" in cached(cache)
    server.gate.set()
    thread.join(SECONDS)
    assert cached(cache) == {f"{FIRST['sha256']}.tar"}


def test_an_open_shard_stays_readable_when_it_is_evicted(cache: ShardCache) -> None:
    limited = cache_of(cache.location, cache.directory, limit_bytes=len(CONTENT))
    descriptor = limited.open_shard(**FIRST)
    os.close(limited.open_shard(**SECOND))
    assert cached(cache) == {f"{SECOND['sha256']}.tar"}
    assert content_of(descriptor) == CONTENT


def test_many_readers_of_a_cache_that_is_too_small_always_read_the_right_bytes(server: Server, tmp_path: Path) -> None:
    limited = cache_of(server.url, tmp_path / "cache", limit_bytes=ROOM_FOR_TWO)
    wrong: list[str] = []

    def read(seed: int) -> None:
        for entry, content in random.Random(seed).choices([(FIRST, CONTENT), (SECOND, OTHER), (LAST, THIRD)], k=12):
            try:
                if content_of(limited.open_shard(**entry)) != content:
                    wrong.append(f"wrong bytes of {entry['file']}")
            except Exception as problem:
                wrong.append(repr(problem))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []
    assert cached(limited) <= {f"{entry['sha256']}.tar" for entry in (FIRST, SECOND, LAST)}
    assert len(server.requests) > 3, "nothing was evicted, so nothing was tested"


def test_a_shard_beyond_the_limit_is_refused_unasked(server: Server, cache: ShardCache) -> None:
    message = failure(cache_of(cache.location, cache.directory, limit_bytes=len(CONTENT) - 1))
    assert "has 200003 bytes" in message
    assert "limited to 200002 bytes; raise the limit" in message
    assert server.requests == []


def test_evicting_takes_leftovers_of_the_dead_and_spares_the_living_and_the_users(cache: ShardCache) -> None:
    shards, locks = cache.directory / "shards", cache.directory / "locks"
    shards.mkdir(parents=True)
    locks.mkdir()
    dead, living = f"{'a' * 64}.tar.tmp-9", f"{'b' * 64}.tar.tmp-9"
    opening = f"{'c' * 64}.tar"
    own = ["train-000000.tar", "notes.txt"]
    for name in (dead, living, opening, *own):
        (shards / name).write_bytes(bytes(1000))
        os.utime(shards / name, (1, 1))
    with locked_file(locks / f"{'b' * 64}.lock", wait=True), locked_file(locks / f"{'c' * 64}.lock", wait=True):
        os.close(cache_of(cache.location, cache.directory, limit_bytes=9 * len(CONTENT)).open_shard(**SECOND))
        assert cached(cache) == {f"{SECOND['sha256']}.tar", living, opening, *own}
        os.close(cache_of(cache.location, cache.directory, limit_bytes=len(CONTENT)).open_shard(**FIRST))
        assert cached(cache) == {f"{FIRST['sha256']}.tar", living, opening, *own}


def test_a_cached_shard_of_another_size_is_fetched_again(server: Server, cache: ShardCache) -> None:
    os.close(cache.open_shard(**FIRST))
    path = cache.directory / "shards" / f"{FIRST['sha256']}.tar"
    for damaged in (CONTENT[:-1], b"", CONTENT + b"x"):
        path.write_bytes(damaged)
        assert content_of(cache.open_shard(**FIRST)) == CONTENT
    assert len(server.requests) == 4


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    """The next so many flushes of a file to disk find it full."""
    real, left = os.fsync, [times]

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_evicts_and_tries_again(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry, seconds in ((FIRST, 1), (SECOND, 2)):
        os.close(cache.open_shard(**entry))
        age(cache, entry, seconds)
    fill_the_disk(monkeypatch, times=1)
    assert content_of(cache.open_shard(**LAST)) == THIRD
    assert cached(cache) == {f"{SECOND['sha256']}.tar", f"{LAST['sha256']}.tar"}


def test_a_full_disk_with_nothing_to_evict_is_said(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch, times=9)
    message = failure(cache)
    assert f"attempt 1 of 3: the disk of {cache.directory} is full (200003 bytes are needed" in message
    assert "make room" in message


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard cache.*/file\b"):
        cache_of(server.url, tmp_path / "file").open_shard(**FIRST)


# --- the index -----------------------------------------------------------------------------------

INDEX = json.dumps({"kind": "some index", "splits": {}}).encode()
TABLE = random.Random(9).randbytes(5_001)


def test_each_index_has_a_folder_of_its_own(server: Server, cache: ShardCache) -> None:
    server.files["index.json"] = INDEX
    folder = cache.fetch_index()
    assert (folder / "index.json").read_bytes() == INDEX
    assert cache.fetch_index() == folder
    server.files["index.json"] = INDEX + b"\n"
    assert cache.fetch_index() != folder
    assert (folder / "index.json").read_bytes() == INDEX
    assert len(server.requests) == 3


def test_an_index_that_was_cut_is_fetched_again(server: Server, cache: ShardCache) -> None:
    server.files["index.json"] = INDEX
    server.replies = [Reply(num_sent=20, claimed=0), Reply(num_sent=0, claimed=0)]
    assert (cache.fetch_index() / "index.json").read_bytes() == INDEX
    server.replies = [Reply(num_sent=20, claimed=0)] * 3
    with pytest.raises(ValueError, match=r"attempt 3 of 3.*JSON"):
        cache.fetch_index()


def test_an_index_without_an_end_is_refused(server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["index.json"] = b"[" * 200_000
    with pytest.raises(ValueError, match=r"attempt 3 of 3.*JSON"):
        cache.fetch_index()
    monkeypatch.setattr(remote, "MAX_INDEX_BYTES", len(INDEX))
    server.files["index.json"] = INDEX + b" "
    with pytest.raises(ValueError, match=rf"attempt 1 of 3.*\b{len(INDEX)} bytes"):
        cache.fetch_index()
    assert list((cache.directory / "indexes").iterdir()) == []


def test_a_table_that_is_larger_than_its_index_allows_is_refused(server: Server, cache: ShardCache) -> None:
    server.files.update({"index.json": INDEX, "index.samples.train.npy": TABLE})
    folder = cache.fetch_index()
    with pytest.raises(ValueError, match=r"attempt 1 of 3.*\b5000 bytes"):
        cache.fetch_table(folder, "index.samples.train.npy", max_bytes=5_000, sha256=sha256(TABLE))
    assert [path.name for path in folder.iterdir()] == ["index.json"]


def test_a_table_is_fetched_once_and_again_when_damaged(server: Server, cache: ShardCache) -> None:
    server.files.update({"index.json": INDEX, "index.samples.train.npy": TABLE})
    folder = cache.fetch_index()
    server.requests.clear()
    server.replies = [Reply(num_sent=20, claimed=0), Reply(flipped=True)]
    for _ in range(2):
        path = cache.fetch_table(folder, "index.samples.train.npy", max_bytes=len(TABLE), sha256=sha256(TABLE))
        assert path == folder / "index.samples.train.npy"
        assert path.read_bytes() == TABLE
    assert len(server.requests) == 3
    path.write_bytes(TABLE[:-1] + b"x")
    cache.fetch_table(folder, "index.samples.train.npy", max_bytes=len(TABLE), sha256=sha256(TABLE))
    assert path.read_bytes() == TABLE


def test_a_table_with_another_hash_is_never_published(server: Server, cache: ShardCache) -> None:
    server.files.update({"index.json": INDEX, "index.samples.train.npy": TABLE})
    folder = cache.fetch_index()
    with pytest.raises(ValueError, match=r"attempt 3 of 3.*\b5001 bytes.*sha256"):
        cache.fetch_table(folder, "index.samples.train.npy", max_bytes=len(TABLE), sha256=sha256(OTHER))
    with pytest.raises(ValueError, match="letters"):
        cache.fetch_table(folder, "../index.samples.train.npy", max_bytes=len(TABLE), sha256=sha256(TABLE))
    assert [path.name for path in folder.iterdir()] == ["index.json"]
