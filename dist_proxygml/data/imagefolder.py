"""Folders of images: `root/SPLIT/CLASS/image` or `root/CLASS/image`.

Links inside the folder are followed, others only below `follow_links`, since what lies there becomes part of shards
that are passed on. No folder is read twice, whatever links lead to it.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_proxygml.data.class_split import HALF, ClassSplit, notes_of_split, split_by_class
from dist_proxygml.data.datasets import (
    IMAGE_SUFFIXES,
    USUAL_SPLITS,
    SourceDataset,
    SourceImage,
    finish,
    is_hidden,
    listing,
)


def read_imagefolder(
    root: Path,
    *,
    allow_partial: bool = False,
    allow_empty: bool = False,
    allow_seen_classes: bool = False,
    split: ClassSplit = HALF,
    follow_links: Sequence[Path] = (),
) -> SourceDataset:
    """Read folders of images: `root/SPLIT/CLASS/*` with a split named train and at least one other, or
    `root/CLASS/*`; folders inside a class belong to it. Common split names match in any case (`Train`).

    The splits query and gallery share their classes, others only with `allow_seen_classes`. Without splits `split`
    divides the classes; if it says how many train, a folder `train` is an ordinary class, unless another folder has the
    name of a split. Links out of `root` and links to folders are refused unless they lead below one of `follow_links`,
    class folders without an image unless `allow_partial` or `allow_empty`; hidden files are ignored, other non-image
    files are counted.
    """
    root = Path(os.path.realpath(root))
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; point --data at a folder of class folders")
    split_of = {}  # top folder -> split
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir()):
        split_of[folder] = folder.lower() if folder.lower() in USUAL_SPLITS else folder
    twice = [folder for folder, name in split_of.items() if list(split_of.values()).count(name) > 1]
    own_split = "train" in split_of.values()
    if split.train is not None and len(USUAL_SPLITS & set(split_of.values())) < 2:
        own_split = False
    if own_split and twice:
        raise ValueError(f"{root} has two folders of one split, {twice[0]} and {twice[1]}; merge them")
    if own_split and split.train is not None:
        raise ValueError(f"{root} has its own split (a folder train), so --split-classes cannot be given; leave it out")
    images: list[SourceImage] = []
    others: dict[str, list[str]] = {}  # class folder -> its non-image files; "" for those in no class folder
    num_levels = 1 + own_split
    for name in _Tree(root, follow_links).files():
        *folders, file = name.split("/")
        is_image = os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        if not is_image or len(folders) < num_levels:
            others.setdefault("/".join(folders[:num_levels]) if len(folders) >= num_levels else "", []).append(file)
            continue
        split_name, class_name = (split_of[folders[0]], folders[1]) if own_split else ("", folders[0])
        images.append(SourceImage(split_name, class_name, class_name, name, f"{root}/{name}"))
    splits = {image.split for image in images}
    if own_split and (not images or (not allow_partial and (len(splits) < 2 or "train" not in splits))):
        raise ValueError(
            f"{root}: expected images of the split train and of at least one other (root/SPLIT/CLASS/image), "
            f"got only {', '.join(sorted(splits)) or 'other files'} in {listing(root)}; add the missing split, "
            "point --data at the folder of classes itself to split it by class, or pass --allow-partial; train is "
            "taken for a split: where it is a class, pass --split-classes N, of which N train"
        )
    have_images = {"/".join(image.name.split("/")[:num_levels]) for image in images}
    without = [folder for folder in _class_folders(root, num_levels) if folder not in have_images]
    shown = ", ".join(f"{folder!r} ({_by_suffix(others.get(folder, []))})" for folder in without[:10])
    shown = f"class folders without an image: {shown}{f' and {len(without) - 10} more' if without[10:] else ''}"
    if without and not (allow_partial or allow_empty):
        raise ValueError(
            f"{root} has {shown}; expected {', '.join(sorted(IMAGE_SUFFIXES))}: convert or rename the files, remove "
            "the folders, or pass --allow-partial to leave these classes out"
        )
    notes = [f"left out, {shown}"] if without else []
    if others:
        left_out = [file for files in others.values() for file in files]
        notes.append(
            f"{len(left_out)} files were left out: no images by their suffix, or in no class folder: "
            f"{_by_suffix(left_out)}"
        )
    if own_split and not splits <= USUAL_SPLITS:
        notes.append(
            f"train is taken for a split, so {', '.join(sorted(splits))} are splits; where they are classes, pass "
            "--split-classes N, of which N train"
        )
    record: dict[str, Any] = {}
    if not own_split:
        where = f"found {listing(root)} in {root}, expected SPLIT/CLASS/image or CLASS/image"
        split_of_class, record = split_by_class((image.source_id for image in images), split, where=where)
        images = [replace(image, split=split_of_class(image.source_id)) for image in images]
    dataset = finish(
        "imagefolder",
        images,
        root=root,
        allow_partial=allow_partial,
        allow_seen_classes=allow_seen_classes,
        shared_classes=(("query", "gallery"),),
    )
    notes += notes_of_split(record)
    return replace(dataset, notes=(*dataset.notes, *notes), build=record, is_upright=True)


def _class_folders(root: Path, num_levels: int) -> Iterator[str]:
    """Yield the path from `root` of every folder `num_levels` below it."""
    for path in sorted(root.glob("/".join("*" * num_levels))):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and not any(map(is_hidden, name.split("/"))):
            yield name


def _by_suffix(files: Sequence[str]) -> str:
    """Count files by suffix, most frequent first."""
    counts = Counter(os.path.splitext(file)[1] or "without suffix" for file in files).most_common(6)
    shown = ", ".join(f"{number} {suffix}" for suffix, number in counts[:5])
    return (shown or "empty") + (", ..." if len(counts) > 5 else "")


class _Tree:
    """The files below a folder, and below the folders that links in it lead to."""

    def __init__(self, root: Path, follow_links: Sequence[Path]) -> None:
        self.root = root
        self.allowed = [Path(os.path.realpath(folder)) for folder in follow_links]
        self.entered = {root}
        self.above: set[Path] = set()  # folders that hold one of those

    def files(self, folder: str = "") -> Iterator[str]:
        """Yield the path from the root of every file that is not hidden, folder by folder in sorted order."""
        with os.scandir(self.root / folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{folder}{entry.name}"
            if is_hidden(entry.name):
                continue
            if entry.is_symlink():
                self._check_link(entry.path)
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"the name of {entry.path!r} is not UTF-8; rename it") from None
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from self.files(f"{name}/")
            else:
                yield name

    def _check_link(self, path: str) -> None:
        real = Path(os.path.realpath(path))
        is_allowed = any(real.is_relative_to(folder) for folder in self.allowed)
        if not (is_allowed or real.is_relative_to(self.root)):
            raise ValueError(
                f"{path} is a link out of {self.root}, to {real}; copy the file, point --data higher up, or let it be "
                f"followed with --follow-links {real.parent}"
            )
        if not os.path.isdir(path):
            return
        if not is_allowed or real in self.above or not self.entered.isdisjoint((real, *real.parents)):
            more = "" if is_allowed or self.allowed else ", or pass --follow-links with the folder that it leads to"
            raise ValueError(f"{path} is a link to a folder, whose images would count twice; remove it{more}")
        self.entered.add(real)
        self.above.update(real.parents)
