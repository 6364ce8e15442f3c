"""Shards that lie elsewhere, fetched through fsspec into a verified cache on this node.

    DIRECTORY/shards/SHA256.tar   a whole shard, checked before it got this name; least recently opened go first
    DIRECTORY/indexes/SHA256/     index.json with this sha256, and the tables that it names
    DIRECTORY/locks/KEY.lock      locked while that file is fetched

A location is `https://host/folder`, `s3://bucket/folder`, `gs://bucket/folder`, `hf://datasets/user/name/folder`, or
`pipe:COMMAND` with `{}` for the file's name. Everything is named by its content, so a changed shard is never taken for
the old one, and two locations with the same shards share them.

Chosen: fsspec for transfers, since it knows the stores, their credentials and proxies; limits, time-outs, retries and
the cache are ours. Each transfer has an event loop and a session of its own: the thread that fsspec shares otherwise
does not exist in a forked loading process, which would wait for it forever. A `pipe:` command runs under `bash -o
pipefail` as the leader of a session, so a failing `a` in `a | b` counts, and a stalled command dies with its helpers.
Locks are `flock`: the kernel releases them when a process dies, so none is stale; their files stay, since a lock on a
removed file excludes nobody. A shard is hashed when it has come; later openings check its size, and images their crc32.
Declined: resuming in the middle of a file, which not every server can; huggingface_hub's own transfers, which know no
limit: `hf://` is fetched by https.
"""

import asyncio
import errno
import hashlib
import importlib.util
import os
import random
import re
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dist_proxygml.storage.files import parse_json, publish, sha256_of
from dist_proxygml.storage.lock import locked_file

T = TypeVar("T")

LONGEST_WAIT_SECONDS = 60.0
MAX_INDEX_BYTES = 1 << 28  # of index.json, which takes 150 bytes for each shard
_OF_ITS_OWN = {"asynchronous": True, "skip_instance_cache": True}  # no thread, nothing from before a fork
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_LIBRARIES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "pipe": None}
_HF = re.compile(r"hf://(?:(dataset|space)s/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")  # kind, repository, revision, path
_REMEDY_TRANSFER = "check the address, the network and your credentials, then run again"
_REMEDY_PROGRAM = "install that program, or correct its name"
_REMEDY_CONTENT = "the files there do not belong together: upload the shards and their index again"
_ALLOWED_IN_URLS = "/%:@!$&'()*+,;=~-._?"


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a `pipe:` command; everything else is a local path."""
    return _scheme(location) is not None


def file_url(location: str, name: str) -> str:
    """The URL of a file in a location; `pipe:COMMAND` with every `{}` replaced by the name.

    In http(s) the name goes before a query, as in the URL of a signed folder, and spaces become %20. Raises ValueError
    for a location that cannot be fetched from, and for a name that is more than a plain file name: names come from a
    downloaded index, which must not be able to say what is run or where is written.
    """
    scheme = _scheme(location)
    if scheme not in _LIBRARIES:
        raise ValueError(
            f"cannot fetch from {_shown(location)}: expected one of {', '.join(_LIBRARIES)}, got "
            f"{scheme or 'a local path'}; copy the folder here, or give a command that writes a file to its standard "
            "output, as in 'pipe:ssh host cat folder/{}'"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
        raise ValueError(
            f"{_shown(location)} lists the file {name[:100]!r}: expected letters, digits, '_', '-' and '.', beginning "
            "with none of '-' and '.'; rename the shards and index them again, if you trust where they come from"
        )
    if scheme == "pipe":
        if "{}" not in location:
            raise ValueError(f"{location} has no {{}} for the file's name; write 'pipe:ssh host cat folder/{{}}'")
        return location.replace("{}", shlex.quote(name))
    parts = urlsplit(location)
    if not parts.netloc or (scheme in ("http", "https") and parts.fragment):
        raise ValueError(f"{_shown(location)}: expected {scheme}://host/folder, without '#'; correct the address")
    if scheme in ("s3", "gs", "hf"):
        url = f"{scheme}://{location.partition('://')[2].rstrip('/')}/{name}"
        if scheme == "hf" and not _HF.fullmatch(url):
            raise ValueError(f"{location}: expected hf://datasets/USER/NAME[@REVISION][/FOLDER]; correct the address")
        return url
    path = quote(f"{parts.path.rstrip('/')}/{name}", safe=_ALLOWED_IN_URLS)
    return urlunsplit((scheme, parts.netloc, path, quote(parts.query, safe=_ALLOWED_IN_URLS), ""))


@dataclass(frozen=True)
class ShardCache:
    """The files of one remote location, in a folder of this node that any number of processes and runs share.

    Holds paths and numbers only, so it may be pickled, forked and spawned. While several processes fetch at once the
    folder may exceed its limit by what they fetch. Errors are ValueErrors that name the URL (without its query, where
    signatures stand), the number of attempts and the last reason.
    """

    location: str
    directory: Path  # on a disk of this node
    limit_bytes: int | None = None  # of all shards together, None: no limit; the indexes do not count
    num_attempts: int = 5
    stall_seconds: float = 60.0  # a transfer that gives no byte for so long is ended
    backoff_seconds: float = 1.0  # before the second attempt; doubles with each, and varies by half
    is_typed: bool = False  # the location, by the user; one that was read from a file must not run a `pipe:` command

    def __post_init__(self) -> None:
        file_url(self.location, "index.json")  # refuses what could never be fetched
        if _scheme(self.location) == "pipe" and not self.is_typed:
            raise ValueError(
                f"expected a location that runs no command, got {self.location!r} out of a file; if you trust it, type "
                "it: --data LOCATION, or --set data.shards=LOCATION"
            )
        library = _LIBRARIES[str(_scheme(self.location))]
        if library is not None and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"fetching from {self.shown_location} needs {library}, which is not installed; `pip install {library}`"
            )
        for name in ("limit_bytes", "num_attempts", "stall_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} of the shard cache is {value}, expected more than 0; correct the setting")

    @property
    def shown_location(self) -> str:
        """The location for messages, without what may be secret in it."""
        return _shown(self.location)

    def open_shard(self, *, file: str, num_bytes: int, sha256: str) -> int:
        """A read-only file descriptor of the shard with this size and hash; fetches it unless it is here.

        The caller closes it; it stays readable when the shard is evicted. Processes that ask for the same shard at once
        wait for the one that fetches it. Raises ValueError.
        """
        url = file_url(self.location, file)
        if self.limit_bytes is not None and num_bytes > self.limit_bytes:
            raise ValueError(
                f"{_shown(url)} has {num_bytes} bytes, but the shard cache {self.directory} is limited to "
                f"{self.limit_bytes} bytes; raise the limit to several shards for each worker"
            )
        path = self.directory / "shards" / f"{sha256}.tar"
        with self._locked(sha256):
            descriptor = _open_whole(path, num_bytes)
            if descriptor is None:
                self._retried(url, lambda: self._fetch_shard(url, path, num_bytes=num_bytes, sha256=sha256))
                descriptor = os.open(path, os.O_RDONLY)  # nobody evicts it while it is locked
        return descriptor

    def drop_if_damaged(self, sha256: str) -> bool:
        """Remove the copy of a shard whose bytes have changed here, so that it is fetched again; whether they had."""
        path = self.directory / "shards" / f"{sha256}.tar"
        with self._locked(sha256):
            damaged = path.is_file() and sha256_of(path) != sha256
            if damaged:
                path.unlink()
        return damaged

    def fetch_index(self) -> Path:
        """Fetch `index.json`, always anew; the folder that holds it, named by its sha256.

        Another index of the same location gets another folder, so runs that began earlier keep theirs. Raises
        ValueError.
        """
        url = file_url(self.location, "index.json")
        key = hashlib.sha256(url.encode()).hexdigest()
        indexes = self.directory / "indexes"

        def fetch() -> Path:
            fetched = indexes / f"{key}.json"
            self._receive(url, fetched, max_bytes=MAX_INDEX_BYTES)
            content = fetched.read_bytes()
            try:
                parse_json(content)  # it has no hash yet, but one that was cut is no JSON
            except ValueError as problem:
                fetched.unlink()
                raise _TransferError(f"it is not JSON ({problem})", remedy=_REMEDY_CONTENT) from None
            folder = indexes / hashlib.sha256(content).hexdigest()
            folder.mkdir(exist_ok=True)
            fetched.replace(folder / "index.json")
            return folder

        with self._locked(key):
            return self._retried(url, fetch)

    def fetch_table(self, folder: Path, name: str, *, max_bytes: int, sha256: str) -> Path:
        """The table of this name and hash in a folder of `fetch_index`; fetches it unless it is there. Raises
        ValueError.
        """
        url = file_url(self.location, name)
        path = folder / name
        with self._locked(sha256):
            if not path.is_file() or sha256_of(path) != sha256:
                self._retried(url, lambda: self._receive(url, path, max_bytes=max_bytes, sha256=sha256))
        return path

    def _receive(self, url: str, path: Path, *, max_bytes: int, sha256: str | None = None) -> None:
        """One attempt to fetch a file of this hash. Only under its lock. Raises _TransferError, OSError of the disk."""
        for leftover in path.parent.glob(f"{path.name}.tmp-*"):  # of killed processes, since nobody else writes it
            leftover.unlink(missing_ok=True)
        with publish(path) as stream:
            received = Path(stream.name)
            _transfer(url, received, max_bytes=max_bytes, stall_seconds=self.stall_seconds)
            if sha256 is not None and (found := sha256_of(received)) != sha256:
                reason = f"its {received.stat().st_size} bytes have the sha256 {found[:12]}..., the index says "
                raise _TransferError(f"{reason}{sha256[:12]}...", remedy=_REMEDY_CONTENT)

    def _fetch_shard(self, url: str, path: Path, *, num_bytes: int, sha256: str) -> None:
        """One attempt. Only under the shard's lock."""
        if self.limit_bytes is not None:
            self._evict(self.limit_bytes - num_bytes)
        try:
            self._receive(url, path, max_bytes=num_bytes, sha256=sha256)
        except OSError as problem:
            if problem.errno not in _DISK_FULL:
                raise
            used = sum(size for _, _, size, _ in _files(path.parent))
            freed = self._evict(max(0, used - num_bytes))
            raise _TransferError(
                f"the disk of {self.directory} is full ({num_bytes} bytes are needed; {freed} were freed by evicting)",
                remedy="make room there, name a cache on a larger disk, or lower the cache's limit",
                permanent=freed == 0,
            ) from None
        if self.limit_bytes is not None:
            self._evict(self.limit_bytes)  # others may have fetched meanwhile

    def _evict(self, allowed_bytes: int) -> int:
        """Remove what dead processes left, and the least recently opened shards until the rest has no more than
        `allowed_bytes`; the number of bytes removed. Spares what is locked, so also what the caller is fetching.
        """
        removed = 0
        with self._locked("eviction"):  # two at once would each remove as much
            files = _files(self.directory / "shards")
            used = sum(size for _, _, size, _ in files)
            for is_whole, _, size, path in files:
                if is_whole and used - removed <= allowed_bytes:
                    break
                with locked_file(self.directory / "locks" / f"{path.name.partition('.')[0]}.lock", wait=False) as held:
                    if held:
                        path.unlink(missing_ok=True)
                        removed += size
        return removed

    def _retried(self, url: str, once: Callable[[], T]) -> T:
        for attempt in range(1, self.num_attempts + 1):
            try:
                return once()
            except _TransferError as problem:
                failure = problem
            if failure.permanent:
                break
            if attempt < self.num_attempts:
                # Not the global generator: how often a network fails must not change what a run draws.
                wait = self.backoff_seconds * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        raise ValueError(
            f"{_shown(url)} could not be fetched, attempt {attempt} of {self.num_attempts}: {failure.reason}; "
            f"{failure.remedy}"
        )

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the lock of this key. A disk or folder that refuses is the user's to mend."""
        if not re.fullmatch("[0-9a-f]{64}|eviction", key):  # it comes from a downloaded index, and names files
            raise ValueError(
                f"{self.shown_location}: expected a sha256, 64 hex digits, got {key[:80]!r}; index it again"
            )
        try:
            for folder in ("locks", "shards", "indexes"):
                (self.directory / folder).mkdir(parents=True, exist_ok=True)
            with locked_file(self.directory / "locks" / f"{key}.lock", wait=True):
                yield
        except OSError as problem:
            raise ValueError(
                f"the shard cache {self.directory} cannot be used: {problem}; name a folder that can be written and "
                "has room"
            ) from problem


@dataclass
class _TransferError(Exception):
    """An attempt that failed; `permanent` when another one would fail in the same way."""

    reason: str
    remedy: str = _REMEDY_TRANSFER
    permanent: bool = False


class _Progress:
    """An fsspec callback that ends a transfer which exceeds its size limit or stalls."""

    def __init__(self, max_bytes: int, stall_seconds: float, limit: asyncio.Timeout) -> None:
        self.max_bytes, self.stall_seconds, self.limit = max_bytes, stall_seconds, limit
        self.num_bytes = 0

    def set_size(self, num_bytes: int | None) -> None:
        if num_bytes is not None and num_bytes > self.max_bytes:
            reason = f"it has more than the {self.max_bytes} bytes of the index"
            raise _TransferError(reason, remedy=_REMEDY_CONTENT, permanent=True)

    def relative_update(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.set_size(self.num_bytes)
        self.limit.reschedule(asyncio.get_running_loop().time() + self.stall_seconds)


def _transfer(url: str, path: Path, *, max_bytes: int, stall_seconds: float) -> None:
    """Write what a URL gives to `path`. Raises _TransferError unless all of it came, OSError when the disk is full."""

    async def transfer() -> None:
        _keep_waking(asyncio.get_running_loop())
        async with asyncio.timeout(stall_seconds) as limit:
            progress = _Progress(max_bytes, stall_seconds, limit)
            await (_run if _scheme(url) == "pipe" else _download)(url, path, progress)

    try:
        if asyncio._get_running_loop() is None:
            return asyncio.run(transfer())
        with ThreadPoolExecutor(1) as thread:  # a notebook's loop runs in this one
            return thread.submit(asyncio.run, transfer()).result()
    except _TransferError:
        raise
    except TimeoutError:
        raise _TransferError(f"it stalled: no byte for {stall_seconds:g} s") from None
    except Exception as problem:  # each library has its own
        if isinstance(problem, OSError) and problem.errno in _DISK_FULL:
            raise
        missing = 404 if isinstance(problem, FileNotFoundError) else None
        status = missing or getattr(problem, "status", None) or getattr(problem, "code", None)
        reason = f"the server answered with status {status}" if status else f"{type(problem).__name__}: {problem}"
        permanent = (
            isinstance(problem, (PermissionError, ValueError))  # also a certificate, an address
            or re.search("Credentials|Forbidden|NonHttpUrl", reason)
            or (isinstance(status, int) and 300 <= status < 500 and status not in (408, 425, 429))
        )
        raise _TransferError(_shown(reason), permanent=bool(permanent)) from problem


def _keep_waking(loop: asyncio.AbstractEventLoop) -> None:
    """Wake the loop each second: it acts on a signal that came just before it began to wait only when it wakes."""
    loop.call_later(1.0, _keep_waking, loop)


async def _download(url: str, path: Path, progress: _Progress) -> None:
    import fsspec  # here, because it and its libraries take a fifth of a second

    scheme, request = url.partition(":")[0], {}
    if scheme == "s3":
        store = fsspec.filesystem("s3", max_concurrency=1, **_OF_ITS_OWN)  # loading processes fetch beside each other
    elif scheme == "gs":
        from gcsfs.core import GCSFileSystem  # without its extension for gRPC, which does not survive a fork

        store, request = GCSFileSystem(session_kwargs={"trust_env": True}, **_OF_ITS_OWN), {"concurrency": 1}
    else:
        import aiohttp

        headers = {"Accept-Encoding": "identity"}
        if match := _HF.fullmatch(url):
            from huggingface_hub import get_token, hf_hub_url

            kind, repository, revision, file = match.groups()
            url = hf_hub_url(repository, file, repo_type=kind, revision=revision and unquote(revision))
            headers |= {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
        client = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None)}  # the environment names proxies
        store = fsspec.filesystem("http", encoded=True, headers=headers, client_kwargs=client, **_OF_ITS_OWN)
    session = await (store._set_session() if scheme == "gs" else store.set_session())
    try:
        await store._get_file(url, str(path), callback=progress, **request)
    finally:
        await session.close()


async def _run(url: str, path: Path, progress: _Progress) -> None:
    command = ("bash", "-o", "pipefail", "-c", url.removeprefix("pipe:"))
    with open(path, "wb") as sink, open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as messages:
        files: dict[str, Any] = {"stdin": nothing, "stdout": asyncio.subprocess.PIPE, "stderr": messages}
        process = await asyncio.create_subprocess_exec(*command, **files, start_new_session=True)
        assert process.stdout is not None
        try:
            while chunk := await process.stdout.read(1 << 20):
                progress.relative_update(len(chunk))
                sink.write(chunk)
            status = await process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started, also when it has ended itself
            process._transport.close()  # type: ignore[attr-defined]  # its output is not read to the end
            await process.wait()
            raise
        if status != 0:
            messages.seek(-min(500, messages.seek(0, os.SEEK_END)), os.SEEK_END)
            said = _shown(messages.read().decode("utf-8", "replace"))
            reason = f"its program ended with exit status {status} and said {said!r}"
            missing = status in (126, 127)
            raise _TransferError(reason, _REMEDY_PROGRAM if missing else _REMEDY_TRANSFER, permanent=missing)


def _open_whole(path: Path, num_bytes: int) -> int | None:
    """A descriptor of a cached shard, marked as just used; None when it is not there or was cut."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        if os.fstat(descriptor).st_size == num_bytes:
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)
    return None


def _files(folder: Path) -> list[tuple[bool, int, int, Path]]:
    """(is whole, when opened, bytes, path) in the order of eviction: leftovers, then the least recently opened."""
    files = []  # of ours alone: a user's own shards lie there when the folder was badly chosen
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process evicts or publishes
            if re.fullmatch(r"[0-9a-f]{64}\.tar(\.tmp-\d+)?", path.name):
                status = path.stat()
                files.append((path.suffix == ".tar", status.st_mtime_ns, status.st_size, path))
    return sorted(files)


def _scheme(location: str) -> str | None:
    match = re.match(r"(pipe):|([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return (match[1] or match[2]).lower() if match else None


def _shown(text: str) -> str:
    """A text as a line for messages, without what may be secret in its URLs: user, password, query."""
    text = "".join(c if c.isprintable() else "_" for c in " ".join(text.split()))[:500]
    return text if _scheme(text) == "pipe" else re.sub(r"\?[^\s'\"]*", "", re.sub(r"//[^/\s]*@", "//", text))
