"""Shards: the bytes of one WebDataset tar. Writing it, listing it, reading one image out of it.

A sample is three adjacent members, `<key>.jpg|png` (the image file), `<key>.cls` (its label in
ASCII) and `<key>.json` (where it came from), with key `{split}-{id:08d}`; the id is the sample's
position in the split's index. Tars are USTAR with time 0 and fixed owner, so the same samples give
the same bytes on any machine, and any WebDataset reader or `tar` opens them.

Chosen: reading by offset (`os.pread`) with a crc32 check each time, because the index then defines
the epoch and a tar is only bytes.
Declined: reading a shard from its start, which ties the order of samples to the number of shards,
ranks and workers.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import webdataset

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


class ShardSample(NamedTuple):
    """One sample on its way into a shard."""

    key: str
    extension: str
    image: bytes
    label: int
    info: dict[str, Any]


class ListedSample(NamedTuple):
    """One sample found in a shard; offset and length are those of the image's bytes in the tar."""

    key: str
    label: int
    offset: int
    num_bytes: int
    crc32: int
    info: dict[str, Any]


class ListedShard(NamedTuple):
    """What a shard holds."""

    num_bytes: int
    sha256: str
    samples: list[ListedSample]


def sample_key(split: str, sample_id: int) -> str:
    """The key of a sample, `{split}-{id:08d}`; a dot in it would end the key."""
    return f"{split}-{sample_id:08d}"


def shard_name(split: str, number: int) -> str:
    """The file name of a shard, `{split}-{number:06d}.tar`."""
    return f"{split}-{number:06d}.tar"


def split_of_shard(file_name: str) -> str | None:
    """`train` for `train-000012.tar`; None for a file that is not named like a shard."""
    match = re.fullmatch(r"(.*?)[-_.]?\d+\.tar", file_name)
    return (match.group(1) or "train") if match else None


@contextmanager
def publish(path: Path) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all: into a temporary one, flushed to disk, renamed to `path`.

    An interrupted block leaves no file named `path`; a killed process leaves at most `path` with
    suffix `.tmp-PID`.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_shard(path: Path, samples: Iterable[ShardSample]) -> None:
    """Write samples to a tar at `path`, published by rename.

    The bytes depend on nothing but the samples.
    """
    with publish(path) as stream:
        with webdataset.TarWriter(
            stream,
            user="root",
            group="root",
            mode=0o644,
            encoder=False,
            mtime=0,
            format=tarfile.USTAR_FORMAT,
        ) as writer:
            for sample in samples:
                info = json.dumps(sample.info, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
                writer.write(
                    {
                        "__key__": sample.key,
                        sample.extension: sample.image,
                        "cls": str(sample.label).encode("ascii"),
                        "json": info.encode("utf-8"),
                    }
                )


def list_shard(path: Path) -> ListedShard:
    """Read a tar from end to end: its samples in order, its size and its sha256.

    Works for tars of other writers too: members group by the name before the first dot, the label
    is the `.cls` member, and a `.json` member is optional. Raises ValueError naming the shard and
    the member when a sample lacks an image or a label, when a key comes back after another one, or
    when the file is not a whole tar.
    """
    content = path.read_bytes()
    members: OrderedDict[str, dict[str, tuple[int, bytes]]] = OrderedDict()
    last_key = None
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key in members and key != last_key:
                    raise ValueError(f"{path}: the members of sample {key} are not adjacent; write the shard again")
                last_key = key
                payload = content[member.offset_data : member.offset_data + member.size]
                if len(payload) != member.size:
                    raise ValueError(f"{path}: truncated inside {member.name}; copy or build the shard again")
                members.setdefault(key, {})[extension.lower()] = (member.offset_data, payload)
    except tarfile.TarError as problem:
        raise ValueError(f"{path}: not a readable tar ({problem}); copy or build the shard again") from problem
    if content[-1024:].strip(b"\0"):
        raise ValueError(f"{path}: the tar has no end mark, so it was cut; copy or build the shard again")

    samples = [_listed_sample(path, key, fields) for key, fields in members.items()]
    return ListedShard(len(content), hashlib.sha256(content).hexdigest(), samples)


def _listed_sample(path: Path, key: str, fields: dict[str, tuple[int, bytes]]) -> ListedSample:
    extensions = [extension for extension in IMAGE_EXTENSIONS if extension in fields]
    if len(extensions) != 1 or "cls" not in fields:
        raise ValueError(
            f"{path}: sample {key} has members {sorted(fields)}; expected one of {', '.join(IMAGE_EXTENSIONS)}, and cls"
        )
    text = fields["cls"][1].decode("ascii", "replace").strip()
    if not text.isdigit():
        raise ValueError(f"{path}: sample {key} has the label {text[:40]!r}; expected a non-negative integer in ASCII")
    offset, image = fields[extensions[0]]
    try:
        info = json.loads(fields["json"][1]) if "json" in fields else {}
    except ValueError as problem:
        raise ValueError(f"{path}: the JSON of sample {key} is damaged ({problem})") from problem
    if not isinstance(info, dict):
        info = {"json": info}
    return ListedSample(key, int(text), offset, len(image), zlib.crc32(image), info)


class ShardReader:
    """Reads image files out of shards by offset; keeps at most `max_open` of them open.

    Usable in forked and spawned workers.
    """

    def __init__(self, paths: Sequence[Path], *, max_open: int = 64) -> None:
        self.paths = list(paths)
        self.max_open = max_open
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "max_open": self.max_open, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all shards; reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, shard: int, *, offset: int, num_bytes: int, crc32: int) -> bytes:
        """The bytes `offset <= i < offset + num_bytes` of a shard.

        Raises ValueError when they are cut off or their crc32 differs.
        """
        payload = os.pread(self._open(shard), num_bytes, offset)
        if len(payload) != num_bytes:
            raise ValueError(f"expected {num_bytes} bytes at offset {offset}, got {len(payload)}: the file was cut")
        if zlib.crc32(payload) != crc32:
            raise ValueError(f"crc32 is {zlib.crc32(payload):08x}, the index says {crc32:08x}: the bytes changed")
        return payload

    def _open(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        try:
            descriptor = os.open(self.paths[shard], os.O_RDONLY)
        except OSError as problem:
            raise ValueError(f"the file cannot be opened: {problem.strerror}") from problem
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > self.max_open:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor
