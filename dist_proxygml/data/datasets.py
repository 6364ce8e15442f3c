"""Raw downloads to a list of images with classes: CUB, Cars, SOP, In-Shop, folders of images.

Always the metric-learning split: training and test classes are disjoint (the first half of the
classes trains on CUB and Cars), never the classification split that some downloads include.
Records are joined by id, not by line. Counts are checked against the literature, so that a
half-unpacked download is noticed; `allow_partial` skips what is missing instead.

Downloads may be nested in a folder or two, with tables beside or inside that folder and the line ends and suffixes of
another system: a layout is searched in `root` and two levels below, each file at the places where copies have it.
Hidden files and folders (`.DS_Store`, `._x.jpg`, `__MACOSX`) are ignored.
Declined: downloading (licences and dead links), unpacking, and reading any pixels here.
"""

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})
_ARCHIVE_SUFFIXES = (".zip", ".tgz", ".tar", ".gz", ".7z", ".rar")

# Images and classes of each split (Wah et al. 2011; Krause et al. 2013; Oh Song et al. 2016; Liu et
# al. 2016).
PUBLISHED_COUNTS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "cub200": {"train": (5_864, 100), "test": (5_924, 100)},
    "cars196": {"train": (8_054, 98), "test": (8_131, 98)},
    "sop": {"train": (59_551, 11_318), "test": (60_502, 11_316)},
    "inshop": {"train": (25_882, 3_997), "query": (14_218, 3_985), "gallery": (12_612, 3_985)},
}


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a raw data set."""

    split: str
    source_id: int | str  # the class's id in the source; labels follow its order
    class_name: str
    name: str  # the image's path or name in the source
    content: Path | bytes  # path of the image file, or its bytes
    info: Mapping[str, Any] = field(default_factory=dict)  # metadata for the sample's JSON


@dataclass(frozen=True)
class SourceDataset:
    """All images of a raw data set, in the order of the source."""

    name: str
    images: list[SourceImage]
    # Groups of splits with one label space; the classes of all others must be disjoint.
    shared_classes: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()  # what was skipped and how the folder was interpreted, a line each

    def label_space(self, split: str) -> tuple[str, ...]:
        """Return the splits that share their class table with `split`, including itself."""
        return next((group for group in self.shared_classes if split in group), (split,))


def read_cub200(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read CUB-200-2011: `images.txt`, `image_class_labels.txt` and `classes.txt`, joined by id.

    Classes 1-100 train, 101-200 test.
    """
    _, root = _find_layout(
        root, {"CUB_200_2011": [("images.txt",), ("image_class_labels.txt",), ("classes.txt",), ("images",)]}
    )
    names, labels, classes = (_table(root / table) for table in ("images.txt", "image_class_labels.txt", "classes.txt"))
    folder = _innermost(root / "images")
    boxes = {}
    if (root / "bounding_boxes.txt").is_file():
        rows = _rows(root / "bounding_boxes.txt", 5)
        boxes = {image_id: _box(box, f"{root / 'bounding_boxes.txt'}, image {image_id}") for image_id, *box in rows}
    if names.keys() != labels.keys():
        one_sided = sorted(names.keys() ^ labels.keys(), key=lambda image_id: (len(image_id), image_id))
        raise ValueError(
            f"{root}: images.txt and image_class_labels.txt list different ids "
            f"({len(one_sided)} in only one of them, first {one_sided[0]}); unpack it again"
        )
    images = []
    for image_id in sorted(names, key=lambda image_id: _as_int(image_id, root / "images.txt")):
        class_id = _as_int(labels[image_id], f"{root / 'image_class_labels.txt'}, image {image_id}")
        if labels[image_id] not in classes:
            raise ValueError(
                f"{root}: image {image_id} has class {labels[image_id]}, which classes.txt does not list; unpack again"
            )
        images.append(
            SourceImage(
                split="train" if class_id <= 100 else "test",
                source_id=class_id,
                class_name=classes[labels[image_id]],
                name=names[image_id],
                content=folder / names[image_id],
                info={"bbox_xywh": boxes[image_id]} if image_id in boxes else {},
            )
        )
    return _finish("cub200", images, root=root, allow_partial=allow_partial)


