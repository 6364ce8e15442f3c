"""The index of a folder of shards: its contents, the place of every image, and hashes.

    index.json                   kind, version, and per split: counts, hashes, shards (file, num_samples, bytes, sha256)
    index.samples.SPLIT.npy      24 bytes per sample, memory-mapped: shard, label, offset, nbytes, crc32
    index.classes.SPLIT.jsonl    a line per label: name, source id, number of images; read when names are needed
    index.cameras.SPLIT.npy      int32 [n]: the camera of each sample, where every sample's JSON names one
    index.pairs.SPLIT.tsv        pairs of a verification set under a header: first and second sample, same, fold

The index alone defines an epoch; shards are only bytes. It is written last, so a folder without one is an unfinished
build. Opening performs all cheap checks before any work: kind, version and type of every field, that each name is that
of a file beside it, the hashes of all tables, that every row of the sample table has a class and lies in its shard,
and the presence and size of every shard. An untrusted index therefore cannot mislead a reader. `verify --deep` reads
the rest.
Declined: one JSON with a record per image or class, which takes seconds to parse and memory in every worker.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dist_proxygml.data.images import MAX_BYTES
from dist_proxygml.data.remote import MAX_INDEX_BYTES, ShardCache, is_remote
from dist_proxygml.data.shards import (
    LONGEST_HEADER,
    MAX_LABEL,
    SAMPLE_DTYPE,
    ListedShard,
    ShardUnavailableError,
    member_name,
    shown_key,
    split_name,
)
from dist_proxygml.storage.files import parse_json, paths_in, publish, publish_text, sha256_of

INDEX_FILE = "index.json"
JOURNAL_FILE = "build.unfinished.jsonl"  # of an unfinished build
INDEX_KIND = "dist-proxygml-index"
INDEX_VERSION = 2
_TURNING_VERSION = 3  # where images are turned as they are read, which programs of version 2 would not do
_NEAR = 16 << 10  # bytes next to an image in which its JSON is searched
_MAX_HEADER_BYTES = 4096  # of a table that a server sends, before its rows
_MAX_CLASS_BYTES = 4096  # of its class table, on average
_MAX_PAIR_BYTES = 64  # of a line of its table of pairs
PAIR_COLUMNS = ("first", "second", "same", "fold")
NUM_FOLDS = 10


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """One class of a split; labels are contiguous from 0 in the order of the source's ids."""

    label: int
    name: str
    source_id: int | str
    count: int


class ShardEntry(NamedTuple):
    """One shard file of a split."""

    file: str
    num_samples: int
    bytes: int
    sha256: str


