"""Build of a folder of shards from source images: shuffled once, written by several processes, resumable.

    order of a split    its images sorted by Philox draws of (seed, split); a sample's id is its place in that order
    shard               a pure function of its samples, so any process may write it without waiting for another
    journal             build.unfinished.jsonl, a line per finished shard: file, fingerprint, bytes, sha256
    index               written last; then the journal is removed

A killed build resumes with the same command. A shard is kept if its line's fingerprint (a hash of all its bytes depend
on: format, settings, keys, labels, metadata, and path, size and time of every source file) and the file's sha256 still
match; all others are written again, so the result is identical to that of an uninterrupted build.

Chosen: a fork server for the processes, which forks without the caller's threads and locks; checking only an image's
header and last bytes, since decoding takes ten times as long as storing. An image without its format's proper end is
decoded in full, which finds truncated ones. `on_bad="skip"` decodes every image, so that what is kept also decodes in
training. What is neither JPEG, PNG nor WebP is stored as PNG, of the pixels that training would see. A photograph that
a camera stored turned keeps its bytes; the index says that reading turns it, unless the data set is a published one.
Declined: keeping an interrupted process's partial shard; deciding about unusable images while shards are written,
because a skipped image shifts all later ids (so `on_bad="skip"` checks every image first).
"""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from dist_proxygml.data.datasets import FileSlice, SourceDataset, SourceImage
from dist_proxygml.data.images import (
    ORIENTATION_TAG,
    UPRIGHT,
    image_extension,
    is_cut,
    opened,
    orientation,
    read_image_file,
    rgb_pixels,
    to_rgb,
    turn,
)
from dist_proxygml.data.index import INDEX_FILE, JOURNAL_FILE, open_index, read_index, write_index
from dist_proxygml.data.shards import ListedShard, ShardSample, list_shard, sample_key, shard_name, write_shard
from dist_proxygml.storage.files import parse_json, publish

_FORMAT = 2  # of the shards' bytes; raising it invalidates shards of earlier versions
_IMAGES_PER_WORKER = 1000  # starting a process takes about as long as storing these
_MAX_WORKERS = 8
_NUM_SHOWN = 20
_KEPT_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")

_SHARD = re.compile(r"[^.]+-\d{6}\.tar")
_TABLE = re.compile(r"index\.((samples|cameras)\..+\.npy|classes\..+\.jsonl|pairs\..+\.tsv|json)")
# A folder of embeddings, a search index, an export, a run: replacing one later would delete the shards with it.
_OF_OTHERS = ("manifest.json", "export.json", "config.json")
_TEMPORARY = re.compile(rf"({_SHARD.pattern}|{_TABLE.pattern})\.tmp-\d+")

Task = TypeVar("Task")
Result = TypeVar("Result")


class UnusableImage(NamedTuple):
    """A source image that cannot become a sample."""

    split: str
    name: str
    where: str
    reason: str  # the same on every machine


class BuildResult(NamedTuple):
    """Result of a build."""

    num_shards: int
    num_kept: int  # of an interrupted build
    skipped: list[UnusableImage]
    already_there: bool  # the folder held this build; nothing was written
    num_turned: int = 0  # images with an EXIF orientation other than upright
    is_upright: bool = False  # they are turned when they are read
    reencoded: Mapping[str, int] = {}  # images by format that are stored as PNG
    lost_classes: tuple[str, ...] = ()  # none of whose images could be used


class _ShardTask(NamedTuple):
    path: Path
    first_id: int
    images: list[SourceImage]
    labels: list[int]
    resize: int | None
    known: Mapping[str, Any] | None  # the journal's line
    upright: bool = False


class _BuiltShard(NamedTuple):
    file: str
    fingerprint: str
    listed: ListedShard | None  # None: it has unusable images
    unusable: list[UnusableImage]
    was_kept: bool


def build_shards(
    dataset: SourceDataset,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 500,
    resize: int | None = None,
    on_bad: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> BuildResult:
    """Write all splits of a data set as shuffled shards and, last, an index.

    `resize` re-encodes images whose shorter side is longer than that many pixels (JPEG, quality 95), and those that are
    neither JPEG nor PNG; without it what is neither JPEG, PNG nor WebP becomes PNG. `on_bad="skip"` skips unusable
    images and lists them in the index. `workers` is the number of writing processes; 1 is this one. The bytes depend
    neither on `workers` nor on interruptions.

    With `overwrite` all images are checked before a finished build is deleted.

    Raises ValueError if `out` cannot be written to, holds another finished build or shards of others without
    `overwrite`, or is in use by another build, or if images cannot be used (it names them); ChildProcessError if a
    worker was killed.
    """
    if samples_per_shard < 1 or workers < 1 or (resize is not None and resize < 1):
        raise ValueError(
            f"expected at least 1 sample per shard, 1 worker and 1 pixel, got {samples_per_shard}, {workers}, {resize}"
        )
    for split in _splits(dataset):
        if not re.fullmatch(r"[^./\s]{1,60}", split):
            raise ValueError(f"the split {split!r} cannot be part of a key: expected no dots, slashes and blanks")

    # 1. Is it already built?
    settings = build_settings(seed=seed, samples_per_shard=samples_per_shard, resize=resize)
    source = source_sha256(dataset)
    there = None if overwrite else _already_there(out, dataset.name, settings, source=source, on_bad=on_bad)
    if there is not None and not (out / JOURNAL_FILE).exists():
        return there

    # 2. Check the images, clear the folder, write the shards, write the index.
    with _Journal(out, overwrite=overwrite) as journal:
        # Another build may have finished before this one held the lock, or was killed between index and journal.
        there = None if overwrite else _already_there(out, dataset.name, settings, source=source, on_bad=on_bad)
        if there is not None:
            return there
        skipped: list[UnusableImage] = []
        lost_classes: tuple[str, ...] = ()
        if on_bad == "skip" or (out / INDEX_FILE).exists():  # nothing finished is deleted in favour of unusable images
            decode = on_bad == "skip"
            unusable = _unusable_images(dataset, resize=resize, decode=decode, workers=workers, quiet=quiet)
            if unusable and on_bad == "fail":
                raise _cannot_be_used(unusable, dataset)
            skipped = unusable
            left_out = {(image.split, image.name) for image in skipped}
            usable = [image for image in dataset.images if (image.split, image.name) not in left_out]
            if not usable:
                raise ValueError(f"none of {len(skipped)} images can be used:{_shown(skipped)}")
            left = {image.source_id for image in usable}
            lost_classes = tuple(sorted({i.class_name for i in dataset.images if i.source_id not in left}))
            dataset = replace(dataset, images=usable)
        _clear_folder(out, dataset, samples_per_shard=samples_per_shard, journal=journal, overwrite=overwrite)
        try:
            classes = {split: _class_table(dataset, split) for split in _splits(dataset)}
            tasks = _shard_tasks(
                dataset, out, classes, seed=seed, samples_per_shard=samples_per_shard, resize=resize, journal=journal
            )
            built, num_kept = _build_all(dataset, tasks, journal, workers=workers, quiet=quiet)
        finally:
            _remove(out, _TEMPORARY)  # of processes that were killed, now or in an earlier build
        build = {
            **settings,
            **dataset.build,
            "source_sha256": source,
            "skipped": [{"split": i.split, "name": i.name, "reason": i.reason} for i in skipped],
        }
        counted = Counter[str]()
        for listed in built.values():
            counted.update(listed.counted)
        if reencoded := {name: counted[name] for name in sorted(counted) if name not in ("turned", "upright")}:
            build["reencoded"] = reencoded
        if counted["turned"]:
            build["num_turned"] = counted["turned"]
        if counted["upright"]:
            build["exif"] = "applied"
        shards = {split: [(f, built[f]) for f in sorted(built) if f.rpartition("-")[0] == split] for split in classes}
        pairs = {split: _pair_ids(dataset, split, seed=seed) for split in dataset.pairs}
        for split, pairs_n4 in pairs.items():
            if len(pairs_n4) < len(dataset.pairs[split]):
                build.setdefault("pairs_left_out", {})[split] = len(dataset.pairs[split]) - len(pairs_n4)
        for name, content in dataset.beside.items():
            with publish(out / name) as stream:
                stream.write(content)
        write_index(out, dataset=dataset.name, build=build, shards=shards, classes=classes, pairs=pairs)
    result = BuildResult(len(built), num_kept, skipped, already_there=False, lost_classes=lost_classes)
    return _as_recorded(result, build)


def _as_recorded(result: BuildResult, build: Mapping[str, Any]) -> BuildResult:
    return result._replace(
        num_turned=build.get("num_turned", 0),
        is_upright=build.get("exif") == "applied",
        reencoded=build.get("reencoded", {}),
    )


_OVERWRITE = "pass --overwrite to replace them, or name another folder"


def build_settings(*, seed: int, samples_per_shard: int, resize: int | None) -> dict[str, Any]:
    """Return the index's record of how shards were built."""
    return {"layout": "shuffled", "seed": seed, "samples_per_shard": samples_per_shard, "resize": resize}


def finished_build(out: Path, *, dataset: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the build record of a finished folder, or None for any other folder.

    Raises ValueError if the finished folder is that of another data set or other settings.
    """
    try:
        if not (out / INDEX_FILE).exists():
            return None
    except OSError as problem:  # not allowed, a name too long
        raise _no_folder(out, problem) from problem
    try:
        document, _ = read_index(out)
    except ValueError as problem:
        raise ValueError(f"{out} already holds finished shards, but {problem}; {_OVERWRITE}") from problem
    build: Mapping[str, Any] = document["build"]
    theirs = {name: build.get(name) for name in settings}
    if document["dataset"] != dataset or theirs != settings:
        raise ValueError(
            f"{out} already holds finished shards of {document['dataset']} built with {theirs}, "
            f"which is not {dataset} with {dict(settings)}; {_OVERWRITE}"
        )
    return build


def _already_there(
    out: Path, dataset: str, settings: Mapping[str, Any], *, source: str, on_bad: str
) -> BuildResult | None:
    """Return the result if `out` holds this very build, None if it holds none. Raises ValueError for another one."""
    finished = finished_build(out, dataset=dataset, settings=settings)
    if finished is None:
        return None
    if finished.get("source_sha256") != source or (finished.get("skipped") and on_bad == "fail"):
        raise ValueError(f"{out} already holds finished shards of other images; {_OVERWRITE}")
    try:
        num_shards = sum(len(open_index(out, split).shards) for split in read_index(out)[0]["splits"])
    except ValueError as problem:
        raise ValueError(f"{out} already holds this build, but damaged: {problem}; or {_OVERWRITE}") from problem
    return _as_recorded(BuildResult(num_shards, 0, [], already_there=True), finished)


def source_sha256(dataset: SourceDataset) -> str:
    """Hash split, name, class and metadata of all images, pairs and files beside; not the images' bytes and times."""
    digest = hashlib.sha256()
    for image in dataset.images:
        digest.update(_json([image.split, image.name, image.source_id, image.class_name, image.info]))
    if dataset.pairs:
        digest.update(_json(dataset.pairs))
    for name, content in sorted(dataset.beside.items()):
        digest.update(_json([name, hashlib.sha256(content).hexdigest()]))
    return digest.hexdigest()


def default_workers(num_images: int) -> int:
    """Return the number of usable cores, at most 8, or 1 for few images."""
    return max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)), num_images // _IMAGES_PER_WORKER))


# ---- the folder ------------------------------------------------------------------------------------------------------


class _Journal:
    """The lines of `build.unfinished.jsonl`; its lock keeps other builds out of the folder.

    The lock is the journal's own: a file beside the folder, as of storage/lock.py, would stay there, or be removed
    under another build that waits for it. Removed on exit if the folder has its index.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.path = out / JOURNAL_FILE
        other = next((name for name in _OF_OTHERS if (out / name).exists()), None)
        if other is not None:
            raise ValueError(
                f"expected a folder for shards at {out}, found {other}: something else is there; name another folder"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            # In this order: a build that finishes meanwhile has its index before its journal goes.
            is_of_a_build = self.path.exists() or (out / INDEX_FILE).exists()
            if not (is_of_a_build or overwrite):
                _refuse_strangers(out, _tars(out))
            self._stream = open(self.path, "a+b")
        except OSError as problem:
            raise _no_folder(out, problem) from problem
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise ValueError(f"another process builds shards in {out}; wait for it, or name another folder") from None
        if not self.path.exists() or not os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat()):
            self._stream.close()  # the lock of a deleted file excludes nobody
            raise ValueError(f"another process finished its build in {out} just now; run the command again")
        self._stream.seek(0)
        whole, newline, _ = self._stream.read().rpartition(b"\n")
        self._stream.truncate(len(whole) + len(newline))  # an incomplete line
        self.lines: dict[str, Mapping[str, Any]] = {}
        for line in whole.splitlines():
            try:
                record = parse_json(line)
                self.lines[record["file"]] = record
            except (ValueError, KeyError, TypeError):
                continue  # its shard will be written again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        if self.path.with_name(INDEX_FILE).exists():
            self.path.unlink(missing_ok=True)
        self._stream.close()

    def add(self, file: str, fingerprint: str, listed: ListedShard) -> None:
        """Record a finished shard."""
        record = {"file": file, "fingerprint": fingerprint, "bytes": listed.num_bytes, "sha256": listed.sha256}
        self._stream.write(_json(record) + b"\n")
        self._stream.flush()

    def forget(self) -> None:
        """Drop all lines."""
        self._stream.truncate(0)
        self.lines = {}


def _no_folder(out: Path, problem: OSError) -> ValueError:
    return ValueError(f"{out} cannot be a folder to write shards to: {problem.strerror}; name another folder")


def _clear_folder(
    out: Path, dataset: SourceDataset, *, samples_per_shard: int, journal: _Journal, overwrite: bool
) -> None:
    """Remove remains of other builds; shards in the journal stay until a process has checked them."""
    finished = (out / INDEX_FILE).exists()
    if finished:  # and to be replaced
        (out / INDEX_FILE).unlink()  # first: a folder without it is an unfinished build
        journal.forget()
    num_images = Counter(image.split for image in dataset.images)
    planned = {shard_name(s, i) for s, n in num_images.items() for i in range(-(-n // samples_per_shard))}
    tars = _tars(out)
    if not (finished or overwrite):
        _refuse_strangers(out, tars - planned - journal.lines.keys())
    _remove(out, _TABLE)
    for file in tars - (planned & journal.lines.keys()):
        (out / file).unlink()


def _tars(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.is_file() and _SHARD.fullmatch(path.name)}


def _refuse_strangers(out: Path, tars: Collection[str]) -> None:
    if tars:
        raise ValueError(
            f"expected no shards of others in {out}, found {len(tars)} tars that are not of this build, first "
            f"{min(tars)}; pass --overwrite to delete them, or name another folder"
        )


def _remove(out: Path, names: re.Pattern[str]) -> None:
    for path in out.iterdir():
        if path.is_file() and names.fullmatch(path.name):
            path.unlink()


# ---- order and labels ------------------------------------------------------------------------------------------------


def _splits(dataset: SourceDataset) -> list[str]:
    return sorted({image.split for image in dataset.images}, key=lambda split: (split != "train", split))


def _class_table(dataset: SourceDataset, split: str) -> list[tuple[str, int | str]]:
    """List (name, source id) of every label of a split, in the order of the source's ids."""
    space = dataset.label_space(split)
    names = {image.source_id: image.class_name for image in dataset.images if image.split in space}
    return [(names[source_id], source_id) for source_id in sorted(names, key=lambda i: (isinstance(i, str), i))]


def _shuffled(images: list[SourceImage], *, split: str, seed: int) -> list[SourceImage]:
    draws = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(split.encode())])).random_raw(len(images))
    return [images[i] for i in np.argsort(draws, kind="stable")]


def _pair_ids(dataset: SourceDataset, split: str, *, seed: int) -> np.ndarray:
    """The pairs of a split as int64 [n, 4]: ids of both images, same, fold; without those of images left out."""
    images = _shuffled([image for image in dataset.images if image.split == split], split=split, seed=seed)
    id_of = {image.name: sample_id for sample_id, image in enumerate(images)}
    pairs = [
        (id_of[pair.first], id_of[pair.second], pair.is_same, pair.fold)
        for pair in dataset.pairs[split]
        if pair.first in id_of and pair.second in id_of
    ]
    return np.array(pairs, np.int64).reshape(-1, 4)


def _shard_tasks(
    dataset: SourceDataset,
    out: Path,
    classes: Mapping[str, list[tuple[str, int | str]]],
    *,
    seed: int,
    samples_per_shard: int,
    resize: int | None,
    journal: _Journal,
) -> Iterator[_ShardTask]:
    for split, table in classes.items():
        label_of = {source_id: label for label, (_, source_id) in enumerate(table)}
        images = _shuffled([image for image in dataset.images if image.split == split], split=split, seed=seed)
        for first in range(0, len(images), samples_per_shard):
            file = shard_name(split, first // samples_per_shard)
            part = images[first : first + samples_per_shard]
            labels = [label_of[image.source_id] for image in part]
            known = journal.lines.get(file)
            yield _ShardTask(out / file, first, part, labels, resize, known, dataset.is_upright)


def _build_all(
    dataset: SourceDataset, tasks: Iterable[_ShardTask], journal: _Journal, *, workers: int, quiet: bool
) -> tuple[dict[str, ListedShard], int]:
    """Build all shards; return their contents by file, and how many were kept. Raises ValueError naming all unusable
    images.
    """
    built: dict[str, ListedShard] = {}
    unusable: list[UnusableImage] = []
    num_kept = 0
    with (
        _progress(f"building {dataset.name}", len(dataset.images), quiet) as bar,
        closing(in_processes(_build_shard, tasks, workers)) as results,
    ):
        for shard in results:
            unusable += shard.unusable
            num_kept += shard.was_kept
            if shard.listed is None:
                continue
            if not shard.was_kept:
                journal.add(shard.file, shard.fingerprint, shard.listed)
            built[shard.file] = shard.listed._replace(keys=[], classes={})  # a million images should fit
            bar.update(len(shard.listed.rows))
    if unusable:
        raise _cannot_be_used(unusable, dataset)
    return built, num_kept


# ---- one shard, in any process ---------------------------------------------------------------------------------------


def _build_shard(task: _ShardTask) -> _BuiltShard:
    fingerprint = _fingerprint(task)
    file = task.path.name
    if task.known is not None and task.known.get("fingerprint") == fingerprint:
        try:
            listed = list_shard(task.path)
        except (ValueError, OSError):
            pass  # missing or damaged
        else:
            if listed.sha256 == task.known.get("sha256"):
                return _BuiltShard(file, fingerprint, listed, [], was_kept=True)
    try:
        listed = write_shard(task.path, _samples(task))
    except _UnusableImagesError as problem:
        return _BuiltShard(file, fingerprint, None, problem.images, was_kept=False)
    return _BuiltShard(file, fingerprint, listed, [], was_kept=False)


class _UnusableImagesError(Exception):
    def __init__(self, images: list[UnusableImage]) -> None:
        super().__init__(images)
        self.images = images


def _fingerprint(task: _ShardTask) -> str:
    """Hash everything that a shard's bytes depend on."""
    kept = all(image.name.lower().endswith(_KEPT_SUFFIXES) for image in task.images)
    program = None if kept and task.resize is None else PIL.__version__  # encoders differ in their bytes
    upright = ["upright"] if task.upright else []  # published sets keep the fingerprint that they had
    digest = hashlib.sha256(_json([_FORMAT, task.first_id, task.resize, program, *upright]))
    for image, label in zip(task.images, task.labels, strict=True):
        state: list[Any]
        if isinstance(image.content, bytes):
            state = [hashlib.sha256(image.content).hexdigest()]
        else:
            file, *part = image.content if isinstance(image.content, FileSlice) else (image.content,)
            try:
                status = os.stat(file)
            except OSError:
                state = [str(file), *part]  # reading it will report what is wrong
            else:
                state = [str(file), *part, status.st_size, status.st_mtime_ns]
        digest.update(_json([image.split, label, image.name, image.source_id, image.class_name, image.info, state]))
    return digest.hexdigest()


def _samples(task: _ShardTask) -> Iterator[ShardSample]:
    """Yield the samples of a shard. Raises _UnusableImagesError at the end, naming all unusable images."""
    unusable = []
    for sample_id, (image, label) in enumerate(zip(task.images, task.labels, strict=True), start=task.first_id):
        try:
            payload, extension, about = _load(image, resize=task.resize, upright=task.upright)
        except ValueError as problem:
            unusable.append(_unusable(image, problem))
            continue
        if unusable:
            continue  # check the rest without writing
        names = {
            "source": image.name,
            "source_id": image.source_id,
            "class_name": image.class_name,
            "split": image.split,
        }
        info = {**image.info, **names, **about}
        yield ShardSample(sample_key(image.split, sample_id), extension, payload, label, info)
    if unusable:
        raise _UnusableImagesError(unusable)


def _load(
    image: SourceImage, *, resize: int | None, upright: bool, decode: bool = False
) -> tuple[bytes, str, dict[str, Any]]:
    """Return the image file for the shard, its extension, and what its JSON says of it: width and height as training
    sees it, EXIF orientation if it has one, former format if that was none of a shard's.

    Raises ValueError with the reason.
    """
    payload = _read(image.content)
    extension = image_extension(payload)
    about: dict[str, Any] = {}
    with opened(payload, upright=upright, avif=True) as picture:
        size, turned = picture.size, orientation(picture)
        if turned != UPRIGHT:
            about["orientation"] = turned
        if resize is not None and (min(size) > resize or extension not in ("jpg", "png")):
            small = to_rgb(picture)
            factor = min(1.0, resize / min(small.size))
            size = (max(1, round(small.width * factor)), max(1, round(small.height * factor)))
            payload, extension = _as_jpeg(small.resize(size, Image.Resampling.LANCZOS), turned), "jpg"
        elif extension is None:
            about["reencoded"] = picture.format
            pixels_hw3 = rgb_pixels(picture)
            if upright:
                pixels_hw3 = turn(pixels_hw3, turned)
            size = (pixels_hw3.shape[1], pixels_hw3.shape[0])
            payload, extension = _as_png(Image.fromarray(pixels_hw3)), "png"
        elif decode or is_cut(payload):
            picture.load()
    if upright and turned != UPRIGHT:
        about["exif"] = "applied"
        if turned >= 5 and "reencoded" not in about:
            size = size[::-1]
    return payload, extension, {**about, "width": size[0], "height": size[1]}


def _as_png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _read(content: Path | str | bytes | FileSlice) -> bytes:
    if isinstance(content, FileSlice):
        return read_image_file(content.file, offset=content.offset, num_bytes=content.num_bytes)
    return content if isinstance(content, bytes) else read_image_file(Path(content))


def _as_jpeg(picture: Image.Image, turned: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = turned
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95, exif=b"" if turned == UPRIGHT else exif)
    return stream.getvalue()


# ---- unusable images -------------------------------------------------------------------------------------------------


class _CheckTask(NamedTuple):
    images: list[SourceImage]
    resize: int | None
    upright: bool
    decode: bool


def _unusable_images(
    dataset: SourceDataset, *, resize: int | None, decode: bool, workers: int, quiet: bool
) -> list[UnusableImage]:
    """Find the images that cannot become samples, sorted by split and name."""
    step = 500
    tasks = (
        _CheckTask(dataset.images[i : i + step], resize, dataset.is_upright, decode)
        for i in range(0, len(dataset.images), step)
    )
    found: list[UnusableImage] = []
    with (
        _progress(f"checking {dataset.name}", len(dataset.images), quiet) as bar,
        closing(in_processes(_check, tasks, workers)) as results,
    ):
        for num_images, unusable in results:
            found += unusable
            bar.update(num_images)
    return sorted(found)


def _check(task: _CheckTask) -> tuple[int, list[UnusableImage]]:
    unusable = []
    for image in task.images:
        try:
            _load(image, resize=task.resize, upright=task.upright, decode=task.decode)
        except ValueError as problem:
            unusable.append(_unusable(image, problem))
    return len(task.images), unusable


def _unusable(image: SourceImage, problem: ValueError) -> UnusableImage:
    where = image.name if isinstance(image.content, bytes | FileSlice) else str(image.content)
    return UnusableImage(image.split, image.name, where, str(problem))


def _cannot_be_used(unusable: list[UnusableImage], dataset: SourceDataset) -> ValueError:
    return ValueError(
        f"{len(unusable)} of {len(dataset.images)} images cannot be used:{_shown(unusable)}\n"
        "repair or remove them, or pass --on-bad skip to leave them out"
    )


def _shown(images: list[UnusableImage]) -> str:
    lines = [f"\n  {image.where}: {image.reason}" for image in sorted(images)[:_NUM_SHOWN]]
    return "".join(lines) + (f"\n  and {len(images) - _NUM_SHOWN} more" if len(images) > _NUM_SHOWN else "")


# ---- processes -------------------------------------------------------------------------------------------------------


def in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """Yield the results of all tasks as they complete, in any order. Few tasks are queued, as each holds its images'
    records.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_the_builder)
    try:
        waiting: set[Future[Result]] = set()
        for task in tasks:
            waiting.add(pool.submit(function, task))
            if len(waiting) == 2 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as problem:
        raise ChildProcessError(
            f"one of the {workers} worker processes was killed, most likely for want of memory; "
            "run the same command again, perhaps with fewer --num-workers: what is finished is kept"
        ) from problem
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_the_builder() -> None:
    """End this worker when the builder ends for any reason; a pool's worker would otherwise wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the builder decides
    builder = multiprocessing.parent_process()
    assert builder is not None, "runs in a worker"

    def watch() -> None:
        builder.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _progress(what: str, num_images: int, quiet: bool) -> tqdm:
    return tqdm(total=num_images, desc=what, unit=" images", disable=quiet, mininterval=0.5)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=dict).encode("utf-8")
