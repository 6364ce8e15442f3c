"""The result of a reader of raw data: a list of images with classes, checked before anything is built of it.

Training and test classes are disjoint, always: retrieval is measured on classes that training never saw. Counts of
published data sets are checked against the literature, so that a half-unpacked download is noticed; `allow_partial`
skips what is missing instead.
Hidden files and folders (`.DS_Store`, `._x.jpg`, `__MACOSX`) are ignored.

Each layout has a reader in a file of its own: `published`, `imagefolder`, `table`. Declined: downloading (licences and
dead links), unpacking, and reading any pixels here.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm"}
)

USUAL_SPLITS = frozenset({"train", "test", "val", "query", "gallery"})

# Images and classes of each split (Wah et al. 2011; Krause et al. 2013; Oh Song et al. 2016; Liu et
# al. 2016; Zheng et al. 2015; Wei et al. 2018).
PUBLISHED_COUNTS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "cub200": {"train": (5_864, 100), "test": (5_924, 100)},
    "cars196": {"train": (8_054, 98), "test": (8_131, 98)},
    "sop": {"train": (59_551, 11_318), "test": (60_502, 11_316)},
    "inshop": {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)},
    # The distractors of Market-1501's gallery count as a class, its junk is left out.
    "market1501": {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 751)},
    "msmt17": {"train": (32_621, 1_041), "query": (11_659, 3_060), "gallery": (82_161, 3_060)},
}


class FileSlice(NamedTuple):
    """The bytes of an image inside a larger file, read when its shard is written: no millions of images in memory."""

    file: Path
    offset: int
    num_bytes: int


class SourcePair(NamedTuple):
    """A pair of a verification set, by the names of its images."""

    first: str
    second: str
    is_same: bool
    fold: int


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a raw data set."""

    split: str
    source_id: int | str  # the class's id in the source; labels follow its order
    class_name: str
    name: str  # the image's path or name in the source
    # The path of the image file (a str takes less memory), its bytes, or where they are.
    content: Path | str | bytes | FileSlice
    info: Mapping[str, Any] = field(default_factory=dict)  # metadata for the sample's JSON


@dataclass(frozen=True)
class SourceDataset:
    """All images of a raw data set, in the order of the source."""

    name: str
    images: list[SourceImage]
    # Groups of splits with one label space; the classes of all others must be disjoint.
    shared_classes: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()  # what was skipped and how the folder was interpreted, a line each
    build: Mapping[str, Any] = field(default_factory=dict)  # choices of the reader for the index to record
    is_upright: bool = False  # EXIF orientation is applied; never to published sets, nor in all numbers on them
    pairs: Mapping[str, Sequence[SourcePair]] = field(default_factory=dict)  # of the splits that are verification sets
    beside: Mapping[str, bytes] = field(default_factory=dict)  # files for the shards' folder, such as licences

    def label_space(self, split: str) -> tuple[str, ...]:
        """Return the splits that share their class table with `split`, including itself."""
        return next((group for group in self.shared_classes if split in group), (split,))


def finish(
    name: str,
    images: list[SourceImage],
    *,
    root: Path,
    allow_partial: bool,
    allow_seen_classes: bool = False,
    shared_classes: tuple[tuple[str, ...], ...] = (),
    place: Callable[[int], str] | None = None,
) -> SourceDataset:
    """Check names, files, counts and that classes are disjoint; `place` says where an image is listed, for messages."""
    _check_names(images, root, place)
    on_disk = [_on_disk(image) for image in images]
    missing = [number for number, image in enumerate(on_disk) if image is None]
    if missing and not allow_partial:
        places = "".join(f"\n  {place(number)}: {images[number].name}" for number in missing[:20]) if place else ""
        first, separator = (f":{places}", "\n") if places else (f" {images[missing[0]].name}", "; ")
        raise ValueError(
            f"{len(missing)} of the {len(images)} images that {root} lists are missing or no files (links to nowhere, "
            f"pipes), first{first}{separator}unpack it again, or pass --allow-partial to leave them out"
        )
    notes = (f"{len(missing)} listed images are not there and were left out (--allow-partial)",) if missing else ()
    dataset = SourceDataset(name, [image for image in on_disk if image is not None], shared_classes, notes)
    if not dataset.images:
        raise ValueError(
            f"{root} has none of the {len(missing)} listed images of {name}; found {listing(root)}; "
            "point --data at the unpacked download"
        )
    counts = count_images(dataset)
    if not allow_partial:
        for split, expected in PUBLISHED_COUNTS.get(name, {}).items():
            found = counts.get(split, (0, 0))
            if found != expected:
                raise ValueError(
                    f"{name} {split}: expected {expected[0]} images of {expected[1]} classes as "
                    f"published, got {found[0]} of {found[1]} in {root}; unpack it again, "
                    "or pass --allow-partial"
                )
    check_classes(dataset, allow_seen=allow_seen_classes)
    return dataset


def count_images(dataset: SourceDataset) -> dict[str, tuple[int, int]]:
    """Count the images and classes of every split."""
    images: dict[str, int] = {}
    classes: dict[str, set[int | str]] = {}
    for image in dataset.images:
        images[image.split] = images.get(image.split, 0) + 1
        classes.setdefault(image.split, set()).add(image.source_id)
    return {split: (images[split], len(classes[split])) for split in images}


def check_classes(dataset: SourceDataset, *, allow_seen: bool = False) -> None:
    """Raise ValueError if an id has two names or, without `allow_seen`, a class is on both sides of the split."""
    home: dict[int | str, tuple[tuple[str, ...], str]] = {}
    for image in dataset.images:
        space = dataset.label_space(image.split)
        known_space, known_name = home.setdefault(image.source_id, (space, image.class_name))
        if known_space != space and not allow_seen:
            raise ValueError(
                f"class {image.source_id} ({image.class_name}) is in {'/'.join(known_space)} and "
                f"in {image.split}, but retrieval is measured on classes that training never saw; move all its images "
                "to one side, divide a table's classes anew with --split-classes, or pass --allow-seen-classes if the "
                "test images are new ones of trained classes"
            )
        if known_name != image.class_name:
            raise ValueError(
                f"class {image.source_id} has two names, {known_name!r} and {image.class_name!r}; rename one"
            )


def _check_names(images: Sequence[SourceImage], root: Path, place: Callable[[int], str] | None) -> None:
    seen = set()
    for number, image in enumerate(images):
        if image.name in seen:
            listed = f"{place(number)} lists" if place else f"{root} lists"
            raise ValueError(f"{listed} {image.name} twice; unpack the download again, or remove one")
        seen.add(image.name)
        if image.name.startswith("/") or ".." in image.name.split("/"):
            raise ValueError(f"{root} lists {image.name}, which leads out of it; unpack the download again")


def _on_disk(image: SourceImage) -> SourceImage | None:
    """Return the image with an existing path, where a copy has `.jpg` for the list's `.JPG` or vice versa."""
    if isinstance(image.content, bytes | FileSlice) or os.path.isfile(image.content):
        return image
    stem, suffix = os.path.splitext(image.content)
    there = next((path for path in (stem + suffix.lower(), stem + suffix.upper()) if os.path.isfile(path)), None)
    return None if there is None else replace(image, content=there)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out, with all below it."""
    return name.startswith(".") or name == "__MACOSX"


def listing(folder: Path) -> str:
    """Return the first names in a folder, for messages."""
    if not folder.is_dir():
        return "a file, no folder" if folder.exists() else "no such folder"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more if names else "an empty folder"


def text_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without byte-order mark and with the line ends of any system."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no regular file; unpack the download again")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not a text file in UTF-8 ({problem}); unpack the download again") from problem