class ChosenClasses(NamedTuple):
    """The classes of a stored split that an index consists of."""

    split: str  # as it is stored
    labels: np.ndarray  # int64 [C], ascending: the stored label of each label


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One split of a folder of shards, or some of its classes. A sample's id is its row in `samples`."""

    root: Path
    split: str
    dataset: str
    num_classes: int  # C: labels are 0..C-1
    shards: tuple[ShardEntry, ...]
    class_table_sha256: str  # of (label, name, source_id), the class table of the proxy bank
    sha256: str  # of index.json
    samples: np.ndarray  # [n] of SAMPLE_DTYPE, memory-mapped
    remote: ShardCache | None = None  # where the shards come from if not from `root`
    chosen: ChosenClasses | None = None  # None: all classes
    keys_repeat: bool = False  # from shard to shard; within one they never do
    upright: bool = False  # images are turned as their EXIF orientation says
    cameras: np.ndarray | None = None  # int32 [n], where every sample has one
    num_pairs: int = 0  # of a verification set: `read_pairs`

    @property
    def location(self) -> str:
        """Location of the shards, for messages."""
        return str(self.root) if self.remote is None else self.remote.shown_location

    @property
    def num_samples(self) -> int:
        """Number of images n of the split."""
        return len(self.samples)

    @cached_property
    def classes(self) -> tuple[ClassEntry, ...]:
        """The class table, in the order of labels; read on demand, since only messages need names."""
        entries = []
        for label, line in enumerate(self._class_lines()):
            try:
                name, source_id, count = parse_json(line)
            except (ValueError, TypeError):
                name = source_id = count = None
            if not (isinstance(name, str) and isinstance(source_id, int | str) and isinstance(count, int)):
                table = self.root / class_table_name(self.split if self.chosen is None else self.chosen.split)
                raise ValueError(
                    f"{table}: expected a line [name, id, count] for each class, got {line[:80]!r}; make the index "
                    f"again with `python -m dist_proxygml.shard index {self.root}`"
                )
            entries.append(ClassEntry(label, name, source_id, count))
        return tuple(entries)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of every sample, int64 [n]; a copy in memory."""
        return self.samples["label"].astype(np.int64)

    @property
    def shard_paths(self) -> list[Path]:
        """Paths of the shards, in the order of `shards`."""
        return [self.root / shard.file for shard in self.shards]

    def open_sibling(self, split: str) -> "ShardIndex":
        """Open another split of the same shards. Raises ValueError as `open_index`."""
        if self.remote is None:
            return open_index(self.root, split)
        remote = self.remote
        return open_index(
            remote.location,
            split,
            cache_directory=remote.directory,
            cache_limit=remote.limit_bytes,
            is_typed=remote.is_typed,
        )

    def write_class_table(self, stream: IO[bytes]) -> None:
        """Write the class table in its file format."""
        stream.writelines(self._class_lines())

    def _class_lines(self) -> Iterator[bytes]:
        split, labels = (self.split, None) if self.chosen is None else self.chosen
        wanted = None if labels is None else set(labels.tolist())
        with open(self.root / class_table_name(split), "rb") as lines:
            yield from (line for label, line in enumerate(lines) if wanted is None or label in wanted)

    def choose_classes(self, labels: np.ndarray, *, name: str) -> "ShardIndex":
        """Return a split of some classes only, relabelled 0, 1, ... in the order of their old labels.

        Ids are renumbered in the same order; the samples are a copy in memory.

        Args:
            labels: int64, distinct.
            name: name of the new split.
        """
        assert self.chosen is None
        labels = np.sort(labels)
        new_label_of = np.full(self.num_classes, -1, np.int64)
        new_label_of[labels] = np.arange(len(labels))
        label_n = new_label_of[self.samples["label"]]
        samples = self.samples[label_n >= 0]
        samples["label"] = label_n[label_n >= 0]
        part = replace(
            self,
            split=name,
            num_classes=len(labels),
            samples=samples,
            chosen=ChosenClasses(self.split, labels),
            cameras=None if self.cameras is None else self.cameras[label_n >= 0],
            num_pairs=0,
        )
        return replace(part, class_table_sha256=class_table_sha256(part.classes))

    def open_shard(self, number: int) -> int:
        """Open a file descriptor of a shard, fetching a remote one first. Raises ShardUnavailableError."""
        shard = self.shards[number]
        try:
            if self.remote is not None:
                return self.remote.open_shard(file=shard.file, num_bytes=shard.bytes, sha256=shard.sha256)
            return os.open(self.root / shard.file, os.O_RDONLY)
        except OSError as problem:
            raise ShardUnavailableError(f"the file cannot be opened: {problem.strerror}") from problem
        except ValueError as problem:
            raise ShardUnavailableError(str(problem)) from problem

    def drop_damaged_copy(self, number: int) -> bool:
        """Remove this node's copy of a remote shard if it is damaged; return whether it was."""
        return self.remote is not None and self.remote.drop_if_damaged(self.shards[number].sha256)

    def build_record(self) -> dict[str, Any]:
        """Read how the shards were built: seed, resizing, hash of the source. Raises ValueError as `read_index`."""
        return dict(read_index(self.root)[0]["build"])

    def read_pairs(self) -> np.ndarray:
        """Read the pairs of a verification set, int64 [num_pairs, 4]: first and second id, same (0, 1), fold (0 to 9).

        Raises ValueError if there are none, or one is damaged.
        """
        if not self.num_pairs:
            raise ValueError(
                f"split {self.split!r} of {self.location} has no pairs; build a verification set with "
                "`python -m dist_proxygml.shard build pairs`"
            )
        table = self.root / pair_table_name(self.split)
        header, *lines = table.read_text(encoding="ascii", errors="replace").splitlines()
        try:
            pairs_n4 = np.array([[int(number) for number in line.split("\t")] for line in lines], np.int64)
            is_right = (pairs_n4 >= 0) & (pairs_n4 < [self.num_samples, self.num_samples, 2, NUM_FOLDS])
            if header != "\t".join(PAIR_COLUMNS) or is_right.shape != (self.num_pairs, 4) or not is_right.all():
                raise ValueError("another header, number of pairs, or a number out of range")
        except ValueError as problem:
            raise ValueError(
                f"{table}: expected {self.num_pairs} lines of {', '.join(PAIR_COLUMNS)}, ids below "
                f"{self.num_samples}, got {problem}; build the verification set again"
            ) from None
        return pairs_n4

    def describe(self, sample_id: int) -> str:
        """Describe a sample for messages: shard file, key, label, and its source file."""
        row = self.samples[sample_id]
        shard = self.shards[row["shard"]].file
        key = self.key(sample_id) or f"{sample_id} of {self.split}"
        source = self.source(sample_id)
        made_of = "" if source is None else f", made of {source}"
        return f"{self.location}/{shard}, sample {shown_key(key)} (label {row['label']}{made_of})"

    def key(self, sample_id: int) -> str | None:
        """Read the key of a sample from the tar header of its image; None if that is damaged."""
        offset = int(self.samples[sample_id]["offset"])
        start = max(0, offset - LONGEST_HEADER)
        try:
            name = member_name(self._bytes_of_shard(sample_id, offset - start, start))
        except (ValueError, OSError):
            return None
        return None if name is None else split_name(name)[0]

    def name(self, sample_id: int) -> str:
        """Return a unique name within the split: the key, prefixed by the shard's name if keys repeat."""
        key = self.key(sample_id) or f"{self.split}-{sample_id:08d}"
        shard = self.shards[self.samples["shard"][sample_id]].file
        return f"{shard.removesuffix('.tar')}/{key}" if self.keys_repeat else key

    def source(self, sample_id: int) -> str | None:
        """Read a sample's source file from its JSON, which lies next to its image; None if missing."""
        row, key = self.samples[sample_id], self.key(sample_id)
        start, end = int(row["offset"]), int(row["offset"]) + int(row["nbytes"])
        end += -end % tarfile.BLOCKSIZE
        try:
            for first, num_bytes in ((end, _NEAR), (max(0, start - _NEAR), min(start, _NEAR))):
                near = self._bytes_of_shard(sample_id, num_bytes, first)
                at = near.find(f"{key}.json\0".encode())
                if at >= 0:
                    member = tarfile.TarInfo.frombuf(near[at : at + tarfile.BLOCKSIZE], "utf-8", "replace")
                    info = parse_json(self._bytes_of_shard(sample_id, min(member.size, _NEAR), first + at + 512))
                    return str(info["source"])
        except (ValueError, OSError, tarfile.TarError, KeyError, TypeError):
            pass
        return None

    def _bytes_of_shard(self, sample_id: int, num_bytes: int, offset: int) -> bytes:
        """Read some bytes of a sample's shard. Raises OSError, and ValueError as `open_shard`."""
        descriptor = self.open_shard(int(self.samples[sample_id]["shard"]))
        try:
            return os.pread(descriptor, num_bytes, offset)
        finally:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would be pickled as a copy of its content; a worker maps the file again instead.
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.chosen is None:  # the samples of chosen classes are in memory anyway
            del plain["samples"]
        return _map_again, (plain,)