def read_cars196(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read Cars196 in any of its three layouts. Classes 1-98 train, 99-196 test.

    The `test` flag of the download belongs to the classification split and is ignored.

    `cars_annos.mat` + `car_ims/`; `devkit/` + `cars_train/` + `cars_test/`; `names.csv` +
    `anno_{train,test}.csv` + `car_data/`.
    """
    readers: dict[str, Callable[[Path], list[SourceImage]]] = {
        "one folder": _cars_one_folder,
        "devkit": _cars_devkit,
        "csv": _cars_csv,
    }
    layout, root = _find_layout(root, _CARS_LAYOUTS)
    return _finish("cars196", readers[layout](root), root=root, allow_partial=allow_partial)


_CARS_META = ("devkit/cars_meta.mat", "car_devkit/devkit/cars_meta.mat", "cars_meta.mat")
# Name of the image folder -> places of its table; the labelled test table was a separate download.
_CARS_TABLES = {
    folder: tuple(f"{place}{table}" for place in ("devkit/", "car_devkit/devkit/", ""))
    for folder, table in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels*.mat"),
    )
}
_CARS_LAYOUTS: dict[str, list[tuple[str, ...]]] = {
    "one folder": [("cars_annos.mat",), ("car_ims",)],
    "devkit": [_CARS_META, *_CARS_TABLES.values(), *((folder,) for folder in _CARS_TABLES)],
    "csv": [("names.csv",), ("anno_train.csv",), ("anno_test.csv",), ("car_data",)],
}


def _cars_image(class_id: int, class_names: list[str], name: str, path: Path, box: Iterable[int]) -> SourceImage:
    if not 1 <= class_id <= len(class_names):
        raise ValueError(
            f"{name} has class {class_id}, expected 1 to {len(class_names)}; unpack the Cars196 download again"
        )
    split = "train" if class_id <= 98 else "test"
    info = {"bbox_xyxy": [int(value) for value in box]}
    return SourceImage(split, class_id, class_names[class_id - 1], name, path, info)


def _cars_one_folder(root: Path) -> list[SourceImage]:
    names = _mat_strings(root / "cars_annos.mat", "class_names")
    folder = _innermost(root / "car_ims")
    images = []
    for row in _mat_records(root / "cars_annos.mat", "annotations", "relative_im_path", "class", *_CARS_BOX):
        path = str(row["relative_im_path"].item())
        box = [row[side].item() for side in _CARS_BOX]
        where = folder / path.removeprefix("car_ims/")
        images.append(_cars_image(int(row["class"].item()), names, path, where, box))
    return images


_CARS_BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def _cars_devkit(root: Path) -> list[SourceImage]:
    names = _mat_strings(_need(root, _CARS_META), "class_names")
    images = []
    # File names repeat across the two folders, so the folder belongs to the name.
    for folder, places in _CARS_TABLES.items():
        where = _innermost(root / folder)
        for row in _mat_records(_need(root, places), "annotations", "fname", "class", *_CARS_BOX):
            file = str(row["fname"].item())
            box = [row[side].item() for side in _CARS_BOX]
            images.append(_cars_image(int(row["class"].item()), names, f"{folder}/{file}", where / file, box))
    return images


def _cars_csv(root: Path) -> list[SourceImage]:
    names = [row[0].strip() for row in _csv_rows(root / "names.csv")]
    data = _innermost(root / "car_data")
    images = []
    for split in ("train", "test"):
        table = root / f"anno_{split}.csv"
        for row in _csv_rows(table):
            if len(row) != 6:
                raise ValueError(f"{table}: expected 6 columns, got {','.join(row)!r}; unpack the download again")
            file, *sides, label = row
            class_id, *box = (_as_int(text, f"{table}, image {file}") for text in (label, *sides))
            known = 1 <= class_id <= len(names)
            path = data / split / (names[class_id - 1].replace("/", "-") if known else "") / file
            images.append(_cars_image(class_id, names, str(path.relative_to(root)), path, box))
    return images


def _csv_rows(path: Path) -> list[list[str]]:
    return [row for row in csv.reader(_lines(path)) if row]


def read_sop(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`; a header, 1-based ids."""
    _, root = _find_layout(root, {"Stanford_Online_Products": [("Ebay_train.txt",), ("Ebay_test.txt",)]})
    images = []
    for split in ("train", "test"):
        rows = _rows(root / f"Ebay_{split}.txt", 4)
        header = next(rows, ())
        if header != ("image_id", "class_id", "super_class_id", "path"):
            raise ValueError(
                f"{root}/Ebay_{split}.txt: expected the header 'image_id class_id super_class_id "
                f"path', got {' '.join(header)!r}"
            )
        for _, class_id, _, path in rows:
            category = path.split("/")[0].removesuffix("_final")
            name = f"{category}_{class_id}"
            info = {"category": category}
            number = _as_int(class_id, f"{root}/Ebay_{split}.txt, image {path}")
            images.append(SourceImage(split, number, name, path, root / path, info))
    return _finish("sop", images, root=root, allow_partial=allow_partial)


_INSHOP_LISTS = tuple(f"{place}list_eval_partition.txt" for place in ("Eval/", "Anno/", ""))
_INSHOP_FOLDERS = ("Img/img", "img", "Img/img_highres", "img_highres")


def read_inshop(root: Path, *, allow_partial: bool = False) -> SourceDataset:
    """Read In-Shop Clothes Retrieval of DeepFashion: `Eval/list_eval_partition.txt`, with `img` or, if that is
    missing, `img_highres`.

    The splits are train, query and gallery; the last two share one label space and are scored
    against each other.
    """
    _, root = _find_layout(root, {"In-shop Clothes Retrieval Benchmark": [_INSHOP_LISTS, _INSHOP_FOLDERS]})
    table = _need(root, _INSHOP_LISTS)
    announced = next(iter(_lines(table)), "").strip()
    if not announced.isdigit():
        raise ValueError(
            f"{table}: expected the number of images in line 1, got {announced[:80]!r}; unpack the download again"
        )
    rows = _rows(table, 3, skip_lines=1)
    header = next(rows, ())
    if header != ("image_name", "item_id", "evaluation_status"):
        raise ValueError(
            f"{table}: expected the header 'image_name item_id evaluation_status', got {' '.join(header)!r}"
        )
    listed = list(rows)
    # Of the existing folders, the one with the listed images.
    tops = {name.removeprefix("img/").split("/")[0] for name, _, _ in listed}
    folders = [_innermost(root / place) for place in _INSHOP_FOLDERS if (root / place).is_dir()]
    folder = next((folder for folder in folders if any((folder / top).is_dir() for top in tops)), folders[0])
    images = []
    for name, item, status in listed:
        if status not in ("train", "query", "gallery"):
            raise ValueError(f"{table}: {name} has the status {status!r}, expected train, query or gallery")
        info = {"category": "/".join(name.split("/")[1:3])}
        images.append(SourceImage(status, item, item, name, folder / name.removeprefix("img/"), info))
    if len(images) != int(announced) and not allow_partial:
        raise ValueError(
            f"{table} announces {announced} images and lists {len(images)}; unpack it again, or pass --allow-partial"
        )
    return _finish(
        "inshop",
        images,
        root=root,
        allow_partial=allow_partial,
        shared_classes=(("query", "gallery"),),
    )


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
            f"got only {', '.join(sorted(splits)) or 'other files'} in {_listing(root)}; add the missing split, "
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
                f"one, and one to test unless --split-classes names them all. Found {_listing(root)}; expected "
                "SPLIT/CLASS/image or CLASS/image"
            )
        train = set(classes[:num_train])
        images = [replace(image, split="train" if image.class_name in train else "test") for image in images]
        if num_train == len(classes):
            notes.append("all classes train, so there is no test split: train with data.test_split=null")
    dataset = _finish(
        "imagefolder", images, root=root, allow_partial=allow_partial, allow_seen_classes=allow_seen_classes
    )
    return replace(dataset, notes=(*dataset.notes, *notes))


def _class_folders(root: Path, num_levels: int) -> Iterator[str]:
    """Yield the path from `root` of every folder `num_levels` below it."""
    for path in sorted(root.glob("/".join("*" * num_levels))):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and not any(map(_is_hidden, name.split("/"))):
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
        if _is_hidden(entry.name):
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


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _finish(
    name: str,
    images: list[SourceImage],
    *,
    root: Path,
    allow_partial: bool,
    allow_seen_classes: bool = False,
    shared_classes: tuple[tuple[str, ...], ...] = (),
) -> SourceDataset:
    """Check names, files, counts and that classes are disjoint."""
    _check_names(images, root)
    on_disk = [_on_disk(image) for image in images]
    missing = [image for image, there in zip(images, on_disk, strict=True) if there is None]
    if missing and not allow_partial:
        raise ValueError(
            f"{len(missing)} of the {len(images)} images that {root} lists are missing or no files (links to nowhere, "
            f"pipes), first {missing[0].name}; unpack it again, or pass --allow-partial to leave them out"
        )
    notes = (f"{len(missing)} listed images are not there and were left out (--allow-partial)",) if missing else ()
    dataset = SourceDataset(name, [image for image in on_disk if image is not None], shared_classes, notes)
    if not dataset.images:
        raise ValueError(
            f"{root} has none of the {len(missing)} listed images of {name}; found {_listing(root)}; "
            "point --root at the unpacked download"
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
                "to one side, or pass --allow-seen-classes if the test images are new ones of trained classes"
            )
        if known_name != image.class_name:
            raise ValueError(
                f"class {image.source_id} has two names, {known_name!r} and {image.class_name!r}; rename one"
            )


def _check_names(images: Sequence[SourceImage], root: Path) -> None:
    seen = set()
    for image in images:
        if image.name in seen:
            raise ValueError(f"{root} lists {image.name} twice; unpack the download again")
        seen.add(image.name)
        if image.name.startswith("/") or ".." in image.name.split("/"):
            raise ValueError(f"{root} lists {image.name}, which leads out of it; unpack the download again")


def _on_disk(image: SourceImage) -> SourceImage | None:
    """Return the image with an existing path, where a copy has `.jpg` for the list's `.JPG` or vice versa."""
    if isinstance(image.content, bytes) or image.content.is_file():
        return image
    for suffix in (image.content.suffix.lower(), image.content.suffix.upper()):
        if image.content.with_suffix(suffix).is_file():
            return replace(image, content=image.content.with_suffix(suffix))
    return None


def _find_layout(root: Path, layouts: Mapping[str, Sequence[tuple[str, ...]]]) -> tuple[str, Path]:
    """Find the first layout that `root`, or a folder at most two levels below, contains completely.

    A layout is a list of required files, each with the places (patterns) where it may be.
    """
    level = [root]
    archives: list[str] = []
    for _ in range(3):
        found = [
            (layout, folder)
            for folder in level
            for layout, needed in layouts.items()
            if all(_place(folder, places) for places in needed)
        ]
        if len({folder for _, folder in found}) > 1:
            folders = ", ".join(str(folder) for _, folder in found)
            raise ValueError(f"{root} has several downloads: {folders}; point --root at one of them")
        if found:
            return found[0]
        entries = [entry for folder in level if folder.is_dir() for entry in sorted(folder.iterdir())]
        archives += [str(e.relative_to(root)) for e in entries if e.name.lower().endswith(_ARCHIVE_SUFFIXES)]
        level = [entry for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]
    looked_for = "; or ".join(
        f"{', '.join(' or '.join(places) for places in needed)} ({layout})" for layout, needed in layouts.items()
    )
    unpack = f"unpack {', '.join(archives[:5])}" if archives else "point --root at the unpacked download"
    raise ValueError(
        f"{root} is not a download that is known: looked for {looked_for}, there and two levels below; "
        f"found {_listing(root)}; {unpack}"
    )


def _place(folder: Path, places: Sequence[str]) -> Path | None:
    return next((path for place in places for path in sorted(folder.glob(place))), None)


def _need(folder: Path, places: Sequence[str]) -> Path:
    path = _place(folder, places)
    assert path is not None, "the layout was found with it"
    return path


def _innermost(folder: Path) -> Path:
    """Return `images/images/` of an archive unpacked into a folder of its own name; otherwise the folder itself."""
    while (folder / folder.name).is_dir():
        folder = folder / folder.name
    return folder


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "a file, no folder" if folder.exists() else "no such folder"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more if names else "an empty folder"


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file, without byte-order mark and with the line ends of any system."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no regular file; unpack the download again")
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path} is not a text file in UTF-8 ({problem}); unpack the download again") from problem


def _rows(path: Path, num_fields: int, *, skip_lines: int = 0) -> Iterator[tuple[str, ...]]:
    """Read the lines of a text table, split at white space; the last field may contain blanks."""
    for number, line in enumerate(_lines(path), start=1):
        if number <= skip_lines or not line.strip():
            continue
        fields = tuple(line.split(maxsplit=num_fields - 1))
        if len(fields) != num_fields:
            raise ValueError(
                f"{path}, line {number}: expected {num_fields} fields, got {line.strip()!r}; unpack the download again"
            )
        yield (*fields[:-1], fields[-1].strip())


def _table(path: Path) -> dict[str, str]:
    """Read a text table of two fields, the first of which is the key."""
    table: dict[str, str] = {}
    for key, value in _rows(path, 2):
        if key in table:
            raise ValueError(f"{path} has the id {key} twice; unpack the download again")
        table[key] = value
    return table


def _as_int(text: str, where: str | Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: expected a whole number, got {text[:40]!r}; unpack the download again") from None


def _box(sides: Sequence[str], where: str) -> list[float]:
    try:
        return [float(side) for side in sides]
    except ValueError:
        raise ValueError(f"{where}: expected numbers, got {' '.join(sides)!r}; unpack the download again") from None


def _load_mat(path: Path, variable: str) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as problem:
        raise ValueError("reading Cars196's .mat files needs scipy; run `pip install scipy`") from problem
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        content = loadmat(str(path))
    except Exception as problem:  # scipy raises ValueError, TypeError, zlib.error ... on damaged files
        raise ValueError(f"{path} is not a readable MATLAB file ({problem}); unpack the download again") from problem
    if variable not in content:
        raise ValueError(f"{path} has no variable {variable!r}; unpack the download again")
    return np.asarray(content[variable]).ravel()


def _mat_strings(path: Path, variable: str) -> list[str]:
    return [str(cell.item()) for cell in _load_mat(path, variable)]


def _mat_records(path: Path, variable: str, *fields: str) -> np.ndarray:
    records = _load_mat(path, variable)
    missing = set(fields) - set(records.dtype.names or ())
    if missing:
        raise ValueError(f"{path}: {variable} lacks {', '.join(sorted(missing))}; it is another table of Cars196")
    return records
