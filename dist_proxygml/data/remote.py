"""Shards that lie elsewhere, fetched through webdataset's `gopen` into a verified cache on this node.

    DIRECTORY/shards/SHA256.tar   a whole shard, checked before it got this name; least recently opened go first
    DIRECTORY/indexes/SHA256/     index.json with this sha256, and the tables that it names
    DIRECTORY/locks/KEY.lock      locked while that file is fetched; keeps what the fetching program wrote to stderr

A location is `https://host/folder`, `s3://bucket/folder`, `gs://bucket/folder`, or `pipe:COMMAND` with `{}` for the
file's name. Everything is named by its content, so a changed shard is never taken for the old one, and two locations
with the same shards share them.

Chosen: `gopen`'s `pipe:` for all of them, with a command of our own (curl, aws, gsutil) under `bash -o pipefail` and in
a process group of its own. So each failure has an exit status and a message, a failing `a` in `a | b` counts, a stalled
transfer dies with its helpers, and all retries are ours. `gopen`'s own curl retries for a minute by itself and says
nothing, and it knows no s3. Locks are `flock`: the kernel releases them when a process dies, so none is ever stale.
A shard's hash is computed while it is written; later openings check its size, and each image its crc32.
Declined: resuming a cut transfer in its middle, since not every command can and a shard is some 100 MB: it is fetched
again. Lock files are never removed, since a lock on a removed file excludes nobody; they are empty or a line long.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from dist_proxygml.storage.files import publish

T = TypeVar("T")

SCHEMES = ("http", "https", "s3", "gs", "pipe")
LONGEST_WAIT_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20
_REMEDY_TRANSFER = "check the address, the network and your credentials, then run again"
_REMEDY_CONTENT = "the files there do not belong together: upload the shards and their index again"
_ALLOWED_IN_URLS = "/%:@!$&'()*+,;=~-._?"


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a `pipe:` command; everything else is a local path."""
    return _scheme(location) is not None


def file_url(location: str, name: str) -> str:
    """The URL of a file in a location, for `gopen`; `pipe:COMMAND` with every `{}` replaced by the name.

    In http(s) the name goes before a query, as in the URL of a signed folder, and spaces become %20. Raises ValueError
    for a location that no program here can open, and for a name that is more than a plain file name: names come from a
    downloaded index, which must not be able to say what is run or where is written.
    """
    scheme = _scheme(location)
    if scheme not in SCHEMES:
        raise ValueError(
            f"cannot fetch from {_shown(location)}: expected one of {', '.join(SCHEMES)}, got "
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
    if scheme in ("s3", "gs"):
        return f"{location.rstrip('/')}/{name}"
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
    stall_seconds: float = 60.0  # a transfer that gives no byte for so long is killed
    backoff_seconds: float = 1.0  # before the second attempt; doubles with each, and varies by half
    is_typed: bool = False  # the location, by the user; one that was read from a file must not run a `pipe:` command

    def __post_init__(self) -> None:
        file_url(self.location, "index.json")  # refuses what could never be fetched
        if _scheme(self.location) == "pipe" and not self.is_typed:
            raise ValueError(
                f"expected a location that runs no command, got {self.location!r} out of a file; if you trust it, type "
                "it: --data LOCATION, or --set data.shards=LOCATION"
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
        _check_sha256(url, sha256)
        if self.limit_bytes is not None and num_bytes > self.limit_bytes:
            raise ValueError(
                f"{_shown(url)} has {num_bytes} bytes, but the shard cache {self.directory} is limited to "
                f"{self.limit_bytes} bytes; raise the limit to several shards for each worker"
            )
        path = self.directory / "shards" / f"{sha256}.tar"
        with self._locked(sha256) as messages:
            descriptor = _open_whole(path, num_bytes)
            if descriptor is None:
                self._retried(url, lambda: self._fetch_shard(url, path, messages, num_bytes=num_bytes, sha256=sha256))
                descriptor = os.open(path, os.O_RDONLY)  # nobody evicts it while it is locked
        return descriptor

    def drop_if_damaged(self, sha256: str) -> bool:
        """Remove the copy of a shard whose bytes have changed here, so that it is fetched again; whether they had."""
        path = self.directory / "shards" / f"{sha256}.tar"
        with self._locked(sha256):
            damaged = path.is_file() and _file_sha256(path) != sha256
            if damaged:
                path.unlink()
        return damaged

    def fetch_index(self) -> Path:
        """Fetch `index.json`, always anew; the folder that holds it, named by its sha256.

        Another index of the same location gets another folder, so runs that began earlier keep theirs. Raises
        ValueError.
        """
        url = file_url(self.location, "index.json")

        def fetch() -> bytes:
            content = io.BytesIO()
            _transfer(url, content, messages, max_bytes=None, stall_seconds=self.stall_seconds)
            try:
                json.loads(content.getvalue())  # it has no hash yet, but one that was cut is no JSON
            except ValueError as problem:
                raise _TransferError(f"it is not JSON ({problem})", remedy=_REMEDY_CONTENT) from None
            return content.getvalue()

        with self._locked(hashlib.sha256(url.encode()).hexdigest()) as messages:
            content = self._retried(url, fetch)
            path = self.directory / "indexes" / hashlib.sha256(content).hexdigest() / "index.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path) as stream:
                stream.write(content)
        return path.parent

    def fetch_table(self, folder: Path, name: str, *, sha256: str) -> Path:
        """The table of this name and hash in a folder of `fetch_index`; fetches it unless it is there. Raises
        ValueError.
        """
        url = file_url(self.location, name)
        _check_sha256(url, sha256)
        path = folder / name

        def fetch() -> None:
            with publish(path) as stream:
                got = _transfer(url, stream, messages, max_bytes=None, stall_seconds=self.stall_seconds)
                _check_content(got, num_bytes=None, sha256=sha256)

        with self._locked(sha256) as messages:
            if not path.is_file() or _file_sha256(path) != sha256:
                _remove_leftovers(path)
                self._retried(url, fetch)
        return path

    def _fetch_shard(self, url: str, path: Path, messages: Path, *, num_bytes: int, sha256: str) -> None:
        """One attempt. Only under the shard's lock."""
        _remove_leftovers(path)
        if self.limit_bytes is not None:
            self._evict(self.limit_bytes - num_bytes)
        try:
            with publish(path) as stream:
                got = _transfer(url, stream, messages, max_bytes=num_bytes, stall_seconds=self.stall_seconds)
                _check_content(got, num_bytes=num_bytes, sha256=sha256)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            used = sum(file.num_bytes for file in _files(path.parent))
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
            used = sum(file.num_bytes for file in files)
            for file in sorted(files):
                if file.is_shard and used - removed <= allowed_bytes:
                    break
                sha256 = file.path.name.partition(".")[0]
                with _flock(self.directory / "locks" / f"{sha256}.lock", wait=False) as held:
                    if held:
                        file.path.unlink(missing_ok=True)
                        removed += file.num_bytes
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
    def _locked(self, key: str) -> Iterator[Path]:
        """Hold the lock of this key; gives its file. A disk or folder that refuses is the user's to mend."""
        try:
            for folder in ("locks", "shards"):
                (self.directory / folder).mkdir(parents=True, exist_ok=True)
            path = self.directory / "locks" / f"{key}.lock"
            with _flock(path, wait=True):
                yield path
        except OSError as problem:
            raise ValueError(
                f"the shard cache {self.directory} cannot be used: {problem}; name a folder that can be written and "
                "has room"
            ) from problem


class _TransferError(Exception):
    """An attempt that failed; `permanent` when another one would fail in the same way."""

    def __init__(self, reason: str, *, remedy: str = _REMEDY_TRANSFER, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.permanent = permanent


class _Received(NamedTuple):
    num_bytes: int
    sha256: str


def _transfer(url: str, sink: IO[bytes], messages: Path, *, max_bytes: int | None, stall_seconds: float) -> _Received:
    """Copy what a URL gives into `sink`. Raises _TransferError unless its program ended well, with all it had."""
    from webdataset.gopen import gopen  # here, because it imports torch

    # setsid: a process group that can be killed with all that the command started.
    command = f"exec setsid bash -o pipefail -c {shlex.quote(_command(url, stall_seconds=stall_seconds))}"
    try:
        pipe = gopen(f"pipe:{command} </dev/null 2>{shlex.quote(str(messages))}")
    except ValueError as problem:
        raise _TransferError(
            f"webdataset refused ({problem})", remedy="unset WDS_SECURE: fetching runs a program", permanent=True
        ) from None
    try:
        digest, num_bytes = hashlib.sha256(), 0
        while chunk := _read_chunk(pipe.stream.fileno(), stall_seconds=stall_seconds):
            sink.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
            if max_bytes is not None and num_bytes > max_bytes:
                raise _TransferError(f"it has more than the {max_bytes} bytes of the index", remedy=_REMEDY_CONTENT)
        try:
            status = pipe.proc.wait(timeout=stall_seconds)
        except subprocess.TimeoutExpired:
            raise _TransferError(f"the program did not end within {stall_seconds:g} s of its last byte") from None
    finally:
        _end(pipe)
    if status != 0:
        raise _program_error(url, status, messages)
    return _Received(num_bytes, digest.hexdigest())


def _command(url: str, *, stall_seconds: float) -> str:
    """What writes a URL's content to its standard output."""
    scheme = _scheme(url)
    if scheme == "pipe":
        return url.removeprefix("pipe:")
    if scheme == "s3":
        return f"aws s3 cp --only-show-errors {shlex.quote(url)} -"
    if scheme == "gs":
        return f"gsutil -q cat {shlex.quote(url)}"
    # The URL has no brackets for curl to expand: `file_url` encodes them.
    # The speed limit only ends a curl whose parent was killed: a living parent stops it earlier.
    return (
        "curl --fail --silent --show-error --location "
        f"--speed-limit 1 --speed-time {math.ceil(2 * stall_seconds) + 1} --url {shlex.quote(url)}"
    )


def _read_chunk(descriptor: int, *, stall_seconds: float) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(math.ceil(1000 * stall_seconds)):
        raise _TransferError(f"it stalled: no byte for {stall_seconds:g} s")
    return os.read(descriptor, _CHUNK_BYTES)


def _end(pipe: Any) -> None:
    """Kill what still runs, helpers included, and reap it."""
    if pipe.proc.returncode is None:
        try:
            os.killpg(pipe.proc.pid, signal.SIGKILL)
        except ProcessLookupError:  # between its start and setsid
            pipe.proc.kill()
        pipe.proc.wait()
    pipe.stream.close()


def _program_error(url: str, status: int, messages: Path) -> _TransferError:
    said = " ".join(messages.read_bytes()[-500:].decode("utf-8", "replace").split())
    reason = f"its program ended with exit status {status} and said {said!r}"
    if status in (126, 127):
        return _TransferError(reason, remedy="install that program, or correct its name", permanent=True)
    http = re.search(r"returned error: (4\d\d)", said) if _scheme(url) in ("http", "https") else None
    # 4xx: the request itself is wrong, but for "time-out", "too early" and "too many requests".
    return _TransferError(reason, permanent=http is not None and http[1] not in ("408", "425", "429"))


def _check_content(got: _Received, *, num_bytes: int | None, sha256: str) -> None:
    if num_bytes is not None and got.num_bytes != num_bytes:
        raise _TransferError(f"it has {got.num_bytes} bytes, the index says {num_bytes}", remedy=_REMEDY_CONTENT)
    if got.sha256 != sha256:
        raise _TransferError(
            f"its sha256 is {got.sha256[:12]}..., the index says {sha256[:12]}...", remedy=_REMEDY_CONTENT
        )


def _check_sha256(url: str, sha256: str) -> None:
    """Because it becomes a file's name, and comes from a downloaded index."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{_shown(url)}: expected a sha256 of 64 hex digits, got {sha256[:80]!r}; index it again")


def _open_whole(path: Path, num_bytes: int) -> int | None:
    """A descriptor of a cached shard, marked as just used; None when it is not there or was cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != num_bytes:
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


class _CachedFile(NamedTuple):
    """Sorts as files are evicted: leftovers first, then the least recently opened."""

    is_shard: bool
    opened_ns: int
    num_bytes: int
    path: Path


def _files(folder: Path) -> list[_CachedFile]:
    """What of a folder is ours: a user's own shards may lie in it when the cache's folder was badly chosen."""
    files = []
    for path in folder.iterdir():
        if not re.fullmatch(r"[0-9a-f]{64}\.tar(\.tmp-\d+)?", path.name):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # another process evicts or publishes
            continue
        files.append(_CachedFile(path.suffix == ".tar", status.st_mtime_ns, status.st_size, path))
    return files


@contextmanager
def _flock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a file against other processes and threads; gives whether it is held, always True with `wait`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile shares the lock
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Delete what killed processes left of a file. Only under its lock, so nobody is writing it."""
    for leftover in path.parent.glob(f"{path.name}.tmp-*"):
        leftover.unlink(missing_ok=True)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _scheme(location: str) -> str | None:
    match = re.match(r"(pipe):|([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return (match[1] or match[2]).lower() if match else None


def _shown(url: str) -> str:
    """A URL for messages, without what may be secret: user, password, query."""
    if _scheme(url) in (None, "pipe"):
        return url
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])