def _map_again(plain: dict[str, Any]) -> ShardIndex:
    if "samples" not in plain:
        plain["samples"] = _map_samples(plain["root"] / sample_table_name(plain["split"]))
    return ShardIndex(**plain)


def _map_samples(table: Path) -> np.ndarray:
    return np.lib.format.open_memmap(table, mode="r")


def sample_table_name(split: str) -> str:
    """Return the file name of a split's sample table."""
    return f"index.samples.{split}.npy"


def class_table_name(split: str) -> str:
    """Return the file name of a split's class table."""
    return f"index.classes.{split}.jsonl"


def camera_table_name(split: str) -> str:
    """Return the file name of the cameras of a split's samples."""
    return f"index.cameras.{split}.npy"


def pair_table_name(split: str) -> str:
    """Return the file name of the pairs of a verification set."""
    return f"index.pairs.{split}.tsv"


def default_cache() -> Path:
    """Return the default folder for remote shards."""
    return Path.home() / ".cache" / "dist_proxygml" / "shards"


def open_index(
    location: str | Path,
    split: str,
    *,
    cache_directory: Path | None = None,
    cache_limit: int | None = None,
    is_typed: bool = False,
) -> ShardIndex:
    """Open one split of a local or remote folder of shards (see `remote`).

    Remote files are cached in `cache_directory`, ~/.cache/dist_proxygml/shards by default, shards up to `cache_limit`
    bytes in total. A `pipe:` location must be `is_typed` by the user: no file may determine what is run.

    Raises ValueError, stating the problem and its fix, if the folder or its index is missing, the
    version differs, the split does not exist, the sample table is stale, or a shard is missing or
    has another size.
    """
    remote = None
    if is_remote(str(location)):
        cache_directory = cache_directory or default_cache()
        remote = ShardCache(str(location), cache_directory, limit_bytes=cache_limit, is_typed=is_typed)
    root = Path(location) if remote is None else remote.fetch_index()
    document, digest = read_index(root)
    splits = document["splits"]
    if split not in splits:
        raise ValueError(
            f"{root / INDEX_FILE} has the splits {', '.join(sorted(splits))}, not {split!r}; name one of them"
        )
    return _open_split(root, split, document, digest, remote)


