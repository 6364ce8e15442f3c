"""Shards: write a WebDataset tar, list it, read single images from it.

A sample is three adjacent members, `<key>.jpg|png|webp` (the image file), `<key>.cls` (its label in
ASCII) and `<key>.json` (its origin), with key `{split}-{id:08d}`; the id is the sample's
position in the split's index. Tars are USTAR with time 0 and fixed owner, so the same samples give
the same bytes on any machine, and any WebDataset reader or `tar` opens them.

Chosen: reading by offset (`os.pread`) with a crc32 check each time, because the index then defines
the epoch and a tar is only bytes.
Declined: sequential reading, which ties the order of samples to the number of shards, ranks and
workers.
"""

import contextlib
import hashlib
import io
import json
import mmap
import os
import re
import tarfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dist_proxygml.storage.files import parse_json, publish

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL = 2**31 - 1  # the range of SAMPLE_DTYPE
_LEAVE_AFTER = 4 << 20  # buffered bytes of a shard being written
_END_MARK = 2 * tarfile.BLOCKSIZE  # zero bytes after the last member
_NAMES = {"encoding": "utf-8", "errors": "backslashreplace"}  # of members: any bytes, shown
LONGEST_HEADER = 32 * tarfile.BLOCKSIZE  # of a member with a name of any length that a file system allows
_PACKED = {
    b"\x1f\x8b": ("a gzip file", "unpack it with `gunzip`"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it with `unzstd`"),
    b"BZh": ("a bzip2 file", "unpack it with `bunzip2`"),
    b"\xfd7zXZ": ("an xz file", "unpack it with `unxz`"),
    b"PK\x03\x04": ("a zip archive", "unpack it, and write its files into a tar"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file with `git lfs pull`"),
    b"<": ("a web page", "download the shard again"),
}

# A sample: its shard's number, its label, the place of the image's bytes in the shard, and their crc32.
SAMPLE_DTYPE = np.dtype([("shard", "<u4"), ("label", "<i4"), ("offset", "<u8"), ("nbytes", "<u4"), ("crc32", "<u4")])


class ShardSample(NamedTuple):
    """A sample to be written to a shard."""

    key: str
    extension: str
    image: bytes
    label: int
    info: dict[str, Any]


class ListedShard(NamedTuple):
    """Contents of a shard: its samples in order, and the classes that their JSON names."""

    num_bytes: int
    sha256: str
    keys: list[str]
    rows: np.ndarray  # [n] of SAMPLE_DTYPE, with shard 0
    classes: dict[int, tuple[str, int | str]]  # label -> (name, source id)
    counted: Mapping[str, int] = {}  # by their JSON: `turned` (EXIF), `upright` (and to be), and former formats
    cameras: tuple[int, ...] = ()  # the camera that the JSON of each sample names, if that of every sample does


def sample_key(split: str, sample_id: int) -> str:
    """Return the key of a sample, `{split}-{id:08d}`; a dot would end the key."""
    return f"{split}-{sample_id:08d}"


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, `{split}-{number:06d}.tar`."""
    return f"{split}-{number:06d}.tar"


def split_of_shard(file_name: str) -> str | None:
    """Return `train` for `train-000012.tar`; None for a file not named like a shard."""
    match = re.fullmatch(r"(.*?)[-_.]?\d+\.tar", file_name)
    return (match.group(1) or "train") if match else None


def write_shard(path: Path, samples: Iterable[ShardSample]) -> ListedShard:
    """Write samples to a tar at `path`, atomically; return what `list_shard` would.

    The bytes depend on the samples only: members are sorted by name, padded to whole records of 20 blocks as tar does.
    Raises ValueError for a key with a dot or slash, which would end it.
    """
    keys: list[str] = []
    rows: list[tuple[int, int, int, int, int]] = []
    classes: dict[int, tuple[str, int | str]] = {}
    cameras: list[Any] = []
    digest = hashlib.sha256()
    pattern = _header_pattern()
    num_bytes = num_leaving = 0
    counted = Counter[str]()
    with publish(path, flush_folder=False) as stream:  # the index comes after it

        def write(block: bytes) -> None:
            nonlocal num_bytes, num_leaving
            digest.update(block)
            stream.write(block)
            num_bytes += len(block)
            if num_bytes - num_leaving > _LEAVE_AFTER:  # flushed to disk in the background
                stream.flush()
                os.posix_fadvise(stream.fileno(), num_leaving, num_bytes - num_leaving, os.POSIX_FADV_DONTNEED)
                num_leaving = num_bytes

        for sample in samples:
            if "." in sample.key or "/" in sample.key:
                raise ValueError(f"the key {sample.key!r} has a dot or a slash; WebDataset would cut it there")
            info = json.dumps(sample.info, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            members = {
                "cls": str(sample.label).encode("ascii"),
                "json": info.encode("utf-8"),
                sample.extension: sample.image,
            }
            parts: list[bytes] = []
            for extension, payload in sorted(members.items()):
                parts.append(_tar_header(f"{sample.key}.{extension}", len(payload), pattern))
                if extension == sample.extension:
                    offset = num_bytes + sum(map(len, parts))
                parts += [payload, bytes(-len(payload) % tarfile.BLOCKSIZE)]
            keys.append(sample.key)
            rows.append((0, sample.label, offset, len(sample.image), zlib.crc32(sample.image)))
            _note_class(path, classes, sample.label, sample.info)
            _count(counted, sample.info)
            cameras.append(sample.info.get("camera"))
            write(b"".join(parts))
        write(bytes(_END_MARK + -(num_bytes + _END_MARK) % tarfile.RECORDSIZE))
    table = np.array(rows, SAMPLE_DTYPE)
    return ListedShard(num_bytes, digest.hexdigest(), keys, table, classes, counted, _numbers(cameras))


def _numbers(cameras: list[Any]) -> tuple[int, ...]:
    """Return the cameras of all samples, nothing if one of them has none that an int32 holds."""
    return tuple(cameras) if all(type(camera) is int and 0 <= camera < 2**31 for camera in cameras) else ()


def _header_pattern() -> bytes:
    """Return the standard library's header of an empty file without a name, owned by root at time 0."""
    member = tarfile.TarInfo()
    member.mode = 0o644
    member.uname = member.gname = "root"
    return member.tobuf(tarfile.USTAR_FORMAT)


def _tar_header(name: str, num_bytes: int, pattern: bytes) -> bytes:
    """The 512 bytes before a member: the pattern with name (bytes 0-99), size (124-135) and checksum (148-155), which
    is the sum of all bytes with blanks in its own place (POSIX.1-1988, ustar). tarfile's, the same to the byte, takes a
    fifth of a build's time more, its writer a third to a half, webdataset's more than a half.
    """
    text = name.encode("utf-8")
    if len(text) > 100:
        raise ValueError(f"the member name {name!r} has {len(text)} bytes; a USTAR header has room for 100")
    header = bytearray(pattern)
    header[: len(text)] = text
    header[124:135] = b"%011o" % num_bytes
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def list_shard(
    path: Path, *, check_image: Callable[[str, bytes, Mapping[str, Any]], None] | None = None
) -> ListedShard:
    """Read a complete tar: its samples in order, its size and its sha256.

    Works for tars of other writers too: members are grouped by their path up to the first dot of the file name, the
    label is the `.cls` member, and a `.json` member is optional. `check_image` is called with the key, the image file
    and the JSON of every sample. Raises ValueError naming the shard and the member if a sample lacks an image or a
    label, a key reappears after another one, a member occurs twice, a label has two class names, or the tar is
    incomplete.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"{path} is {kind}, expected a tar file; move it away or rename it")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: an empty file; copy or build the shard again")
    # Mapped, not read: a shard may be larger than memory.
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as content:
        samples = _members_by_sample(path, stream, content)
        rows = np.zeros(len(samples), SAMPLE_DTYPE)
        classes: dict[int, tuple[str, int | str]] = {}
        counted = Counter[str]()
        cameras = []
        for position, (key, members) in enumerate(samples.items()):
            label, (offset, num_bytes), info = _sample_fields(path, key, members, content)
            image = content[offset : offset + num_bytes]
            rows[position] = (0, label, offset, num_bytes, zlib.crc32(image))
            _note_class(path, classes, label, info)
            _count(counted, info)
            cameras.append(info.get("camera"))
            if check_image is not None:
                check_image(key, image, info)
        sha256 = hashlib.sha256(content).hexdigest()
        return ListedShard(size, sha256, list(samples), rows, classes, counted, _numbers(cameras))


def _count(counted: Counter[str], info: Mapping[str, Any]) -> None:
    """Count what the index says of all images together, by the JSON of one."""
    counted["turned"] += "orientation" in info
    counted["upright"] += info.get("exif") == "applied"
    if "reencoded" in info:
        counted[str(info["reencoded"])] += 1


def _no_tar(content: mmap.mmap, problem: Exception) -> str:
    """Message about a file that tarfile cannot read."""
    for mark, (kind, remedy) in _PACKED.items():
        if content[: len(mark)] == mark:
            return f"expected a plain tar, got {kind}; {remedy}"
    return f"not a readable tar ({problem}); copy or build the shard again"


def _note_class(path: Path, classes: dict[int, tuple[str, int | str]], label: int, info: Mapping[str, Any]) -> None:
    """Record the class name that the sample's JSON gives its label. Raises ValueError if there are two."""
    if "class_name" in info:
        name = str(info["class_name"])
        known, _ = classes.setdefault(label, (name, info.get("source_id", label)))
        if known != name:
            raise ValueError(
                f"{path}: label {label} has two class names, {known!r} and {name!r}; "
                "write the shards again with one name for each label"
            )


def split_name(member: str) -> tuple[str, str]:
    """Split a member's path into key, up to the first dot of the file name, and extension in lower case.

    A leading `./` is not part of a key; control characters are escaped as in Python.
    """
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda sign: repr(sign.group())[1:-1], re.sub(r"^(\./+)+", "", member))
    folder, slash, base = shown.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def member_name(blocks: bytes) -> str | None:
    """Read the name of the member whose header ends `blocks`, whole blocks of a tar; None for a damaged header.

    The name is in that header or, if it is long or not ASCII, in a GNU or PAX entry before it.
    """
    last = len(blocks) - tarfile.BLOCKSIZE
    try:
        plain = tarfile.TarInfo.frombuf(blocks[-tarfile.BLOCKSIZE :], **_NAMES).name
    except (tarfile.TarError, ValueError):
        return None
    for start in range(last - tarfile.BLOCKSIZE, -1, -tarfile.BLOCKSIZE):
        is_entry = blocks[start + 156 : start + 157] in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
        if is_entry and blocks.startswith(b"ustar", start + 257):
            with (
                contextlib.suppress(tarfile.TarError, ValueError),
                tarfile.open(fileobj=io.BytesIO(blocks[start:]), mode="r:", **_NAMES) as tar,  # type: ignore[call-overload]
            ):
                member = tar.next()
                if member is not None and member.offset_data == len(blocks) - start:
                    return str(member.name)
    return plain


def _members_by_sample(path: Path, stream: IO[bytes], content: mmap.mmap) -> dict[str, dict[str, tuple[int, int]]]:
    """Map key -> extension -> (offset, number of bytes) for every file in a tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    last_key = None
    try:
        with tarfile.open(fileobj=stream, mode="r:", **_NAMES) as tar:  # type: ignore[call-overload]
            for member in tar:
                key, extension = split_name(member.name)
                if (member.islnk() or member.issym()) and extension in (*IMAGE_EXTENSIONS, "cls"):
                    raise ValueError(
                        f"{path}: {shown_key(key)}.{extension} is a link, expected a file; write the shard again with "
                        "`tar --dereference --hard-dereference`"
                    )
                if not member.isfile() or not extension or not key.rpartition("/")[2]:
                    continue  # as every reader of WebDataset does: a file without a suffix or with a dot in front
                if member.issparse():
                    raise ValueError(
                        f"{path}: {shown_key(key)}.{extension} is stored without its zeros (tar -S), expected the "
                        "whole file; write the shard again without that option"
                    )
                if key in samples and key != last_key:
                    raise ValueError(
                        f"{path}: the members of sample {shown_key(key)} are not adjacent; write the shard again, as "
                        "`tar --sort=name` does"
                    )
                last_key = key
                if member.offset_data + member.size > len(content):
                    raise ValueError(
                        f"{path}: truncated inside {shown_key(key)}.{extension}; copy or build the shard again"
                    )
                members = samples.setdefault(key, {})
                if extension in members:
                    raise ValueError(
                        f"{path}: the member {shown_key(key)}.{extension} comes twice, or two samples have one key; "
                        "write the shard again with a key of its own for each sample"
                    )
                members[extension] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, RecursionError, OverflowError) as problem:  # a thousand consecutive headers of long names
        raise ValueError(f"{path}: {_no_tar(content, problem)}") from problem
    # tarfile treats a damaged header as the end of the tar.
    if content[end:].strip(b"\0"):
        raise ValueError(f"{path}: a damaged header at byte {end}; copy or build the shard again")
    if len(content) - end < _END_MARK:
        raise ValueError(f"{path}: the tar has no end mark, so it was cut; copy or build the shard again")
    return samples


def _sample_fields(
    path: Path, key: str, members: Mapping[str, tuple[int, int]], content: mmap.mmap
) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """Read the label, (offset, number of bytes) of the image, and the JSON."""
    extensions = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(extensions) != 1 or "cls" not in members:
        raise ValueError(f"{path}: sample {shown_key(key)} {wrong_members(members)}")

    def payload(extension: str) -> bytes:
        offset, num_bytes = members[extension]
        return content[offset : offset + num_bytes]

    label = read_label(payload("cls"))
    if not isinstance(label, int):
        raise ValueError(
            f"{path}: sample {shown_key(key)} has the label {label!r}; "
            f"expected a non-negative integer in ASCII, at most {MAX_LABEL}; write the shards again with labels that "
            "count the classes from 0, and their names as class_name in <key>.json"
        )
    try:
        info = parse_json(payload("json")) if "json" in members else {}
    except ValueError as problem:
        raise ValueError(f"{path}: the JSON of sample {shown_key(key)} is damaged ({problem})") from problem
    return label, members[extensions[0]], info if isinstance(info, dict) else {}


def wrong_members(extensions: Iterable[str]) -> str:
    """Describe what is wrong with a sample of these members."""
    names = sorted(extensions)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    text = (
        f"has members {[name[:40] for name in names[:5]]}{more}; expected one of {', '.join(IMAGE_EXTENSIONS)}, and cls"
    )
    if any(name.rpartition(".")[2] in (*IMAGE_EXTENSIONS, "cls") for name in names if "." in name):
        return f"{text}; keys end at the first dot of a file name: rename the members so that their keys have none"
    return f"{text}; write the shards again with these members"


def shown_key(key: str) -> str:
    """Shorten a key in the middle, for messages."""
    return key if len(key) <= 300 else f"{key[:150]}...{key[-100:]}"


def read_label(text: bytes) -> int | str:
    """Parse the label of a `.cls` member; return the beginning of its text if it is invalid."""
    shown = text[:64].decode("ascii", "replace").strip()
    # Limits the digits that are parsed.
    is_label = shown.isdigit() and len(shown) <= 20 and not text[64:].strip() and int(shown) <= MAX_LABEL
    return int(shown) if is_label else shown[:40]


class ShardUnavailableError(ValueError):
    """A shard cannot be opened or fetched; its images are not known to be damaged."""


class ShardReader:
    """Reads image files from shards by offset, keeping at most `max_open` shards open.

    `open_shard` returns a file descriptor for a shard's number, or raises ShardUnavailableError. Works in forked and
    spawned workers.
    """

    def __init__(self, open_shard: Callable[[int], int], *, max_open: int = 64) -> None:
        self.open_shard = open_shard
        self.max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"open_shard": self.open_shard, "max_open": self.max_open, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards; reading reopens them."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, shard: int, *, offset: int, num_bytes: int, crc32: int) -> bytes:
        """Read the bytes `offset <= i < offset + num_bytes` of a shard.

        Raises ShardUnavailableError, and ValueError if they cannot be read, are truncated, or their crc32 differs.
        """
        try:
            payload = os.pread(self._open(shard), num_bytes, offset)
        except OSError as problem:
            raise ValueError(f"the file cannot be read: {problem.strerror}") from problem
        if len(payload) != num_bytes:
            raise ValueError(
                f"expected {num_bytes} bytes at offset {offset}, got {len(payload)}: the file was truncated"
            )
        if zlib.crc32(payload) != crc32:
            raise ValueError(f"crc32 is {zlib.crc32(payload):08x}, the index says {crc32:08x}: the bytes changed")
        return payload

    def _open(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        descriptor = self._descriptors[shard] = self.open_shard(shard)
        if len(self._descriptors) > self.max_open:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor
