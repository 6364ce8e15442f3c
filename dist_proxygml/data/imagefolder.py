"""Folders of images: `root/SPLIT/CLASS/image` or `root/CLASS/image`."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dist_proxygml.data.datasets import IMAGE_SUFFIXES, SourceDataset, SourceImage, finish, is_hidden, listing

_USUAL_SPLITS = frozenset({"train", "test", "val", "query", "gallery"})


def read_imagefolder(
    root: Path,
    *,
    allow_partial: bool = False,
    allow_empty: bool = False,
    allow_seen_classes: bool = False,
    num_train_classes: int | None = None,
) -> SourceDataset:
    """Read folders of images: `root/SPLIT/CLASS/*` with a split named train and at least one other, or
    `root/CLASS/*`; folders inside a class belong to it. Common split names match in any case (`Train`).

    Without splits the first `num_train_classes` classes in sorted order train and the others test;
    None means half of them, and with all of them there is no other split. With that number a folder `train` is an
    ordinary class, unless another folder has the name of a split. Splits share classes only with `allow_seen_classes`.
    Links out of `root`, links to folders and class folders without an image are refused (the last not with
    `allow_partial` or `allow_empty`); hidden files are ignored, other non-image files are counted.
    """
    root = Path(os.path.realpath(root))
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; point --root at a folder of class folders")
    split_of = {}  # top folder -> split
    for folder in sorted(path.name for path in root.iterdir() if path.is_dir()):
        split_of[folder] = folder.lower() if folder.lower() in _USUAL_SPLITS else folder
    twice = [folder for folder, split in split_of.items() if list(split_of.values()).count(split) > 1]
    own_split = "train" in split_of.values()
    if num_train_classes is not None and len(_USUAL_SPLITS & set(split_of.values())) < 2:
        own_split = False
    if own_split and twice:
        raise ValueError(f"{root} has two folders of one split, {twice[0]} and {twice[1]}; merge them")
    if own_split and num_train_classes is not None:
        raise ValueError(f"{root} has its own split (a folder train), so --split-classes cannot be given; leave it out")
    images: list[SourceImage] = []
    others: dict[str, list[str]] = {}  # class folder -> its non-image files; "" for those in no class folder
    num_levels = 1 + own_split
    for name in _files_below(root):
        *folders, file = name.split("/")
        is_image = os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        if not is_image or len(folders) < num_levels:
            others.setdefault("/".join(folders[:num_levels]) if len(folders) >= num_levels else "", []).append(file)
            continue
        split, class_name = (split_of[folders[0]], folders[1]) if own_split else ("", folders[0])
        images.append(SourceImage(split, class_name, class_name, name, root / name))
    splits = {image.split for image in images}
    if own_split and (not images or (not allow_partial and (len(splits) < 2 or "train" not in splits))):
        raise ValueError(
            f"{root}: expected images of the split train and of at least one other (root/SPLIT/CLASS/image), "
            f"got only {', '.join(sorted(splits)) or 'other files'} in {listing(root)}; add the missing split, "
            "point --root at the folder of classes itself to split it by class, or pass --allow-partial; train is "
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
    if own_split and not splits <= _USUAL_SPLITS:
        notes.append(
            f"train is taken for a split, so {', '.join(sorted(splits))} are splits; where they are classes, pass "
            "--split-classes N, of which N train"
        )
    if not own_split:
        classes = sorted({image.class_name for image in images})
        num_train = len(classes) // 2 if num_train_classes is None else num_train_classes
        if not 0 < num_train <= len(classes) or (num_train_classes is None and len(classes) < 2):
            raise ValueError(
                f"{root} has {len(classes)} classes with images, of which {num_train} would train; expected at least "
                f"one, and one to test unless --split-classes names them all. Found {listing(root)}; expected "
                "SPLIT/CLASS/image or CLASS/image"
            )
        train = set(classes[:num_train])
        images = [replace(image, split="train" if image.class_name in train else "test") for image in images]
        if num_train == len(classes):
            notes.append("all classes train, so there is no test split: train with data.test_split=null")
    dataset = finish(
        "imagefolder", images, root=root, allow_partial=allow_partial, allow_seen_classes=allow_seen_classes
    )
    return replace(dataset, notes=(*dataset.notes, *notes))


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


def _files_below(root: Path, folder: str = "") -> Iterator[str]:
    """Yield the path from `root` of every non-hidden file below it, in sorted order."""
    with os.scandir(root / folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{folder}{entry.name}"
        if is_hidden(entry.name):
            continue
        if entry.is_symlink():
            if not Path(os.path.realpath(entry.path)).is_relative_to(root):
                raise ValueError(f"{entry.path} is a link out of {root}; copy the file, or point --root higher up")
            if os.path.isdir(entry.path):
                raise ValueError(f"{entry.path} is a link to a folder, whose images would count twice; remove it")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the name of {entry.path!r} is not UTF-8; rename it") from None
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(root, f"{name}/")
        else:
            yield name