def list_splits(
    location: str | Path, *, cache_directory: Path | None = None, cache_limit: int | None = None
) -> list[str]:
    """List the splits of a local or remote folder of shards that the user named, sorted. Raises ValueError as
    `open_index`.
    """
    root = Path(location)
    if is_remote(str(location)):
        cache = ShardCache(str(location), cache_directory or default_cache(), limit_bytes=cache_limit, is_typed=True)
        root = cache.fetch_index()
    return sorted(read_index(root)[0]["splits"])


def read_index(root: Path) -> tuple[dict[str, Any], str]:
    """Read `index.json` and its sha256.

    Raises ValueError if it is missing, not JSON, of another kind or version, or lacks a field that concerns all splits.
    """
    build = "build the shards with `python -m dist_proxygml.shard build`"
    if not root.is_dir():
        raise ValueError(f"shard folder {root} does not exist; {build}, or name another folder")
    path = root / INDEX_FILE
    if not path.is_file():
        num_tars = len(paths_in(root, "*.tar"))
        if (root / JOURNAL_FILE).exists():
            remedy = "an unfinished build; run the same `python -m dist_proxygml.shard build` again"
        elif num_tars:
            remedy = (
                f"an unfinished build has none, so run the build again; "
                f"for shards of another origin run `python -m dist_proxygml.shard index {root}`"
            )
        else:
            remedy = build
        raise ValueError(f"shard folder {root} has {num_tars} tar files and no {INDEX_FILE}; {remedy}")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, expected at most {MAX_INDEX_BYTES:,}; copy it again"
        )
    content = path.read_bytes()
    try:
        document = parse_json(content)
    except ValueError as problem:
        raise ValueError(
            f"{path} is not JSON ({problem}); copy it again or run `python -m dist_proxygml.shard index {root}`"
        ) from None
    if not isinstance(document, dict) or document.get("kind") != INDEX_KIND:
        raise ValueError(
            f"{path} is not a shard index: expected the kind {INDEX_KIND!r}; name a folder built by dist_proxygml.shard"
        )
    if document.get("version") not in (INDEX_VERSION, _TURNING_VERSION):
        raise ValueError(
            f"{path} has version {document.get('version')}, this program reads versions "
            f"{INDEX_VERSION} and {_TURNING_VERSION}; "
            f"run `python -m dist_proxygml.shard index {root}` or use the program that wrote it"
        )
    garbled = _garbled_field(document)
    if garbled is not None:
        raise ValueError(
            f"{path} lacks or garbles the field {garbled!r}; "
            f"make the index again with `python -m dist_proxygml.shard index {root}`"
        )
    return document, hashlib.sha256(content).hexdigest()


def _garbled_field(document: Mapping[str, Any]) -> str | None:
    """Return the first field of an index with a wrong type or range, or None. Names must be those of files in the
    index's own folder, so that nothing else can be read.
    """
    for name, kind in (("dataset", str), ("build", dict), ("splits", dict)):
        if not isinstance(document.get(name), kind):
            return name
    if not isinstance(document["build"].get("skipped", []), list):
        return "build.skipped"
    if document["build"].get("exif") != ("applied" if document["version"] == _TURNING_VERSION else None):
        return "build.exif"
    for split, entry in document["splits"].items():
        if not isinstance(entry, dict) or not _is_file_name(class_table_name(split)):
            return f"splits.{split}"
        for name in ("samples", "classes", *({"cameras", "pairs"} & entry.keys())):
            if not isinstance(entry.get(name), dict) or not isinstance(entry[name].get("sha256"), str):
                return f"splits.{split}.{name}.sha256"
        if "pairs" in entry and not _is_count(entry["pairs"].get("num_pairs"), 2**31):
            return f"splits.{split}.pairs.num_pairs"
        if not isinstance(entry.get("class_table_sha256"), str):
            return f"splits.{split}.class_table_sha256"
        for name, most in (("num_samples", 2**63), ("num_classes", MAX_LABEL + 1)):
            if not _is_count(entry.get(name), most):
                return f"splits.{split}.{name}"
        shards = entry.get("shards")
        if not isinstance(shards, list):
            return f"splits.{split}.shards"
        files = set()
        for number, shard in enumerate(shards):
            where = f"splits.{split}.shards.{number}"
            if not isinstance(shard, dict) or not isinstance(shard.get("sha256"), str):
                return f"{where}.sha256"
            for name in ("num_samples", "bytes"):
                if not _is_count(shard.get(name), 2**63):
                    return f"{where}.{name}"
            if not _is_file_name(shard.get("file")) or shard["file"] in files:
                return f"{where}.file (expected the name of a file beside it, once)"
            files.add(shard["file"])
    return None


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_file_name(value: Any) -> bool:
    """Whether a value is a plain file name: no path, no control characters."""
    return (
        isinstance(value, str) and value.isprintable() and re.fullmatch(r"(?!\.{1,2}$)[^/]{1,255}", value) is not None
    )


def _open_split(
    root: Path, split: str, document: Mapping[str, Any], digest: str, remote: ShardCache | None
) -> ShardIndex:
    entry = document["splits"][split]
    shards = tuple(ShardEntry(s["file"], s["num_samples"], s["bytes"], s["sha256"]) for s in entry["shards"])
    problems = shard_size_problems(root, shards) if remote is None else []
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(
            f"{root}: {len(problems)} of {len(shards)} shards of {split!r} are unusable: {shown}; "
            "copy or build them again"
        )

    remedy = f"copy the folder again or run `python -m dist_proxygml.shard index {root}`"
    table = root / sample_table_name(split)
    num_samples, num_pairs = entry["num_samples"], entry.get("pairs", {}).get("num_pairs", 0)
    for kind, path, max_bytes in (
        ("samples", table, _MAX_HEADER_BYTES + num_samples * SAMPLE_DTYPE.itemsize),
        ("classes", root / class_table_name(split), entry["num_classes"] * _MAX_CLASS_BYTES),
        ("cameras", root / camera_table_name(split), _MAX_HEADER_BYTES + num_samples * 4),
        ("pairs", root / pair_table_name(split), (1 + num_pairs) * _MAX_PAIR_BYTES),
    ):
        if kind not in entry:
            continue
        expected = entry[kind]["sha256"]
        if remote is not None:
            remote.fetch_table(root, path.name, max_bytes=max_bytes, sha256=expected)
        if not path.is_file():
            raise ValueError(f"{path} is missing; {remedy}")
        found = sha256_of(path)
        if found != expected:
            raise ValueError(
                f"{path} does not belong to {root / INDEX_FILE}: sha256 {found[:12]}..., expected "
                f"{expected[:12]}...; {remedy}"
            )
    try:
        samples = _map_samples(table)
    except Exception as problem:  # NumPy raises ValueError, EOFError, OverflowError, SyntaxError ...
        raise ValueError(f"{table} is not a table of samples ({problem}); {remedy}") from problem
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (entry["num_samples"],):
        raise ValueError(
            f"{table} has {samples.shape} rows of {samples.dtype}, expected {entry['num_samples']} "
            f"of {SAMPLE_DTYPE}; {remedy}"
        )
    if len(samples) == 0:
        raise ValueError(f"{root / INDEX_FILE}: split {split!r} has no images; build the shards again")
    labels, num_classes = samples["label"], entry["num_classes"]
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"{table} has labels {labels.min()} to {labels.max()}, but {root / INDEX_FILE} has "
            f"{num_classes} classes; {remedy}"
        )
    _check_places(table, samples, shards, remedy=remedy)
    cameras = _read_cameras(root / camera_table_name(split), num_samples) if "cameras" in entry else None
    return ShardIndex(
        root,
        split,
        document["dataset"],
        num_classes,
        shards,
        entry["class_table_sha256"],
        digest,
        samples,
        remote,
        keys_repeat=entry.get("keys_repeat") is True,
        upright=document["version"] == _TURNING_VERSION,
        cameras=cameras,
        num_pairs=num_pairs,
    )


def _read_cameras(table: Path, num_samples: int) -> np.ndarray:
    try:
        cameras = np.load(table, allow_pickle=False)
        if cameras.dtype != np.dtype("<i4") or cameras.shape != (num_samples,):
            raise ValueError(f"{cameras.shape} of {cameras.dtype}")
    except Exception as problem:  # as of the table of samples
        raise ValueError(
            f"{table}: expected the cameras of {num_samples} samples, got {problem}; "
            f"run `python -m dist_proxygml.shard index {table.parent}`"
        ) from problem
    return np.asarray(cameras)


def _check_places(table: Path, samples: np.ndarray, shards: Sequence[ShardEntry], *, remedy: str) -> None:
    """Raise ValueError unless the samples are in the shards' order and each lies inside its shard."""
    filled = [(number, shard) for number, shard in enumerate(shards) if shard.num_samples]
    counts = [shard.num_samples for _, shard in filled]
    numbers = np.array([number for number, _ in filled], np.uint32)
    if sum(counts) != len(samples) or not np.array_equal(samples["shard"], np.repeat(numbers, counts)):
        raise ValueError(f"{table} and the {len(shards)} shards of the index have other counts of samples; {remedy}")
    sizes = np.array([shard.bytes for _, shard in filled], np.uint64)
    starts = np.cumsum([0, *counts[:-1]])
    last_offset = np.maximum.reduceat(samples["offset"], starts)
    last_end = np.maximum.reduceat(samples["offset"] + samples["nbytes"], starts)  # wraps for a huge offset
    if (last_offset > sizes).any() or (last_end > sizes).any() or samples["nbytes"].max() > MAX_BYTES:
        raise ValueError(f"{table} has samples that lie outside their shards, or above {MAX_BYTES:,} bytes; {remedy}")


def shard_size_problems(root: Path, shards: Sequence[ShardEntry]) -> list[str]:
    """Describe each shard that is missing or differs in size from the index."""
    problems = []
    for shard in shards:
        path = root / shard.file
        if not path.is_file():
            kind = "a folder, no file" if path.is_dir() else "no regular file" if path.exists() else "missing"
            problems.append(f"{shard.file} is {kind}")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{shard.file} has {path.stat().st_size} bytes, the index says {shard.bytes}")
    return problems


def class_table_sha256(classes: Sequence[ClassEntry]) -> str:
    """Hash the mapping from labels to classes; image counts do not matter."""
    table = [[c.label, c.name, c.source_id] for c in classes]
    return hashlib.sha256(json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")).hexdigest()


def write_index(
    root: Path,
    *,
    dataset: str,
    build: Mapping[str, Any],
    shards: Mapping[str, Sequence[tuple[str, ListedShard]]],
    classes: Mapping[str, Sequence[tuple[str, int | str]]],
    keys_repeat: Collection[str] = (),
    pairs: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the tables and, last, `index.json`.

    `shards` are the listed shard files of every split in order, `classes` the (name, source id)
    of every label of every split; `build` records how the shards were built,
    `keys_repeat` names the splits in which two samples have one key; `pairs`, int64 [n, 4] with the columns
    `PAIR_COLUMNS`, belongs to the splits that are verification sets. Two splits with the
    same class table share one label space (query and gallery).
    """
    splits: dict[str, dict[str, Any]] = {}
    for split, files in shards.items():
        samples = np.concatenate([np.empty(0, SAMPLE_DTYPE), *(listed.rows for _, listed in files)])
        samples["shard"] = np.repeat(np.arange(len(files)), [len(listed.rows) for _, listed in files])
        with publish(root / sample_table_name(split)) as stream:
            np.save(stream, samples)
        counts = np.bincount(samples["label"], minlength=len(classes[split])).tolist()
        entries = [
            ClassEntry(label, name, source_id, count)
            for label, ((name, source_id), count) in enumerate(zip(classes[split], counts, strict=True))
        ]
        with publish(root / class_table_name(split)) as stream:
            for entry in entries:
                stream.write(_json_line([entry.name, entry.source_id, entry.count]))
        splits[split] = {
            "num_samples": len(samples),
            "num_classes": len(entries),
            "class_table_sha256": class_table_sha256(entries),
            "samples": _table_record(root / sample_table_name(split)),
            "classes": _table_record(root / class_table_name(split)),
            "shards": [
                ShardEntry(file, len(listed.rows), listed.num_bytes, listed.sha256)._asdict() for file, listed in files
            ],
        }
        if split in keys_repeat:
            splits[split]["keys_repeat"] = True
        cameras = [camera for _, listed in files for camera in listed.cameras]
        if len(cameras) == len(samples) > 0:
            with publish(root / camera_table_name(split)) as stream:
                np.save(stream, np.array(cameras, "<i4"))
            splits[split]["cameras"] = _table_record(root / camera_table_name(split))
        if pairs is not None and split in pairs:
            with publish(root / pair_table_name(split)) as stream:
                np.savetxt(stream, pairs[split], "%d", "\t", header="\t".join(PAIR_COLUMNS), comments="")
            record = _table_record(root / pair_table_name(split))
            splits[split]["pairs"] = {**record, "num_pairs": len(pairs[split])}
    document = {
        "kind": INDEX_KIND,
        "version": _TURNING_VERSION if build.get("exif") == "applied" else INDEX_VERSION,
        "dataset": dataset,
        "build": dict(build),
        "splits": splits,
    }
    publish_text(root / INDEX_FILE, _one_record_per_line(document))


def _table_record(table: Path) -> dict[str, Any]:
    return {"file": table.name, "sha256": sha256_of(table)}


def _json_line(record: Sequence[Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8")


def _one_record_per_line(document: Mapping[str, Any]) -> str:
    """Format JSON with one shard per line, easy to read and diff."""
    text = json.dumps(document, ensure_ascii=False, indent=1)
    return re.sub(r"\{[^{}\[\]]*\}", lambda record: re.sub(r"\n\s*", " ", record.group()), text) + "\n"
